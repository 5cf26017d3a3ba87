"""Leaderboard rows of AlpacaEval from published annotations, by alpaca-eval's own code.

    python src/evaluation/recompute_alpaca_eval.py \\
        --annotations annotations.json --difficulty df_gamed.csv

Reads   annotations in alpaca-eval's format (JSON list or parquet): instruction, output_1, output_2,
        generator_1, generator_2, preference; a column `model` if a file has several models
Prints  one JSON object for each model, one per line, rates in per cent: model, win_rate,
        standard_error, length_controlled_winrate, avg_length, n_total, lc_source, and a note if
        rows are missing

The leaderboard's length-controlled (LC) win rate needs df_gamed.csv from the hub. That file
identifies an instruction by its position among AlpacaEval's 805. Here each row is placed at the
position of its instruction, even if other rows are missing. The leaderboard used the row's place in
the file instead. If the two differ, length_controlled_winrate_by_place_in_file is the leaderboard's
value. Without df_gamed.csv, LC comes from `length_controlled_minimal`, which uses no difficulties;
lc_source says which of the two was used.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

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
        "--difficulty", type=Path, help="df_gamed.csv; without it LC comes from the minimal formula"
    )
    args = parser.parse_args()
    if args.difficulty and not args.difficulty.is_file():
        raise UserError(
            f"--difficulty {args.difficulty} does not exist; download df_gamed.csv or omit the flag"
        )
    for model, rows in read_annotations(args.annotations).groupby("model", sort=False):
        print(json.dumps({"model": model, **leaderboard_row(rows, args.difficulty)}), flush=True)


def read_annotations(path: Path) -> pd.DataFrame:
    """Annotations with a column `model`. UserError if the file or a column is missing or broken."""
    if not path.is_file():
        raise UserError(f"the annotations {path} do not exist; correct --annotations")
    if path.suffix == ".parquet":
        try:
            frame = pd.read_parquet(path)
        except Exception as error:  # pyarrow raises several unrelated types for a broken file
            raise UserError(f"{path} is not a readable parquet file: {error}") from None
    else:
        rows = read_json(path)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(f"{path} is not a list of annotations; give alpaca-eval's file")
        frame = pd.DataFrame(rows)
    missing = [column for column in COLUMNS if column not in frame]
    if missing or frame.empty:
        fault = "no rows" if frame.empty else "no column " + ", ".join(missing)
        raise UserError(f"{path} has {fault}; alpaca-eval's annotations have {', '.join(COLUMNS)}")
    frame["preference"] = pd.to_numeric(frame["preference"], errors="coerce")
    if "model" not in frame:
        frame = frame.assign(model=frame["generator_2"])
    if "row" in frame:  # the place in the published file
        frame = frame.sort_values("row", kind="stable")
    return frame


def leaderboard_row(rows: pd.DataFrame, difficulty: Path | None) -> dict[str, Any]:
    """The package's row of one model, from its annotations in the order of their file.

    UserError if an instruction is repeated, if fewer than 5 are judged, or if `difficulty` is given
    and an instruction is not AlpacaEval's.
    """
    model = rows["model"].iloc[0]
    repeated = rows.loc[rows["instruction"].duplicated(), "instruction"]
    if len(repeated):
        raise UserError(
            f"{model} has two annotations of the instruction {repeated.iloc[0][:60]!r}; drop one, "
            "or give each model its own name in `model`"
        )
    rows = rows.assign(position=rows["instruction"].map(canonical_position)).reset_index(drop=True)
    kept = rows[rows["preference"].between(0, 2)]
    if len(kept) < 5:
        raise UserError(
            f"{model} has {len(kept)} judged instructions, but the length-controlled metric needs "
            "at least 5; give more"
        )
    others = rows.loc[rows["position"].isna(), "instruction"]
    if difficulty and len(others):
        raise UserError(
            f"{model}: {others.iloc[0][:60]!r} is not one of AlpacaEval's {CANONICAL_SIZE} "
            "instructions; omit --difficulty"
        )
    with length_model(len(rows), difficulty) as (formula, file):
        aligned = kept
        if difficulty:
            aligned = kept.set_axis(kept["position"].to_numpy(dtype=int)).sort_index()
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
    if others.empty and len(rows) < CANONICAL_SIZE:
        notes.append(
            f"{CANONICAL_SIZE - len(rows)} of the {CANONICAL_SIZE} instructions are absent: the "
            "leaderboard's avg_length, of all outputs, may differ by a few characters"
        )
    if "length_controlled_winrate_by_place_in_file" in result:
        notes.append(
            "rows are not at their instructions' places: the leaderboard's LC took difficulties by "
            "place in the file"
        )
    if len(kept) < len(rows):
        notes.append(f"{len(rows) - len(kept)} annotations have no preference and are left out")
    if notes:
        result["note"] = "; ".join(notes)
    return result


def lc_source(formula: str, difficulty: Path | None) -> str:
    """The source of the LC win rate, for the reader of a table."""
    if not difficulty:
        return f"{formula}, without instruction difficulties: not the leaderboard's"
    if file_hash(difficulty) == OFFICIAL_DIFFICULTY:
        return f"{formula} with the official df_gamed.csv"
    return f"{formula} with {difficulty.name}, which is not the official df_gamed.csv: approximate"


if __name__ == "__main__":
    run(main)
