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
    nash_mp,
    omwu,
    onpo,
    play,
    regularised_gap,
    regularised_nash,
    sppo_l2,
)

ETAS = (0.05, 0.3, 1.0)
TAUS = (0.1, 0.3)
HORIZONS = (100, 400, 1600, 6400, 25600)
TOPICS = {
    1: "SPPO (MWU): how its divergence from the equilibrium changes",
    2: "SPPO (MWU): the last policy and the average policy",
    3: "Theorem 4.1: the gap of the average policy falls as 1/sqrt(T)",
    4: "The regularised equilibrium",
    5: "INPO",
    6: "Nash-MD",
    7: "EGPO",
    8: "MMD",
    9: "MPO: MMD with a moving magnet",
    10: "OMWU: optimistic MWU",
    11: "Bradley-Terry rewards and DPO cannot represent cycles",
    12: "SPPO's least squares, compared with MWU",
    13: "From logits to P and P-hat",
    14: "Which methods converge to the equilibrium",
    15: "Online IPO: learning from samples",
    16: "A win against the previous policy does not prove convergence",
    17: "Methods with different names and the same update",
    18: "The real trainer, compared with the exact update",
    19: "The real trainer on a pretrained language model",
    20: "ONPO: two steps on the same responses",
    21: "Nash-MP",
}


class Claim(NamedTuple):
    """A computed value and what the theory expects of it."""

    topic: int  # a key of TOPICS
    text: str  # unique within one game; it ends with "Value: ", which says what `value` is
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
        "topic": claim.topic,
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
                f"does not hold: topic {entry['topic']}: {entry['claim']}: "
                f"{entry['value']:.6g}, expected {entry['relation']} {entry['expected']:.6g}"
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
    yield from onpo_laws(P, start)
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
        "MWU, eta 1: KL(pi*, pi_(t+1)) - KL(pi*, pi_t) equals "
        "log E exp(eta (P pi_t - 1/2)) - eta (P(pi* beats pi_t) - 1/2). "
        "Value: largest error of 300 steps",
        np.abs(growth - (log_z - wins @ star + 0.5)[:-1]).max(),
        "<=",
        "1e-12",
    )
    if star.min() > 1e-9:
        yield Claim(
            1,
            "MWU, eta 1: KL(pi*, pi_t) never decreases if pi* has full support. "
            "Value: largest decrease in 300 steps",
            -growth.min(),
            "<=",
            "1e-10",
        )


def average_laws(P: Array, start: Array) -> Iterator[Claim]:
    """Bounds on the average policy of multiplicative weights: theorem 4.1 and Freund-Schapire."""
    bound = "2 (ln(1/min pi_1)/(eta T) + eta/8)"
    below_bound = f"the gap of the average of T policies is at most {bound}. Value: gap/bound"
    T = 2000
    for eta in ETAS:
        mean_policy = play(mwu(P, start, eta), T - 1).mean(axis=0)
        yield Claim(
            2,
            f"MWU, eta {eta}, T {T}: {below_bound}",
            duality_gap(P, mean_policy) / mwu_bound(start, eta, T),
            "<=",
            "1",
        )
        # The worst mu is a pure strategy, for which KL(mu, pi_1) = -log pi_1(mu).
        shrink = 1 - np.exp(-eta)
        yield Claim(
            3,
            f"Freund-Schapire, eta {eta}, T {T}: every mu has "
            "1/2 <= (eta P(average beats mu) + KL(mu, pi_1)/T) / (1 - e^-eta). "
            "Value: largest left side minus right side",
            (0.5 - eta / shrink * (mean_policy @ P) + np.log(start) / (shrink * T)).max(),
            "<=",
            "0",
        )
    for T in HORIZONS:
        eta = mwu_step(start, T)
        mean_policy = play(mwu(P, start, eta), T - 1).mean(axis=0)
        yield Claim(
            3,
            f"MWU, eta = sqrt(8 ln(1/min pi_1)/T), T {T}: {below_bound}",
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
        "SPPO's least squares, eta 1: pi_2 sums to 1, and (eta (P pi_1 - 1/2) - log ratio)/ratio "
        "with ratio = pi_2/pi_1 is the same for all actions. Value: largest error",
        max(sum_error, multiplier_spread),
        "<=",
        "1e-12",
    )
    distance = l2_distance_to_mwu(P, start, 1.0)
    distance_near_half = l2_distance_to_mwu(0.45 + 0.1 * P, start, 1.0)
    yield Claim(
        12,
        "SPPO's least squares, eta 1: one step is closer to a step of MWU if P is closer to 1/2. "
        "Value: distance with 1/2 + (P - 1/2)/10, divided by the distance with P",
        distance_near_half / max(distance, 1e-12),
        "<=",
        "0.01",
    )


def l2_distance_to_mwu(P: Array, start: Array, eta: float) -> Any:
    """Largest difference of a probability after one step of `sppo_l2` and one step of `mwu`."""
    return np.abs(play(sppo_l2(P, start, eta), 1)[1] - play(mwu(P, start, eta), 1)[1]).max()


def improvement_laws(P: Array, start: Array) -> Iterator[Claim]:
    """By how much each policy of multiplicative weights (eta = 1) beats the policy before it."""
    pi = play(mwu(P, start, 1.0), 300)
    wins = pi @ P.T
    advantage = (pi[1:] * wins[:-1]).sum(axis=1) - 0.5
    symmetric_kl = np.array([kl(old, new) + kl(new, old) for old, new in zip(pi, pi[1:])])
    yield Claim(
        16,
        "MWU, eta 1: P(pi_(t+1) beats pi_t) equals "
        "1/2 + (KL(pi_t, pi_(t+1)) + KL(pi_(t+1), pi_t))/eta. Value: largest error of 300 steps",
        np.abs(advantage - symmetric_kl).max(),
        "<=",
        "1e-12",
    )
    yield Claim(
        16,
        "MWU, eta 1: every policy beats the previous one. "
        "Value: largest 1/2 - P(pi_(t+1) beats pi_t) in 300 steps",
        -advantage.min(),
        "<=",
        "1e-12",
    )


def onpo_laws(P: Array, start: Array) -> Iterator[Claim]:
    """ONPO's gap falls as 1/T, where multiplicative weights only have 1/sqrt(T)."""
    eta, T = 0.5, np.arange(1, 3001)
    pi = play(onpo(P, start, eta), 3000)
    bound = 2 * np.log(1 / start.min()) / (eta * T)
    means = average(pi[:-1])
    yield Claim(
        20,
        f"ONPO, eta {eta}: the gap of the average policy is at most 2 ln(1 / min pi_1)/(eta T). "
        "Value: largest gap/bound of T = 1 to 3000",
        max(duality_gap(P, mean) / limit for mean, limit in zip(means, bound, strict=True)),
        "<=",
        "1",
    )
    steps = np.diff(np.log(pi[:20]), axis=0)[1:]
    wins = pi[:20] @ P.T
    optimistic = eta * (2 * wins[1:-1] - wins[:-2])
    errors = steps - optimistic
    yield Claim(
        20,
        f"ONPO, eta {eta}: from the second step on, each step is OMWU's, eta (2 P pi_t - "
        "P pi_(t-1)). Value: largest error of a log-ratio in 18 steps, up to a constant",
        np.abs(errors - errors.mean(axis=1, keepdims=True)).max(),
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
        "IPO on all on-policy pairs, solved by least squares, is MWU with eta = 1/beta = 2. "
        "Value: largest difference of a probability after one step",
        np.abs(ipo_step - play(mwu(P, start, 2.0), 1)[1]).max(),
        "<=",
        "1e-12",
    )
    eta, alpha = 0.7, 0.3
    by_inpo = play(inpo(P, start, start, (1 + eta * alpha) / eta, alpha), 100)
    by_mmd = play(mmd(P, start, start, eta, alpha), 100)
    yield Claim(
        17,
        "INPO with eta' = (1 + eta alpha)/eta and tau = alpha is MMD with eta and alpha. "
        "Value: largest difference of a probability in 100 steps",
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
        f"tau {tau}: the regularised gap of pi*_tau is 0. Value: its absolute value",
        abs(regularised_gap(P, star, start, tau)),
        "<=",
        "1e-12",
    )
    for topic, name, policies in (
        (5, "INPO", inpo(P, star, start, 2, tau)),
        (7, "EGPO", egpo(P, star, start, 0.5, tau)),
        (8, "MMD", mmd(P, star, start, 4 * tau, tau)),
        (21, "Nash-MP", nash_mp(P, star, start, 2.0, tau)),
    ):
        yield Claim(
            topic,
            f"{name}, tau {tau}: pi*_tau is the fixed point. "
            "Value: largest change of a probability in a step from pi*_tau",
            np.abs(play(policies, 1)[1] - star).max(),
            "<=",
            "1e-12",
        )
    yield from decreasing_step_laws(P, start, tau, star)
    yield from constant_step_laws(P, start, tau, star)
    yield from extragradient_laws(P, start, tau, star)


def decreasing_step_laws(P: Array, start: Array, tau: float, star: Array) -> Iterator[Claim]:
    """Bounds of INPO and Nash-MD with eta_t = tau (t+2)/2, an inverse step size."""
    T = np.arange(1, 1001)
    for topic, name, method, numerator_in_text in (
        (5, "INPO", inpo, "32 C^2"),
        (6, "Nash-MD", nash_md, "8"),
    ):
        pi = play(method(P, start, start, lambda t: tau * (t + 2) / 2, tau), 1000)
        numerator = 32 * inpo_constant(pi, start, tau) ** 2 if name == "INPO" else 8.0
        yield Claim(
            topic,
            f"{name}, tau {tau}, eta_t = tau (t+2)/2: "
            f"KL(pi*_tau, pi_(T+1)) is at most {numerator_in_text}/(tau^2 (T+1)). "
            "Value: largest KL/bound of T = 1 to 1000",
            (divergences(star, pi[1:]) * tau**2 * (T + 1) / numerator).max(),
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
        f"INPO, tau {tau}, eta {eta}: with K_t = KL(pi*_tau, pi_t), K_(t+1) is at most "
        "(1 - tau/eta) K_t + 8 C^2/eta^2. Value: largest K_(t+1)/bound of 400 steps",
        (path[1:] / ((1 - tau / eta) * path[:-1] + 8 * C**2 / eta**2)).max(),
        "<=",
        "1",
    )
    # L = 1/2, so eta = alpha/L^2 = 4 tau and 1 + eta alpha = 1 + 4 tau^2.
    path = divergences(star, play(mmd(P, start, start, 4 * tau, tau), 1000))
    bound = np.maximum(path[0] * (1 + 4 * tau**2) ** -np.arange(1001.0), 1e-25)
    yield Claim(
        8,
        f"MMD, alpha {tau}, eta = alpha/L^2: KL(pi*_tau, pi_(k+1)) is at most "
        "KL(pi*_tau, pi_1) (1 + eta alpha)^-k. Value: largest KL/bound of k = 1 to 1000",
        (path / bound)[1:].max(),
        "<=",
        "1",
    )


def extragradient_laws(P: Array, start: Array, tau: float, star: Array) -> Iterator[Claim]:
    """Linear rates of the last policy of EGPO and Nash-MP, which look half a step ahead."""
    for topic, name, method, eta, rate, rate_in_text in (
        (7, "EGPO", egpo, 1 / (tau + 3), 1 - tau / (tau + 3), "(1 - eta tau)^k"),
        (21, "Nash-MP", nash_mp, 2.0, 1 / (1 + 2 * tau), "(1 + eta tau)^-k"),
    ):
        path = divergences(star, play(method(P, start, start, eta, tau), 400))
        bound = np.maximum(path[0] * rate ** np.arange(401.0), 1e-25)
        yield Claim(
            topic,
            f"{name}, tau {tau}, eta {eta:.3g}: KL(pi*_tau, pi_(k+1)) is at most "
            f"KL(pi*_tau, pi_1) {rate_in_text}. Value: largest KL/bound of k = 1 to 400",
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
        "ONPO": play(onpo(P, start, 0.3), T),
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
        "Nash-MP": nash_mp(P, start, start, 2.0, 0.3),
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
        "gap_of_average": gaps(game, means),
        "gap_of_last_policy": gaps(game, lasts),
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
        "Nash-MP": nash_mp(P, start, start, 2.0, tau),
        "MMD": mmd(P, start, start, 4 * tau, tau),
    }
    series = {}
    for name, policies in methods.items():
        values = [regularised_gap(P, pi, start, tau) for pi in play(policies, T)]
        series[name] = np.maximum(values, 1e-16)
    return series


def self_improvement(game: Game, T: int) -> Series:
    """Win probabilities of the policies of SPPO (eta = 1), by t = 1, ..., T; each column (T,).

    beats_previous: P(pi_{t+1} beats pi_t). beats_previous_by_identity: the same, computed by the
    identity of topic 16. beats_first: P(pi_{t+1} beats pi_1). gap: the duality gap of pi_{t+1}.
    """
    pi = play(mwu(game.P, game.start, 1.0), T)
    identity = [0.5 + kl(old, new) + kl(new, old) for old, new in zip(pi, pi[1:])]
    return {
        "t": np.arange(1, T + 1),
        "beats_previous": (pi[1:] * (pi[:-1] @ game.P.T)).sum(axis=1),
        "beats_previous_by_identity": np.array(identity),
        "beats_first": pi[1:] @ game.P @ pi[0],
        "gap": gaps(game, pi[1:]),
    }
