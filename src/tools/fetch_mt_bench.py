"""Fetch MT-Bench's questions, judge prompts and reference answers from the FastChat repository.

Reads   FastChat's data at v0.2.36 on GitHub, because the package on PyPI does not contain the data
Writes  a folder with question.jsonl, judge_prompts.jsonl and reference_answer_gpt-4.jsonl, each
        checked by sha256
"""

from __future__ import annotations

import argparse
import hashlib
import urllib.error
import urllib.request
from pathlib import Path

import _path  # noqa: F401
from sppo.core.artifacts import recorded, written_whole
from sppo.core.errors import UserError, run
from sppo.evaluation.mt_bench import FASTCHAT, OFFICIAL


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the three files")
    parser.add_argument("--source", default=FASTCHAT, help="address of FastChat's llm_judge/data/")
    args = parser.parse_args()

    with recorded("mt_bench", args.output, [], vars(args)), written_whole(args.output) as folder:
        folder.mkdir()
        for name, (path, sha256) in OFFICIAL.items():
            try:
                content = urllib.request.urlopen(args.source + path, timeout=60).read()
            except (urllib.error.URLError, OSError) as error:
                raise UserError(
                    f"cannot fetch {args.source + path} ({error}); check the network, "
                    "or copy the three files into a folder and set mt_bench.data to it"
                ) from None
            if hashlib.sha256(content).hexdigest() != sha256:
                raise UserError(
                    f"{args.source + path} is not the file of FastChat 0.2.36; "
                    "copy the three files into a folder and set mt_bench.data to it"
                )
            (folder / name).write_bytes(content)


if __name__ == "__main__":
    run(main)
