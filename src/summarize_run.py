"""Table and plot of one run: what every iteration won against the base, by the judge and by the ranker.

Reads   alpaca_eval.json of each iteration by the judge, the same by the ranker that made the training
        preferences, and optionally the run's records for the time that each iteration took
Writes  a Markdown table (also printed), a plot as .png and .svg, their records
The iteration is read from the paths (.../iter{t}/...). Rates are per cent; brackets are 95% intervals.
"""

from __future__ import annotations

import argparse
import contextlib
import re
from pathlib import Path
from typing import Any

from sppo.artifacts import read_json, recorded, write_text, written_whole
from sppo.errors import UserError, run

NEEDED = ("win_rate", "win_rate_interval", "length_controlled_winrate", "length_controlled_winrate_interval",
          "avg_length", "reference_avg_length", "n_total", "judge", "judge_details", "reference")
# Okabe-Ito colours, told apart by marker and line as well.
CURVES = (("win_rate", "win rate", "#0072B2", "o", "-"),
          ("length_controlled_winrate", "length-controlled win rate", "#D55E00", "s", "--"))

Evaluations = dict[int, dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alpaca-eval", type=Path, nargs="+", required=True, help="alpaca_eval.json by the judge, one an iteration")
    parser.add_argument("--ranker", type=Path, nargs="*", default=[], help="the same by the ranker")
    parser.add_argument("--records", type=Path, nargs="*", default=[], help="records whose seconds are summed by iteration")
    parser.add_argument("--output", type=Path, required=True, help="summary.md")
    parser.add_argument("--plot", type=Path, required=True, help="win_rate.png; an .svg is written beside it")
    args = parser.parse_args()

    judged, ranked = read_evaluations(args.alpaca_eval), read_evaluations(args.ranker)
    compared = {(line["judge"], line["reference"], line["n_total"]) for line in judged.values()}
    if len(compared) > 1:
        raise UserError(f"the evaluations differ in judge, reference or n ({sorted(compared)}); give those of one run")
    seconds = seconds_by_iteration(args.records)
    inputs = [*args.alpaca_eval, *args.ranker]
    plots = [args.plot, args.plot.with_suffix(".svg")]
    with contextlib.ExitStack() as records:
        for artifact in (args.output, *plots):
            records.enter_context(recorded("tabulate", artifact, inputs, {"records": len(args.records)}))
        text = table(judged, ranked, seconds)
        write_text(args.output, text)
        draw(judged, plots)
    print(text, end="")


def iteration(path: Path) -> int:
    """t of .../iter{t}/...; UserError if the path names none."""
    found = [re.fullmatch(r"iter(\d+)", part) for part in path.parts]
    numbers = [int(match[1]) for match in found if match]
    if not numbers:
        raise UserError(f"{path} lies in no folder iter<number>; give files of a run's iterations")
    return numbers[-1]


def read_evaluations(paths: list[Path]) -> Evaluations:
    """Evaluations by iteration, in order. UserError on a second one for an iteration, or a missing field."""
    found: Evaluations = {}
    for path in paths:
        number, line = iteration(path), read_json(path)
        missing = [key for key in NEEDED if key not in line]
        if missing:
            raise UserError(f"{path} has no {missing[0]}; make it again with evaluate_alpaca_eval.py")
        if number in found:
            raise UserError(f"{path} is a second evaluation of iteration {number}; give one")
        found[number] = line
    return dict(sorted(found.items()))


def seconds_by_iteration(records: list[Path]) -> dict[int, float]:
    """Summed wall time of the stages, in seconds, by iteration."""
    total: dict[int, float] = {}
    for path in records:
        number = iteration(path)
        total[number] = total.get(number, 0.0) + float(read_json(path)["seconds"])
    return total


def table(judged: Evaluations, ranked: Evaluations, seconds: dict[int, float]) -> str:
    """The table in Markdown; a dash where nothing is known."""
    head = ("iteration", "win rate [95%]", "LC win rate [95%]", "by the ranker", "average length", "minutes")
    rows = []
    for number, line in judged.items():
        rows.append((str(number), _rate(line, "win_rate"), _rate(line, "length_controlled_winrate"),
                     f"{ranked[number]['win_rate']:.1f}" if number in ranked else "-", str(line["avg_length"]),
                     f"{seconds[number] / 60:.1f}" if number in seconds else "-"))
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = ["| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths)) + " |" for row in [head, *rows]]
    lines.insert(1, "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")
    any_line = next(iter(judged.values()))
    return (f"Per cent won against {any_line['reference']} on {any_line['n_total']} instructions, by {_judge(any_line)}; lengths in "
            f"characters, {any_line['reference']}: {any_line['reference_avg_length']}.\n\n" + "\n".join(lines) + "\n")


def _judge(line: dict[str, Any]) -> str:
    """The judge's name as a reader knows it."""
    if line["judge"] in ("judge", "ranker"):
        return f"the embedded {line['judge']}"
    return line["judge_details"]["model"] if line["judge"] == "openai" else line["judge"]


def _rate(line: dict[str, Any], key: str) -> str:
    interval = line[f"{key}_interval"]
    return f"{line[key]:.1f}" + (f" [{interval[0]:.1f}, {interval[1]:.1f}]" if interval else "")


def draw(judged: Evaluations, files: list[Path]) -> None:
    """Win rate and LC by iteration with intervals, and the average length below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    matplotlib.rcParams |= {"svg.hashsalt": "sppo", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    any_line, numbers = next(iter(judged.values())), list(judged)
    figure, (rates, lengths) = plt.subplots(2, 1, sharex=True, figsize=(6, 6), height_ratios=[2, 1], layout="constrained")
    for (key, name, colour, marker, style), shift in zip(CURVES, (-0.03, 0.03)):
        values = [line[key] for line in judged.values()]
        ends = [line[f"{key}_interval"] or [line[key]] * 2 for line in judged.values()]
        # A percentile interval need not hold the estimate; an error bar cannot be negative.
        bars = [[max(0.0, v - low) for v, (low, _) in zip(values, ends)], [max(0.0, high - v) for v, (_, high) in zip(values, ends)]]
        rates.errorbar([number + shift for number in numbers], values, yerr=bars, label=name, color=colour, marker=marker,
                       linestyle=style, capsize=3)
    rates.axhline(50, color="0.4", linewidth=1, linestyle=":", label="no difference")
    rates.set(ylabel=f"won against {any_line['reference']} (%)",
              title=f"AlpacaEval by {_judge(any_line)}, n = {any_line['n_total']}, 95% intervals")
    rates.legend(frameon=False)
    lengths.plot(numbers, [line["avg_length"] for line in judged.values()], color="#009E73", marker="^", label="policy")
    lengths.axhline(any_line["reference_avg_length"], color="0.4", linewidth=1, linestyle=":", label=any_line["reference"])
    lengths.set(xlabel="SPPO iteration (0 is the base policy)", ylabel="average length\n(characters)", xticks=numbers)
    lengths.legend(frameon=False)
    for file in files:
        with written_whole(file) as temporary:
            svg = file.suffix == ".svg"
            figure.savefig(temporary, format=file.suffix[1:], dpi=160, metadata={"Date": None} if svg else None)
    plt.close(figure)


if __name__ == "__main__":
    run(main)
