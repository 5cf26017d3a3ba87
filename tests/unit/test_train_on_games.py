"""The real loss and trainer change a small policy in the same way as the exact update."""

from __future__ import annotations

import csv

import numpy as np
import pytest

import train_on_games
from sppo.core.artifacts import read_json
from sppo.theory.small_policies import PROMPT, expected_pairs, sampled_pairs, strings
from train_on_games import ETA, GAME, K, errors, exact, one_run, stretch, total_variation


@pytest.fixture
def one_iteration(monkeypatch):
    monkeypatch.setattr(train_on_games, "ITERATIONS", 1)


@pytest.mark.parametrize("name", ["softmax table", "transformer"])
def test_expected_pairs_give_the_exact_update(name, one_iteration):
    pi = one_run(name, "expected", prompts=0, seed=0)
    assert pi.sum(axis=1) == pytest.approx([1, 1], abs=1e-5)
    moved = total_variation(*exact(pi[0], ETA))
    assert total_variation(pi[1], exact(pi[0], ETA)[1]) < 0.1 * moved < 0.02
    assert total_variation(pi[1], exact(pi[0], 2 * ETA)[1]) > 0.5 * moved, (
        "another eta would pass too"
    )


def test_all_k_samples_give_the_exact_update_in_the_mean(one_iteration):
    """Pairs of winner and loser alone give a larger step."""
    runs = {
        way: np.array([one_run("softmax table", way, prompts=50, seed=seed) for seed in range(8)])
        for way in ("all K", "winner and loser")
    }
    assert errors(runs["all K"], ETA * (K - 1) / K).max() < 4
    assert stretch(runs["all K"]) == pytest.approx(1, abs=0.25)
    assert stretch(runs["winner and loser"]) > 1.25


def uniform_pairs(ends_only: bool) -> list[dict]:
    """Pairs of K samples of a uniform policy for each of four prompts; always the same samples."""
    draw = np.random.default_rng(0)
    return sampled_pairs(strings(3, 2), np.full(9, 1 / 9), GAME.P, K, 4, draw, ends_only=ends_only)


def test_every_sample_is_in_equally_many_pairs():
    """Each sample is chosen once and rejected once; the mean of P-hat over K samples is 1/2."""
    every = uniform_pairs(ends_only=False)
    assert len(every) == 4 * K
    assert all(pair["prompt_token_ids"] == PROMPT for pair in every)
    for prompt in range(4):
        own = every[prompt * K : (prompt + 1) * K]
        chosen = [pair["chosen_token_ids"] for pair in own]
        rejected = [pair["rejected_token_ids"] for pair in own]
        assert chosen == rejected[-1:] + rejected[:-1]
        assert np.mean([pair["p_hat_chosen"] for pair in own]) == pytest.approx(0.5)


def test_ends_only_keeps_the_best_and_the_worst_sample():
    every = uniform_pairs(ends_only=False)
    for prompt, pair in enumerate(uniform_pairs(ends_only=True)):
        estimates = [other["p_hat_chosen"] for other in every[prompt * K : (prompt + 1) * K]]
        assert pair["p_hat_chosen"] == max(estimates)
        assert pair["p_hat_rejected"] == min(estimates)


def test_expected_pairs_follow_the_policy_s_probabilities():
    """32 pairs have 64 responses; the policy gives half its probability to the first response."""
    pi = np.array([0.5] + [0.0625] * 8)
    count = 0
    for pair in expected_pairs(strings(3, 2), pi, GAME.P, rows=32):
        count += pair["chosen_token_ids"] == [0, 0]
        count += pair["rejected_token_ids"] == [0, 0]
    assert count == 32


@pytest.fixture
def quick(program, tmp_path, monkeypatch, one_iteration):
    """Run the program with one small policy, few prompts, two seeds and an empty figure."""
    ways = {"softmax table": ("expected", "all K", "winner and loser")}
    monkeypatch.setattr(train_on_games, "WAYS", ways)
    monkeypatch.setattr(train_on_games, "figure", lambda iterates: train_on_games.pyplot().figure())
    output = tmp_path / "trained_policies.json"
    return lambda: program(train_on_games, "--prompts", 5, "--seeds", 2, "--output", output)


def test_a_wrong_step_fails_its_check(quick, tmp_path, monkeypatch):
    """The trained policy is compared with three times the exact step."""
    exact_update = train_on_games.exact
    monkeypatch.setattr(train_on_games, "exact", lambda start, eta: exact_update(start, 3 * eta))
    quick()
    check = read_json(tmp_path / "trained_policies.json")["checks"][0]
    assert check["topic"] == 18
    assert not check["holds"]


def test_the_program_writes_every_way_to_its_table(quick, tmp_path):
    quick()
    with (tmp_path / "trained_policies.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["pairs"] for row in rows} == {
        "expected",
        "all K",
        "winner and loser",
        "exact update",
        "exact update, eta (K - 1)/K",
    }


@pytest.mark.slow
def test_every_check_of_the_whole_program_holds(program, tmp_path):
    program(train_on_games, "--output", tmp_path / "trained_policies.json")
    found = read_json(tmp_path / "trained_policies.json")
    assert len(found["checks"]) == 6
    assert all(check["holds"] for check in found["checks"])
