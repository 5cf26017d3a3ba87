"""List the artifacts that were made by older code than the present code.

Reads   every *.record.json under a folder
Prints  one line for each such artifact: whether the program, the package src/sppo or the stage
        version differs. Nothing is made again; to do that, delete the artifact and run Snakemake.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import _path  # noqa: F401
from sppo.core.artifacts import ROOT, code_hashes, read_record
from sppo.core.errors import UserError, run
from sppo.core.stages import STAGES


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="?", default=Path("results"))
    args = parser.parse_args()

    if not args.results.is_dir():
        raise UserError(f"the folder {args.results} does not exist; name a folder with results")
    records = sorted(args.results.rglob("*.record.json"))
    stale = 0
    for path in records:
        artifact = str(path).removesuffix(".record.json")
        try:
            record = read_record(Path(artifact))
        except UserError as error:
            print(error)
            continue
        if record is None:
            continue  # deleted since the folder was listed
        if record.get("rebuilt"):
            print(f"{artifact}: unknown, because its record was rebuilt")
            continue
        changed = differences(record)
        if changed:
            print(f"{artifact}: other {' and '.join(changed)}")
            stale += 1
    print(f"{stale} of {len(records)} artifacts were made by older code")


def differences(record: dict[str, Any]) -> list[str]:
    """The parts of the code that have changed since the artifact of this record was made."""
    made_by = record["code"]
    program = ROOT / "src" / made_by["program"]
    if not program.is_file():
        return ["program (gone)"]
    now = code_hashes(program)
    changed = []
    if now["program_sha256"] != made_by["program_sha256"]:
        changed.append("program")
    if now["sppo_sha256"] != made_by["sppo_sha256"]:
        changed.append("src/sppo")
    if STAGES.get(record["stage"]) != record["stage_version"]:
        changed.append("stage version")
    return changed


if __name__ == "__main__":
    run(main)
