"""The papers' tables, published beside measured.

Reads   config/published/*.csv (figures as printed, with source) and index.csv (title and base model of each table);
        whatever evaluations of this experiment exist
Writes  results/[name/]tables/<table>.{csv,md,tex}, one line a figure: row, metric, published, ours, difference,
        comparable, source, note; all.md and all.html, the tables one after another, and
        measured.md, only the lines with a figure of ours
A dash stands where we made no such run. `comparable` says yes where base model and judge are the source's;
elsewhere the difference tells two setups apart, not two implementations, and the reason is given.
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
    parser.add_argument("--base", required=True, help="what the experiment's base policy is")
    parser.add_argument(
        "--output", type=Path, required=True, help="all.md; the other files go beside it"
    )
    args = parser.parse_args()
    index = read_csv(args.published / "index.csv", ("table", "title", "base"))
    texts: dict[Path, str] = {}
    sections, measured = [], []
    for entry in index:
        lines = [
            compared(line, args.results, entry["base"] == args.base)
            for line in read_csv(args.published / f"{entry['table']}.csv", PUBLISHED)
        ]
        cells = [list(line.values()) for line in lines]
        printed = [line[:5] for line in cells]  # the notes stand in the other two
        tex = latex_table(
            COLUMNS[:5], printed, "llrrr", f"{entry['title']}; source: {lines[0]['source']}"
        )
        for suffix, text in (
            (".csv", csv_table(COLUMNS, cells)),
            (".md", markdown(entry, cells)),
            (".tex", tex),
        ):
            texts[args.output.with_name(entry["table"] + suffix)] = text
        sections.append(section(entry, lines))
        measured += [
            line | {"row": f"{entry['title']}: {line['row']}"}
            for line in lines
            if line["ours"] != "-"
        ]
    together = "\n".join(text for path, text in texts.items() if path.suffix == ".md")
    texts[args.output] = (
        f"# Published and measured\n\nOurs: {args.base}, {args.results}.\n\n{together}"
    )
    intro = paragraph(
        f"Ours: {args.base}, {args.results}. A dash stands where we made no such run; rows that we measured are shaded."
    )
    texts[args.output.with_suffix(".html")] = page(
        "Published and measured", intro + "".join(sections)
    )
    texts[args.output.with_name("measured.md")] = markdown_table(
        COLUMNS, [list(line.values()) for line in measured]
    )
    for path, text in texts.items():
        table = args.published / (
            "index.csv" if path.stem in (args.output.stem, "measured") else f"{path.stem}.csv"
        )
        with recorded("tabulate", path, [table], vars(args)):
            write_text(path, text)


def read_csv(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """Rows of a CSV file that has these columns; anything else is a UserError."""
    if not path.is_file():
        raise UserError(f"{path} is missing; restore config/published from the repository")
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    if (
        not rows
        or tuple(rows[0]) != columns
        or any(None in row or None in row.values() for row in rows)
    ):
        raise UserError(f"{path} is not a table with the columns {', '.join(columns)}; fix it")
    return rows


def compared(line: dict[str, str], results: Path, same_base: bool) -> dict[str, str]:
    """One published figure with our own beside it."""
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
    published, ours = Decimal(line["published"]), Decimal(repr(found[line["metric"]]))
    places = Decimal(1).scaleb(published.as_tuple().exponent)
    return cells | {
        "ours": str(ours.quantize(places)),
        "difference": f"{(ours - published).quantize(places):+}",
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


def markdown(entry: dict[str, str], cells: list[list[str]]) -> str:
    head = f"## {entry['title']}\n\n" + (
        f"Base model of the source: {entry['base']}.\n\n" if entry["base"] else ""
    )
    return head + markdown_table(COLUMNS, cells)


def section(entry: dict[str, str], lines: list[dict[str, str]]) -> str:
    """One table of all.html; it stands open if it holds a figure of ours."""
    ours = [line["ours"] != "-" for line in lines]
    base = paragraph(f"Base model of the source: {entry['base']}.") if entry["base"] else ""
    table = html_table(COLUMNS, [list(line.values()) for line in lines], ours)
    return f"<details{' open' if any(ours) else ''}><summary><b>{escape(entry['title'])}</b></summary>\n{base}{table}</details>\n"


if __name__ == "__main__":
    run(main)
