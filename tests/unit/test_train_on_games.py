"""The bridge: the real loss and trainer do to a small policy what the exact update does."""

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
    assert (
        total_variation(pi[1], exact(pi[0], 2 * ETA)[1]) > 0.5 * moved
    )  # another eta would not pass


def test_all_of_k_samples_give_it_in_the_mean_and_winner_and_loser_go_further(one_iteration):
    runs = {
        way: np.array([one_run("softmax table", way, prompts=50, seed=seed) for seed in range(8)])
        for way in ("all K", "ends")
    }
    assert errors(runs["all K"], ETA * (K - 1) / K).max() < 4
    assert stretch(runs["all K"]) == pytest.approx(1, abs=0.25)
    assert stretch(runs["ends"]) > 1.25


def test_pairs_hold_every_sample_equally_often_or_the_ends_alone():
    responses, pi, draw = strings(3, 2), np.full(9, 1 / 9), np.random.default_rng(0)
    every = sampled_pairs(responses, pi, GAME.P, K, 4, draw, ends_only=False)
    assert len(every) == 4 * K and all(pair["prompt_token_ids"] == PROMPT for pair in every)
    for prompt in range(4):
        own = every[prompt * K : (prompt + 1) * K]
        assert [pair["chosen_token_ids"] for pair in own] == [
            pair["rejected_token_ids"] for pair in own[-1:] + own[:-1]
        ]
        assert np.mean([pair["p_hat_chosen"] for pair in own]) == pytest.approx(
            0.5
        )  # the mean of P-hat over K is 1/2
    ends = sampled_pairs(responses, pi, GAME.P, K, 4, np.random.default_rng(0), ends_only=True)
    for prompt, pair in enumerate(ends):
        estimates = [other["p_hat_chosen"] for other in every[prompt * K : (prompt + 1) * K]]
        assert (pair["p_hat_chosen"], pair["p_hat_rejected"]) == (max(estimates), min(estimates))
    likely = expected_pairs(responses, np.array([0.5] + [0.0625] * 8), GAME.P, rows=32)
    assert (
        sum(
            (pair["chosen_token_ids"] == [0, 0]) + (pair["rejected_token_ids"] == [0, 0])
            for pair in likely
        )
        == 32
    )


def test_program_writes_checks_that_can_fail(program, tmp_path, monkeypatch, one_iteration):
    """Held against three times the step, the table stands too far from it, and its check says so."""
    monkeypatch.setattr(train_on_games, "WAYS", {"softmax table": ("expected", "all K", "ends")})
    real = train_on_games.exact
    monkeypatch.setattr(train_on_games, "exact", lambda start, eta: real(start, 3 * eta))
    monkeypatch.setattr(train_on_games, "figure", lambda iterates: train_on_games.pyplot().figure())
    program(
        train_on_games, "--prompts", 5, "--seeds", 2, "--output", tmp_path / "trained_policies.json"
    )
    expected = read_json(tmp_path / "trained_policies.json")["checks"][0]
    assert expected["number"] == 18 and not expected["holds"]
    with (tmp_path / "trained_policies.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["way"] for row in rows} == {
        "expected",
        "all K",
        "ends",
        "exact",
        "exact, eta (K - 1)/K",
    }


@pytest.mark.slow
def test_every_check_of_the_whole_program_holds(program, tmp_path):
    program(train_on_games, "--output", tmp_path / "trained_policies.json")
    found = read_json(tmp_path / "trained_policies.json")
    assert len(found["checks"]) == 6 and all(check["holds"] for check in found["checks"])
