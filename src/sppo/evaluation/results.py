"""Evaluations and records of runs and iterations: reading them, and formatting their figures."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from sppo.core.artifacts import iteration, read_json
from sppo.core.errors import UserError

# Files by run (`main` for the main run) and iteration. The inner dictionary has a file's contents
# by its name, such as `alpaca_eval` or `responses/0.parquet.record`.
Evaluations = dict[tuple[str, int], dict[str, Any]]

# The mark after a length-controlled win rate with a warning in its evaluation.
DOUBTFUL = " (!)"


def check_policy(path: Path, policy: str | None) -> None:
    """Raise UserError if a file of `policy` is in the folder of another policy.

    The folders are results/[name/][run/]iter{t}/[best_of_{n}/]. The name of a policy is
    <name, or sppo>/[run/]iter{t}[-best-of-{n}]; open_llm.json has the policy's folder instead.
    `nash` can replace `best` in both. A file without a policy (None), or in another kind of folder,
    is not checked.
    """
    folder = Path(os.path.abspath(path)).parent.as_posix()
    if policy is None or "/results/" not in folder:
        return
    # All runs share the base.
    if policy.endswith("iter0/policy") and folder.endswith("/iter0"):
        return
    named = policy.removesuffix("/policy").removeprefix("results/")
    named = re.sub(r"-(best|nash)-of-(\d+)$", r"/\1_of_\2", named)
    if not folder.endswith((f"/results/{named}", f"/results/{named.removeprefix('sppo/')}")):
        raise UserError(
            f"{path} is of {policy}, which is not the policy of its folder; delete it and run again"
        )


def read_evaluation(path: Path) -> dict[str, Any]:
    """The contents of an evaluation or a record.

    UserError if it is not a JSON object, or is in the folder of another policy.
    """
    found = read_json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path} is not an evaluation; delete it and run again")
    check_policy(path, found.get("policy"))
    return found


def collect(files: list[Path], results: Path) -> Evaluations:
    """The contents of files results/[run/]iter{t}/name.json: the main run first, then by name.

    UserError if a file is not in the folder `results`.
    """
    found: Evaluations = {}
    for file in files:
        try:
            parts = file.relative_to(results).parts
        except ValueError:
            raise UserError(f"{file} is not in {results}; give files of one experiment") from None
        is_main = parts[0].startswith("iter")
        run = "main" if is_main else parts[0]
        name = "/".join(parts[1:] if is_main else parts[2:]).removesuffix(".json")
        found.setdefault((run, iteration(file)), {})[name] = read_evaluation(file)
    order = sorted(found, key=lambda place: (place[0] != "main", place))
    return {place: found[place] for place in order}


def decimals(value: float | None, places: int = 1) -> str:
    """The value, or a dash."""
    return "-" if value is None else f"{value:.{places}f}"


def rate(found: dict[str, Any], key: str, interval: bool = True) -> str:
    """A rate in per cent, or a dash if it is missing.

    The 95% interval follows if there is one, and the mark `DOUBTFUL` if there is a warning.
    """
    text = decimals(found.get(key))
    ends = found.get(f"{key}_interval") if interval else None
    if ends:
        text += f" [{ends[0]:.1f}, {ends[1]:.1f}]"
    if found.get(f"{key.removesuffix('_winrate')}_warning"):
        text += DOUBTFUL
    return text


def doubts(evaluations: dict[str, dict[str, Any]]) -> list[str]:
    """Sentences about empty answers and doubtful LC win rates.

    evaluations: contents of alpaca_eval.json by the name that a sentence uses.
    """
    sentences = []
    for name, found in evaluations.items():
        if found.get("n_empty"):
            sentences.append(f"{name}: {found['n_empty']} of {found['n_total']} answers are empty.")
        if found.get("length_controlled_warning"):
            sentences.append(
                f"{name}:{DOUBTFUL} do not rely on the LC win rate: "
                f"{found['length_controlled_warning']}."
            )
    return sentences
