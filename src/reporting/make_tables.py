"""The papers' tables: published figures beside our own.

Reads   config/published/*.csv (figures as printed, with their source) and index.csv (title and base
        model of each table); the evaluations of this experiment, as far as they exist
Writes  results/[name/]tables/<table>.{csv,md,tex}, one line for each figure: row, metric,
        published, ours, difference, comparable, source, note;
        all.md and all.html, with all tables;
        measured.md, with only the lines that have a figure of ours

A dash means that we have no such run. `comparable` is yes if the base model and the judge are the
same as in the source. Otherwise it gives the reason, and the difference compares two setups, not
two implementations.
"""

from __future__ import annotations

import argparse
import csv
from decimal import Decimal
from html import escape
from pathlib import Path
from typing import Any

import _path  # noqa: F401
from sppo.core.artifacts import recorded, write_text
from sppo.core.errors import UserError, run
from sppo.evaluation.registry import by_artifact
from sppo.evaluation.results import read_evaluation
from sppo.reporting.table_formats import (
    csv_table,
    html_table,
    latex_table,
    markdown_table,
    page,
    paragraph,
)

COLUMNS = ("row", "metric", "published", "ours", "difference", "comparable", "source", "note")
PUBLISHED = (
    "table",
    "row",
    "run",
    "iteration",
    "artifact",
    "metric",
    "published",
    "source",
    "note",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--published", type=Path, default=Path("config/published"))
    parser.add_argument(
        "--results",
        type=Path,
        required=True,
        help="folder of the experiment: results/ or results/<name>/",
    )
    parser.add_argument("--base", required=True, help="name of the experiment's base policy")
    parser.add_argument(
        "--output", type=Path, required=True, help="all.md; the other files are written beside it"
    )
    args = parser.parse_args()
    base, results = args.base, args.results
    texts: dict[Path, str] = {}
    sections: list[str] = []
    measured: list[list[str]] = []
    for entry in read_csv(args.published / "index.csv", ("table", "title", "base")):
        lines = [
            compared(line, results, entry["base"] == base)
            for line in read_csv(args.published / f"{entry['table']}.csv", PUBLISHED)
        ]
        for suffix, text in table_files(entry, lines).items():
            texts[args.output.with_name(entry["table"] + suffix)] = text
        sections.append(section(entry, lines))
        for line in lines:
            if line["ours"] != "-":
                title_and_row = f"{entry['title']}: {line['row']}"
                measured.append(list((line | {"row": title_and_row}).values()))
    markdown_tables = "\n".join(text for path, text in texts.items() if path.suffix == ".md")
    texts[args.output] = (
        f"# Published and measured\n\nOurs: {base}, {results}.\n\n{markdown_tables}"
    )
    intro = paragraph(
        f"Ours: {base}, {results}. A dash means that we have no such run; "
        "rows that we measured are shaded."
    )
    texts[args.output.with_suffix(".html")] = page(
        "Published and measured", intro + "".join(sections)
    )
    texts[args.output.with_name("measured.md")] = markdown_table(COLUMNS, measured)
    for path, text in texts.items():
        of_all_tables = path.stem in (args.output.stem, "measured")
        source = args.published / ("index.csv" if of_all_tables else f"{path.stem}.csv")
        with recorded("tabulate", path, [source], vars(args)):
            write_text(path, text)


def read_csv(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """The rows of a CSV file with these columns. Any other file is a UserError."""
    if not path.is_file():
        raise UserError(f"{path} is missing; restore config/published from the repository")
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    complete = all(None not in row and None not in row.values() for row in rows)
    if not rows or tuple(rows[0]) != columns or not complete:
        raise UserError(f"{path} is not a table with the columns {', '.join(columns)}; fix it")
    return rows


def compared(line: dict[str, str], results: Path, same_base: bool) -> dict[str, str]:
    """A published figure with our figure beside it, as the cells of `COLUMNS`.

    The published line is in the form of `PUBLISHED`. `same_base` says whether the experiment and
    the table have the same base model. Our figure is rounded to the published number of decimals.
    """
    cells = {
        "row": line["row"],
        "metric": line["metric"],
        "published": line["published"],
        "ours": "-",
        "difference": "-",
        "comparable": "-",
        "source": line["source"],
        "note": line["note"],
    }
    if line["run"] == "-" or line["artifact"] == "-":
        return cells
    file = results / line["run"] / f"iter{line['iteration']}" / line["artifact"]
    found = read_evaluation(file) if file.is_file() else {}
    if found.get(line["metric"]) is None:
        return cells
    published = Decimal(line["published"])
    ours = Decimal(repr(found[line["metric"]]))
    return cells | {
        "ours": str(ours.quantize(published)),
        "difference": f"{(ours - published).quantize(published):+}",
        "comparable": comparable(found, line, same_base),
    }


def comparable(found: dict[str, Any], line: dict[str, str], same_base: bool) -> str:
    """`yes`, or what differs from the setup of the published line's source."""
    reasons = [] if same_base else ["other base model"]
    evaluation = by_artifact(line["artifact"])
    if evaluation:
        reasons += evaluation.differences(found)
    if line["metric"] == "length_controlled_winrate" and found.get("length_controlled_warning"):
        reasons.append("ours is doubtful")
    return ", ".join(reasons) or "yes"


def table_files(entry: dict[str, str], lines: list[dict[str, str]]) -> dict[str, str]:
    """The files of one table: text by suffix. The LaTeX table has only the first five columns."""
    cells = [list(line.values()) for line in lines]
    caption = f"{entry['title']}; source: {lines[0]['source']}"
    return {
        ".csv": csv_table(COLUMNS, cells),
        ".md": markdown(entry, cells),
        ".tex": latex_table(COLUMNS[:5], [line[:5] for line in cells], "llrrr", caption),
    }


def markdown(entry: dict[str, str], cells: list[list[str]]) -> str:
    """One table of all.md, with its heading."""
    base = f"Base model of the source: {entry['base']}.\n\n" if entry["base"] else ""
    return f"## {entry['title']}\n\n{base}{markdown_table(COLUMNS, cells)}"


def section(entry: dict[str, str], lines: list[dict[str, str]]) -> str:
    """One table of all.html; it is unfolded if it holds a figure of ours."""
    ours = [line["ours"] != "-" for line in lines]
    opened = " open" if any(ours) else ""
    base = paragraph(f"Base model of the source: {entry['base']}.") if entry["base"] else ""
    table = html_table(COLUMNS, [list(line.values()) for line in lines], ours)
    return (
        f"<details{opened}><summary><b>{escape(entry['title'])}</b></summary>\n"
        f"{base}{table}</details>\n"
    )


if __name__ == "__main__":
    run(main)
