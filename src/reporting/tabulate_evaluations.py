"""All evaluations of all runs and iterations in one table.

Reads   whatever alpaca_eval.json, ranker_estimate.json, mt_bench.json, open_llm.json and records of pairs.parquet are given
Writes  the table as .csv, .md and .html, with a record each
Rates are per cent, brackets 95% intervals, lengths in characters. A dash stands where no such evaluation was made.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any

import _path  # noqa: F401
from sppo.core.artifacts import recorded, write_text
from sppo.core.errors import run
from sppo.evaluation.results import Evaluations, collect, decimals, doubts, rate
from sppo.reporting.table_formats import csv_table, html_table, markdown_table, page, paragraph

TASKS = ("arc_challenge", "truthfulqa_mc2", "winogrande", "gsm8k", "hellaswag", "mmlu", "average")
HEAD = (
    "run",
    "iteration",
    "pairs",
    "win rate [95%]",
    "LC win rate [95%]",
    "by the ranker",
    "length",
    "MT-Bench",
    "turn 1",
    "turn 2",
    "MT-Bench won against the base",
    *(f"Open LLM: {task}" for task in TASKS),
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
        "--files",
        type=Path,
        nargs="+",
        required=True,
        help="the evaluations and the records of pairs.parquet",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help=".md; .csv and .html are written beside it"
    )
    args = parser.parse_args()

    found = collect(args.files, args.results)
    rows = [row(*place, contents) for place, contents in found.items()]
    texts = {
        ".csv": csv_table(HEAD, rows),
        ".md": notes(found) + "\n\n" + markdown_table(HEAD, rows),
        ".html": page("All evaluations", paragraph(notes(found)) + html_table(HEAD, rows)),
    }
    with contextlib.ExitStack() as records:
        for suffix, text in texts.items():
            records.enter_context(
                recorded(
                    "tabulate",
                    args.output.with_suffix(suffix),
                    args.files,
                    {"results": args.results},
                )
            )
            write_text(args.output.with_suffix(suffix), text)


def row(name: str, number: int, found: dict[str, Any]) -> list[str]:
    """One line of the table."""
    judged, ranked, mt, llm = (
        found.get(key, {}) for key in ("alpaca_eval", "ranker_estimate", "mt_bench", "open_llm")
    )
    pairs = found.get("pairs.parquet.record", {}).get("pairs")
    return [
        name,
        str(number),
        "-" if pairs is None else str(pairs),
        rate(judged, "win_rate"),
        rate(judged, "length_controlled_winrate"),
        rate(ranked, "win_rate", interval=False),
        str(judged.get("avg_length", "-")),
        *(decimals(mt.get(key), 2) for key in ("average", "first_turn", "second_turn")),
        decimals((mt.get("against_base") or {}).get("win_rate")),
        *(decimals(llm.get(task)) for task in TASKS),
    ]


def notes(found: Evaluations) -> str:
    """Who judged what; by the first evaluation of each kind."""
    said = {
        "alpaca_eval": "AlpacaEval: {n_total} instructions, judged by {judge} against {reference}.",
        "mt_bench": "MT-Bench: {questions} questions of {data}, judged by {judge}.",
        "open_llm": "Open LLM: items of {data}, shots {shots}.",
    }
    first = {
        key: next((kinds[key] for kinds in found.values() if key in kinds), None) for key in said
    }
    judged = {
        f"{run}, iteration {t}": kinds["alpaca_eval"]
        for (run, t), kinds in found.items()
        if "alpaca_eval" in kinds
    }
    return " ".join(
        [
            "Per cent; brackets are 95% intervals; lengths in characters; a dash stands where no such evaluation was made.",
            *(said[key].format(**line) for key, line in first.items() if line),
            *doubts(judged),
        ]
    )


if __name__ == "__main__":
    run(main)
