"""Check results against their records, and rebuild records that are broken or missing.

Reads   every *.record.json under a folder, the artifacts beside them, and the inputs that the
        records name
Prints  one line for each fault: a record that is broken or missing, an artifact that is gone or
        has changed since its record was written, an input that has changed since the artifact was
        made
Writes  with --fix a record for each artifact whose record is broken or missing. The new record has
        the hash of the present artifact and says that it was rebuilt. It does not know the inputs
        of the artifact. It has the modification time of the artifact, so that Snakemake makes
        nothing again.

The exit status is 1 if a fault is left. Missing policies are only counted, because the workflow
itself deletes them without keep_policies.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import _path  # noqa: F401
from sppo.core.artifacts import file_hash, read_record, record_path, write_json
from sppo.core.errors import UserError, run
from sppo.evaluation.registry import EVALUATIONS
from sppo.workflow.deleted import POLICIES

# The stage of an artifact by its path below a run's folder. Rebuilt records take the stage from it.
STAGE_OF = {
    r"iter0/policy": "policy_source",
    r"iter0/preference_model": "preference_source",
    r"iter\d+/prompts\.parquet": "sample",
    r"iter\d+/responses/\d+\.parquet": "generate",
    r"iter\d+/preferences/\d+\.parquet": "annotate",
    r"iter\d+/grades/\d+\.parquet": "grade",
    r"iter\d+/pairs\.parquet": "select",
    r"iter\d+/logps/\w+/\d+\.parquet": "reference",
    r"iter\d+/(policy|train_log\.jsonl|lookahead|lookahead_log\.jsonl)": "train",
    r"iter\d+/(.*/)?(\w+_outputs\.json|\w+_answers\.jsonl?)": "answer",
    r"iter\d+/measurements\.json": "measure",
    r"iter\d+/preference_dataset": "export",
    r"iter\d+/pushed_to_hub\.json": "push",
    **{rf"iter\d+/(.*/)?{each.name}\w*\.jsonl?": each.stage for each in EVALUATIONS},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="?", default=Path("results"))
    parser.add_argument("--fix", action="store_true", help="rebuild broken and missing records")
    args = parser.parse_args()
    if not args.results.is_dir():
        raise UserError(f"the folder {args.results} does not exist; name a folder with results")

    # Artifacts with a record, and artifacts without one.
    artifacts = {
        Path(str(record).removesuffix(".record.json"))
        for record in args.results.rglob("*.record.json")
    }
    artifacts |= {path for path in args.results.rglob("*") if stage_of(path)}
    faults = gone_policies = 0
    for artifact in sorted(artifacts):
        if artifact.name in POLICIES and not os.path.lexists(artifact):
            gone_policies += 1
            continue
        for fault, is_of_record in check(artifact):
            if args.fix and is_of_record:
                rebuild(artifact)
                fault += "; it has been rebuilt"
            else:
                faults += 1
            print(f"{artifact}: {fault}", flush=True)
    summary = f"{len(artifacts)} artifacts, {faults} faults"
    if gone_policies:
        summary += f"; {gone_policies} policies are gone, which is no fault"
    print(summary)
    if faults:
        sys.exit(1)


def check(artifact: Path) -> Iterator[tuple[str, bool]]:
    """The faults of an artifact, each with whether rebuilding its record removes the fault."""
    if not os.path.lexists(artifact):
        yield "it is gone, but its record exists", False
        return
    try:
        record = read_record(artifact)
    except UserError as error:
        yield str(error).partition(";")[0], record_path(artifact).is_file()
        return
    if record is None:
        yield "it has no record", True
        return
    try:
        if hash_of(artifact) != record["sha256"]:
            yield "it has changed since its record was written", False
        for path, recorded_hash in record.get("inputs", {}).items():
            if Path(path).exists() and hash_of(Path(path)) != recorded_hash:
                yield f"its input {path} has changed since it was made", False
    except UserError as error:
        yield str(error), False


hash_of = functools.cache(file_hash)


def rebuild(artifact: Path) -> None:
    """Write a record with only the hash and the stage of an artifact, as old as the artifact."""
    record = record_path(artifact)
    write_json(
        record,
        {
            "artifact": str(artifact),
            "sha256": hash_of(artifact),
            "stage": stage_of(artifact),
            "stage_version": None,
            "inputs": {},
            "arguments": {},
            "rebuilt": True,
        },
    )
    time = artifact.stat().st_mtime_ns
    os.utime(record, ns=(time, time))


def stage_of(artifact: Path) -> str | None:
    """The stage that makes an artifact; None if the path does not say."""
    for pattern, stage in STAGE_OF.items():
        if re.search(rf"(^|/){pattern}$", artifact.as_posix()):
            return stage
    return None


if __name__ == "__main__":
    run(main)
