"""The page of the study: tables, tests and figures from its rows.

Reads   docs/results/study.jsonl, a line per run and seed
Writes  study.md, and study_win_rates.svg and study_log_ratios.svg beside it, and their records

The unit is the seed, which decides prompts, responses, training and answers. Runs of one seed and
regime share their prompts, and in the first iteration their responses. So a run is compared with
`main` seed by seed.

* Intervals are 95% percentile intervals of a bootstrap that draws seeds and instructions. With
  three to five seeds they are too narrow, so the range over seeds is given too.
* p: paired t-test over seeds of the last win rate against main's, with Holm's correction within a
  regime. d: the mean difference over its standard deviation.
* Trend: Page's test that the win rates of main rise from iteration to iteration, with the base and
  without it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

import _path  # noqa: F401
from sppo.core.artifacts import json_lines, recorded_all, write_text
from sppo.core.errors import UserError, run
from sppo.reporting.figures import pyplot, save
from sppo.reporting.table_formats import markdown_table

Row = dict[str, Any]
RESAMPLES = 10_000
PANELS_IN_A_LINE = 8
# Of an iteration's measurements.json.
MEASURED = (
    "log_ratio_chosen",
    "log_ratio_rejected",
    "winners_raised",
    "order_right",
    "slope",
    "eta",
    "r_squared",
    "kl",
)
READING = """\
| word | meaning |
|---|---|
| few_steps, few_steps_float32 | the demo's settings |
| bound | eight epochs on 64 prompts with eta = 20, so that losses converge on their pairs |
| laptop | the preset for open questions |
| main | SPPO; the other runs are in [methods.md](../methods.md) |
| d | Cohen's d of the differences from main, seed by seed |
| p | paired t-test of these differences; Holm corrects it for the runs of the table |
| nats per unit of P-hat | slope of the log-ratios on P-hat; for the exact SPPO update it is eta |
"""
COLOURS = ("#0072B2", "#CC79A7", "#E69F00", "#009E73", "#D55E00", "#56B4E9")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=Path, default=Path("docs/results/study.jsonl"))
    parser.add_argument("--output", type=Path, default=Path("docs/results/study.md"))
    args = parser.parse_args()

    rows = json_lines(args.rows) if args.rows.exists() else []
    if not rows:
        raise UserError(f"{args.rows} has no rows; make them with src/tools/run_study.py")
    regimes = {row["regime"]: [] for row in rows}
    for row in rows:
        regimes[row["regime"]].append(row)
    folder, stem = args.output.parent, args.output.stem
    figures = [folder / f"{stem}_{name}.svg" for name in ("win_rates", "log_ratios")]
    with recorded_all("tabulate", (args.output, *figures), [args.rows], {"rows": str(args.rows)}):
        write_text(args.output, page(rows, regimes, stem))
        plot_win_rates(next(iter(regimes.values())), figures[0])
        plot_log_ratios(regimes, figures[1])
    print(f"{args.output}: {len(rows)} rows")


def page(rows: list[Row], regimes: dict[str, list[Row]], stem: str) -> str:
    """The page in Markdown."""
    machines = sorted({f"{row['processor']}, {row['computed_in']}" for row in rows})
    commits = sorted({short_commit(row["commit"]) for row in rows})
    parts = [
        "# The study\n",
        "`src/reporting/tabulate_study.py` writes this page from `study.jsonl`, which\n"
        "`.venv/bin/snakemake --cores all study` extends run by run. Win rates are per cent won\n"
        "against the base's answers, by exact annotators, or by the embedded judge in the regime\n"
        "`laptop`. Brackets are 95% intervals over seeds and instructions. With so few seeds they\n"
        "are too narrow, so look at the range too. With one seed they are over instructions\n"
        "only.\n",
        READING,
        f"Machines: {'; '.join(machines)}. Commits: {', '.join(commits)}. `+changes` means that\n"
        "files differed from the commit. Until 15e9bbb, rows that the study itself had added\n"
        "counted as such.\n",
    ]
    for regime, of_regime in regimes.items():
        parts += [f"## {regime}\n", win_rate_table(of_regime), trend(of_regime)]
        parts += [exploitability(of_regime)]
        parts += ["### Against main, seed by seed\n", comparison_table(of_regime)]
        parts += ["### What training did to the log-ratios\n", measurement_table(of_regime)]
    parts += [
        "## Figures\n",
        f"![Win rate by iteration]({stem}_win_rates.svg)\n",
        "Each panel of the next figure has its own scale.\n",
        f"![Log-ratios by step]({stem}_log_ratios.svg)\n",
    ]
    return "\n".join(part for part in parts if part)


def short_commit(revision: str | None) -> str:
    """The first digits of a commit, with `+changes` if files differed from it."""
    commit, changes, _ = str(revision).partition("+changes")
    return commit[:7] + changes


def by_run(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each run, sorted by seed; main first."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row["run"] != "main", row["seed"])):
        found.setdefault(row["run"], []).append(row)
    return found


def at(row: Row, t: int) -> Row | None:
    """The figures of a row's iteration t; None if it has no such iteration."""
    return next((each for each in row["iterations"] if each["iteration"] == t), None)


def win_rate_table(rows: list[Row]) -> str:
    """One line for each run and iteration, and for the base against itself."""
    lines = []
    bases = [row["base"] for row in rows if "base" in row]
    if bases:
        lines.append(["base", "0", *rates(bases), "-"])
    for name, of_run in by_run(rows).items():
        for t in sorted({each["iteration"] for row in of_run for each in row["iterations"]}):
            found = [each for row in of_run if (each := at(row, t)) is not None]
            previous = np.mean([each["against_previous"] for each in found])
            lines.append([name, str(t), *rates(found), f"{previous:.1f}"])
    head = ["run", "iteration", "seeds", "win rate", "range", "IFEval strict", "length"]
    return markdown_table([*head, "against the previous"], lines)


def rates(found: list[Row]) -> list[str]:
    """The cells of a run's iteration: seeds, win rate with interval and range, IFEval, length."""
    values = [each["win_rate"] for each in found]
    if len({len(each["preferences"]) for each in found}) > 1:
        raise UserError(
            "rows of one run have different numbers of judged instructions, such as after a change"
            " of alpaca_eval.limit; delete those of the old number and run the study again"
        )
    low, high = interval(np.array([each["preferences"] for each in found]))
    return [
        str(len(found)),
        f"{np.mean(values):.1f} [{low:.1f}, {high:.1f}]",
        f"{min(values):.1f} to {max(values):.1f}" if len(values) > 1 else "-",
        f"{np.mean([each['prompt_strict'] for each in found]):.1f}",
        f"{np.mean([each['length'] for each in found]):.0f}",
    ]


def interval(preferences: np.ndarray) -> tuple[float, float]:
    """95% interval of the mean of (seeds, instructions) in per cent, drawing both at random."""
    draw = np.random.default_rng(0)
    seeds, instructions = preferences.shape
    means = [
        preferences[draw.integers(seeds, size=seeds)][
            :, draw.integers(instructions, size=instructions)
        ].mean()
        for _ in range(RESAMPLES)
    ]
    low, high = np.percentile(means, [2.5, 97.5])
    return 100 * float(low), 100 * float(high)


def trend(rows: list[Row]) -> str:
    """Page's test for main's win rates over the iterations, with the base and without it."""
    from scipy.stats import page_trend_test

    main_rows = by_run(rows).get("main", [])
    length = min((len(row["iterations"]) for row in main_rows), default=0)
    if length < 3 or len(main_rows) < 2:  # the test needs three iterates
        return ""
    table = [
        [row["base"]["win_rate"], *(each["win_rate"] for each in row["iterations"][:length])]
        for row in main_rows
    ]
    with_base = page_trend_test(table)
    trained = page_trend_test([line[1:] for line in table])
    rising = sum(all(b > a for a, b in zip(line, line[1:])) for line in table)
    return (
        f"Page's trend test over {len(table)} seeds: p = {with_base.pvalue:.2g} for the base and"
        f" {length} iterations, p = {trained.pvalue:.2g} for the {length} iterations alone. The win"
        f" rate rises in every iteration in {rising} of {len(table)} seeds.\n"
    )


def exploitability(rows: list[Row]) -> str:
    """How often the iterates of main beat each other, and what the best reply to the last gains."""
    found = [row["round_robin"] for row in by_run(rows).get("main", []) if "round_robin" in row]
    if not found or len({len(matrix) for matrix in found}) > 1:
        return ""
    wins = np.mean(found, axis=0)
    if len(wins) < 3:  # the base is the only earlier iterate
        return ""
    head = ["main's iterate", *(f"against {t}" for t in range(len(wins)))]
    lines = [[str(t), *(f"{value:.1f}" for value in line)] for t, line in enumerate(wins)]
    best = int(wins[:-1, -1].argmax())
    return (
        f"Round robin, means over {len(found)} seeds; the row wins against the column, in per cent:"
        f"\n\n{markdown_table(head, lines)}\n"
        f"Of the earlier iterates, {best} does best against the last one, and beats it in"
        f" {wins[best, -1]:.1f}%.\n"
    )


def comparison_table(rows: list[Row]) -> str:
    """Each run against main on the seeds that both have, after the last iteration of both."""
    from scipy.stats import ttest_1samp

    runs = by_run(rows)
    mains = {row["seed"]: row for row in runs.get("main", [])}
    compared = []
    for name, of_run in runs.items():
        pairs = [(row, mains[row["seed"]]) for row in of_run if row["seed"] in mains]
        if name == "main" or len(pairs) < 2:
            continue
        t = min(len(row["iterations"]) for pair in pairs for row in pair)
        differences = np.array(
            [
                row["iterations"][t - 1]["win_rate"] - other["iterations"][t - 1]["win_rate"]
                for row, other in pairs
            ]
        )
        # The test is not defined for a run that equals main in every seed.
        p = float(ttest_1samp(differences, 0.0).pvalue) if differences.any() else 1.0
        compared.append((name, t, differences, p))
    corrected = holm([p for *_, p in compared])
    lines = []
    for (name, t, differences, p), p_holm in zip(compared, corrected, strict=True):
        spread = differences.std(ddof=1)
        effect = f"{differences.mean() / spread:+.1f}" if spread else "-"
        lines.append(
            [
                name,
                str(t),
                str(len(differences)),
                f"{differences.mean():+.1f}",
                f"{differences.min():+.1f} to {differences.max():+.1f}",
                effect,
                f"{p:.2g}",
                f"{p_holm:.2g}",
            ]
        )
    if not lines:
        return "No other run has two seeds yet.\n"
    head = ["run", "iteration", "seeds", "difference", "range", "d", "p", "p, Holm"]
    return markdown_table(head, lines)


def holm(p_values: list[float]) -> list[float]:
    """Holm's corrected p-values, in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, highest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[index]))
        corrected[index] = highest
    return corrected


def measurement_table(rows: list[Row]) -> str:
    """Realised log-ratios against targets after each iteration: means over seeds."""
    lines = []
    for name, of_run in by_run(rows).items():
        for t in range(1, max(len(row["iterations"]) for row in of_run) + 1):
            measured = [each["measurements"] for row in of_run if (each := at(row, t)) is not None]
            mean = {key: float(np.mean([each[key] for each in measured])) for key in MEASURED}
            lines.append(
                [
                    name,
                    str(t),
                    str(len(measured)),
                    f"{mean['log_ratio_chosen']:+.1f}",
                    f"{mean['log_ratio_rejected']:+.1f}",
                    f"{100 * mean['winners_raised']:.0f}",
                    f"{100 * mean['order_right']:.0f}",
                    f"{mean['slope'] * mean['eta']:.1f}",
                    f"{mean['r_squared']:.2f}",
                    f"{mean['kl']:.1f}",
                ]
            )
    head = ["run", "iteration", "seeds", "winner, nats", "loser, nats", "winners raised, %"]
    head += ["winner above loser, %", "nats per unit of P-hat", "R²", "KL to the base, nats"]
    return markdown_table(head, lines)


def plot_win_rates(rows: list[Row], file: Path) -> None:
    """Win rate by iteration of main and the runs with as many seeds; a thin line per seed."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    runs = by_run(rows)
    length = max(len(row["iterations"]) for row in rows)
    bases = {row["seed"]: row["base"]["win_rate"] for row in runs.get("main", [])}
    most_seeds = max(len(of_run) for of_run in runs.values())
    shown = [name for name in runs if len(runs[name]) == most_seeds]
    for colour, name in zip(COLOURS, shown):
        shortest = min(len(row["iterations"]) for row in runs[name])
        lines = [
            [
                bases.get(row["seed"], np.nan),
                *(each["win_rate"] for each in row["iterations"][:shortest]),
            ]
            for row in runs[name]
        ]
        for line in lines:
            axes.plot(range(len(line)), line, color=colour, alpha=0.3, linewidth=0.8)
        means = np.nanmean(lines, axis=0)
        axes.plot(range(len(means)), means, color=colour, marker="o", label=name)
    axes.axhline(50, color="0.4", linewidth=1, linestyle=":")
    axes.set(
        xlabel="iteration (0 is the base policy)",
        ylabel="won against the base (%)",
        xticks=range(length + 1),
        title="Exact win rate; thin lines are seeds",
    )
    axes.legend(frameon=False)
    save(figure, [file])


def plot_log_ratios(regimes: dict[str, list[Row]], file: Path) -> None:
    """Log-ratios of winner and loser in each step of iteration 1, by run: means over seeds.

    Each panel has its own scale, because log-ratios of some methods are 50 times larger.
    """
    plt = pyplot()
    curves = {regime: log_ratio_curves(rows) for regime, rows in regimes.items()}
    columns = min(PANELS_IN_A_LINE, max(len(of_regime) for of_regime in curves.values()))
    heights = [math.ceil(len(of_regime) / columns) for of_regime in curves.values()]
    figure, panels = plt.subplots(
        sum(heights),
        columns,
        figsize=(1.6 * columns + 1, 2.2 * sum(heights)),
        layout="constrained",
        squeeze=False,
    )
    for panel in panels.flat:
        panel.set_axis_off()
    line = 0
    for (regime, of_regime), height in zip(curves.items(), heights):
        for panel, (name, ratios) in zip(panels[line : line + height].flat, of_regime.items()):
            panel.set_axis_on()
            steps = range(1, len(ratios) + 1)
            panel.plot(steps, ratios[:, 0], color=COLOURS[0], label="winner")
            panel.plot(steps, ratios[:, 1], color=COLOURS[4], linestyle="--", label="loser")
            panel.axhline(0, color="0.4", linewidth=1, linestyle=":")
            panel.set_title(name, fontsize=9)
            panel.set_xlabel("step", fontsize=8)
        for panel in panels[line : line + height, 0]:
            panel.set_ylabel(f"{regime}\nlog π/π$_t$ (nats)", fontsize=8)
        line += height
    panels[0][0].legend(frameon=False, fontsize=7)
    save(figure, [file])


def log_ratio_curves(rows: list[Row]) -> dict[str, np.ndarray]:
    """Mean log-ratios over seeds of winner and loser, (steps, 2), of the runs that train."""
    found = {}
    for name, of_run in by_run(rows).items():
        logged = [row["iterations"][0]["log_ratios"] for row in of_run]
        steps = min(map(len, logged))
        if steps:
            found[name] = np.mean([ratios[:steps] for ratios in logged], axis=0)
    return found


if __name__ == "__main__":
    run(main)
