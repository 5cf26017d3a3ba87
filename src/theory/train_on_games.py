"""Check that the code trains what the theory says: small policies, compared with the exact update.

Reads   nothing; the game is a random one with known P over all two-letter strings of three letters
Writes  trained_policies.json (findings, a text, and checks), .csv (pi of every policy by
        iteration), .png and .svg; a record of each file

The real loss and trainer train two policies, a table of logits and a small transformer. Each takes
three iterations of SPPO at eta = 1, in two or three ways, which differ in the pairs:
  expected          every response in proportion to its probability, with the exact P(y beats pi)
  all K             K sampled responses for each prompt, with P-hat estimated among them; each
                    response is in two pairs
  winner and loser  the winner and the loser of these K responses, as in the paper's section 5.1
The exact update is `sppo_l2` in src/sppo/theory/games.py. P-hat among K responses counts each
response against itself, with 1/2. In expectation, P-hat - 1/2 is therefore (K - 1)/K times
P(y beats pi) - 1/2, so that the exact update for samples has eta (K - 1)/K.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import _path  # noqa: F401
from sppo.core.artifacts import recorded_all, write_json, write_text
from sppo.core.errors import run
from sppo.core.flags import at_least
from sppo.core.progress import progress
from sppo.reporting.figures import pyplot, save
from sppo.reporting.table_formats import csv_table
from sppo.theory.claims import Claim, check, report_checks
from sppo.theory.games import play, random_game, sppo_l2

LETTERS, LENGTH = 3, 2
ETA, ITERATIONS, K = 1.0, 3, 5
SAMPLED_ETA = ETA * (K - 1) / K  # of the exact update for samples; see above
GAME = random_game(LETTERS**LENGTH, seed=0)
WAYS = {
    "softmax table": ("expected", "all K", "winner and loser"),
    "transformer": ("expected", "all K"),
}
TOPIC = 18  # of these checks, in sppo.theory.claims.TOPICS
Iterates = dict[str, dict[str, np.ndarray]]  # pi by policy and way, (runs, ITERATIONS + 1, n)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--prompts",
        type=at_least(1),
        default=50,
        help="prompts for which K responses are sampled (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds",
        type=at_least(2),
        default=10,
        help="runs whose spread gives the standard error (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="trained_policies.json; the other files are written to the same folder",
    )
    args = parser.parse_args()
    table, *images = (args.output.with_suffix(f".{form}") for form in ("csv", "png", "svg"))
    with recorded_all("theory", (args.output, table, *images), [], vars(args)):
        iterates = {name: all_ways(name, args.prompts, args.seeds) for name in WAYS}
        checks = all_checks(iterates)
        write_json(args.output, {"findings": findings(iterates), "checks": checks})
        columns = ["policy", "pairs", "seed", "iteration"]
        columns += [f"pi(response {n})" for n in range(len(GAME.P))]
        write_text(table, csv_table(columns, rows(iterates)))
        save(figure(iterates), images)
    report_checks(checks, args.output)


def all_ways(name: str, prompts: int, seeds: int) -> dict[str, np.ndarray]:
    """pi of the named policy by way, arrays (runs, ITERATIONS + 1, n).

    The way `expected` is one run, because nothing in it is random.
    """
    jobs = []
    for way in WAYS[name]:
        runs = 1 if way == "expected" else seeds
        jobs += [(way, seed) for seed in range(runs)]
    iterates: dict[str, list[np.ndarray]] = {}
    for way, seed in progress(jobs, f"training the {name}"):
        iterates.setdefault(way, []).append(one_run(name, way, prompts, seed))
    return {way: np.array(runs) for way, runs in iterates.items()}


def one_run(name: str, way: str, prompts: int, seed: int) -> np.ndarray:
    """pi_0, ..., pi_T of one training, shape (T + 1, n) with T = ITERATIONS."""
    from sppo.theory.small_policies import (
        SoftmaxTable,
        expected_pairs,
        probabilities,
        sampled_pairs,
        strings,
        tiny_transformer,
        train,
    )

    draw = np.random.default_rng(seed)
    n = len(GAME.P)
    model: Any
    if name == "transformer":
        model = tiny_transformer(LETTERS, seed=0)
        responses = strings(LETTERS, LENGTH)
        learning_rate, steps = 2e-3, 160
    else:
        model = SoftmaxTable(np.random.default_rng(0).dirichlet(np.full(n, 5.0)))
        responses = strings(n, 1)
        learning_rate, steps = 5e-2, 40
    pi = [probabilities(model, responses)]
    for _ in range(ITERATIONS):
        if way == "expected":
            pairs = expected_pairs(responses, pi[-1], GAME.P, rows=128)
        else:
            ends_only = way == "winner and loser"
            pairs = sampled_pairs(responses, pi[-1], GAME.P, K, prompts, draw, ends_only)
        with tempfile.TemporaryDirectory() as work, contextlib.redirect_stdout(io.StringIO()):
            train(model, pairs, ETA, learning_rate, steps, Path(work))
        pi.append(probabilities(model, responses))
    return np.array(pi)


def exact(start: np.ndarray, eta: float) -> np.ndarray:
    """pi_0, ..., pi_T by the exact update, shape (T + 1, n) with T = ITERATIONS."""
    return play(sppo_l2(GAME.P, start / start.sum(), eta), ITERATIONS)


def total_variation(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Total variation distance over the last axis, (..., n) to (...)."""
    return 0.5 * np.abs(p - q).sum(axis=-1)


def errors(runs: np.ndarray, eta: float) -> np.ndarray:
    """|mean over runs - exact update| in standard errors, (ITERATIONS, n)."""
    standard_error = runs.std(axis=0, ddof=1) / np.sqrt(len(runs))
    return np.abs(runs.mean(axis=0) - exact(runs[0, 0], eta))[1:] / standard_error[1:]


def distance_in_expectation(ways: dict[str, np.ndarray]) -> float:
    """Largest total variation between the policies of the way `expected` and the exact update."""
    pi = ways["expected"][0]
    return total_variation(pi, exact(pi[0], ETA))[1:].max()


def distance_moved(ways: dict[str, np.ndarray]) -> float:
    """Total variation between the first policy and the last one of the exact update."""
    start = ways["expected"][0, 0]
    return float(total_variation(exact(start, ETA)[-1], start))


def distance_at_end(ways: dict[str, np.ndarray], way: str) -> float:
    """Total variation between the mean of the last policies and the exact update for samples."""
    last = exact(ways["expected"][0, 0], SAMPLED_ETA)[-1]
    return float(total_variation(ways[way][:, -1].mean(axis=0), last))


def all_checks(iterates: Iterates) -> list[dict[str, Any]]:
    """Three checks of each policy."""
    claims = []
    for name, ways in iterates.items():
        subject = name.capitalize()
        claims += [
            Claim(
                TOPIC,
                f"{subject}, expected pairs: close to the exact update. "
                "Value: largest total variation",
                distance_in_expectation(ways),
                "<=",
                "0.02",
            ),
            Claim(
                TOPIC,
                f"{subject}, pairs of all K samples: the mean of the runs is close to the exact "
                "update. Value: largest difference of a probability, in standard errors",
                errors(ways["all K"], SAMPLED_ETA).max(),
                "<=",
                "4",
            ),
            Claim(
                TOPIC,
                f"{subject}: the exact update changes the policy by much more than these "
                f"distances. Value: total variation in {ITERATIONS} iterations",
                distance_moved(ways),
                ">=",
                "0.05",
            ),
        ]
    return [check(claim, f"random{len(GAME.P)}") for claim in claims]


def findings(iterates: Iterates) -> str:
    """What was found, in words: one or two lines for each policy."""
    sentences = []
    for name, ways in iterates.items():
        sentences.append(
            f"{name.capitalize()}: the exact update moves the policy by "
            f"{distance_moved(ways):.3f} in {ITERATIONS} iterations, in total variation. "
            "The policy trained on expected pairs is at most "
            f"{distance_in_expectation(ways):.4f} away from the exact update. "
            f"With pairs of all K = {K} samples, the mean of {len(ways['all K'])} runs is "
            f"{distance_at_end(ways, 'all K'):.3f} away after the last iteration. In all "
            "iterations, each probability is within "
            f"{errors(ways['all K'], SAMPLED_ETA).max():.1f} standard errors of the exact one."
        )
        if "winner and loser" in ways:
            runs = ways["winner and loser"]
            sentences.append(
                "With only the winner and the loser, the mean is "
                f"{distance_at_end(ways, 'winner and loser'):.3f} away after the last iteration: "
                f"in the first iteration, the log-ratios are {stretch(runs):.2f} times the exact "
                "ones. The reason: P-hat selects the pair and is also its target, so the error "
                "of P-hat becomes a bias of the target. The paper's practical method selects in "
                "the same way."
            )
    return "\n".join(sentences)


def stretch(runs: np.ndarray) -> float:
    """The size of the first iteration, in steps of the exact update.

    It is the slope of a line fitted to the log-ratios log pi_1/pi_0 over those of the exact update.
    """
    start = runs[0, 0]
    exact_ratios = np.log(exact(start, SAMPLED_ETA)[1] / start)
    trained_ratios = np.log(runs[:, 1].mean(axis=0) / start)
    return float(np.polyfit(exact_ratios, trained_ratios, 1)[0])


def rows(iterates: Iterates) -> list[list[str]]:
    """Lines of the table: the trained policies, then the exact updates."""
    lines = []
    for name, ways in iterates.items():
        start = ways["expected"][0, 0]
        exact_updates = {
            "exact update": exact(start, ETA)[None],
            "exact update, eta (K - 1)/K": exact(start, SAMPLED_ETA)[None],
        }
        for way, runs in (ways | exact_updates).items():
            for seed, run_policies in enumerate(runs):
                for t, pi in enumerate(run_policies):
                    lines.append([name, way, str(seed), str(t), *(f"{p:.6f}" for p in pi)])
    return lines


def figure(iterates: Iterates) -> Any:
    """Left: distance from the exact update. Right: the transformer's last policy, by response."""
    drawn, (left, right) = pyplot().subplots(1, 2, figsize=(10, 4), layout="constrained")
    draw_distances(left, iterates)
    draw_transformer(right, iterates["transformer"]["all K"])
    return drawn


def draw_distances(axes: Any, iterates: Iterates) -> None:
    """Total variation between the mean of the runs and the exact update, by iteration."""
    colours_and_markers = (("#0072B2", "o"), ("#009E73", "s"), ("#D55E00", "^"))
    for (name, ways), dashes in zip(iterates.items(), ("-", "--")):
        for (way, runs), (colour, marker) in zip(ways.items(), colours_and_markers):
            goal = exact(runs[0, 0], ETA if way == "expected" else SAMPLED_ETA)
            axes.plot(
                range(1, ITERATIONS + 1),
                total_variation(runs.mean(axis=0), goal)[1:],
                color=colour,
                marker=marker,
                linestyle=dashes,
                label=f"{name}, {way}",
            )
    axes.axhline(0.02, color="0.6", linewidth=1, linestyle=":")
    axes.set(
        xlabel="iteration",
        ylabel="total variation",
        yscale="log",
        xticks=range(1, ITERATIONS + 1),
        title="Distance between the mean of the runs and the exact update",
    )
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15))


def draw_transformer(axes: Any, runs: np.ndarray) -> None:
    """The transformer's probabilities after the last iteration, with the exact update."""
    names = ["".join("abc"[letter] for letter in divmod(n, LETTERS)) for n in range(len(GAME.P))]
    axes.bar(names, exact(runs[0, 0], SAMPLED_ETA)[-1], color="0.85", label="exact update")
    last = runs[:, -1]
    axes.errorbar(
        names,
        last.mean(axis=0),
        yerr=4 * last.std(axis=0, ddof=1) / np.sqrt(len(last)),
        color="#009E73",
        marker="s",
        linestyle="none",
        capsize=3,
        label="pairs of all K samples, 4 standard errors",
    )
    axes.set(
        xlabel="response",
        ylabel=f"probability after {ITERATIONS} iterations",
        title="The transformer's policy",
    )
    axes.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    run(main)
