"""List the artifacts that older code made than the code that lies here.

Reads   every *.record.json under a folder
Prints  a line an artifact: which of program, package src/sppo or stage version differs. Nothing is rerun:
        to make one again, delete it and run Snakemake.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import _path  # noqa: F401
from sppo.core.artifacts import ROOT, STAGES, code_hashes, read_record
from sppo.core.errors import UserError, run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="?", default=Path("results"))
    args = parser.parse_args()

    records = sorted(args.results.rglob("*.record.json"))
    stale = 0
    for path in records:
        artifact = str(path).removesuffix(".record.json")
        try:
            record = read_record(Path(artifact))
        except UserError as error:
            print(error)
            continue
        if record.get("rebuilt"):
            print(f"{artifact}: unknown, its record was rebuilt")
        elif why := differences(record):
            print(f"{artifact}: other {' and '.join(why)}")
            stale += 1
    print(f"{stale} of {len(records)} artifacts were made by older code")


def differences(record: dict) -> list[str]:
    """What of the code that made an artifact has changed since."""
    made_by, program = record["code"], ROOT / "src" / record["code"]["program"]
    if not program.is_file():
        return ["program (gone)"]
    now = code_hashes(program)
    why = [
        name
        for name, key in (("program", "program_sha256"), ("src/sppo", "sppo_sha256"))
        if now[key] != made_by[key]
    ]
    return why + (
        ["stage version"] if STAGES.get(record["stage"]) != record["stage_version"] else []
    )


if __name__ == "__main__":
    run(main)
