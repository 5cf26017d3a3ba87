"""Table and plots of one run: the evaluations of every iteration, beside those of control runs.

Reads   evaluations of each iteration (JSON; src/sppo/evaluation/registry.py), of the run and of the
        runs beside it; optionally training logs, for the log-ratios, and the run's records, for the
        time of each iteration
Writes  a Markdown table with sentences (also printed), plots over iteration and over length as .png
        and .svg, their records
Run and iteration are read from the paths (results/[name/][run/]iter{t}/...). Rates are in per cent;
brackets are 95% intervals.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import _path  # noqa: F401
from sppo.core.artifacts import iteration, json_lines, read_json, recorded_all, write_text
from sppo.core.errors import UserError, run
from sppo.evaluation.registry import EVALUATIONS, Column
from sppo.evaluation.results import collect, doubts, read_evaluation
from sppo.reporting.figures import judge_name, plot_over_length, plot_win_rates
from sppo.reporting.table_formats import aligned_table

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
Contents = dict[str, Any]  # of a JSON file


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run", default="", help="name of the run; the main run's name is empty, the default"
    )
    parser.add_argument(
        "--results", type=Path, required=True, help="folder of the experiment, results/[name/]"
    )
    parser.add_argument(
        "--base",
        type=Path,
        nargs="*",
        default=[],
        help="evaluations of the base, if another run made them",
    )
    parser.add_argument(
        "--evaluations",
        type=Path,
        nargs="*",
        default=[],
        help="evaluations of all iterations, of the run and of the runs beside it; none if the run "
        "trains nothing, so that there is only the base",
    )
    parser.add_argument(
        "--train-logs", type=Path, nargs="*", default=[], help="train_log.jsonl of the iterations"
    )
    parser.add_argument(
        "--records",
        type=Path,
        nargs="*",
        default=[],
        help="records whose seconds are added up by run and iteration",
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

    name = args.run or "main"
    found = collect(args.evaluations, args.results)
    for file in args.base:
        found.setdefault((name, 0), {})[file.stem] = read_evaluation(file)
    judged = judged_by_run(found, name)
    ratios = log_ratios(args.train_logs, args.results)
    seconds = seconds_by_iteration(args.records, args.results)
    inputs = [*args.evaluations, *args.base, *args.train_logs]
    plots = [args.plot, args.plot.with_suffix(".svg")]
    length_plots = [args.length_plot, args.length_plot.with_suffix(".svg")]
    artifacts = (args.output, *plots, *length_plots)
    with recorded_all("tabulate", artifacts, inputs, {"records": len(args.records)}):
        cyclic = how_cyclic(args.records, args.results, name)
        text = summary(found, judged, ratios, seconds, cyclic, name, args.output.parent)
        write_text(args.output, text)
        others = {other: of_run for other, of_run in judged.items() if other != name}
        plot_win_rates(judged[name], "iteration (0 is the base policy)", plots, others)
        plot_over_length(judged[name], length_plots)
    print(text, end="")


def judged_by_run(
    found: dict[tuple[str, int], Contents], name: str
) -> dict[str, dict[int, dict[str, Any]]]:
    """The contents of alpaca_eval.json by run and iteration, in order; the run `name` first.

    UserError if the run has none, a field is missing, or judge, reference or n differ.
    """
    judged: dict[str, dict[int, Contents]] = {name: {}}
    for (run_name, t), kinds in sorted(found.items(), key=lambda item: item[0][1]):
        if "alpaca_eval" not in kinds:
            continue
        missing = [key for key in NEEDED if key not in kinds["alpaca_eval"]]
        if missing:
            raise UserError(
                f"alpaca_eval.json of {run_name}, iteration {t} has no {missing[0]}; make it again"
                " with evaluate_alpaca_eval.py"
            )
        judged.setdefault(run_name, {})[t] = kinds["alpaca_eval"]
    if not judged[name]:
        raise UserError(f"no alpaca_eval.json of the run {name} is given; give one per iteration")
    lines = [line for of_run in judged.values() for line in of_run.values()]
    setups = {(line["judge"], line["reference"], line["n_total"]) for line in lines}
    if len(setups) > 1:
        raise UserError(
            f"the evaluations differ in judge, reference or n ({sorted(setups)}); give those that "
            "agree"
        )
    return judged


def place_of(path: Path, results: Path) -> tuple[str, int]:
    """Run and iteration of a file results/[run/]iter{t}/..."""
    first = path.relative_to(results).parts[0]
    return ("main" if first.startswith("iter") else first, iteration(path))


def log_ratios(logs: list[Path], results: Path) -> dict[tuple[str, int], tuple[float, float]]:
    """log pi/pi_t of winners and of losers in nats, by run and iteration.

    They are means over the pairs of the last optimiser step.
    """
    found = {}
    for path in logs:
        rows = [row for row in json_lines(path) if "log_ratio_chosen" in row]
        if not rows:
            raise UserError(f"{path} has no steps; delete it and run again")
        last = rows[-1]
        found[place_of(path, results)] = (last["log_ratio_chosen"], last["log_ratio_rejected"])
    return found


def seconds_by_iteration(records: list[Path], results: Path) -> dict[tuple[str, int], float]:
    """Total wall time of the stages, in seconds, by run and iteration.

    A rebuilt record has no seconds. Its iteration is left out, because a sum without it would be
    too small.
    """
    total: dict[tuple[str, int], float] = {}
    for path in records:
        place = place_of(path, results)
        seconds = read_json(path).get("seconds", math.nan)
        total[place] = total.get(place, 0.0) + float(seconds)
    return {place: seconds for place, seconds in total.items() if not math.isnan(seconds)}


def how_cyclic(records: list[Path], results: Path, name: str) -> list[str]:
    """A sentence about the preferences of the run's iterations; none if no record has the shares.

    The shares of an iteration are the means over its shards.
    """
    shares: dict[int, list[list[float]]] = {}
    for path in records:
        place = place_of(path, results)
        record = read_json(path)
        found = [
            record.get(key) for key in ("cyclic_triples", "cyclic_prompts", "condorcet_winner")
        ]
        if place[0] == name and path.parent.name == "preferences" and None not in found:
            shares.setdefault(place[1], []).append(found)
    if not shares:
        return []
    means = [[100 * sum(each) / len(each) for each in zip(*shares[t])] for t in sorted(shares)]
    triples, prompts, winners = (
        ", ".join(f"{value:.0f}%" for value in column) for column in zip(*means)
    )
    return [
        f"In iterations {', '.join(map(str, sorted(shares)))}, the preferences are cyclic in"
        f" {triples} of the triples of responses, and in {prompts} of the prompts. A response beats"
        f" each other one in {winners} of the prompts."
    ]


def summary(
    found: dict[tuple[str, int], Contents],
    judged: dict[str, dict[int, Contents]],
    ratios: dict[tuple[str, int], tuple[float, float]],
    seconds: dict[tuple[str, int], float],
    cyclic: list[str],
    name: str,
    folder: Path,
) -> str:
    """The table in Markdown with sentences about it; a missing value is a dash.

    found: contents of the evaluations by run and iteration. judged: those of AlpacaEval. cyclic:
    what `how_cyclic` says. folder: that of the run.
    """
    present = {kind for kinds in found.values() for kind in kinds}
    columns = [
        (each.name, column)
        for each in EVALUATIONS
        if each.name in present
        for column in each.columns
        if column.in_summary
    ]
    head = ["iteration", *(column.head for _, column in columns)]
    head += ["log-ratio, winner", "log-ratio, loser"] if ratios else []
    rows = []
    for run_name, of_run in judged.items():
        for t in of_run:
            place = (run_name, t)
            label = str(t) if run_name == name else f"{t}, {run_name}"
            rows.append([label, *cells(found[place], columns)])
            if ratios:
                rows[-1] += [f"{ratio:.1f}" for ratio in ratios[place]] if t else ["-", "-"]
            rows[-1].append(f"{seconds[place] / 60:.1f}" if place in seconds else "-")
    first = next(iter(judged[name].values()))
    in_words = [
        *what_happened(judged, name),
        *cyclic,
        *doubts(
            {
                f"iteration {t}" + (f" of {run_name}" if run_name != name else ""): line
                for run_name, of_run in judged.items()
                for t, line in of_run.items()
            }
        ),
        f"See next: {folder}/figures/win_rate.svg, and every prompt and answer in"
        f" {folder}/response_browser.html, which Snakemake makes on request.",
    ]
    return (
        f"Per cent won against {first['reference']} on {first['n_total']} instructions, by "
        f"{judge_name(first)}. Brackets are 95% intervals, lengths are in characters "
        f"({first['reference']}: {first['reference_avg_length']})"
        + (", log-ratios are log π/π_t in nats at the last step" if ratios else "")
        + ".\n\n"
        + aligned_table([*head, "minutes"], rows)
        + "".join(f"\n{sentence}\n" for sentence in in_words)
    )


def cells(kinds: Contents, columns: list[tuple[str, Column]]) -> list[str]:
    """The cells of one iteration. kinds: contents of its evaluations by name."""
    return [column.cell(kinds[name]) if name in kinds else "-" for name, column in columns]


def what_happened(judged: dict[str, dict[int, Contents]], name: str) -> list[str]:
    """Sentences that say what the win rates show, whichever way they go."""
    lines = judged[name]
    trained = [t for t in lines if t > 0]
    if not trained:
        return []
    last = trained[-1]
    rates = [lines[t]["win_rate"] for t in trained]
    if len(trained) == 1:
        course = f"After iteration {last} the policy wins {rates[0]:.1f}%"
    else:
        numbers = ", ".join(f"{rate:.1f}" for rate in rates)
        rising = all(later > earlier for earlier, later in zip(rates, rates[1:]))
        course = f"The policies win {numbers}%, " + (
            "each more than the one before" if rising else "not each more than the one before"
        )
    low, high = lines[last]["win_rate_interval"] or (rates[-1], rates[-1])
    verdict = "is above 50" if low > 50 else "is below 50" if high < 50 else "contains 50"
    sentences = [f"{course}. The last interval {verdict}."]
    for other, of_run in judged.items():
        for t, line in of_run.items():
            if other == name or t == 0 or t not in lines:
                continue
            sentences.append(
                f"The run {other} wins {line['win_rate']:.1f}% after iteration {t}, where"
                f" {name} wins {lines[t]['win_rate']:.1f}%. {overlap(line, lines[t])}"
            )
    return [*sentences, ONE_TRAINING]


ONE_TRAINING = (
    "Intervals are over instructions, of one training each. Another seed can change a win rate by"
    " several points."
)


def overlap(one: Contents, other: Contents) -> str:
    """A sentence that says whether the intervals of two win rates overlap; "" without them."""
    first, second = one["win_rate_interval"], other["win_rate_interval"]
    if not (first and second):
        return ""
    overlaps = first[0] <= second[1] and second[0] <= first[1]
    return f"Their intervals {'overlap' if overlaps else 'do not overlap'}."


if __name__ == "__main__":
    run(main)
