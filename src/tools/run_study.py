"""Make the runs of the study, one after the other, and append a row for each.

    .venv/bin/python src/tools/run_study.py --hours 2

Reads   the plan (config/study.yaml) and the rows that exist
Writes  a line of docs/results/<name of the plan>.jsonl for each finished run, and its artifacts in
        results/; when all runs have a row, a copy of the rows (--output)

A run that has a row is not made again. So the study can be stopped at any time, and rows of several
machines can be put together; each names its machine. An interrupted run continues from its finished
artifacts. Unless --keep is given, a run's policies are deleted when it has a row, and the folder of
a seed when all of its runs have one.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import _path  # noqa: F401
from sppo.core.artifacts import (
    git_revision,
    json_lines,
    read_json,
    read_record,
    recorded,
    write_json_lines,
    write_text,
)
from sppo.core.errors import UserError, run
from sppo.workflow.study_plan import Training, read_plan

Row = dict[str, Any]
EMBEDDED_POLICY = Path("results/models/SmolLM2-135M-Instruct")  # the base of embedded judges
RUN_FORKED = Path(__file__).parent / "run_forked.py"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", type=Path, default=Path("config/study.yaml"))
    parser.add_argument("--rows", type=Path, help="default: docs/results/<name of the plan>.jsonl")
    parser.add_argument(
        "--hours", type=float, help="start no further run after this time (default: no limit)"
    )
    parser.add_argument("--output", type=Path, help="a copy of the rows, when all exist")
    parser.add_argument("--keep", action="store_true", help="delete no artifacts")
    args = parser.parse_args()

    for package in ("snakemake", "torch", "alpaca_eval", "lm_eval"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"{package} is not installed, which the study needs, because it calls Snakemake"
                " itself; call make install, and run it without --use-conda"
            )
    # A kill ends the job that runs too. Otherwise it would go on beside the next call.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    args.rows = args.rows or Path("docs/results") / f"{args.plan.stem}.jsonl"
    begun = time.monotonic()
    planned = read_plan(args.plan)
    made = {key_of(row) for row in rows_in(args.rows)}
    missing = [training for training in planned if training.key not in made]
    print(f"{len(planned) - len(missing)} of {len(planned)} runs have a row in {args.rows}")
    for config in dict.fromkeys(training.config for training in missing):
        judge_of(config)
    for number, training in enumerate(missing, 1):
        if args.hours is not None and time.monotonic() - begun > 3600 * args.hours:
            print(f"stopped after {args.hours:g} hours; call again to go on")
            return
        print(f"{number} of {len(missing)}: {' '.join(map(str, training.key))}", flush=True)
        make(training)
        append(args.rows, row_of(training))
        if not args.keep:
            clean(training, missing[number:])
    if args.output is not None:
        with recorded("tabulate", args.output, [args.plan], {"plan": str(args.plan)}):
            write_text(args.output, args.rows.read_text(encoding="utf-8"))


def clean(training: Training, to_come: list[Training]) -> None:
    """Delete the run's policies, which no other run needs, and a seed's folder at its end."""
    for policy in training.folder.glob("iter[1-9]*/policy"):
        shutil.rmtree(policy)
    if all(other.name != training.name for other in to_come):
        shutil.rmtree(Path("results") / training.name)


def rows_in(path: Path) -> list[Row]:
    return json_lines(path) if path.exists() else []


def key_of(row: Row) -> tuple[str, str, int]:
    return (row["regime"], row["run"], row["seed"])


def append(path: Path, row: Row) -> None:
    """Add a line. The file is written whole, so a kill leaves the old one."""
    write_json_lines(path, [*rows_in(path), row])


def judge_of(config: str) -> dict[str, Any]:
    """The section `preference` of a configuration's judge. UserError if it is no such model."""
    from sppo.preferences.base import local_kind, settings_for
    from sppo.workflow.configuration import read_configuration, resolve

    chosen = resolve(read_configuration([Path(config)], {}))[""]["alpaca_eval"]
    if local_kind(chosen["judge"]) is None:
        raise UserError(
            f"{config}: alpaca_eval.judge is {chosen['judge']}, but the study needs a preference"
            " model, with which it lets all iterates play against each other; set one"
        )
    return settings_for(chosen["judge"], base_url=chosen["judge_base_url"])


def make(training: Training) -> None:
    """Make the artifacts of one run. UserError, with the reason, if a job fails."""
    where = " ".join(map(str, training.key))
    if training.needs is not None:
        forked(where, ["--configfile", training.needs["config"], "--", *training.needs["targets"]])
    seeds = f"seeds={{data: {training.seed}, train: {training.seed}}}"
    overlay = ["--configfile", training.config, "--config", f"name={training.name}", seeds]
    forked(where, [*overlay, "--", *training.targets])


def forked(where: str, words: list[str]) -> None:
    """Call run_forked.py. UserError, with the reason in one line, if it fails."""
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, str(RUN_FORKED), *words]
    # A session of its own, so that the job that runs in it can be ended together with it.
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    ) as started:
        try:
            output, errors = started.communicate()
        except BaseException:
            os.killpg(started.pid, signal.SIGTERM)
            raise
    if started.returncode:
        lines = (errors + output).strip().splitlines() or ["no output"]
        reason = next((line for line in lines if line.startswith("error: ")), lines[-1])
        raise UserError(f"{where}: {reason.removeprefix('error: ')}")


def row_of(training: Training) -> Row:
    """The line of a finished run."""
    base = Path("results") / training.name / "iter0"
    first = training.folder / "iter1/policy"
    record = read_record(first) or {}
    found = {
        "regime": Path(training.config).stem,
        "run": training.run,
        "seed": training.seed,
        "iterations": [iteration(training, t) for t in range(1, training.iterations + 1)],
        "computed_in": record.get("computed_in"),
        "processor": processor(),
        "cores": os.cpu_count(),
        "packages": record.get("packages"),
        "commit": git_revision(),
    }
    if training.run == "main":
        found["base"] = evaluated(base)
        folders = [training.folder / f"iter{t}" for t in range(training.iterations + 1)]
        found["round_robin"] = round_robin(folders, judge_of(training.config))
    return found


def round_robin(folders: list[Path], judge: dict[str, Any]) -> list[list[float]]:
    """How often each iterate (row) wins against each other one (column), in per cent.

    judge: the section `preference` of the judge.
    """
    # Imported late because loading lm-eval's checkers takes seconds.
    import numpy as np

    from sppo.evaluation.alpaca_eval import read_outputs
    from sppo.preferences.base import Group, compare, kind_of, load_preference_model
    from sppo.preferences.estimates import win_probabilities

    answers: dict[str, list[str]] = {}
    for folder in folders:
        for row in read_outputs(folder / "alpaca_eval_outputs.json"):
            answers.setdefault(row["instruction"], []).append(row["output"])
    base = EMBEDDED_POLICY if kind_of(judge).needs_base else None
    groups = {text: Group(text, outputs) for text, outputs in answers.items()}
    logits = compare(load_preference_model(judge, base, "auto"), groups, "instruction")
    wins = np.mean([win_probabilities(each) for each in logits.values()], axis=0)
    return [[round(100 * float(value), 2) for value in line] for line in wins]


def iteration(training: Training, t: int) -> Row:
    """The figures of one iteration."""
    folder = training.folder / f"iter{t}"
    previous = read_json(folder / "against_previous.json")
    log = folder / "train_log.jsonl"  # an extrapolated policy was not trained
    logged = json_lines(log) if log.is_file() else []
    steps = [row for row in logged if "log_ratio_chosen" in row]
    trained = read_record(folder / "policy") or {}
    return {
        "iteration": t,
        **evaluated(folder),
        "against_previous": previous["win_rate"],
        "by_annotator": read_json(folder / "ranker_estimate.json")["win_rate"],
        "measurements": read_json(folder / "measurements.json"),
        "log_ratios": [
            [round(row["log_ratio_chosen"], 3), round(row["log_ratio_rejected"], 3)]
            for row in steps
        ],
        "training_seconds": round(trained.get("seconds", 0.0), 1),
    }


def evaluated(folder: Path) -> Row:
    """Win rate and IFEval of one policy, and P(policy beats base) of each instruction."""
    judged = read_json(folder / "alpaca_eval.json")
    followed = read_json(folder / "ifeval.json")
    annotations = read_json(folder / "alpaca_eval_annotations.json")
    return {
        "win_rate": judged["win_rate"],
        "length_controlled": judged["length_controlled_winrate"],
        "length": judged["avg_length"],
        "prompt_strict": followed["prompt_strict"],
        "instruction_strict": followed["instruction_strict"],
        # alpaca-eval's preference is 1 if the base wins and 2 if the policy wins.
        "preferences": [round(each["preference"] - 1, 3) for each in annotations],
    }


def processor() -> str:
    """The processor, as its vendor calls it, with the units that matter for bfloat16."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)
    }
    units = {"avx512_bf16", "amx_bf16", "avx512f", "avx2"} & set(facts.get("flags", "").split())
    return " ".join([facts.get("model name", platform.machine()), *sorted(units)])


if __name__ == "__main__":
    run(main)
