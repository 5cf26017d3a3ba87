"""Check what the theory of these methods claims, on games that can be solved exactly.

Reads   nothing, or a user's game (--game FILE.csv: n lines of n probabilities that the row beats
        the column)
Writes  checks.json, a list of objects with topic, claim, games, value, relation, expected,
        tolerance and holds; its record

Laws (identities and bounds) are evaluated on every game, and the worst value is reported: an error,
or a ratio to a bound, which must not exceed 1. The other checks compare numbers on the embedded
games with expected ones, most of them to the last printed digit. A user's game is checked by the
laws only.
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
from sppo.theory.claims import (
    ETAS,
    HORIZONS,
    Claim,
    check,
    divergences,
    l2_distance_to_mwu,
    laws,
    report_checks,
)
from sppo.theory.games import (
    GAMES,
    Game,
    Policies,
    bradley_terry,
    bt_rewards,
    comal,
    duality_gap,
    egpo,
    inpo,
    iterative_dpo,
    iterative_ipo,
    kl,
    mpo,
    mwu,
    mwu_step,
    nash,
    nash_md,
    offline_dpo,
    omwu,
    online_ipo_gradient,
    onpo,
    play,
    random_game,
    read_game,
    regularised_gap,
    regularised_nash,
    sampled_ipo_gradient,
)

P, START = GAMES["comal3"].P, GAMES["comal3"].start
STAR = nash(P)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--game", type=Path, help="your own game, .csv")
    parser.add_argument("--output", type=Path, required=True, help="checks.json")
    args = parser.parse_args()
    inputs = [args.game] if args.game else []
    with recorded("theory", args.output, inputs, vars(args)) as facts:
        checks = laws_on({args.game.stem: read_game(args.game)}) if args.game else all_checks()
        facts["checks_that_hold"] = sum(entry["holds"] for entry in checks)
        write_json(args.output, checks)
    report_checks(checks, args.output)


def all_checks() -> list[dict[str, Any]]:
    """All checks of the embedded and random games, in the order of their topics."""
    random_games = {"random5": random_game(5, seed=1), "random20": random_game(20, seed=0)}
    checks = laws_on(GAMES | random_games)
    for numbers, game_names in (
        (numbers_of_sppo, "comal3"),
        (numbers_of_regularised, "comal3"),
        (numbers_of_bradley_terry, "in the claim"),
        (numbers_of_estimates, "none"),
        (numbers_of_samples, "random10"),
    ):
        checks += [check(claim, game_names) for claim in numbers()]
    return sorted(checks, key=lambda entry: entry["topic"])


def laws_on(games: dict[str, Game]) -> list[dict[str, Any]]:
    """One check for each law, with its worst value over the games."""
    claims_by_text: dict[str, list[Claim]] = {}
    names_by_text: dict[str, list[str]] = {}
    for name, game in games.items():
        for claim in laws(game):
            claims_by_text.setdefault(claim.text, []).append(claim)
            names_by_text.setdefault(claim.text, []).append(name)
    checks = []
    for text, same_law in claims_by_text.items():
        # NaN counts as the worst value; comparisons with it would be false.
        worst = max(same_law, key=lambda claim: np.nan_to_num(claim.value, nan=np.inf))
        checks.append(check(worst, ", ".join(names_by_text[text])))
    return checks


def gap_after(policies: Policies, steps: int) -> float:
    """The duality gap in comal3 of the policy after `steps` steps."""
    return duality_gap(P, play(policies, steps)[-1])


# --- SPPO without a reference, on comal3 ---


def numbers_of_sppo() -> Iterator[Claim]:
    """Multiplicative weights and its variants, on comal3."""
    yield from numbers_of_constant_eta()
    yield from numbers_of_best_eta()
    for steps, gap in ((100, "0.212"), (1000, "0.047"), (4000, "1.3e-4")):
        yield Claim(
            10,
            f"OMWU, eta 0.3. Value: gap after {steps} steps",
            gap_after(omwu(P, START, 0.3), steps),
            "=",
            gap,
        )
    path = divergences(nash(P), play(omwu(P, START, 0.3), 5000))
    yield Claim(
        10,
        "OMWU, eta 0.3: K_t = KL(pi*, pi_t) falls at a linear rate (2006.09517). "
        "Value: largest K_(t+100)/K_t of steps 1000 to 4900",
        (path[1100:] / path[1000:-100]).max(),
        "<=",
        "0.68",
    )
    yield Claim(
        20,
        "ONPO, eta 0.5: the last policy converges where that of MWU does not. "
        "Value: gap after 2000 steps",
        gap_after(onpo(P, START, 0.5), 2000),
        "<=",
        "1e-5",
    )
    yield from numbers_of_least_squares()
    yield from numbers_of_improvement()


def numbers_of_constant_eta() -> Iterator[Claim]:
    for eta, last_gap, average_gap in (
        (ETAS[0], "0.2849", "0.00417"),
        (ETAS[1], "0.7674", "0.01034"),
        (ETAS[2], "0.7888", "0.00961"),
    ):
        pi = play(mwu(P, START, eta), 2000)
        yield Claim(
            2, f"MWU, eta {eta}. Value: gap after 2000 steps", duality_gap(P, pi[-1]), "=", last_gap
        )
        yield Claim(
            2,
            f"MWU, eta {eta}. Value: gap of the average of the first 2000 policies",
            duality_gap(P, pi[:-1].mean(axis=0)),
            "=",
            average_gap,
        )


def numbers_of_best_eta() -> Iterator[Claim]:
    average_gaps = ("0.0232", "0.0199", "0.0117", "0.0088", "0.00298")
    last_gaps = ("0.28", "0.16", "0.30", "0.37", "0.27")
    for T, average_gap, last_gap in zip(HORIZONS, average_gaps, last_gaps):
        pi = play(mwu(P, START, mwu_step(START, T)), T)
        yield Claim(
            3,
            f"MWU, best eta for T {T}. Value: gap of the average of the first T policies",
            duality_gap(P, pi[:-1].mean(axis=0)),
            "=",
            average_gap,
        )
        yield Claim(
            3,
            f"MWU, best eta for T {T}. Value: gap after T steps",
            duality_gap(P, pi[-1]),
            "=",
            last_gap,
        )


def numbers_of_least_squares() -> Iterator[Claim]:
    distances = [l2_distance_to_mwu(P, START, eta) for eta in (1, 3, 10)]
    yield Claim(
        12,
        "SPPO's least squares and MWU, eta 1. "
        "Value: largest difference of a probability after one step",
        distances[0],
        "=",
        "2e-4",
    )
    yield Claim(
        12,
        "SPPO replaces log Z, where Z = E exp(eta P pi_1), by eta/2. Value: log Z - eta/2 at eta 1",
        float(np.log(START @ np.exp(P @ START)) - 0.5),
        "=",
        "0.0046",
    )
    yield Claim(
        12,
        "SPPO's least squares and MWU: the difference after one step increases from eta 1 to 3 "
        "to 10. Value: smallest increase",
        np.diff(distances).min(),
        ">=",
        "0",
    )
    yield Claim(
        12,
        "SPPO's least squares and MWU, eta 1000: both give the best response only. "
        "Value: largest difference of a probability after one step",
        l2_distance_to_mwu(P, START, 1000),
        "<=",
        "1e-12",
    )


def numbers_of_improvement() -> Iterator[Claim]:
    pi = play(mwu(P, START, 1.0), 300)
    for steps, wins in ((0, "0.5093"), (10, "0.5085"), (50, "0.5167"), (299, "0.5014")):
        yield Claim(
            16,
            f"MWU, eta 1. Value: P(pi_{steps + 2} beats pi_{steps + 1})",
            pi[steps + 1] @ P @ pi[steps],
            "=",
            wins,
        )
    yield Claim(
        16,
        "MWU, eta 1. Value: P(pi_301 beats pi_1)",
        pi[300] @ P @ pi[0],
        "=",
        "0.636",
    )
    for steps, gap in ((0, "0.28"), (300, "0.589")):
        yield Claim(
            16, f"MWU, eta 1. Value: gap of pi_{steps + 1}", duality_gap(P, pi[steps]), "=", gap
        )


# --- methods with a reference or a magnet, on comal3 ---


def numbers_of_regularised() -> Iterator[Claim]:
    """Methods with a reference or a magnet, on comal3."""
    yield from numbers_of_regularised_equilibrium(
        0.1, star=(0.274917, 0.279723, 0.445360), gap="0.0588", nash_md_bias="2e-4"
    )
    yield from numbers_of_regularised_equilibrium(
        0.3, star=(0.192251, 0.380156, 0.427593), gap="0.1888", nash_md_bias="3e-4"
    )
    scaled_gaps = []
    for T in HORIZONS:
        average = play(inpo(P, START, START, np.sqrt(T), 0.1), T - 1).mean(axis=0)
        scaled_gaps.append(regularised_gap(P, average, START, 0.1) * np.sqrt(T))
    yield Claim(
        5,
        "INPO, tau 0.1, eta sqrt(T): the regularised gap of the average of T policies falls at "
        "least as 1/sqrt(T). "
        f"Value: largest increase of gap times sqrt(T) over T = {', '.join(map(str, HORIZONS))}",
        max(np.diff(scaled_gaps)),
        "<=",
        "0",
    )
    yield from numbers_of_moving_magnet(
        0.3, every=50, gaps={1: "0.1888", 10: "0.0376", 50: "1.3e-5", 200: "1e-15"}
    )
    yield from numbers_of_moving_magnet(0.1, every=200, gaps={10: "6e-5", 50: "1e-15"})
    yield from numbers_of_settling()


def numbers_of_regularised_equilibrium(
    tau: float, star: tuple[float, ...], gap: str, nash_md_bias: str
) -> Iterator[Claim]:
    """pi*_tau compared with its printed value `star`, and the methods that converge to it."""
    pi_star = regularised_nash(P, START, tau)
    yield Claim(
        4,
        f"tau {tau}: pi*_tau is {star}. Value: largest error",
        np.abs(pi_star - star).max(),
        "<=",
        "5e-7",
    )
    yield Claim(
        4,
        f"tau {tau}. Value: gap of pi*_tau in the game without regularisation",
        duality_gap(P, pi_star),
        "=",
        gap,
    )
    to_star, near_star = "converges to pi*_tau", "converges to a policy near pi*_tau"
    for topic, name, limit, policies, relation, expected in (
        (5, "INPO, eta 2", to_star, inpo(P, START, START, 2, tau), "<=", "2e-17"),
        (6, "Nash-MD, eta 2", near_star, nash_md(P, START, START, 2, tau), "=", nash_md_bias),
        (7, "EGPO, eta 1/2", to_star, egpo(P, START, START, 0.5, tau), "<=", "2e-17"),
    ):
        yield Claim(
            topic,
            f"{name}, tau {tau}: {limit}. Value: KL(pi*_tau, pi_400)",
            kl(pi_star, play(policies, 399)[-1]),
            relation,
            expected,
        )
    path = divergences(pi_star, play(egpo(P, START, START, 0.5, tau), 100))
    above_rounding = path[1:] > 1e-20
    yield Claim(
        7,
        f"EGPO, eta 1/2, tau {tau}: K_t = KL(pi*_tau, pi_t) falls at a linear rate. "
        "Value: largest K_(t+1)/K_t of 100 steps",
        (path[1:] / path[:-1])[above_rounding].max(),
        "<=",
        "0.95",
    )


def numbers_of_moving_magnet(alpha: float, every: int, gaps: dict[int, str]) -> Iterator[Claim]:
    """MPO; `gaps` holds the expected gap of the magnet after k moves, by k."""
    magnets = play(mpo(P, START, 1.88, alpha, every), 200 * every)[::every]
    for k, gap in gaps.items():
        yield Claim(
            9,
            f"MPO, alpha {alpha}, eta 1.88, magnet moved every {every} steps. "
            f"Value: gap of the magnet after move {k}",
            duality_gap(P, magnets[k]),
            "<=" if gap == "1e-15" else "=",
            gap,
        )
    yield Claim(
        9,
        f"MPO, alpha {alpha}, eta 1.88, magnet moved every {every} steps: KL(pi*, magnet) never "
        "increases. Value: largest increase in 200 moves",
        max(np.diff(divergences(STAR, magnets))),
        "<=",
        "1e-15",
    )


def numbers_of_settling() -> Iterator[Claim]:
    """Which methods converge to the equilibrium of comal3."""
    for name, policies in (
        ("Iterative SPPO, eta 1", mwu(P, START, 1.0)),
        ("Iterative IPO, beta 2", iterative_ipo(P, START, 2.0)),
        ("Iterative DPO, beta 5", iterative_dpo(P, START, 5.0)),
    ):
        yield Claim(
            14,
            f"{name}: does not converge. Value: smallest gap after 1000 to 2000 steps",
            min(duality_gap(P, pi) for pi in play(policies, 2000)[1000:]),
            ">=",
            "0.2",
        )
    pi = play(inpo(P, START, START, 1.0, 0.3), 2000)
    yield Claim(
        14,
        "INPO, eta 1, tau 0.3: converges to pi*_tau, not to the equilibrium. "
        "Value: gap after 2000 steps",
        duality_gap(P, pi[2000]),
        "=",
        "0.1888",
    )
    yield Claim(
        14,
        "INPO, eta 1, tau 0.3: has converged after 1000 steps. "
        "Value: change of the gap from then to 2000 steps",
        abs(duality_gap(P, pi[2000]) - duality_gap(P, pi[1000])),
        "<=",
        "1e-12",
    )
    yield Claim(
        14,
        "COMAL, eta 1, tau 0.3, reference moved every 6 steps: converges to the equilibrium. "
        "Value: gap after 1500 steps",
        gap_after(comal(P, START, 1.0, 0.3), 1500),
        "<=",
        "1e-11",
    )
    yield Claim(
        14,
        "COMAL, eta 2, tau 0.1, reference moved every 6 steps: does not converge, because 6 steps "
        "are too few to come near pi*_tau. Value: gap after 3000 steps",
        gap_after(comal(P, START, 2.0, 0.1), 3000),
        ">=",
        "0.28",
    )


# --- rewards and scores ---


def numbers_of_bradley_terry() -> Iterator[Claim]:
    """What is lost when rewards are fitted to preferences (topic 11)."""
    r = bt_rewards(P)
    yield Claim(
        11,
        "comal3: the Bradley-Terry rewards of maximum likelihood are (-0.134, 0, 0.134). "
        "Value: largest error",
        np.abs(r - [-0.134, 0, 0.134]).max(),
        "<=",
        "5e-4",
    )
    yield Claim(
        11,
        "comal3. Value: largest error of a probability in P, computed from these rewards",
        np.abs(P - bradley_terry(r)).max(),
        "=",
        "0.367",
    )
    for pairs, beta, weights, gap in (
        ("uniform", 0.1, None, "0.217"),
        ("on-policy", 0.1, START, "0.599"),
        ("uniform", 0.001, None, "0.6"),
    ):
        yield Claim(
            11,
            f"comal3: DPO, beta {beta}, {pairs} pairs. Value: gap",
            duality_gap(P, offline_dpo(P, START, beta, weights)),
            "=",
            gap,
        )
    yield Claim(
        11,
        "comal3: iterative DPO, beta 5. Value: gap after 60 steps",
        gap_after(iterative_dpo(P, START, 5.0), 60),
        "=",
        "0.223",
    )
    for name, best in (
        ("rps", (0, 0, 0)),
        ("bt3", (1, 0, -1)),
        ("transitive_nonBT", (0.756307612615893, 0, -0.756307612615893)),
    ):
        yield Claim(
            11,
            f"{name}: the Bradley-Terry rewards of maximum likelihood are {best}. "
            "Value: largest error",
            np.abs(bt_rewards(GAMES[name].P) - best).max(),
            "<=",
            "1e-12",
        )


def numbers_of_estimates() -> Iterator[Claim]:
    """P-hat computed from logits, and what is lost when logits become scores (topic 13)."""
    yield from numbers_of_printed_estimates()
    yield from numbers_of_logits()


def numbers_of_printed_estimates() -> Iterator[Claim]:
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
        estimate = p_hat(win_probabilities(logits, probability, 1.0))
        yield Claim(
            13,
            f"pairs.probability {probability}: P-hat of given logits is {printed}. "
            "Value: largest error",
            np.abs(estimate - printed).max(),
            "<=",
            "5e-7",
        )


def numbers_of_logits() -> Iterator[Claim]:
    draw = np.random.default_rng(0)
    wins = win_probabilities(draw.normal(size=(5, 5)))
    yield Claim(
        13,
        "pairs.probability pairwise, random logits: P + P^T = 1, and the mean of P-hat is "
        "1/2. Value: largest error",
        max(np.abs(wins + wins.T - 1).max(), abs(p_hat(wins).mean() - 0.5)),
        "<=",
        "1e-15",
    )
    scores = draw.normal(size=(5, 1))
    additive = (scores - scores.T) / 2
    pairwise = p_hat(win_probabilities(additive, logit_scale=1.0))
    blender = p_hat(win_probabilities(additive, "blender"))
    yield Claim(
        13,
        "Logits that are differences of scores: P-hat is the same with pairs.probability "
        "pairwise and blender. Value: largest difference",
        np.abs(pairwise - blender).max(),
        "<=",
        "1e-15",
    )
    cycle = np.array([[0, 1, -1], [-1, 0, 1], [1, -1, 0.0]])
    yield Claim(
        13,
        "pairs.probability blender, logits of a cycle: the mean logit of every response is 0. "
        "Value: largest absolute mean logit",
        np.abs(mean_logits(cycle)).max(),
        "=",
        "0.000000000000",
    )
    yield Claim(
        13,
        "pairs.probability pairwise, logits of a cycle: P represents the cycle. "
        "Value: largest distance of a probability from 1/2",
        np.abs(win_probabilities(cycle) - 0.5).max(),
        ">=",
        "0.2",
    )


# --- learning from samples ---


def numbers_of_samples() -> Iterator[Claim]:
    """EGPO's two contrastive losses on a game of ten actions, exact and sampled."""
    game, beta, rate, n = random_game(10, seed=0), 0.1, 0.1, 10
    ref, draw = np.full(n, 1 / n), np.random.default_rng(0)
    star = regularised_nash(game.P, ref, beta)
    gradient = online_ipo_gradient(game.P, game.start, ref, beta, on_policy=False)
    moved = np.exp(np.log(game.start) - rate * gradient)
    # For the gradient of the loss itself. With half of the loss, as it is often written, the step
    # would be 2 rate / (beta n).
    step = 4 * rate / (beta * n)
    yield Claim(
        15,
        "Version 1: a gradient step is a step of INPO with tau = beta and "
        "1/eta = 4 (learning rate)/(beta n). Value: largest difference of a probability",
        np.abs(
            moved / moved.sum() - play(inpo(game.P, game.start, ref, 1 / step, beta), 1)[1]
        ).max(),
        "<=",
        "1e-12",
    )
    for version, on_policy in ((1, False), (2, True)):
        yield Claim(
            15,
            f"Version {version}: the gradient at pi*_tau is 0, with tau = beta. "
            "Value: largest absolute component",
            np.abs(online_ipo_gradient(game.P, star, ref, beta, on_policy)).max(),
            "<=",
            "1e-12",
        )
        rows = sampled_ipo_gradient(game.P, game.start, ref, beta, on_policy, 100_000, draw)
        exact = online_ipo_gradient(game.P, game.start, ref, beta, on_policy)
        standard_error = rows.std(axis=0) / np.sqrt(len(rows))
        yield Claim(
            15,
            f"Version {version}: the mean of 100,000 sampled gradients is close to the exact "
            "gradient. Value: largest difference, in standard errors",
            np.abs((rows.mean(axis=0) - exact) / standard_error).max(),
            "<=",
            "4",
        )
        log_pi = np.log(ref)
        for _ in range(1000):
            pi = np.exp(log_pi) / np.exp(log_pi).sum()
            rows = sampled_ipo_gradient(game.P, pi, ref, beta, on_policy, 100, draw)
            log_pi = log_pi - rate * rows.mean(axis=0)
        yield Claim(
            15,
            f"Version {version}, 100 samples for each step: the regularised gap falls. "
            "Value: gap of pi_1000 divided by gap of pi_1",
            regularised_gap(game.P, pi, ref, beta) / regularised_gap(game.P, ref, ref, beta),
            "<=",
            "0.05",
        )


if __name__ == "__main__":
    run(main)
