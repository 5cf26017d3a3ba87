"""Leaderboard rows of AlpacaEval from published annotations, by alpaca-eval's own code.

    python src/evaluation/recompute_alpaca_eval.py --annotations annotations.json --difficulty df_gamed.csv

Reads   annotations in alpaca-eval's form (JSON list or parquet): instruction, output_1, output_2, generator_2,
        preference; a column `model` tells apart several models in one file
Prints  one JSON object a model, one a line, rates in per cent: model, win_rate, standard_error,
        length_controlled_winrate, avg_length, n_total, lc_source, and a note where rows are missing

The length-controlled (LC) win rate of the leaderboard needs the hub's df_gamed.csv, which knows an instruction
by its position among the 805: rows are put there by their instruction, whatever is missing. The leaderboard took
the place in the file instead; where that differs, its way is given too, as length_controlled_winrate_by_place_in_file.
Without df_gamed.csv LC comes from `length_controlled_minimal`, which knows no difficulties; lc_source says which it was.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pandas as pd

import _path  # noqa: F401
from sppo.core.artifacts import file_hash, read_json
from sppo.core.errors import UserError, run
from sppo.evaluation.alpaca_eval import (
    CANONICAL_SIZE,
    OFFICIAL_DIFFICULTY,
    canonical_position,
    length_model,
    metrics,
)

COLUMNS = ("instruction", "output_1", "output_2", "generator_1", "generator_2", "preference")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--annotations",
        type=Path,
        required=True,
        help="annotations.json, or a parquet of several models",
    )
    parser.add_argument(
        "--difficulty", type=Path, help="df_gamed.csv; without it LC is the minimal formula's"
    )
    args = parser.parse_args()
    if args.difficulty and not args.difficulty.is_file():
        raise UserError(
            f"--difficulty {args.difficulty} is missing; download df_gamed.csv or leave the flag out"
        )
    for model, rows in read_annotations(args.annotations).groupby("model", sort=False):
        print(json.dumps({"model": model, **leaderboard_row(rows, args.difficulty)}), flush=True)


def read_annotations(path: Path) -> pd.DataFrame:
    """Annotations with `model`; UserError if the file or a column is missing or broken."""
    if not path.is_file():
        raise UserError(f"no annotations {path}")
    if path.suffix == ".parquet":
        try:
            frame = pd.read_parquet(path)
        except Exception as error:  # pyarrow raises several unrelated types for a broken file
            raise UserError(f"{path} is not a readable parquet file: {error}") from None
    else:
        rows = read_json(path)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(f"{path} is not a list of annotations")
        frame = pd.DataFrame(rows)
    missing = [column for column in COLUMNS if column not in frame]
    if missing or frame.empty:
        raise UserError(
            f"{path} has {'no rows' if frame.empty else 'no column ' + ', '.join(missing)}; alpaca-eval's annotations "
            f"have {', '.join(COLUMNS)}"
        )
    frame["preference"] = pd.to_numeric(frame["preference"], errors="coerce")
    frame = frame if "model" in frame else frame.assign(model=frame["generator_2"])
    return (
        frame.sort_values("row", kind="stable") if "row" in frame else frame
    )  # `row`: place in the published file


def leaderboard_row(rows: pd.DataFrame, difficulty: Path | None) -> dict:
    """The package's row of one model, from its annotations in the order of their file."""
    model = rows["model"].iloc[0]
    if rows["instruction"].duplicated().any():
        twice = rows.loc[rows["instruction"].duplicated(), "instruction"].iloc[0]
        raise UserError(
            f"{model} has two annotations of the instruction {twice[:60]!r}; drop one, or name the models apart in `model`"
        )
    rows = rows.assign(position=rows["instruction"].map(canonical_position)).reset_index(drop=True)
    kept = rows[rows["preference"].between(0, 2)]
    if len(kept) < 5:
        raise UserError(
            f"{model} has {len(kept)} judged instructions; the length-controlled metric needs at least 5"
        )
    ours, others = rows["position"].notna(), rows.loc[rows["position"].isna(), "instruction"]
    if difficulty and len(others):
        raise UserError(
            f"{model}: {others.iloc[0][:60]!r} is not one of AlpacaEval's {CANONICAL_SIZE} instructions; leave --difficulty out"
        )
    with length_model(len(rows), difficulty) as (formula, file):
        aligned = (
            kept.set_axis(kept["position"].to_numpy(dtype=int)).sort_index() if difficulty else kept
        )
        row = metrics(aligned, formula, file)
        result = {
            "win_rate": float(row["win_rate"]),
            "standard_error": float(row["standard_error"]),
            "length_controlled_winrate": float(row["length_controlled_winrate"]),
            "avg_length": int(rows["output_2"].str.len().mean()),
            "n_total": int(row["n_total"]),
            "lc_source": lc_source(formula, difficulty),
        }
        if difficulty and (rows["position"] != rows.index).any():
            by_place = metrics(kept, formula, file)["length_controlled_winrate"]
            result["length_controlled_winrate_by_place_in_file"] = float(by_place)
    notes = []
    if ours.all() and len(rows) < CANONICAL_SIZE:
        notes.append(
            f"{CANONICAL_SIZE - len(rows)} of the {CANONICAL_SIZE} instructions are absent: the leaderboard's avg_length, of all "
            "outputs, may differ by a few characters"
        )
    if "length_controlled_winrate_by_place_in_file" in result:
        notes.append(
            "rows are not at their instructions' places: the leaderboard's LC took difficulties by place in the file"
        )
    if len(kept) < len(rows):
        notes.append(f"{len(rows) - len(kept)} annotations have no preference and are left out")
    return result | ({"note": "; ".join(notes)} if notes else {})


def lc_source(formula: str, difficulty: Path | None) -> str:
    """Where LC comes from, as the reader of a table must know it."""
    if not difficulty:
        return f"{formula}, without instruction difficulties: not the leaderboard's"
    if file_hash(difficulty) == OFFICIAL_DIFFICULTY:
        return f"{formula} with the official df_gamed.csv"
    return f"{formula} with {difficulty.name}, which is not the official df_gamed.csv: approximate"


if __name__ == "__main__":
    run(main)
