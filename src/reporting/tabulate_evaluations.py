"""All evaluations of all runs and iterations in one table.

Reads   the JSON files of evaluations (src/sppo/evaluation/registry.py) and records of pairs.parquet
Writes  the table as .csv, .md and .html, with a record each
Rates are in per cent, brackets are 95% intervals, and lengths are in characters. A dash means that
the evaluation was not made.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import _path  # noqa: F401
from sppo.core.artifacts import recorded_all, write_text
from sppo.core.errors import UserError, run
from sppo.evaluation.registry import EVALUATIONS
from sppo.evaluation.results import Evaluations, collect, doubts
from sppo.reporting.table_formats import csv_table, html_table, markdown_table, page, paragraph

COLUMNS = [(each.name, column) for each in EVALUATIONS for column in each.columns]
HEAD = ("run", "iteration", "pairs", *(column.head for _, column in COLUMNS))


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
        "--files",
        type=Path,
        nargs="*",
        default=[],
        help="the evaluations and the records of pairs.parquet",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help=".md; .csv and .html are written next to it"
    )
    args = parser.parse_args()

    found = collect(args.files, args.results)
    if not found:
        raise UserError(
            f"nothing under {args.results} has been evaluated; make an alpaca_eval.json first"
        )
    rows = [row(*place, contents) for place, contents in found.items()]
    texts = {
        ".csv": csv_table(HEAD, rows),
        ".md": notes(found) + "\n\n" + markdown_table(HEAD, rows),
        ".html": page("All evaluations", paragraph(notes(found)) + html_table(HEAD, rows)),
    }
    artifacts = [args.output.with_suffix(suffix) for suffix in texts]
    with recorded_all("tabulate", artifacts, args.files, {"results": args.results}):
        for artifact, text in zip(artifacts, texts.values(), strict=True):
            write_text(artifact, text)


def row(name: str, number: int, found: dict[str, Any]) -> list[str]:
    """One line of the table: of the run `name` and the iteration `number`.

    found: the contents of the iteration's files by name.
    """
    pairs = found.get("pairs.parquet.record", {}).get("pairs")
    cells = [column.cell(found.get(evaluation, {})) for evaluation, column in COLUMNS]
    return [name, str(number), "-" if pairs is None else str(pairs), *cells]


def notes(found: Evaluations) -> str:
    """Sentences about each kind of evaluation, such as its judge, and about doubtful figures.

    The facts about a kind come from its first evaluation; if they differ in others, a sentence says
    so.
    """
    sentences = [
        "Per cent; brackets are 95% intervals; lengths in characters; a dash means that no such "
        "evaluation was made."
    ]
    for evaluation in EVALUATIONS:
        made = [kinds[evaluation.name] for kinds in found.values() if evaluation.name in kinds]
        if made and evaluation.note:
            first, *others = dict.fromkeys(evaluation.note.format(**each) for each in made)
            sentences.append(first)
            if others:
                sentences.append("This differs in other rows, whose JSON files have the facts.")
    judged = {
        f"{run}, iteration {t}": kinds["alpaca_eval"]
        for (run, t), kinds in found.items()
        if "alpaca_eval" in kinds
    }
    return " ".join([*sentences, *doubts(judged)])


if __name__ == "__main__":
    run(main)
