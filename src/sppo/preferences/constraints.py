"""Instructions whose constraints code can check, in the form of IFEval (arXiv 2311.07911).

A record has a `prompt`, `instruction_id_list`, a list of the ids of its constraints such as
`keywords:existence`, and `kwargs`, a list of their arguments. lm-eval's checkers decide whether a
response follows a constraint. Reading the records imports nothing heavy.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sppo.core.artifacts import json_lines
from sppo.core.errors import UserError

if TYPE_CHECKING:
    from types import ModuleType

# Constraints on a number, and the argument that is the number.
COUNTS = {
    "keywords:frequency": "frequency",
    "keywords:letter_frequency": "let_frequency",
    "length_constraints:number_sentences": "num_sentences",
    "length_constraints:number_paragraphs": "num_paragraphs",
    "length_constraints:number_words": "num_words",
    "detectable_content:number_placeholders": "num_placeholders",
    "detectable_format:number_bullet_lists": "num_bullets",
    "detectable_format:number_highlighted_sections": "num_highlights",
    "detectable_format:multiple_sections": "num_sections",
    "change_case:capital_word_frequency": "capital_frequency",
}
FURTHEST = 100  # a count that is further off is as bad as this
# A response that contains so many consecutive words of the request copies it.
COPIED_WORDS = 8
REPEATED_WORDS, REPEATED_TIMES = 4, 3  # the same 4 words three times are a repetition
ENDS = tuple(".!?…:\"'”’)]}>*`")  # a response that ends otherwise is unfinished


@dataclass(frozen=True)
class Constraint:
    """One constraint. arguments: keyword arguments of lm-eval's checker."""

    id: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Instruction:
    """A prompt with its constraints."""

    prompt: str
    constraints: tuple[Constraint, ...]

    @property
    def record(self) -> dict[str, Any]:
        """The instruction in IFEval's form."""
        return {
            "key": 0,
            "prompt": self.prompt,
            "instruction_id_list": [each.id for each in self.constraints],
            "kwargs": [each.arguments for each in self.constraints],
        }


def read_instructions_to_check(path: Path) -> list[Instruction]:
    """The instructions of a JSONL file in IFEval's form.

    Raises `UserError` that names the first line that has another form. Whether lm-eval knows the
    constraints is decided by `check_known`.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; give a JSONL file in the form of IFEval")
    found = []
    for number, row in enumerate(json_lines(path), 1):
        where = f"{path} line {number}"
        prompt = row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"{where} has no text in prompt; give records in the form of IFEval")
        ids, arguments = row.get("instruction_id_list"), row.get("kwargs")
        if not isinstance(ids, list) or not ids or not all(isinstance(one, str) for one in ids):
            raise UserError(f"{where}: instruction_id_list is no list of ids; correct it")
        if not isinstance(arguments, list) or len(arguments) != len(ids):
            raise UserError(f"{where}: kwargs must have one object for each of the {len(ids)} ids")
        if not all(isinstance(one, dict) for one in arguments):
            raise UserError(f"{where}: kwargs has an entry that is no object; correct it")
        # The official file gives every argument of every constraint, and null for those not used.
        given = [
            {key: value for key, value in one.items() if value is not None} for one in arguments
        ]
        found.append(Instruction(prompt, tuple(map(Constraint, ids, given))))
    if not found:
        raise UserError(f"{path} has no instructions; give a JSONL file in the form of IFEval")
    return found


@functools.cache
def lm_eval_ifeval() -> ModuleType:
    """lm-eval's module of IFEval's metrics."""
    from sppo.core.patches import ifeval_runs_offline

    ifeval_runs_offline()
    from lm_eval.tasks.ifeval import utils

    return utils


def checker(constraint: Constraint) -> Any:
    """lm-eval's checker of a constraint: an object with `check_following(response)`."""
    kinds = lm_eval_ifeval().instructions_registry.INSTRUCTION_DICT
    found = kinds[constraint.id](constraint.id)
    found.build_description(**constraint.arguments)
    return found


def check_known(instructions: list[Instruction], path: Path) -> None:
    """Raise `UserError` for a constraint that lm-eval does not know, or one without an argument.

    lm-eval would choose a missing argument at random.
    """
    kinds = lm_eval_ifeval().instructions_registry.INSTRUCTION_DICT
    for number, instruction in enumerate(instructions, 1):
        for constraint in instruction.constraints:
            where = f"{path} line {number}: constraint {constraint.id}"
            if constraint.id not in kinds:
                raise UserError(f"{where} is unknown; give one of {', '.join(sorted(kinds))}")
            try:
                found = checker(constraint)
            except (TypeError, ValueError, AttributeError) as error:
                raise UserError(f"{where} has wrong kwargs ({error}); correct them") from None
            missing = set(found.get_instruction_args_keys()) - constraint.arguments.keys()
            if missing:
                raise UserError(f"{where} has no {min(missing)} in kwargs; add it")


def follows(instruction: Instruction, response: str) -> tuple[list[bool], list[bool]]:
    """Whether a response follows each constraint, strictly and loosely, by lm-eval's functions.

    Loose: also without its first or last line, or without asterisks.
    """
    metrics = lm_eval_ifeval()
    asked = metrics.InputExample(**instruction.record)
    strict = metrics.test_instruction_following_strict(asked, response)
    loose = metrics.test_instruction_following_loose(asked, response)
    return strict.follow_instruction_list, loose.follow_instruction_list


def distance(constraint: Constraint, response: str) -> float | None:
    """By how much the number that a constraint asks for must change for the response to follow it.

    0 if the response follows it; at most `FURTHEST`. Commas count for `no_comma`, missing keywords
    for `existence`, forbidden words for `forbidden_words`. None for a constraint of another kind,
    which is only followed or not.
    """
    if constraint.id == "punctuation:no_comma":
        return float(min(response.count(","), FURTHEST))
    for kind, key in (("existence", "keywords"), ("forbidden_words", "forbidden_words")):
        if constraint.id == f"keywords:{kind}":
            words = constraint.arguments[key]
            single = [Constraint(constraint.id, {key: [word]}) for word in words]
            return float(sum(not checker(one).check_following(response) for one in single))
    key = COUNTS.get(constraint.id, "")
    if not key:
        return None
    asked = constraint.arguments[key]
    for change in range(FURTHEST):
        for number in {asked - change, asked + change}:
            if number < 0:
                continue
            other = Constraint(constraint.id, constraint.arguments | {key: number})
            if checker(other).check_following(response):
                return float(change)
    return float(FURTHEST)


def flaws(instruction: Instruction, response: str) -> int:
    """How many signs of a degenerate response there are, from 0 to 3.

    It ends in the middle of a sentence, it repeats itself, or it copies the request. An empty
    response has all three.
    """
    text = response.strip()
    if not text:
        return 3
    words = _words(text)
    unfinished = not text.endswith(ENDS)
    sequences = Counter(_sequences(words, REPEATED_WORDS))
    lines = Counter(line.strip() for line in re.split(r"(?<=[.!?])\s+|\n", text) if line.strip())
    repeated = max(sequences.values(), default=0) >= REPEATED_TIMES or max(lines.values()) > 1
    copied = False
    if all(each.id != "combination:repeat_prompt" for each in instruction.constraints):
        asked = set(_sequences(_words(instruction.prompt), COPIED_WORDS))
        copied = not asked.isdisjoint(_sequences(words, COPIED_WORDS))
    return int(unfinished) + int(repeated) + int(copied)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _sequences(words: list[str], length: int) -> list[tuple[str, ...]]:
    """All sequences of `length` consecutive words."""
    return [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]
