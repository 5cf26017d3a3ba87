"""What is checked before any work starts, and what was deleted since the last run. Imports nothing heavy."""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sppo.core.artifacts import ROOT, parse_json
from sppo.core.config import of_run
from sppo.core.errors import UserError
from sppo.core.openai_api import check_served
from sppo.evaluation import alpaca_eval, mt_bench
from sppo.policies.hub import check_push
from sppo.policies.models import HUB_ID, check_policy
from sppo.policies.prompts import (
    is_held_out,
    normalised,
    read_gold,
    read_instructions,
    read_prompts,
)
from sppo.preferences.adapters import ADAPTER_FILES, adapter_folder, check_pairrm, is_pairrm

TRAINING_ENVIRONMENT = ROOT / "envs" / "core.yaml"
FEWEST_INSTRUCTIONS = 5
# What runs the engine that generates.
GENERATING = (
    "generate_responses",
    "answer_instructions",
    "answer_instructions_n_times",
    "answer_mt_bench",
)
# By what is made, the section that names its judge.
JUDGED: dict[str, tuple[str, Callable[..., None]]] = {
    "alpaca_eval": ("alpaca_eval", alpaca_eval.check_judge),
    "evaluate_mt_bench": ("mt_bench", mt_bench.check_judge),
    "grade_responses": ("grades", mt_bench.check_grader),
}


def check_inputs(runs: dict[str, dict[str, Any]], in_conda: bool = False) -> None:
    """Every file that the configuration names is there and readable, and there are prompts enough.

    in_conda: programs run in the environments of envs/, so that what is installed here says nothing.
    Raises `UserError` naming the first that is not.
    """
    check_base(runs[""]["policy"])  # all runs share it
    for name, run in runs.items():
        try:
            _check_run(f"runs.{name}." if name else "", run, in_conda)
        except UserError as error:
            raise of_run(error, name) if name else error from None


def _check_run(where: str, run: dict[str, Any], in_conda: bool) -> None:
    for key in ("preference.model", "alpaca_eval.judge", "mt_bench.judge"):
        section, setting = key.split(".")
        model = run[section][setting]
        if key == "preference.model" and is_pairrm(model):
            if Path(model).expanduser().is_dir():
                check_pairrm(Path(model), run[section]["backend"])
            continue
        folder = adapter_folder(model)
        if key == "preference.model" and run[section]["backend"] != "transformers":
            raise UserError(
                f"config: {where}preference.backend is {run[section]['backend']}, which runs PairRM, and preference.model is {model}; give "
                "llm-blender/PairRM or set transformers"
            )
        if folder is None and key == "preference.model":
            raise UserError(
                f"config: {where}{key} is {model}; give `ranker`, a folder that src/tools/train_ranker.py wrote, or llm-blender/PairRM"
            )
        for file in ADAPTER_FILES:
            if folder and not (folder / file).is_file():
                raise UserError(
                    f"config: {where}{key} is {model}, but {folder} has no {file}; give `ranker`, `judge` or a "
                    "folder that src/tools/train_ranker.py wrote"
                )
    for section, check in JUDGED.values():
        check(*(run[section][key] for key in ("judge", "judge_model", "judge_base_url")), key=False)
    questions = []
    if run["mt_bench"]["data"] != "fastchat":
        questions = mt_bench.read_questions(Path(run["mt_bench"]["data"]))
    if run["pairs"]["gold"]:
        read_gold(Path(run["pairs"]["gold"]))
    if run["open_llm"]["data"] != "hub" and not Path(run["open_llm"]["data"]).is_dir():
        raise UserError(
            f"config: {where}open_llm.data is {run['open_llm']['data']}, but there is no such folder; give `hub`, or a folder "
            "with all six tasks"
        )
    held_out = check_instructions(run["alpaca_eval"], where)
    held_out |= {normalised(row["turns"][0]) for row in questions}
    tracker = run["train"]["report_to"]
    if (
        in_conda
        and tracker != "none"
        and f"- {tracker}==" not in TRAINING_ENVIRONMENT.read_text(encoding="utf-8")
    ):
        raise UserError(
            f"config: {where}train.report_to is {tracker}, which envs/core.yaml lacks; add it there, as - {tracker}==<version> "
            "under pip, or set none"
        )
    if not in_conda and tracker != "none" and not importlib.util.find_spec(tracker):
        raise UserError(
            f"config: {where}train.report_to is {tracker}, which is not installed; run .venv/bin/pip install {tracker}, or set none"
        )
    if (
        not in_conda
        and run["train"]["parallel"] == "zero3"
        and not importlib.util.find_spec("deepspeed")
    ):
        raise UserError(
            f"config: {where}train.parallel is zero3, but DeepSpeed is not installed; run .venv/bin/pip install deepspeed, or set fsdp2"
        )
    if run["train"]["machines"] > 1 and not shutil.which("srun"):
        raise UserError(
            f"config: {where}train.machines is {run['train']['machines']}, but there is no Slurm here to reach them (no srun on PATH); "
            "run on a cluster with profiles/slurm, or set 1"
        )
    if run["iterations"]:
        check_prompts(run, held_out)


def check_base(policy: dict[str, Any]) -> None:
    """policy.model is `embedded`, a whole model folder, or a name for the hub; else UserError."""
    model = policy["model"]
    if model == "embedded":
        return
    if Path(model).is_dir():
        check_policy(Path(model), made_here=False)
        return
    if Path(model).is_file():
        raise UserError(
            f"config: policy.model is {model}, which is a file; give the folder that holds it, "
            "a model's with config.json"
        )
    if not HUB_ID.fullmatch(model):
        raise UserError(
            f"config: policy.model is {model!r}, which is neither a folder nor a hub id such as "
            "org/model; correct it, or take `embedded`"
        )
    check_no_typo("policy", "model", policy)


def check_no_typo(section: str, key: str, chosen: dict[str, Any]) -> None:
    """A name that the hub may have is not nearly that of a file or folder here; else UserError."""
    name = Path(chosen[key])
    here = [path.name for path in name.parent.iterdir()] if name.parent.is_dir() else []
    by_name = {Path(file).stem: file for file in here} | {file: file for file in here}
    near = difflib.get_close_matches(name.name, by_name, 1, 0.8)
    if near and not chosen["revision"]:
        raise UserError(
            f"config: {section}.{key} is {name}, which is not here, but {by_name[near[0]]} is, in "
            f"{name.parent}; correct the path, or, if {name} on the hub is meant, name its commit "
            f"as {section}.revision"
        )


def check_instructions(evaluation: dict[str, Any], where: str) -> set[str]:
    """The evaluation's files are there and belong together.

    Returns its instructions, normalised; none for `official`, which a rule fetches.
    """
    official = evaluation["instructions"] == "official"
    for key in ("reference", "difficulty"):
        if evaluation[key] == "official" and not (official and evaluation["limit"] is None):
            raise UserError(
                f"config: {where}alpaca_eval.{key} is official, which is of AlpacaEval's 805 instructions; set alpaca_eval.instructions "
                "to official and limit to null, or name a file of your own"
            )
        if (
            evaluation[key] not in (None, "base", "official")
            and not Path(evaluation[key]).is_file()
        ):
            raise UserError(
                f"config: {where}alpaca_eval.{key} is {evaluation[key]}, but there is no such file; correct the path"
            )
    if official:
        return set()
    file = Path(evaluation["instructions"])
    if not (
        file.is_file() or file.is_dir() or file.is_symlink()
    ):  # those are told by what reads it
        problem = "is neither a file nor a folder" if file.exists() else "is missing"
        raise UserError(
            f"config: {where}alpaca_eval.instructions is {str(file)!r}, but {file} "
            f"{problem}; correct the path"
        )
    instructions, asked = read_instructions(file), read_instructions(file, evaluation["limit"])
    if len(asked) < FEWEST_INSTRUCTIONS:
        raise UserError(
            f"config: {where}alpaca_eval.instructions is {file}, which has {len(asked)} "
            f"instructions; the length-controlled metric needs {FEWEST_INSTRUCTIONS}, so give more"
        )
    if evaluation["reference"] != "base":
        outputs = alpaca_eval.read_outputs(Path(evaluation["reference"]))
        try:
            alpaca_eval.paired([row | {"generator": "policy"} for row in asked], outputs)
        except UserError as error:
            raise UserError(
                f"config: {where}alpaca_eval.reference is {evaluation['reference']}: {error}"
            ) from None
    if evaluation["difficulty"]:
        alpaca_eval.check_order(asked, Path(evaluation["difficulty"]))
    return {normalised(row["instruction"]) for row in instructions}


def check_machine(
    runs: dict[str, dict[str, Any]],
    jobs: set[tuple[str, str, bool]],
    gpus: int | None,
    in_conda: bool = False,
) -> None:
    """What jobs need and a dry run does not: judges' keys and models, the hub's token, GPUs, vLLM.

    jobs: of each one to come what it makes (its verdict, else its rule), its run, and whether it
    takes a GPU. gpus: how many this machine has, None if the jobs run elsewhere. in_conda: as in
    `check_inputs`. Raises `UserError` naming the first that is missing.
    """
    for made, name, on_gpu in sorted(jobs):
        run, where = runs[name], f"runs.{name}." if name else ""
        if made == "push_policy":
            check_push()
        if made in JUDGED:
            section, check = JUDGED[made]
            judge, model, url = (
                run[section][key] for key in ("judge", "judge_model", "judge_base_url")
            )
            check(judge, model, url)
            check_served(judge, model, url, f"{where}{section}")
        if not on_gpu or gpus is None:
            continue
        if gpus == 0:
            raise UserError(
                "config: device is gpu, but this machine shows no NVIDIA GPU; run where there is one or on a cluster (profiles/slurm), or "
                "set device: cpu"
            )
        shards, each, processes = (
            run["responses"]["shards"],
            run["responses"]["tensor_parallel"] or 1,
            run["train"]["processes"],
        )
        if made == "generate_responses" and shards * each > gpus:
            raise UserError(
                f"config: {where}responses.shards is {shards}, {each if each > 1 else 'one'} GPU each, but this machine shows {gpus}; lower it, or run on "
                "a cluster (profiles/slurm)"
            )
        if (
            made in ("train_policy", "train_dropped_policy")
            and processes > gpus * run["train"]["machines"]
        ):
            raise UserError(
                f"config: {where}train.processes is {processes}, one GPU each, but this machine shows {gpus}; lower it, or run on a cluster "
                "(profiles/slurm)"
            )
    # After the GPUs, because an environment is of no use without one.
    engines = {runs[name]["responses"]["engine"] for made, name, _ in jobs if made in GENERATING}
    if "vllm" in engines and not in_conda and not importlib.util.find_spec("vllm"):
        raise UserError(
            "config: responses.engine is vllm, which is not installed here; run snakemake with "
            "--use-conda, which makes an environment that has it, or set transformers"
        )


def check_folder_for_slurm(folder: str) -> None:
    """Snakemake's Slurm executor, which quotes no path, can work in this folder; else UserError."""
    if re.search(r"[\s'\"$`\\;&|<>()*?!#]", folder):
        raise UserError(
            f"Snakemake's Slurm executor does not quote the path of this folder, {folder}; move the"
            " checkout to a path without blanks and characters of the shell"
        )


def gpus_here() -> int:
    """GPUs that programs started here would see, told without importing torch."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    here = len(list(Path("/dev").glob("nvidia[0-9]*")))
    return (
        here
        if shown is None
        else min(here, len([number for number in shown.split(",") if number.strip()]))
    )


def check_prompts(run: dict[str, Any], held_out: set[str]) -> None:
    """A JSONL source is whole and holds enough prompts for all iterations; a hub source is left to its rule."""
    prompts = run["prompts"]
    source = prompts["source"]
    for each in sorted({source.replace("{t}", str(t)) for t in range(1, run["iterations"] + 1)}):
        if Path(each).is_dir():
            raise UserError(
                f"config: prompts.source is {each}, which is a folder; give a JSONL file in it"
            )
        if Path(each).is_file():
            continue
        if not HUB_ID.fullmatch(each) or each.endswith((".jsonl", ".json")):
            raise UserError(
                f"config: prompts.source is {each!r}, which is neither a file nor a hub data set "
                "such as org/name; correct the path"
            )
        check_no_typo("prompts", "source", prompts | {"source": each})
    if "{t}" in source or not Path(source).is_file():
        return
    rows, *_ = read_prompts(source, None, prompts["split"], prompts["field"])
    free = sum(not is_held_out(row, held_out) for row in rows)
    wanted = (prompts["per_iteration"] or 1) * run["iterations"]
    if wanted > free:
        raise UserError(
            f"config: prompts.per_iteration asks for {prompts['per_iteration'] or 1} prompts in each of {run['iterations']} "
            f"iterations, {wanted} in all, but {source} has {free} outside the evaluation set; lower it or give more prompts"
        )
    each_has = prompts["per_iteration"] or free // run["iterations"]
    if run["responses"]["shards"] > each_has:
        raise UserError(
            f"config: responses.shards is {run['responses']['shards']}, but an iteration has "
            f"{each_has} prompts, and each shard needs one; lower it"
        )


def deleted_artifacts(root: Path, keep_policies: bool) -> list[str]:
    """Artifacts under `root` that a record names as made or used there, and that are gone.

    Policies do not count if the workflow itself drops them.
    """
    named: set[str] = set()
    for path in root.rglob("*.record.json"):
        try:
            record = parse_json(path.read_text(encoding="utf-8"))
            named |= {record["artifact"], *record["inputs"]}
        except (OSError, ValueError, TypeError, KeyError):
            continue  # broken records are for the stage that reads them to report
    own = (
        name
        for name in named
        if Path(name).is_relative_to(root) and (keep_policies or Path(name).name != "policy")
    )
    return sorted(name for name in own if not Path(name).exists())
