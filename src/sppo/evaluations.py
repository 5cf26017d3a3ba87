"""Evaluations and records of many runs and iterations, found by their place, and how their figures are printed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sppo.artifacts import iteration, read_json
from sppo.errors import UserError

# By run (`main` for the main one) and iteration: contents by name, such as `alpaca_eval` or `responses/0.parquet.record`.
Evaluations = dict[tuple[str, int], dict[str, Any]]


def collect(files: list[Path], results: Path) -> Evaluations:
    """The contents of results/[run/]iter{t}/name.json, main first, then by name. UserError on a file of another experiment."""
    found: Evaluations = {}
    for file in files:
        try:
            parts = file.relative_to(results).parts
        except ValueError:
            raise UserError(f"{file} does not lie under {results}; give files of one experiment") from None
        run = "main" if parts[0].startswith("iter") else parts[0]
        name = "/".join(parts[(1 if run == "main" else 2):]).removesuffix(".json")
        found.setdefault((run, iteration(file)), {})[name] = read_json(file)
    return {place: found[place] for place in sorted(found, key=lambda place: (place[0] != "main", place))}


def decimals(value: float | None, places: int = 1) -> str:
    """The value, or a dash."""
    return "-" if value is None else f"{value:.{places}f}"


def rate(found: dict[str, Any], key: str, interval: bool = True) -> str:
    """A rate in per cent with its 95% interval, where it has one; a dash if there is none."""
    ends = found.get(f"{key}_interval") if interval else None
    return decimals(found.get(key)) + (f" [{ends[0]:.1f}, {ends[1]:.1f}]" if ends else "")
