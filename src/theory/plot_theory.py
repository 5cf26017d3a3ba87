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
import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import _path  # noqa: F401
from sppo.core.artifacts import read_json, recorded, write_text
from sppo.core.errors import run
from sppo.reporting.figures import pyplot, save
from sppo.reporting.table_formats import csv_table
from sppo.theory import claims
from sppo.theory.games import GAMES, Game, duality_gap, nash, read_game

# Okabe-Ito colours. Dashes distinguish the lines as well.
BLUE, RED, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
SKY, PURPLE, YELLOW, BLACK = "#56B4E9", "#CC79A7", "#F0E442", "#000000"
STYLES = {
    "SPPO": (BLUE, "-"),
    "SPPO, average": (BLUE, "--"),
    "SPPO, least squares": (SKY, ":"),
    "OMWU": (GREEN, "-"),
    "iterative DPO": (RED, "-"),
    "INPO": (ORANGE, "-"),
    "INPO, eta_t": (ORANGE, "--"),
    "Nash-MD": (PURPLE, "-"),
    "Nash-MD, eta_t": (PURPLE, "--"),
    "EGPO": (BLACK, "--"),
    "MMD": (SKY, ":"),
    "MPO": (GREEN, "-"),
    "COMAL": (RED, "-."),
}
STEPS = 4000


@dataclass(frozen=True)
class Plot:
    """A figure with its data and a text for the page."""

    stem: str  # of its files
    data: claims.Series  # columns of the table
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
    trained = read_json(args.trained) if args.trained else {"shows": "", "checks": []}
    # The records are written at the end, so that they exist only if all files do.
    with contextlib.ExitStack() as records:
        for plot in plots:
            table, *images = (
                args.output.with_name(f"{plot.stem}.{form}") for form in ("csv", "png", "svg")
            )
            for artifact in (table, *images):
                records.enter_context(recorded("theory", artifact, inputs, vars(args)))
            rows = zip(*(column.tolist() for column in plot.data.values()))
            write_text(table, csv_table(list(plot.data), rows))
            save(plot.figure, images)
        records.enter_context(recorded("theory", args.output, inputs, vars(args)))
        text = page(game, name, plots, checks + trained["checks"], trained["shows"])
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


def all_gaps(game: Game, title: str) -> tuple[claims.Series, Any, claims.Series]:
    """The duality gap of every method by iteration.

    Returns the data (columns by name), the figure, and the last policy of each method.
    """
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    data, last = {"iteration": np.arange(1, STEPS + 2)}, {}
    for axes, title_of_panel, series in (
        (left, "no reference but the policy itself", claims.without_reference(game, STEPS)),
        (right, "held by a reference, tau = alpha = 0.3", claims.with_reference(game, STEPS)),
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
    data, figure, last = all_gaps(game, "How far from the equilibrium")
    last_gap = {name: data[name][-1] for name in last}
    ranges = []
    for name in ("SPPO", "SPPO, least squares", "iterative DPO"):
        if name in data:
            late = data[name][-1000:]
            ranges.append(f"{name} {late.min():.3f} to {late.max():.3f}")
    converged = "; ".join(name for name, gap in last_gap.items() if gap < 1e-3) or "none"
    text = (
        "The gap: how much the best answers win against a policy; 0 at the equilibrium, "
        "at most 1.\n"
        f"It begins at {data['SPPO'][0]:.3f}; over the last 1000 of {STEPS} steps it is for "
        f"{'; '.join(ranges)} (eta = 1, beta = 5).\n"
        "Theorem 4.1 speaks of SPPO's average, which comes to "
        f"{last_gap['SPPO, average']:.4f}. A fixed reference leads to the equilibrium of another\n"
        "game, the regularised one: INPO, EGPO and MMD, on one line, end there at a gap of "
        f"{last_gap['INPO']:.3f} in this one. A reference that is moved\n"
        "up to the policy, every 50 steps (MPO) or every 6 (COMAL), is meant to take this bias "
        "away. Below 0.001 at the end:\n"
        f"{converged}."
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
        xlabel=r"T, each with $\eta = \sqrt{8 \ln(1/\min\pi_1)\,/\,T}$",
        ylabel="duality gap",
        title=r"SPPO's theorem 4.1: the average, at the rate $1/\sqrt{T}$",
    )
    axes.legend(frameon=False, fontsize=9)
    text = (
        "Each point is a run of its own, with the step size for its length. The average of its\n"
        "policies keeps below the bound, which falls as 1/sqrt(T): "
        f"{average[0]:.4f} at T = {T[0]}, {average[-1]:.4f} at T = {T[-1]}, where the\n"
        f"bound is {bound[-1]:.4f}. Of the last policy the theorem says nothing: it is at "
        f"{last[-1]:.3f} there."
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
        "Paths of the three probabilities. A corner is a policy that always gives that response; "
        "the star is\n"
        "the equilibrium. SPPO and OMWU with eta = 0.3, DPO with beta = 5, INPO and MPO with "
        "tau = alpha = 0.3. Around a cycle SPPO's\n"
        "policies circle outwards while their average closes in; INPO stops beside the star, at "
        "the regularised equilibrium, and MPO\n"
        "goes on from there."
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
        title=f"The game with a price of tau KL on leaving the start, tau = {tau}",
    )
    axes.legend(frameon=False, fontsize=9, loc="lower left")
    end = {name: f"{values[-1]:.0e}" for name, values in data.items()}
    text = (
        "Here leaving the reference costs tau KL, and the gap is that game's. "
        f"After {steps} steps\n"
        "INPO (eta = 2), EGPO (eta = 1/2) and MMD (eta = alpha/L^2) are at "
        f"{end['INPO']}, {end['EGPO']} and {end['MMD']}, having fallen at a steady\n"
        f"rate. Nash-MD with a constant step stays at {end['Nash-MD']}, for its fixed point is "
        "another; with eta_t = tau (t+2)/2 it is at\n"
        f"{end['Nash-MD, eta_t']} and falling, and INPO at {end['INPO, eta_t']}."
    )
    return Plot("regularised_gap", {"iteration": np.arange(1, steps + 2)} | data, figure, text)


def bt_control(game: Game) -> Plot:
    data, figure, last = all_gaps(game, "The control: preferences that rewards explain (bt3)")
    shares = "; ".join(f"{name}: {pi[0]:.3f}" for name, pi in last.items())
    text = (
        "A Bradley-Terry game: rewards 1, 0, -1 for a, b, c, and no cycle. "
        "The start gives a the least,\n"
        f"{game.start[0]:.3f}. The share of a after {STEPS} steps is {shares}.\n"
        "Whatever keeps no fixed reference finds a, DPO too. What parts the methods in the first "
        "figure is the cycle."
    )
    return Plot("bt_control", data, figure, text)


def self_improvement(game: Game) -> Plot:
    data = claims.self_improvement(game, 300)
    t, wins, identity, first, gap = data.values()
    figure, (top, bottom) = pyplot().subplots(
        2, 1, sharex=True, figsize=(6.5, 6), layout="constrained"
    )
    top.plot(t, first, color=ORANGE, linestyle="--", label="its first policy")
    top.plot(t, wins, color=BLUE, label="its predecessor")
    top.plot(
        t[::8],
        identity[::8],
        color=BLACK,
        marker="x",
        linestyle="",
        markersize=4,
        label="its predecessor, by the identity",
    )
    top.axhline(0.5, color="0.6", linewidth=1, linestyle=":")
    top.set(
        ylabel="probability of beating ...",
        title="SPPO, eta = 1: better than before at every step",
        ylim=(None, 1.12 * first.max()),
    )
    top.legend(frameon=False, fontsize=9, ncols=3, loc="upper left")
    bottom.plot(t, gap, color=RED)
    bottom.set(xlabel="iteration", ylabel="duality gap", ylim=(0, None))
    text = (
        "Each policy beats the one before it, with probability 1/2 + (KL + reversed KL)/eta "
        "exactly:\n"
        f"in {len(t)} steps never less than {wins.min():.4f}. The gap meanwhile goes from "
        f"{duality_gap(game.P, game.start):.3f} to {gap[-1]:.3f},\n"
        f"over {gap.max():.3f} on the way; wins against the first policy run between "
        f"{first.min():.3f} and {first.max():.3f}. A win rate against\n"
        "the previous iterate, or against the base, does not tell whether training converges; "
        "the gap does, or a round-robin of all."
    )
    return Plot("self_improvement", data, figure, text)


def page(
    game: Game, name: str, plots: list[Plot], checks: list[dict[str, Any]], trained: str
) -> str:
    """README.md: each figure with its text, then every check.

    trained: what trained_policies.json says that its figure shows; empty if there is none.
    """
    equilibrium = ", ".join(
        f"{action} {p:.4f}" for action, p in zip(game.actions, nash(game.P)) if p
    )
    hold = sum(entry["holds"] for entry in checks)
    lines = [
        "# The methods on a game that can be solved exactly\n",
        f"The game: {name}, {len(game.P)} responses to one prompt. "
        f"Its equilibrium, which no policy beats: {equilibrium}.",
        f"Play starts at a gap of {duality_gap(game.P, game.start):.3f}. "
        f"**{hold} of {len(checks)} checks hold**; they stand at the end.\n",
        "A game of your own: `--game FILE.csv` of `src/theory/check_theory.py` and "
        "`src/theory/plot_theory.py`, n lines of n probabilities.\n",
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
        "are known, and writes [word_game.md](word_game.md).\n",
        "## Checks\n",
        "KL(p, q) = E log p/q under p. A ratio to a bound must not exceed 1.\n",
        "| | claim | games | value | expected | holds |",
        "|---|---|---|---:|---:|---|",
    ]
    for number, topic in claims.TOPICS.items():
        of_topic = [entry for entry in checks if entry["number"] == number]
        if of_topic:
            lines.append(f"| **{number}** | **{topic}** | | | | |")
        for entry in of_topic:
            holds = "yes" if entry["holds"] else "**no**"
            lines.append(
                f"| {number} | `{entry['claim']}` | {entry['games']} | {entry['value']:.6g} "
                f"| {entry['relation']} {entry['expected']:.6g} | {holds} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run(main)
