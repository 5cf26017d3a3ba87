"""Prepare PairRM, iter0/preference_model, before any sampling.

Reads   a folder in one of PairRM's two layouts, or the hub at a pinned revision (from the local
        cache if it is there)
Writes  a folder of links to its files, and a record with the hub commit. Files in any other layout
        are an error here, so that the run does not fail later.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import _path  # noqa: F401
from sppo.core.artifacts import recorded, written_whole
from sppo.core.errors import run
from sppo.policies.models import fetch, link_files
from sppo.preferences.adapters import check_pairrm


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a folder or a hub id")
    parser.add_argument("--revision", default=None, help="commit of the hub model")
    parser.add_argument(
        "--backend",
        choices=["transformers", "llm_blender"],
        default="transformers",
        help="library that will run the model",
    )
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    folder, commit = fetch(args.model, args.revision, "preference.model")
    layout = check_pairrm(folder, args.backend)
    with recorded("preference_source", args.output, [], vars(args)) as facts:
        with written_whole(args.output) as temporary:
            link_files(folder, temporary)
        facts |= {"commit": commit, "layout": layout}


if __name__ == "__main__":
    run(main)
