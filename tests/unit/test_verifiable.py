"""The kind `verifiable`: annotators who check constraints, and the share of them who prefer."""

from __future__ import annotations

import json
import re
import shutil
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

import annotate_preferences
from sppo.core.artifacts import file_hash, json_lines, read_json, record_path
from sppo.core.config_files import read_files
from sppo.core.errors import UserError
from sppo.core.tables import write_table
from sppo.evaluation.alpaca_eval import PreferenceAnnotator
from sppo.preferences.base import (
    Group,
    compare,
    find_kind,
    load_preference_model,
    local_kind,
    settings_for,
)
from sppo.preferences.estimates import win_probabilities
from sppo.preferences.verifiable import ANNOTATORS, VerifiableModel
from sppo.workflow.configuration import resolve
from sppo.workflow.preflight import check_inputs

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "data/instructions"
EQUAL = dict.fromkeys(ANNOTATORS, 1)

# At most 5 words, no commas, and three words.
PROMPT = "Greet the sky."
KEYWORDS = ["sun", "moon", "star"]
SKY = {
    "prompt": PROMPT,
    "instruction_id_list": [
        "length_constraints:number_words",
        "punctuation:no_comma",
        "keywords:existence",
    ],
    "kwargs": [{"num_words": 6, "relation": "less than"}, {}, {"keywords": KEYWORDS}],
}
TITLE = {"prompt": "A title.", "instruction_id_list": ["detectable_format:title"], "kwargs": [{}]}
# The first three are a cycle: by words b > c > a, by commas a > b > c, by keywords c > a > b.
CYCLE = [
    "The sun and the moon look bright.",  # 7 words, no commas, 2 keywords
    "Look, bright sun rises early.",  # 5 words, 1 comma, 1 keyword
    "Sun, moon, star all greet here.",  # 6 words, 2 commas, 3 keywords
]
RESPONSES = [
    *CYCLE,
    "Sun moon star.",  # follows everything, but says little
    "**Sun moon star, ok**",  # a comma; markdown
    "Here you are:\nSun moon star!",  # loosely without the first line
    "Sun moon star. Sun moon star.",  # repeats itself
    "Sun moon star and",  # unfinished
    "",
    "The sky, the sea, and all the many stars, which shine on us at night, say hello",
]
# Of six words of its own, the first response lacks one, and so on.
FLAWS = [1 / 6, 1 / 6, 1 / 6, 3 / 6, 2 / 6, 0, 1 + 3 / 6, 1 + 2 / 6, 3, 1]


def write(folder: Path, *records: dict, weights: dict | None = None, name: str = "mine") -> Path:
    """A population of annotators with one file of instructions."""
    rows = "".join(json.dumps(row) + "\n" for row in records)
    (folder / f"{name}.jsonl").write_text(rows, encoding="utf-8")
    content = {"instructions": [f"{name}.jsonl"], "weights": weights or EQUAL}
    (folder / f"{name}.yaml").write_text(json.dumps(content), encoding="utf-8")
    return folder / f"{name}.yaml"


@pytest.fixture
def population(tmp_path):
    """Load a population that knows the given records."""

    def load(*records: dict, weights: dict | None = None) -> VerifiableModel:
        return load_preference_model(settings_for(str(write(tmp_path, *records, weights=weights))))

    return load


# --- P, again, in loops ---


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def is_followed(constraint: int, text: str) -> bool:
    if not text.strip():
        return False
    if constraint == 0:
        return len(words_of(text)) <= 5
    if constraint == 1:
        return "," not in text
    return all(word in text.lower() for word in KEYWORDS)


def is_loosely_followed(constraint: int, text: str) -> bool:
    """IFEval: without the first line, the last line, both, and each without asterisks."""
    lines = text.split("\n")
    variants = [lines, lines[1:], lines[:-1], lines[1:-1]]
    texts = ["\n".join(variant) for variant in variants]
    texts += [variant.replace("*", "") for variant in texts]
    return any(is_followed(constraint, variant) for variant in texts)


def off(constraint: int, text: str) -> int:
    if not text:
        return 100
    if constraint == 0:
        return max(0, len(words_of(text)) - 5)
    if constraint == 1:
        return text.count(",")
    return sum(word not in text.lower() for word in KEYWORDS)


def by_hand(weights: dict[str, float]) -> list[list[float]]:
    """The share of annotators who prefer i to j, with half a vote for no preference."""
    grades = [("general", [-flaws for flaws in FLAWS])]
    for number in range(3):
        grades += [
            ("strict", [is_followed(number, text) for text in RESPONSES]),
            ("loose", [is_loosely_followed(number, text) for text in RESPONSES]),
            ("graded", [-off(number, text) for text in RESPONSES]),
        ]
    k = len(RESPONSES)
    P = [[0.0] * k for _ in range(k)]
    for i in range(k):
        for j in range(k):
            for name, grade in grades:
                vote = 1.0 if grade[i] > grade[j] else 0.5 if grade[i] == grade[j] else 0.0
                P[i][j] += weights[name] * vote / sum(weights[each] for each, _ in grades)
    return P


WEIGHTS = {
    "equal": EQUAL,
    "different": {"strict": 3, "loose": 0.5, "graded": 2, "general": 0.25},
    "some are 0": {"strict": 0, "loose": 0, "graded": 1, "general": 1},
}


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_p_is_the_share_of_annotators_counted_in_loops(weights, population):
    model = population(TITLE, SKY, weights=weights)
    (logits,) = model.all_pair_logits([Group(PROMPT, RESPONSES)])
    assert win_probabilities(logits) == pytest.approx(np.array(by_hand(weights)), abs=1e-8)


def test_cycle_built_by_hand_is_cyclic(population):
    (logits,) = population(SKY).all_pair_logits([Group(PROMPT, CYCLE)])
    # Of 10 annotators, the graded ones prefer a to b by 2 to 1; strict and loose ones are tied.
    expected = np.array([[0.5, 0.55, 0.45], [0.45, 0.5, 0.55], [0.55, 0.45, 0.5]])
    assert win_probabilities(logits) == pytest.approx(expected)


def test_constraint_without_a_number_has_no_graded_annotator(population):
    model = population(TITLE)
    (instruction,) = model.instructions.values()
    names = [name for name, *_ in model.grades(instruction, ["<<A>>.", "A."])]
    assert names == ["general", "strict", "loose"]
    found = model.probabilities(instruction, ["<<A>>.", "A."])
    assert found == pytest.approx(np.array([[0.5, 2.5 / 3], [0.5 / 3, 0.5]]))


def test_unanimous_annotators_give_finite_logits(population):
    weights = {"strict": 1, "loose": 1, "graded": 1, "general": 0}
    (logits,) = population(TITLE, weights=weights).all_pair_logits(
        [Group("A title.", ["<<A>>", "B"])]
    )
    assert np.isfinite(logits).all()
    assert win_probabilities(logits)[0, 1] == pytest.approx(1, abs=1e-8)


# --- invariants, on the shipped instructions ---


@pytest.fixture(scope="module")
def shipped() -> VerifiableModel:
    return load_preference_model(settings_for("verifiable"))


@pytest.fixture(scope="module")
def groups() -> list[Group]:
    prompts = [row["prompt"] for row in json_lines(DATA / "train.jsonl")[:12]]
    return [Group(prompt, RESPONSES) for prompt in prompts]


def test_p_and_its_transpose_add_up_to_one(shipped, groups):
    for logits in shipped.all_pair_logits(groups):
        P = win_probabilities(logits)
        assert (P + P.T == 1).all()
        assert (np.diag(P) == 0.5).all()
        assert logits == pytest.approx(-logits.T, abs=1e-6)
        assert (np.diag(logits) == 0).all()


def test_p_follows_a_permutation_of_the_responses(shipped, groups):
    order = [3, 9, 0, 5, 1, 8, 2, 7, 6, 4]
    permuted = [Group(prompt, [texts[i] for i in order]) for prompt, texts, _ in groups]
    for first, second in zip(
        shipped.all_pair_logits(groups), shipped.all_pair_logits(permuted), strict=True
    ):
        assert (second == first[np.ix_(order, order)]).all()


def test_equal_responses_tie_and_groups_do_not_matter(shipped, groups):
    prompt, texts, _ = groups[0]
    (logits,) = shipped.all_pair_logits([Group(prompt, [*texts, texts[2]])])
    assert logits[2, -1] == logits[-1, 2] == 0
    assert (logits[:-1, :-1] == shipped.all_pair_logits(groups)[0]).all()


def test_empty_response_never_beats_one_with_a_sentence(shipped):
    prompts = [row["prompt"] for row in json_lines(DATA / "train.jsonl")[:60]]
    for logits in shipped.all_pair_logits([Group(prompt, ["", CYCLE[0]]) for prompt in prompts]):
        assert win_probabilities(logits)[0, 1] < 0.5


# --- as preference.model and as a judge ---


def test_name_or_yaml_file_selects_the_kind():
    for name in ("verifiable", "my.yaml", "a folder/b.yml"):
        assert find_kind(settings_for(name)) is local_kind(name) is VerifiableModel
    for name in ("verifiable.json", "org/verifiable", "ranker", "a.yaml:f"):
        assert find_kind(settings_for(name)) is not VerifiableModel


def test_shipped_model_reads_the_shipped_files():
    names = ("verifiable.yaml", "train.jsonl", "held_out.jsonl")
    names += ("sentence_train.jsonl", "sentence_held_out.jsonl")
    files = [file.resolve() for file in VerifiableModel.files("verifiable")]
    assert files == [DATA / name for name in names]


def test_judge_gives_the_share_of_annotators(population):
    pandas = pytest.importorskip("pandas")
    model = population(SKY)
    P = by_hand(EQUAL)
    ones, twos = zip(*permutations(range(4), 2), strict=True)

    def frame(indices):
        shared = {"instruction": PROMPT, "generator": "g"}
        return pandas.DataFrame([shared | {"output": RESPONSES[i]} for i in indices])

    judged = PreferenceAnnotator("verifiable", model).annotate_head2head(frame(ones), frame(twos))
    for one, two, annotation in zip(ones, twos, judged, strict=True):
        assert annotation["preference"] == pytest.approx(1 + P[two][one])


def annotate(folder: Path, program, texts: list[str], model: str, prompt: str = PROMPT) -> dict:
    """Run the program on one prompt; the record."""
    row = {"prompt_id": "p1", "prompt_token_ids": [1]}
    messages = [{"role": "user", "content": prompt}]
    prompts = [row | {"source": "test", "category": "c", "messages": messages}]
    responses = [
        row | {"sample_id": k, "seed": k, "token_ids": [3], "text": text, "finish_reason": "stop"}
        for k, text in enumerate(texts)
    ]
    write_table(folder / "prompts.parquet", prompts, "prompts")
    write_table(folder / "responses.parquet", responses, "responses")
    words = ("--prompts", folder / "prompts.parquet", "--responses", folder / "responses.parquet")
    out = folder / "preferences.parquet"
    program(annotate_preferences, *words, "--model", model, "--output", out)
    return read_json(record_path(out))


def test_record_has_the_files_and_how_often_p_is_cyclic(tmp_path, program):
    model = write(tmp_path, SKY)
    record = annotate(tmp_path, program, CYCLE, str(model))
    for file in (model, tmp_path / "mine.jsonl"):
        assert record["inputs"][str(file)] == file_hash(file)
    assert (record["cyclic_triples"], record["condorcet_winner"]) == (1.0, 0.0)
    assert record["cyclic_prompts"] == 1.0
    record = annotate(tmp_path, program, RESPONSES[1:4], str(model))
    assert (record["cyclic_triples"], record["condorcet_winner"]) == (0.0, 1.0)
    record = annotate(tmp_path, program, CYCLE[:2], str(model))
    assert record["cyclic_triples"] is record["condorcet_winner"] is None


# --- mistakes ---


def test_unknown_prompt_is_a_one_line_error_with_its_id(population, tmp_path, program):
    model = population(SKY)
    groups = {"q7": Group(PROMPT, CYCLE), "q8": Group("Another prompt\nof two lines", CYCLE)}
    said = r"mine.yaml, prompt q8: no constraints are known for the prompt 'Another prompt\\nof"
    with pytest.raises(UserError, match=said) as caught:
        compare(model, groups)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="mine.yaml, prompt p1: no constraints are known"):
        annotate(tmp_path, program, CYCLE, f"{tmp_path}/mine.yaml", prompt="Other")
    assert not (tmp_path / "preferences.parquet").exists()


def test_white_space_around_a_prompt_does_not_matter(population):
    model = population(SKY | {"prompt": f"{PROMPT}\n"})
    assert model.all_pair_logits([Group(f" {PROMPT}", CYCLE)])[0].shape == (3, 3)


GOOD = "instructions: [mine.jsonl]\nweights: {strict: 1, loose: 1, graded: 1, general: 1}\n"
POPULATIONS = {
    "not YAML": ("instructions: [", "my.yaml is not YAML .*; give instructions: "),
    "not UTF-8": ("\udcff", "my.yaml is not YAML"),
    "a text": ("verifiable", "my.yaml is no population of annotators; give instructions: "),
    "empty": ("", "my.yaml is no population of annotators"),
    "no weights": ("instructions: [mine.jsonl]", "my.yaml is no population of annotators"),
    "another key": (GOOD + "more: 1\n", "my.yaml is no population of annotators"),
    "one file": (GOOD.replace("[mine.jsonl]", "mine.jsonl"), "instructions is no list of files"),
    "no files": (GOOD.replace("[mine.jsonl]", "[]"), "instructions is no list of files"),
    "number as a file": (GOOD.replace("[mine.jsonl]", "[3]"), "instructions is no list of files"),
    "missing file": (GOOD.replace("mine", "other"), "other.jsonl is missing"),
    "weight missing": (
        GOOD.replace("loose: 1, ", ""),
        "weights must have strict, loose, graded, g",
    ),
    "weight unknown": (GOOD.replace("loose", "lose"), "weights must have strict, loose, graded, g"),
    "weight is a text": (GOOD.replace("loose: 1", "loose: a"), "weight loose is no number of at l"),
    "weight is true": (GOOD.replace("loose: 1", "loose: yes"), "weight loose is no number of at l"),
    "weight below 0": (GOOD.replace("loose: 1", "loose: -1"), "weight loose is no number of at l"),
    "weight infinite": (GOOD.replace("loose: 1", "loose: .inf"), "weight loose is no number of at"),
    "weight is NaN": (GOOD.replace("loose: 1", "loose: .nan"), "weight loose is no number of at l"),
    "only graded": (
        "instructions: [mine.jsonl]\nweights: {strict: 0, loose: 0, graded: 1, general: 0}\n",
        "general, strict and loose weigh 0; give one of them a weight",
    ),
}


@pytest.mark.parametrize(("text", "said"), POPULATIONS.values(), ids=POPULATIONS)
def test_configuration_check_finds_a_wrong_population(text, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(DATA, tmp_path / "data/instructions")
    write(tmp_path, SKY)
    (tmp_path / "my.yaml").write_text(text, encoding="utf-8", errors="surrogateescape")
    run = resolve({"preference": {"model": "my.yaml"}})[""]
    with pytest.raises(UserError, match=said) as caught:
        check_inputs("", run)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=said):
        load_preference_model(settings_for("my.yaml"))


SETTINGS = {
    "no such file": ({"model": "my.yaml"}, "preference.model is my.yaml, but my.yaml is missing"),
    "llm_blender": (
        {"model": "verifiable", "backend": "llm_blender"},
        "preference.model is verifiable, but preference.backend is llm_blender",
    ),
    "chat template": (
        {"model": "verifiable", "source": "chat_template"},
        "preference.source is chat_template; set instruction",
    ),
}


@pytest.mark.parametrize(("section", "said"), SETTINGS.values(), ids=SETTINGS)
def test_settings_that_cannot_work_are_refused(section, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^config: {said}|^config: preference.model is .*{said}"):
        check_inputs("", resolve({"preference": section})[""])


def test_broken_record_is_named_before_the_first_job(tmp_path):
    model = write(tmp_path, SKY, SKY | {"kwargs": []})
    with pytest.raises(UserError, match="mine.jsonl line 2: kwargs must have one object for each"):
        VerifiableModel.check(settings_for(str(model)), "preference.model")


def test_unknown_constraint_is_named_when_the_model_is_loaded(population):
    with pytest.raises(UserError, match="mine.jsonl line 2: constraint a:b is unknown; give one"):
        population(SKY, TITLE | {"instruction_id_list": ["a:b"]})


def test_same_prompt_with_other_constraints_is_refused(population):
    assert len(population(SKY, SKY).instructions) == 1
    other = TITLE | {"prompt": f" {PROMPT}"}
    with pytest.raises(UserError, match="mine.jsonl line 3: the same prompt has other constraint"):
        population(SKY, TITLE, other)


def test_configuration_with_unknown_prompts_is_refused(monkeypatch):
    monkeypatch.chdir(ROOT)
    known = {"model": "verifiable"}
    with pytest.raises(UserError, match="^config: preference.model is verifiable, which does not"):
        check_inputs("", resolve({"preference": known})[""])
    source = {"source": "data/instructions/train.jsonl", "per_iteration": 24}
    instructions = {"instructions": "data/instructions/held_out.jsonl", "judge": "verifiable"}
    run = resolve({"preference": known, "prompts": source, "alpaca_eval": instructions})[""]
    check_inputs("", run)
    other = {"alpaca_eval": {"judge": "verifiable"}, "prompts": source, "preference": known}
    with pytest.raises(UserError, match="^config: alpaca_eval.judge is verifiable, which does not"):
        check_inputs("", resolve(other)[""])


def test_example_of_the_page_is_accepted(tmp_path, monkeypatch):
    """The instructions, annotators and configuration of docs/using.md, with more prompts."""
    page = (ROOT / "docs/using.md").read_text(encoding="utf-8")
    section = page.split("## Your own verifiable instructions")[1].split("\n## ")[0]
    (lines,) = re.findall(r"```json\n(.+?)```", section, re.DOTALL)
    annotators, config = re.findall(r"```yaml\n(.+?)```", section, re.DOTALL)
    records = [json.loads(line) for line in lines.splitlines()]
    for folder in ("config", "data"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    for number, file in enumerate(("mine.jsonl", "mine_held_out.jsonl")):
        many = [
            row | {"prompt": f"{row['prompt']} {number} {n}"} for n in range(9) for row in records
        ]
        text = "".join(json.dumps(row) + "\n" for row in many)
        Path(file).write_text(text, encoding="utf-8")
    Path("mine_annotators.yaml").write_text(annotators, encoding="utf-8")
    Path("mine.yaml").write_text(config, encoding="utf-8")
    run = resolve(read_files([Path("mine.yaml")]))[""]
    check_inputs("", run)
    model = load_preference_model(run["preference"])
    assert len(model.instructions) == 36
    groups = [Group(f"{records[0]['prompt']} 0 0", ["Rain is wet.", "Rain is wet. " * 9])]
    (logits,) = model.all_pair_logits(groups)
    assert win_probabilities(logits)[0, 1] == pytest.approx(1, abs=1e-8)
