"""Win rates of all policies against each other on the evaluation instructions.

Reads   outputs of each policy in alpaca-eval's format, on the same instructions; the preference
        model
Writes  a matrix (.csv: per cent of comparisons that the row wins against the column,
        P + P^T = 100), a heatmap (.png and .svg), their records
Paper   2405.00675, Figure 3
Departs from the paper: a comparison counts with its win probability, not as a hard vote; the
        paper's Figure 3 uses PairRM only
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import _path  # noqa: F401
from sppo.core.artifacts import recorded_all, write_text
from sppo.core.config import DEVICES
from sppo.core.errors import UserError, run
from sppo.core.flags import add_section
from sppo.evaluation.alpaca_eval import read_outputs
from sppo.preferences.base import (
    Group,
    compare,
    load_preference_model,
    model_files,
    option_keys,
    options_of,
    settings_for,
)
from sppo.preferences.estimates import Array, win_probabilities
from sppo.reporting.figures import pyplot, save
from sppo.reporting.table_formats import csv_table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--outputs",
        type=Path,
        nargs="+",
        required=True,
        help="outputs of the policies, in the order of the matrix",
    )
    add_section(parser, "preference", only=("model", *option_keys()))
    parser.add_argument(
        "--ranker-base", type=Path, nargs="?", help="folder of the adapter's base model"
    )
    parser.add_argument("--output", type=Path, required=True, help="the matrix, .csv")
    parser.add_argument(
        "--plot", type=Path, required=True, help="the heatmap, .png; an .svg is written next to it"
    )
    parser.add_argument("--device", choices=DEVICES, default="auto")
    args = parser.parse_args()

    answers, names = answers_by_instruction(args.outputs)
    settings = settings_for(args.model, **options_of(vars(args)))
    inputs = [*args.outputs, *model_files(args.model, args.ranker_base)]
    plots = [args.plot, args.plot.with_suffix(".svg")]
    with recorded_all("tabulate", (args.output, *plots), inputs, vars(args)):
        model = load_preference_model(settings, args.ranker_base, args.device)
        groups = {
            str(number): Group(instruction, texts)
            for number, (instruction, texts) in enumerate(answers.items(), start=1)
        }
        compared = compare(model, groups, "instruction").values()
        probabilities = [win_probabilities(logits) for logits in compared]
        wins = np.mean(probabilities, axis=0)
        write_text(args.output, csv_matrix(wins, names))
        plot_heatmap(wins, names, f"by the {args.model}, n = {len(answers)}", plots)


def answers_by_instruction(paths: list[Path]) -> tuple[dict[str, list[str]], list[str]]:
    """Answers of all policies to each instruction, and the policies' names.

    UserError if the instructions differ.
    """
    outputs = {path: {row["instruction"]: row for row in read_outputs(path)} for path in paths}
    first = outputs[paths[0]]
    for path, rows in outputs.items():
        if rows.keys() != first.keys():
            raise UserError(
                f"{path} and {paths[0]} answer different instructions; answer the same ones"
            )
    names = [next(iter(rows.values()))["generator"] for rows in outputs.values()]
    answers = {
        instruction: [rows[instruction]["output"] for rows in outputs.values()]
        for instruction in first
    }
    return answers, names


def csv_matrix(wins: Array, names: list[str]) -> str:
    """The matrix `wins` (policies, policies) in per cent, with the policies' names, as CSV."""
    rows = [
        [name, *(f"{100 * probability:.4f}" for probability in row)]
        for name, row in zip(names, wins)
    ]
    return csv_table(["policy", *names], rows)


def plot_heatmap(wins: Array, names: list[str], title: str, files: list[Path]) -> None:
    """Plot how often the row wins against the column, in per cent; 50, a draw, is white."""
    plt = pyplot()
    short = [name.split("/", 1)[-1] for name in names]
    size = 2.2 + 0.6 * len(names)
    figure, axes = plt.subplots(figsize=(size + 0.8, size), layout="constrained")
    reach = max(1.0, float(np.abs(100 * wins - 50).max()))
    image = axes.imshow(100 * wins, cmap="PuOr", vmin=50 - reach, vmax=50 + reach)
    for i, row in enumerate(100 * wins):
        for j, value in enumerate(row):
            color = "white" if abs(value - 50) > 0.7 * reach else "black"
            axes.text(j, i, f"{value:.0f}", ha="center", va="center", color=color)
    axes.set_xticks(range(len(names)), short, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), short)
    axes.set(xlabel="loses", ylabel="wins", title=f"Row beats column (%), {title}")
    figure.colorbar(image, ax=axes, label="won (%)", shrink=0.8)
    save(figure, files)


if __name__ == "__main__":
    run(main)
