"""Requires: the configuration. Gives: resolved runs, the paths of all artifacts, what every rule shares.

No other file spells `results/`. Artifacts lie under results/[name/][run/]iter{t}/.
"""

import os
import shlex
import sys
from pathlib import Path

from snakemake.settings.types import DeploymentMethod

sys.path.insert(0, str(Path(workflow.basedir) / "src"))

from sppo.workflow.cluster import Asked, check_cluster
from sppo.core.config import CHAINING, COMPARISON, ENGINE_KEYS, GRADING, MODEL_SOURCE, OF_CHATS
from sppo.core.config import THRESHOLDS, flags, of_iteration, resolve, without_effect
from sppo.core.config_files import check_files, files_hint
from sppo.core.errors import UserError, explained, fail, on_one_line
from sppo.preferences.adapters import adapter_files, is_pairrm
from sppo.evaluation.alpaca_eval import DIFFICULTY, OFFICIAL_REFERENCE
from sppo.policies.models import HUB_FILES
from sppo.workflow.preflight import check_folder_for_slurm, check_inputs, check_machine
from sppo.workflow.preflight import deleted_artifacts, gpus_here
from sppo.core.stages import STAGES

IN_CONDA = DeploymentMethod.CONDA in workflow.deployment_settings.deployment_method
if IN_CONDA:
    os.environ["PYTHONNOUSERSITE"] = (
        "1"  # a user's ~/.local would stand before the environment's own packages
    )
if workflow.is_main_process and not os.path.samefile(workflow.basedir, os.getcwd()):
    fail(
        "the workflow's paths begin in the Snakefile's folder; run in it: "
        f"cd {shlex.quote(str(workflow.basedir))}"
    )

CONFIG_FILES = [Path("config/config.yaml").absolute(), *workflow.overwrite_configfiles]
try:
    if workflow.is_main_process:
        check_files(CONFIG_FILES)
except Exception as error:
    fail(explained(error) or str(error))


configfile: "config/config.yaml"


try:
    RUNS = resolve(config)
except UserError as error:
    fail(str(error) + files_hint(CONFIG_FILES))
if workflow.is_main_process:
    try:
        check_inputs(RUNS, IN_CONDA)
    except Exception as error:
        if explained(error) is None:
            raise
        fail(explained(error))
    for line in without_effect(config, RUNS):
        print(f"warning: {on_one_line(line)}", file=sys.stderr)

MAIN = RUNS[""]
ROOT = f"results/{MAIN['name']}/" if MAIN["name"] else "results/"
LOGS = f"{ROOT}logs/"
BENCHMARKS = f"{ROOT}benchmarks/"
MODELS = "results/models/"
EMBEDDED_POLICY = f"{MODELS}SmolLM2-135M-Instruct"


def folder_of(run):
    """Where a run's artifacts lie; main, whose name is "", has no folder of its own."""
    return f"{ROOT}{run}/" if run else ROOT


def artifact(run, t, name):
    """Path of an artifact of a run's iteration t."""
    return f"{folder_of(run)}iter{t}/{name}"


BASE_POLICY = artifact("", 0, "policy")
# Flags of how chats are written and, for programs that run the policy, of how it is run.
CHATS = flags({key: MAIN["policy"][key] for key in OF_CHATS})
RUNNING = flags(MAIN["policy"], skip=MODEL_SOURCE)

# On one machine models never share hardware: each job takes all cores, or a GPU and its share of them.
ON_GPU = MAIN["device"] == "gpu" or (MAIN["device"] == "auto" and Path("/dev/nvidiactl").exists())
GPUS_AT_ONCE = workflow.resource_settings.resources.get("gpu")
GPUS_AT_ONCE = GPUS_AT_ONCE.value if GPUS_AT_ONCE else gpus_here()
MODEL_GPUS = 1 if ON_GPU else 0
# Snakemake makes OMP_NUM_THREADS of these. A GPU's job loads, casts and writes weights with them.
CORES = workflow.resource_settings.cores or 1
MODEL_THREADS = max(CORES // (max(GPUS_AT_ONCE, 1) if ON_GPU else 1), 1)
TRAINING_GPUS = MODEL_GPUS * max(
    run["train"]["processes"] // run["train"]["machines"] for run in RUNS.values()
)
TRAINING_THREADS = min(MODEL_THREADS * max(TRAINING_GPUS, 1), max(CORES, 1))
ENGINE_GPUS = MODEL_GPUS * (MAIN["responses"]["tensor_parallel"] or 1)
# What the configuration makes a rule's jobs use on a cluster, over all nodes, where its profile says what they get.
GPUS_USED = (
    {}
    if MAIN["device"] == "cpu"
    else {
        **dict.fromkeys(
            (
                "generate_responses",
                "answer_instructions",
                "answer_instructions_n_times",
                "answer_mt_bench",
            ),
            MAIN["responses"]["tensor_parallel"] or 1,
        ),
        **dict.fromkeys(
            ("train_policy", "train_dropped_policy"),
            max(run["train"]["processes"] for run in RUNS.values()),
        ),
    }
)
# vLLM wants another transformers than the rest.
ENGINE_ENVIRONMENT = (
    "../envs/vllm.yaml" if MAIN["responses"]["engine"] == "vllm" else "../envs/core.yaml"
)
# Shell commands take it as it is; all else that they name they quote themselves, with :q.
PYTHON = "python" if IN_CONDA else shlex.quote(sys.executable)
if sys.stderr.isatty():
    os.environ["SPPO_WATCHED"] = "1"

# AlpacaEval's own files, where the configuration says `official`: a rule fetches them.
OFFICIAL_OUTPUTS, OFFICIAL_DIFFICULTIES = (
    f"{MODELS}alpaca_eval/{OFFICIAL_REFERENCE}",
    f"{MODELS}alpaca_eval/{DIFFICULTY}",
)
for each in RUNS.values():
    fetched = {
        "instructions": OFFICIAL_OUTPUTS,
        "reference": OFFICIAL_OUTPUTS,
        "difficulty": OFFICIAL_DIFFICULTIES,
    }
    each["alpaca_eval"] |= {
        key: file for key, file in fetched.items() if each["alpaca_eval"][key] == "official"
    }


def any_of(runs):
    """Pattern of the wildcard `run` for these alone. In brackets, for Snakemake takes an empty pattern, main's, for none at all."""
    return "(" + "|".join(f"{name}/" if name else "" for name in runs) + ")" if runs else "(?!)"


wildcard_constraints:
    run=any_of(RUNS),
    t=r"\d+",
    shard=r"\d+",


def run_of(wildcards):
    """The name of a job's run. The wildcard ends in a slash, for main's is empty and has none."""
    return wildcards.run.rstrip("/")


def settings(wildcards):
    """The resolved configuration of the run that a job belongs to."""
    return RUNS[run_of(wildcards)]


def labels(figure):
    """What tells a file from others in the report: its run, and what it shows, which may name wildcards."""
    return lambda wildcards: {
        "run": (run_of(wildcards) or "main") if hasattr(wildcards, "run") else "all",
        "figure": figure.format(**dict(wildcards.items())),
    }


def at(name):
    """Pattern of an artifact of any run and iteration."""
    return f"{ROOT}{{run}}iter{{t}}/{name}"


def record(path):
    """The record beside an artifact, or its pattern."""
    return f"{path}.record.json"


def policy(run, t):
    """The policy after iteration t; all runs share the base."""
    return BASE_POLICY if int(t) == 0 else artifact(run, t, "policy")


def current_policy(wildcards):
    """pi_t of this iteration: what it samples from, refers to and starts from."""
    return policy(run_of(wildcards), int(wildcards.t) - 1)


def this_policy(wildcards):
    """The policy that this iteration gave."""
    return policy(run_of(wildcards), wildcards.t)


def files_of(folder):
    """All files of a folder of data, for a folder's own time says nothing of edits in it; none if it is a name such as `hub`."""
    return sorted(str(path) for path in Path(folder).rglob("*") if path.is_file())


def model_files(folder):
    """Files of a model's folder that are taken over; none if it is a name such as a hub id."""
    return sorted({str(path) for pattern in HUB_FILES for path in Path(folder).glob(pattern)})


def sampled(wildcards, name, t=None):
    """An artifact up to the preferences, of iteration t or the job's own: main's where a run shares its first iteration."""
    t = str(t or wildcards.t)
    shared = t == "1" and settings(wildcards)["first_iteration_from"] == "main"
    return artifact("" if shared else run_of(wildcards), t, name)


def shards(wildcards, folder, t=None):
    """All shards of an artifact, a fixed number known from the configuration."""
    return [
        sampled(wildcards, f"{folder}/{shard}.parquet", t)
        for shard in range(settings(wildcards)["responses"]["shards"])
    ]


def section_flags(name, skip=()):
    """Parameter function: the flags of one configuration section of the job's run."""
    return lambda wildcards: flags(settings(wildcards)[name], skip)


def best_grade(wildcards, t):
    """The flag that asks the policy after iteration t for its best, where it has learned to be asked."""
    return "--best-grade" if settings(wildcards)["pairs"]["goals"] and int(t) > 0 else ""


def gpus_if(needed):
    """GPUs of a job that runs a model itself only where `needed`, a function of its wildcards, says so; None is a job of which nothing is known."""
    return lambda wildcards: MODEL_GPUS if wildcards is None or needed(wildcards) else 0


def asked_of_cluster(job_rule, attempts):
    """What a rule's jobs ask of a cluster, at the last attempt. The profile's expressions may name the attempt."""

    def value(name):
        resource = job_rule.resources.get(name)
        return (
            resource
            and resource.evaluate(
                None, input=[], attempt=attempts, threads=1, rulename=job_rule.name, async_run=None
            ).value
        )

    partition, account = (
        str(value(name) or "") for name in ("slurm_partition", "slurm_account")
    )  # YAML reads 12345 as a number
    return Asked(
        job_rule.name,
        partition,
        account,
        value("runtime"),
        value("gpu") or 0,
        GPUS_USED.get(job_rule.name, 0),
    )


class Checked(type(workflow)):
    """What Snakemake has no setting for.

    It makes again what somebody deleted, with all that follows from it: Snakemake by itself passes over a missing
    intermediate file as long as the last one is there; here the deleted artifacts are forced as `--forcerun` would,
    if the targets need them. And it asks a cluster whether it can take the jobs before it submits one.
    """

    def __setattr__(self, name, value):
        if name == "_dag":
            value.forcefiles.update(deleted_artifacts(Path(ROOT), MAIN["keep_policies"]))
        super().__setattr__(name, value)

    def execute(self, executor_plugin, executor_settings, **others):
        if executor_plugin.name == "slurm":
            os.environ.pop(
                "SPPO_WATCHED", None
            )  # jobs take over the environment, and nobody sits before their logs
            asked = [
                asked_of_cluster(rule, self.execution_settings.retries + 1)
                for rule in self.rules
                if not rule.norun
            ]
            most = self.resource_settings.resources.get("gpu")
            try:
                check_folder_for_slurm(os.getcwd())
                check_cluster(asked, executor_settings.status_command, most and most.value)
            except UserError as error:
                fail(str(error))
        return super().execute(
            executor_plugin=executor_plugin, executor_settings=executor_settings, **others
        )


if workflow.is_main_process:
    workflow.__class__ = Checked


onstart:
    # What a dry run does without: before the first job, not after hours.
    if workflow.is_main_process:
        to_come = {
            (
                job.wildcards.get("verdict", job.rule.name),
                job.wildcards.get("run", "").rstrip("/"),
                bool(job.resources.get("gpu")),
            )
            for job in workflow.dag.needrun_jobs()
        }
        try:
            check_machine(RUNS, to_come, gpus_here() if workflow.local_exec else None, IN_CONDA)
        except UserError as error:
            fail(str(error))
