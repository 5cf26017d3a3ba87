"""Fetch AlpacaEval's 805 instructions with GPT-4 Turbo's outputs, and their difficulties.

The length-controlled win rate needs the difficulties.

Reads   the data set tatsu-lab/alpaca_eval on the hub at a pinned commit; from the local cache if
        it is there, and only from the cache if HF_HUB_OFFLINE=1
Writes  both files as published, and their records. Each instruction is checked, and the
        difficulties are checked by sha256.

Licence of the data: CC BY-NC 4.0
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import _path  # noqa: F401
from sppo.core.artifacts import file_hash, recorded, written_whole
from sppo.core.errors import UserError, run
from sppo.evaluation.alpaca_eval import (
    DATASET,
    DATASET_REVISION,
    DIFFICULTY,
    OFFICIAL_DIFFICULTY,
    OFFICIAL_GENERATOR,
    OFFICIAL_REFERENCE,
    check_order,
    read_outputs,
)
from sppo.policies.hub import hub_failure, hub_token

REMEDY = "or set alpaca_eval.instructions, reference and difficulty to your own files"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--reference",
        type=Path,
        required=True,
        help="output file of the instructions with their reference outputs",
    )
    parser.add_argument(
        "--difficulty", type=Path, required=True, help="output file of the difficulties"
    )
    args = parser.parse_args()

    reference, difficulty = fetched(OFFICIAL_REFERENCE), fetched(DIFFICULTY)
    if file_hash(difficulty) != OFFICIAL_DIFFICULTY:
        raise UserError(
            f"{DIFFICULTY} of {DATASET} has another sha256 than the published file; "
            f"delete it from the hub's cache and run again, {REMEDY}"
        )
    outputs = read_outputs(reference)
    check_order(outputs, difficulty)
    if outputs[0]["generator"] != OFFICIAL_GENERATOR:
        raise UserError(
            f"{OFFICIAL_REFERENCE} of {DATASET} is by {outputs[0]['generator']}, "
            f"not {OFFICIAL_GENERATOR}; delete it from the hub's cache and run again, {REMEDY}"
        )
    for source, target in ((reference, args.reference), (difficulty, args.difficulty)):
        with (
            recorded("answer", target, [], vars(args)) as facts,
            written_whole(target) as temporary,
        ):
            shutil.copyfile(source, temporary)
            facts |= {"data_set": DATASET, "commit": DATASET_REVISION}


def fetched(name: str) -> Path:
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
            f"{hub_failure(error)}, {REMEDY}"
        ) from error
    return Path(path)


if __name__ == "__main__":
    run(main)
