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
# Constraints on words, and the argument that lists them.
WORDS = {"keywords:existence": "keywords", "keywords:forbidden_words": "forbidden_words"}
# What an argument must be: a whole number, a list of texts, else a text.
NUMBERS = {*COUNTS.values(), "nth_paragraph"}
LISTS = {*WORDS.values()}
FURTHEST = 100  # a count that is further off is as bad as this
# A response that contains so many consecutive words of the request copies it.
COPIED_WORDS = 8
# A response with fewer different words that the request lacks says too little of its own.
OWN_WORDS = 6
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
    """Raise `UserError` for a constraint that lm-eval does not know, or one with wrong arguments.

    path: the file of the instructions, one in each line.
    """
    kinds = lm_eval_ifeval().instructions_registry.INSTRUCTION_DICT
    for number, instruction in enumerate(instructions, 1):
        for constraint in instruction.constraints:
            where = f"{path} line {number}: constraint {constraint.id}"
            if constraint.id not in kinds:
                raise UserError(f"{where} is unknown; give one of {', '.join(sorted(kinds))}")
            problem = _problem(constraint)
            if problem:
                raise UserError(f"{where} {problem}; correct its kwargs")


def _problem(constraint: Constraint) -> str | None:
    """What is wrong with a constraint's arguments, None if nothing is.

    lm-eval chooses an argument at random if it is missing, empty, 0 or negative, and it reads a
    text instead of a list as the list of its letters. So these are errors here. It also replaces a
    letter other than a to z. That is no error, because two official prompts ask for # and !.
    """
    given = constraint.arguments
    kind = lm_eval_ifeval().instructions_registry.INSTRUCTION_DICT[constraint.id](constraint.id)
    expected = set(kind.get_instruction_args_keys())
    if missing := expected - given.keys():
        return f"has no {min(missing)}"
    if unknown := given.keys() - expected:
        return f"takes no {min(unknown)}"
    for name, value in given.items():
        if name in NUMBERS and not (type(value) is int and value >= 1):
            return f"has {name} {value!r}, which is no whole number of at least 1"
        if name in LISTS and not (isinstance(value, list) and value and all(map(_is_text, value))):
            return f"has {name} {value!r}, which is no list of texts"
        if name not in NUMBERS | LISTS and not _is_text(value):
            return f"has {name} {value!r}, which is no text"
    if given.get("nth_paragraph", 1) > given.get("num_paragraphs", 1):
        return "has an nth_paragraph above its num_paragraphs"
    try:
        checker(constraint).check_following("word")  # compiles keywords, as regular expressions
    except (ValueError, KeyError, re.error) as error:
        return f"is refused by lm-eval ({type(error).__name__}: {error})"
    return None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


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

    0 if the response follows it; at most `FURTHEST`, also for an empty response, which follows
    nothing. Commas count for `no_comma`, missing keywords for `existence`, forbidden words for
    `forbidden_words`. None for a constraint of another kind, which is only followed or not.
    """
    if constraint.id == "punctuation:no_comma":
        off = response.count(",")
    elif constraint.id in WORDS:
        off = _words_against(constraint, response)
    elif constraint.id in COUNTS:
        off = _change_of_number(constraint, response)
    else:
        return None
    return float(min(off, FURTHEST) if response.strip() else FURTHEST)


def _words_against(constraint: Constraint, response: str) -> int:
    """How many of the constraint's words are against it: missing, or present though forbidden."""
    key = WORDS[constraint.id]
    singles = [Constraint(constraint.id, {key: [word]}) for word in constraint.arguments[key]]
    return sum(not checker(single).check_following(response) for single in singles)


def _change_of_number(constraint: Constraint, response: str) -> int:
    """The smallest change of the constraint's number with which the response follows it."""
    key = COUNTS[constraint.id]
    asked = constraint.arguments[key]
    for change in range(FURTHEST):
        for number in (asked - change, asked + change):
            if number < 0:
                continue  # lm-eval would choose a number at random
            other = Constraint(constraint.id, constraint.arguments | {key: number})
            if checker(other).check_following(response):
                return change
    return FURTHEST


def flaws(instruction: Instruction, response: str) -> float:
    """How degenerate a response is, from 0 (no sign of it) to 3.

    1 for an end in the middle of a sentence, 1 for a repetition, and 1 for a copy of the request.
    Without a copy, the last is the share of `OWN_WORDS` that the response lacks: it has no words of
    its own (1), some, or enough (0). What the instruction asks for is no flaw: an end without a
    full stop, a copy of the request. An empty response has 3.
    """
    text = response.strip()
    if not text:
        return 3.0
    asked = {each.id: each.arguments for each in instruction.constraints}
    end = asked.get("startend:end_checker", {}).get("end_phrase", ENDS[0]).strip().lower()
    unfinished = not text.endswith(ENDS) and not text.lower().endswith(end)
    own_words = set(_words(text)) - set(_words(instruction.prompt))
    says_nothing = 1 - min(len(own_words), OWN_WORDS) / OWN_WORDS
    if _copies(text, instruction.prompt):
        says_nothing = 1.0
    if "combination:repeat_prompt" in asked:
        says_nothing = 0.0
    return unfinished + _repeats(text) + says_nothing


def _repeats(text: str) -> bool:
    """Whether a sentence or a line occurs twice, or a sequence of `REPEATED_WORDS` too often.

    A line without a letter, such as a divider ***, may occur again.
    """
    sentences = [part.strip() for part in re.split(r"(?<=[.!?])\s+|\n", text)]
    sentences = [sentence for sentence in sentences if any(map(str.isalpha, sentence))]
    sequences = Counter(_sequences(_words(text), REPEATED_WORDS))
    often = max(sequences.values(), default=0) >= REPEATED_TIMES
    return often or len(set(sentences)) < len(sentences)


def _copies(text: str, prompt: str) -> bool:
    """Whether `COPIED_WORDS` consecutive words of the prompt are in the text."""
    of_prompt = set(_sequences(_words(prompt), COPIED_WORDS))
    return not of_prompt.isdisjoint(_sequences(_words(text), COPIED_WORDS))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _sequences(words: list[str], length: int) -> list[tuple[str, ...]]:
    """All sequences of `length` consecutive words."""
    return [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]
