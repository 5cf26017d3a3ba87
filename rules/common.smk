"""Requires: the configuration. Gives: resolved runs, the paths of all artifacts, what every rule shares.

No other file spells `results/`. Artifacts lie under results/[name/][run/]iter{t}/.
"""

import os
import sys
from pathlib import Path

from snakemake.settings.types import DeploymentMethod

sys.path.insert(0, str(Path(workflow.basedir) / "src"))

from sppo.config import ENGINE_KEYS, flags, of_iteration, resolve
from sppo.errors import UserError, fail
from sppo.adapters import adapter_files
from sppo.preflight import check_inputs, deleted_artifacts
from sppo.stages import STAGES

try:
    RUNS = resolve(config)
    if workflow.is_main_process:
        check_inputs(RUNS)
except UserError as error:
    fail(str(error))

MAIN = RUNS[""]
ROOT = f"results/{MAIN['name']}/" if MAIN["name"] else "results/"
LOGS = f"{ROOT}logs/"
BENCHMARKS = f"{ROOT}benchmarks/"
MODELS = "results/models/"
EMBEDDED_POLICY = f"{MODELS}SmolLM2-135M-Instruct"
BASE_POLICY = f"{ROOT}iter0/policy"

# On one machine models never run side by side: each job takes all cores, or a GPU.
ON_GPU = MAIN["device"] == "gpu" or (MAIN["device"] == "auto" and Path("/dev/nvidiactl").exists())
MODEL_THREADS = 1 if ON_GPU else max(workflow.cores or 1, 1)
MODEL_GPUS = 1 if ON_GPU else 0
ENGINE_GPUS = MODEL_GPUS * (MAIN["responses"]["tensor_parallel"] or 1)
IN_CONDA = DeploymentMethod.CONDA in workflow.deployment_settings.deployment_method
# vLLM wants another transformers than the rest.
ENGINE_ENVIRONMENT = "../envs/vllm.yaml" if MAIN["responses"]["engine"] == "vllm" else "../envs/core.yaml"
PYTHON = "python" if IN_CONDA else sys.executable
if sys.stderr.isatty():
    os.environ["SPPO_WATCHED"] = "1"


wildcard_constraints:
    run="(" + "|".join(f"{name}/" if name else "" for name in RUNS) + ")",
    t=r"\d+",
    shard=r"\d+",


def settings(wildcards):
    """The resolved configuration of the run that a job belongs to."""
    return RUNS[wildcards.run.rstrip("/")]


def labels(figure):
    """What tells a file from others in the report: its run, and what it shows, which may name wildcards."""
    return lambda wildcards: {"run": getattr(wildcards, "run", "all").rstrip("/") or "main", "figure": figure.format(**dict(wildcards.items()))}


def at(artifact):
    """Pattern of an artifact of any run and iteration."""
    return f"{ROOT}{{run}}iter{{t}}/{artifact}"


def record(artifact):
    """Pattern of the record beside an artifact."""
    return f"{artifact}.record.json"


def policy(run, t):
    """The policy after iteration t; all runs share the base."""
    return BASE_POLICY if int(t) == 0 else f"{ROOT}{run}iter{t}/policy"


def current_policy(wildcards):
    """pi_t of this iteration: what it samples from, refers to and starts from."""
    return policy(wildcards.run, int(wildcards.t) - 1)


def this_policy(wildcards):
    """The policy that this iteration gave."""
    return policy(wildcards.run, wildcards.t)


def files_of(folder):
    """All files of a folder of data, for a folder's own time says nothing of edits in it; none if it is a name such as `hub`."""
    return sorted(str(path) for path in Path(folder).rglob("*") if path.is_file())


def sampled(wildcards, artifact, t=None):
    """An artifact up to the preferences, of iteration t or the job's own: main's where a run shares its first iteration."""
    t = str(t or wildcards.t)
    shared = t == "1" and settings(wildcards)["first_iteration_from"] == "main"
    return f"{ROOT}{'' if shared else wildcards.run}iter{t}/{artifact}"


def shards(wildcards, folder, t=None):
    """All shards of an artifact, a fixed number known from the configuration."""
    return [sampled(wildcards, f"{folder}/{shard}.parquet", t) for shard in range(settings(wildcards)["responses"]["shards"])]


def section_flags(name, skip=()):
    """Parameter function: the flags of one configuration section of the job's run."""
    return lambda wildcards: flags(settings(wildcards)[name], skip)


def ranker_base(wildcards):
    """What the embedded preference models sit on."""
    return EMBEDDED_POLICY


class RemakesDeleted(type(workflow)):
    """Makes again what somebody deleted, with all that follows from it.

    Snakemake by itself passes over a missing intermediate file as long as the last one is there, and has no
    setting for it; here the deleted artifacts are forced as `--forcerun` would, if the targets need them.
    """

    def __setattr__(self, name, value):
        if name == "_dag":
            value.forcefiles.update(deleted_artifacts(Path(ROOT), MAIN["keep_policies"]))
        super().__setattr__(name, value)


if workflow.is_main_process:
    workflow.__class__ = RemakesDeleted
