"""Fetch AlpacaEval's 805 instructions with GPT-4 turbo's outputs, and the instruction difficulties of the length-controlled metric.

Reads   the data set tatsu-lab/alpaca_eval on the hub at a pinned commit (local cache first; with HF_HUB_OFFLINE=1 that alone)
Writes  both files as published, and their records: the instructions are checked one by one, the difficulties by sha256
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

REMEDY = "or name files of your own as alpaca_eval.instructions, reference and difficulty"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--reference",
        type=Path,
        required=True,
        help="where the instructions with their reference outputs go",
    )
    parser.add_argument("--difficulty", type=Path, required=True, help="where the difficulties go")
    args = parser.parse_args()

    reference, difficulty = fetched(OFFICIAL_REFERENCE), fetched(DIFFICULTY)
    if file_hash(difficulty) != OFFICIAL_DIFFICULTY:
        raise UserError(
            f"{DIFFICULTY} of {DATASET} has another sha256 than the published file; delete it from the hub's cache and run again, {REMEDY}"
        )
    outputs = read_outputs(reference)
    check_order(outputs, difficulty)
    if outputs[0]["generator"] != OFFICIAL_GENERATOR:
        raise UserError(
            f"{OFFICIAL_REFERENCE} of {DATASET} is by {outputs[0]['generator']}, not {OFFICIAL_GENERATOR}; delete it from the hub's cache "
            f"and run again, {REMEDY}"
        )
    for source, target in ((reference, args.reference), (difficulty, args.difficulty)):
        with (
            recorded("answer", target, [], vars(args)) as facts,
            written_whole(target) as temporary,
        ):
            shutil.copyfile(source, temporary)
            facts |= {"data_set": DATASET, "commit": DATASET_REVISION}


def fetched(name: str) -> Path:
    """The file in the hub's local cache."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(
            hf_hub_download(
                DATASET, name, repo_type="dataset", revision=DATASET_REVISION, token=hub_token()
            )
        )
    except (
        Exception
    ) as error:  # the hub client raises many types; each is a matter of network or access
        raise UserError(
            f"cannot get {name} of {DATASET} at {DATASET_REVISION} from the hub {hub_failure(error)}, {REMEDY}"
        ) from error


if __name__ == "__main__":
    run(main)
