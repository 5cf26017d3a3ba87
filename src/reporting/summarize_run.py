"""Table and plot of one run: what every iteration won against the base, by the judge and by the ranker.

Reads   alpaca_eval.json of each iteration by the judge, the same by the ranker that made the training
        preferences, and optionally the run's records for the time that each iteration took
Writes  a Markdown table (also printed), plots by iteration and over length as .png and .svg, their records
The iteration is read from the paths (.../iter{t}/...). Rates are per cent; brackets are 95% intervals.
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
    parser.add_argument("--ranker", type=Path, nargs="*", default=[], help="the same by the ranker")
    parser.add_argument(
        "--records",
        type=Path,
        nargs="*",
        default=[],
        help="records whose seconds are summed by iteration",
    )
    parser.add_argument("--output", type=Path, required=True, help="summary.md")
    parser.add_argument(
        "--plot", type=Path, required=True, help="win_rate.png; an .svg is written beside it"
    )
    parser.add_argument(
        "--length-plot",
        type=Path,
        required=True,
        help="the same over average length, .png; an .svg is written beside it",
    )
    args = parser.parse_args()

    judged, ranked = read_evaluations(args.alpaca_eval), read_evaluations(args.ranker)
    compared = {(line["judge"], line["reference"], line["n_total"]) for line in judged.values()}
    if len(compared) > 1:
        raise UserError(
            f"the evaluations differ in judge, reference or n ({sorted(compared)}); give those of one run"
        )
    seconds = seconds_by_iteration(args.records)
    inputs = [*args.alpaca_eval, *args.ranker]
    plots, length_plots = (
        [plot, plot.with_suffix(".svg")] for plot in (args.plot, args.length_plot)
    )
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

    UserError on a second one for an iteration, one of another policy, or a missing field.
    """
    found: Evaluations = {}
    for path in paths:
        number, line = iteration(path), read_evaluation(path)
        missing = [key for key in NEEDED if key not in line]
        if missing:
            raise UserError(
                f"{path} has no {missing[0]}; make it again with evaluate_alpaca_eval.py"
            )
        if number in found:
            raise UserError(f"{path} is a second evaluation of iteration {number}; give one")
        found[number] = line
    return dict(sorted(found.items()))


def seconds_by_iteration(records: list[Path]) -> dict[int, float]:
    """Summed wall time of the stages, in seconds, by iteration."""
    total: dict[int, float] = {}
    for path in records:
        # A rebuilt record does not know them, and a sum of the others is no iteration's time.
        number, seconds = iteration(path), read_json(path).get("seconds", math.nan)
        total[number] = total.get(number, 0.0) + float(seconds)
    return {number: seconds for number, seconds in total.items() if not math.isnan(seconds)}


def table(judged: Evaluations, ranked: Evaluations, seconds: dict[int, float]) -> str:
    """The table in Markdown; a dash where nothing is known."""
    head = (
        "iteration",
        "win rate [95%]",
        "LC win rate [95%]",
        "by the ranker",
        "average length",
        "minutes",
    )
    rows = []
    for number, line in judged.items():
        rows.append(
            (
                str(number),
                rate(line, "win_rate"),
                rate(line, "length_controlled_winrate"),
                f"{ranked[number]['win_rate']:.1f}" if number in ranked else "-",
                str(line["avg_length"]),
                f"{seconds[number] / 60:.1f}" if number in seconds else "-",
            )
        )
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = [
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths)) + " |"
        for row in [head, *rows]
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")
    any_line = next(iter(judged.values()))
    said = doubts({f"iteration {number}": line for number, line in judged.items()})
    below = "".join(f"\n{sentence}\n" for sentence in said)
    return (
        f"Per cent won against {any_line['reference']} on {any_line['n_total']} instructions, by {judge_name(any_line)}; lengths in "
        f"characters, {any_line['reference']}: {any_line['reference_avg_length']}.\n\n"
        + "\n".join(lines)
        + "\n"
        + below
    )


if __name__ == "__main__":
    run(main)
