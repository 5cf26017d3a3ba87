"""What the theory of these methods claims of every game: identities, fixed points, bounds; and how it is told what holds.

A claim is (number, words, value, relation, expected); the numbers are those of TOPICS. KL(p, q) = E_p log p/q.
An error or an excess is compared with what rounding allows, a value with a bound as their ratio, which must not exceed 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from sppo.theory import games as g
from sppo.theory.games import Array, Game, duality_gap, kl, play

ETAS, TAUS, HORIZONS = (0.05, 0.3, 1.0), (0.1, 0.3), (100, 400, 1600, 6400, 25600)
Claim = tuple[int, str, float, str, str]
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
}


def divergences(star: Array, policies: Array) -> Array:
    """KL(star || pi) of each policy."""
    return np.array([kl(star, pi) for pi in policies])


def laws(game: Game) -> Iterator[Claim]:
    """What holds of every game; a law without content for this one is left out."""
    P, start, star, n = game.P, game.start, g.nash(game.P), len(game.P)
    pi = play(g.mwu(P, start, 1.0), 300)
    wins, path = pi @ P.T, divergences(star, pi)
    log_z = np.log((pi * np.exp(wins - 0.5)).sum(axis=1))
    yield (
        1,
        "MWU: KL(pi*, pi_t) grows by log E exp(eta (P pi_t - 1/2)) - eta (P(pi* beats pi_t) - 1/2): error",
        np.abs(np.diff(path) - (log_z - wins @ star + 0.5)[:-1]).max(),
        "<=",
        "1e-12",
    )
    if star.min() > 1e-9:
        yield (
            1,
            "MWU: KL(pi*, pi_t) never falls if pi* has full support: largest fall",
            -np.diff(path).min(),
            "<=",
            "1e-10",
        )
    for eta, T in [(eta, 2000) for eta in ETAS] + [(g.mwu_step(start, T), T) for T in HORIZONS]:
        average, shrink = play(g.mwu(P, start, eta), T - 1).mean(axis=0), 1 - np.exp(-eta)
        number, named = (2, f"eta {eta}") if T == 2000 else (3, "eta = sqrt(8 ln(1/min pi_1)/T)")
        yield (
            number,
            f"MWU, {named}, T {T}: gap of the average over its bound 2 (ln(1/min pi_1)/(eta T) + eta/8)",
            duality_gap(P, average) / g.mwu_bound(start, eta, T),
            "<=",
            "1",
        )
        if number == 2:  # mu runs over the vertices, where KL(mu, pi_1) = -log pi_1(mu)
            yield (
                3,
                f"Freund-Schapire, eta {eta}, T 2000: 1/2 - (eta P(average beats mu) + KL(mu, pi_1)/T) / (1-e^-eta), worst mu",
                (0.5 - eta / shrink * (average @ P) + np.log(start) / (shrink * T)).max(),
                "<=",
                "0",
            )
    for tau in TAUS:
        yield from regularised_laws(P, start, tau)
    u = g.l2_log_ratio(start, P @ start - 0.5)
    yield (
        12,
        "SPPO's least squares, eta 1: the policy sums to 1, (target - log-ratio)/ratio is the same for all actions: error",
        max(abs(float(start @ np.exp(u)) - 1), float(np.ptp((P @ start - 0.5 - u) / np.exp(u)))),
        "<=",
        "1e-12",
    )
    off = [
        np.abs(play(g.sppo_l2(Q, start, 1.0), 1)[1] - play(g.mwu(Q, start, 1.0), 1)[1]).max()
        for Q in (P, 0.45 + 0.1 * P)
    ]
    yield (
        12,
        "SPPO's least squares: distance to MWU once P is ten times closer to 1/2, over what it was",
        off[1] / max(off[0], 1e-12),
        "<=",
        "0.01",
    )
    better, both = (
        (pi[1:] * wins[:-1]).sum(axis=1) - 0.5,
        np.array([kl(a, b) + kl(b, a) for a, b in zip(pi, pi[1:])]),
    )
    yield (
        16,
        "MWU: P(pi_{t+1} beats pi_t) = 1/2 + (KL + reversed KL)/eta: error",
        np.abs(better - both).max(),
        "<=",
        "1e-12",
    )
    yield (
        16,
        "MWU: every policy beats its predecessor: 1/2 - P(pi_{t+1} beats pi_t), largest",
        -better.min(),
        "<=",
        "1e-12",
    )
    i, j = (index.ravel() for index in np.indices((n, n)))
    weight = np.sqrt(start[i] * start[j])
    fitted = np.linalg.lstsq(
        weight[:, None] * (np.eye(n)[i] - np.eye(n)[j]), weight * (P[i, j] - 0.5) / 0.5, rcond=None
    )[0]
    yield (
        17,
        "IPO on all on-policy pairs, solved as least squares, is MWU with eta = 1/beta = 2: error",
        np.abs(
            start * np.exp(fitted) / (start @ np.exp(fitted)) - play(g.mwu(P, start, 2.0), 1)[1]
        ).max(),
        "<=",
        "1e-12",
    )
    inpo, mmd = (
        play(g.inpo(P, start, start, (1 + 0.7 * 0.3) / 0.7, 0.3), 100),
        play(g.mmd(P, start, start, 0.7, 0.3), 100),
    )
    yield (
        17,
        "INPO(eta_I = (1 + eta alpha)/eta, tau = alpha) is MMD(eta, alpha), 100 steps: error",
        np.abs(inpo - mmd).max(),
        "<=",
        "1e-12",
    )


def regularised_laws(P: Array, start: Array, tau: float) -> Iterator[Claim]:
    """Methods that are pulled to a reference, here the start, against the equilibrium pi*_tau of the game regularised by it."""
    star, T = g.regularised_nash(P, start, tau), np.arange(1, 1001)
    yield (
        4,
        f"tau {tau}: regularised gap at pi*_tau, with either sign",
        abs(g.regularised_gap(P, star, start, tau)),
        "<=",
        "1e-12",
    )
    for number, name, policies in (
        (5, "INPO", g.inpo(P, star, start, 2, tau)),
        (7, "EGPO", g.egpo(P, star, start, 0.5, tau)),
        (8, "MMD", g.mmd(P, star, start, 4 * tau, tau)),
    ):
        yield (
            number,
            f"{name}, tau {tau}: pi*_tau is the fixed point; a step moves it by",
            np.abs(play(policies, 1)[1] - star).max(),
            "<=",
            "1e-12",
        )
    for number, name, method, factor in ((5, "INPO", g.inpo, 32), (6, "Nash-MD", g.nash_md, 8)):
        pi = play(method(P, start, start, lambda t: tau * (t + 2) / 2, tau), 1000)
        C = max(np.abs(np.log(pi / start)).max() * tau, 1.0) if name == "INPO" else 1.0
        yield (
            number,
            f"{name}, tau {tau}, eta_t = tau (t+2)/2: KL(pi*_tau, pi) over its bound {factor} C^2/(tau^2 (T+1)), every T",
            (divergences(star, pi[1:]) * tau**2 * (T + 1) / (factor * C**2)).max(),
            "<=",
            "1",
        )
    pi = play(g.inpo(P, start, start, 2, tau), 400)
    C, path = max(np.abs(np.log(pi / start)).max() * tau, 1.0), divergences(star, pi)
    yield (
        5,
        f"INPO, tau {tau}, eta 2: KL_(t+1) over (1 - tau/eta) KL_t + 8 C^2/eta^2",
        (path[1:] / ((1 - tau / 2) * path[:-1] + 2 * C**2)).max(),
        "<=",
        "1",
    )
    path = divergences(star, play(g.mmd(P, start, start, 4 * tau, tau), 1000))
    bound = np.maximum(path[0] * (1 + 4 * tau**2) ** -np.arange(1001.0), 1e-25)
    yield (
        8,
        f"MMD, alpha {tau}, eta = alpha/L^2: KL_k over KL_0 (1 + eta alpha)^-k, every k > 0",
        (path / bound)[1:].max(),
        "<=",
        "1",
    )


# --- what the figures show ---

Series = dict[str, Array]


def average(policies: Array) -> Array:
    """Mean of the first, of the first two, ... policies; the shape of `policies`."""
    return np.cumsum(policies, axis=0) / np.arange(1, len(policies) + 1)[:, None]


def gaps(game: Game, policies: Iterable[Array]) -> Array:
    """Duality gap of each policy; 1e-16 stands for what is rounding."""
    return np.maximum([duality_gap(game.P, pi) for pi in policies], 1e-16)


def without_reference(game: Game, T: int, eta: float = 1.0) -> Series:
    """pi_1 to pi_{T+1} of the methods whose reference is the policy itself. DPO is left out if its rewards are infinite."""
    P, start = game.P, game.start
    sppo = play(g.mwu(P, start, eta), T)
    played = {
        "SPPO": sppo,
        "SPPO, average": average(sppo),
        "SPPO, least squares": play(g.sppo_l2(P, start, eta), T),
        "OMWU": play(g.omwu(P, start, 0.3), T),
    }
    return played | (
        {"iterative DPO": play(g.iterative_dpo(P, start, 5.0), T)}
        if g.has_finite_rewards(P)
        else {}
    )


def with_reference(game: Game, T: int) -> Series:
    """pi_1 to pi_{T+1} of the methods that are held by another policy, first the start, with tau = alpha = 0.3."""
    P, start = game.P, game.start
    methods = {
        "INPO": g.inpo(P, start, start, 2.0, 0.3),
        "Nash-MD": g.nash_md(P, start, start, 2.0, 0.3),
        "EGPO": g.egpo(P, start, start, 0.5, 0.3),
        "MMD": g.mmd(P, start, start, 1.2, 0.3),
        "MPO": g.mpo(P, start, 1.2, 0.3, every=50),
        "COMAL": g.comal(P, start, 1.0, 0.3, every=6),
    }
    return {name: play(policies, T) for name, policies in methods.items()}


def by_horizon(game: Game) -> Series:
    """Gap of the average and of the last policy of a run of T steps with the step size for T, and the bound."""
    horizons = np.unique(np.geomspace(HORIZONS[0], HORIZONS[-1], 17).round().astype(int))
    etas = [g.mwu_step(game.start, T) for T in horizons]
    played = [play(g.mwu(game.P, game.start, eta), T) for eta, T in zip(etas, horizons)]
    return {
        "T": horizons,
        "average": gaps(game, [pi[:-1].mean(axis=0) for pi in played]),
        "last": gaps(game, [pi[-1] for pi in played]),
        "bound": np.array([g.mwu_bound(game.start, eta, T) for eta, T in zip(etas, horizons)]),
    }


def regularised_gaps(game: Game, T: int, tau: float) -> Series:
    """Regularised gap by iteration; eta_t is tau (t+2)/2."""
    P, start = game.P, game.start

    def eta_t(t: int) -> float:
        return tau * (t + 2) / 2

    methods = {
        "INPO": g.inpo(P, start, start, 2.0, tau),
        "INPO, eta_t": g.inpo(P, start, start, eta_t, tau),
        "Nash-MD": g.nash_md(P, start, start, 2.0, tau),
        "Nash-MD, eta_t": g.nash_md(P, start, start, eta_t, tau),
        "EGPO": g.egpo(P, start, start, 0.5, tau),
        "MMD": g.mmd(P, start, start, 4 * tau, tau),
    }
    return {
        name: np.maximum([g.regularised_gap(P, pi, start, tau) for pi in play(policies, T)], 1e-16)
        for name, policies in methods.items()
    }


def self_improvement(game: Game, T: int) -> Series:
    """SPPO, eta 1: what pi_{t+1} wins against pi_t, what the identity says it wins, what it wins against pi_1, and its gap."""
    pi = play(g.mwu(game.P, game.start, 1.0), T)
    return {
        "t": np.arange(1, T + 1),
        "beats_predecessor": (pi[1:] * (pi[:-1] @ game.P.T)).sum(axis=1),
        "identity": np.array([0.5 + kl(a, b) + kl(b, a) for a, b in zip(pi, pi[1:])]),
        "beats_first": pi[1:] @ game.P @ pi[0],
        "gap": gaps(game, pi[1:]),
    }


def report_checks(checks: list[dict[str, Any]], path: Path) -> None:
    """Print which checks do not hold, and how many do."""
    for one in checks:
        if not one["holds"]:
            print(
                f"does not hold: {one['number']}. {one['claim']}: {one['value']:.6g}, not {one['relation']} {one['expected']:.6g}"
            )
    print(f"{sum(one['holds'] for one in checks)} of {len(checks)} checks hold: {path}")


def check(
    number: int, claim: str, value: float, relation: str, expected: str, games: str
) -> dict[str, Any]:
    """`=` is equality to the last digit of `expected`."""
    target, digit = float(expected), 10.0 ** int(Decimal(expected).as_tuple().exponent)
    tolerance = digit / 2 if relation == "=" else 0.0
    holds = {"=": abs(value - target) <= tolerance, "<=": value <= target, ">=": value >= target}[
        relation
    ]
    return {
        "number": number,
        "claim": claim,
        "games": games,
        "value": float(value),
        "relation": relation,
        "expected": target,
        "tolerance": tolerance,
        "holds": bool(holds),
    }
