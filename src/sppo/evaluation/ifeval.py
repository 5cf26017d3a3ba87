"""IFEval: the checks before the first job, and what makes a result differ from published ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sppo.core.errors import UserError
from sppo.policies.prompts import normalised
from sppo.preferences.constraints import read_instructions_to_check

OFFICIAL_SIZE = 541


def check_inputs(config: dict[str, Any], where: str) -> set[str]:
    """The normalised prompts, which must not be trained on; else UserError. Nothing for `official`.

    where: the run, for the error line.
    """
    chosen = config["ifeval"]["instructions"]
    if chosen == "official":
        return set()
    try:
        instructions = read_instructions_to_check(Path(chosen))
    except UserError as error:
        raise UserError(f"config: {where}ifeval.instructions: {error}") from None
    limit = config["ifeval"]["limit"]
    if limit and limit > len(instructions):
        raise UserError(
            f"config: {where}ifeval.limit is {limit}, but {chosen} has {len(instructions)}"
            " instructions; lower it"
        )
    return {normalised(each.prompt) for each in instructions}


def differences(found: dict[str, Any]) -> list[str]:
    """The differences from the setup of published figures, for the tables."""
    if found.get("n_prompts") != OFFICIAL_SIZE:
        return [f"{found.get('n_prompts')} other instructions"]
    return []
