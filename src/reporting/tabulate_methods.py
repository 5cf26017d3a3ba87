"""The methods beside each other: what each run's iterates won, and what they cost.

Reads   alpaca_eval.json, ranker_estimate.json and the records of responses, preferences or grades, pairs, logps and policies, of whatever
        runs and iterations are there
Writes  the table as .csv, .md, .tex and .html; the figure as .png and .svg; a record each
Rates are per cent against the base, brackets 95% intervals, lengths in characters. Minutes and tokens are those of making the policy,
evaluation apart; a run that shares main's first responses and preferences counts them as its own. The line above the table says of
which runs the LC intervals at the last iteration do not meet: only there is an order.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from pathlib import Path
from typing import Any

import _path  # noqa: F401
from sppo.core.artifacts import recorded, write_text
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
    "by the ranker",
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
    parser.add_argument(
        "--files", type=Path, nargs="+", required=True, help="evaluations and records"
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="methods.md; .csv, .tex and .html are written beside it",
    )
    parser.add_argument(
        "--plot", type=Path, required=True, help="methods.png; an .svg is written beside it"
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
    rows = [[place[0], *row(found, place)] for place in judged]
    said = notes(judged)
    texts = {
        ".csv": csv_table(HEAD, rows),
        ".md": said + "\n\n" + markdown_table(HEAD, rows),
        ".tex": latex_table(HEAD, rows, "llrlllrrrrr", said),
        ".html": page("Methods", paragraph(said) + html_table(HEAD, rows)),
    }
    plots = [args.plot, args.plot.with_suffix(".svg")]
    with contextlib.ExitStack() as records:
        for artifact in (*map(args.output.with_suffix, texts), *plots):
            records.enter_context(
                recorded("tabulate", artifact, args.files, {"results": args.results})
            )
        for suffix, text in texts.items():
            write_text(args.output.with_suffix(suffix), text)
        plot_methods(judged, plots)


def row(found: Evaluations, place: tuple[str, int]) -> list[str]:
    """One line of the table, without the run's name."""
    contents = found[place]
    judged, trained = contents["alpaca_eval"], contents.get("policy.record", {})
    arguments = trained.get("arguments", {})
    loss = arguments.get("loss") or ("extrapolated" if "alpha" in arguments else "-")
    if place[1] == 0:
        loss, cost = "-", ["-"] * 4
    else:
        cost = costs(found, place)
    return [
        loss,
        str(place[1]),
        rate(judged, "win_rate"),
        rate(judged, "length_controlled_winrate"),
        rate(contents.get("ranker_estimate", {}), "win_rate", interval=False),
        str(judged["avg_length"]),
        *cost,
    ]


def costs(found: Evaluations, place: tuple[str, int]) -> list[str]:
    """Pairs, tokens sampled and trained on, and minutes, of one iteration."""
    contents = found[place]
    pairs, trained = contents.get("pairs.parquet.record", {}), contents.get("policy.record", {})
    sampled = sampling(found, pairs)
    steps = [
        record for name, record in contents.items() if name.startswith(("logps/", "policy.record"))
    ]
    # A rebuilt record does not know its seconds.
    made = [*sampled, *steps, *([pairs] if pairs else [])]
    seconds = sum(record.get("seconds", math.nan) for record in made)
    epochs = trained.get("arguments", {}).get("stop_epoch", 0)
    tokens = round(trained["tokens_an_epoch"] * epochs) if "tokens_an_epoch" in trained else None
    drawn = sum(record.get("tokens", 0) for record in sampled) if sampled else None
    minutes = None if math.isnan(seconds) else seconds / 60
    return [decimals(value, 0) for value in (pairs.get("pairs"), drawn, tokens)] + [
        decimals(minutes)
    ]


def sampling(found: Evaluations, pairs: dict[str, Any]) -> list[dict[str, Any]]:
    """Records of the responses and preferences or grades that the pairs were built of, whichever run made them."""
    folders = ("responses/", "preferences/", "grades/")
    made = {
        record["artifact"]: record
        for contents in found.values()
        for name, record in contents.items()
        if name.startswith(folders)
    }
    return [made[path] for path in pairs.get("inputs", {}) if path in made]


def notes(judged: Evaluations) -> str:
    """Who judged, and between which runs the last iterations part."""
    any_line = next(iter(judged.values()))
    last = {name: judged[name, max(t for run, t in judged if run == name)] for name, _ in judged}
    ends = {
        name: line["length_controlled_winrate_interval"]
        for name, line in last.items()
        if line["length_controlled_winrate_interval"]
    }
    parted = [
        f"{one} above {', '.join(below)}"
        for one in ends
        if (below := [other for other in ends if ends[other][1] < ends[one][0]])
    ]
    said = doubts({f"{run}, iteration {t}": line for (run, t), line in judged.items()})
    return (
        f"Per cent won against the base's answers on {any_line['n_total']} instructions, by {judge_name(any_line)}; brackets are 95% intervals. At their last "
        f"iterations the LC intervals part "
        + (f"thus: {'; '.join(parted)}." if parted else "nowhere: there is no order.")
        + "".join(f" {sentence}" for sentence in said)
    )


if __name__ == "__main__":
    run(main)
