"""Put a preference model that is fetched into its place, before anything is sampled.

Reads   a folder, or the hub at a pinned revision (the local cache first), with the model's files
Writes  iter0/preference_model, a folder of links to its files, and a record with the hub's commit.
        Files of another layout are refused here, not after sampling.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import _path  # noqa: F401
from sppo.core.artifacts import recorded, written_whole
from sppo.core.errors import run
from sppo.core.flags import add_section
from sppo.policies.folders import link_files
from sppo.preferences.base import KIND_FILE, find_kind, kind_of, settings_for


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_section(parser, "preference", only=("model", "revision", "backend", "kind"))
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    kind = kind_of(vars(args))
    folder, known = kind.prepare(vars(args))
    with recorded("preference_source", args.output, [], vars(args)) as facts:
        with written_whole(args.output) as temporary:
            link_files(folder, temporary)
            if find_kind(settings_for(str(temporary), backend=args.backend)) is not kind:
                (temporary / KIND_FILE).write_text(f"{kind.kind}\n", encoding="utf-8")
        facts |= known


if __name__ == "__main__":
    run(main)
