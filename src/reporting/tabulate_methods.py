"""Comparison of the methods: the win rates and the cost of each run's policies.

Reads   alpaca_eval.json, ranker_estimate.json, and the records of responses, preferences or grades,
        pairs, logps and policies, of all runs and iterations that exist
Writes  the table as .csv, .md, .tex and .html; the figure as .png and .svg; a record of each
Rates are in per cent against the base, brackets are 95% intervals, and lengths are in characters.
Minutes and tokens are the cost of making the policy, without its evaluation. If a run shares the
first responses and preferences of the main run, they count as its own. The runs are not ranked,
because there is one training of each: another seed of the same method can lie outside its interval.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import _path  # noqa: F401
from sppo.core.artifacts import recorded_all, write_text
from sppo.core.errors import UserError, run
from sppo.evaluation.results import Evaluations, collect, decimals, doubts, rate
from sppo.reporting.figures import judge_name, plot_methods
from sppo.reporting.table_formats import (
    csv_table,
    html_table,
    latex_table,
    markdown_table,
    page,
    paragraph,
)

HEAD = (
    "run",
    "loss",
    "iteration",
    "win rate [95%]",
    "LC win rate [95%]",
    "by the preference model",
    "length",
    "pairs",
    "tokens sampled",
    "tokens trained",
    "minutes",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--results",
        type=Path,
        required=True,
        help="folder of the experiment: results/ or results/<name>/",
    )
    parser.add_argument("--files", type=Path, nargs="*", default=[], help="evaluations and records")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="methods.md; .csv, .tex and .html are written next to it",
    )
    parser.add_argument(
        "--plot", type=Path, required=True, help="methods.png; an .svg is written next to it"
    )
    args = parser.parse_args()

    found = collect(args.files, args.results)
    judged = {
        place: contents["alpaca_eval"]
        for place, contents in found.items()
        if "alpaca_eval" in contents
    }
    if not judged:
        raise UserError(
            f"no run under {args.results} has been evaluated; make an alpaca_eval.json first"
        )
    rows = [[name, *row(found, name, number)] for name, number in judged]
    above = notes(judged)
    texts = {
        ".csv": csv_table(HEAD, rows),
        ".md": above + "\n\n" + markdown_table(HEAD, rows),
        ".tex": latex_table(HEAD, rows, "llrlllrrrrr", above),
        ".html": page("Methods", paragraph(above) + html_table(HEAD, rows)),
    }
    plots = [args.plot, args.plot.with_suffix(".svg")]
    artifacts = [args.output.with_suffix(suffix) for suffix in texts] + plots
    with recorded_all("tabulate", artifacts, args.files, {"results": args.results}):
        for suffix, text in texts.items():
            write_text(args.output.with_suffix(suffix), text)
        plot_methods(judged, plots)


def row(found: Evaluations, name: str, number: int) -> list[str]:
    """One line of the table, without the run's name: of the run `name`, iteration `number`."""
    contents = found[name, number]
    judged = contents["alpaca_eval"]
    # Iteration 0 is the base policy, which no method made.
    loss = "-"
    cost = ["-"] * 4
    if number > 0:
        loss = loss_name(contents.get("policy.record", {}))
        cost = costs(found, name, number)
    return [
        loss,
        str(number),
        rate(judged, "win_rate"),
        rate(judged, "length_controlled_winrate"),
        rate(contents.get("ranker_estimate", {}), "win_rate", interval=False),
        str(judged["avg_length"]),
        *cost,
    ]


def loss_name(record: dict[str, Any]) -> str:
    """The loss that a policy was trained with, from the policy's record."""
    arguments = record.get("arguments", {})
    if arguments.get("loss"):
        return arguments["loss"]
    return "extrapolated" if "alpha" in arguments else "-"


def costs(found: Evaluations, name: str, number: int) -> list[str]:
    """Pairs, tokens sampled, tokens trained on, and minutes of one iteration; "-" if unknown."""
    contents = found[name, number]
    pairs = contents.get("pairs.parquet.record", {})
    policy = contents.get("policy.record", {})
    responses_and_judgments = source_records(found, pairs)
    tokens_sampled = None
    if responses_and_judgments:
        tokens_sampled = sum(record.get("tokens", 0) for record in responses_and_judgments)
    tokens_trained = None
    if "tokens_an_epoch" in policy:
        epochs = policy.get("arguments", {}).get("stop_epoch", 0)
        tokens_trained = round(policy["tokens_an_epoch"] * epochs)
    of_training = ("logps/", "policy.record", "lookahead.record")
    training = [record for file, record in contents.items() if file.startswith(of_training)]
    stages = [*responses_and_judgments, *training]
    if pairs:
        stages.append(pairs)
    # A rebuilt record has no seconds. Then the total is unknown.
    seconds = sum(record.get("seconds", math.nan) for record in stages)
    return [
        decimals(pairs.get("pairs"), 0),
        decimals(tokens_sampled, 0),
        decimals(tokens_trained, 0),
        decimals(None if math.isnan(seconds) else seconds / 60),
    ]


def source_records(found: Evaluations, pairs: dict[str, Any]) -> list[dict[str, Any]]:
    """Records of the responses and of the preferences or grades that the pairs were built from.

    pairs: the record of the pairs, whose inputs can be another run's files.
    """
    folders = ("responses/", "preferences/", "grades/")
    records = {}
    for contents in found.values():
        for file, record in contents.items():
            if file.startswith(folders):
                records[record["artifact"]] = record
    return [records[path] for path in pairs.get("inputs", {}) if path in records]


def notes(judged: Evaluations) -> str:
    """Sentences about the judge, what can be compared, and doubtful figures."""
    first = next(iter(judged.values()))
    alike = {key: line for key, line in judged.items() if setup_of(line) == setup_of(first)}
    sentences = [
        f"Per cent won against {first['reference']} on {first['n_total']} instructions, "
        f"by {judge_name(first)}; brackets are 95% intervals.",
    ]
    others = sorted({run for run, _ in judged.keys() - alike.keys()})
    if others:
        sentences.append(
            f"Rows of {', '.join(others)} have another judge, reference or number of instructions,"
            " and are not compared."
        )
    sentences += [
        "There is one training of each run. Intervals are over instructions only, and another seed"
        " can change a win rate by more than their width, so this is no ranking.",
        *doubts({f"{run}, iteration {t}": line for (run, t), line in judged.items()}),
    ]
    return " ".join(sentences)


def setup_of(found: dict[str, Any]) -> tuple[Any, ...]:
    """What must be equal so that two win rates can be compared."""
    model = found.get("judge_details", {}).get("model")
    return found["judge"], model, found["reference"], found["n_total"]


if __name__ == "__main__":
    run(main)
