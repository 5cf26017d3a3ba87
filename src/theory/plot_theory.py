"""Plot what each method does on a game that can be solved exactly, and write a page about it.

Reads   checks.json of the same game; optionally trained_policies.json; a user's game
        (--game FILE.csv), otherwise the embedded game comal3 is used
Writes  README.md, and in the same folder for each figure a table (.csv) and the figure (.png and
        .svg); a record of each file

With a user's game, there is no bt_control, because that figure shows another game, and simplex is
drawn only if the game has three actions.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import _path  # noqa: F401
from sppo.core.artifacts import read_json, recorded_all, write_text
from sppo.core.errors import run
from sppo.reporting.figures import pyplot, save
from sppo.reporting.table_formats import csv_table
from sppo.theory import claims
from sppo.theory.games import GAMES, Game, duality_gap, nash, read_game

Columns = dict[str, np.ndarray]  # of a table, by name

# Okabe-Ito colours. Dashes distinguish the lines as well.
BLUE, RED, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
SKY, PURPLE, YELLOW, BLACK = "#56B4E9", "#CC79A7", "#F0E442", "#000000"
STYLES = {
    "SPPO": (BLUE, "-"),
    "SPPO, average": (BLUE, "--"),
    "SPPO, least squares": (SKY, ":"),
    "OMWU": (GREEN, "-"),
    "ONPO": (ORANGE, ":"),
    "iterative DPO": (RED, "-"),
    "INPO": (ORANGE, "-"),
    "INPO, eta_t": (ORANGE, "--"),
    "Nash-MD": (PURPLE, "-"),
    "Nash-MD, eta_t": (PURPLE, "--"),
    "EGPO": (BLACK, "--"),
    "MMD": (SKY, ":"),
    "Nash-MP": (YELLOW, "-."),
    "MPO": (GREEN, "-"),
    "COMAL": (RED, "-."),
}
STEPS = 4000
# For the table of checks on the page.
NOTATION = (
    "P: the matrix of the win probabilities. P pi: the win probabilities of all actions against "
    "the policy pi. P-hat: an estimate of P pi from samples.",
    "pi_1: the first policy. pi_(t+1): the policy after t steps. pi*: the equilibrium.",
    "Gap: the duality gap 2 (max_y P(y beats pi) - 1/2).",
    "pi*_tau and regularised gap: the equilibrium and the gap of the regularised game, in which "
    "the payoff of a policy pi is reduced by tau KL(pi, ref). Here ref = pi_1, except in topic 15, "
    "where ref is uniform.",
    "KL(p, q): the mean of log p/q under p, in nats.",
    "MWU: multiplicative weights, the exact update of SPPO's eq. (4.1). eta is its step size. For "
    "INPO, Nash-MD and COMAL, eta is an inverse step size, as in INPO's paper.",
    "C in the bounds of INPO: the largest tau |log pi_t/ref|, but at least 1. "
    "L in the step size of MMD: 1/2.",
    "Versions 1 and 2 in topic 15: the two contrastive losses of EGPO, with uniform and with "
    "on-policy pairs. n: the number of actions.",
    "rps: rock, paper, scissors. comal3: a cycle of three actions. transitive_nonBT: an order of "
    "three actions without Bradley-Terry rewards. bt3: Bradley-Terry rewards 1, 0, -1. "
    "randomN: random probabilities of N actions.",
)


@dataclass(frozen=True)
class Plot:
    """A figure with its data and a text for the page."""

    stem: str  # of its files
    data: Columns
    figure: Any
    text: str  # what the figure shows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checks", type=Path, required=True, help="checks.json")
    parser.add_argument("--trained", type=Path, help="trained_policies.json of train_on_games.py")
    parser.add_argument("--game", type=Path, help="your own game, .csv")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="README.md; the other files are written to the same folder",
    )
    args = parser.parse_args()
    game, name = GAMES["comal3"], "comal3"
    if args.game:
        game, name = read_game(args.game), args.game.stem
    plots = [gap_by_iteration(game), gap_by_horizon(game)]
    if len(game.P) == 3:
        plots.append(simplex(game))
    plots += [regularised_gap(game), self_improvement(game)]
    if not args.game:
        plots.append(bt_control(GAMES["bt3"]))

    inputs = [path for path in (args.checks, args.trained, args.game) if path]
    checks = read_json(args.checks)
    trained: dict[str, Any] = {"findings": "", "checks": []}
    if args.trained:
        trained = read_json(args.trained)
    files = [
        [args.output.with_name(f"{plot.stem}.{form}") for form in ("csv", "png", "svg")]
        for plot in plots
    ]
    artifacts = [args.output, *(file for of_plot in files for file in of_plot)]
    with recorded_all("theory", artifacts, inputs, vars(args)):
        for plot, (table, *images) in zip(plots, files, strict=True):
            rows = zip(*(column.tolist() for column in plot.data.values()))
            write_text(table, csv_table(list(plot.data), rows))
            save(plot.figure, images)
        text = page(game, name, plots, checks + trained["checks"], trained["findings"])
        write_text(args.output, text)


def plot_method(axes: Any, y: Any, name: str) -> None:
    """Plot a method's values over iterations 1, 2, ..."""
    colour, dashes = STYLES[name]
    axes.plot(
        np.arange(1, len(y) + 1),
        y,
        color=colour,
        linestyle=dashes,
        label=name,
        linewidth=2.4 if dashes == ":" else 1.4,
    )


def all_gaps(game: Game, title: str) -> tuple[Columns, Any, claims.Series]:
    """The duality gap of every method by iteration.

    Returns the data (columns by name), the figure, and the last policy of each method.
    """
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    data: Columns = {"iteration": np.arange(1, STEPS + 2)}
    last: claims.Series = {}
    for axes, title_of_panel, series in (
        (left, "reference: the current policy", claims.without_reference(game, STEPS)),
        (right, "fixed or moving reference, tau = alpha = 0.3", claims.with_reference(game, STEPS)),
    ):
        for name, policies in series.items():
            data[name] = claims.gaps(game, policies)
            last[name] = policies[-1]
            plot_method(axes, data[name], name)
        lowest = min(data[name].min() for name in series)
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="iteration",
            ylabel="duality gap",
            title=title_of_panel,
            ylim=(max(1e-12, lowest / 30), 2),
        )
        axes.legend(frameon=False, loc="lower left", fontsize=9)
    figure.suptitle(title)
    return data, figure, last


def gap_by_iteration(game: Game) -> Plot:
    data, figure, last = all_gaps(game, "Duality gap by iteration")
    last_gap = {name: data[name][-1] for name in last}
    ranges = []
    for name in ("SPPO", "SPPO, least squares", "iterative DPO"):
        if name in data:
            late = data[name][-1000:]
            ranges.append(f"{name} {late.min():.3f} to {late.max():.3f}")
    converged = "; ".join(name for name, gap in last_gap.items() if gap < 1e-3) or "none"
    text = (
        "The duality gap of a policy pi is 2 (max_y P(y beats pi) - 1/2). It is 0 at the "
        "equilibrium and at most 1.\n"
        f"It starts at {data['SPPO'][0]:.3f}. Its range in the last 1000 of {STEPS} steps is: "
        f"{'; '.join(ranges)} (eta = 1 for SPPO, beta = 5 for DPO).\n"
        "Theorem 4.1 is about the average of SPPO's policies. The gap of this average falls to "
        f"{last_gap['SPPO, average']:.4f}.\n"
        "With a fixed reference, a method converges to the equilibrium of another game, the "
        "regularised one.\n"
        "The lines of INPO, EGPO, Nash-MP and MMD end together, at a gap of "
        f"{last_gap['INPO']:.3f} in the game itself.\n"
        "MPO and COMAL replace the reference by the current policy every 50 and every 6 steps, to "
        "remove this bias.\n"
        f"Methods with a gap below 0.001 after the last step: {converged}."
    )
    return Plot("gap_by_iteration", data, figure, text)


def gap_by_horizon(game: Game) -> Plot:
    data = claims.by_horizon(game)
    T, average, last, bound = data.values()
    figure, axes = pyplot().subplots(figsize=(6.5, 4.4), layout="constrained")
    axes.plot(T, last, color=RED, marker="s", markersize=4, linestyle="-.", label="last policy")
    axes.plot(
        T, bound, color=BLACK, linestyle="--", label=r"bound $\sqrt{2 \ln(1/\min\pi_1)\,/\,T}$"
    )
    axes.plot(T, average, color=BLUE, marker="o", markersize=4, label="average of the T policies")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel=r"number of steps T of a run with $\eta = \sqrt{8 \ln(1/\min\pi_1)\,/\,T}$",
        ylabel="duality gap",
        title=r"SPPO's theorem 4.1: the bound falls as $1/\sqrt{T}$",
    )
    axes.legend(frameon=False, fontsize=9)
    text = (
        "Each point is one run of T steps, with the step size that minimises the bound for this "
        "T.\n"
        "The bound falls as 1/sqrt(T). The gap of the average of the run's policies is "
        f"{average[0]:.4f} at T = {T[0]} and {average[-1]:.4f} at T = {T[-1]},\n"
        f"where the bounds are {bound[0]:.4f} and {bound[-1]:.4f}.\n"
        f"The theorem says nothing about the last policy, whose gap is {last[-1]:.3f} at "
        f"T = {T[-1]}."
    )
    return Plot("gap_by_horizon", data, figure, text)


def simplex(game: Game) -> Plot:
    steps = 600
    series = claims.without_reference(game, steps, eta=0.3) | claims.with_reference(game, steps)
    shown = ("SPPO", "SPPO, average", "OMWU", "iterative DPO", "INPO", "MPO")
    paths = {name: policies for name, policies in series.items() if name in shown}
    figure = draw_simplex(game, paths)
    data = {
        "step": np.tile(np.arange(steps + 1), len(paths)),
        "method": np.repeat(list(paths), steps + 1),
    }
    for i, action in enumerate(game.actions):
        data[action] = np.concatenate([path[:, i] for path in paths.values()])
    text = (
        f"Paths of the three probabilities in {steps} steps. A corner is a policy that always "
        "gives that response.\n"
        "The star is the equilibrium. Settings: eta = 0.3 for SPPO and OMWU, beta = 5 for DPO, "
        "tau = alpha = 0.3 for INPO and MPO.\n"
        "If the preferences are a cycle, SPPO's policies turn around the equilibrium at an "
        "increasing distance, and their average approaches it.\n"
        "INPO converges to the regularised equilibrium, which is not at the star. MPO moves its "
        "reference and therefore comes closer to the star."
    )
    return Plot("simplex", data, figure, text)


def draw_simplex(game: Game, paths: claims.Series) -> Any:
    """A triangle for each method with the path of its policies; each path (steps + 1, 3)."""
    equilibrium = nash(game.P)
    corners = np.array([[0, 0], [1, 0], [0.5, np.sqrt(0.75)]])
    figure, panels = pyplot().subplots(2, 3, figsize=(9, 6.2), layout="constrained")
    for axes in panels.flat:
        axes.set_axis_off()
    for axes, (name, path) in zip(panels.flat, paths.items()):
        axes.plot(*corners[[0, 1, 2, 0]].T, color="0.6", linewidth=1)
        axes.plot(*(path @ corners).T, color=STYLES[name][0], linewidth=0.9)
        for point, marker, size, colour, label in (
            (path[0], "o", 6, BLACK, "start"),
            (path[-1], "s", 6, RED, f"after {len(path) - 1} steps"),
            (equilibrium, "*", 14, YELLOW, "equilibrium"),
        ):
            axes.plot(
                *(point @ corners),
                marker,
                color=colour,
                markeredgecolor=BLACK,
                markersize=size,
                label=label,
            )
        for corner, action, side in zip(corners, game.actions, ("right", "left", "center")):
            axes.annotate(action, corner, xytext=(0, 4), textcoords="offset points", ha=side)
        axes.set(title=name, aspect="equal")
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    return figure


def regularised_gap(game: Game) -> Plot:
    tau, steps = 0.1, 1000
    data = claims.regularised_gaps(game, steps, tau)
    figure, axes = pyplot().subplots(figsize=(6.5, 4.6), layout="constrained")
    for name, values in data.items():
        plot_method(axes, values, name)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="iteration",
        ylabel="regularised duality gap",
        ylim=(1e-15, 1),
        title=rf"The game with the penalty $\tau$ KL($\pi$, $\pi_1$), $\tau$ = {tau}",
    )
    axes.legend(frameon=False, fontsize=9, loc="lower left")
    end = {name: f"{values[-1]:.0e}" for name, values in data.items()}
    text = (
        "In the regularised game, the payoff of a policy pi is reduced by tau KL(pi, pi_1). The "
        "figure shows the duality gap of this game.\n"
        f"After {steps} steps, it is {end['INPO']} for INPO (eta = 2), {end['EGPO']} for EGPO "
        f"(eta = 1/2), {end['Nash-MP']} for Nash-MP (eta = 2) and {end['MMD']} for MMD (eta = "
        "alpha/L^2).\n"
        "Nash-MD with a constant step size converges to another policy, whose gap is "
        f"{end['Nash-MD']}.\n"
        "With the decreasing step size 1/eta_t, where eta_t = tau (t+2)/2, the gap is "
        f"{end['Nash-MD, eta_t']} for Nash-MD and {end['INPO, eta_t']} for INPO."
    )
    return Plot("regularised_gap", {"iteration": np.arange(1, steps + 2)} | data, figure, text)


def bt_control(game: Game) -> Plot:
    data, figure, last = all_gaps(game, "Control: Bradley-Terry preferences (bt3)")
    shares = "; ".join(f"{name} {pi[0]:.3f}" for name, pi in last.items())
    text = (
        "In this game, the preferences follow from rewards: 1, 0 and -1 for a, b and c. They "
        "contain no cycle, so a is the best response.\n"
        f"The first policy gives a the probability {game.start[0]:.3f}. After {STEPS} steps it is: "
        f"{shares}.\n"
        "Every method without a fixed reference finds a, including DPO. The methods differ in the "
        "first figure because comal3 contains a cycle."
    )
    return Plot("bt_control", data, figure, text)


def self_improvement(game: Game) -> Plot:
    data = claims.self_improvement(game, 300)
    t, wins, by_identity, first, gap = data.values()
    figure, (top, bottom) = pyplot().subplots(
        2, 1, sharex=True, figsize=(6.5, 6), layout="constrained"
    )
    top.plot(t, first, color=ORANGE, linestyle="--", label="first policy")
    top.plot(t, wins, color=BLUE, label="previous policy")
    top.plot(
        t[::8],
        by_identity[::8],
        color=BLACK,
        marker="x",
        linestyle="",
        markersize=4,
        label="previous, by the identity",
    )
    top.axhline(0.5, color="0.6", linewidth=1, linestyle=":")
    top.set(
        ylabel="win probability against ...",
        title="SPPO, eta = 1: each policy beats the previous policy",
        ylim=(None, 1.12 * first.max()),
    )
    top.legend(frameon=False, fontsize=9, ncols=3, loc="upper left")
    bottom.plot(t, gap, color=RED)
    bottom.set(xlabel="iteration", ylabel="duality gap", ylim=(0, None))
    text = (
        "Each policy beats the previous one. The win probability is exactly "
        "1/2 + (KL(pi_t, pi_(t+1)) + KL(pi_(t+1), pi_t))/eta.\n"
        f"In {len(t)} steps it is at least {wins.min():.4f}. In the same steps, the gap changes "
        f"from {duality_gap(game.P, game.start):.3f} to {gap[-1]:.3f}, with a maximum of "
        f"{gap.max():.3f}.\n"
        f"The win probability against the first policy is between {first.min():.3f} and "
        f"{first.max():.3f}.\n"
        "A win rate against the previous policy or the base policy therefore does not show whether "
        "training converges. The gap shows it, and a tournament of all policies can show it."
    )
    return Plot("self_improvement", data, figure, text)


def page(
    game: Game, name: str, plots: list[Plot], checks: list[dict[str, Any]], trained: str
) -> str:
    """README.md: each figure with its text, then every check.

    trained: the findings of trained_policies.json; empty without such a file.
    """
    equilibrium = ", ".join(
        f"{action} {p:.4f}" for action, p in zip(game.actions, nash(game.P)) if p
    )
    hold = sum(entry["holds"] for entry in checks)
    lines = [
        "# The methods on a game that can be solved exactly\n",
        f"The game is {name}. It has {len(game.P)} actions, which are the responses to one prompt. "
        f"Its equilibrium, which no policy beats, is {equilibrium}.",
        f"The first policy has a duality gap of {duality_gap(game.P, game.start):.3f}. "
        f"**{hold} of {len(checks)} checks hold**; the end of this page lists them.\n",
        "To use your own game, write a CSV file with n lines of n probabilities that the row beats "
        "the column. Give it to `src/theory/check_theory.py` and `src/theory/plot_theory.py` with "
        "`--game FILE.csv`.\n",
    ]
    texts = {plot.stem: plot.text for plot in plots}
    if trained:
        texts["trained_policies"] = trained
    for stem, text in texts.items():
        lines += [
            f"![{stem}]({stem}.png)\n",
            f"{text}\n",
            f"Data: [{stem}.csv]({stem}.csv). Figure: [{stem}.svg]({stem}.svg).\n",
        ]
    lines += [
        "## On a pretrained language model\n",
        "`snakemake word_game` trains the embedded policy on a game of words, whose exact updates "
        "are known, and writes [word_game.md](word_game.md). The repository's "
        "docs/results/word_game.md has the tables of a finished run: slope, R^2, total variation "
        "to the exact iterate, and five wrong losses.\n",
        "## Checks\n",
        "Each claim ends with what its value is. An error must not exceed what rounding allows, "
        "and the ratio of a value to its bound must not exceed 1. If a claim is checked on several "
        "games, the table gives the worst value.\n",
        *(f"* {line}" for line in NOTATION),
        "",
        "| topic | claim | games | value | expected | holds |",
        "|---|---|---|---:|---:|---|",
    ]
    for topic, title in claims.TOPICS.items():
        of_topic = [entry for entry in checks if entry["topic"] == topic]
        if of_topic:
            lines.append(f"| **{topic}** | **{title}** | | | | |")
        for entry in of_topic:
            holds = "yes" if entry["holds"] else "**no**"
            lines.append(
                f"| {topic} | `{entry['claim']}` | {entry['games']} | {entry['value']:.6g} "
                f"| {entry['relation']} {entry['expected']:.6g} | {holds} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run(main)
