"""Exact games: every check with its numbers; each algorithm compared with plain loops."""

from __future__ import annotations

import csv
import itertools
import json
import math

import numpy as np
import pytest
from matplotlib import pyplot
from scipy.optimize import minimize

import check_theory
import plot_theory
from sppo.core.errors import UserError
from sppo.theory import claims
from sppo.theory import games as g
from sppo.theory.claims import TOPICS, Claim
from sppo.theory.games import duality_gap, kl, play

COMAL3 = g.GAMES["comal3"].P
START = g.GAMES["comal3"].start
UNIFORM = np.full(3, 1 / 3)
RANDOM = [g.random_game(n, seed) for n, seed in ((2, 0), (3, 1), (4, 2), (7, 3))]
GAMES = [*g.GAMES.values(), *RANDOM]
# Reference values of one step from (.2, .5, .3) on comal3.
ONE_STEP = {
    "mwu": (g.mwu(COMAL3, START, 1.0), (0.178338678183976, 0.4781742284659429, 0.3434870933500812)),
    "inpo": (
        g.inpo(COMAL3, START, UNIFORM, 2, 0.3),
        (0.20593083004975005, 0.464697872584393, 0.3293712973658571),
    ),
    "nash_md": (
        g.nash_md(COMAL3, START, UNIFORM, 2, 0.3),
        (0.2072708891173716, 0.46580053753858286, 0.3269285733440454),
    ),
    "mmd": (
        g.mmd(COMAL3, START, UNIFORM, 1, 0.3),
        (0.20871887257797417, 0.44571218454634653, 0.34556894287567935),
    ),
}


# --- every check ---


@pytest.fixture(scope="module")
def checks():
    return check_theory.all_checks()


# Topics 18 and 19 train; they are in test_train_on_games.py and test_word_game.py.
@pytest.mark.parametrize("topic", TOPICS.keys() - {18, 19})
def test_every_check_of_a_topic_holds(topic, checks):
    same = [one for one in checks if one["topic"] == topic]
    assert same
    assert [one for one in same if not one["holds"]] == []


# Numbers for comal3 that other code computed. Without them, somebody could make a wrong result
# pass by a change of the expected number.
REFERENCE_NUMBERS = {
    2: [0.2849, 0.00417, 0.7674, 0.01034, 0.7888, 0.00961],
    3: [0.0232, 0.28, 0.0199, 0.16, 0.0117, 0.30, 0.0088, 0.37, 0.00298, 0.27],
    4: [0.0588, 0.1888],
    6: [2e-4, 3e-4],
    9: [0.1888, 0.0376, 1.3e-5, 6e-5],
    10: [0.212, 0.047, 1.3e-4],
    11: [0.367, 0.217, 0.599, 0.6, 0.223],
    12: [2e-4, 0.0046],
    16: [0.5093, 0.5085, 0.5167, 0.5014, 0.636, 0.28, 0.589],
}


@pytest.mark.parametrize("topic", REFERENCE_NUMBERS)
def test_expected_numbers_equal_the_printed_ones(topic, checks):
    equalities = [one for one in checks if one["topic"] == topic and one["relation"] == "="]
    assert [one["expected"] for one in equalities] == REFERENCE_NUMBERS[topic]


def test_bounds_on_the_average_of_multiplicative_weights():
    """For T = 2000."""
    bounds = [round(g.mwu_bound(START, eta, 2000), 4) for eta in (0.05, 0.3, 1.0)]
    assert bounds == [0.0447, 0.0804, 0.2516]


def test_bounds_at_the_best_eta_of_each_horizon():
    horizons = (100, 400, 1600, 6400, 25600)
    best = [g.mwu_bound(START, g.mwu_step(START, T), T) for T in horizons]
    assert best == pytest.approx([0.179, 0.0897, 0.0449, 0.0224, 0.0112], abs=5e-4)
    assert best == pytest.approx([math.sqrt(2 * math.log(1 / 0.2) / T) for T in horizons])


def test_a_nan_value_on_one_game_fails_its_law(monkeypatch):
    values = iter([0.1, float("nan"), 0.2])
    monkeypatch.setattr(
        check_theory, "laws", lambda game: [Claim(1, "a law", next(values), "<=", "1")]
    )
    (check,) = check_theory.laws_on(dict.fromkeys("abc", RANDOM[0]))
    assert check["holds"] is False


def loop_gap(P, pi):
    n = len(pi)
    return 2 * (max(sum(P[i][j] * pi[j] for j in range(n)) for i in range(n)) - 0.5)


def loop_step(P, pi, exponents):
    """pi_i exp(exponents_i), normalised, without the logarithm of pi."""
    weight = [p * math.exp(e) for p, e in zip(pi, exponents)]
    return [w / sum(weight) for w in weight]


def wins(P, pi):
    """Probability of each action to beat pi."""
    return [sum(p * q for p, q in zip(row, pi)) for row in P]


def test_multiplicative_weights_by_plain_loops():
    """The gaps of the last policy and of the average policy."""
    P, pi = COMAL3.tolist(), START.tolist()
    total = [0.0] * 3
    for _ in range(2000):
        total = [a + b for a, b in zip(total, pi)]
        pi = loop_step(P, pi, [0.05 * w for w in wins(P, pi)])
    average = [a / 2000 for a in total]
    assert round(loop_gap(P, pi), 4) == 0.2849
    assert round(loop_gap(P, average), 5) == 0.00417


def test_optimism_by_plain_loops():
    P, pi = COMAL3.tolist(), START.tolist()
    before = wins(P, pi)
    for _ in range(4000):
        now = wins(P, pi)
        pi = loop_step(P, pi, [0.3 * (2 * a - b) for a, b in zip(now, before)])
        before = now
    assert loop_gap(P, pi) == pytest.approx(1.2857e-4, abs=1e-8)
    np.testing.assert_allclose(play(g.omwu(COMAL3, START, 0.3), 4000)[-1], pi, atol=1e-11)


def test_moving_magnet_by_plain_loops():
    """The gaps after 1, 10 and 50 magnets."""
    P, pi = COMAL3.tolist(), START.tolist()
    gaps = []
    for _ in range(50):
        magnet = pi
        for _ in range(50):
            now = wins(P, pi)
            weight = [
                (p * m ** (1.88 * 0.3) * math.exp(1.88 * w)) ** (1 / (1 + 1.88 * 0.3))
                for p, m, w in zip(pi, magnet, now)
            ]
            pi = [w / sum(weight) for w in weight]
        gaps.append(loop_gap(P, pi))
    assert (round(gaps[0], 4), round(gaps[9], 4), round(gaps[49], 6)) == (0.1888, 0.0376, 1.3e-5)
    magnets = play(g.mpo(COMAL3, START, 1.88, 0.3, 50), 2500)[50::50]
    np.testing.assert_allclose([duality_gap(COMAL3, one) for one in magnets], gaps, atol=1e-12)


# --- one step of every algorithm ---


@pytest.mark.parametrize("name", ONE_STEP)
def test_one_step_gives_the_reference_values(name):
    policies, expected = ONE_STEP[name]
    np.testing.assert_allclose(play(policies, 1)[1], expected, atol=1e-14)


def updates_by_products(game, ref, eta, tau):
    """Each update as normalised products of powers of probabilities.

    It uses no logarithms and no code of the package.
    """
    P, pi = game.P, game.start

    def normal(x):
        return x / x.sum()

    m = normal(pi ** (1 - tau / eta) * ref ** (tau / eta))
    b = pi ** (1 - tau / eta) * ref ** (tau / eta)
    return {
        "mwu": (g.mwu(P, pi, eta), normal(pi * np.exp(eta * (P @ pi)))),
        "omwu": (g.omwu(P, pi, eta), normal(pi * np.exp(eta * (P @ pi)))),
        "inpo": (
            g.inpo(P, pi, ref, eta, tau),
            normal(np.exp(P @ pi / eta) * ref ** (tau / eta) * pi ** (1 - tau / eta)),
        ),
        "nash_md": (g.nash_md(P, pi, ref, eta, tau), normal(m * np.exp(P @ m / eta))),
        "egpo": (
            g.egpo(P, pi, ref, 1 / eta, tau),
            normal(b * np.exp(P @ normal(b * np.exp(P @ pi / eta)) / eta)),
        ),
        "mmd": (
            g.mmd(P, pi, ref, eta, tau),
            normal((pi * ref ** (eta * tau) * np.exp(eta * (P @ pi))) ** (1 / (1 + eta * tau))),
        ),
        "mpo": (
            g.mpo(P, pi, eta, tau, 5),
            normal((pi ** (1 + eta * tau) * np.exp(eta * (P @ pi))) ** (1 / (1 + eta * tau))),
        ),
        "comal": (g.comal(P, pi, eta, tau), normal(np.exp(P @ pi / eta) * pi)),
        "ipo": (g.iterative_ipo(P, pi, eta), normal(pi * np.exp((P @ pi - 0.5) / eta))),
    }


@pytest.mark.parametrize("name", updates_by_products(GAMES[0], UNIFORM, 2.0, 0.3))
def test_step_equals_products_of_powers(name):
    for game in GAMES:
        ref = np.random.default_rng(5).dirichlet(np.ones(len(game.P)))
        policies, expected = updates_by_products(game, ref, 1.7, 0.4)[name]
        np.testing.assert_allclose(play(policies, 1)[1], expected, atol=1e-14)


def test_second_step_of_optimism_looks_back():
    for game in GAMES:
        pi = play(g.omwu(game.P, game.start, 0.8), 2)
        expected = pi[1] * np.exp(0.8 * game.P @ (2 * pi[1] - pi[0]))
        np.testing.assert_allclose(pi[2], expected / expected.sum(), atol=1e-14)


@pytest.mark.parametrize("every", [1, 3])
def test_magnet_and_reference_move_every_n_steps(every):
    """MPO restarts MMD, and COMAL restarts INPO, with the last policy as magnet or reference."""
    for moving, fixed in (
        (g.mpo(COMAL3, START, 1.0, 0.3, every), lambda pi: g.mmd(COMAL3, pi, pi, 1.0, 0.3)),
        (g.comal(COMAL3, START, 1.0, 0.3, every), lambda pi: g.inpo(COMAL3, pi, pi, 1.0, 0.3)),
    ):
        expected = [START]
        while len(expected) < 8:
            expected += list(play(fixed(expected[-1]), every)[1:])
        np.testing.assert_allclose(play(moving, 7), expected[:8], atol=1e-14)


def test_eta_may_be_a_function_of_t():
    pi = play(g.inpo(COMAL3, START, UNIFORM, lambda t: float(t + 1), 0.3), 2)
    with_eta_3 = play(g.inpo(COMAL3, pi[1], UNIFORM, 3.0, 0.3), 1)[1]
    np.testing.assert_allclose(pi[2], with_eta_3, atol=1e-15)


def all_algorithms(P, start):
    return {
        "mwu": g.mwu(P, start, 5.0),
        "l2": g.sppo_l2(P, start, 5.0),
        "omwu": g.omwu(P, start, 5.0),
        "inpo": g.inpo(P, start, start, 0.5, 0.1),
        "nash_md": g.nash_md(P, start, start, 0.5, 0.1),
        "egpo": g.egpo(P, start, start, 2.0, 0.1),
        "mmd": g.mmd(P, start, start, 5.0, 0.1),
        "mpo": g.mpo(P, start, 5.0, 0.1, 6),
        "comal": g.comal(P, start, 0.2, 0.1),
        "dpo": g.iterative_dpo(P, start, 1.0),
        "ipo": g.iterative_ipo(P, start, 0.2),
    }


@pytest.mark.parametrize("name", all_algorithms(COMAL3, START))
def test_policies_are_distributions_with_gaps_of_at_least_0(name):
    for game in GAMES:
        if name == "dpo" and not g.has_finite_rewards(game.P):
            continue
        pi = play(all_algorithms(game.P, game.start)[name], 300)
        assert pi.shape == (301, len(game.P))
        assert (pi >= 0).all()
        assert np.abs(pi.sum(axis=1) - 1).max() < 1e-12
        assert min(duality_gap(game.P, one) for one in pi) > -1e-12
        np.testing.assert_allclose(pi[0], game.start, atol=1e-15)


# --- fixed points ---


def test_every_algorithm_stays_at_the_equilibrium():
    star = g.nash(COMAL3)
    for name, policies in all_algorithms(COMAL3, star).items():
        if name != "dpo":
            expected = np.tile(star, (6, 1))
            np.testing.assert_allclose(play(policies, 5), expected, atol=1e-13, err_msg=name)


def test_mwu_stays_uniform_on_rock_paper_scissors():
    policies = play(g.mwu(g.GAMES["rps"].P, UNIFORM, 1.0), 5)
    np.testing.assert_allclose(policies, np.full((6, 3), 1 / 3), atol=1e-15)


def test_offline_dpo_never_moves_on_rock_paper_scissors():
    np.testing.assert_allclose(g.offline_dpo(g.GAMES["rps"].P, START, 0.01), START, atol=1e-12)


def test_iterative_dpo_equals_offline_dpo_in_each_step():
    for pi, after in itertools.pairwise(play(g.iterative_dpo(COMAL3, START, 1.0), 2)):
        np.testing.assert_allclose(after, g.offline_dpo(COMAL3, pi, 1.0, pi), atol=1e-14)


def test_every_algorithm_finds_the_best_action_of_bt3():
    game = g.GAMES["bt3"]
    for name, policies in all_algorithms(game.P, game.start).items():
        assert play(policies, 2000)[-1].argmax() == 0, name


# --- games, gaps, equilibria ---


@pytest.mark.parametrize("n", [2, 3, 10, 50])
def test_games_are_constant_sum(n):
    for game in (g.random_game(n, seed=n), *g.GAMES.values()):
        np.testing.assert_allclose(game.P + game.P.T, 1, atol=1e-15)
        assert (np.diag(game.P) == 0.5).all()
        assert game.P.min() >= 0
        assert game.start.sum() == pytest.approx(1, abs=1e-15)
        assert game.start.min() > 0
        assert len(game.actions) == len(game.P)


@pytest.mark.parametrize("n", [2, 3, 10, 50])
def test_random_games_depend_on_the_seed_only(n):
    assert not np.array_equal(g.random_game(n, 0).P, g.random_game(n, 1).P)
    np.testing.assert_array_equal(g.random_game(n, 1).P, g.random_game(n, 1).P)


def test_gap_by_enumeration():
    draw = np.random.default_rng(0)
    for game in GAMES:
        for pi in draw.dirichlet(np.ones(len(game.P)), size=20):
            most = max(wins(game.P.tolist(), pi))
            least = min(wins(game.P.T.tolist(), pi))
            assert duality_gap(game.P, pi) == pytest.approx(most - least, abs=1e-14)
            assert duality_gap(game.P, pi) >= -1e-15
    assert duality_gap(COMAL3, START) == pytest.approx(0.28, abs=1e-15)


def test_equilibrium_of_a_cycle_has_a_closed_form():
    """pi* is proportional to (|A_bc|, |A_ac|, |A_ab|), where A = P - 1/2."""
    np.testing.assert_allclose(g.nash(COMAL3), [4 / 11, 3 / 11, 4 / 11], atol=1e-12)
    draw = np.random.default_rng(1)
    for ab, bc, ca in draw.uniform(0.51, 1, size=(50, 3)):
        P = np.array([[0.5, ab, 1 - ca], [1 - ab, 0.5, bc], [ca, 1 - bc, 0.5]])
        expected = np.array([bc, ca, ab]) - 0.5
        np.testing.assert_allclose(g.nash(P), expected / expected.sum(), atol=1e-9)


@pytest.mark.parametrize("n", [2, 5, 30, 100])
def test_equilibrium_of_any_game_has_gap_zero(n):
    for seed in range(3):
        game = g.random_game(n, seed)
        star = g.nash(game.P)
        assert abs(duality_gap(game.P, star)) < 1e-9
        assert star.min() >= 0
        assert star.sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("ref", "tau", "expected"),
    [
        (START, 0.1, (0.2749172052514869, 0.2797225767864398, 0.44536021796207337)),
        (START, 0.3, (0.19225058981618767, 0.3801564412866035, 0.4275929688972088)),
        (UNIFORM, 0.1, (0.33713585006567026, 0.28346410909888264, 0.379400040835447)),
        (UNIFORM, 0.3, (0.31858630742193494, 0.3126310745773747, 0.3687826180006904)),
    ],
)
def test_regularised_equilibrium(ref, tau, expected):
    """Compared with reference values, the fixed-point equation and magnetic mirror descent.

    Magnetic mirror descent uses the step size of its convergence guarantee.
    """
    pi = g.regularised_nash(COMAL3, ref, tau)
    np.testing.assert_allclose(pi, expected, atol=1e-12)
    response = ref * np.exp(COMAL3 @ pi / tau)
    np.testing.assert_allclose(pi, response / response.sum(), atol=1e-13)
    last = play(g.mmd(COMAL3, START, ref, 4 * tau, tau), 2000)[-1]
    np.testing.assert_allclose(pi, last, atol=1e-13)


@pytest.mark.parametrize("tau", [0.005, 0.1, 2.0])
def test_regularised_equilibrium_of_any_game(tau):
    for game in GAMES:
        pi = g.regularised_nash(game.P, game.start, tau)
        assert abs(g.regularised_gap(game.P, pi, game.start, tau)) < 1e-12
        assert (pi > 0).all()


def test_regularised_gap_by_numerical_best_response():
    draw = np.random.default_rng(2)
    for game in RANDOM:
        ref, pi = draw.dirichlet(np.ones(len(game.P)), size=2)
        tau = 0.2

        def payoff(a, b):
            kl_a, kl_b = (sum(x * math.log(x / y) for x, y in zip(one, ref)) for one in (a, b))
            return a @ game.P @ b - tau * kl_a + tau * kl_b

        def value(logits):
            other = np.exp(logits - logits.max())
            return -payoff(other / other.sum(), pi)

        best = -minimize(value, np.zeros(len(ref)), method="BFGS", options={"gtol": 1e-9}).fun
        # The game is symmetric, so the other player's best response gains as much.
        assert g.regularised_gap(game.P, pi, ref, tau) == pytest.approx(2 * (best - 0.5), abs=1e-9)


def test_kl_divergence():
    p, q = np.array([0.5, 0.5, 0.0]), np.array([0.25, 0.5, 0.25])
    assert kl(p, q) == pytest.approx(0.5 * math.log(2), abs=1e-15)
    assert kl(p, p) == 0


def test_kl_divergence_of_close_policies_is_accurate():
    close = START + 1e-9 * np.array([1, -2, 1])
    assert kl(close, START) == pytest.approx(0.5e-18 * (1 / 0.2 + 4 / 0.5 + 1 / 0.3), rel=1e-6)


# --- fits ---


@pytest.mark.parametrize("eta", [0.3, 1.0, 4.0])
def test_least_squares_over_policies_by_a_general_solver(eta):
    for game in GAMES:
        pi = game.start
        c = eta * (game.P @ pi - 0.5)
        found = minimize(
            lambda u: pi @ (u - c) ** 2,
            c,
            jac=lambda u: 2 * pi * (u - c),
            method="SLSQP",
            options={"ftol": 1e-15, "maxiter": 500},
            constraints={
                "type": "eq",
                "fun": lambda u: pi @ np.exp(u) - 1,
                "jac": lambda u: pi * np.exp(u),
            },
        )
        u = g.l2_log_ratio(pi, c)
        np.testing.assert_allclose(u, found.x, atol=2e-6)
        step = play(g.sppo_l2(game.P, pi, eta), 1)[1]
        np.testing.assert_allclose(step, pi * np.exp(u), atol=1e-14)


def test_least_squares_is_no_worse_than_any_policy():
    draw = np.random.default_rng(3)
    for eta in (1.0, 30.0, 1000.0):
        c = eta * (COMAL3 @ START - 0.5)
        u = g.l2_log_ratio(START, c)
        others = [np.log(draw.dirichlet(np.ones(3)) / START) for _ in range(300)]
        others.append(np.log(play(g.mwu(COMAL3, START, eta), 1)[1] / START))
        assert START @ np.exp(u) == pytest.approx(1, abs=1e-12)
        assert START @ (u - c) ** 2 <= min(START @ (other - c) ** 2 for other in others) + 1e-12


def test_maximum_likelihood_rewards_by_a_general_solver():
    draw = np.random.default_rng(4)
    for game in GAMES:
        n = len(game.P)
        if not g.has_finite_rewards(game.P):
            continue
        for w in (np.full(n, 1 / n), draw.dirichlet(np.ones(n))):

            def cost(r):
                return sum(
                    w[i] * w[j] * game.P[i, j] * math.log1p(math.exp(r[j] - r[i]))
                    for i in range(n)
                    for j in range(n)
                )

            found = minimize(cost, np.zeros(n), method="BFGS", options={"gtol": 1e-9}).x
            np.testing.assert_allclose(g.bt_rewards(game.P, w), found - found.mean(), atol=1e-4)
            win = g.bradley_terry(g.bt_rewards(game.P, w))
            # At the maximum, each action wins as often as the preferences say.
            weights = w[:, None] * w
            np.testing.assert_allclose(
                weights * win @ np.ones(n), weights * game.P @ np.ones(n), atol=1e-14
            )


def test_rewards_of_two_games():
    assert g.bt_rewards(g.GAMES["transitive_nonBT"].P) == pytest.approx(
        [0.756307612615893, 0, -0.756307612615893], abs=1e-12
    )


def test_weights_do_not_matter_in_a_bradley_terry_game():
    for w in (UNIFORM, START, np.array([0.98, 0.01, 0.01])):
        assert g.bt_rewards(g.GAMES["bt3"].P, w) == pytest.approx([1, 0, -1], abs=1e-10)


def test_infinite_rewards_are_refused():
    P = np.array([[0.5, 1, 1], [0, 0.5, 0.7], [0, 0.3, 0.5]])
    assert g.has_finite_rewards(g.GAMES["rps"].P)
    assert not g.has_finite_rewards(P)
    with pytest.raises(ValueError, match="infinite"):
        g.bt_rewards(P)


def test_mwu_minimises_dnos_soft_label_loss():
    """DNO's population target (2404.03715) is the step of MWU with the inverse of DNO's eta."""
    eta, r = 0.7, COMAL3 @ START

    def loss(logits):
        ratio = eta * (logits - np.log(START))
        total = 0.0
        for i, j in itertools.product(range(3), repeat=2):
            label = 1 / (1 + math.exp(r[j] - r[i]))
            total += START[i] * START[j] * label * math.log1p(math.exp(ratio[j] - ratio[i]))
        return total

    found = np.exp(minimize(loss, np.log(START), method="BFGS", options={"gtol": 1e-10}).x)
    step = play(g.mwu(COMAL3, START, 1 / eta), 1)[1]
    np.testing.assert_allclose(step, found / found.sum(), atol=1e-5)


@pytest.mark.parametrize("on_policy", [False, True])
def test_contrastive_gradient_by_finite_differences(on_policy):
    n = 5
    game = g.random_game(n, seed=6)
    pi = game.start
    ref = np.full(n, 1 / n)
    if on_policy:
        weight = np.outer(pi, pi)
        target = (game.P - 0.5) / 0.1
    else:
        weight = np.full((n, n), 1 / n**2)
        target = np.subtract.outer(game.P @ pi, game.P @ pi) / 0.1

    def loss(logits):
        d = logits - np.log(np.exp(logits).sum()) - np.log(ref)
        return sum(
            weight[i, j] * (d[i] - d[j] - target[i, j]) ** 2 for i in range(n) for j in range(n)
        )

    steps = 1e-5 * np.eye(n)
    expected = [(loss(np.log(pi) + step) - loss(np.log(pi) - step)) / 2e-5 for step in steps]
    exact = g.online_ipo_gradient(game.P, pi, ref, 0.1, on_policy)
    np.testing.assert_allclose(exact, expected, atol=1e-8)
    rows = g.sampled_ipo_gradient(game.P, pi, ref, 0.1, on_policy, 20_000, np.random.default_rng(0))
    standard_error = rows.std(axis=0) / np.sqrt(len(rows))
    assert (np.abs(rows.mean(axis=0) - exact) < 4 * standard_error).all()


# --- a user's game ---


def test_game_from_csv():
    plain = g.parse_game("0.5,0.9\n0.1,0.5\n", "x.csv")
    named = g.parse_game(",first,second\nfirst, 0.5, 0.9\nsecond, 0.1, 0.5\n\n", "x.csv")
    headed = g.parse_game("first,second\n0.5,0.9\n0.1,0.5\n", "x.csv")
    for game in (plain, named, headed):
        np.testing.assert_allclose(game.P, [[0.5, 0.9], [0.1, 0.5]], atol=1e-15)
    assert plain.actions == ("a", "b")
    assert named.actions == headed.actions == ("first", "second")


BAD_CSV = {
    "too wide": (
        ".5,.5\n.5,.5,.2\n",
        "x.csv is not square: 2 lines, but line 2 of them has 3 numbers",
    ),
    "too few lines": (".5,.5,.5\n.5,.5,.5\n", "x.csv is not square"),
    "more names": (",a,b,c\na,.5,.5\nb,.5,.5\n", "x.csv has 3 names over 2 columns of numbers"),
    "not constant-sum": (
        ".5,.6\n.5,.5\n",
        r"x.csv: P \+ P\^T is not 1: row 1, column 2 is 0.6 and its mirror 0.5",
    ),
    "diagonal": (".4,.6\n.4,.5\n", r"x.csv: P \+ P\^T is not 1: row 1, column 1"),
    "per cent": (
        "50,60\n40,50\n",
        r"x.csv: '50' in row 1, column 1 is not in \[0, 1\]; give probabilities, not per cent",
    ),
    "negative": (".5,-.1\n1.1,.5\n", r"x.csv: '-.1' in row 1, column 2 is not in \[0, 1\]"),
    "a word": (".5,x\n.5,.5\n", "x.csv: 'x' in row 1, column 2 is not a number"),
    "nan": (".5,nan\nnan,.5\n", "x.csv: 'nan' in row 1, column 2 is not a number"),
    "empty": ("", "x.csv holds 0 lines of numbers"),
    "one action": ("a\n.5\n", "x.csv holds 1 lines of numbers"),
}


@pytest.mark.parametrize(("text", "said"), BAD_CSV.values(), ids=BAD_CSV)
def test_a_bad_csv_is_a_one_line_error(text, said):
    with pytest.raises(UserError, match=said) as caught:
        g.parse_game(text, "x.csv")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_an_unreadable_file_is_a_one_line_error(content, program, tmp_path):
    if content:
        (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(UserError, match="x.csv (cannot be read|is missing)"):
        program(check_theory, "--game", tmp_path / "x.csv", "--output", tmp_path / "checks.json")
    assert not (tmp_path / "checks.json").exists()


def save_empty_files(figure, files):
    """Instead of plot_theory.save, because drawing takes long."""
    pyplot.close(figure)
    for file in files:
        file.touch()


# In a total order, rewards are infinite and policies reach a corner of the simplex.
TOTAL_ORDER = "\ufeffa,b,c\n.5,1,1\n0,.5,1\n0,0,.5\n"
SIX_ACTIONS = "\n".join(",".join(map(str, row)) for row in g.random_game(6, seed=8).P)


@pytest.mark.parametrize(
    ("text", "three_actions"),
    [(TOTAL_ORDER, True), (SIX_ACTIONS, False)],
    ids=["total order of three", "random game of six"],
)
def test_both_programs_work_on_a_user_s_game(text, three_actions, program, tmp_path, monkeypatch):
    """A game of three actions also has a figure of the simplex. Only its figures are drawn."""
    monkeypatch.setattr(plot_theory, "STEPS", 1500)
    monkeypatch.setattr(claims, "HORIZONS", (100, 400))
    names = {"gap_by_iteration", "gap_by_horizon", "regularised_gap", "self_improvement"}
    if three_actions:
        names.add("simplex")
    else:
        monkeypatch.setattr(plot_theory, "save", save_empty_files)
    (tmp_path / "mine.csv").write_text(text, encoding="utf-8")
    game = ("--game", tmp_path / "mine.csv")
    out = tmp_path / "out"
    program(check_theory, *game, "--output", out / "checks.json")
    program(plot_theory, *game, "--checks", out / "checks.json", "--output", out / "README.md")
    checks = json.loads((out / "checks.json").read_text())
    assert len(checks) > 25
    assert all(one["holds"] and one["games"] == "mine" for one in checks)
    figures = {f"{name}.{form}" for name in names for form in ("csv", "png", "svg")}
    artifacts = {"README.md", "checks.json"} | figures
    written = {path.name for path in out.iterdir()}
    assert written == artifacts | {f"{name}.record.json" for name in artifacts}
    page = (out / "README.md").read_text()
    assert f"{len(checks)} of {len(checks)} checks hold" in page
    assert all(f"({name}.png)" in page for name in names)
    assert "nan" not in page


def test_every_claim_says_what_its_value_is(checks):
    """A `|` or a backtick would break the claim's cell in the table of the page."""
    for one in checks:
        assert one["claim"].count("Value: ") == 1, one["claim"]
        assert not set("|`") & set(one["claim"]), one["claim"]


def test_page_and_tables_of_the_embedded_game(checks, program, tmp_path, monkeypatch):
    monkeypatch.setattr(plot_theory, "STEPS", 100)
    monkeypatch.setattr(plot_theory, "save", save_empty_files)
    monkeypatch.setattr(claims, "HORIZONS", (100, 400))
    monkeypatch.setattr(check_theory, "all_checks", lambda: checks)
    program(check_theory, "--output", tmp_path / "checks.json")
    program(plot_theory, "--checks", tmp_path / "checks.json", "--output", tmp_path / "README.md")
    page = (tmp_path / "README.md").read_text()
    assert "a 0.3636, b 0.2727, c 0.3636" in page
    assert page.count("| yes |") == len(checks)
    assert "bt_control" in page
    with (tmp_path / "gap_by_iteration.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 101
    assert float(rows[0]["SPPO"]) == pytest.approx(0.28)
    expected = duality_gap(COMAL3, play(g.mwu(COMAL3, START, 1.0), 100).mean(axis=0))
    assert float(rows[100]["SPPO, average"]) == pytest.approx(expected, abs=1e-12)
