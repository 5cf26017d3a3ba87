"""What each method does on a game that can be solved exactly: data, figures and a page that says what they show.

Reads   checks.json of the same game; optionally trained_policies.json; a user's game (--game FILE.csv), or nothing: then it is comal3
Writes  README.md, and beside it, of each figure, a table (.csv) and the figure (.png and .svg); their records
A user's game has no bt_control, which is a game of its own, and has simplex if it has three actions.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any

import numpy as np

import _path  # noqa: F401
from sppo.core.artifacts import read_json, recorded, write_text
from sppo.core.errors import run
from sppo.reporting.figures import pyplot, save
from sppo.reporting.table_formats import csv_table
from sppo.theory import claims
from sppo.theory import games as g
from sppo.theory.games import Game, duality_gap, read_game

# Okabe-Ito colours, told apart by dashes as well.
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
Drawn = tuple[str, claims.Series, Any, str]  # name, columns of the table, figure, what it shows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checks", type=Path, required=True, help="checks.json")
    parser.add_argument("--trained", type=Path, help="trained_policies.json of train_on_games.py")
    parser.add_argument("--game", type=Path, help="your own game, .csv")
    parser.add_argument(
        "--output", type=Path, required=True, help="README.md; the other files go beside it"
    )
    args = parser.parse_args()
    game, name = (
        (read_game(args.game), args.game.stem) if args.game else (g.GAMES["comal3"], "comal3")
    )
    drawn = [
        gap_by_iteration(game),
        gap_by_horizon(game),
        *([simplex(game)] if len(game.P) == 3 else []),
        regularised_gap(game),
        self_improvement(game),
        *([] if args.game else [bt_control(g.GAMES["bt3"])]),
    ]
    inputs = [path for path in (args.checks, args.trained, args.game) if path]
    trained = read_json(args.trained) if args.trained else {"shows": "", "checks": []}
    with contextlib.ExitStack() as records:
        for stem, data, figure, _ in drawn:
            table, *plots = (
                args.output.with_name(f"{stem}.{form}") for form in ("csv", "png", "svg")
            )
            for artifact in (table, *plots):
                records.enter_context(recorded("theory", artifact, inputs, vars(args)))
            write_text(
                table, csv_table(list(data), zip(*(column.tolist() for column in data.values())))
            )
            save(figure, plots)
        records.enter_context(recorded("theory", args.output, inputs, vars(args)))
        write_text(
            args.output,
            page(game, name, drawn, read_json(args.checks) + trained["checks"], trained["shows"]),
        )


def line(axes: Any, y: Any, name: str) -> None:
    """A method's values over iterations 1, 2, ..."""
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
    """The gap of every method by iteration, as data and figure; the policies at the end."""
    figure, panels = pyplot().subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    data, ends = {"iteration": np.arange(1, STEPS + 2)}, {}
    for axes, played, words in zip(
        panels,
        (claims.without_reference(game, STEPS), claims.with_reference(game, STEPS)),
        ("no reference but the policy itself", "held by a reference, tau = alpha = 0.3"),
    ):
        for name, policies in played.items():
            data[name], ends[name] = claims.gaps(game, policies), policies[-1]
            line(axes, data[name], name)
        lowest = min(data[name].min() for name in played)
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="iteration",
            ylabel="duality gap",
            title=words,
            ylim=(max(1e-12, lowest / 30), 2),
        )
        axes.legend(frameon=False, loc="lower left", fontsize=9)
    figure.suptitle(title)
    return data, figure, ends


def gap_by_iteration(game: Game) -> Drawn:
    data, figure, ends = all_gaps(game, "How far from the equilibrium")
    end = {name: data[name][-1] for name in ends}
    late = {
        name: data[name][-1000:]
        for name in ("SPPO", "SPPO, least squares", "iterative DPO")
        if name in ends
    }
    swing = "; ".join(f"{name} {gap.min():.3f} to {gap.max():.3f}" for name, gap in late.items())
    return (
        "gap_by_iteration",
        data,
        figure,
        f"""The gap: how much the best answers win against a policy; 0 at the equilibrium, at most 1.
It begins at {data["SPPO"][0]:.3f}; over the last 1000 of {STEPS} steps it is for {swing} (eta = 1, beta = 5).
Theorem 4.1 speaks of SPPO's average, which comes to {end["SPPO, average"]:.4f}. A fixed reference leads to the equilibrium of another
game, the regularised one: INPO, EGPO and MMD, on one line, end there at a gap of {end["INPO"]:.3f} in this one. A reference that is moved
up to the policy, every 50 steps (MPO) or every 6 (COMAL), is meant to take this bias away. Below 0.001 at the end:
{"; ".join(name for name, gap in end.items() if gap < 1e-3) or "none"}.""",
    )


def gap_by_horizon(game: Game) -> Drawn:
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
    return (
        "gap_by_horizon",
        data,
        figure,
        f"""Each point is a run of its own, with the step size for its length. The average of its
policies keeps below the bound, which falls as 1/sqrt(T): {average[0]:.4f} at T = {T[0]}, {average[-1]:.4f} at T = {T[-1]}, where the
bound is {bound[-1]:.4f}. Of the last policy the theorem says nothing: it is at {last[-1]:.3f} there.""",
    )


def simplex(game: Game) -> Drawn:
    free, held, steps = (
        claims.without_reference(game, 600, eta=0.3),
        claims.with_reference(game, 600),
        600,
    )
    shown = ("SPPO", "SPPO, average", "OMWU", "iterative DPO", "INPO", "MPO")
    paths = {name: path for name, path in (free | held).items() if name in shown}
    corners = np.array([[0, 0], [1, 0], [0.5, np.sqrt(0.75)]])
    figure, panels = pyplot().subplots(2, 3, figsize=(9, 6.2), layout="constrained")
    for axes in panels.flat:
        axes.set_axis_off()
    for axes, (name, path) in zip(panels.flat, paths.items()):
        axes.plot(*corners[[0, 1, 2, 0]].T, color="0.6", linewidth=1)
        axes.plot(*(path @ corners).T, color=STYLES[name][0], linewidth=0.9)
        for point, marker, size, colour, words in (
            (path[0], "o", 6, BLACK, "start"),
            (path[-1], "s", 6, RED, f"after {steps} steps"),
            (g.nash(game.P), "*", 14, YELLOW, "equilibrium"),
        ):
            axes.plot(
                *(point @ corners),
                marker,
                color=colour,
                markeredgecolor=BLACK,
                markersize=size,
                label=words,
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
    data = {
        "step": np.tile(np.arange(steps + 1), len(paths)),
        "method": np.repeat(list(paths), steps + 1),
    }
    data |= {
        action: np.concatenate([path[:, i] for path in paths.values()])
        for i, action in enumerate(game.actions)
    }
    return (
        "simplex",
        data,
        figure,
        """Paths of the three probabilities. A corner is a policy that always gives that response; the star is
the equilibrium. SPPO and OMWU with eta = 0.3, DPO with beta = 5, INPO and MPO with tau = alpha = 0.3. Around a cycle SPPO's
policies circle outwards while their average closes in; INPO stops beside the star, at the regularised equilibrium, and MPO
goes on from there.""",
    )


def regularised_gap(game: Game) -> Drawn:
    tau, steps = 0.1, 1000
    data = claims.regularised_gaps(game, steps, tau)
    figure, axes = pyplot().subplots(figsize=(6.5, 4.6), layout="constrained")
    for name, values in data.items():
        line(axes, values, name)
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
    data = {"iteration": np.arange(1, steps + 2)} | data
    return (
        "regularised_gap",
        data,
        figure,
        f"""Here leaving the reference costs tau KL, and the gap is that game's. After {steps} steps
INPO (eta = 2), EGPO (eta = 1/2) and MMD (eta = alpha/L^2) are at {end["INPO"]}, {end["EGPO"]} and {end["MMD"]}, having fallen at a steady
rate. Nash-MD with a constant step stays at {end["Nash-MD"]}, for its fixed point is another; with eta_t = tau (t+2)/2 it is at
{end["Nash-MD, eta_t"]} and falling, and INPO at {end["INPO, eta_t"]}.""",
    )


def bt_control(game: Game) -> Drawn:
    data, figure, ends = all_gaps(game, "The control: preferences that rewards explain (bt3)")
    share = "; ".join(f"{name}: {pi[0]:.3f}" for name, pi in ends.items())
    return (
        "bt_control",
        data,
        figure,
        f"""A Bradley-Terry game: rewards 1, 0, -1 for a, b, c, and no cycle. The start gives a the least,
{game.start[0]:.3f}. The share of a after {STEPS} steps is {share}.
Whatever keeps no fixed reference finds a, DPO too. What parts the methods in the first figure is the cycle.""",
    )


def self_improvement(game: Game) -> Drawn:
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
    return (
        "self_improvement",
        data,
        figure,
        f"""Each policy beats the one before it, with probability 1/2 + (KL + reversed KL)/eta exactly:
in {len(t)} steps never less than {wins.min():.4f}. The gap meanwhile goes from {duality_gap(game.P, game.start):.3f} to {gap[-1]:.3f},
over {gap.max():.3f} on the way; wins against the first policy run between {first.min():.3f} and {first.max():.3f}. A win rate against
the previous iterate, or against the base, does not tell whether training converges; the gap does, or a round-robin of all.""",
    )


def page(
    game: Game, name: str, drawn: list[Drawn], checks: list[dict[str, Any]], trained: str
) -> str:
    """README.md: each figure with what it shows, then every check."""
    star, hold = (
        ", ".join(f"{action} {p:.4f}" for action, p in zip(game.actions, g.nash(game.P)) if p),
        sum(one["holds"] for one in checks),
    )
    shown = [(stem, words) for stem, _, _, words in drawn] + (
        [("trained_policies", trained)] if trained else []
    )
    text = [
        f"# The methods on a game that can be solved exactly\n\nThe game: {name}, {len(game.P)} responses to one prompt. "
        f"Its equilibrium, which no policy beats: {star}.\nPlay starts at a gap of {duality_gap(game.P, game.start):.3f}. "
        f"**{hold} of {len(checks)} checks hold**; they stand at the end.\n\n"
        "A game of your own: `--game FILE.csv` of `src/theory/check_theory.py` and `src/theory/plot_theory.py`, n lines of n probabilities.\n"
    ]
    text += [
        f"![{stem}]({stem}.png)\n\n{words}\n\nData: [{stem}.csv]({stem}.csv). Figure: [{stem}.svg]({stem}.svg).\n"
        for stem, words in shown
    ]
    text += [
        "## Checks\n",
        "KL(p, q) = E log p/q under p. A ratio to a bound must not exceed 1.\n",
        "| | claim | games | value | expected | holds |",
        "|---|---|---|---:|---:|---|",
    ]
    for number, topic in claims.TOPICS.items():
        same = [one for one in checks if one["number"] == number]
        text += [f"| **{number}** | **{topic}** | | | | |"] if same else []
        text += [
            f"| {number} | `{one['claim']}` | {one['games']} | {one['value']:.6g} | {one['relation']} {one['expected']:.6g} |"
            f" {'yes' if one['holds'] else '**no**'} |"
            for one in same
        ]
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    run(main)
