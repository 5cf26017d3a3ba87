"""Win rates of all policies against each other, by one preference model on the evaluation instructions.

Reads   outputs of each policy in alpaca-eval's form, on the same instructions; the preference model
Writes  a matrix (.csv: per cent that the row beats the column, P + P^T = 100), a heatmap (.png and .svg), their records
Paper   2405.00675, Figure 3
Departs from the paper: an answer's win is its probability, not a hard vote; the paper's Figure 3 is by PairRM alone
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

import numpy as np

import _path  # noqa: F401
from sppo.core.artifacts import recorded, write_text
from sppo.core.errors import UserError, run
from sppo.evaluation.alpaca_eval import read_outputs
from sppo.preferences.base import load_preference_model, model_files, settings_for
from sppo.preferences.estimates import Array, win_probabilities
from sppo.reporting.figures import pyplot, save


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
    parser.add_argument(
        "--model",
        required=True,
        help="preference model: ranker, judge, an adapter's folder or PairRM's",
    )
    parser.add_argument(
        "--ranker-base", type=Path, nargs="?", help="model folder that an adapter sits on"
    )
    parser.add_argument("--output", type=Path, required=True, help="the matrix, .csv")
    parser.add_argument(
        "--plot", type=Path, required=True, help="the heatmap, .png; an .svg is written beside it"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "gpu"], default="auto")
    args = parser.parse_args()

    answers, names = answers_by_instruction(args.outputs)
    from sppo.core.progress import progress
    from sppo.policies.models import pick_device, start_torch

    start_torch()
    plots = [args.plot, args.plot.with_suffix(".svg")]
    with contextlib.ExitStack() as records:
        for artifact in (args.output, *plots):
            records.enter_context(
                recorded(
                    "tabulate",
                    artifact,
                    [*args.outputs, *model_files(args.model, args.ranker_base)],
                    vars(args),
                )
            )
        model = load_preference_model(
            settings_for(args.model), args.ranker_base, pick_device(args.device)
        )
        wins = np.mean(
            [
                win_probabilities(model.pair_logits(instruction, texts))
                for instruction, texts in progress(list(answers.items()), "compare")
            ],
            axis=0,
        )
        rows = [[name, *(f"{100 * p:.4f}" for p in row)] for name, row in zip(names, wins)]
        write_text(
            args.output, "\n".join(",".join(row) for row in [["policy", *names], *rows]) + "\n"
        )
        plot_heatmap(wins, names, f"by the {args.model}, n = {len(answers)}", plots)


def answers_by_instruction(paths: list[Path]) -> tuple[dict[str, list[str]], list[str]]:
    """Answers of all policies to each instruction, and the policies' names. UserError if instructions differ."""
    outputs = {path: {row["instruction"]: row for row in read_outputs(path)} for path in paths}
    first = outputs[paths[0]]
    for path, rows in outputs.items():
        if rows.keys() != first.keys():
            raise UserError(f"{path} and {paths[0]} answer different instructions; answer the same")
    names = [next(iter(rows.values()))["generator"] for rows in outputs.values()]
    return {
        instruction: [rows[instruction]["output"] for rows in outputs.values()]
        for instruction in first
    }, names


def plot_heatmap(wins: Array, names: list[str], title: str, files: list[Path]) -> None:
    """Row beats column, in per cent; white is a draw."""
    plt = pyplot()
    short = [name.split("/", 1)[-1] for name in names]
    size = 2.2 + 0.6 * len(names)
    figure, axes = plt.subplots(figsize=(size + 0.8, size), layout="constrained")
    reach = max(1.0, float(np.abs(100 * wins - 50).max()))
    image = axes.imshow(100 * wins, cmap="PuOr", vmin=50 - reach, vmax=50 + reach)
    for i, row in enumerate(100 * wins):
        for j, value in enumerate(row):
            axes.text(
                j,
                i,
                f"{value:.0f}",
                ha="center",
                va="center",
                color="white" if abs(value - 50) > 0.7 * reach else "black",
            )
    axes.set_xticks(range(len(names)), short, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), short)
    axes.set(xlabel="loses", ylabel="wins", title=f"Row beats column (%), {title}")
    figure.colorbar(image, ax=axes, label="won (%)", shrink=0.8)
    save(figure, files)


if __name__ == "__main__":
    run(main)
