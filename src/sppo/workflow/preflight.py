"""What is checked before any work starts, and what was deleted since the last run.

Imports nothing heavy.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
import shutil
from pathlib import Path
from typing import Any

from sppo.core.artifacts import ROOT
from sppo.core.errors import UserError
from sppo.core.openai_api import check_served
from sppo.evaluation.judges import GRADES, Judging
from sppo.evaluation.registry import EVALUATIONS
from sppo.policies.folders import HUB_ID, check_policy
from sppo.policies.hub import check_push
from sppo.policies.prompts import is_held_out, read_gold, read_prompts
from sppo.preferences.base import check_prompts, kind_of
from sppo.workflow.configuration import of_run

TRAINING_ENVIRONMENT = ROOT / "envs" / "core.yaml"
# Rules whose jobs run the engine that generates.
GENERATING = (
    "generate_responses",
    "measure_policy",
    *(rule for evaluation in EVALUATIONS for rule in evaluation.answered_by),
)
TRAINING = ("train_policy", "train_dropped_policy", "train_lookahead")
# By rule, or verdict, whose jobs ask a judge.
JUDGED: dict[str, Judging] = {
    "grade_responses": GRADES,
    **{each.judged_by: each.judging for each in EVALUATIONS if each.judging is not None},
}


def check_inputs(name: str, run: dict[str, Any], in_conda: bool = False) -> None:
    """Every file that a run's configuration names exists and can be read, and prompts suffice.

    name: of the run, "" is main. in_conda: programs run in the environments of envs/, so that what
    is installed here does not matter. Raises `UserError` that names the first problem.
    """
    try:
        _check_inputs(name, run, in_conda)
    except UserError as error:
        raise of_run(error, name) if name else error from None


def _check_inputs(name: str, run: dict[str, Any], in_conda: bool) -> None:
    where = f"runs.{name}." if name else ""
    if not name:
        check_base(run["policy"])  # all runs share it
        if run["policy"]["attention"] == "flash_attention_2":
            check_package("flash-attn", "policy.attention", run["policy"], in_conda, "null")
    kind_of(run["preference"], f"config: {where}preference.model").check(
        run["preference"], f"config: {where}preference.model"
    )
    for judging in JUDGED.values():
        judging.check(run[judging.section], key=False)
    if run["pairs"]["gold"]:
        read_gold(Path(run["pairs"]["gold"]))
    held_out: set[str] = set()
    for evaluation in EVALUATIONS:
        held_out |= evaluation.check(run, where)
    check_installed(run["train"], where, in_conda)
    if run["iterations"]:
        check_source(run, held_out, where)


def check_installed(train: dict[str, Any], where: str, in_conda: bool) -> None:
    """Optional packages and programs that training asks for are there; else UserError."""
    if train["report_to"] != "none":
        check_package(train["report_to"], f"{where}train.report_to", train, in_conda, "none")
    if train["parallel"] == "zero3":
        check_package("deepspeed", f"{where}train.parallel", train, in_conda, "fsdp2")
    if "bnb" in train["optimizer"]:
        check_package("bitsandbytes", f"{where}train.optimizer", train, in_conda, "rmsprop")
    if train["nodes"] > 1 and not shutil.which("srun"):
        raise UserError(
            f"config: {where}train.nodes is {train['nodes']}, but there is no Slurm here to reach"
            " them (no srun on PATH); run on a cluster with profiles/slurm, or set 1"
        )


def check_package(
    package: str, key: str, section: dict[str, Any], in_conda: bool, instead: str
) -> None:
    """The optional package that a value of a key needs is installed; else UserError.

    instead: the value that needs no package.
    """
    wanted = f"config: {key} is {section[key.rpartition('.')[2]]}"
    if in_conda:
        if f"- {package}==" not in TRAINING_ENVIRONMENT.read_text(encoding="utf-8"):
            raise UserError(
                f"{wanted}, but envs/core.yaml lacks {package}; add it there, as"
                f" - {package}==<version> under pip, or set {instead}"
            )
    elif not importlib.util.find_spec(package.replace("-", "_")):
        raise UserError(
            f"{wanted}, but {package} is not installed; run .venv/bin/pip install {package}, or"
            f" set {instead}"
        )


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


def check_machine(
    runs: dict[str, dict[str, Any]],
    jobs: set[tuple[str, str, bool]],
    gpus: int | None,
    in_conda: bool = False,
) -> None:
    """What jobs need and a dry run does not: judges' keys and models, the hub's token, GPUs, vLLM.

    jobs: for each one to come what it makes (its verdict, else its rule), its run, and whether it
    takes a GPU. gpus: how many this machine has, None if the jobs run elsewhere. in_conda: as in
    `check_inputs`. Raises `UserError` naming the first that is missing.
    """
    for made, name, on_gpu in sorted(jobs):
        run, where = runs[name], f"runs.{name}." if name else ""
        if made == "push_policy":
            check_push()
        if made in JUDGED:
            judging = JUDGED[made]
            chosen = run[judging.section]
            judging.check(chosen)
            check_served(
                chosen["judge"],
                chosen["judge_model"],
                chosen["judge_base_url"],
                f"{where}{judging.section}",
            )
        if on_gpu and gpus is not None:
            _check_gpus(made, run, where, gpus)
    # After the GPUs, because an environment is of no use without one.
    engines = {runs[name]["responses"]["engine"] for made, name, _ in jobs if made in GENERATING}
    if "vllm" in engines and not in_conda and not importlib.util.find_spec("vllm"):
        raise UserError(
            "config: responses.engine is vllm, which is not installed here; run snakemake with "
            "--use-conda, which makes an environment that has it, or set transformers"
        )


def _check_gpus(made: str, run: dict[str, Any], where: str, gpus: int) -> None:
    """This machine has as many GPUs as a job of the run takes; else UserError."""
    if gpus == 0:
        raise UserError(
            "config: device is gpu, but this machine shows no GPU; run where there is one or"
            " on a cluster (profiles/slurm), or set device: cpu"
        )
    elsewhere = "lower it, or run on a cluster (profiles/slurm)"
    of_engine = run["responses"]["tensor_parallel"] or 1
    if made in GENERATING and of_engine > gpus:
        raise UserError(
            f"config: {where}responses.tensor_parallel is {of_engine}, but this machine shows"
            f" {gpus} GPUs; {elsewhere}"
        )
    processes = run["train"]["processes"]
    if made in TRAINING and processes > gpus * run["train"]["nodes"]:
        raise UserError(
            f"config: {where}train.processes is {processes}, one GPU each, but this machine shows"
            f" {gpus}; {elsewhere}"
        )


def check_folder_for_slurm(folder: str) -> None:
    """Snakemake's Slurm executor, which quotes no path, can work in this folder; else UserError."""
    if re.search(r"[\s'\"$`\\;&|<>()*?!#]", folder):
        raise UserError(
            f"Snakemake's Slurm executor does not quote the path of this folder, {folder}; move the"
            " checkout to a path without blanks and characters of the shell"
        )


def check_source(run: dict[str, Any], held_out: set[str], where: str) -> None:
    """A JSONL source is complete and has enough prompts for all iterations; else UserError.

    The preference model must be able to compare responses to each prompt of a file. A hub source is
    left to its rule. With a file for each iteration, prompts are not counted.
    """
    prompts = run["prompts"]
    source = prompts["source"]
    preference = run["preference"]
    compared = run["pairs"]["construction"] != "gold" and preference["source"] == "instruction"
    for each in sorted({source.replace("{t}", str(t)) for t in range(1, run["iterations"] + 1)}):
        if Path(each).is_dir():
            raise UserError(
                f"config: prompts.source is {each}, which is a folder; give a JSONL file in it"
            )
        if Path(each).is_file():
            rows, *_ = read_prompts(each, None, prompts["split"], prompts["field"])
            gold = run["pairs"]["gold"]
            if gold and not {str(row["id"]) for row in rows} & read_gold(Path(gold)).keys():
                raise UserError(
                    f"config: {where}pairs.gold is {gold}, whose ids are those of no prompt in"
                    f" {each}; give gold responses to these prompts"
                )
            if compared:
                texts = [row["messages"][-1]["content"] for row in rows]
                check_prompts(preference, texts, f"config: {where}preference.model")
            continue
        if not HUB_ID.fullmatch(each) or each.endswith((".jsonl", ".json")):
            raise UserError(
                f"config: prompts.source is {each!r}, which is neither a file nor a hub data set "
                "such as org/name; correct the path"
            )
        check_no_typo("prompts", "source", prompts | {"source": each})
    if "{t}" in source or not Path(source).is_file():
        return
    free = sum(not is_held_out(row, held_out) for row in rows)
    parts = 1 if prompts["repeat"] else run["iterations"]
    wanted = (prompts["per_iteration"] or 1) * parts
    if wanted > free:
        each = f"each of {parts} iterations, {wanted} in all" if parts > 1 else "each iteration"
        raise UserError(
            f"config: prompts.per_iteration asks for {prompts['per_iteration'] or 1} prompts in"
            f" {each}, but {source} has {free} outside the evaluation set; lower it or give more"
            " prompts"
        )
    each_has = prompts["per_iteration"] or free // parts
    if run["responses"]["shards"] > each_has:
        raise UserError(
            f"config: responses.shards is {run['responses']['shards']}, but an iteration has "
            f"{each_has} prompts, and each shard needs one; lower it"
        )
