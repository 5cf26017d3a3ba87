"""All evaluations of all runs and iterations in one table.

Reads   whatever alpaca_eval.json, ranker_estimate.json, mt_bench.json, open_llm.json and records of pairs.parquet are given
Writes  the table as .csv, .md and .html, with a record each
Rates are per cent, brackets 95% intervals, lengths in characters. A dash stands where no such evaluation was made.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
from pathlib import Path
from typing import Any

from sppo.artifacts import iteration, read_json, recorded, write_text
from sppo.errors import UserError, run
from sppo.markup import html_table, markdown_table, page, paragraph

TASKS = ("arc_challenge", "truthfulqa_mc2", "winogrande", "gsm8k", "hellaswag", "mmlu", "average")
HEAD = ("run", "iteration", "pairs", "win rate [95%]", "LC win rate [95%]", "by the ranker", "length", "MT-Bench", "turn 1", "turn 2",
        "MT-Bench won against the base", *(f"Open LLM: {task}" for task in TASKS))
Evaluations = dict[tuple[str, int], dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="folder of the experiment: results/ or results/<name>/")
    parser.add_argument("--files", type=Path, nargs="+", required=True, help="the evaluations and the records of pairs.parquet")
    parser.add_argument("--output", type=Path, required=True, help=".md; .csv and .html are written beside it")
    args = parser.parse_args()

    found: Evaluations = {}
    for file in args.files:
        found.setdefault(place(file, args.results), {})[file.name.removesuffix(".json")] = read_json(file)
    rows = [row(run_name, number, found[run_name, number]) for run_name, number in sorted(found, key=lambda at: (at[0] != "main", at))]
    texts = {".csv": comma_separated(rows), ".md": notes(found) + "\n\n" + markdown_table(HEAD, rows),
             ".html": page("All evaluations", paragraph(notes(found)) + html_table(HEAD, rows))}
    with contextlib.ExitStack() as records:
        for suffix, text in texts.items():
            records.enter_context(recorded("tabulate", args.output.with_suffix(suffix), args.files, {"results": args.results}))
            write_text(args.output.with_suffix(suffix), text)


def place(file: Path, results: Path) -> tuple[str, int]:
    """Run (`main` for the main one) and iteration of results/[run/]iter{t}/file."""
    try:
        parts = file.relative_to(results).parts
    except ValueError:
        raise UserError(f"{file} does not lie under {results}; give files of one experiment") from None
    return ("main" if parts[0].startswith("iter") else parts[0]), iteration(file)


def row(name: str, number: int, found: dict[str, Any]) -> list[str]:
    """One line of the table."""
    judged, ranked, mt, llm = (found.get(key, {}) for key in ("alpaca_eval", "ranker_estimate", "mt_bench", "open_llm"))
    pairs = found.get("pairs.parquet.record", {}).get("pairs")
    return [name, str(number), "-" if pairs is None else str(pairs), rate(judged, "win_rate"), rate(judged, "length_controlled_winrate"),
            rate(ranked, "win_rate", interval=False), str(judged.get("avg_length", "-")),
            *(decimals(mt.get(key), 2) for key in ("average", "first_turn", "second_turn")),
            decimals((mt.get("against_base") or {}).get("win_rate")), *(decimals(llm.get(task)) for task in TASKS)]


def decimals(value: float | None, places: int = 1) -> str:
    return "-" if value is None else f"{value:.{places}f}"


def rate(found: dict[str, Any], key: str, interval: bool = True) -> str:
    ends = found.get(f"{key}_interval") if interval else None
    return decimals(found.get(key)) + (f" [{ends[0]:.1f}, {ends[1]:.1f}]" if ends else "")


def notes(found: Evaluations) -> str:
    """Who judged what; by the first evaluation of each kind."""
    said = {"alpaca_eval": "AlpacaEval: {n_total} instructions, judged by {judge} against {reference}.",
            "mt_bench": "MT-Bench: {questions} questions of {data}, judged by {judge}.",
            "open_llm": "Open LLM: items of {data}, shots {shots}."}
    first = {key: next((kinds[key] for kinds in found.values() if key in kinds), None) for key in said}
    return " ".join(["Per cent; brackets are 95% intervals; lengths in characters; a dash stands where no such evaluation was made.",
                     *(said[key].format(**line) for key, line in first.items() if line)])


def comma_separated(rows: list[list[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([HEAD, *rows])
    return text.getvalue()


if __name__ == "__main__":
    run(main)
