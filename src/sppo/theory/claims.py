"""What the theory claims about these methods, as numbers that can be checked on a game.

The first part holds the laws: identities, fixed points and bounds that are true for every game.
Each law compares a computed value with an expected one (`Claim`). For an identity, the value is an
error, which must not exceed what rounding allows. For a bound, the value is the ratio of both
sides, which must not exceed 1. KL(p, q) = E_p log p/q.

The second part computes the series that the figures of src/theory/plot_theory.py show.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sppo.theory.games import (
    Array,
    Game,
    comal,
    duality_gap,
    egpo,
    has_finite_rewards,
    inpo,
    iterative_dpo,
    kl,
    l2_log_ratio,
    mmd,
    mpo,
    mwu,
    mwu_bound,
    mwu_step,
    nash,
    nash_md,
    omwu,
    play,
    regularised_gap,
    regularised_nash,
    sppo_l2,
)

ETAS = (0.05, 0.3, 1.0)
TAUS = (0.1, 0.3)
HORIZONS = (100, 400, 1600, 6400, 25600)
TOPICS = {
    1: "SPPO (MWU) and its distance from the equilibrium",
    2: "last iterate and average",
    3: "the average's 1/sqrt(T), theorem 4.1",
    4: "the regularised equilibrium",
    5: "INPO",
    6: "Nash-MD",
    7: "EGPO",
    8: "MMD",
    9: "MPO: a magnet that moves",
    10: "optimism (OMWU)",
    11: "rewards cannot express cycles: Bradley-Terry and DPO",
    12: "SPPO's least squares and MWU",
    13: "from logits to P and P-hat",
    14: "which methods settle",
    15: "learning from samples: online IPO",
    16: "beating one's predecessor certifies nothing",
    17: "methods that are one another",
    18: "the real trainer beside the exact update",
    19: "the real trainer on a pretrained language model",
}


class Claim(NamedTuple):
    """A computed value and what the theory expects of it."""

    number: int  # a key of TOPICS
    text: str
    value: float
    relation: str  # one of "=", "<=", ">="
    expected: str  # as printed: with "=", its last digit sets the tolerance


def check(claim: Claim, game_names: str) -> dict[str, Any]:
    """The entry of checks.json for a claim that was evaluated on these games.

    With the relation `=`, the value must equal `expected` to its last digit: the tolerance is half
    a unit of that digit.
    """
    value, target = claim.value, float(claim.expected)
    tolerance = 0.0
    if claim.relation == "=":
        last_digit = 10.0 ** int(Decimal(claim.expected).as_tuple().exponent)
        tolerance = last_digit / 2
        holds = abs(value - target) <= tolerance
    elif claim.relation == "<=":
        holds = value <= target
    elif claim.relation == ">=":
        holds = value >= target
    else:
        raise ValueError(f"relation is {claim.relation!r}, not =, <= or >=")
    return {
        "number": claim.number,
        "claim": claim.text,
        "games": game_names,
        "value": float(value),
        "relation": claim.relation,
        "expected": target,
        "tolerance": tolerance,
        "holds": bool(holds),
    }


def report_checks(checks: list[dict[str, Any]], path: Path) -> None:
    """Print each check that does not hold, and how many of them hold."""
    for entry in checks:
        if not entry["holds"]:
            print(
                f"does not hold: {entry['number']}. {entry['claim']}: {entry['value']:.6g}, "
                f"not {entry['relation']} {entry['expected']:.6g}"
            )
    print(f"{sum(entry['holds'] for entry in checks)} of {len(checks)} checks hold: {path}")


def divergences(star: Array, policies: Array) -> Array:
    """KL(star, pi) of each policy; policies (T, n), result (T,)."""
    return np.array([kl(star, pi) for pi in policies])


# --- laws that hold for every game ---


def laws(game: Game) -> Iterator[Claim]:
    """All laws, evaluated on this game. A law that says nothing about this game is left out."""
    P, start = game.P, game.start
    yield from divergence_laws(P, start)
    yield from average_laws(P, start)
    for tau in TAUS:
        yield from regularised_laws(P, start, tau)
    yield from least_squares_laws(P, start)
    yield from improvement_laws(P, start)
    yield from equivalence_laws(P, start)


def divergence_laws(P: Array, start: Array) -> Iterator[Claim]:
    """How multiplicative weights (eta = 1) change the divergence from the equilibrium."""
    star = nash(P)
    pi = play(mwu(P, start, 1.0), 300)
    wins = pi @ P.T
    log_z = np.log((pi * np.exp(wins - 0.5)).sum(axis=1))
    growth = np.diff(divergences(star, pi))
    yield Claim(
        1,
        "MWU: KL(pi*, pi_t) grows by log E exp(eta (P pi_t - 1/2)) "
        "- eta (P(pi* beats pi_t) - 1/2): error",
        np.abs(growth - (log_z - wins @ star + 0.5)[:-1]).max(),
        "<=",
        "1e-12",
    )
    if star.min() > 1e-9:
        yield Claim(
            1,
            "MWU: KL(pi*, pi_t) never falls if pi* has full support: largest fall",
            -growth.min(),
            "<=",
            "1e-10",
        )


def average_laws(P: Array, start: Array) -> Iterator[Claim]:
    """Bounds on the average policy of multiplicative weights: theorem 4.1 and Freund-Schapire."""
    gap_over_bound = "gap of the average over its bound 2 (ln(1/min pi_1)/(eta T) + eta/8)"
    T = 2000
    for eta in ETAS:
        mean_policy = play(mwu(P, start, eta), T - 1).mean(axis=0)
        yield Claim(
            2,
            f"MWU, eta {eta}, T {T}: {gap_over_bound}",
            duality_gap(P, mean_policy) / mwu_bound(start, eta, T),
            "<=",
            "1",
        )
        # The worst mu is a pure strategy, for which KL(mu, pi_1) = -log pi_1(mu).
        shrink = 1 - np.exp(-eta)
        yield Claim(
            3,
            f"Freund-Schapire, eta {eta}, T {T}: "
            "1/2 - (eta P(average beats mu) + KL(mu, pi_1)/T) / (1-e^-eta), worst mu",
            (0.5 - eta / shrink * (mean_policy @ P) + np.log(start) / (shrink * T)).max(),
            "<=",
            "0",
        )
    for T in HORIZONS:
        eta = mwu_step(start, T)
        mean_policy = play(mwu(P, start, eta), T - 1).mean(axis=0)
        yield Claim(
            3,
            f"MWU, eta = sqrt(8 ln(1/min pi_1)/T), T {T}: {gap_over_bound}",
            duality_gap(P, mean_policy) / mwu_bound(start, eta, T),
            "<=",
            "1",
        )


def least_squares_laws(P: Array, start: Array) -> Iterator[Claim]:
    """SPPO's least squares, eq. (4.6), solved over policies, and its distance from eq. (4.1)."""
    target = P @ start - 0.5
    log_ratio = l2_log_ratio(start, target)
    ratio = np.exp(log_ratio)
    sum_error = abs(float(start @ ratio) - 1)
    multiplier_spread = float(np.ptp((target - log_ratio) / ratio))
    yield Claim(
        12,
        "SPPO's least squares, eta 1: the policy sums to 1, "
        "(target - log-ratio)/ratio is the same for all actions: error",
        max(sum_error, multiplier_spread),
        "<=",
        "1e-12",
    )
    distance = l2_distance_to_mwu(P, start, 1.0)
    distance_near_half = l2_distance_to_mwu(0.45 + 0.1 * P, start, 1.0)
    yield Claim(
        12,
        "SPPO's least squares: distance to MWU once P is ten times closer to 1/2, over what it was",
        distance_near_half / max(distance, 1e-12),
        "<=",
        "0.01",
    )


def l2_distance_to_mwu(P: Array, start: Array, eta: float) -> Any:
    """Largest difference of a probability between one step of `sppo_l2` and one of `mwu`."""
    return np.abs(play(sppo_l2(P, start, eta), 1)[1] - play(mwu(P, start, eta), 1)[1]).max()


def improvement_laws(P: Array, start: Array) -> Iterator[Claim]:
    """By how much each policy of multiplicative weights (eta = 1) beats the policy before it."""
    pi = play(mwu(P, start, 1.0), 300)
    wins = pi @ P.T
    advantage = (pi[1:] * wins[:-1]).sum(axis=1) - 0.5
    symmetric_kl = np.array([kl(old, new) + kl(new, old) for old, new in zip(pi, pi[1:])])
    yield Claim(
        16,
        "MWU: P(pi_{t+1} beats pi_t) = 1/2 + (KL + reversed KL)/eta: error",
        np.abs(advantage - symmetric_kl).max(),
        "<=",
        "1e-12",
    )
    yield Claim(
        16,
        "MWU: every policy beats its predecessor: 1/2 - P(pi_{t+1} beats pi_t), largest",
        -advantage.min(),
        "<=",
        "1e-12",
    )


def equivalence_laws(P: Array, start: Array) -> Iterator[Claim]:
    """Methods that have different names and the same update."""
    n, beta = len(P), 0.5
    # IPO's loss is a weighted sum of squares over all ordered pairs of actions.
    first, second = np.indices((n, n)).reshape(2, -1)
    root_weight = np.sqrt(start[first] * start[second])
    difference = np.eye(n)[first] - np.eye(n)[second]
    target = (P[first, second] - 0.5) / beta
    solution = np.linalg.lstsq(root_weight[:, None] * difference, root_weight * target, rcond=None)
    ratio = np.exp(solution[0])
    ipo_step = start * ratio / (start @ ratio)
    yield Claim(
        17,
        "IPO on all on-policy pairs, solved as least squares, is MWU with eta = 1/beta = 2: error",
        np.abs(ipo_step - play(mwu(P, start, 2.0), 1)[1]).max(),
        "<=",
        "1e-12",
    )
    eta, alpha = 0.7, 0.3
    by_inpo = play(inpo(P, start, start, (1 + eta * alpha) / eta, alpha), 100)
    by_mmd = play(mmd(P, start, start, eta, alpha), 100)
    yield Claim(
        17,
        "INPO(eta_I = (1 + eta alpha)/eta, tau = alpha) is MMD(eta, alpha), 100 steps: error",
        np.abs(by_inpo - by_mmd).max(),
        "<=",
        "1e-12",
    )


def regularised_laws(P: Array, start: Array, tau: float) -> Iterator[Claim]:
    """Laws of the methods that are regularised towards a reference policy, here the start.

    pi*_tau is the equilibrium of the game that has the same regularisation.
    """
    star = regularised_nash(P, start, tau)
    yield Claim(
        4,
        f"tau {tau}: regularised gap at pi*_tau, with either sign",
        abs(regularised_gap(P, star, start, tau)),
        "<=",
        "1e-12",
    )
    for number, name, policies in (
        (5, "INPO", inpo(P, star, start, 2, tau)),
        (7, "EGPO", egpo(P, star, start, 0.5, tau)),
        (8, "MMD", mmd(P, star, start, 4 * tau, tau)),
    ):
        yield Claim(
            number,
            f"{name}, tau {tau}: pi*_tau is the fixed point; a step moves it by",
            np.abs(play(policies, 1)[1] - star).max(),
            "<=",
            "1e-12",
        )
    yield from decreasing_step_laws(P, start, tau, star)
    yield from constant_step_laws(P, start, tau, star)


def decreasing_step_laws(P: Array, start: Array, tau: float, star: Array) -> Iterator[Claim]:
    """Bounds of INPO and Nash-MD with eta_t = tau (t+2)/2, an inverse step size."""
    T = np.arange(1, 1001)
    for number, name, method, factor in ((5, "INPO", inpo, 32), (6, "Nash-MD", nash_md, 8)):
        pi = play(method(P, start, start, lambda t: tau * (t + 2) / 2, tau), 1000)
        C = inpo_constant(pi, start, tau) if name == "INPO" else 1.0
        yield Claim(
            number,
            f"{name}, tau {tau}, eta_t = tau (t+2)/2: "
            f"KL(pi*_tau, pi) over its bound {factor} C^2/(tau^2 (T+1)), every T",
            (divergences(star, pi[1:]) * tau**2 * (T + 1) / (factor * C**2)).max(),
            "<=",
            "1",
        )


def constant_step_laws(P: Array, start: Array, tau: float, star: Array) -> Iterator[Claim]:
    """Bounds of INPO and MMD with a constant step size."""
    eta = 2
    pi = play(inpo(P, start, start, eta, tau), 400)
    C = inpo_constant(pi, start, tau)
    path = divergences(star, pi)
    yield Claim(
        5,
        f"INPO, tau {tau}, eta {eta}: KL_(t+1) over (1 - tau/eta) KL_t + 8 C^2/eta^2",
        (path[1:] / ((1 - tau / eta) * path[:-1] + 8 * C**2 / eta**2)).max(),
        "<=",
        "1",
    )
    # L = 1/2, so eta = alpha/L^2 = 4 tau and 1 + eta alpha = 1 + 4 tau^2.
    path = divergences(star, play(mmd(P, start, start, 4 * tau, tau), 1000))
    bound = np.maximum(path[0] * (1 + 4 * tau**2) ** -np.arange(1001.0), 1e-25)
    yield Claim(
        8,
        f"MMD, alpha {tau}, eta = alpha/L^2: KL_k over KL_0 (1 + eta alpha)^-k, every k > 0",
        (path / bound)[1:].max(),
        "<=",
        "1",
    )


def inpo_constant(policies: Array, ref: Array, tau: float) -> float:
    """C of INPO's bounds: the largest tau |log pi/ref| of these policies, but at least 1."""
    return max(np.abs(np.log(policies / ref)).max() * tau, 1.0)


# --- series for the figures ---

Series = dict[str, Array]


def average(policies: Array) -> Array:
    """Row t is the mean of the first t policies; the result has the shape of `policies`, (T, n)."""
    return np.cumsum(policies, axis=0) / np.arange(1, len(policies) + 1)[:, None]


def gaps(game: Game, policies: Iterable[Array]) -> Array:
    """Duality gap of each policy, (T,). Smaller values than 1e-16 are rounding and become 1e-16."""
    return np.maximum([duality_gap(game.P, pi) for pi in policies], 1e-16)


def without_reference(game: Game, T: int, eta: float = 1.0) -> Series:
    """pi_1 to pi_{T+1} of each method whose only reference is the current policy, (T + 1, n).

    DPO is left out if its rewards are infinite.
    """
    P, start = game.P, game.start
    sppo = play(mwu(P, start, eta), T)
    series = {
        "SPPO": sppo,
        "SPPO, average": average(sppo),
        "SPPO, least squares": play(sppo_l2(P, start, eta), T),
        "OMWU": play(omwu(P, start, 0.3), T),
    }
    if has_finite_rewards(P):
        series["iterative DPO"] = play(iterative_dpo(P, start, 5.0), T)
    return series


def with_reference(game: Game, T: int) -> Series:
    """pi_1 to pi_{T+1} of each method with a reference policy or magnet, (T + 1, n).

    The reference is the start; MPO and COMAL move it later. tau = alpha = 0.3.
    """
    P, start = game.P, game.start
    methods = {
        "INPO": inpo(P, start, start, 2.0, 0.3),
        "Nash-MD": nash_md(P, start, start, 2.0, 0.3),
        "EGPO": egpo(P, start, start, 0.5, 0.3),
        "MMD": mmd(P, start, start, 1.2, 0.3),
        "MPO": mpo(P, start, 1.2, 0.3, every=50),
        "COMAL": comal(P, start, 1.0, 0.3, every=6),
    }
    return {name: play(policies, T) for name, policies in methods.items()}


def by_horizon(game: Game) -> Series:
    """Gap of the average and of the last policy for runs of several lengths T, and the bound.

    Each run uses the step size `mwu_step` for its T.
    """
    horizons = np.geomspace(HORIZONS[0], HORIZONS[-1], 17).round().astype(int)
    horizons = np.unique(horizons)
    means, lasts, bounds = [], [], []
    for T in horizons:
        eta = mwu_step(game.start, T)
        pi = play(mwu(game.P, game.start, eta), T)
        means.append(pi[:-1].mean(axis=0))
        lasts.append(pi[-1])
        bounds.append(mwu_bound(game.start, eta, T))
    return {
        "T": horizons,
        "average": gaps(game, means),
        "last": gaps(game, lasts),
        "bound": np.array(bounds),
    }


def regularised_gaps(game: Game, T: int, tau: float) -> Series:
    """Regularised gap of pi_1 to pi_{T+1} of each method, (T + 1,); eta_t is tau (t+2)/2."""
    P, start = game.P, game.start

    def eta_t(t: int) -> float:
        return tau * (t + 2) / 2

    methods = {
        "INPO": inpo(P, start, start, 2.0, tau),
        "INPO, eta_t": inpo(P, start, start, eta_t, tau),
        "Nash-MD": nash_md(P, start, start, 2.0, tau),
        "Nash-MD, eta_t": nash_md(P, start, start, eta_t, tau),
        "EGPO": egpo(P, start, start, 0.5, tau),
        "MMD": mmd(P, start, start, 4 * tau, tau),
    }
    series = {}
    for name, policies in methods.items():
        values = [regularised_gap(P, pi, start, tau) for pi in play(policies, T)]
        series[name] = np.maximum(values, 1e-16)
    return series


def self_improvement(game: Game, T: int) -> Series:
    """What each policy of SPPO (eta = 1) wins, by t = 1, ..., T; each column (T,).

    beats_predecessor: P(pi_{t+1} beats pi_t). identity: the same by the identity of topic 16.
    beats_first: P(pi_{t+1} beats pi_1). gap: the duality gap of pi_{t+1}.
    """
    pi = play(mwu(game.P, game.start, 1.0), T)
    identity = [0.5 + kl(old, new) + kl(new, old) for old, new in zip(pi, pi[1:])]
    return {
        "t": np.arange(1, T + 1),
        "beats_predecessor": (pi[1:] * (pi[:-1] @ game.P.T)).sum(axis=1),
        "identity": np.array(identity),
        "beats_first": pi[1:] @ game.P @ pi[0],
        "gap": gaps(game, pi[1:]),
    }
