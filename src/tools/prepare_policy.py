"""Prepare the base policy, iter0/policy.

Reads   a model folder, or a hub model at a pinned revision (from the local cache if it is there)
Writes  a folder of links to the model's files, and a record with the hub commit
"""

from __future__ import annotations

import argparse
from pathlib import Path

import _path  # noqa: F401
from sppo.core.artifacts import recorded, written_whole
from sppo.core.errors import run
from sppo.policies.chats import load_tokenizer, template_hash
from sppo.policies.folders import check_policy, fetch, link_files
from sppo.policies.models import load_config


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a model folder or a hub id")
    parser.add_argument("--revision", default=None, help="commit of the hub model")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    folder, commit = fetch(args.model, args.revision)
    check_policy(folder, made_here=False)
    load_config(folder)
    template = template_hash(load_tokenizer(folder))
    with recorded("policy_source", args.output, [], vars(args)) as facts:
        with written_whole(args.output) as temporary:
            link_files(folder, temporary)
        facts |= {"commit": commit, "chat_template_sha256": template}


if __name__ == "__main__":
    run(main)
