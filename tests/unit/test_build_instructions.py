"""The shipped instructions with verifiable constraints, and the program that writes them."""

from __future__ import annotations

import random
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

import build_instructions
from build_instructions import (
    CONTRADICTIONS,
    HELD_OUT_TOPICS,
    KINDS,
    REQUESTS,
    SENTENCE_REQUESTS,
)
from sppo.core.artifacts import json_lines
from sppo.policies.prompts import normalised, read_instructions, read_prompts
from sppo.preferences.constraints import (
    check_known,
    lm_eval_ifeval,
    read_instructions_to_check,
)

DATA = Path(__file__).resolve().parents[2] / "data/instructions"
VARIED = ("train", "held_out")  # requests and constraints of many kinds
SENTENCES = ("sentence_train", "sentence_held_out")
FILES = VARIED + SENTENCES


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict]]:
    return {name: json_lines(DATA / f"{name}.jsonl") for name in FILES}


@pytest.fixture(scope="module")
def topics() -> list[dict]:
    return json_lines(DATA / "topics.jsonl")


def topics_in(rows: list[dict]) -> set[str]:
    """The topics that requests name, found by the requests' wording."""
    texts = [*(text for texts in REQUESTS.values() for text in texts), *SENTENCE_REQUESTS]
    forms = [re.escape(text).replace(re.escape("{topic}"), "(.+?)") for text in texts]
    found = set()
    for row in rows:
        matches = [match for form in forms if (match := re.match(form + " ", row["prompt"]))]
        assert len(matches) == 1, row["prompt"]
        found.add(matches[0][1])
    return found


def test_program_reproduces_the_shipped_files(tmp_path, program):
    program(build_instructions, "--topics", DATA / "topics.jsonl", "--output", tmp_path)
    for name in FILES:
        file = f"{name}.jsonl"
        assert (tmp_path / file).read_bytes() == (DATA / file).read_bytes()


def test_another_seed_gives_other_prompts(tmp_path, program, rows):
    words = ("--topics", DATA / "topics.jsonl", "--output", tmp_path)
    program(build_instructions, *words, "--seed", 1, "--train", 50, "--held-out", 20)
    assert len(json_lines(tmp_path / "sentence_train.jsonl")) == len(rows["sentence_train"])
    other = json_lines(tmp_path / "train.jsonl")
    assert (len(other), len(json_lines(tmp_path / "held_out.jsonl"))) == (50, 20)
    shared = {row["prompt"] for row in other} & {row["prompt"] for row in rows["train"]}
    assert len(shared) < 5


def test_there_are_enough_prompts_and_all_differ(rows):
    assert len(rows["train"]) >= 1500
    assert len(rows["held_out"]) >= 300
    assert len(rows["sentence_train"]) >= 800
    assert len(rows["sentence_held_out"]) >= 300
    everything = [row for name in FILES for row in rows[name]]
    assert len({row["id"] for row in everything}) == len(everything)
    assert len({normalised(row["prompt"]) for row in everything}) == len(everything)
    assert {row["category"] for row in everything} == REQUESTS.keys()


@pytest.mark.parametrize("kind", ["", "sentence_"])
def test_held_out_topics_are_not_trained_on(kind, rows, topics):
    train, held_out = topics_in(rows[f"{kind}train"]), topics_in(rows[f"{kind}held_out"])
    assert train.isdisjoint(held_out)
    assert train | held_out == {topic["topic"] for topic in topics}
    of_group = Counter(topic["group"] for topic in topics if topic["topic"] in held_out)
    assert set(of_group.values()) == {HELD_OUT_TOPICS}
    assert of_group.keys() == {topic["group"] for topic in topics}


def test_topics_differ_and_each_has_four_words(topics):
    assert len({topic["topic"] for topic in topics}) == len(topics)
    assert set(Counter(topic["group"] for topic in topics).values()) == {30}
    assert all(len(set(topic["words"])) == 4 for topic in topics)


@pytest.mark.parametrize("name", FILES)
def test_lm_eval_knows_every_constraint(name):
    check_known(read_instructions_to_check(DATA / f"{name}.jsonl"), DATA / f"{name}.jsonl")


@pytest.mark.parametrize("name", VARIED)
def test_varied_instructions_have_all_kinds_of_constraints(name):
    found = read_instructions_to_check(DATA / f"{name}.jsonl")
    kinds = Counter(one.id for each in found for one in each.constraints)
    assert kinds.keys() == KINDS.keys()
    assert min(kinds.values()) >= 10
    assert {len(each.constraints) for each in found} == {1, 2, 3}


@pytest.mark.parametrize("name", SENTENCES)
def test_requests_for_a_sentence_say_what_is_checked(name, rows):
    for row in rows[name]:
        asked = dict(zip(row["instruction_id_list"], row["kwargs"], strict=True))
        assert "one sentence" in row["prompt"]
        words = asked.pop("keywords:existence")["keywords"]
        assert all(f'"{word}"' in row["prompt"] for word in words)
        number = asked.pop("length_constraints:number_words")["num_words"]
        assert f"Use less than {number} words." in row["prompt"]
        without_commas = asked.pop("punctuation:no_comma", None) is not None
        assert without_commas == ("Do not use any commas." in row["prompt"])
        assert not asked


def test_no_two_constraints_of_a_prompt_contradict_each_other(rows):
    conflicts = lm_eval_ifeval().instructions_registry.INSTRUCTION_CONFLICTS
    for row in [row for name in FILES for row in rows[name]]:
        for one, other in combinations(row["instruction_id_list"], 2):
            assert one != other
            assert one not in conflicts[other] and other not in conflicts[one]
            assert {one, other} not in CONTRADICTIONS
        arguments = {key: value for given in row["kwargs"] for key, value in given.items()}
        asked = [arguments.get("end_phrase", ""), arguments.get("first_word", "")]
        asked += [*arguments.get("keywords", []), arguments.get("keyword", "")]
        for word in arguments.get("forbidden_words", []):
            assert not re.search(rf"\b{word}\b", " ".join(asked), re.IGNORECASE), row["prompt"]


@pytest.mark.parametrize("kind", KINDS)
def test_sentence_of_a_constraint_names_its_arguments(kind, topics):
    draw = random.Random(0)
    for topic in topics[:40]:
        sentence, arguments = KINDS[kind][0](topic, draw)
        for value in arguments.values():
            for each in value if isinstance(value, list) else [value]:
                is_one = each == 1  # "one paragraph", and relations that the sentence implies
                assert is_one or str(each).lower() in sentence.lower(), (sentence, arguments)


@pytest.mark.parametrize("name", FILES)
def test_files_are_read_as_prompts_and_as_instructions(name, rows):
    file = DATA / f"{name}.jsonl"
    prompts, commit, empty = read_prompts(str(file), None, "train", None)
    assert (commit, empty) == (None, 0)
    for prompt, row in zip(prompts, rows[name], strict=True):
        assert prompt == {
            "id": row["id"],
            "category": row["category"],
            "messages": [{"role": "user", "content": row["prompt"]}],
        }
    instructions = read_instructions(file)
    assert [row["instruction"] for row in instructions] == [row["prompt"] for row in rows[name]]
    assert [row["prompt_id"] for row in instructions] == [row["id"] for row in rows[name]]


@pytest.mark.parametrize("files", [VARIED, SENTENCES])
def test_readme_counts_the_instructions_of_each_constraint(files, rows):
    text = (DATA / "README.md").read_text(encoding="utf-8")
    heads = r"\| " + r" \| ".join(f"`{name}.jsonl`" for name in files) + r" \| base"
    (table,) = re.findall(rf"{heads}.*?\n\n", text, re.DOTALL)
    cells = re.findall(r"^\| `(\w+:\w+)` \| [^|]+ \| (\d+) \| (\d+) \|", table, re.MULTILINE)
    for column, name in enumerate(files, 1):
        kinds = Counter(one for row in rows[name] for one in row["instruction_id_list"])
        assert {line[0]: int(line[column]) for line in cells} == kinds
        assert str(len(rows[name])) in text


def test_readme_counts_the_constraints_of_an_instruction(rows):
    text = (DATA / "README.md").read_text(encoding="utf-8")
    for name in VARIED:
        sizes = Counter(len(row["kwargs"]) for row in rows[name])
        assert all(str(number) in text for number in sizes.values())
