"""The plan of a study: which runs are trained, with how many seeds and iterations."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sppo.core.errors import UserError

# The evaluations of each iteration that a row of the study contains.
EVALUATIONS = ("alpaca_eval", "ranker_estimate", "against_previous", "ifeval", "measurements")
KEYS = {"config", "runs", "seeds", "iterations"}  # of an entry of the plan


class Training(NamedTuple):
    """One run of the study with one seed."""

    config: str
    run: str
    seed: int
    iterations: int
    needs: dict[str, Any] | None = None  # {config: file, targets: [paths]} that are made before

    @property
    def name(self) -> str:
        """The experiment's name: the regime and the seed. Its runs share the first iteration."""
        return f"study-{Path(self.config).stem}-{self.seed}"

    @property
    def folder(self) -> Path:
        root = Path("results") / self.name
        return root if self.run == "main" else root / self.run

    @property
    def key(self) -> tuple[str, str, int]:
        return (Path(self.config).stem, self.run, self.seed)

    @property
    def targets(self) -> list[str]:
        trained = range(1, self.iterations + 1)
        files = [str(self.folder / f"iter{t}/{name}.json") for t in trained for name in EVALUATIONS]
        base = [f"results/{self.name}/iter0/{name}.json" for name in ("alpaca_eval", "ifeval")]
        return base + files if self.run == "main" else files


def read_plan(path: Path) -> list[Training]:
    """The trainings of a plan: the runs of each entry, seed by seed. UserError for another form."""
    form = (
        "give a list of {config: file, runs: [names], seeds: number, iterations: number}, and in"
        " an entry that needs other files: {needs: {config: file, targets: [paths]}}"
    )
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())}); {form}") from None
    trainings = []
    for number, entry in enumerate(entries if isinstance(entries, list) else [None], 1):
        if not is_entry(entry):
            raise UserError(f"{path} entry {number}: {form}")
        if not Path(entry["config"]).is_file():
            raise UserError(f"{path} entry {number}: {entry['config']} is missing; correct it")
        trainings += [
            Training(entry["config"], run_name, seed, entry["iterations"], entry.get("needs"))
            for seed in range(1, entry["seeds"] + 1)
            for run_name in entry["runs"]
        ]
    return trainings


def is_entry(entry: Any) -> bool:
    """Whether this is an entry of a plan: it has the right keys, with values of the right types."""
    if not isinstance(entry, dict) or entry.keys() - {"needs"} != KEYS:
        return False
    runs = entry["runs"]
    return (
        isinstance(entry["config"], str)
        and isinstance(runs, list)
        and all(isinstance(name, str) for name in runs)
        and all(type(entry[key]) is int and entry[key] > 0 for key in ("seeds", "iterations"))
    )
