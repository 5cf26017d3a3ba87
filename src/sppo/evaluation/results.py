"""Evaluations and records of many runs and iterations, found by their place, and how their figures are printed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sppo.core.artifacts import iteration, read_json
from sppo.core.errors import UserError

# By run (`main` for the main one) and iteration: contents by name, such as `alpaca_eval` or `responses/0.parquet.record`.
Evaluations = dict[tuple[str, int], dict[str, Any]]


# Stands behind a length-controlled win rate of which the evaluation itself warns.
DOUBTFUL = " (!)"


def check_policy(path: Path, policy: str | None) -> None:
    """Raise UserError if a file of `policy` lies in another's place.

    Places are results/[name/][run/]iter{t}/[best_of_{n}/]. Policies are called
    <name, else sppo>/[run/]iter{t}[-best-of-{n}]; open_llm.json has the policy's folder. Files that
    do not say their policy (None), and files that lie elsewhere, are passed over.
    """
    folder = Path(os.path.abspath(path)).parent.as_posix()
    if policy is None or "/results/" not in folder:
        return
    # All runs share the base.
    if policy.endswith("iter0/policy") and folder.endswith("/iter0"):
        return
    named = policy.removesuffix("/policy").removeprefix("results/")
    named = named.replace("-best-of-", "/best_of_")
    if not folder.endswith((f"/results/{named}", f"/results/{named.removeprefix('sppo/')}")):
        raise UserError(
            f"{path} is of {policy}, which is not the policy of its place; delete it and run again"
        )


def read_evaluation(path: Path) -> dict[str, Any]:
    """The contents of an evaluation or a record. UserError if it lies in another policy's place."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path} is no evaluation; delete it and run again")
    check_policy(path, found.get("policy"))
    return found


def collect(files: list[Path], results: Path) -> Evaluations:
    """The contents of results/[run/]iter{t}/name.json, main first, then by name. UserError on a file of another experiment."""
    found: Evaluations = {}
    for file in files:
        try:
            parts = file.relative_to(results).parts
        except ValueError:
            raise UserError(
                f"{file} does not lie under {results}; give files of one experiment"
            ) from None
        run = "main" if parts[0].startswith("iter") else parts[0]
        name = "/".join(parts[(1 if run == "main" else 2) :]).removesuffix(".json")
        found.setdefault((run, iteration(file)), {})[name] = read_evaluation(file)
    return {
        place: found[place]
        for place in sorted(found, key=lambda place: (place[0] != "main", place))
    }


def decimals(value: float | None, places: int = 1) -> str:
    """The value, or a dash."""
    return "-" if value is None else f"{value:.{places}f}"


def rate(found: dict[str, Any], key: str, interval: bool = True) -> str:
    """A rate in per cent with its 95% interval, if any, marked if it is doubtful; else a dash."""
    ends = found.get(f"{key}_interval") if interval else None
    mark = DOUBTFUL if found.get(f"{key.removesuffix('_winrate')}_warning") else ""
    return decimals(found.get(key)) + (f" [{ends[0]:.1f}, {ends[1]:.1f}]" if ends else "") + mark


def doubts(evaluations: dict[str, dict[str, Any]]) -> list[str]:
    """Sentences on empty answers and doubtful LC rates. evaluations: alpaca_eval.json by name."""
    said = []
    for name, found in evaluations.items():
        if found.get("n_empty"):
            said.append(f"{name}: {found['n_empty']} of {found['n_total']} answers are empty.")
        if found.get("length_controlled_warning"):
            said.append(
                f"{name}:{DOUBTFUL} do not rely on the LC win rate: "
                f"{found['length_controlled_warning']}."
            )
    return said
