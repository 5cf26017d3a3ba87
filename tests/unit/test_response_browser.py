"""The response browser: what the page holds is what the run's files say, and no text can break out of it."""

from __future__ import annotations

import json
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

import build_pairs
import build_response_browser as browser
from sppo.core.artifacts import write_json
from sppo.core.errors import UserError
from sppo.core.tables import read_table, write_table
from sppo.preferences.estimates import win_probabilities

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
    """Texts of the page's scripts, as a browser divides them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found, self.links = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.links += [
            value
            for name, value in attrs
            if name in ("src", "href") and not (value or "").startswith("#")
        ]
        if tag == "script":
            self.found.append("")

    def handle_data(self, data):
        if self.cdata_elem == "script":
            self.found[-1] += data


@pytest.fixture
def root(tmp_path, program):
    """Two iterations of three prompts in two shards, one prompt without a pair; three of four instructions answered."""
    for t in (1, 2):
        folder = tmp_path / f"iter{t}"
        write_table(
            folder / "prompts.parquet",
            [
                {
                    "prompt_id": i,
                    "category": f"kind {i}",
                    "messages": [{"role": "user", "content": f"prompt {i}"}],
                    "prompt_token_ids": [1],
                    "source": "s",
                }
                for i in LOGITS
            ],
            "prompts",
        )
        for shard in (0, 1):
            mine = list(LOGITS)[shard::2]
            write_table(
                folder / "responses" / f"{shard}.parquet",
                [
                    {
                        "prompt_id": i,
                        "sample_id": k,
                        "seed": k,
                        "prompt_token_ids": [1],
                        "token_ids": [7] * (k + 1),
                        "text": EVIL if (i, k) == ("a", 1) else f"{t}{i}{k}",
                        "finish_reason": "length" if k else "stop",
                    }
                    for i in mine
                    for k in range(3)
                ],
                "responses",
            )
            write_table(
                folder / "preferences" / f"{shard}.parquet",
                [
                    {"prompt_id": i, "sample_ids": [0, 1, 2], "logits": (t * LOGITS[i]).tolist()}
                    for i in mine
                ],
                "preferences",
            )
        program(
            build_pairs,
            *(
                word
                for name in ("prompts", "responses", "preferences")
                for word in (
                    f"--{name}",
                    *sorted(tmp_path.glob(FILES[name].replace("[12]", str(t)))),
                )
            ),
            "--output",
            folder / "pairs.parquet",
        )
    write_json(
        tmp_path / "evaluation.json",
        [{"instruction": f"do {n}", "dataset": "d", "prompt_id": f"d-{n}"} for n in range(4)],
    )
    for t in (0, 1, 2):
        given = [
            {"instruction": f"do {n}", "output": f"{t} did {n}", "generator": f"policy {t}"}
            for n in range(3)
        ]
        write_json(tmp_path / f"iter{t}" / "alpaca_eval_outputs.json", given)
        write_json(
            tmp_path / f"iter{t}" / "alpaca_eval_annotations.json",
            [
                {
                    "instruction": row["instruction"],
                    "output_1": f"base {n}",
                    "generator_1": "base",
                    "output_2": row["output"],
                    "preference": 1.25 + t * n / 8,
                }
                for n, row in enumerate(given)
            ],
        )
    return tmp_path


@pytest.fixture
def build(root, program):
    """Make the page of the files under `root`, or of those in `other` for a flag; returns its text."""

    def call(*words: str, **other) -> str:
        for name, pattern in FILES.items():
            words += (
                f"--{name}",
                *(str(path) for path in other.get(name, sorted(root.glob(pattern)))),
            )
        program(
            browser,
            *words,
            "--instructions",
            root / "evaluation.json",
            "--output",
            root / "browser.html",
        )
        return (root / "browser.html").read_text(encoding="utf-8")

    return call


def held(page: str) -> dict:
    return json.loads(Scripts(page).found[0])


def change(path, edit):
    rows = json.loads(path.read_text(encoding="utf-8"))
    edit(rows)
    write_json(path, rows)


def test_training_holds_what_the_run_was_trained_on(root, build):
    items = held(build())["training"]
    assert [(item["iteration"], item["id"]) for item in items] == [
        (t, i) for t in (1, 2) for i in LOGITS
    ]
    for item in items:
        assert item["category"] == f"kind {item['id']}" and item["messages"] == [
            {"role": "user", "content": f"prompt {item['id']}"}
        ]
        assert [(r["sample"], r["tokens"], r["finish"]) for r in item["responses"]] == [
            (0, 1, "stop"),
            (1, 2, "length"),
            (2, 3, "length"),
        ]
        p = np.array(item["p"])
        assert np.array_equal(
            p, win_probabilities(item["iteration"] * LOGITS[item["id"]])
        ) and np.array_equal(p + p.T, np.ones((3, 3)))
        assert item["p_hat"] == pytest.approx(p.mean(axis=1))
        kept = {
            row["prompt_id"]: row
            for row in read_table(root / f"iter{item['iteration']}" / "pairs.parquet", "pairs")
        }
        if item["id"] == "b":
            assert (
                "b" not in kept
                and item["winner"] is item["loser"] is item["margin"] is None
                and item["outcome"] == "tie"
            )
        else:
            row = kept[item["id"]]
            assert (item["winner"], item["loser"]) == (
                row["chosen_sample_id"],
                row["rejected_sample_id"],
            ) and item["outcome"] == "pair"
            assert item["responses"][item["winner"]]["text"] == row["chosen"]
            assert (
                item["margin"] == pytest.approx(row["p_hat_chosen"] - row["p_hat_rejected"])
                and item["margin"] > 0
            )


def test_evaluation_holds_answers_verdicts_and_gains(build):
    items = held(build())["evaluation"]
    assert [
        (item["id"], item["category"], item["instruction"], item["reference"]) for item in items
    ] == [(f"d-{n}", "d", f"do {n}", f"base {n}") for n in range(3)]
    for n, item in enumerate(items):
        assert [(a["iteration"], a["name"], a["text"], a["wins"]) for a in item["answers"]] == [
            (t, f"policy {t}", f"{t} did {n}", 0.25 + t * n / 8) for t in range(3)
        ]
        assert item["margin"] == n / 4


def test_texts_stay_texts_and_nothing_is_fetched(build):
    """The page has its two scripts however a response is worded, and no address to load."""
    page = build()
    scripts = Scripts(page)
    assert len(scripts.found) == 2 and not scripts.links and "<!--" not in scripts.found[0]
    assert held(page)["training"][0]["responses"][1]["text"] == EVIL
    assert not any(
        word in scripts.found[1]
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "fetch(")
    )


def test_same_input_same_bytes_and_a_record(root, build):
    assert build() == build(
        **{name: sorted(root.glob(pattern))[::-1] for name, pattern in FILES.items()}
    )
    record = json.loads((root / "browser.html.record.json").read_text())
    assert (record["stage"], record["prompts"], record["instructions"]) == (
        "tabulate",
        6,
        3,
    ) and len(record["template_sha256"]) == 64


def test_flags_are_those_of_the_pairs(build):
    """Another P than that of training would be shown beside training's pairs: an error instead."""
    for flags in (("--logit-scale", "1.0"), ("--probability", "blender"), ("--truncated", "drop")):
        with pytest.raises(
            UserError, match=r"pairs.parquet holds another pair for prompt . .* build_pairs.py"
        ):
            build(*flags)
    for flags in (("--construction", "all"), ("--goals", "true"), ("--replay", "0.5")):
        with pytest.raises(UserError, match="best and the worst response of each prompt"):
            build(*flags)


def test_files_that_do_not_belong_together_are_one_line(root, build):
    first = [root / "iter1" / "responses" / "0.parquet"]
    for said, other in (
        (
            "is missing",
            {"pairs": [root / "iter1" / "nowhere.parquet", root / "iter2" / "pairs.parquet"]},
        ),
        (
            "is not a table of pairs",
            {"pairs": [root / "iter1" / "prompts.parquet", root / "iter2" / "pairs.parquet"]},
        ),
        ("another file has too", {"responses": first + sorted(root.glob(FILES["responses"]))}),
        (
            "prompt b of .*prompts.parquet lacks responses",
            {"responses": first + sorted(root.glob("iter2/responses/*.parquet"))},
        ),
        ("--responses .* differ in iteration 2", {"responses": first}),
        (
            "--annotations .* differ in iteration 0",
            {"annotations": sorted(root.glob("iter[12]/alpaca_eval_annotations.json"))},
        ),
        (
            "give iter0",
            {
                name: sorted(root.glob(FILES[name].replace("*", "[12]")))
                for name in ("answers", "annotations")
            },
        ),
        (
            "second file of iteration 1",
            {
                "answers": [
                    *sorted(root.glob(FILES["answers"])),
                    root / "iter1" / "alpaca_eval_outputs.json",
                ]
            },
        ),
        (
            "is not in a folder named iter",
            {
                "prompts": [
                    shutil.copy(root / "iter1" / "prompts.parquet", root / "prompts.parquet")
                ]
            },
        ),
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
def test_evaluation_files_that_disagree_are_one_line(root, build, file, edit, said):
    change(root / file, edit)
    with pytest.raises(UserError, match=said) as caught:
        build()
    assert str(root) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="Chromium is not installed")
def test_a_browser_shows_list_matrix_and_badges(root, build, tmp_path):
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
    assert (
        "prompt a" in shown
        and "winner" in shown.lower()
        and "loser" in shown.lower()
        and shown.count("<td") >= 9
    )
