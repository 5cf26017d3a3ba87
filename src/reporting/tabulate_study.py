"""The page of the study: tables, tests and figures from its rows.

Reads   docs/results/study.jsonl, a line per run and seed; the plan, config/study.yaml
Writes  study.md, and study_win_rates.svg and study_log_ratios.svg beside it, and their records

The unit is the seed, which decides prompts, responses, training and answers. Runs of one seed and
regime share their prompts, and in the first iteration their responses. So a run is compared with
`main` seed by seed.

* Intervals, tests: seeds and instructions are two crossed random effects. The squared standard
  error of a mean is the sum of their mean squares less that of the residual, over the number of
  values. The degrees of freedom are Satterthwaite's. So an interval holds for other trainings and
  other instructions. With one seed it holds for other instructions only.
* A run is compared with main on the differences of the preferences by seed and instruction.
* Trend: Page's test that the win rates of main rise from the base on.
* p has Holm's correction over all runs that the plan compares with main in the regime, so it does
  not depend on how many of them have been made.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import _path  # noqa: F401
from sppo.core.artifacts import json_lines, recorded_all, write_text
from sppo.core.errors import UserError, run
from sppo.reporting.figures import pyplot, save
from sppo.reporting.table_formats import markdown_table
from sppo.workflow.study_plan import read_plan

Row = dict[str, Any]
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
| bound | eight epochs on 64 prompts with eta = 20, so that SPPO's loss converges on its pairs |
| laptop | the preset for open questions |
| main | SPPO; the other runs are in [methods.md](../methods.md) |
| difference | from main on the same seeds and instructions, in percentage points |
| p, Holm | of a difference of 0, corrected for all runs that the plan compares with main |
| nats per unit of P-hat | slope of the log-ratios on P-hat; for the exact SPPO update it is eta |
| (!) | a seed's LC is exactly 50, as when alpaca-eval's model finds no effect; so LC says nothing |

In iteration 1 the current policy is the base. So where a method also refers to the base (`rspo`,
`inpo`, `nash_md`, `mpo`), to an earlier policy (`onpo`), or to earlier pairs or requests (`spin`,
`ra_dpo`), one iteration does not show what that adds. `ra_dpo` uses each pair in both orders, so
its winners and losers have the same mean log-ratio. Those of `onpo` refer to the policy from which
its second training starts.
"""
COLOURS = ("#0072B2", "#CC79A7", "#E69F00", "#009E73", "#D55E00", "#56B4E9")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=Path, default=Path("docs/results/study.jsonl"))
    parser.add_argument("--output", type=Path, default=Path("docs/results/study.md"))
    parser.add_argument("--plan", type=Path, default=Path("config/study.yaml"))
    args = parser.parse_args()

    planned = planned_runs(args.plan)
    rows = json_lines(args.rows) if args.rows.exists() else []
    if not rows:
        raise UserError(f"{args.rows} has no rows; make them with src/tools/run_study.py")
    regimes: dict[str, list[Row]] = {row["regime"]: [] for row in rows}
    for row in rows:
        regimes[row["regime"]].append(row)
    folder, stem = args.output.parent, args.output.stem
    inputs = [args.rows, args.plan]
    figures = [folder / f"{stem}_{name}.svg" for name in ("win_rates", "log_ratios")]
    with recorded_all("tabulate", (args.output, *figures), inputs, vars(args)):
        write_text(args.output, page(rows, regimes, stem, planned))
        plot_win_rates(next(iter(regimes.values())), figures[0])
        plot_log_ratios(regimes, figures[1])
    print(f"{args.output}: {len(rows)} rows")


def page(rows: list[Row], regimes: dict[str, list[Row]], stem: str, planned: dict[str, int]) -> str:
    """The page in Markdown. planned: how many runs are compared with main, by regime."""
    # An extrapolated policy was not trained, so it has no number format.
    trained = [row for row in rows if row["computed_in"]]
    machines = sorted({f"{row['processor']}, {row['computed_in']}" for row in trained})
    commits = sorted({short_commit(row["commit"]) for row in rows})
    parts = [
        "# The study\n",
        "`src/reporting/tabulate_study.py` writes this page from `study.jsonl`, which\n"
        "`.venv/bin/snakemake --cores all study` extends run by run. Win rates are per cent won\n"
        "against the base's answers, by exact annotators, or by the embedded judge in the regime\n"
        "`laptop`. LC: length-controlled, over the seeds whose rows have it. Brackets are 95%\n"
        "intervals for other seeds and instructions. With one seed they are for other\n"
        "instructions only.\n",
        READING,
        f"Machines: {'; '.join(machines)}. Commits: {', '.join(commits)}. `+changes` means that\n"
        "files differed from the commit. Until 15e9bbb, rows that the study itself had added\n"
        "counted as such.\n",
    ]
    for regime, of_regime in regimes.items():
        parts += [f"## {regime}\n", win_rate_table(of_regime), steps(of_regime), trend(of_regime)]
        parts += [exploitability(of_regime)]
        parts += ["### Against main, seed by seed\n", comparison_table(of_regime, planned[regime])]
        parts += ["### What training did to the log-ratios\n", measurement_table(of_regime)]
    parts += [
        "## Figures\n",
        f"![Win rate by iteration]({stem}_win_rates.svg)\n",
        "The abstract's first version (2405.00675v1) says that SPPO can raise the likelihood of "
        "the chosen response and lower that of the rejected one, which DPO and IPO cannot "
        "trivially do. The next figure shows both log-ratios in training, where each pair is "
        "measured before the step that uses it. Each panel has its own scale.\n",
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
    head = ["run", "iteration", "seeds", "win rate", "range", "LC", "IFEval strict", "length"]
    return markdown_table([*head, "against the previous"], lines)


def rates(found: list[Row]) -> list[str]:
    """The cells of a run's iteration: seeds, win rate, interval and range, LC, IFEval, length."""
    values = [each["win_rate"] for each in found]
    low, high = np.clip(estimated(preferences(found)).interval(), 0, 100)
    return [
        str(len(found)),
        f"{np.mean(values):.1f} [{low:.1f}, {high:.1f}]",
        f"{min(values):.1f} to {max(values):.1f}" if len(values) > 1 else "-",
        length_controlled(found),
        f"{np.mean([each['prompt_strict'] for each in found]):.1f}",
        f"{np.mean([each['length'] for each in found]):.0f}",
    ]


def length_controlled(found: list[Row]) -> str:
    """The cell of LC: its mean over the seeds that have it."""
    values = [each["length_controlled"] for each in found if "length_controlled" in each]
    if not values:
        return "-"
    of_seeds = f" ({len(values)} of {len(found)} seeds)" if len(values) < len(found) else ""
    return f"{np.mean(values):.1f}{of_seeds}{' (!)' if 50.0 in values else ''}"


class Estimate(NamedTuple):
    """A mean in per cent, its standard error, and its degrees of freedom."""

    mean: float
    error: float
    freedom: float

    def interval(self) -> tuple[float, float]:
        """The 95% interval by Student's t."""
        from scipy.stats import t

        if self.error == 0:
            return self.mean, self.mean
        return t.interval(0.95, self.freedom, self.mean, self.error)

    def p_value(self) -> float:
        """Of the hypothesis that the mean is 0, two-sided."""
        from scipy.stats import t

        if self.error == 0:  # equal everywhere: no test is possible
            return 1.0
        return float(2 * t.sf(abs(self.mean) / self.error, self.freedom))


def estimated(values: np.ndarray) -> Estimate:
    """The mean of (seeds, instructions), where both are random effects (two-way ANOVA).

    A mean square of seeds or instructions that is below the residual's is replaced by it, because
    no variance is negative. Otherwise a few seeds that agree by chance would give an error that is
    too small.
    """
    values = 100 * values
    seeds, instructions = values.shape
    mean = values.mean()
    if seeds == 1:
        return Estimate(mean, values.std(ddof=1) / math.sqrt(instructions), instructions - 1)
    of_seeds = values.mean(axis=1, keepdims=True)
    of_instructions = values.mean(axis=0, keepdims=True)
    residuals = values - of_seeds - of_instructions + mean
    freedom = (seeds - 1) * (instructions - 1)
    residual = (residuals**2).sum() / freedom
    parts = [
        (max(instructions * of_seeds.var(ddof=1), residual), seeds - 1),
        (max(seeds * of_instructions.var(ddof=1), residual), instructions - 1),
        (-residual, freedom),
    ]
    total = sum(part for part, _ in parts)
    if total == 0:
        return Estimate(mean, 0.0, math.inf)
    satterthwaite = total**2 / sum(part**2 / df for part, df in parts)
    return Estimate(mean, math.sqrt(total / (seeds * instructions)), satterthwaite)


def differences(found: Sequence[Row], others: Sequence[Row]) -> np.ndarray:
    """P(policy beats base) of rows less that of others, (seeds, instructions)."""
    both = preferences([*found, *others])
    return both[: len(found)] - both[len(found) :]


def preferences(found: list[Row]) -> np.ndarray:
    """P(policy beats base), (seeds, instructions).

    UserError if the numbers of instructions differ.
    """
    if len({len(each["preferences"]) for each in found}) > 1:
        raise UserError(
            "rows have different numbers of judged instructions, such as after a change of"
            " alpaca_eval.limit; delete those of the old number and run the study again"
        )
    return np.array([each["preferences"] for each in found])


def steps(rows: list[Row]) -> str:
    """What each iteration of main adds to the win rate of the one before."""
    main_rows = by_run(rows).get("main", [])
    length = min((len(row["iterations"]) for row in main_rows), default=0)
    if length < 2:
        return ""
    lines = []
    for t in range(1, length + 1):
        after = [row["iterations"][t - 1] for row in main_rows]
        before = [row["base"] if t == 1 else row["iterations"][t - 2] for row in main_rows]
        change = differences(after, before)
        low, high = estimated(change).interval()
        by_seed = 100 * change.mean(axis=1)
        lines.append(
            [
                f"{t - 1} to {t}",
                str(len(by_seed)),
                f"{by_seed.mean():+.1f} [{low:+.1f}, {high:+.1f}]",
                f"{by_seed.min():+.1f} to {by_seed.max():+.1f}",
            ]
        )
    head = ["iterations of main", "seeds", "change of the win rate", "range"]
    return markdown_table(head, lines)


def trend(rows: list[Row]) -> str:
    """Page's test that main's win rates rise over the base and the iterations."""
    from scipy.stats import page_trend_test

    main_rows = by_run(rows).get("main", [])
    length = min((len(row["iterations"]) for row in main_rows), default=0)
    if length < 2 or len(main_rows) < 2:
        return ""
    table = [
        [row["base"]["win_rate"], *(each["win_rate"] for each in row["iterations"][:length])]
        for row in main_rows
    ]
    rising = sum(all(b > a for a, b in zip(line, line[1:])) for line in table)
    smallest = math.factorial(length + 1) ** -len(table)
    return (
        f"The win rate rises in every iteration in {rising} of {len(table)} seeds. Page's trend"
        f" test, base included: p = {page_trend_test(table).pvalue:.2g}; {smallest:.2g} is the"
        " smallest that it can give. It asks whether any order of the iterates is as likely, and"
        " not whether the last step helps.\n"
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


def comparison_table(rows: list[Row], planned: int) -> str:
    """Each run against main on the seeds that both have, after the last iteration of both.

    planned: the number of runs that the plan compares with main, for Holm's correction.
    """
    runs = by_run(rows)
    mains = {row["seed"]: row for row in runs.get("main", [])}
    compared = []
    for name, of_run in runs.items():
        pairs = [(row, mains[row["seed"]]) for row in of_run if row["seed"] in mains]
        if name == "main" or len(pairs) < 2:
            continue
        t = min(len(row["iterations"]) for pair in pairs for row in pair)
        found = differences(*zip(*((at(row, t), at(of_main, t)) for row, of_main in pairs)))
        compared.append((name, t, 100 * found.mean(axis=1), estimated(found)))
    if not compared:
        return "No other run has two seeds yet.\n"
    corrected = holm([estimate.p_value() for *_, estimate in compared], planned)
    lines = []
    for (name, t, by_seed, estimate), p in zip(compared, corrected, strict=True):
        low, high = estimate.interval()
        lines.append(
            [
                name,
                str(t),
                str(len(by_seed)),
                f"{estimate.mean:+.1f} [{low:+.1f}, {high:+.1f}]",
                f"{by_seed.min():+.1f} to {by_seed.max():+.1f}",
                f"{p:.2g}",
            ]
        )
    return markdown_table(["run", "iteration", "seeds", "difference", "range", "p, Holm"], lines)


def planned_runs(plan: Path) -> dict[str, int]:
    """How many runs the plan compares with main, by regime."""
    trainings = read_plan(plan)
    runs = {(Path(each.config).stem, each.run) for each in trainings if each.run != "main"}
    return Counter(regime for regime, _ in runs)


def holm(p_values: list[float], comparisons: int) -> list[float]:
    """Holm's corrected p-values, in the order given.

    comparisons: how many there are in all. Those that are missing have p = 1, so they come last.
    """
    comparisons = max(comparisons, len(p_values))
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, highest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, (comparisons - place) * p_values[index]))
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
