"""Tables as Markdown and as a web page."""

from __future__ import annotations

import html
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


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]], ours: Sequence[bool] = ()) -> str:
    """A table of plain texts; rows for which `ours` is true are shaded."""
    def line(cells: Sequence[str], tag: str, shaded: bool = False) -> str:
        return ("<tr class=ours>" if shaded else "<tr>") + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>\n"

    body = [line(cells, "td", bool(ours) and ours[number]) for number, cells in enumerate(rows)]
    return f"<div><table>\n{line(head, 'th')}{''.join(body)}</table></div>\n"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The same in Markdown."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [list(head), ["---"] * len(head), *escaped]) + "\n"
