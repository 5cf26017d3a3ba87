"""Pairs from responses and logits: winners, losers, and dropped pairs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import build_pairs
from sppo.core.artifacts import read_json, record_path
from sppo.core.errors import UserError
from sppo.core.tables import read_table, write_table
from sppo.preferences.pairs import Dropped, Pair, Rules, kept_or_dropped, without_truncated

# Response 0 wins and response 2 loses.
SKEW = np.array([[0.0, 1.0, 2.0], [-1.0, 0.0, 1.0], [-2.0, -1.0, 0.0]])
STOPPED = ["stop"] * 3
XYZ = (["x", "y", "z"], SKEW, STOPPED)


def sigma(x: float) -> float:
    return 1 / (1 + np.exp(-x))


def write_inputs(folder: Path, cases: dict) -> None:
    """Write the program's input tables, with two shards.

    `cases` maps the id of a prompt to the responses' texts, their logits and their finish reasons.
    """
    ids = list(cases)
    prompts = [
        {
            "prompt_id": name,
            "category": "",
            "messages": [{"role": "user", "content": name}],
            "prompt_token_ids": [1],
            "source": "s",
        }
        for name in ids
    ]
    write_table(folder / "prompts.parquet", prompts, "prompts")
    for shard in (0, 1):
        responses = []
        preferences = []
        for name in ids[shard::2]:
            texts, logits, finish_reasons = cases[name]
            for k, text in enumerate(texts):
                responses.append(
                    {
                        "prompt_id": name,
                        "sample_id": k,
                        "seed": k,
                        "prompt_token_ids": [1],
                        "token_ids": [10 + k, 2],
                        "text": text,
                        "finish_reason": finish_reasons[k],
                    }
                )
            preferences.append(
                {
                    "prompt_id": name,
                    "sample_ids": list(range(len(texts))),
                    "logits": np.asarray(logits).tolist(),
                }
            )
        write_table(folder / f"responses{shard}.parquet", responses, "responses")
        write_table(folder / f"preferences{shard}.parquet", preferences, "preferences")


@pytest.fixture
def build(tmp_path, program):
    """Run the program on the cases of `write_inputs`; returns the pairs and their record."""

    def run(cases: dict, *flags: str):
        write_inputs(tmp_path, cases)
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
        pairs = read_table(tmp_path / "pairs.parquet", "pairs")
        return pairs, read_json(record_path(tmp_path / "pairs.parquet"))

    return run


def kept(folder: Path, name: str) -> Path:
    """Rename the pairs that were just built and their record; returns the new path."""
    path = folder / f"{name}.parquet"
    (folder / "pairs.parquet").rename(path)
    record_path(folder / "pairs.parquet").rename(record_path(path))
    return path


def test_pair_has_winner_loser_and_estimates(build):
    pairs, record = build({"a": XYZ, "b": (["x", "y", "z"], -SKEW, STOPPED)})
    first, second = pairs
    assert (first["chosen"], first["rejected"]) == ("x", "z")
    assert (second["chosen"], second["rejected"]) == ("z", "x")
    assert first["chosen_token_ids"] == [10, 2]
    assert first["rejected_sample_id"] == 2
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
    pairs, record = build({"bad": case, "good": XYZ}, *flags)
    assert [pair["prompt_id"] for pair in pairs] == ["good"]
    assert record["dropped"] == {
        name: int(name == reason) for name in ("tie", "identical", "empty", "truncated")
    }


def test_truncated_middle_response_keeps_the_pair(build):
    pairs, _ = build(
        {"a": (["x", "y", "z"], SKEW, ["stop", "length", "stop"])}, "--truncated", "drop"
    )
    assert len(pairs) == 1


def test_two_equally_good_responses_have_no_second_best(build):
    both = np.array([[0, 0, 2], [0, 0, 2], [-2, -2, 0]], dtype=float)
    flags = ("--construction", "best_vs_second")
    pairs, record = build({"a": (["x", "y", "z"], both, STOPPED), "b": XYZ}, *flags)
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [("x", "y")]
    assert record["dropped"]["tie"] == 1


@pytest.mark.parametrize("construction", ["best_vs_worst", "best_vs_second", "all"])
def test_rounding_makes_no_winner(construction, build):
    """Votes of 0.1 + 0.2 against 0.3 give P = 0.49999999999999994."""
    P = np.array([[0.5, 0.1 + 0.2 + 0.2], [0.5, 0.5]])
    P[1, 0] = np.nextafter(0.5, 0)
    logits = np.log(P / (1 - P))
    cases = {"a": (["x", "y"], logits, STOPPED[:2]), "b": XYZ}
    pairs, record = build(cases, "--construction", construction)
    assert {pair["prompt_id"] for pair in pairs} == {"b"}
    assert record["dropped"]["tie"] == 1


@pytest.mark.parametrize(("complete", "is_kept"), [(2, False), (3, True)])
def test_half_of_the_responses_must_be_complete(complete, is_kept):
    preferences = {"prompt_id": "a", "sample_ids": [0, 1, 2, 3, 4], "logits": np.zeros((5, 5))}
    ends = ["stop"] * complete + ["length"] * (5 - complete)
    responses = {number: {"finish_reason": end} for number, end in enumerate(ends)}
    assert (without_truncated(preferences, responses) is not None) == is_kept


def test_pair_at_the_margin_is_kept():
    rules = Rules("best_vs_worst", "pairwise", 0.5, "logit", "keep", margin=0.25)
    response = {"finish_reason": "stop"}
    pair = Pair(response | {"text": "x"}, response | {"text": "y"}, 0.75, 0.5, 0.9)
    assert kept_or_dropped(pair, rules) is pair
    narrower = Pair(pair.chosen, pair.rejected, 0.75, 0.51, 0.9)
    assert kept_or_dropped(narrower, rules) == Dropped("margin")


def test_cycle_is_a_tie_for_blender_scores(build):
    cycle = np.array([[0, 1, -1], [-1, 0, 1], [1, -1, 0]], dtype=float)
    pairs, record = build(
        {"a": (["x", "y", "z"], cycle, STOPPED), "b": XYZ},
        "--probability",
        "blender",
    )
    assert [pair["prompt_id"] for pair in pairs] == ["b"]
    assert record["dropped"]["tie"] == 1


def test_construction_all_pairs_every_two_responses(build):
    pairs, record = build(
        {
            "a": XYZ,
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
    assert pairs[2]["p_chosen_beats_rejected"] == pytest.approx(sigma(1))
    assert pairs[2]["p_hat_chosen"] == pytest.approx(0.5)


def test_pairs_closer_than_the_margin_are_dropped(build):
    wide = build({"a": XYZ}, "--construction", "all")[0]
    gaps = [pair["p_hat_chosen"] - pair["p_hat_rejected"] for pair in wide]
    pairs, record = build(
        {"a": XYZ},
        "--construction",
        "all",
        "--margin",
        str(max(gaps) - 0.01),
    )
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [("x", "z")]
    assert record["dropped"]["margin"] == 2


def test_gold_is_paired_with_the_first_response(build, tiny_policy, tmp_path):
    from sppo.policies.chats import load_tokenizer

    gold = tmp_path / "gold.jsonl"
    gold.write_text('{"id": "a", "response": "A good answer. <|im_end|>"}\n')
    pairs, record = build(
        {"a": XYZ, "b": XYZ},
        "--construction",
        "gold",
        "--gold",
        gold,
        "--policy",
        tiny_policy,
    )
    (pair,) = pairs
    assert (pair["prompt_id"], pair["chosen_sample_id"]) == ("a", -1)
    assert (pair["chosen"], pair["rejected"]) == ("A good answer. <|im_end|>", "x")
    ids, tokenizer = pair["chosen_token_ids"], load_tokenizer(tiny_policy)
    assert ids[-1] == tokenizer.eos_token_id
    # The text <|im_end|> in the response does not become a stop id.
    assert ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(ids[:-1]) == "A good answer. <|im_end|>"
    assert record["dropped"]["no_gold"] == 1


def test_replayed_pairs_come_after_the_new_ones(build, tmp_path):
    build(dict.fromkeys("abcdefgh", XYZ))
    before = kept(tmp_path, "before")
    new = {"new": (["p", "q", "r"], SKEW, STOPPED)}
    pairs, record = build(new, "--previous", before, "--replay-share", "0.5")
    assert [pair["pair_id"] for pair in pairs] == list(range(5))
    assert pairs[0]["prompt_id"] == "new"
    assert record["replayed"] == 4
    assert len({pair["prompt_id"] for pair in pairs}) == 5
    again, _ = build(new, "--previous", before, "--replay-share", "0.5")
    assert again == pairs  # The random choice is reproducible.


@pytest.mark.parametrize(
    ("flags", "counts"),
    [
        ((), {"third": 2, "second": 4}),  # SPIN: new pairs and those of the previous iteration
        (("--replay-older-share", "0.5"), {"third": 2, "second": 4, "first": 3}),
    ],
)
def test_replay_takes_older_pairs_only_on_request(build, tmp_path, flags, counts):
    build({f"first{n}": XYZ for n in range(6)})
    first = kept(tmp_path, "first")
    build(
        {f"second{n}": XYZ for n in range(4)},
        "--previous",
        first,
        "--replay-share",
        "1",
    )
    second = kept(tmp_path, "second")
    pairs, record = build(
        {f"third{n}": XYZ for n in range(2)},
        "--previous",
        second,
        "--replay-share",
        "1",
        *flags,
    )
    assert Counter(pair["prompt_id"][:-1] for pair in pairs) == counts
    assert record["replayed"] == len(pairs) - 2


def test_even_lengths_apply_a_length_penalty(build):
    """Rewards are (3, 2, 0) and lengths are (30, 10, 12) characters.

    Without a penalty the longest response wins. With the penalty alpha x length, the second wins.
    """
    texts, r = ["x" * 30, "y" * 10, "z" * 12], np.array([3.0, 2.0, 0.0])
    case = {"a": (texts, r[:, None] - r, STOPPED)}
    assert build(case)[0][0]["chosen"] == texts[0]
    pairs, record = build(case, "--even-lengths", "true")
    assert (pairs[0]["chosen"], pairs[0]["rejected"]) == (texts[1], texts[2])
    alpha = record["length_penalty"]
    # Below 1/20 the first response wins. Above 1/6 it loses.
    assert 0.05 < alpha < 1 / 6
    penalized = r - alpha * np.array([30, 10, 12])
    p_hat = sigma(penalized[:, None] - penalized).mean(1)
    assert pairs[0]["p_hat_chosen"] == pytest.approx(p_hat[1], abs=1e-12)


def random_cases(number: int) -> dict:
    """Prompts with five responses and random logits, for `write_inputs`."""
    draw = np.random.default_rng(11)
    return {
        f"p{n}": ([f"{n} {k}" for k in range(5)], draw.normal(size=(5, 5)), ["stop"] * 5)
        for n in range(number)
    }


def test_annotated_labels_change_no_byte(build, tmp_path):
    _, record = build(random_cases(6))
    without_flag = (tmp_path / "pairs.parquet").read_bytes()
    _, again = build(random_cases(6), "--labels", "annotated", "--label-seed", "7")
    assert (tmp_path / "pairs.parquet").read_bytes() == without_flag
    assert "relabelled_prompts" not in record
    assert again.keys() == record.keys()


@pytest.mark.parametrize("construction", ["best_vs_worst", "all"])
def test_flipped_labels_exchange_winner_and_loser(build, construction):
    annotated, _ = build(random_cases(6), "--construction", construction)
    flipped, record = build(random_cases(6), "--construction", construction, "--labels", "flipped")
    assert len(flipped) == len(annotated) > 0
    for before, after in zip(annotated, flipped):
        assert after["prompt_id"] == before["prompt_id"]
        for column in ("{}", "{}_token_ids", "{}_sample_id"):
            assert after[column.format("chosen")] == before[column.format("rejected")]
            assert after[column.format("rejected")] == before[column.format("chosen")]
        assert after["p_hat_chosen"] == pytest.approx(1 - before["p_hat_rejected"], abs=1e-12)
        assert after["p_hat_rejected"] == pytest.approx(1 - before["p_hat_chosen"], abs=1e-12)
        assert after["p_chosen_beats_rejected"] == pytest.approx(
            before["p_chosen_beats_rejected"], abs=1e-12
        )
    assert record["relabelled_prompts"] == 6


def test_permuted_labels_keep_p_hat_and_change_responses(build):
    annotated, _ = build(random_cases(40))
    permuted, record = build(random_cases(40), "--labels", "permuted", "--label-seed", "3")
    assert len(permuted) == 40
    for before, after in zip(annotated, permuted):
        assert after["prompt_id"] == before["prompt_id"]
        for column in ("p_hat_chosen", "p_hat_rejected", "p_chosen_beats_rejected"):
            assert after[column] == pytest.approx(before[column], abs=1e-12)
        # A response's text and tokens stay together.
        for side in ("chosen", "rejected"):
            sample_id = after[f"{side}_sample_id"]
            assert after[side] == f"{after['prompt_id'][1:]} {sample_id}"
            assert after[f"{side}_token_ids"] == [10 + sample_id, 2]
    # A winner keeps its label with probability 1/5.
    kept_winners = sum(a["chosen"] == b["chosen"] for a, b in zip(annotated, permuted))
    assert 0 < kept_winners < 20
    assert 35 < record["relabelled_prompts"] <= 40


def test_permuted_labels_do_not_depend_on_order_or_shards(build):
    """Two prompts more or fewer before them move the prompts to other shards."""
    cases = random_cases(9)
    flags = ("--labels", "permuted", "--label-seed", "3")

    def chosen(order: list[str]) -> dict:
        pairs, _ = build({name: cases[name] for name in order}, *flags)
        return {pair["prompt_id"]: {**pair, "pair_id": None} for pair in pairs}

    names = list(cases)
    whole = chosen(names)
    assert chosen(names[::-1]) == whole
    assert chosen(names[1:]) == {name: whole[name] for name in names[1:]}


def test_record_counts_only_prompts_whose_logits_changed(build):
    """The logits of a tie are the same for all permutations."""
    cases = {"tie": (["x", "y", "z"], np.ones((3, 3)), STOPPED), "good": XYZ}
    assert build(cases, "--labels", "flipped")[1]["relabelled_prompts"] == 1


def test_target_rewards_use_each_pair_in_both_orders(build, tiny_policy):
    from sppo.policies.chats import load_tokenizer

    (plain,) = build({"a": XYZ})[0]
    good, bad = build({"a": XYZ}, "--target-reward", "true", "--policy", tiny_policy)[0]
    assert (good["chosen"], good["rejected"]) == ("x", "z")
    assert (bad["chosen"], bad["rejected"]) == ("z", "x")
    assert bad["chosen_token_ids"] == plain["rejected_token_ids"]
    assert bad["rejected_sample_id"] == plain["chosen_sample_id"]
    assert bad["p_chosen_beats_rejected"] == pytest.approx(1 - good["p_chosen_beats_rejected"])
    assert good["pair_id"] != bad["pair_id"]
    for row in (good, bad):
        text = load_tokenizer(tiny_policy).decode(row["prompt_token_ids"])
        # The grade is the win rate over the two other responses, scaled to 1..10.
        grade = 1 + 9 * (3 * row["p_hat_chosen"] - 0.5) / 2
        assert f"Overall score: {round(grade, 1):g}." in text
        assert text.startswith("<|im_start|>system\nYou are an assistant that generates")
        assert text.count("<|im_start|>user") == 1
    assert good["p_hat_chosen"] == plain["p_hat_chosen"]
    assert bad["p_hat_rejected"] == plain["p_hat_chosen"]
    assert bad["p_hat_chosen"] < 0.5 < plain["p_hat_chosen"]


def test_target_rewards_drop_pairs_with_equal_grades(build, tiny_policy):
    """Otherwise one prompt would have both responses as its winner."""
    pairs, record = build(
        {"near": (["x", "y", "z"], SKEW / 1000, STOPPED), "far": XYZ},
        "--target-reward",
        "true",
        "--policy",
        tiny_policy,
    )
    assert [pair["prompt_id"] for pair in pairs] == ["far", "far"]
    assert record["dropped"]["same_grade"] == 1


def test_winner_of_a_pair_may_have_the_lower_p_hat(build):
    """y beats x in their pair, but z beats y and loses to x. So P-hat of x is higher.

    DNO's label follows P-hat.
    """
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
            {"a": XYZ},
            "--construction",
            "gold",
            "--gold",
            tmp_path / "gold.jsonl",
            "--policy",
            tiny_policy,
        )


# --- other losers, and responses that are left out ---


def mean_logit_order(logits: np.ndarray) -> list[int]:
    """Responses from the best to the worst, by the definition: both orders of each pair count."""
    scores = [
        sum(logits[i, j] - logits[j, i] for j in range(len(logits)) if j != i)
        for i in range(len(logits))
    ]
    return sorted(range(len(scores)), key=lambda i: -scores[i])


def test_best_vs_second_takes_the_two_highest(build):
    cases = random_cases(12)
    pairs, _ = build(cases, "--construction", "best_vs_second")
    assert len(pairs) == 12
    for pair in pairs:
        best, second = mean_logit_order(cases[pair["prompt_id"]][1])[:2]
        assert (pair["chosen_sample_id"], pair["rejected_sample_id"]) == (best, second)


def test_random_losers_follow_the_seed_and_reach_all_ranks(build):
    cases = random_cases(60)
    flags = ("--construction", "best_vs_random", "--loser-seed")
    pairs, _ = build(cases, *flags, "1")
    again, _ = build(cases, *flags, "1")
    other, _ = build(cases, *flags, "2")
    assert pairs == again != other
    ranks = Counter()
    for pair in pairs:
        order = mean_logit_order(cases[pair["prompt_id"]][1])
        assert pair["chosen_sample_id"] == order[0]
        ranks[order.index(pair["rejected_sample_id"])] += 1
    # Each of the four other ranks is drawn 15 times on average.
    assert set(ranks) == {1, 2, 3, 4}
    assert min(ranks.values()) >= 5


def test_cut_responses_can_be_left_out_before_pairs_are_chosen(build):
    """The best of "a" and the worst of "b" are cut off; "c" has one complete response of three."""
    cut = {
        "a": ["length", "stop", "stop"],
        "b": ["stop", "stop", "length"],
        "c": ["length", "length", "stop"],
    }
    cases = {name: (["x", "y", "z"], SKEW, reasons) for name, reasons in cut.items()}
    pairs, record = build(cases, "--truncated", "leave_out")
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [("y", "z"), ("x", "y")]
    # P-hat is among the two that are left, each with itself.
    for pair in pairs:
        assert pair["p_hat_chosen"] == pytest.approx((0.5 + sigma(1)) / 2, abs=1e-12)
    assert record["dropped"]["truncated"] == 1
