"""Tables as comma-separated values, Markdown, LaTeX and as a web page."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Iterable, Sequence

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
  :root {{ color-scheme: light dark; }}
  body {{ font: 15px/1.45 system-ui, sans-serif; margin: 1rem auto; max-width: 80rem; padding: 0 1rem; }}
  div {{ overflow-x: auto; }}
  table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
  th, td {{ padding: .2rem .6rem; text-align: left; border-bottom: 1px solid #8884; }}
  .ours {{ background: #0072b222; }}
</style>
<h1>{title}</h1>
{body}</html>
"""


def page(title: str, body: str) -> str:
    """A whole page around a body that is markup already."""
    return PAGE.format(title=html.escape(title), body=body)


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{html.escape(text)}</p>\n"


def html_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], ours: Sequence[bool] = ()
) -> str:
    """A table of plain texts; rows for which `ours` is true are shaded."""

    def line(cells: Sequence[str], tag: str, shaded: bool = False) -> str:
        return (
            ("<tr class=ours>" if shaded else "<tr>")
            + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
            + "</tr>\n"
        )

    body = [line(cells, "td", bool(ours) and ours[number]) for number, cells in enumerate(rows)]
    return f"<div><table>\n{line(head, 'th')}{''.join(body)}</table></div>\n"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The same in Markdown."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return (
        "\n".join(
            "| " + " | ".join(row) + " |" for row in [list(head), ["---"] * len(head), *escaped]
        )
        + "\n"
    )


def csv_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The same as comma-separated values."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    return text.getvalue()


def latex_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], columns: str, comment: str
) -> str:
    """The same as a booktabs table under a comment; `columns` is LaTeX's, such as `lrr`."""
    special = {character: f"\\{character}" for character in "&%$#_{}"} | {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
    }

    def line(cells: Sequence[str]) -> str:
        return (
            "  "
            + " & ".join(
                "".join(special.get(character, character) for character in cell) for cell in cells
            )
            + " \\\\\n"
        )

    return (
        f"% {comment}\n\\begin{{tabular}}{{{columns}}}\n  \\toprule\n{line(head)}  \\midrule\n{''.join(map(line, rows))}"
        "  \\bottomrule\n\\end{tabular}\n"
    )
