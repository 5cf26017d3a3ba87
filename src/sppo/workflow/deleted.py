"""Artifacts that somebody deleted are made again, with everything that follows from them.

Snakemake by itself ignores a missing intermediate file as long as the last one exists. It has an
option to force files (`--forcerun`), but that also makes each of them a target, needed or not. Its
public interface has no hook between building the graph of jobs and deciding which of them run. So
this module watches for the moment at which the workflow gets its graph, an attribute called `_dag`,
and adds the deleted artifacts to the files that the graph forces. Nothing else of the project
changes Snakemake's objects; rules/common.smk reads some. CONTRIBUTING.md says what to do when a new
Snakemake changes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from sppo.core.artifacts import parse_json


def force_deleted(workflow: Any, deleted: Callable[[], Iterable[str]]) -> None:
    """Have the workflow make deleted artifacts again, as far as its targets need them.

    deleted: called once the graph is built; returns their paths. Raises `RuntimeError` if this
    Snakemake keeps its graph in another place.
    """
    if not hasattr(workflow, "_dag"):
        raise RuntimeError(
            "this version of Snakemake keeps its graph of jobs in another place than Workflow._dag;"
            " see sppo/workflow/deleted.py"
        )
    kind = type(workflow)

    class Watched(kind):  # type: ignore[misc, valid-type]
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "_dag" and value is not None:
                value.forcefiles.update(deleted())
            super().__setattr__(name, value)

    workflow.__class__ = Watched


# What the workflow drops itself if `keep_policies` is false.
POLICIES = ("policy", "lookahead")


def deleted_artifacts(root: Path, keep_policies: bool) -> list[str]:
    """Artifacts under `root` that a record names as made or used there, and that do not exist.

    Policies do not count if the workflow itself drops them.
    """
    named: set[str] = set()
    for path in root.rglob("*.record.json"):
        try:
            record = parse_json(path.read_text(encoding="utf-8"))
            named |= {record["artifact"], *record["inputs"]}
        except (OSError, ValueError, TypeError, KeyError):
            continue  # the stage that reads a broken record reports it
    own = (
        name
        for name in named
        if Path(name).is_relative_to(root) and (keep_policies or Path(name).name not in POLICIES)
    )
    return sorted(name for name in own if not Path(name).exists())
