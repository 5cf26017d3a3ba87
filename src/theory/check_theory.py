"""What the theory of these methods claims, tried on games that can be solved exactly.

Reads   nothing, or a user's game (--game FILE.csv: n lines of n probabilities that the row beats the column)
Writes  checks.json: a list of number, claim, games, value, relation, expected, tolerance, holds; its record
Laws (identities, bounds) are tried on all games and the worst is kept: an error, or a ratio to a bound, which must not
exceed 1. Figures of the embedded games are expected to the last digit given. A user's game is tried by the laws alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import _path  # noqa: F401
from sppo.core.artifacts import recorded, write_json
from sppo.core.errors import run
from sppo.preferences.estimates import mean_logits, p_hat, win_probabilities
from sppo.theory import games as g
from sppo.theory.claims import ETAS, HORIZONS, Claim, check, divergences, laws, report_checks
from sppo.theory.games import Game, duality_gap, kl, play, read_game

P, START = g.GAMES["comal3"].P, g.GAMES["comal3"].start
STAR = g.nash(P)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--game", type=Path, help="your own game, .csv")
    parser.add_argument("--output", type=Path, required=True, help="checks.json")
    args = parser.parse_args()
    with recorded("theory", args.output, [args.game] if args.game else [], vars(args)) as facts:
        checks = laws_on({args.game.stem: read_game(args.game)}) if args.game else all_checks()
        facts["hold"] = sum(one["holds"] for one in checks)
        write_json(args.output, checks)
    report_checks(checks, args.output)


def all_checks() -> list[dict[str, Any]]:
    checks = laws_on(
        g.GAMES | {"random5": g.random_game(5, seed=1), "random20": g.random_game(20, seed=0)}
    )
    for figures, names in (
        (figures_of_sppo, "comal3"),
        (figures_of_regularised, "comal3"),
        (figures_of_rewards, "as named"),
        (figures_of_samples, "random10"),
    ):
        checks += [check(*claim, names) for claim in figures()]
    return sorted(checks, key=lambda one: one["number"])


def laws_on(games: dict[str, Game]) -> list[dict[str, Any]]:
    """Each law once, with its worst value over the games."""
    tried: dict[str, list[tuple[Claim, str]]] = {}
    for name, game in games.items():
        for law in laws(game):
            tried.setdefault(law[1], []).append((law, name))
    # Not a number is the worst of all, and compares with nothing.
    return [
        check(
            *max(same, key=lambda one: np.nan_to_num(one[0][2], nan=np.inf))[0],
            ", ".join(name for _, name in same),
        )
        for same in tried.values()
    ]


def gap_after(policies: g.Policies, steps: int) -> float:
    """The gap of comal3 there."""
    return duality_gap(P, play(policies, steps)[-1])


def figures_of_sppo() -> Iterator[Claim]:
    """Multiplicative weights and what is close to it, on comal3."""
    for eta, last, average in zip(
        ETAS, ("0.2849", "0.7674", "0.7888"), ("0.00417", "0.01034", "0.00961")
    ):
        pi = play(g.mwu(P, START, eta), 2000)
        yield 2, f"MWU, eta {eta}: gap after 2000 steps", duality_gap(P, pi[-1]), "=", last
        yield (
            2,
            f"MWU, eta {eta}: gap of the average of 2000",
            duality_gap(P, pi[:-1].mean(axis=0)),
            "=",
            average,
        )
    for T, average, last in zip(
        HORIZONS,
        ("0.0232", "0.0199", "0.0117", "0.0088", "0.00298"),
        ("0.28", "0.16", "0.30", "0.37", "0.27"),
    ):
        pi = play(g.mwu(P, START, g.mwu_step(START, T)), T)
        yield (
            3,
            f"MWU, best eta for T {T}: gap of the average",
            duality_gap(P, pi[:-1].mean(axis=0)),
            "=",
            average,
        )
        yield 3, f"MWU, best eta for T {T}: gap after T steps", duality_gap(P, pi[-1]), "=", last
    for steps, gap in ((100, "0.212"), (1000, "0.047"), (4000, "1.3e-4")):
        yield (
            10,
            f"OMWU, eta 0.3: gap after {steps} steps",
            gap_after(g.omwu(P, START, 0.3), steps),
            "=",
            gap,
        )
    off = [
        np.abs(play(g.sppo_l2(P, START, eta), 1)[1] - play(g.mwu(P, START, eta), 1)[1]).max()
        for eta in (1, 3, 10, 1000)
    ]
    yield 12, "SPPO's least squares against MWU, eta 1: largest difference", off[0], "=", "2e-4"
    yield 12, "eta 1: log Z - eta/2", np.log(START @ np.exp(P @ START)) - 0.5, "=", "0.0046"
    yield (
        12,
        "the difference grows over eta 1, 3, 10: smallest growth",
        np.diff(off[:3]).min(),
        ">=",
        "0",
    )
    yield 12, "at eta 1000 both give the best response alone: difference", off[3], "<=", "1e-12"
    pi = play(g.mwu(P, START, 1.0), 300)
    for t, wins in ((0, "0.5093"), (10, "0.5085"), (50, "0.5167"), (299, "0.5014")):
        yield 16, f"MWU, eta 1, t {t}: P(pi_(t+1) beats pi_t)", pi[t + 1] @ P @ pi[t], "=", wins
    yield (
        16,
        "MWU, eta 1: P(policy after 300 steps beats the first)",
        pi[300] @ P @ pi[0],
        "=",
        "0.636",
    )
    for t, gap in ((0, "0.28"), (300, "0.589")):
        yield 16, f"MWU, eta 1: gap after {t} steps", duality_gap(P, pi[t]), "=", gap


def figures_of_regularised() -> Iterator[Claim]:
    """Methods with a reference or a magnet, on comal3."""
    for tau, printed, gap, bias in (
        (0.1, (0.274917, 0.279723, 0.445360), "0.0588", "2e-4"),
        (0.3, (0.192251, 0.380156, 0.427593), "0.1888", "3e-4"),
    ):
        star = g.regularised_nash(P, START, tau)
        yield (
            4,
            f"tau {tau}: distance of pi*_tau from {printed}",
            np.abs(star - printed).max(),
            "<=",
            "5e-7",
        )
        yield 4, f"tau {tau}: gap of pi*_tau in the game itself", duality_gap(P, star), "=", gap
        for number, name, policies, relation, expected in (
            (5, "INPO, eta 2", g.inpo(P, START, START, 2, tau), "<=", "2e-17"),
            (
                6,
                "Nash-MD, constant eta 2, stays off",
                g.nash_md(P, START, START, 2, tau),
                "=",
                bias,
            ),
            (7, "EGPO, eta 1/2", g.egpo(P, START, START, 0.5, tau), "<=", "2e-17"),
        ):
            yield (
                number,
                f"{name}, tau {tau}: KL(pi*_tau, pi) after 399 steps",
                kl(star, play(policies, 399)[-1]),
                relation,
                expected,
            )
        path = divergences(star, play(g.egpo(P, START, START, 0.5, tau), 100))
        yield (
            7,
            f"EGPO, eta 1/2, tau {tau}: largest KL_(t+1)/KL_t, a rate",
            (path[1:] / path[:-1])[path[1:] > 1e-20].max(),
            "<=",
            "0.95",
        )
    average = {
        T: play(g.inpo(P, START, START, np.sqrt(T), 0.1), T - 1).mean(axis=0) for T in HORIZONS
    }
    yield (
        5,
        "INPO, tau 0.1, eta sqrt(T): regularised gap of the average times sqrt(T), over five T: largest growth",
        max(
            np.diff(
                [g.regularised_gap(P, pi, START, 0.1) * np.sqrt(T) for T, pi in average.items()]
            )
        ),
        "<=",
        "0",
    )
    for alpha, every, gaps in (
        (0.3, 50, {1: "0.1888", 10: "0.0376", 50: "1.3e-5", 200: "1e-15"}),
        (0.1, 200, {10: "6e-5", 50: "1e-15"}),
    ):
        pi = play(g.mpo(P, START, 1.88, alpha, every), 200 * every)[::every]
        for k, gap in gaps.items():
            yield (
                9,
                f"MPO, alpha {alpha}, N {every}, eta 1.88: gap at magnet {k}",
                duality_gap(P, pi[k]),
                "<=" if gap == "1e-15" else "=",
                gap,
            )
        yield (
            9,
            f"MPO, alpha {alpha}, N {every}: KL(pi*, magnet) never grows: largest growth",
            max(np.diff(divergences(STAR, pi))),
            "<=",
            "1e-15",
        )
    for name, policies in (
        ("SPPO, eta 1", g.mwu(P, START, 1.0)),
        ("IPO, beta 2", g.iterative_ipo(P, START, 2.0)),
        ("DPO, beta 5", g.iterative_dpo(P, START, 5.0)),
    ):
        yield (
            14,
            f"iterative {name} does not settle: smallest gap over steps 1000 to 2000",
            min(duality_gap(P, pi) for pi in play(policies, 2000)[1000:]),
            ">=",
            "0.2",
        )
    pi = play(g.inpo(P, START, START, 1.0, 0.3), 2000)
    yield (
        14,
        "INPO, tau 0.3, eta 1 stalls: gap after 2000 steps",
        duality_gap(P, pi[2000]),
        "=",
        "0.1888",
    )
    yield (
        14,
        "INPO: change of the gap from step 1000 on",
        abs(duality_gap(P, pi[2000]) - duality_gap(P, pi[1000])),
        "<=",
        "1e-12",
    )
    yield (
        14,
        "COMAL, the same, reference moved every 6 steps: gap after 1500",
        gap_after(g.comal(P, START, 1.0, 0.3), 1500),
        "<=",
        "1e-11",
    )
    yield (
        14,
        "COMAL, tau 0.1, eta 2 strays, for 6 steps are too few to come near pi*_tau: gap after 3000",
        gap_after(g.comal(P, START, 2.0, 0.1), 3000),
        ">=",
        "0.28",
    )


def figures_of_rewards() -> Iterator[Claim]:
    """What is lost when preferences are fitted by rewards (11) or logits collapsed to scores (13)."""
    r = g.bt_rewards(P)
    yield (
        11,
        "comal3: distance of Bradley-Terry's best rewards from (-0.134, 0, 0.134)",
        np.abs(r - [-0.134, 0, 0.134]).max(),
        "<=",
        "5e-4",
    )
    yield (
        11,
        "comal3: the largest error in P that they leave",
        np.abs(P - g.bradley_terry(r)).max(),
        "=",
        "0.367",
    )
    for words, beta, weights, gap in (
        ("uniform", 0.1, None, "0.217"),
        ("on-policy", 0.1, START, "0.599"),
        ("uniform", 0.001, None, "0.6"),
    ):
        yield (
            11,
            f"comal3: DPO, beta {beta}, {words} pairs: gap",
            duality_gap(P, g.offline_dpo(P, START, beta, weights)),
            "=",
            gap,
        )
    yield (
        11,
        "comal3: iterative DPO, beta 5: gap after 60 steps",
        gap_after(g.iterative_dpo(P, START, 5.0), 60),
        "=",
        "0.223",
    )
    for name, best in (
        ("rps", (0, 0, 0)),
        ("bt3", (1, 0, -1)),
        ("transitive_nonBT", (0.756307612615893, 0, -0.756307612615893)),
    ):
        yield (
            11,
            f"{name}: distance of the best rewards from {best}",
            np.abs(g.bt_rewards(g.GAMES[name].P) - best).max(),
            "<=",
            "1e-12",
        )
    draw, cycle = np.random.default_rng(0), np.array([[0, 1, -1], [-1, 0, 1], [1, -1, 0.0]])
    logits = np.array(
        [
            [0.0, 1.2, -0.3, 2.0, 0.7],
            [-0.8, 0.0, 0.5, 0.1, -1.0],
            [0.6, -0.2, 0.0, 1.4, 0.3],
            [-1.7, 0.4, -1.1, 0.0, -0.6],
            [-0.2, 0.9, -0.5, 0.8, 0.0],
        ]
    )
    for probability, printed in (
        ("pairwise", (0.671334, 0.368611, 0.631376, 0.274449, 0.554230)),
        ("blender", (0.719261, 0.356250, 0.636880, 0.227098, 0.560512)),
    ):
        found = p_hat(win_probabilities(logits, probability, 1.0))
        yield (
            13,
            f"five responses: distance of the {probability} P-hat from {printed}",
            np.abs(found - printed).max(),
            "<=",
            "5e-7",
        )
    found, u = win_probabilities(draw.normal(size=(5, 5))), draw.normal(size=(5, 1))
    additive = (u - u.T) / 2
    yield (
        13,
        "random logits: P + P^T = 1 and the mean of P-hat is 1/2: error",
        max(np.abs(found + found.T - 1).max(), abs(p_hat(found).mean() - 0.5)),
        "<=",
        "1e-15",
    )
    yield (
        13,
        "additive logits: pairwise and blender's P-hat agree: error",
        np.abs(
            p_hat(win_probabilities(additive, logit_scale=1.0))
            - p_hat(win_probabilities(additive, "blender"))
        ).max(),
        "<=",
        "1e-15",
    )
    yield (
        13,
        "a cycle's logits: scores that blender leaves of it, largest",
        np.abs(mean_logits(cycle)).max(),
        "=",
        "0.000000000000",
    )
    yield (
        13,
        "a cycle's logits: distance from 1/2 of the P that pairwise keeps",
        np.abs(win_probabilities(cycle) - 0.5).max(),
        ">=",
        "0.2",
    )


def figures_of_samples() -> Iterator[Claim]:
    """EGPO's two contrastive losses on a game of ten actions, exact and from a hundred samples a step."""
    game, beta, rate, n = g.random_game(10, seed=0), 0.1, 0.1, 10
    ref, draw = np.full(n, 1 / n), np.random.default_rng(0)
    star = g.regularised_nash(game.P, ref, beta)
    moved = np.log(game.start) - rate * g.online_ipo_gradient(
        game.P, game.start, ref, beta, on_policy=False
    )
    # Of the loss itself; half of it is often written, and has 2 rate / (beta n).
    step = 4 * rate / (beta * n)
    yield (
        15,
        "version 1: a gradient step is a step of INPO with tau = beta and 1/eta = 4 rate/(beta n): error",
        np.abs(
            np.exp(moved) / np.exp(moved).sum()
            - play(g.inpo(game.P, game.start, ref, 1 / step, beta), 1)[1]
        ).max(),
        "<=",
        "1e-12",
    )
    for version, on_policy in ((1, False), (2, True)):
        yield (
            15,
            f"version {version}: gradient at pi*_tau, tau = beta",
            np.abs(g.online_ipo_gradient(game.P, star, ref, beta, on_policy)).max(),
            "<=",
            "1e-12",
        )
        rows = g.sampled_ipo_gradient(game.P, game.start, ref, beta, on_policy, 100_000, draw)
        error = rows.mean(axis=0) - g.online_ipo_gradient(game.P, game.start, ref, beta, on_policy)
        yield (
            15,
            f"version {version}: mean of 100,000 sampled gradients off the exact one, in standard errors",
            np.abs(error / (rows.std(axis=0) / np.sqrt(len(rows)))).max(),
            "<=",
            "4",
        )
        log_pi = np.log(ref)
        for _ in range(1000):
            pi = np.exp(log_pi) / np.exp(log_pi).sum()
            log_pi = log_pi - rate * g.sampled_ipo_gradient(
                game.P, pi, ref, beta, on_policy, 100, draw
            ).mean(axis=0)
        yield (
            15,
            f"version {version}, 100 samples a step: regularised gap after 1000 steps over what it was",
            g.regularised_gap(game.P, pi, ref, beta) / g.regularised_gap(game.P, ref, ref, beta),
            "<=",
            "0.05",
        )


if __name__ == "__main__":
    run(main)
