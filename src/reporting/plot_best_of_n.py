"""Best of n by n: win rate, LC and average length, always from the same samples.

Reads   best_of_{n}/alpaca_eval.json and nash_of_{n}/alpaca_eval.json, one for each n
Writes  a table (.csv), a plot (.png and .svg) and their records
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import _path  # noqa: F401
from sppo.core.artifacts import recorded_all, write_text
from sppo.core.errors import UserError, run
from sppo.evaluation.results import read_evaluation
from sppo.reporting.figures import plot_win_rates
from sppo.reporting.table_formats import csv_table

COLUMNS = ("win_rate", "standard_error", "length_controlled_winrate", "avg_length", "n_total")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--alpaca-eval",
        type=Path,
        nargs="+",
        required=True,
        help="{best,nash}_of_{n}/alpaca_eval.json",
    )
    parser.add_argument("--output", type=Path, required=True, help="best_of_n.csv")
    parser.add_argument(
        "--plot", type=Path, required=True, help="best_of_n.png; an .svg is written beside it"
    )
    args = parser.parse_args()
    judged: dict[str, dict[int, dict[str, Any]]] = {"best": {}, "nash": {}}
    for path in args.alpaca_eval:
        match = re.fullmatch(r"(best|nash)_of_(\d+)", path.parent.name)
        if not match:
            raise UserError(
                f"{path} is not in a folder best_of_<number> or nash_of_<number>; "
                "give best_of_<number>/alpaca_eval.json"
            )
        judged[match[1]][int(match[2])] = read_evaluation(path)
    by_n = {choice: dict(sorted(found.items())) for choice, found in judged.items() if found}
    plots = [args.plot, args.plot.with_suffix(".svg")]
    with recorded_all("tabulate", (args.output, *plots), args.alpaca_eval, {}):
        rows = []
        for choice, found in by_n.items():
            for n, evaluation in found.items():
                rows.append((str(n), choice, *(str(evaluation[column]) for column in COLUMNS)))
        write_text(args.output, csv_table(("n", "choice", *COLUMNS), rows))
        others = {"Nash": by_n["nash"]} if "nash" in by_n else {}
        best = by_n.get("best") or by_n["nash"]
        plot_win_rates(best, "n of best-of-n (1 is the policy itself)", plots, others)


if __name__ == "__main__":
    run(main)
