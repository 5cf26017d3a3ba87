"""Tables as CSV, Markdown, LaTeX and HTML."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Iterable, Sequence

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">\
<title>{title}</title>
<style>
  :root {{ color-scheme: light dark; }}
  body {{ font: 15px/1.45 system-ui, sans-serif; margin: 1rem auto; max-width: 80rem; \
padding: 0 1rem; }}
  div {{ overflow-x: auto; }}
  table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
  th, td {{ padding: .2rem .6rem; text-align: left; border-bottom: 1px solid #8884; }}
  .ours {{ background: #0072b222; }}
</style>
<h1>{title}</h1>
{body}</html>
"""

LATEX_SPECIAL = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
}


def page(title: str, body: str) -> str:
    """An HTML page; `title` is plain text and `body` is HTML."""
    return PAGE.format(title=html.escape(title), body=body)


def paragraph(text: str) -> str:
    """An HTML paragraph of plain text."""
    return f"<p>{html.escape(text)}</p>\n"


def html_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], ours: Sequence[bool] = ()
) -> str:
    """An HTML table of plain texts; the rows for which `ours` is true are shaded."""
    lines = [_html_row(head, "th")]
    for number, cells in enumerate(rows):
        shaded = bool(ours) and ours[number]
        lines.append(_html_row(cells, "td", shaded))
    return f"<div><table>\n{''.join(lines)}</table></div>\n"


def _html_row(cells: Sequence[str], tag: str, shaded: bool = False) -> str:
    start = "<tr class=ours>" if shaded else "<tr>"
    return start + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>\n"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; vertical bars in the rows are escaped."""
    lines = [list(head), ["---"] * len(head)]
    for cells in rows:
        lines.append([cell.replace("|", "\\|") for cell in cells])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def aligned_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table that is also readable in a terminal: all columns are aligned right."""
    lines = [list(head), *(list(cells) for cells in rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*lines)]
    texts = [
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths)) + " |\n"
        for line in lines
    ]
    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|\n"
    return "".join([texts[0], rule, *texts[1:]])


def csv_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as comma-separated values."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    return text.getvalue()


def latex_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], columns: str, comment: str
) -> str:
    """A LaTeX table for the package booktabs, with a comment above it.

    `columns` is the column specification of LaTeX's tabular, such as `lrr`.
    """
    body = "".join(_latex_row(cells) for cells in rows)
    return (
        f"% {comment}\n"
        f"\\begin{{tabular}}{{{columns}}}\n"
        "  \\toprule\n"
        f"{_latex_row(head)}"
        "  \\midrule\n"
        f"{body}"
        "  \\bottomrule\n"
        "\\end{tabular}\n"
    )


def _latex_row(cells: Sequence[str]) -> str:
    escaped = ["".join(LATEX_SPECIAL.get(char, char) for char in cell) for cell in cells]
    return "  " + " & ".join(escaped) + " \\\\\n"
