"""Table and plots of one run: the win rates of every iteration against the base.

Reads   alpaca_eval.json of each iteration by the judge, and by the ranker that made the training
        preferences; optionally the run's records, for the time of each iteration
Writes  a Markdown table (also printed), plots over iteration and over length as .png and .svg,
        their records
The iteration is read from the paths (.../iter{t}/...). Rates are in per cent; brackets are 95%
intervals.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from pathlib import Path
from typing import Any

import _path  # noqa: F401
from sppo.core.artifacts import iteration, read_json, recorded, write_text
from sppo.core.errors import UserError, run
from sppo.evaluation.results import doubts, rate, read_evaluation
from sppo.reporting.figures import judge_name, plot_over_length, plot_win_rates

NEEDED = (
    "win_rate",
    "win_rate_interval",
    "length_controlled_winrate",
    "length_controlled_winrate_interval",
    "avg_length",
    "reference_avg_length",
    "n_total",
    "judge",
    "judge_details",
    "reference",
)
Evaluations = dict[int, dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--alpaca-eval",
        type=Path,
        nargs="+",
        required=True,
        help="alpaca_eval.json by the judge, one per iteration",
    )
    parser.add_argument(
        "--ranker", type=Path, nargs="*", default=[], help="the same files by the ranker"
    )
    parser.add_argument(
        "--records",
        type=Path,
        nargs="*",
        default=[],
        help="records whose seconds are added up by iteration",
    )
    parser.add_argument("--output", type=Path, required=True, help="summary.md")
    parser.add_argument(
        "--plot", type=Path, required=True, help="win_rate.png; an .svg is written next to it"
    )
    parser.add_argument(
        "--length-plot",
        type=Path,
        required=True,
        help="win rates over average length, .png; an .svg is written next to it",
    )
    args = parser.parse_args()

    judged = read_evaluations(args.alpaca_eval)
    ranked = read_evaluations(args.ranker)
    setups = {(found["judge"], found["reference"], found["n_total"]) for found in judged.values()}
    if len(setups) > 1:
        raise UserError(
            f"the evaluations differ in judge, reference or n ({sorted(setups)}); give those of "
            "one run"
        )
    seconds = seconds_by_iteration(args.records)
    inputs = [*args.alpaca_eval, *args.ranker]
    plots = [args.plot, args.plot.with_suffix(".svg")]
    length_plots = [args.length_plot, args.length_plot.with_suffix(".svg")]
    with contextlib.ExitStack() as records:
        for artifact in (args.output, *plots, *length_plots):
            records.enter_context(
                recorded("tabulate", artifact, inputs, {"records": len(args.records)})
            )
        text = table(judged, ranked, seconds)
        write_text(args.output, text)
        plot_win_rates(judged, "SPPO iteration (0 is the base policy)", plots)
        plot_over_length(judged, length_plots)
    print(text, end="")


def read_evaluations(paths: list[Path]) -> Evaluations:
    """Evaluations by iteration, in order.

    UserError for two files of one iteration, a file of another policy, or a missing field.
    """
    evaluations: Evaluations = {}
    for path in paths:
        number = iteration(path)
        found = read_evaluation(path)
        missing = [key for key in NEEDED if key not in found]
        if missing:
            raise UserError(
                f"{path} has no {missing[0]}; make it again with evaluate_alpaca_eval.py"
            )
        if number in evaluations:
            raise UserError(f"{path} is a second evaluation of iteration {number}; give one")
        evaluations[number] = found
    return dict(sorted(evaluations.items()))


def seconds_by_iteration(records: list[Path]) -> dict[int, float]:
    """Total wall time of the stages, in seconds, by iteration.

    A rebuilt record has no seconds. Its iteration is left out, because a sum without it would be
    too small.
    """
    total: dict[int, float] = {}
    for path in records:
        number = iteration(path)
        seconds = read_json(path).get("seconds", math.nan)
        total[number] = total.get(number, 0.0) + float(seconds)
    return {number: seconds for number, seconds in total.items() if not math.isnan(seconds)}


def table(judged: Evaluations, ranked: Evaluations, seconds: dict[int, float]) -> str:
    """The table in Markdown, with notes; a missing value is a dash."""
    rows = [
        (
            "iteration",
            "win rate [95%]",
            "LC win rate [95%]",
            "by the ranker",
            "average length",
            "minutes",
        )
    ]
    for number, found in judged.items():
        rows.append(
            (
                str(number),
                rate(found, "win_rate"),
                rate(found, "length_controlled_winrate"),
                f"{ranked[number]['win_rate']:.1f}" if number in ranked else "-",
                str(found["avg_length"]),
                f"{seconds[number] / 60:.1f}" if number in seconds else "-",
            )
        )
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths)]
        lines.append("| " + " | ".join(cells) + " |")
    lines.insert(1, "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")
    # All evaluations have the same judge, reference and n.
    first = next(iter(judged.values()))
    sentences = doubts({f"iteration {number}": found for number, found in judged.items()})
    return (
        f"Per cent won against {first['reference']} on {first['n_total']} instructions, "
        f"by {judge_name(first)}; lengths in characters, {first['reference']}: "
        f"{first['reference_avg_length']}.\n\n"
        + "\n".join(lines)
        + "\n"
        + "".join(f"\n{sentence}\n" for sentence in sentences)
    )


if __name__ == "__main__":
    run(main)
