"""The trainer changes a policy of words as the theory says, and mutants of it fail."""

from __future__ import annotations

import csv
import itertools

import numpy as np
import pytest
import torch
from scipy.special import softmax

import play_word_game
import score_reference
import train_policy
from sppo.core.artifacts import read_json
from sppo.core.errors import UserError
from sppo.core.tables import write_table
from sppo.theory.games import l2_log_ratio
from sppo.theory.word_game import (
    BASE,
    CORRECT,
    DEPARTURE,
    MUTANTS,
    NO_SELF,
    SWAPPED,
    Step,
    couples,
    cyclic_game,
    estimates,
    measure,
    mutant_claim,
    pairs_table,
)
from sppo.theory.word_policy import WordPolicy, play_iteration
from sppo.training.losses import LOSSES

WORDS = ("rock", "paper", "scissors", "Spock", "lizard")
BEATS = {
    "rock": {"scissors", "lizard"},
    "paper": {"rock", "Spock"},
    "scissors": {"paper", "lizard"},
    "lizard": {"Spock", "paper"},
    "Spock": {"scissors", "rock"},
}
P = cyclic_game(5, 0.95)
ETA, LEARNING_RATE, STEPS = 4.0, 2e-3, 20


def test_the_cyclic_game_is_rock_paper_scissors_spock_lizard():
    for (i, word), (j, other) in itertools.product(enumerate(WORDS), repeat=2):
        expected = 0.5 if word == other else 0.95 if other in BEATS[word] else 0.05
        assert P[i, j] == pytest.approx(expected)
    assert P.mean(axis=1) == pytest.approx([0.5] * 5)


@pytest.mark.parametrize("n", [3, 5, 7])
def test_every_word_is_in_a_pair(n):
    assert {word for couple in couples(n) for word in couple} == set(range(n))


def test_estimates_are_the_win_rates_against_the_words_policy():
    log_pi = np.log([0.1, 0.2, 0.05, 0.02, 0.03])
    pi = np.array([0.1, 0.2, 0.05, 0.02, 0.03]) / 0.4
    for i in range(5):
        by_hand = sum(pi[j] * P[i, j] for j in range(5))
        others = sum(pi[j] * P[i, j] for j in range(5) if j != i) / (1 - pi[i])
        assert estimates(P, log_pi, CORRECT)[i] == pytest.approx(by_hand)
        assert estimates(P, log_pi, NO_SELF)[i] == pytest.approx(others)


def test_swapped_pairs_keep_only_the_estimates_in_place():
    ids = [[i] for i in range(5)]
    right = pairs_table(P, np.arange(5) / 10, WORDS, [9], ids, CORRECT)
    wrong = pairs_table(P, np.arange(5) / 10, WORDS, [9], ids, SWAPPED)
    for row, other in zip(right, wrong):
        assert row["chosen_token_ids"] == other["rejected_token_ids"]
        assert row["p_hat_chosen"] == other["p_hat_chosen"] == row["chosen_token_ids"][0] / 10
        assert row["rejected"] in BEATS[row["chosen"]]


def test_the_loss_s_minimiser_is_a_minimum_among_policies():
    """Compared with random policies; the targets ask for a probability of more than 1."""
    draw = np.random.default_rng(0)
    pi, c = np.array([0.4, 0.3, 0.2, 0.05]), np.array([1.0, 0.5, -2.0, 3.0])
    weights = np.array([2.0, 1.0, 1.0, 1.0])
    u = l2_log_ratio(pi, c, weights)
    assert pi @ np.exp(u) == pytest.approx(1)
    best = weights @ (u - c) ** 2
    for _ in range(2000):
        other = u + draw.normal(size=4) * draw.choice([0.01, 0.1, 1])
        other -= max(np.log(pi @ np.exp(other)), 0)
        assert weights @ (other - c) ** 2 >= best - 1e-9


def test_the_loss_s_minimiser_is_the_target_if_that_is_a_policy():
    c = np.array([1.0, -0.5])
    assert l2_log_ratio(np.array([0.1, 0.1]), c, np.array([1.0, 3.0])) == pytest.approx(c)


def test_an_exact_step_departs_by_nothing():
    before = np.log(np.array([0.1, 0.2, 0.05, 0.02, 0.03]))
    step = Step(ETA, CORRECT, 1, P, before, before)
    exact = Step(ETA, CORRECT, 1, P, before, before + step.target - 0.3)
    assert measure(exact).departure == pytest.approx(0, abs=1e-9)
    assert measure(exact).wins == pytest.approx(measure(exact).wins_exact)
    # P(new beats old) = 1/2 + (KL + reversed KL)/eta, of multiplicative weights.
    old, new = softmax(before), exact.exact
    identity = 0.5 + ((new - old) @ np.log(new / old)) / ETA
    assert measure(exact).wins == pytest.approx(identity)
    assert measure(step).tv_share == pytest.approx(1), "a policy that does not move"


@pytest.fixture(scope="module")
def played(tiny_policy):
    """Two correct iterations of the tiny policy, then every mutant, by variant."""
    policy = WordPolicy(tiny_policy, WORDS, WORDS[::-1])
    base = policy.weights()

    def one(variant: str, t: int) -> Step:
        return play_iteration(policy, P, ETA, variant, t, base, LEARNING_RATE, STEPS)

    first = one(CORRECT, 1)
    after_first = policy.weights()
    steps = {(CORRECT, 1): first, (CORRECT, 2): one(CORRECT, 2)}
    for mutant, t in MUTANTS.items():
        policy.restore(base if t == 1 else after_first)
        steps[mutant, t] = one(mutant, t)
    return steps


@pytest.mark.parametrize("iteration", [1, 2])
def test_the_trainer_gives_the_exact_update_of_words(played, iteration):
    result = measure(played[CORRECT, iteration])
    assert result.slope == pytest.approx(1, abs=0.05)
    assert result.r2 > 0.99
    assert result.tv_share < 0.1
    assert result.wins == pytest.approx(result.wins_exact, abs=0.01)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_every_mutant_departs_from_the_exact_update(played, mutant):
    assert float(mutant_claim(played[mutant, MUTANTS[mutant]]).value) > DEPARTURE


def test_the_reference_mutant_adds_no_step_to_the_last_one(played):
    """It ends where one step from the base ends, with the targets of the second iteration."""
    step = played[BASE, 2]
    from_base = step.after - played[CORRECT, 1].before
    assert from_base == pytest.approx(step.target, abs=0.3)


def test_no_mutant_stays_among_the_losses(played):
    assert not [name for name in LOSSES if "mean" in name]


def test_the_workflow_s_programs_train_the_same_policy(tiny_policy, tmp_path, program):
    """From the same pairs, score_reference.py and train_policy.py give the same weights."""
    policy = WordPolicy(tiny_policy, WORDS, WORDS[::-1])
    before = policy.log_probabilities()
    rows = pairs_table(
        P,
        estimates(P, before, CORRECT),
        WORDS,
        policy.prompt,
        policy.responses,
        CORRECT,
    )
    play_iteration(policy, P, ETA, CORRECT, 1, policy.weights(), LEARNING_RATE, steps=4)

    pairs, current = tmp_path / "pairs.parquet", tmp_path / "current.parquet"
    write_table(pairs, rows, "pairs")
    shared = ["--pairs", pairs, "--policy", tiny_policy, "--precision", "float32"]
    shared += ["--micro-batch-size", 3, "--device", "cpu"]
    program(score_reference, *shared, "--output", current)
    options = ["--batch-size", 3, "--beta", 1 / ETA, "--learning-rate", LEARNING_RATE]
    options += ["--stop-epoch", 4, "--schedule-total-epochs", 4, "--max-grad-norm", 1e9]
    files = ["--current", current, "--output", tmp_path / "policy", "--log", tmp_path / "log"]
    program(train_policy, *shared, *files, *options)

    by_programs = WordPolicy(tmp_path / "policy", WORDS, WORDS[::-1]).model.state_dict()
    for name, weight in policy.model.state_dict().items():
        torch.testing.assert_close(by_programs[name], weight, rtol=0, atol=1e-7)


@pytest.fixture
def quick(program, tiny_policy, tmp_path, monkeypatch):
    """Run the program on the tiny policy with one optimiser step an iteration."""
    monkeypatch.setattr(play_word_game, "STEPS", {4.0: 1, 1000.0: 1})
    output = tmp_path / "word_game.md"

    def call(*words: object) -> None:
        program(play_word_game, "--policy", tiny_policy, "--output", output, *words)

    return call


def test_the_program_reports_failed_checks_and_writes_all(quick, tmp_path):
    """One optimiser step at learning rate 0 moves nothing, so that the claims must fail."""
    quick("--iterations", 2, "--learning-rate", 0)
    checks = read_json(tmp_path / "word_game.json")["checks"]
    failed = [entry["claim"] for entry in checks if not entry["holds"]]
    assert any("slope" in claim for claim in failed)
    assert any("exact update over" in claim for claim in failed)
    text = (tmp_path / "word_game.md").read_text()
    assert f"**{len(checks) - len(failed)} of {len(checks)} checks hold.**" in text
    with (tmp_path / "word_game.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["variant"] for row in rows] == [CORRECT] * 4 + list(MUTANTS)
    assert all(float(row["slope"]) == pytest.approx(0, abs=1e-3) for row in rows[:4])
    with (tmp_path / "word_game_words.csv").open(newline="") as stream:
        assert len(list(csv.DictReader(stream))) == 5 * len(rows)
    assert (tmp_path / "word_game.png").stat().st_size > 0


@pytest.mark.parametrize("words", [("a", "b"), ("a", "b", "c", "d"), ("a", "b", "a")])
def test_words_must_be_an_odd_number_of_different_ones(quick, words):
    with pytest.raises(UserError, match="odd number of different words"):
        quick("--words", *words)
