"""What a policy gains by its proxy, and by the gold annotators, over its distance to the base.

Reads   the rows that run_study.py wrote for config/overoptimisation.yaml
Writes  overoptimisation.md and overoptimisation.svg beside it, and their records
Source  Gao et al., Scaling laws for reward model overoptimization (2210.10760): both are plotted
        over the square root of KL(policy || base)

A proxy is a preference model that was learned from the gold annotators' comparisons. Where its win
rate goes on rising and theirs does not, the policy exploits the proxy's mistakes.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import _path  # noqa: F401
from sppo.core.artifacts import json_lines, recorded_all, write_text
from sppo.core.errors import UserError, run
from sppo.reporting.figures import pyplot, save
from sppo.reporting.table_formats import markdown_table

Row = dict[str, Any]
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    rows_file = Path("docs/results/overoptimisation.jsonl")
    parser.add_argument("--rows", type=Path, default=rows_file)
    parser.add_argument("--output", type=Path, default=rows_file.with_suffix(".md"))
    args = parser.parse_args()

    rows = json_lines(args.rows) if args.rows.exists() else []
    if not rows:
        raise UserError(
            f"{args.rows} has no rows; make them with run_study.py --plan"
            " config/overoptimisation.yaml"
        )
    figure = args.output.with_suffix(".svg")
    with recorded_all("tabulate", (args.output, figure), [args.rows], {"rows": str(args.rows)}):
        write_text(args.output, page(rows, figure.name))
        plot(rows, figure)
    print(f"{args.output}: {len(rows)} rows")


def teacher(row: Row) -> str:
    """The name of the preference model that annotated a row's pairs."""
    proxy, _, size = row["regime"].partition("proxy_")
    return f"proxy of {size} comparisons" if size else "gold annotators"


def page(rows: list[Row], figure: str) -> str:
    """The page in Markdown."""
    lines = [
        [
            teacher(row),
            row["run"].replace("main", "sppo"),
            str(row["seed"]),
            str(each["iteration"]),
            f"{each['win_rate']:.1f}",
            f"{each['by_annotator']:.1f}",
            f"{each['measurements']['kl']:.1f} ± {each['measurements']['kl_standard_error']:.1f}",
            f"{each['prompt_strict']:.1f}",
        ]
        for row in rows
        for each in row["iterations"]
    ]
    head = ["annotated by", "loss", "seed", "iteration", "won by gold", "won by the annotator"]
    head += ["KL, nats", "IFEval strict"]
    return (
        "# Over-optimisation\n\n"
        "`src/reporting/plot_overoptimisation.py` writes this page from `overoptimisation.jsonl`.\n"
        "Win rates are per cent won against the base's answers, KL is KL(policy || base) ± its\n"
        "standard error. Each line is one training, so small differences can be chance.\n\n"
        f"{markdown_table(head, lines)}\n"
        f"![Gold and proxy win rates over the square root of KL]({figure})\n"
    )


def plot(rows: list[Row], file: Path) -> None:
    """A panel for each annotator: gold and its own win rate over the square root of KL."""
    plt = pyplot()
    names = sorted({teacher(row) for row in rows}, key=lambda name: (len(name), name))
    figure, panels = plt.subplots(
        1,
        len(names),
        figsize=(3 * len(names) + 0.5, 3.4),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for panel, name in zip(panels[0], names, strict=True):
        for colour, loss in zip(COLOURS, ("main", "dpo")):
            for row in rows:
                if teacher(row) == name and row["run"] == loss:
                    curves(panel, row, colour)
        panel.axhline(50, color="0.4", linewidth=1, linestyle=":")
        panel.set(title=name, xlabel="√KL to the base (√nats)")
    panels[0][0].set_ylabel("won against the base (%)")
    panels[0][0].legend(frameon=False, fontsize=8)
    save(figure, [file])


def curves(panel: Any, row: Row, colour: str) -> None:
    """Both win rates of one training, from the base on."""
    found = row["iterations"]
    distances = [0.0] + [math.sqrt(max(each["measurements"]["kl"], 0)) for each in found]
    loss = row["run"].replace("main", "sppo")
    gold = [50.0] + [each["win_rate"] for each in found]
    own = [50.0] + [each["by_annotator"] for each in found]
    panel.plot(distances, gold, color=colour, marker="o", label=f"{loss}, by gold")
    panel.plot(
        distances, own, color=colour, marker="s", linestyle="--", label=f"{loss}, by annotator"
    )


if __name__ == "__main__":
    run(main)
