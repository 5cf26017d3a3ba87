"""Requires: the configuration. Gives: resolved runs, and the paths and functions that rules share.

No other file writes `results/`. Artifacts are stored in results/[name/][run/]iter{t}/.
"""

import functools
import os
import shlex
import sys
from pathlib import Path

from snakemake.settings.types import DeploymentMethod

# The repository: the folder of the Snakefile, unless another workflow uses this one as a module.
REPOSITORY = Path(str(workflow.current_basedir)).parent
IS_MODULE = not workflow.modifier.is_main_snakefile()
IS_HERE = REPOSITORY.resolve() == Path.cwd().resolve()
IS_CLONE = Path(".snakemake/sppo").resolve() in REPOSITORY.resolve().parents  # workflow/Snakefile
sys.path.insert(0, str(REPOSITORY / "src"))

from sppo.core.artifacts import shipped
from sppo.core.config import ANSWER_KEYS, ENGINE_KEYS, MODEL_SOURCE, OF_CHATS, running_keys
from sppo.core.config_files import all_files, check_files, files_hint
from sppo.core.errors import UserError, explained, fail, on_one_line
from sppo.core.flags import flags, of_iteration
from sppo.core.stages import STAGES
from sppo.evaluation.alpaca_eval import DIFFICULTY, OFFICIAL_REFERENCE
from sppo.evaluation.registry import EVALUATIONS
from sppo.policies.gpus import count_gpus
from sppo.policies.hub import HUB_FILES
from sppo.preferences.base import kind_of, local_kind, model_files
from sppo.training.distributed import FSDP
from sppo.training.losses import has_opponents, unread_keys
from sppo.training.requirements import WITHOUT_PREFERENCES, trains_on_one_pair
from sppo.workflow.cluster import Asked, check_cluster
from sppo.workflow.configuration import read_configuration, resolve, without_effect
from sppo.workflow.deleted import deleted_artifacts, force_deleted
from sppo.workflow.preflight import (
    GENERATING,
    TRAINING,
    check_folder_for_slurm,
    check_inputs,
    check_machine,
)

IN_CONDA = DeploymentMethod.CONDA in workflow.deployment_settings.deployment_method
if IN_CONDA:
    # A user's ~/.local would be searched before the environment's own packages.
    os.environ.update(PYTHONNOUSERSITE="1")
if workflow.is_main_process and not (IS_MODULE or IS_HERE or IS_CLONE):
    fail(
        "the workflow's paths start at the Snakefile's folder; run in it: "
        f"cd {shlex.quote(str(REPOSITORY))}"
    )

# `config` contains the values of --config and --configfile, or those of the workflow that uses this
# one as a module and has read its own files. The demo's configuration is read only if no other is
# given.
CONFIG_FILES = [] if IS_MODULE else list(workflow.overwrite_configfiles)
if not CONFIG_FILES and "extends" not in config and not (IS_MODULE and config):
    CONFIG_FILES = [REPOSITORY / "config" / "config.yaml"]
try:
    if workflow.is_main_process:
        check_files(CONFIG_FILES)
    WRITTEN = read_configuration(CONFIG_FILES, config)
except Exception as error:
    fail(explained(error) or str(error))
try:
    RUNS = resolve(WRITTEN)
except UserError as error:
    fail(str(error) + files_hint(all_files(CONFIG_FILES)))


@functools.cache
def run_settings(name):
    """The resolved configuration of a run, checked at the first call. The main run's name is ""."""
    try:
        run = RUNS[name]
        if workflow.is_main_process:
            check_inputs(name, run, IN_CONDA)
            for line in without_effect(WRITTEN, name, RUNS):
                print(f"warning: {on_one_line(line)}", file=sys.stderr)
    except Exception as error:
        if explained(error) is None:
            raise
        fail(explained(error))
    official = {
        "instructions": OFFICIAL_OUTPUTS,
        "reference": OFFICIAL_OUTPUTS,
        "difficulty": OFFICIAL_DIFFICULTIES,
    }
    evaluation = run["alpaca_eval"]
    fetched = {key: file for key, file in official.items() if evaluation[key] == "official"}
    return run | {"alpaca_eval": evaluation | fetched}


MODELS = "results/models/"
# AlpacaEval's own files, which a rule fetches if the configuration says `official`.
OFFICIAL_OUTPUTS = f"{MODELS}alpaca_eval/{OFFICIAL_REFERENCE}"
OFFICIAL_DIFFICULTIES = f"{MODELS}alpaca_eval/{DIFFICULTY}"
MAIN = run_settings("")
# The runs whose configurations are valid, for decisions that depend on all runs. Their files are
# not checked.
USABLE = RUNS.usable()
ROOT = f"results/{MAIN['name']}/" if MAIN["name"] else "results/"
LOGS = f"{ROOT}logs/"
BENCHMARKS = f"{ROOT}benchmarks/"
EMBEDDED_POLICY = f"{MODELS}SmolLM2-135M-Instruct"


def folder_of(run):
    """The folder of a run's artifacts. The main run, whose name is "", has no folder of its own."""
    return f"{ROOT}{run}/" if run else ROOT


def artifact(run, t, name):
    """The path of an artifact of a run's iteration t."""
    return f"{folder_of(run)}iter{t}/{name}"


BASE_POLICY = artifact("", 0, "policy")
# Flags that set how chats are written.
CHATS = flags({key: MAIN["policy"][key] for key in OF_CHATS})
# Flags that set how programs run the policy.
RUNNING = flags(MAIN["policy"], skip=MODEL_SOURCE)

# On one machine, models never share hardware. Each job uses all cores, or a GPU and its share of
# the cores.
GPUS_HERE = count_gpus()
ON_GPU = MAIN["device"] == "gpu" or (MAIN["device"] == "auto" and GPUS_HERE > 0)
GPUS_AT_ONCE = workflow.resource_settings.resources.get("gpu")
GPUS_AT_ONCE = GPUS_AT_ONCE.value if GPUS_AT_ONCE else GPUS_HERE
MODEL_GPUS = 1 if ON_GPU else 0
# Snakemake sets OMP_NUM_THREADS to a rule's threads. A job on a GPU uses them to load, cast and
# write weights.
CORES = workflow.resource_settings.cores or 1
MODEL_THREADS = max(CORES // (max(GPUS_AT_ONCE, 1) if ON_GPU else 1), 1)
PROCESSES = max(run["train"]["processes"] for run in USABLE.values())
TRAINING_GPUS = MODEL_GPUS * max(
    run["train"]["processes"] // run["train"]["nodes"] for run in USABLE.values()
)
TRAINING_THREADS = min(MODEL_THREADS * max(TRAINING_GPUS, 1), max(CORES, 1))
GPUS_OF_ENGINE = MAIN["responses"]["tensor_parallel"] or 1
ENGINE_GPUS = MODEL_GPUS * GPUS_OF_ENGINE
# The number of GPUs that a rule's jobs use on a cluster, over all nodes, by rule. The configuration
# decides it; the cluster's profile decides how many GPUs the jobs get.
GPUS_USED = {}
if MAIN["device"] not in ("cpu", "mps"):
    GPUS_USED = dict.fromkeys(GENERATING, GPUS_OF_ENGINE) | dict.fromkeys(TRAINING, PROCESSES)
# vLLM needs another version of transformers than the other programs.
ENGINE_ENVIRONMENT = (
    "../envs/vllm.yaml" if MAIN["responses"]["engine"] == "vllm" else "../envs/core.yaml"
)
# Shell commands contain these three values as they are, and quote all other values with :q. A part
# of a command that contains one of the three is an f-string, because Snakemake does not find the
# global names of a module when it formats a command.
PYTHON = "python" if IN_CONDA else shlex.quote(sys.executable)
SRC = "src" if IS_HERE else shlex.quote(str(REPOSITORY.resolve() / "src"))
DEVICE = MAIN["device"]
if sys.stderr.isatty():
    os.environ.update(SPPO_WATCHED="1")


# By evaluation, an input function for the files of its questions, which must not be training
# prompts. An evaluation's rule file adds its own.
HELD_OUT = {}


def any_of(runs):
    """The pattern of the wildcard `run` for these runs only.

    The brackets are needed because the main run's pattern is empty, which Snakemake reads as no
    pattern.
    """
    names = [f"{name}/" if name else "" for name in runs]
    return f"({'|'.join(names)})" if names else "(?!)"


wildcard_constraints:
    run=any_of(RUNS),
    t=r"0|[1-9]\d*",
    shard=r"\d+",


def run_of(wildcards):
    """The name of a job's run.

    The wildcard includes the slash after the name, because the main run has neither.
    """
    return wildcards.run.rstrip("/")


def settings(wildcards):
    """The resolved configuration of the run that a job belongs to."""
    return run_settings(run_of(wildcards))


def labels(figure):
    """A file's labels in the report: its run, and `figure`, which can contain wildcards."""
    return lambda wildcards: {
        "run": (run_of(wildcards) or "main") if hasattr(wildcards, "run") else "all",
        "figure": figure.format(**dict(wildcards.items())),
    }


def at(name, t="{t}"):
    """The pattern of an artifact of any run, of any iteration or of iteration t."""
    return f"{ROOT}{{run}}iter{t}/{name}"


def record(path):
    """The path, or pattern, of an artifact's record."""
    return f"{path}.record.json"


def policy(run, t):
    """The policy after iteration t; all runs share the base."""
    return BASE_POLICY if int(t) == 0 else artifact(run, t, "policy")


def current_policy(wildcards):
    """pi_t of this iteration, from which it samples and starts training."""
    return policy(run_of(wildcards), int(wildcards.t) - 1)


def this_policy(wildcards):
    """The policy that this iteration trains, or the base in iteration 0."""
    return policy(run_of(wildcards), wildcards.t)


def files_of(folder):
    """All files of a folder of data; empty if `folder` is a name such as `hub`.

    The files are inputs because the folder's time does not change when a file in it is edited.
    """
    return sorted(str(path) for path in Path(folder).rglob("*") if path.is_file())


def hub_files(folder):
    """The files of a model's folder that are used; empty if `folder` is a name such as a hub id."""
    return sorted({str(path) for pattern in HUB_FILES for path in Path(folder).glob(pattern)})


def sampled(wildcards, name, t=None):
    """The path of prompts, responses or preferences, in iteration t or the job's iteration.

    In iteration 1 it is the main run's, if the run shares its first iteration.
    """
    t = str(t or wildcards.t)
    shared = t == "1" and settings(wildcards)["first_iteration_from"] == "main"
    return artifact("" if shared else run_of(wildcards), t, name)


def shards(wildcards, folder, t=None):
    """The paths of all shards of an artifact. The configuration sets their number."""
    return [
        sampled(wildcards, f"{folder}/{shard}.parquet", t)
        for shard in range(settings(wildcards)["responses"]["shards"])
    ]


def section_flags(name, skip=()):
    """Parameter function: the flags of one configuration section of the job's run."""
    return lambda wildcards: flags(settings(wildcards)[name], skip)


def answering_flags(evaluation):
    """Parameter function: the flags that set how the questions of an evaluation are answered."""

    def flags_of(wildcards):
        run = settings(wildcards)
        chosen = {key: run[evaluation][key] for key in ANSWER_KEYS}
        return flags(chosen | {key: run["responses"][key] for key in ENGINE_KEYS}) + RUNNING

    return flags_of


def highest_reward(wildcards):
    """The flag that asks a policy for the highest reward; empty if the run has no target rewards.

    The base is evaluated with it too, because the prompt alone changes what it answers.
    """
    return "--highest-reward" if settings(wildcards)["pairs"]["target_reward"] else ""


def gpus_if(needed):
    """Resource function: the GPUs of a job that runs a model only if `needed(wildcards)` is true.

    The wildcards are None if Snakemake asks about the rule and not about a job.
    """
    return lambda wildcards: MODEL_GPUS if wildcards is None or needed(wildcards) else 0


def threads_if(needed):
    """Threads function: all threads of a model's job if `needed(wildcards)` is true, else one."""
    return lambda wildcards: MODEL_THREADS if wildcards is None or needed(wildcards) else 1


def asked_of_cluster(job_rule, attempts):
    """The resources that a rule's jobs request on a cluster at the last attempt.

    They can depend on the attempt in the profile.
    """

    def value(name):
        resource = job_rule.resources.get(name)
        return (
            resource
            and resource.evaluate(
                None, input=[], attempt=attempts, threads=1, rulename=job_rule.name, async_run=None
            ).value
        )

    # YAML reads an account such as 12345 as a number.
    partition, account = (str(value(name) or "") for name in ("slurm_partition", "slurm_account"))
    return Asked(
        job_rule.name,
        partition,
        account,
        value("runtime"),
        value("gpu") or 0,
        GPUS_USED.get(job_rule.name, 0),
    )


def check_slurm():
    """Check that the cluster accepts the jobs, before the first is submitted."""
    # Jobs inherit the environment, and nobody watches their logs.
    os.environ.pop("SPPO_WATCHED", None)
    attempts = workflow.execution_settings.retries + 1
    submitted = [rule for rule in workflow.rules if not workflow.is_local(rule)]
    asked = [asked_of_cluster(rule, attempts) for rule in submitted]
    most = workflow.resource_settings.resources.get("gpu")
    check_folder_for_slurm(os.getcwd())
    check_cluster(asked, workflow.executor_settings.status_command, most and most.value)


if workflow.is_main_process:
    force_deleted(workflow, lambda: deleted_artifacts(Path(ROOT), MAIN["keep_policies"]))


onstart:
    # Checks before the first job, so that it does not fail after hours. A dry run omits them.
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
            if workflow.executor_plugin.name == "slurm":
                check_slurm()
            check_machine(USABLE, to_come, GPUS_HERE if workflow.local_exec else None, IN_CONDA)
        except UserError as error:
            fail(str(error))
