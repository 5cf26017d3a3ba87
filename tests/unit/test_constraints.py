"""Verifiable constraints: reading IFEval's form, lm-eval's checkers, distances and flaws."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

from sppo.core.errors import UserError
from sppo.preferences.constraints import (
    COUNTS,
    FURTHEST,
    Constraint,
    Instruction,
    check_known,
    checker,
    distance,
    flaws,
    follows,
    lm_eval_ifeval,
    read_instructions_to_check,
)

ROOT = Path(__file__).resolve().parents[2]
HELD_OUT = "data/instructions/held_out.jsonl"


def record(prompt: str = "Say hi.", **constraints: dict) -> dict:
    """A record in IFEval's form; constraints by id, with __ for the colon."""
    ids = [name.replace("__", ":") for name in constraints]
    return {"prompt": prompt, "instruction_id_list": ids, "kwargs": [*constraints.values()]}


def write(path: Path, *records: object) -> Path:
    """A JSONL file; a record that is a text is written as it is."""
    lines = [one if isinstance(one, str) else json.dumps(one) for one in records]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def instruction(prompt: str = "Say hi.", **constraints: dict) -> Instruction:
    written = record(prompt, **constraints)
    pairs = zip(written["instruction_id_list"], written["kwargs"], strict=True)
    return Instruction(prompt, tuple(Constraint(*pair) for pair in pairs))


# --- reading ---

TWO_WORDS = {"num_words": 3, "relation": "less than"}


def test_nulls_of_the_official_file_are_left_out(tmp_path):
    row = record(length_constraints__number_words=TWO_WORDS | {"keywords": None, "letter": None})
    (found,) = read_instructions_to_check(write(tmp_path / "a.jsonl", row))
    assert found == Instruction(
        "Say hi.", (Constraint("length_constraints:number_words", TWO_WORDS),)
    )
    assert {key: found.record[key] for key in row} == record(
        length_constraints__number_words=TWO_WORDS
    )


GOOD = record(punctuation__no_comma={})
BROKEN = {
    "not JSON": ("{", "line 2 is not JSON"),
    "no object": ("[]", "line 2 has no text in prompt"),
    "no prompt": (GOOD | {"prompt": None}, "line 2 has no text in prompt"),
    "blank prompt": (GOOD | {"prompt": " "}, "line 2 has no text in prompt"),
    "no ids": (GOOD | {"instruction_id_list": []}, "line 2: instruction_id_list is no list of ids"),
    "id is a number": (
        GOOD | {"instruction_id_list": [3]},
        "line 2: instruction_id_list is no list of ids",
    ),
    "too few kwargs": (GOOD | {"kwargs": []}, "line 2: kwargs must have one object for each of"),
    "kwargs missing": ({"prompt": "p", "instruction_id_list": ["a"]}, "line 2: kwargs must have"),
    "kwargs of a text": (GOOD | {"kwargs": ["x"]}, "line 2: kwargs has an entry that is no object"),
}


@pytest.mark.parametrize(("row", "said"), BROKEN.values(), ids=BROKEN)
def test_broken_record_is_named_by_its_line(row, said, tmp_path):
    file = write(tmp_path / "a.jsonl", GOOD, row)
    with pytest.raises(UserError, match=f"a.jsonl {said}") as caught:
        read_instructions_to_check(file)
    assert "\n" not in str(caught.value)


def test_missing_and_empty_files_are_one_line_errors(tmp_path):
    with pytest.raises(UserError, match="a.jsonl is missing; give a JSONL file"):
        read_instructions_to_check(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(UserError, match="a.jsonl has no instructions; give a JSONL file"):
        read_instructions_to_check(tmp_path / "a.jsonl")


# --- what lm-eval knows ---

BULLETS = "detectable_format__number_bullet_lists"
REFUSED = {
    "unknown constraint": ({"keywords__existance": {}}, "existance is unknown; give one of "),
    "missing argument": ({BULLETS: {}}, "has no num_bullets"),
    "missing relation": (
        {"length_constraints__number_words": {"num_words": 3}},
        "has no relation",
    ),
    "unknown argument": (
        {"punctuation__no_comma": {"number": 3}},
        "takes no number",
    ),
    "number as a text": ({BULLETS: {"num_bullets": "3"}}, "has num_bullets '3', which is no whole"),
    "zero": ({BULLETS: {"num_bullets": 0}}, "has num_bullets 0, which is no whole number"),
    "negative": ({BULLETS: {"num_bullets": -1}}, "has num_bullets -1, which is no whole number"),
    "part of a number": ({BULLETS: {"num_bullets": 1.5}}, "has num_bullets 1.5"),
    "true": ({BULLETS: {"num_bullets": True}}, "has num_bullets True"),
    "text for a list": (
        {"keywords__existence": {"keywords": "moon"}},
        "has keywords 'moon', which is no list of texts",
    ),
    "empty list": ({"keywords__existence": {"keywords": []}}, "has keywords .., which is no list"),
    "list of numbers": (
        {"keywords__forbidden_words": {"forbidden_words": [1]}},
        "no list of texts",
    ),
    "blank text": (
        {"startend__end_checker": {"end_phrase": " "}},
        "end_phrase ' ', which is no text",
    ),
    "number for a text": ({"startend__end_checker": {"end_phrase": 5}}, "end_phrase 5"),
    "unknown relation": (
        {"length_constraints__number_words": {"num_words": 3, "relation": "more than"}},
        "is refused by lm-eval .ValueError: .*more than",
    ),
    "unknown language": (
        {"language__response_language": {"language": "xx"}},
        "is refused by lm-eval .KeyError: 'xx'",
    ),
    "no regular expression": (
        {"keywords__existence": {"keywords": ["C(++"]}},
        r"is refused by lm-eval .\w*[eE]rror: ",
    ),
    "paragraph that is not there": (
        {
            "length_constraints__nth_paragraph_first_word": {
                "num_paragraphs": 1,
                "nth_paragraph": 2,
                "first_word": "in",
            }
        },
        "has an nth_paragraph above its num_paragraphs",
    ),
}


@pytest.mark.parametrize(("constraints", "said"), REFUSED.values(), ids=REFUSED)
def test_constraint_that_lm_eval_cannot_check_is_refused(constraints, said, tmp_path):
    found = [instruction(punctuation__no_comma={}), instruction(**constraints)]
    (name,) = constraints
    with pytest.raises(UserError, match=said) as caught:
        check_known(found, tmp_path / "mine.jsonl")
    start = f"{tmp_path}/mine.jsonl line 2: constraint {name.replace('__', ':')} "
    assert str(caught.value).startswith(start)
    assert "\n" not in str(caught.value)


def test_every_kind_of_lm_eval_is_accepted_with_arguments():
    number_or_text = {
        "relation": "less than",
        "let_relation": "at least",
        "capital_relation": "at least",
        "keywords": ["moon"],
        "forbidden_words": ["moon"],
        "letter": "m",
        "language": "en",
        **dict.fromkeys([*COUNTS.values(), "nth_paragraph"], 1),
    }
    kinds = lm_eval_ifeval().instructions_registry.INSTRUCTION_DICT
    assert COUNTS.keys() < kinds.keys()
    constraints = []
    for name, kind in kinds.items():
        keys = kind(name).get_instruction_args_keys()
        constraints.append(Constraint(name, {key: number_or_text.get(key, "moon") for key in keys}))
    assert len(constraints) == 25
    check_known([Instruction("p", tuple(constraints))], Path("mine.jsonl"))


# --- the same decisions without a network and in every process ---

DECISIONS = """
import json, socket, sys

def refuse(*_, **__):
    raise AssertionError("network")

socket.socket.connect = socket.getaddrinfo = refuse
from sppo.preferences.constraints import Constraint, checker

cases = json.loads(sys.stdin.read())
print(json.dumps([checker(Constraint(*c)).check_following(t) for *c, t in cases]))
"""
# Of these texts, langdetect without a seed says English about half of the time, and nearly always.
MIXED = ("an old man", "hello world")


def test_decisions_need_no_network_and_repeat_in_a_new_process(tmp_path):
    cases = [["language:response_language", {"language": "en"}, text] for text in MIXED]
    cases += [["change_case:english_lowercase", {}, text] for text in MIXED]
    # lm-eval replaces a character other than a letter by a random letter.
    for number in range(1, 6):
        arguments = {"letter": "#", "let_frequency": number, "let_relation": "at least"}
        cases.append(["keywords:letter_frequency", arguments, "yes we see a yellow bee"])
    two = {"num_sentences": 2, "relation": "less than"}
    cases.append(["length_constraints:number_sentences", two, "Dr. Smith left."])
    # A home without any data of nltk.
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HOME": str(tmp_path)}
    environment |= {"NLTK_DATA": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", DECISIONS],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    other = json.loads(done.stdout.splitlines()[-1])
    assert other[-1] is True
    for _ in range(10):
        here = [
            checker(Constraint(name, given)).check_following(text) for name, given, text in cases
        ]
        assert here == other


def test_sentences_are_split_as_by_nltk():
    """The package has its own code beside Punkt's parameters; nltk's is the one of lm-eval."""
    utilities = lm_eval_ifeval().instructions_registry.instructions.instructions_util
    ours = utilities._get_sentence_tokenizer()
    theirs = PunktSentenceTokenizer()
    parameters = PunktParameters()
    for name in ("abbrev_types", "collocations", "sent_starters", "ortho_context"):
        setattr(parameters, name, getattr(ours._params, name))
    theirs._params = parameters
    texts = [
        "Mr. Smith met Dr. Jones at 5 p.m. in Rome. They left! Why? Nobody knows... So it goes.",
        'He said "No." Then (as usual) he left the U.S. It was 3.5 km. a long way.',
        "One line\nwithout a full stop",
        "",
    ]
    texts += [one.prompt for one in read_instructions_to_check(ROOT / HELD_OUT)]
    assert utilities.count_sentences(texts[0]) == 5
    for text in texts:
        assert list(ours.tokenize(text)) == theirs.tokenize(text)


def test_strict_and_loose_metrics_differ_by_markdown_and_lines():
    asked = instruction(
        startend__end_checker={"end_phrase": "The end."},
        punctuation__no_comma={},
    )
    assert follows(asked, "Hello. The end.") == ([True, True], [True, True])
    assert follows(asked, "Sure, here it is:\nHello. *The end.*") == ([False, False], [True, True])
    assert follows(asked, "Hello, you. The end") == ([False, False], [False, False])
    assert follows(asked, "  ") == ([False, False], [False, False])


# --- how far a response is from what is asked ---


def less(key: str, number: int) -> dict:
    return {key: number, "relation": "less than"}


def least(key: str, number: int) -> dict:
    return {key: number, "relation": "at least"}


WORDS = "length_constraints:number_words"
SENTENCES = "length_constraints:number_sentences"
ITEMS = "detectable_format:number_bullet_lists"
LETTERS = {"letter": "e", "let_frequency": 4, "let_relation": "at least"}
CAPITALS = {"capital_frequency": 2, "capital_relation": "at least"}
SECTIONS = {"section_spliter": "Part", "num_sections": 3}
# Counted by hand. `less than` n is followed by n - 1.
BY_HAND = [
    (WORDS, less("num_words", 5), "one two three four", 0),
    (WORDS, less("num_words", 5), "one two three four five", 1),
    (WORDS, less("num_words", 5), "It's 3 o'clock now, dear friends.", 4),  # 8 words
    (WORDS, least("num_words", 5), "one two", 3),
    (WORDS, least("num_words", 500), "one two", FURTHEST),
    (SENTENCES, least("num_sentences", 3), "Mr. Smith came. He left.", 1),
    (SENTENCES, less("num_sentences", 2), "Mr. Smith came. He left.", 1),
    (SENTENCES, less("num_sentences", 2), "One. Two. Three. Four.", 3),
    (SENTENCES, less("num_sentences", 2), "Mr. Smith came.", 0),
    (ITEMS, {"num_bullets": 3}, "* a\n* b\n* c", 0),
    (ITEMS, {"num_bullets": 3}, "Here:\n* a\n- b", 1),
    (ITEMS, {"num_bullets": 3}, "no bullets", 3),
    (ITEMS, {"num_bullets": 3}, "* a\n* b\n* c\n* d\n* e", 2),
    ("punctuation:no_comma", {}, "a b c", 0),
    ("punctuation:no_comma", {}, "a, b, c,", 3),
    ("punctuation:no_comma", {}, "a," * 150, FURTHEST),
    ("keywords:existence", {"keywords": ["moon", "tide", "sea"]}, "The Moon is here.", 2),
    ("keywords:existence", {"keywords": ["moon"]}, "moonlight", 0),
    ("keywords:forbidden_words", {"forbidden_words": ["is", "and"]}, "This IS it. And so?", 2),
    ("keywords:forbidden_words", {"forbidden_words": ["is", "and"]}, "This sand", 0),
    ("keywords:frequency", {"keyword": "tea"} | least("frequency", 3), "Tea and tea", 1),
    ("keywords:letter_frequency", LETTERS, "Eve went", 1),  # 3 times e
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] [day] [x]", 0),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "none", 2),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 3}, "*a* and *b*", 1),
    ("detectable_format:multiple_sections", SECTIONS, "Part 1\na\nPart 2\nb", 1),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 4}, "a\n***\nb", 2),
    ("change_case:capital_word_frequency", CAPITALS, "NO", 1),
]


@pytest.mark.parametrize(("name", "arguments", "response", "expected"), BY_HAND)
def test_distance_equals_what_is_counted_by_hand(name, arguments, response, expected):
    constraint = Constraint(name, arguments)
    assert distance(constraint, response) == expected
    (followed,), _ = follows(Instruction("p", (constraint,)), response)
    assert followed == (expected == 0)
    assert distance(constraint, " \n") == FURTHEST  # an empty response follows nothing


def test_every_constraint_on_a_number_has_a_distance():
    tested = {name for name, *_ in BY_HAND}
    assert tested == COUNTS.keys() | {
        "punctuation:no_comma",
        "keywords:existence",
        "keywords:forbidden_words",
    }


def test_constraint_without_a_number_has_no_distance():
    title = Constraint("detectable_format:title", {})
    assert distance(title, "<<A day>>") is None
    assert distance(title, "") is None


# --- signs of a degenerate response ---

REQUEST = "Write a sentence about the moon for children at night. Use the word tide."
WAVES = "Silver waves roll over wet sand."  # six words that the request lacks
FLAWS = {
    "none": (f"{WAVES} The tide comes and goes.", 0),
    "empty": (" \n", 3),
    "unfinished": (f"{WAVES} The tide comes and", 1),
    "ends with a quotation mark": (f'{WAVES} He said "The tide comes."', 0),
    "ends with a mark and white space": (f"{WAVES} The tide comes!\n", 0),
    "sentence twice": (f"{WAVES} It goes. {WAVES}", 1),
    "line twice": (f"* The tide\n* The tide\n* {WAVES}", 1),
    "divider twice": (f"{WAVES}\n***\nTwo days.\n***\nThree days.", 0),
    "numbers of a list": (f"1. Tides.\n2. Seas.\nOr:\n1. Moons.\n2. {WAVES}", 0),
    "four words three times": (f"as it can be, as it can be, as it can be. {WAVES}", 1),
    "four words two times": (f"as it can be, as it can be. {WAVES}", 0),
    "three words three times": (f"it can be, it can be, it can be here. {WAVES}", 0),
    "copy of the request": (f"{WAVES} A sentence about the moon for children at night.", 1),
    "seven words of the request": (f"{WAVES} I see the moon for children at night.", 0),
    "no words of its own": ("The moon at night.", 1),
    "three words of its own": ("The moon rolls over wet tide at night.", 0.5),
    "three words of its own, twice": ("Rolls over wet tide, wet night rolls over.", 0.5),
    "five words of its own": ("Silver waves roll over sand.", 1 / 6),
    "all three": ("a sentence about the moon for children at night! Oh! Oh! a", 3),
}


@pytest.mark.parametrize(("response", "expected"), FLAWS.values(), ids=FLAWS)
def test_flaws_are_counted(response, expected):
    found = flaws(instruction(REQUEST, punctuation__no_comma={}), response)
    assert found == pytest.approx(expected)


def test_what_the_instruction_asks_for_is_no_flaw():
    ended = instruction(REQUEST, startend__end_checker={"end_phrase": "Over and out"})
    assert flaws(ended, f"{WAVES} The tide comes. over and out") == 0
    assert flaws(ended, f"{WAVES} The tide comes. over and") == 1
    repeated = instruction(REQUEST, combination__repeat_prompt={"prompt_to_repeat": REQUEST})
    assert flaws(repeated, f"{REQUEST} The tide comes.") == 0
    assert flaws(instruction(REQUEST), f"{REQUEST} {WAVES}") == 1
