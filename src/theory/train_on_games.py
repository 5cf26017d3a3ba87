"""Whether the code trains what the theory says: small policies trained by the real loss and trainer, beside the exact update.

Reads   nothing: a random game over all two-letter strings of three letters, P known
Writes  trained_policies.json (what it shows, and checks), .csv (pi of every policy by iteration), .png and .svg; a record each
Two policies, a table of logits and a small transformer, take SPPO's step at eta = 1 three times in up to three ways:
  expected   on responses as often as they are likely, with their exact P(y beats pi)
  all K      on K sampled responses to each prompt, P-hat among them, each in two pairs
  ends       on winner and loser of them alone, the paper's section 5.1
The exact update is `sppo_l2` in src/sppo/theory/games.py. P-hat among K counts a response against itself, which is 1/2, so in expectation
P-hat - 1/2 is (K - 1)/K of P(y beats pi) - 1/2: with samples the exact update has eta (K - 1)/K.
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
from sppo.core.artifacts import recorded, write_json, write_text
from sppo.core.errors import run
from sppo.core.flags import at_least
from sppo.core.progress import progress
from sppo.reporting.figures import pyplot, save
from sppo.reporting.table_formats import csv_table
from sppo.theory import games as g
from sppo.theory.claims import check, report_checks

LETTERS, LENGTH, ETA, ITERATIONS, K = 3, 2, 1.0, 3, 5
GAME = g.random_game(LETTERS**LENGTH, seed=0)
WAYS = {"softmax table": ("expected", "all K", "ends"), "transformer": ("expected", "all K")}
NUMBER = 18  # among the checks


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--prompts",
        type=at_least(1),
        default=50,
        help="prompts to which K responses are sampled (default: %(default)s)",
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
        help="trained_policies.json; the other files go beside it",
    )
    args = parser.parse_args()
    files = [args.output, *(args.output.with_suffix(f".{form}") for form in ("csv", "png", "svg"))]
    with contextlib.ExitStack() as records:
        for artifact in files:
            records.enter_context(recorded("theory", artifact, [], vars(args)))
        iterates = {name: all_ways(name, args.prompts, args.seeds) for name in WAYS}
        checks, shows = judged(iterates)
        write_json(args.output, {"shows": shows, "checks": checks})
        write_text(
            files[1],
            csv_table(
                ["policy", "way", "seed", "iteration", *(f"pi {n}" for n in range(len(GAME.P)))],
                rows(iterates),
            ),
        )
        save(figure(iterates), files[2:])
    report_checks(checks, args.output)


def all_ways(name: str, prompts: int, seeds: int) -> dict[str, np.ndarray]:
    """pi by way: arrays (runs, ITERATIONS + 1, n). The expected way is one run."""
    jobs = [(way, seed) for way in WAYS[name] for seed in range(1 if way == "expected" else seeds)]
    found: dict[str, list[np.ndarray]] = {}
    for way, seed in progress(jobs, f"training the {name}"):
        found.setdefault(way, []).append(one_run(name, way, prompts, seed))
    return {way: np.array(runs) for way, runs in found.items()}


def one_run(name: str, way: str, prompts: int, seed: int) -> np.ndarray:
    """pi_0 ... pi_T, shape (T + 1, n), of one training."""
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
    if name == "transformer":
        model, responses, learning_rate, steps = (
            tiny_transformer(LETTERS, seed=0),
            strings(LETTERS, LENGTH),
            2e-3,
            160,
        )
    else:
        model, responses, learning_rate, steps = (
            SoftmaxTable(np.random.default_rng(0).dirichlet(np.full(n, 5.0))),
            strings(n, 1),
            5e-2,
            40,
        )
    pi = [probabilities(model, responses)]
    for _ in range(ITERATIONS):
        pairs = (
            expected_pairs(responses, pi[-1], GAME.P, rows=128)
            if way == "expected"
            else sampled_pairs(responses, pi[-1], GAME.P, K, prompts, draw, ends_only=way == "ends")
        )
        with tempfile.TemporaryDirectory() as work, contextlib.redirect_stdout(io.StringIO()):
            train(model, pairs, ETA, learning_rate, steps, Path(work))
        pi.append(probabilities(model, responses))
    return np.array(pi)


def exact(start: np.ndarray, eta: float) -> np.ndarray:
    """pi_0 ... pi_T by the exact update."""
    return g.play(g.sppo_l2(GAME.P, start / start.sum(), eta), ITERATIONS)


def apart(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Total variation."""
    return 0.5 * np.abs(p - q).sum(axis=-1)


def errors(runs: np.ndarray, eta: float) -> np.ndarray:
    """|mean over runs - exact update| in standard errors, of every response after every iteration."""
    spread = runs.std(axis=0, ddof=1) / np.sqrt(len(runs))
    return np.abs(runs.mean(axis=0) - exact(runs[0, 0], eta))[1:] / spread[1:]


def judged(iterates: dict[str, dict[str, np.ndarray]]) -> tuple[list[dict[str, Any]], str]:
    """The checks, and in words what was found."""
    checks, words, sampled = [], [], ETA * (K - 1) / K
    for name, ways in iterates.items():
        start = ways["expected"][0, 0]
        distance = apart(ways["expected"][0], exact(start, ETA))[1:].max()
        moved = apart(exact(start, ETA)[-1], start)
        off = errors(ways["all K"], sampled).max()
        goal = exact(start, sampled)[-1]
        checks += [
            check(
                NUMBER,
                f"{name}, expected pairs: largest total variation to the exact update",
                distance,
                "<=",
                "0.02",
                "random",
            ),
            check(
                NUMBER,
                f"{name}, all K sampled: largest distance to it in standard errors",
                off,
                "<=",
                "4",
                "random",
            ),
            check(
                NUMBER,
                f"{name}: total variation between first and last policy, which these are to be held against",
                moved,
                ">=",
                "0.05",
                "random",
            ),
        ]
        words.append(
            f"The {name} moves {moved:.3f} in total variation over {ITERATIONS} iterations. In expectation it stays within {distance:.4f} of the exact "
            f"update; with all of K = {K} samples the mean of {len(ways['all K'])} runs ends {apart(ways['all K'][:, -1].mean(axis=0), goal):.3f} from it, and no "
            f"response is ever more than {off:.1f} standard errors off."
        )
        if "ends" in ways:
            words.append(
                f"With winner and loser alone the mean ends {apart(ways['ends'][:, -1].mean(axis=0), goal):.3f} away, for each step goes "
                f"{stretch(ways['ends']):.2f} times as far: the P-hat that chooses them is then their target, so its error is part of the target. That is "
                "the bias that selection adds, and part of what the practical method does."
            )
    return checks, " ".join(words)


def stretch(runs: np.ndarray) -> float:
    """How far the first iteration went, in steps of the exact update: the slope of its log-ratios over those of the exact one."""
    wanted = np.log(exact(runs[0, 0], ETA * (K - 1) / K)[1] / runs[0, 0])
    found = np.log(runs[:, 1].mean(axis=0) / runs[0, 0])
    return float(np.polyfit(wanted, found, 1)[0])


def rows(iterates: dict[str, dict[str, np.ndarray]]) -> list[list[str]]:
    """Lines of the table; the exact updates stand beside the trained ones."""
    lines = []
    for name, ways in iterates.items():
        start = ways["expected"][0, 0]
        exactly = {
            "exact": exact(start, ETA)[None],
            "exact, eta (K - 1)/K": exact(start, ETA * (K - 1) / K)[None],
        }
        for way, runs in (ways | exactly).items():
            lines += [
                [name, way, str(seed), str(t), *(f"{p:.6f}" for p in pi)]
                for seed, one in enumerate(runs)
                for t, pi in enumerate(one)
            ]
    return lines


def figure(iterates: dict[str, dict[str, np.ndarray]]) -> Any:
    """Left, how far from the exact update; right, the transformer's last policy response by response."""
    drawn, (left, right) = pyplot().subplots(1, 2, figsize=(10, 4), layout="constrained")
    for (name, ways), dashes in zip(iterates.items(), ("-", "--")):
        for (way, runs), (colour, marker) in zip(
            ways.items(), (("#0072B2", "o"), ("#009E73", "s"), ("#D55E00", "^"))
        ):
            goal = exact(runs[0, 0], ETA if way == "expected" else ETA * (K - 1) / K)
            left.plot(
                range(1, ITERATIONS + 1),
                apart(runs.mean(axis=0), goal)[1:],
                color=colour,
                marker=marker,
                linestyle=dashes,
                label=f"{name}, {way}",
            )
    left.axhline(0.02, color="0.6", linewidth=1, linestyle=":")
    left.set(
        xlabel="iteration",
        ylabel="total variation to the exact update",
        yscale="log",
        xticks=range(1, ITERATIONS + 1),
        title="Mean of the runs",
    )
    left.legend(frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    runs = iterates["transformer"]["all K"][:, -1]
    names = ["".join("abc"[letter] for letter in divmod(n, LETTERS)) for n in range(len(GAME.P))]
    right.bar(
        names,
        exact(iterates["transformer"]["all K"][0, 0], ETA * (K - 1) / K)[-1],
        color="0.85",
        label="exact update",
    )
    right.errorbar(
        names,
        runs.mean(axis=0),
        yerr=4 * runs.std(axis=0, ddof=1) / np.sqrt(len(runs)),
        color="#009E73",
        marker="s",
        linestyle="none",
        capsize=3,
        label="all K sampled, 4 standard errors",
    )
    right.set(
        xlabel="response",
        ylabel=f"probability after {ITERATIONS} iterations",
        title="The transformer",
    )
    right.legend(frameon=False, fontsize=8)
    return drawn


if __name__ == "__main__":
    run(main)
