"""From responses and logits to pairs: who wins, what is dropped and counted."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import build_pairs
from sppo.core.artifacts import record_path
from sppo.core.errors import UserError
from sppo.core.tables import read_table, write_table

SKEW = np.array(
    [[0.0, 1.0, 2.0], [-1.0, 0.0, 1.0], [-2.0, -1.0, 0.0]]
)  # response 0 wins, response 2 loses


@pytest.fixture
def build(tmp_path, program):
    """Run the program on {prompt_id: (texts, logits, finish reasons)}, two shards; returns pairs and record."""

    def run(cases: dict, *flags: str):
        ids = list(cases)
        write_table(
            tmp_path / "prompts.parquet",
            [
                {
                    "prompt_id": i,
                    "category": "",
                    "messages": [{"role": "user", "content": i}],
                    "prompt_token_ids": [1],
                    "source": "s",
                }
                for i in ids
            ],
            "prompts",
        )
        for shard in (0, 1):
            mine = ids[shard::2]
            write_table(
                tmp_path / f"responses{shard}.parquet",
                [
                    {
                        "prompt_id": i,
                        "sample_id": k,
                        "seed": k,
                        "prompt_token_ids": [1],
                        "token_ids": [10 + k, 2],
                        "text": text,
                        "finish_reason": cases[i][2][k],
                    }
                    for i in mine
                    for k, text in enumerate(cases[i][0])
                ],
                "responses",
            )
            write_table(
                tmp_path / f"preferences{shard}.parquet",
                [
                    {
                        "prompt_id": i,
                        "sample_ids": list(range(len(cases[i][0]))),
                        "logits": np.asarray(cases[i][1]).tolist(),
                    }
                    for i in mine
                ],
                "preferences",
            )
        program(
            build_pairs,
            "--prompts",
            tmp_path / "prompts.parquet",
            "--responses",
            tmp_path / "responses0.parquet",
            tmp_path / "responses1.parquet",
            "--preferences",
            tmp_path / "preferences0.parquet",
            tmp_path / "preferences1.parquet",
            "--output",
            tmp_path / "pairs.parquet",
            *flags,
        )
        return read_table(tmp_path / "pairs.parquet", "pairs"), json.loads(
            (tmp_path / "pairs.parquet.record.json").read_text()
        )

    return run


STOPPED = ["stop"] * 3


def kept(folder: Path, name: str) -> Path:
    """The pairs that were just built, out of the way of the next, with their record."""
    path = folder / f"{name}.parquet"
    (folder / "pairs.parquet").rename(path)
    record_path(folder / "pairs.parquet").rename(record_path(path))
    return path


def test_pair_has_winner_loser_and_estimates(build):
    pairs, record = build(
        {"a": (["x", "y", "z"], SKEW, STOPPED), "b": (["x", "y", "z"], -SKEW, STOPPED)}
    )
    first, second = pairs
    assert (first["chosen"], first["rejected"], second["chosen"], second["rejected"]) == (
        "x",
        "z",
        "z",
        "x",
    )
    assert first["chosen_token_ids"] == [10, 2]
    assert first["rejected_sample_id"] == 2
    sigma = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    assert first["p_hat_chosen"] == pytest.approx((0.5 + sigma(1) + sigma(2)) / 3, abs=1e-12)
    assert first["p_hat_chosen"] + first["p_hat_rejected"] == pytest.approx(1, abs=1e-12)
    assert first["p_chosen_beats_rejected"] == pytest.approx(sigma(2), abs=1e-12)
    assert record["pairs"] == 2
    assert sum(record["dropped"].values()) == 0


@pytest.mark.parametrize(
    "reason, case, flags",
    [
        ("tie", (["x", "y", "z"], np.ones((3, 3)), STOPPED), ()),
        ("identical", (["x", "y", "x"], SKEW, STOPPED), ()),
        ("empty", (["x", "y", " \n"], SKEW, STOPPED), ()),
        ("truncated", (["x", "y", "z"], SKEW, ["length", "stop", "stop"]), ("--truncated", "drop")),
    ],
)
def test_prompts_without_a_pair_are_dropped_and_counted(build, reason, case, flags):
    pairs, record = build({"bad": case, "good": (["x", "y", "z"], SKEW, STOPPED)}, *flags)
    assert [pair["prompt_id"] for pair in pairs] == ["good"]
    assert record["dropped"] == {
        name: int(name == reason) for name in ("tie", "identical", "empty", "truncated")
    }


def test_truncated_middle_response_keeps_the_pair(build):
    pairs, _ = build(
        {"a": (["x", "y", "z"], SKEW, ["stop", "length", "stop"])}, "--truncated", "drop"
    )
    assert len(pairs) == 1


def test_cycle_is_a_tie_for_blender_scores(build):
    cycle = np.array([[0, 1, -1], [-1, 0, 1], [1, -1, 0]], dtype=float)
    pairs, record = build(
        {"a": (["x", "y", "z"], cycle, STOPPED), "b": (["x", "y", "z"], SKEW, STOPPED)},
        "--probability",
        "blender",
    )
    assert [pair["prompt_id"] for pair in pairs] == ["b"]
    assert record["dropped"]["tie"] == 1


def test_construction_all_pairs_every_two_responses(build):
    pairs, record = build(
        {
            "a": (["x", "y", "z"], SKEW, STOPPED),
            "b": (["x", "x", "z"], SKEW, STOPPED),
            "c": (["x", "y", "z"], np.ones((3, 3)), STOPPED),
        },
        "--construction",
        "all",
    )
    assert [(pair["prompt_id"], pair["chosen"], pair["rejected"]) for pair in pairs] == [
        ("a", "x", "y"),
        ("a", "x", "z"),
        ("a", "y", "z"),
        ("b", "x", "z"),
        ("b", "x", "z"),
    ]
    assert [pair["pair_id"] for pair in pairs] == list(range(5))
    assert record["dropped"] == {"tie": 3, "identical": 1, "empty": 0, "truncated": 0}
    sigma = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    assert pairs[2]["p_chosen_beats_rejected"] == pytest.approx(sigma(1))
    assert pairs[2]["p_hat_chosen"] == pytest.approx(0.5)


def test_pairs_closer_than_the_margin_are_dropped(build):
    wide = build({"a": (["x", "y", "z"], SKEW, STOPPED)}, "--construction", "all")[0]
    gaps = [pair["p_hat_chosen"] - pair["p_hat_rejected"] for pair in wide]
    pairs, record = build(
        {"a": (["x", "y", "z"], SKEW, STOPPED)},
        "--construction",
        "all",
        "--margin",
        str(max(gaps) - 0.01),
    )
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [("x", "z")]
    assert record["dropped"]["margin"] == 2


def test_gold_is_paired_with_the_first_response(build, tiny_policy, tmp_path):
    from sppo.policies.models import load_tokenizer

    gold = tmp_path / "gold.jsonl"
    gold.write_text('{"id": "a", "response": "A good answer. <|im_end|>"}\n')
    pairs, record = build(
        {"a": (["x", "y", "z"], SKEW, STOPPED), "b": (["x", "y", "z"], SKEW, STOPPED)},
        "--construction",
        "gold",
        "--gold",
        gold,
        "--policy",
        tiny_policy,
    )
    assert [
        (pair["prompt_id"], pair["chosen"], pair["rejected"], pair["chosen_sample_id"])
        for pair in pairs
    ] == [("a", "A good answer. <|im_end|>", "x", -1)]
    ids, tokenizer = pairs[0]["chosen_token_ids"], load_tokenizer(tiny_policy)
    assert ids[-1] == tokenizer.eos_token_id
    # one stop id, whatever the text spells
    assert ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(ids[:-1]) == "A good answer. <|im_end|>"
    assert record["dropped"]["no_gold"] == 1


def test_replayed_pairs_come_after_the_new_ones(build, tmp_path):
    many = {name: (["x", "y", "z"], SKEW, STOPPED) for name in "abcdefgh"}
    build(many)
    before = kept(tmp_path, "before")
    pairs, record = build(
        {"new": (["p", "q", "r"], SKEW, STOPPED)}, "--previous", before, "--replay-share", "0.5"
    )
    assert [pair["pair_id"] for pair in pairs] == list(range(5))
    assert pairs[0]["prompt_id"] == "new"
    assert record["replayed"] == 4
    assert len({pair["prompt_id"] for pair in pairs}) == 5
    assert (
        build(
            {"new": (["p", "q", "r"], SKEW, STOPPED)}, "--previous", before, "--replay-share", "0.5"
        )[0]
        == pairs
    )  # the same draw


@pytest.mark.parametrize(
    ("flags", "counts"),
    [
        ((), {"third": 2, "second": 4}),  # SPIN: new ones and the previous iteration's
        (("--replay-older-share", "0.5"), {"third": 2, "second": 4, "first": 3}),
    ],
)
def test_replay_takes_older_pairs_only_on_request(build, tmp_path, flags, counts):
    build({f"first{n}": (["x", "y", "z"], SKEW, STOPPED) for n in range(6)})
    first = kept(tmp_path, "first")
    build(
        {f"second{n}": (["x", "y", "z"], SKEW, STOPPED) for n in range(4)},
        "--previous",
        first,
        "--replay-share",
        "1",
    )
    second = kept(tmp_path, "second")
    pairs, record = build(
        {f"third{n}": (["x", "y", "z"], SKEW, STOPPED) for n in range(2)},
        "--previous",
        second,
        "--replay-share",
        "1",
        *flags,
    )
    assert Counter(pair["prompt_id"][:-1] for pair in pairs) == counts
    assert record["replayed"] == len(pairs) - 2


def test_even_lengths_apply_a_length_penalty(build):
    """Without it the longest response wins; r = (3, 2, 0) less alpha times (30, 10, 12) characters makes the second win."""
    texts, r = ["x" * 30, "y" * 10, "z" * 12], np.array([3.0, 2.0, 0.0])
    case = {"a": (texts, r[:, None] - r, STOPPED)}
    assert build(case)[0][0]["chosen"] == texts[0]
    pairs, record = build(case, "--even-lengths", "true")
    assert (pairs[0]["chosen"], pairs[0]["rejected"]) == (texts[1], texts[2])
    alpha = record["length_penalty"]
    assert 0.05 < alpha < 1 / 6  # above, the first would become the loser; below 1/20 it wins
    left = (r - alpha * np.array([30, 10, 12]))[:, None] - (r - alpha * np.array([30, 10, 12]))
    assert pairs[0]["p_hat_chosen"] == pytest.approx(
        (1 / (1 + np.exp(-left))).mean(1)[1], abs=1e-12
    )


def test_target_rewards_use_each_pair_in_both_orders(build, tiny_policy):
    from sppo.policies.models import load_tokenizer

    (plain,) = build({"a": (["x", "y", "z"], SKEW, STOPPED)})[0]
    good, bad = build(
        {"a": (["x", "y", "z"], SKEW, STOPPED)}, "--target-reward", "true", "--policy", tiny_policy
    )[0]
    assert (good["chosen"], good["rejected"], bad["chosen"], bad["rejected"]) == (
        "x",
        "z",
        "z",
        "x",
    )
    assert bad["chosen_token_ids"] == plain["rejected_token_ids"]
    assert bad["rejected_sample_id"] == plain["chosen_sample_id"]
    assert bad["p_chosen_beats_rejected"] == pytest.approx(1 - good["p_chosen_beats_rejected"])
    assert good["pair_id"] != bad["pair_id"]
    for row in (good, bad):
        text = load_tokenizer(tiny_policy).decode(row["prompt_token_ids"])
        grade = 1 + 9 * (3 * row["p_hat_chosen"] - 0.5) / 2  # P-hat over the two others
        assert f"quality is {round(grade, 1):g} on" in text
        assert text.count("<|im_start|>user") == 1
    assert (
        good["p_hat_chosen"]
        == plain["p_hat_chosen"]
        == bad["p_hat_rejected"]
        > 0.5
        > bad["p_hat_chosen"]
    )


def test_target_rewards_drop_pairs_with_equal_grades(build, tiny_policy):
    """The prompt would ask for the one and for the other."""
    pairs, record = build(
        {"near": (["x", "y", "z"], SKEW / 1000, STOPPED), "far": (["x", "y", "z"], SKEW, STOPPED)},
        "--target-reward",
        "true",
        "--policy",
        tiny_policy,
    )
    assert [pair["prompt_id"] for pair in pairs] == ["far", "far"]
    assert record["dropped"]["same_grade"] == 1


def test_winner_of_a_pair_may_have_the_lower_p_hat(build):
    """y beats x head to head, but z beats y and loses to x: P-hat has them the other way round, and DNO's label follows it."""
    cycle = np.array([[0, -0.5, 3], [0.5, 0, -3], [-3, 3, 0]])
    pairs, record = build({"a": (["x", "y", "z"], cycle, STOPPED)}, "--construction", "all")
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [
        ("y", "x"),
        ("x", "z"),
        ("z", "y"),
    ]
    assert "margin" not in record["dropped"]
    assert pairs[0]["p_hat_chosen"] < 0.5 < pairs[0]["p_hat_rejected"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ('{"id": "b", "response": "\\udc00"}', "line 2 contains half of a character"),
        ('{"id": "b"}', "line 2 is not an object with id and response"),
        ('{"id": "a", "response": "again"}', "line 2: id a occurs twice"),
    ],
)
def test_broken_gold_line_is_a_clear_error(build, tmp_path, line, message, tiny_policy):
    (tmp_path / "gold.jsonl").write_text('{"id": "a", "response": "x"}\n' + line)
    with pytest.raises(UserError, match=message):
        build(
            {"a": (["x", "y", "z"], SKEW, STOPPED)},
            "--construction",
            "gold",
            "--gold",
            tmp_path / "gold.jsonl",
            "--policy",
            tiny_policy,
        )
