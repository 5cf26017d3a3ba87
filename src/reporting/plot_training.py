"""Training curves of one run: the loss, the log-ratios and the share of pairs in the right order.

Reads   train_log.jsonl of each iteration; the iteration is read from the path (.../iter{t}/...)
Writes  a figure (.png and .svg) and its records
"""

from __future__ import annotations

import argparse
from pathlib import Path

import _path  # noqa: F401
from sppo.core.artifacts import iteration, json_lines, recorded_all
from sppo.core.errors import UserError, run
from sppo.reporting.figures import pyplot, save

PANELS = (
    ("loss", "loss (nats², mean of the pair's two)"),
    ("log_ratio", "log π/π$_t$, mean (nats)"),
    ("reward_accuracy", "winner above loser (share)"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--logs", type=Path, nargs="+", required=True, help="train_log.jsonl, one per iteration"
    )
    parser.add_argument(
        "--plot", type=Path, required=True, help=".png; an .svg is written beside it"
    )
    args = parser.parse_args()

    steps = {iteration(path): read_log(path) for path in args.logs}
    files = [args.plot, args.plot.with_suffix(".svg")]
    with recorded_all("tabulate", files, args.logs, vars(args)):
        plot_training(dict(sorted(steps.items())), files)


def read_log(path: Path) -> list[dict[str, float]]:
    """One row for each optimiser step. UserError if the file is missing, truncated or empty."""
    try:
        rows = json_lines(path)
    except (OSError, UserError) as error:
        raise UserError(
            f"{path} is not a complete training log ({error}); delete it and run again"
        ) from None
    rows = [row for row in rows if "log_ratio_chosen" in row]
    if not rows:
        raise UserError(f"{path} has no steps; delete it and run again")
    return rows


def plot_training(logs: dict[int, list[dict[str, float]]], files: list[Path]) -> None:
    """Draw all iterations one after the other on one axis of optimiser steps.

    A vertical line marks the end of each iteration, where the policy changes.

    logs: the rows of `read_log` by iteration.
    files: where to write the figure; the suffix of each file gives its format.
    """
    plt = pyplot()
    figure, axes = plt.subplots(3, 1, sharex=True, figsize=(6.5, 7), layout="constrained")
    steps_before = 0
    for number, rows in logs.items():
        at = [steps_before + row["step"] for row in rows]
        labelled = number == min(logs)  # once in the legend, not once for each iteration
        axes[0].plot(at, [row["loss"] for row in rows], color="#0072B2", marker=".")
        axes[1].plot(
            at,
            [row["log_ratio_chosen"] for row in rows],
            color="#009E73",
            marker=".",
            label="winner" if labelled else None,
        )
        axes[1].plot(
            at,
            [row["log_ratio_rejected"] for row in rows],
            color="#D55E00",
            marker=".",
            linestyle="--",
            label="loser" if labelled else None,
        )
        axes[2].plot(at, [row["reward_accuracy"] for row in rows], color="#CC79A7", marker=".")
        axes[0].annotate(
            f"iteration {number}",
            (steps_before + 0.5, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, -12),
            textcoords="offset points",
            fontsize=8,
        )
        steps_before = int(at[-1])
        for panel in axes:
            panel.axvline(steps_before + 0.5, color="0.8", linewidth=1)
    for panel, (_, label) in zip(axes, PANELS):
        panel.set_ylabel(label)
    axes[1].axhline(0, color="0.4", linewidth=1, linestyle=":")
    axes[2].set(ylim=(-0.05, 1.05), xlabel="optimiser step")
    axes[1].legend(frameon=False)
    save(figure, files)


if __name__ == "__main__":
    run(main)
