"""Figures that several programs draw, and their common style."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sppo.core.artifacts import written_whole


@dataclass(frozen=True)
class Curve:
    """A metric of alpaca_eval.json and how figures draw it.

    Curves differ in marker and line style too, so that a reader does not need the colours.
    """

    key: str
    label: str
    colour: str
    marker: str
    line_style: str


# Colours of the Okabe-Ito palette.
CURVES = (
    Curve("win_rate", "win rate", "#0072B2", "o", "-"),
    Curve("length_controlled_winrate", "length-controlled win rate", "#D55E00", "s", "--"),
)


def judge_name(line: dict[str, Any]) -> str:
    """The name that figures give to the judge of this evaluation."""
    if line["judge"] in ("judge", "ranker"):
        return f"the embedded {line['judge']}"
    if line["judge"] == "verifiable":
        return "annotators that check the constraints"
    return line["judge_details"]["model"] if line["judge"] == "openai" else line["judge"]


def plot_win_rates(
    judged: dict[int, dict[str, Any]],
    label: str,
    files: list[Path],
    others: Mapping[str, dict[int, dict[str, Any]]] | None = None,
) -> None:
    """Draw win rates with 95% intervals in the upper panel and the average length in the lower.

    judged: the contents of alpaca_eval.json by number. The number is the iteration, or n of
        best-of-n; `label` is the axis label that says which.
    files: where to write the figure; the suffix of each file gives its format.
    others: the same of other runs, by their names. They are drawn too, from the base on.
    """
    plt = pyplot()
    first, numbers = next(iter(judged.values())), list(judged)
    figure, (rates, lengths) = plt.subplots(
        2, 1, sharex=True, figsize=(6, 6), height_ratios=[2, 1], layout="constrained"
    )
    # The length-controlled rate without an interval would only hide the other curve.
    has_interval = [
        any(line[f"{each.key}_interval"] for line in judged.values()) for each in CURVES
    ]
    curves = [each for each, shown in zip(CURVES, has_interval) if shown] or [CURVES[0]]
    for curve, shift in zip(curves, (-0.03, 0.03)):  # shifted, so that the bars do not overlap
        values, bars = _values_and_bars(judged, curve.key)
        rates.errorbar(
            [number + shift for number in numbers],
            values,
            yerr=bars,
            label=curve.label,
            color=curve.colour,
            marker=curve.marker,
            linestyle=curve.line_style,
            capsize=3,
        )
    for number, (name, of_run) in enumerate((others or {}).items()):
        with_base = {t: line for t, line in judged.items() if t == 0} | of_run
        values, bars = _values_and_bars(with_base, "win_rate")
        rates.errorbar(
            [t + 0.06 + 0.03 * number for t in with_base],
            values,
            yerr=bars,
            label=f"{name}, win rate",
            color=("#CC79A7", "#E69F00", "#56B4E9")[number % 3],
            marker="Dv<"[number % 3],
            linestyle="-.",
            capsize=3,
        )
    rates.axhline(50, color="0.4", linewidth=1, linestyle=":", label="no difference")
    rates.set_ylabel(f"won against {first['reference']} (%)")
    rates.set_title(f"AlpacaEval by {_judge_and_size(first)}", fontsize=9)
    rates.legend(frameon=False)
    lengths.plot(
        numbers,
        [line["avg_length"] for line in judged.values()],
        color="#009E73",
        marker="^",
        label="policy",
    )
    lengths.axhline(
        first["reference_avg_length"],
        color="0.4",
        linewidth=1,
        linestyle=":",
        label=first["reference"],
    )
    lengths.set(xlabel=label, ylabel="average length\n(characters)", xticks=numbers)
    lengths.legend(frameon=False)
    save(figure, files)


def plot_over_length(judged: dict[int, dict[str, Any]], files: list[Path]) -> None:
    """Draw the win rates of the iterates over their average length.

    The figure shows whether a policy wins only because it writes more.

    judged: the contents of alpaca_eval.json by iteration.
    files: where to write the figure; the suffix of each file gives its format.
    """
    plt = pyplot()
    first = next(iter(judged.values()))
    lengths = [line["avg_length"] for line in judged.values()]
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for curve in CURVES:
        values, bars = _values_and_bars(judged, curve.key)
        axes.errorbar(
            lengths,
            values,
            yerr=bars,
            label=curve.label,
            color=curve.colour,
            marker=curve.marker,
            linestyle=curve.line_style,
            linewidth=1,
            capsize=3,
        )
    for number, length, line in zip(judged, lengths, judged.values()):
        highest = max(line[curve.key] for curve in CURVES)
        axes.annotate(
            f"iter{number}",
            (length, highest),
            xytext=(6, 4),
            textcoords="offset points",
            fontsize=8,
        )
    axes.axhline(50, color="0.4", linewidth=1, linestyle=":", label="no difference")
    axes.axvline(
        first["reference_avg_length"],
        color="0.6",
        linewidth=1,
        linestyle="-.",
        label=f"length of {first['reference']}",
    )
    axes.set(
        xlabel="average length (characters)",
        ylabel=f"won against {first['reference']} (%)",
        title=f"AlpacaEval by {_judge_and_size(first)}",
    )
    axes.legend(frameon=False, fontsize=8)
    save(figure, files)


def plot_methods(judged: dict[tuple[str, int], dict[str, Any]], files: list[Path]) -> None:
    """Draw the win rates of every run with 95% intervals, one panel for each metric.

    The iterations of a run are drawn one below the other. If `judged` has iteration 0 of the run
    `main`, its interval is drawn as a band: it shows the effect of sampling noise alone.

    judged: the contents of alpaca_eval.json by run and iteration.
    files: where to write the figure; the suffix of each file gives its format.
    """
    plt = pyplot()
    first = next(iter(judged.values()))
    names = list(dict.fromkeys(name for name, iteration in judged if iteration > 0))
    last = max(iteration for _, iteration in judged)
    figure, panels = plt.subplots(
        1, 2, sharey=True, figsize=(9, 1.4 + 0.16 * last * len(names)), layout="constrained"
    )
    for panel, curve in zip(panels, CURVES):
        for t in range(1, last + 1):
            shown = {name: judged[name, t] for name in names if (name, t) in judged}
            values, bars = _values_and_bars(shown, curve.key)
            heights = [names.index(name) + 0.2 * (t - (last + 1) / 2) for name in shown]
            panel.errorbar(
                values,
                heights,
                xerr=bars,
                label=f"iteration {t}",
                color=plt.cm.viridis(0.85 * (last - t) / max(last, 1)),
                marker="os^Dv"[t % 5],
                linestyle="none",
                capsize=2,
                markersize=4,
            )
        noise = judged.get(("main", 0), {}).get(f"{curve.key}_interval")
        if noise:
            panel.axvspan(*noise, color="0.9", zorder=0, label="base against itself")
        panel.axvline(50, color="0.4", linewidth=1, linestyle=":")
        panel.set(xlabel=f"{curve.label} (%)", yticks=range(len(names)), yticklabels=names)
    panels[0].invert_yaxis()
    panels[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(
        f"Against the base's answers by {_judge_and_size(first)}",
        fontsize=10,
    )
    save(figure, files)


def pyplot() -> Any:
    """matplotlib.pyplot in this project's style; it needs no screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    matplotlib.rcParams |= {
        "svg.hashsalt": "sppo",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    return plt


def save(figure: Any, files: list[Path]) -> None:
    """Write the figure to each file, in the format of the file's suffix, and close it.

    The same figure always gives the same bytes.
    """
    for file in files:
        with written_whole(file) as temporary:
            figure.savefig(
                temporary,
                format=file.suffix[1:],
                dpi=160,
                metadata={"Date": None} if file.suffix == ".svg" else None,
            )
    pyplot().close(figure)


def _judge_and_size(line: dict[str, Any]) -> str:
    """The end of a title: the judge and the number of instructions of this evaluation."""
    return f"{judge_name(line)}, n = {line['n_total']}, 95% intervals"


def _values_and_bars(
    judged: Mapping[Any, dict[str, Any]], key: str
) -> tuple[list[float], list[list[float]]]:
    """The values of a metric, and the lengths of the error bars below and above each value."""
    values: list[float] = []
    below: list[float] = []
    above: list[float] = []
    for line in judged.values():
        value = line[key]
        low, high = line[f"{key}_interval"] or (value, value)
        values.append(value)
        # A percentile interval may exclude the estimate, but error bars cannot be negative.
        below.append(max(0.0, value - low))
        above.append(max(0.0, high - value))
    return values, [below, above]
