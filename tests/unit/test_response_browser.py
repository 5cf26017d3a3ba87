"""The response browser: the page shows the data of the run, and texts cannot become HTML."""

from __future__ import annotations

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import build_pairs
import build_response_browser as browser
from sppo.core.artifacts import write_json
from sppo.core.errors import UserError
from sppo.core.tables import read_table, write_table
from sppo.preferences.estimates import win_probabilities
from sppo.preferences.labels import relabelled

EVIL = "a </script><script>alert(1)</script> <!-- <script> @DATA@ \u2028 \\ <b>é</b>"
LOGITS = {
    "a": np.array([[0.0, 1.0, 2.0], [-1.0, 0.0, 3.0], [-2.0, 0.5, 0.0]]),
    "b": np.ones((3, 3)),  # a tie
    "c": np.arange(3) * np.ones((3, 3)),
}
FILES = {
    "prompts": "iter[12]/prompts.parquet",
    "responses": "iter[12]/responses/*.parquet",
    "preferences": "iter[12]/preferences/*.parquet",
    "pairs": "iter[12]/pairs.parquet",
    "answers": "iter*/alpaca_eval_outputs.json",
    "annotations": "iter*/alpaca_eval_annotations.json",
}


class Scripts(HTMLParser):
    """Texts of the scripts of a page, and its links to other pages, as a browser finds them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found = []
        self.links = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("src", "href") and not (value or "").startswith("#"):
                self.links.append(value)
        if tag == "script":
            self.found.append("")

    def handle_data(self, data):
        if self.cdata_elem == "script":
            self.found[-1] += data


def prompt_row(prompt_id: str) -> dict:
    return {
        "prompt_id": prompt_id,
        "category": f"kind {prompt_id}",
        "messages": [{"role": "user", "content": f"prompt {prompt_id}"}],
        "prompt_token_ids": [1],
        "source": "s",
    }


def response_row(t: int, prompt_id: str, sample: int) -> dict:
    """The first sample stops, the others are cut; one text tries to break the page."""
    return {
        "prompt_id": prompt_id,
        "sample_id": sample,
        "seed": sample,
        "prompt_token_ids": [1],
        "token_ids": [7] * (sample + 1),
        "text": EVIL if (prompt_id, sample) == ("a", 1) else f"{t}{prompt_id}{sample}",
        "finish_reason": "length" if sample else "stop",
    }


def preference_row(t: int, prompt_id: str) -> dict:
    logits = t * LOGITS[prompt_id]
    return {"prompt_id": prompt_id, "sample_ids": [0, 1, 2], "logits": logits.tolist()}


def write_training(folder: Path, t: int, program, *flags: str) -> None:
    """Prompts, responses and preferences of iteration t in two shards, and the pairs of them."""
    prompts = folder / "prompts.parquet"
    responses = [folder / "responses" / f"{shard}.parquet" for shard in (0, 1)]
    preferences = [folder / "preferences" / f"{shard}.parquet" for shard in (0, 1)]
    write_table(prompts, [prompt_row(prompt_id) for prompt_id in LOGITS], "prompts")
    for shard in (0, 1):
        ids = list(LOGITS)[shard::2]
        rows = [response_row(t, prompt_id, sample) for prompt_id in ids for sample in range(3)]
        write_table(responses[shard], rows, "responses")
        rows = [preference_row(t, prompt_id) for prompt_id in ids]
        write_table(preferences[shard], rows, "preferences")
    program(
        build_pairs,
        "--prompts",
        prompts,
        "--responses",
        *responses,
        "--preferences",
        *preferences,
        "--output",
        folder / "pairs.parquet",
        *flags,
    )


def write_evaluation(folder: Path, t: int) -> None:
    """Answers of iteration t to three instructions, and the verdicts on them."""
    answers = [
        {"instruction": f"do {n}", "output": f"{t} did {n}", "generator": f"policy {t}"}
        for n in range(3)
    ]
    write_json(folder / "alpaca_eval_outputs.json", answers)
    annotations = [
        {
            "instruction": answer["instruction"],
            "output_1": f"base {n}",
            "generator_1": "base",
            "output_2": answer["output"],
            "preference": 1.25 + t * n / 8,
        }
        for n, answer in enumerate(answers)
    ]
    write_json(folder / "alpaca_eval_annotations.json", annotations)


@pytest.fixture
def root(tmp_path, program):
    """A run of two iterations with three prompts; one prompt has no pair.

    Three of four instructions are answered.
    """
    for t in (1, 2):
        write_training(tmp_path / f"iter{t}", t, program)
    instructions = [
        {"instruction": f"do {n}", "dataset": "d", "prompt_id": f"d-{n}"} for n in range(4)
    ]
    write_json(tmp_path / "evaluation.json", instructions)
    for t in (0, 1, 2):
        write_evaluation(tmp_path / f"iter{t}", t)
    return tmp_path


@pytest.fixture
def build(root, program):
    """Make the page of the files under `root` and return its text.

    `other` replaces the files of a flag.
    """

    def call(*words: str, instructions: str = "evaluation.json", **other) -> str:
        for name, pattern in FILES.items():
            paths = other.get(name, sorted(root.glob(pattern)))
            words += (f"--{name}", *map(str, paths))
        program(
            browser,
            *words,
            "--instructions",
            root / instructions,
            "--output",
            root / "browser.html",
        )
        return (root / "browser.html").read_text(encoding="utf-8")

    return call


def page_data(page: str) -> dict:
    return json.loads(Scripts(page).found[0])


def edit_json(path, edit):
    rows = json.loads(path.read_text(encoding="utf-8"))
    edit(rows)
    write_json(path, rows)


def test_training_view_shows_the_data_of_the_run(build):
    items = page_data(build())["training"]
    assert [(item["iteration"], item["id"]) for item in items] == [
        (t, prompt_id) for t in (1, 2) for prompt_id in LOGITS
    ]
    for item in items:
        prompt = prompt_row(item["id"])
        assert item["category"] == prompt["category"]
        assert item["messages"] == prompt["messages"]
        assert [(r["sample"], r["tokens"], r["finish"]) for r in item["responses"]] == [
            (0, 1, "stop"),
            (1, 2, "length"),
            (2, 3, "length"),
        ]


def test_training_view_shows_win_probabilities(build):
    for item in page_data(build())["training"]:
        p = np.array(item["p"])
        assert np.array_equal(p, win_probabilities(item["iteration"] * LOGITS[item["id"]]))
        assert np.array_equal(p + p.T, np.ones((3, 3)))
        assert item["p_hat"] == pytest.approx(p.mean(axis=1))


def test_training_view_shows_the_pairs_of_the_run(root, build):
    """Prompt b is a tie, so it has no pair."""
    for item in page_data(build())["training"]:
        table = read_table(root / f"iter{item['iteration']}" / "pairs.parquet", "pairs")
        pairs = {row["prompt_id"]: row for row in table}
        if item["id"] == "b":
            assert "b" not in pairs
            assert item["outcome"] == "tie"
            assert item["winner"] is item["loser"] is item["margin"] is None
        else:
            pair = pairs[item["id"]]
            assert item["outcome"] == "pair"
            assert item["winner"] == pair["chosen_sample_id"]
            assert item["loser"] == pair["rejected_sample_id"]
            assert item["responses"][item["winner"]]["text"] == pair["chosen"]
            margin = pair["p_hat_chosen"] - pair["p_hat_rejected"]
            assert item["margin"] == pytest.approx(margin)
            assert item["margin"] > 0


def test_evaluation_view_shows_answers_verdicts_and_gains(build):
    items = page_data(build())["evaluation"]
    assert [
        (item["id"], item["category"], item["instruction"], item["reference"]) for item in items
    ] == [(f"d-{n}", "d", f"do {n}", f"base {n}") for n in range(3)]
    for n, item in enumerate(items):
        assert [(a["iteration"], a["name"], a["text"], a["wins"]) for a in item["answers"]] == [
            (t, f"policy {t}", f"{t} did {n}", 0.25 + t * n / 8) for t in range(3)
        ]
        assert item["margin"] == n / 4


def test_page_opens_on_the_largest_gain(build):
    assert page_data(build())["example"] == "d-2"


def test_page_opens_on_constraints_that_only_training_follows(root, build):
    rows = [
        {
            "key": n,
            "prompt": f"do {n}",
            "instruction_id_list": ["keywords:existence", "punctuation:no_comma"],
            "kwargs": [{"keywords": ["2"]}, {}],
        }
        for n in range(4)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (root / "evaluation.jsonl").write_text(text, encoding="utf-8")
    data = page_data(build(instructions="evaluation.jsonl"))
    # The gain is largest for `do 2`, but the base's answer, "0 did 2", has the keyword already.
    first, chosen, last = data["evaluation"]
    assert data["example"] == chosen["id"] and chosen["instruction"] == "do 1"
    assert [[one["followed"] for one in answer["constraints"]] for answer in chosen["answers"]] == [
        [False, True],
        [False, True],
        [True, True],
    ]
    assert all(all(one["followed"] for one in answer["constraints"]) for answer in last["answers"])


def test_a_response_cannot_add_a_script_or_link_to_the_page(build):
    page = build()
    scripts = Scripts(page)
    assert len(scripts.found) == 2
    assert not scripts.links
    assert "<!--" not in scripts.found[0]
    assert page_data(page)["training"][0]["responses"][1]["text"] == EVIL


def test_the_script_inserts_no_html_and_fetches_nothing(build):
    _, code = Scripts(build()).found
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "fetch("):
        assert word not in code


def test_the_same_files_give_the_same_bytes(root, build):
    """The order of the files does not matter."""
    reversed_files = {name: sorted(root.glob(pattern))[::-1] for name, pattern in FILES.items()}
    assert build() == build(**reversed_files)


def test_the_page_has_a_record(root, build):
    build()
    record = json.loads((root / "browser.html.record.json").read_text())
    assert record["stage"] == "tabulate"
    assert record["prompts"] == 6
    assert record["instructions"] == 3
    assert len(record["template_sha256"]) == 64


def test_flags_must_be_those_of_build_pairs(build):
    """Other flags would show a P that differs from the P of the training pairs."""
    for flags in (("--logit-scale", "1.0"), ("--probability", "blender"), ("--truncated", "drop")):
        with pytest.raises(
            UserError, match=r"pairs.parquet holds another pair for prompt . .* build_pairs.py"
        ):
            build(*flags)


@pytest.mark.parametrize("labels", ["flipped", "permuted"])
def test_control_is_shown_with_the_labels_it_trains_on(labels, root, build, program):
    flags = ("--labels", labels, "--label-seed", "1")
    for t in (1, 2):
        write_training(root / f"iter{t}", t, program, *flags)
    with pytest.raises(UserError, match="holds another pair"):
        build()
    for item in page_data(build(*flags))["training"]:
        logits = relabelled(item["iteration"] * LOGITS[item["id"]], labels, item["id"], 1)
        assert np.array_equal(item["p"], win_probabilities(logits))


@pytest.mark.parametrize(
    "flags", [("--construction", "all"), ("--target-reward", "true"), ("--replay-share", "0.5")]
)
def test_only_one_pair_of_each_prompt_can_be_shown(flags, build):
    with pytest.raises(UserError, match="one pair of responses to each prompt"):
        build(*flags)


@pytest.mark.parametrize(
    "flags",
    [
        ("--construction", "best_vs_second"),
        ("--construction", "best_vs_random", "--loser-seed", "3"),
    ],
    ids=["second", "random"],
)
def test_other_losers_are_shown(flags, root, build, program):
    for t in (1, 2):
        write_training(root / f"iter{t}", t, program, *flags)
    items = page_data(build(*flags))["training"]
    shown = {(item["iteration"], item["id"]): (item["winner"], item["loser"]) for item in items}
    for t in (1, 2):
        pairs = read_table(root / f"iter{t}/pairs.parquet", "pairs")
        assert pairs
        for pair in pairs:
            ends = (pair["chosen_sample_id"], pair["rejected_sample_id"])
            assert shown[t, pair["prompt_id"]] == ends


def test_prompts_with_too_many_cut_responses_are_shown_as_such(root, build, program):
    """Two of the three responses to each prompt are cut off."""
    flags = ("--truncated", "leave_out")
    for t in (1, 2):
        write_training(root / f"iter{t}", t, program, *flags)
    items = page_data(build(*flags))["training"]
    assert {item["outcome"] for item in items} == {"truncated"}


def test_files_that_do_not_belong_together_are_refused(root, build):
    iter1, iter2 = root / "iter1", root / "iter2"
    pairs_of_2 = iter2 / "pairs.parquet"
    shard_of_1 = iter1 / "responses" / "0.parquet"
    shards_of_2 = sorted(iter2.glob("responses/*.parquet"))
    answers_from_1 = sorted(root.glob("iter[12]/alpaca_eval_outputs.json"))
    annotations_from_1 = sorted(root.glob("iter[12]/alpaca_eval_annotations.json"))
    outside = shutil.copy(iter1 / "prompts.parquet", root / "prompts.parquet")
    for said, other in (
        ("is missing", {"pairs": [iter1 / "nowhere.parquet", pairs_of_2]}),
        ("is not a table of pairs", {"pairs": [iter1 / "prompts.parquet", pairs_of_2]}),
        (
            "another file has too",
            {"responses": [shard_of_1, *sorted(root.glob(FILES["responses"]))]},
        ),
        (
            "prompt b of .*prompts.parquet lacks responses",
            {"responses": [shard_of_1, *shards_of_2]},
        ),
        ("--responses .* differ in iteration 2", {"responses": [shard_of_1]}),
        ("--annotations .* differ in iteration 0", {"annotations": annotations_from_1}),
        ("give iter0", {"answers": answers_from_1, "annotations": annotations_from_1}),
        (
            "second file of iteration 1",
            {
                "answers": [
                    *sorted(root.glob(FILES["answers"])),
                    iter1 / "alpaca_eval_outputs.json",
                ]
            },
        ),
        ("is not in a folder named iter", {"prompts": [outside]}),
    ):
        with pytest.raises(UserError, match=said):
            build(**other)
    assert not (root / "browser.html").exists()


@pytest.mark.parametrize(
    ("file", "edit", "said"),
    [
        (
            "iter1/alpaca_eval_outputs.json",
            lambda rows: rows.pop(),
            "answer different instructions",
        ),
        (
            "iter1/alpaca_eval_outputs.json",
            lambda rows: rows[0].update(output="new"),
            "judges other answers",
        ),
        (
            "iter2/alpaca_eval_annotations.json",
            lambda rows: rows[0].update(output_1="new"),
            "different references",
        ),
        (
            "iter2/alpaca_eval_annotations.json",
            lambda rows: rows[0].update(preference=None),
            "no preference between 1 and 2",
        ),
        (
            "iter2/alpaca_eval_annotations.json",
            lambda rows: rows[0].pop("output_2"),
            "is not a list of objects with",
        ),
        ("evaluation.json", lambda rows: rows.pop(0), "lacks the instruction 'do 0'"),
    ],
)
def test_evaluation_files_that_disagree_are_refused(root, build, file, edit, said):
    edit_json(root / file, edit)
    with pytest.raises(UserError, match=said) as caught:
        build()
    assert str(root) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="Chromium is not installed")
def test_chromium_shows_list_matrix_and_badges(root, build, tmp_path):
    build()
    dom = subprocess.run(
        [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--no-first-run",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=3000",
            "--dump-dom",
            (root / "browser.html").as_uri(),
        ],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    shown = dom[dom.index("<main") :] if "<main" in dom else dom
    assert "prompt a" in shown
    assert "winner" in shown.lower()
    assert "loser" in shown.lower()
    assert shown.count("<td") >= 9
