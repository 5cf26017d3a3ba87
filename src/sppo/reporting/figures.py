"""Figures that several programs draw."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sppo.core.artifacts import written_whole

# Okabe-Ito colours, told apart by marker and line as well.
CURVES = (
    ("win_rate", "win rate", "#0072B2", "o", "-"),
    ("length_controlled_winrate", "length-controlled win rate", "#D55E00", "s", "--"),
)


def judge_name(line: dict[str, Any]) -> str:
    """The judge's name as a reader knows it."""
    if line["judge"] in ("judge", "ranker"):
        return f"the embedded {line['judge']}"
    return line["judge_details"]["model"] if line["judge"] == "openai" else line["judge"]


def plot_win_rates(judged: dict[int, dict[str, Any]], label: str, files: list[Path]) -> None:
    """Win rate and LC with intervals, and the average length below.

    judged: contents of alpaca_eval.json by a whole number, which `label` names: the iteration, or n of best-of-n.
    """
    plt = pyplot()
    any_line, numbers = next(iter(judged.values())), list(judged)
    figure, (rates, lengths) = plt.subplots(
        2, 1, sharex=True, figsize=(6, 6), height_ratios=[2, 1], layout="constrained"
    )
    for (key, name, colour, marker, style), shift in zip(CURVES, (-0.03, 0.03)):
        values, bars = _values_and_bars(judged, key)
        rates.errorbar(
            [number + shift for number in numbers],
            values,
            yerr=bars,
            label=name,
            color=colour,
            marker=marker,
            linestyle=style,
            capsize=3,
        )
    rates.axhline(50, color="0.4", linewidth=1, linestyle=":", label="no difference")
    rates.set(
        ylabel=f"won against {any_line['reference']} (%)",
        title=f"AlpacaEval by {judge_name(any_line)}, n = {any_line['n_total']}, 95% intervals",
    )
    rates.legend(frameon=False)
    lengths.plot(
        numbers,
        [line["avg_length"] for line in judged.values()],
        color="#009E73",
        marker="^",
        label="policy",
    )
    lengths.axhline(
        any_line["reference_avg_length"],
        color="0.4",
        linewidth=1,
        linestyle=":",
        label=any_line["reference"],
    )
    lengths.set(xlabel=label, ylabel="average length\n(characters)", xticks=numbers)
    lengths.legend(frameon=False)
    save(figure, files)


def plot_over_length(judged: dict[int, dict[str, Any]], files: list[Path]) -> None:
    """Win rate and LC of the iterates over their average length: whether what is won is won by writing more.

    judged: contents of alpaca_eval.json by iteration.
    """
    plt = pyplot()
    any_line = next(iter(judged.values()))
    lengths = [line["avg_length"] for line in judged.values()]
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for key, name, colour, marker, style in CURVES:
        values, bars = _values_and_bars(judged, key)
        axes.errorbar(
            lengths,
            values,
            yerr=bars,
            label=name,
            color=colour,
            marker=marker,
            linestyle=style,
            linewidth=1,
            capsize=3,
        )
    for number, length, line in zip(judged, lengths, judged.values()):
        highest = max(line[key] for key, *_ in CURVES)
        axes.annotate(
            f"iter{number}",
            (length, highest),
            xytext=(6, 4),
            textcoords="offset points",
            fontsize=8,
        )
    axes.axhline(50, color="0.4", linewidth=1, linestyle=":", label="no difference")
    axes.axvline(
        any_line["reference_avg_length"],
        color="0.6",
        linewidth=1,
        linestyle="-.",
        label=f"length of {any_line['reference']}",
    )
    axes.set(
        xlabel="average length (characters)",
        ylabel=f"won against {any_line['reference']} (%)",
        title=f"AlpacaEval by {judge_name(any_line)}, n = {any_line['n_total']}, 95% intervals",
    )
    axes.legend(frameon=False, fontsize=8)
    save(figure, files)


def plot_methods(judged: dict[tuple[str, int], dict[str, Any]], files: list[Path]) -> None:
    """Win rate and LC of every run, its iterations one below the other, with intervals.

    judged: contents of alpaca_eval.json by run and iteration; iteration 0 of main, if there, is drawn as a band: what noise does.
    """
    plt = pyplot()
    any_line, names = (
        next(iter(judged.values())),
        list(dict.fromkeys(name for name, t in judged if t)),
    )
    last = max(t for _, t in judged)
    figure, panels = plt.subplots(
        1, 2, sharey=True, figsize=(9, 1.4 + 0.16 * last * len(names)), layout="constrained"
    )
    for panel, (key, label, *_) in zip(panels, CURVES):
        for t in range(1, last + 1):
            shown = {name: judged[name, t] for name in names if (name, t) in judged}
            values, bars = _values_and_bars(shown, key)
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
        if noise := judged.get(("main", 0), {}).get(f"{key}_interval"):
            panel.axvspan(*noise, color="0.9", zorder=0, label="base against itself")
        panel.axvline(50, color="0.4", linewidth=1, linestyle=":")
        panel.set(xlabel=f"{label} (%)", yticks=range(len(names)), yticklabels=names)
    panels[0].invert_yaxis()
    panels[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(
        f"Against the base's answers by {judge_name(any_line)}, n = {any_line['n_total']}, 95% intervals",
        fontsize=10,
    )
    save(figure, files)


def pyplot() -> Any:
    """matplotlib.pyplot without a screen, in this project's style."""
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
    """Write the figure in the form of each file's name, the same bytes for the same figure."""
    for file in files:
        with written_whole(file) as temporary:
            figure.savefig(
                temporary,
                format=file.suffix[1:],
                dpi=160,
                metadata={"Date": None} if file.suffix == ".svg" else None,
            )
    pyplot().close(figure)


def _values_and_bars(
    judged: Mapping[Any, dict[str, Any]], key: str
) -> tuple[list[float], list[list[float]]]:
    values = [line[key] for line in judged.values()]
    ends = [line[f"{key}_interval"] or [line[key]] * 2 for line in judged.values()]
    # A percentile interval need not hold the estimate; an error bar cannot be negative.
    return values, [
        [max(0.0, v - low) for v, (low, _) in zip(values, ends)],
        [max(0.0, high - v) for v, (_, high) in zip(values, ends)],
    ]
