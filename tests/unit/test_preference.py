"""Preference estimates: golden values, exact identities, and cycles, which mean scores hide."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import combinations, permutations

import numpy as np
import pytest

from sppo.core.errors import UserError
from sppo.preferences.estimates import (
    condorcet_winner,
    cyclic_prompts,
    cyclic_triples,
    even_length_penalty,
    mean_logits,
    p_hat,
    p_hat_weighted,
    win_probabilities,
    winner_and_loser,
)

# The logits of one prompt, and the reference values of its estimates.
L = np.array(
    [
        [0.0, 1.2, -0.3, 2.0, 0.7],
        [-0.8, 0.0, 0.5, 0.1, -1.0],
        [0.6, -0.2, 0.0, 1.4, 0.3],
        [-1.7, 0.4, -1.1, 0.0, -0.6],
        [-0.2, 0.9, -0.5, 0.8, 0.0],
    ]
)
SCORE = [1.14, -0.7, 0.7, -1.46, 0.32]
CODE_P_HAT = [
    0.7192611315871478,
    0.35624970766787695,
    0.6368795018575921,
    0.22709765442061788,
    0.5605120044667654,
]
DIRECT_P_HAT = [
    0.6713340113120425,
    0.36861133034832455,
    0.6313756063126414,
    0.274448765938398,
    0.5542302860885935,
]
# a beats b, b beats c and c beats a. The two orders of a pair differ in strength. The mean scores
# are equal, but no pair is a tie.
CYCLE = np.array([[9.0, 2.0, -2.0], [-1.0, 9.0, 2.0], [1.0, -1.0, 9.0]])


def random_logits():
    """Fifty K x K matrices without symmetry, with small and very large entries."""
    draw = np.random.default_rng(3)
    for number in range(50):
        k = int(draw.integers(2, 9))
        yield draw.normal(scale=10.0 ** (number % 5 - 2), size=(k, k))


def by_hand(logits, probability: str, scale: float) -> list[list[float]]:
    """P(i beats j) in loops; it shares no code with sppo.preferences.estimates."""
    k = len(logits)
    p = [[0.5] * k for _ in range(k)]
    scores = [sum(logits[i][j] - logits[j][i] for j in range(k) if j != i) / k for i in range(k)]
    for i in range(k):
        for j in range(k):
            if i == j:
                continue
            if probability == "blender":
                p[i][j] = 1 / (1 + math.exp(scores[j] - scores[i]))
            else:
                p[i][j] = 1 / (1 + math.exp(-scale * (logits[i][j] - logits[j][i])))
    return p


def test_golden_scores_give_winner_and_loser():
    assert mean_logits(L) == pytest.approx(SCORE, abs=1e-12)
    assert winner_and_loser(mean_logits(L)) == (0, 3)


@pytest.mark.parametrize(
    ("probability", "expected"), [("blender", CODE_P_HAT), ("pairwise", DIRECT_P_HAT)]
)
def test_p_hat_has_its_golden_value(probability, expected):
    # The golden value of the pairwise estimate sums both orders.
    assert p_hat(win_probabilities(L, probability, 1.0)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("probability", ["pairwise", "blender"])
@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_win_probabilities_equal_loops_and_ignore_the_diagonal(probability, scale):
    for logits in random_logits():
        logits = np.clip(logits, -100, 100)
        expected = np.array(by_hand(logits.tolist(), probability, scale))
        np.fill_diagonal(logits, 1e6)
        np.testing.assert_allclose(
            win_probabilities(logits, probability, scale), expected, rtol=1e-9, atol=1e-15
        )


@pytest.mark.parametrize("probability", ["pairwise", "blender"])
@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_p_plus_its_transpose_is_exactly_one(probability, scale):
    for logits in random_logits():
        p = win_probabilities(logits, probability, scale)
        assert (p + p.T == 1.0).all()
        assert (np.diag(p) == 0.5).all()
        assert p_hat(p).mean() == pytest.approx(0.5, abs=1e-15)
        # P-hat includes the comparison of a response with itself, so it is never 0 or 1.
        assert (p_hat(p) >= 0.5 / len(p)).all()
        assert (p_hat(p) <= 1 - 0.5 / len(p)).all()


def test_mean_logits_hide_a_cycle_that_pairs_show():
    p = win_probabilities(CYCLE, "pairwise", 0.5)
    assert p[0, 1] == p[1, 2] == p[2, 0] == pytest.approx(1 / (1 + math.exp(-1.5)))
    assert (win_probabilities(CYCLE, "blender") == 0.5).all()
    assert winner_and_loser(mean_logits(CYCLE)) is None


def test_uneven_cycle_has_a_winner():
    logits = np.array([[0.0, 3.0, -1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    p = win_probabilities(logits, "pairwise", 1.0)
    assert p[0, 1] > 0.5
    assert p[1, 2] > 0.5
    assert p[2, 0] > 0.5
    assert winner_and_loser(mean_logits(logits)) == (0, 1)


def test_both_estimates_agree_on_additive_logits():
    """L_ij = (u_i - u_j) / 2 is the Bradley-Terry model.

    `blender` sums both orders. With scale 1 `pairwise` sums them too.
    """
    u = np.random.default_rng(0).normal(size=6)
    logits = (u[:, None] - u[None, :]) / 2
    np.testing.assert_allclose(
        win_probabilities(logits, "pairwise", 1.0), win_probabilities(logits, "blender"), atol=1e-14
    )


def test_logit_scale_gives_mean_or_sum_of_both_orders():
    logits = np.array([[0.0, 1.5], [-0.5, 0.0]])
    half = win_probabilities(logits, logit_scale=0.5)
    assert half[0, 1] == pytest.approx(1 / (1 + math.exp(-1.0)))
    one = win_probabilities(logits, logit_scale=1.0)
    assert one[0, 1] == pytest.approx(1 / (1 + math.exp(-2.0)))


def test_p_hat_follows_a_permutation_of_the_responses():
    for logits in random_logits():
        order = np.random.default_rng(1).permutation(len(logits))
        np.testing.assert_allclose(
            p_hat(win_probabilities(logits[np.ix_(order, order)])),
            p_hat(win_probabilities(logits))[order],
            atol=1e-15,
        )


def test_equal_scores_have_no_winner():
    assert winner_and_loser(np.array([0.25, 0.25, 0.25])) is None
    assert winner_and_loser(np.array([0.25, 0.5, 0.25])) == (1, 0)


@pytest.mark.parametrize("logits", [np.zeros(4), np.zeros((2, 3))])
def test_logits_that_are_not_square_are_refused(logits):
    with pytest.raises(ValueError):
        mean_logits(logits)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("estimate", [mean_logits, win_probabilities])
def test_nan_or_infinite_logits_are_refused(estimate, number):
    with pytest.raises(
        UserError, match="the preference model gave logits that are NaN or infinite"
    ):
        estimate(np.array([[0.0, number], [0.0, 0.0]]))


def test_unknown_estimate_is_refused_by_name():
    with pytest.raises(ValueError, match="'bt'"):
        win_probabilities(L, "bt")


def test_importance_weights_estimate_another_policy():
    draw = np.random.default_rng(0)
    P = np.triu(draw.uniform(size=(6, 6)), 1)
    P += np.tril(1 - P.T, -1) + 0.5 * np.eye(6)
    pi, other = draw.dirichlet(np.full(6, 5.0)), draw.dirichlet(np.full(6, 5.0))
    sample = draw.choice(6, size=4000, p=pi)
    estimate = p_hat_weighted(P[np.ix_(np.arange(6), sample)], np.log(other / pi)[sample] + 700.0)
    assert np.abs(estimate - P @ other).max() < 0.02
    assert np.abs(P @ pi - P @ other).max() > 0.02  # The two policies differ by more than this.
    assert p_hat_weighted(P, np.zeros(6)) == pytest.approx(p_hat(P))


@pytest.mark.parametrize("seed", range(5))
def test_length_penalty_is_as_good_as_a_fine_grid(seed):
    draw = np.random.default_rng(seed)
    lengths = [draw.integers(1, 400, size=k).astype(float) for k in (5, 5, 4, 2)]
    # Longer responses have higher scores on average.
    scores = [0.01 * n + draw.normal(size=len(n)) for n in lengths]

    def difference(alpha: float) -> float:
        """The mean difference in length of winner and loser, as an absolute value."""
        differences = []
        for score, length in zip(scores, lengths, strict=True):
            ranked = sorted(zip(score - alpha * length, length))
            (_, loser), (_, winner) = ranked[0], ranked[-1]
            differences.append(winner - loser)
        return abs(float(np.mean(differences)))

    alpha = even_length_penalty(scores, lengths)
    assert alpha > 0
    assert difference(alpha) <= min(map(difference, np.linspace(0, 0.1, 2001))) + 1e-9


def test_length_penalty_is_zero_if_winners_are_not_longer():
    assert even_length_penalty([np.array([2.0, 1.0])], [np.array([10.0, 20.0])]) == 0
    assert even_length_penalty([np.array([2.0, 1.0])], [np.array([20.0, 20.0])]) == 0
    assert even_length_penalty([], []) == 0


# --- how often preferences are cyclic ---


def with_ties(seed: int, k: int) -> np.ndarray:
    """A random P of k responses, in which about a third of the pairs are ties."""
    draw = np.random.default_rng(seed)
    upper = np.triu(draw.choice([0.2, 0.5, 0.7], size=(k, k)), 1)
    lower = np.tril(1 - upper.T, -1)
    return upper + lower + 0.5 * np.eye(k)


def is_cyclic(P, triple) -> bool:
    """Whether some order of the triple is a cycle."""
    return any(
        P[i][j] > 0.5 and P[j][k] > 0.5 and P[k][i] > 0.5 for i, j, k in permutations(triple)
    )


@pytest.mark.parametrize("seed", range(20))
def test_shares_of_cycles_and_winners_equal_brute_force(seed):
    matrices = [with_ties(100 * seed + n, k) for n, k in enumerate((1, 2, 3, 3, 4, 5, 6))]
    triples = [is_cyclic(P, triple) for P in matrices for triple in combinations(range(len(P)), 3)]
    assert len(triples) == 1 + 1 + 4 + 10 + 20
    assert cyclic_triples(matrices) == float(Fraction(sum(triples), len(triples)))
    with_cycles = [
        any(is_cyclic(P, triple) for triple in combinations(range(len(P)), 3))
        for P in matrices
        if len(P) > 2
    ]
    assert cyclic_prompts(matrices) == float(Fraction(sum(with_cycles), len(with_cycles)))
    winners = [
        any(all(P[i][j] > 0.5 for j in range(len(P)) if j != i) for i in range(len(P)))
        for P in matrices
        if len(P) > 2
    ]
    assert condorcet_winner(matrices) == float(Fraction(sum(winners), len(winners)))


def test_brute_force_matrices_have_cycles_winners_and_ties():
    matrices = [with_ties(seed, 4) for seed in range(50)]
    assert 0 < cyclic_triples(matrices) < condorcet_winner(matrices) < 1
    assert any((np.triu(P, 1) == 0.5).any() for P in matrices)


def test_cycle_has_no_winner_and_an_order_has_no_cycle():
    cycle, order = (
        win_probabilities(CYCLE),
        win_probabilities(np.diag([3.0, 2.0, 1.0]) @ np.ones((3, 3))),
    )
    assert (cyclic_triples([cycle]), condorcet_winner([cycle])) == (1.0, 0.0)
    assert (cyclic_triples([order]), condorcet_winner([order])) == (0.0, 1.0)
    assert (cyclic_triples([cycle, order]), condorcet_winner([cycle, order])) == (0.5, 0.5)
    hidden = win_probabilities(CYCLE, "blender")
    assert (cyclic_triples([hidden]), condorcet_winner([hidden])) == (0.0, 0.0)
    assert cyclic_prompts([cycle, order, hidden, order]) == 0.25


def test_tie_by_rounding_is_neither_a_cycle_nor_a_win():
    P = np.full((3, 3), 0.5)
    for i, j in ((0, 1), (1, 2), (2, 0)):
        P[i, j], P[j, i] = 0.5 + 1e-15, 0.5 - 1e-15
    assert (cyclic_triples([P]), condorcet_winner([P])) == (0.0, 0.0)


def test_fewer_than_three_responses_give_no_shares():
    assert cyclic_triples([]) is cyclic_prompts([]) is condorcet_winner([]) is None
    two = np.array([[0.5, 0.9], [0.1, 0.5]])
    assert cyclic_triples([two, np.array([[0.5]])]) is condorcet_winner([two]) is None
    assert condorcet_winner([two, win_probabilities(CYCLE)]) == 0.0
