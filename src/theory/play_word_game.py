"""Check on a pretrained language model that the trainer trains what SPPO's theory says.

Reads   a policy, the embedded SmolLM2-135M-Instruct in the workflow
Writes  word_game.json (checks and settings), word_game.csv (one line an iteration),
        word_game_words.csv (one line a word and iteration), word_game.png and .svg, and the page
        word_game.md; a record of each file
Paper   2405.00675, eq. (4.1) and (4.6), theorem 4.1

The policy answers a few-shot prompt with one of n words. P(word beats word) is given by a cyclic
game, as in rock, paper, scissors. The policy's probabilities of the words are computed exactly, and
with them P(y beats pi_t), the targets, and the exact update. The real loss and trainer then train
the policy, in float32, on pairs that contain every word, and the next iteration starts from it.

The same study trains mutants, each with one mistake. They must fail, or the study shows nothing.
The expected results are written in src/sppo/theory/word_game.py. The learning rate and the numbers
of optimiser steps were chosen on the first iteration with eta = 4.

Departs from the paper: P-hat is not estimated from K samples; all words are trained on, not only
winner and loser; one prompt; a larger learning rate, because there are few steps.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import softmax

import _path  # noqa: F401
from sppo.core.artifacts import recorded_all, write_json, write_text
from sppo.core.errors import UserError, run
from sppo.core.flags import at_least
from sppo.core.progress import progress
from sppo.reporting.figures import pyplot, save
from sppo.reporting.table_formats import csv_table, markdown_table
from sppo.theory.claims import check, report_checks
from sppo.theory.games import duality_gap, mwu, play
from sppo.theory.word_game import (
    CORRECT,
    DEPARTURE,
    MUTANTS,
    R2,
    SLOPE_ERROR,
    TV_SHARE,
    WIN_ERROR,
    Measures,
    Step,
    average_gap,
    correct_claims,
    cyclic_game,
    measure,
    mutant_claim,
    total_variation,
)

if TYPE_CHECKING:
    from sppo.theory.word_policy import WordPolicy

WIN = 0.95  # P(winner beats loser) of the cyclic game
# Optimiser steps by eta. Larger targets need more of them.
STEPS = {1.0: 16, 4.0: 16, 16.0: 24, 1000.0: 24}
REACHABLE = 100.0  # nats; larger targets can only give a direction
MUTANT_ETA = 4.0
LEARNING_RATE = 2e-5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", type=Path, required=True)
    parser.add_argument(
        "--words",
        nargs="+",
        default=["rock", "paper", "scissors", "Spock", "lizard"],
        help="an odd number of words; word i beats word j if (i - j) mod n is odd "
        "(default: %(default)s)",
    )
    parser.add_argument("--iterations", type=at_least(2), default=3, help="default: %(default)s")
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE)
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="word_game.md; the other files are written to the same folder",
    )
    args = parser.parse_args()
    words = tuple(args.words)
    if len(words) < 3 or len(words) % 2 == 0 or len(set(words)) < len(words):
        raise UserError(
            f"--words {' '.join(words)}: give an odd number of different words, 3 or more"
        )
    from sppo.policies.devices import start_torch
    from sppo.theory.word_policy import WordPolicy

    start_torch()
    data, by_word, facts, *images = (
        args.output.with_name(f"{args.output.stem}{end}")
        for end in (".csv", "_words.csv", ".json", ".png", ".svg")
    )
    artifacts = (args.output, data, by_word, facts, *images)
    with recorded_all("theory", artifacts, [args.policy], vars(args)):
        policy = WordPolicy(args.policy, words, words[::-1])
        # By the number of examples in the prompt; the study uses as many as there are words.
        masses = {
            copies * len(words): float(np.exp(policy.log_probabilities(words[::-1] * copies)).sum())
            for copies in (0, 1, 2, 4)
        }
        steps = all_steps(policy, cyclic_game(len(words), WIN), args.iterations, args.learning_rate)
        checks = all_checks(steps)
        tokens = [len(response) for response in policy.responses]
        write_json(
            facts,
            {"tokens": dict(zip(words, tokens)), "mass_by_examples": masses, "checks": checks},
        )
        write_text(
            data, csv_table(["eta", "variant", "iteration", *Measures._fields], lines(steps))
        )
        write_text(by_word, csv_table(WORD_COLUMNS, word_lines(steps, words, tokens)))
        save(figure(steps), images)
        write_text(args.output, page(steps, words, tokens, masses, checks, args.learning_rate))
    report_checks(checks, facts)


def all_steps(
    policy: WordPolicy, P: np.ndarray, iterations: int, learning_rate: float
) -> list[Step]:
    """Every trained iteration: the correct ones of each eta in their order, then the mutants."""
    from sppo.theory.word_policy import play_iteration

    base = policy.weights()
    jobs = [(eta, CORRECT, t) for eta in STEPS for t in range(1, iterations + 1)]
    jobs += [(MUTANT_ETA, mutant, t) for mutant, t in MUTANTS.items()]
    # The correct policies from which mutants start, by the number of the iteration.
    starts = {1: base}
    steps = []
    for eta, variant, t in progress(jobs, "training on the word game"):
        if variant != CORRECT:
            policy.restore(starts[t])
        elif t == 1:
            policy.restore(base)
        elif eta == MUTANT_ETA and t in MUTANTS.values():
            starts[t] = policy.weights()
        settings = (learning_rate, STEPS[eta])
        steps.append(play_iteration(policy, P, eta, variant, t, base, *settings))
        result = measure(steps[-1])
        print(
            f"eta {eta:g}, {variant}, iteration {t}: slope {result.slope:.3f}, R^2 "
            f"{result.r2:.3f}, TV to the exact update {result.tv_trained:.4f} of "
            f"{result.tv_moved:.4f}, P(new beats old) {result.wins:.3f}",
            flush=True,
        )
    return steps


def correct_steps(steps: list[Step], eta: float) -> list[Step]:
    """The correct iterations of one eta, in their order."""
    return [step for step in steps if step.eta == eta and step.variant == CORRECT]


def mutant_steps(steps: list[Step]) -> list[Step]:
    """The trained mutants."""
    return [step for step in steps if step.variant != CORRECT]


def is_reachable(steps: list[Step]) -> bool:
    """Whether the targets of the first iteration can be reached."""
    return bool(np.abs(steps[0].target).max() < REACHABLE)


def all_checks(steps: list[Step]) -> list[dict[str, Any]]:
    """The claims about every eta, then one about each mutant."""
    claims = []
    for eta in STEPS:
        correct = correct_steps(steps, eta)
        claims += correct_claims(correct, is_reachable(correct))
    claims += [mutant_claim(step) for step in mutant_steps(steps)]
    return [check(claim, "words") for claim in claims]


def lines(steps: list[Step]) -> list[list[str]]:
    """Lines of word_game.csv."""
    return [
        [f"{step.eta:g}", step.variant, str(step.iteration)]
        + [f"{value:.6g}" for value in measure(step)]
        for step in steps
    ]


WORD_COLUMNS = [
    "eta",
    "variant",
    "iteration",
    "word",
    "tokens",
    "log_pi_before",
    "target",
    "log_ratio",
    "pi_before",
    "pi_trained",
    "pi_exact",
    "pi_of_loss",
]


def word_lines(steps: list[Step], words: tuple[str, ...], tokens: list[int]) -> list[list[str]]:
    """Lines of word_game_words.csv; the last four columns are over the words alone."""
    rows = []
    for step in steps:
        name = [f"{step.eta:g}", step.variant, str(step.iteration)]
        columns = zip(
            step.before,
            step.target,
            step.log_ratio,
            softmax(step.before),
            softmax(step.after),
            step.exact,
            step.of_minimiser,
        )
        for word, length, values in zip(words, tokens, columns):
            rows.append([*name, word, str(length), *(f"{value:.6g}" for value in values)])
    return rows


def figure(steps: list[Step]) -> Any:
    """Realised log-ratio over target for each eta, the mutants, and distances to the update."""
    drawn, panels = pyplot().subplots(2, 3, figsize=(13, 7.5), layout="constrained")
    for axes, eta in zip(panels.flat, STEPS):
        draw_log_ratios(axes, correct_steps(steps, eta), f"eta = {eta:g}")
    draw_mutants(panels[1, 1], mutant_steps(steps))
    draw_distances(panels[1, 2], steps)
    return drawn


def draw_log_ratios(axes: Any, steps: list[Step], title: str) -> None:
    """Each word's realised log-ratio over its target, by iteration."""
    for step, colour, marker in zip(steps, ("#0072B2", "#D55E00", "#009E73"), "os^"):
        axes.plot(
            step.target,
            step.log_ratio,
            color=colour,
            marker=marker,
            linestyle="none",
            label=f"iteration {step.iteration}",
        )
    draw_diagonal(axes, steps)
    axes.set(title=title)
    axes.legend(frameon=False, fontsize=8)


def draw_diagonal(axes: Any, steps: list[Step]) -> None:
    """Axes of targets and log-ratios, and the line on which they are equal."""
    largest = max(np.abs(step.target).max() for step in steps)
    axes.plot([-largest, largest], [-largest, largest], color="0.6", linewidth=1, linestyle=":")
    axes.set(xlabel="target (nats)", ylabel="realised log-ratio (nats)")


def draw_mutants(axes: Any, steps: list[Step]) -> None:
    """The log-ratios of the mutants, over the targets of the correct loss."""
    colours = ("#E69F00", "#56B4E9", "#CC79A7", "#D55E00", "#000000")
    for step, colour, marker in zip(steps, colours, "os^Dv"):
        order = np.argsort(step.target)
        axes.plot(
            step.target[order],
            step.log_ratio[order],
            color=colour,
            marker=marker,
            linewidth=0.8,
            label=step.variant,
        )
    draw_diagonal(axes, steps)
    axes.set(title=f"mutants, eta = {MUTANT_ETA:g}")
    axes.legend(frameon=False, fontsize=7)


def draw_distances(axes: Any, steps: list[Step]) -> None:
    """TV to the exact update as a share of what it moves, of every trained iteration."""
    names = [f"eta {eta:g}" for eta in STEPS] + list(MUTANTS)
    for step in steps:
        name = f"eta {step.eta:g}" if step.variant == CORRECT else step.variant
        axes.plot(
            measure(step).tv_share,
            names.index(name),
            color="#0072B2" if step.variant == CORRECT else "#D55E00",
            marker="o" if step.variant == CORRECT else "x",
        )
    axes.axvline(TV_SHARE, color="0.6", linewidth=1, linestyle=":")
    axes.set(
        xlabel="TV trained / TV moved",
        yticks=range(len(names)),
        yticklabels=names,
        title="Distance to the exact update",
    )
    axes.invert_yaxis()


def page(
    steps: list[Step],
    words: tuple[str, ...],
    tokens: list[int],
    masses: dict[int, float],
    checks: list[dict[str, Any]],
    learning_rate: float,
) -> str:
    """word_game.md: what was done, the figure, the tables, and every check."""
    hold = sum(entry["holds"] for entry in checks)
    start = softmax(steps[0].before)
    listed = ", ".join(
        f"{word} {p:.3f} ({length} tokens)" for word, p, length in zip(words, start, tokens)
    )
    by_examples = ", ".join(f"{mass:.3f} with {number}" for number, mass in masses.items())
    numbers = ", ".join(f"{count} for eta {eta:g}" for eta, count in STEPS.items())
    return f"""# A game on the pretrained model

Does the trainer train what the theory says, on a real language model? The base answers a few-shot
prompt with one of {len(words)} words. A cyclic game gives P: each word beats {len(words) // 2}
others with probability {WIN:g}, and loses to the rest. The probabilities of the words are computed
from the model, as the sum over a word's tokens and the end token. Therefore every target,
eta (P(y beats pi_t) - 1/2), and every exact update (eq. 4.1) is known. The project's loss and
trainer then train the model: float32, RMSProp, learning rate {learning_rate:g}, all words in every
step. Optimiser steps in an iteration: {numbers}.

The words hold {np.exp(steps[0].before).sum():.3f} of the base's probability. This depends on the
number of example answers in the prompt: {by_examples}. The study uses {len(words)} examples, each
word once, because longer prompts cost more time.

Over the words alone the base is: {listed}.
All policies below are over the words alone.

**{hold} of {len(checks)} checks hold.** The program states them before it trains. A mutant's check
holds if the mutant fails.

![word_game](word_game.png)

Dotted: log-ratio = target. On the lower right, the dotted line is the largest share that passes,
and a policy that does not move has 1.

## Iterations

Slope and R^2: the words' realised log-ratios on their targets. TV: total variation; "moved" is
from pi_t to the exact update, "trained" from the trained policy to it, "loss" from the trained
policy to the minimiser of the loss, "limit" from this minimiser to the exact update. Share: trained
over moved. Mass: the words' share of all probability after the iteration. P: the probability that
the new policy beats the old one, beside that of the exact update.

{iteration_table(steps)}
{limit_text(steps)}

## Mutants

Each has one mistake, at eta = {MUTANT_ETA:g}. It fails if |slope - 1| is above
{DEPARTURE * SLOPE_ERROR:g} or the share is above {DEPARTURE * TV_SHARE:g}: twice what the correct
loss may have.

{iteration_table(mutant_steps(steps), mutants=True)}
## Duality gap

The gap is 0 at the equilibrium and at most {2 * (WIN - 0.5):g} here. The last policy may move away
from the equilibrium, as theory says; theorem 4.1 bounds the gap of the average of pi_1 to pi_T. At
so few iterations the bound says little: it is above the largest possible gap wherever it is above
{2 * (WIN - 0.5):g}. "Exact play" is multiplicative weights from the base for all iterations,
without any training. TV is between its last policy and the trained one.

{gap_table(steps)}
## Checks

Largest |slope - 1| {SLOPE_ERROR:g}, smallest R^2 {R2:g}, largest share {TV_SHARE:g}, largest
difference of P {WIN_ERROR:g}. The reasons are in `src/sppo/theory/word_game.py`.

{check_table(checks)}
Data: [word_game.csv](word_game.csv), and by word
[word_game_words.csv](word_game_words.csv). Made by `snakemake --cores all word_game`.
"""


def limit_text(steps: list[Step]) -> str:
    """What the loss itself can reach, and what happens with unreachable targets, in words."""
    correct = [correct_steps(steps, eta) for eta in STEPS]
    reachable = [step for of_eta in correct if is_reachable(of_eta) for step in of_eta]
    largest = max(reachable, key=lambda step: measure(step).tv_limit)
    limit = measure(largest)
    text = (
        "The paper replaces log Z by eta/2. The targets then ask for probabilities whose sum is "
        "not 1. As long as\nthe words hold only a part of all probability, the rest can pay for "
        "it. Otherwise no policy reaches all\ntargets, and the minimiser of the loss is not the "
        "exact update. Among the reachable targets, the largest\ndistance of the two is "
        f"{limit.tv_limit:.3f}, for eta = {largest.eta:g} in iteration {largest.iteration}, where "
        f"the minimiser's own slope is {limit.minimiser_slope:.3f}."
    )
    for of_eta in correct:
        if is_reachable(of_eta):
            continue
        ratios = np.array([step.log_ratio for step in of_eta])
        targets = [np.abs(step.target).max() for step in of_eta]
        slopes = ", ".join(f"{measure(step).slope:.3f}" for step in of_eta)
        text += (
            f"\n\nWith eta = {of_eta[0].eta:g}, targets reach {max(targets):.0f} nats. No training "
            "is expected to reach them, only to go in\ntheir direction. The realised log-ratios "
            f"are between {ratios.min():.1f} and {ratios.max():.1f} nats, and the slopes\nare "
            f"{slopes}."
        )
    return text


def iteration_table(steps: list[Step], mutants: bool = False) -> str:
    """A line for each iteration: of the mutants, or of the correct policies."""
    head = ["eta", "iteration", "largest target", "slope", "R^2", "TV moved", "trained", "share"]
    head += ["loss", "limit", "mass", "P new", "P exact"]
    rows = []
    for step in steps:
        if (step.variant == CORRECT) == mutants:
            continue
        m = measure(step)
        first = step.variant if mutants else f"{step.eta:g}"
        rows.append([first, str(step.iteration), f"{m.largest_target:.2f}", f"{m.slope:.3f}"])
        values = (m.r2, m.tv_moved, m.tv_trained, m.tv_share, m.tv_loss, m.tv_limit, m.mass_after)
        rows[-1] += [f"{value:.3f}" for value in (*values, m.wins, m.wins_exact)]
    if mutants:
        head[0] = "mutant"
    return markdown_table(head, rows)


def gap_table(steps: list[Step]) -> str:
    """Duality gaps for each eta, of the trained policies and of exact play."""
    rows = []
    for eta in STEPS:
        correct = correct_steps(steps, eta)
        start, last = softmax(correct[0].before), softmax(correct[-1].after)
        exact = play(mwu(correct[0].P, start, eta), len(correct))
        average = average_gap(correct)
        values = (
            duality_gap(correct[0].P, start),
            duality_gap(correct[0].P, last),
            duality_gap(correct[0].P, exact[-1]),
            total_variation(last, exact[-1]),
            average.gap,
            duality_gap(correct[0].P, exact[:-1].mean(axis=0)),
            average.bound,
        )
        rows.append([f"{eta:g}", str(average.T), *(f"{value:.3f}" for value in values)])
    head = ["eta", "T", "gap of base", "last", "last, exact play", "TV", "average"]
    return markdown_table([*head, "average, exact play", "bound"], rows)


def check_table(checks: list[dict[str, Any]]) -> str:
    """A line for each check."""
    return markdown_table(
        ["claim", "value", "expected", "holds"],
        [
            [
                entry["claim"],
                f"{entry['value']:.4g}",
                f"{entry['relation']} {entry['expected']:g}",
                "yes" if entry["holds"] else "**no**",
            ]
            for entry in checks
        ],
    )


if __name__ == "__main__":
    run(main)
