"""The workflow's files: the required parts of rules, dry runs, and errors before the first job."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sppo.core.artifacts import file_hash, record_path, write_json
from sppo.core.config import ENGINE_KEYS, default_of, schema
from sppo.core.config_files import check_files, merged, read_files
from sppo.core.errors import UserError, explained
from sppo.evaluation.registry import EVALUATIONS
from sppo.policies.gpus import count_gpus
from sppo.workflow import preflight
from sppo.workflow.configuration import Runs, resolve
from sppo.workflow.preflight import check_folder_for_slurm, check_inputs, check_machine
from verify_results import stage_of

ROOT = Path(__file__).resolve().parents[2]
RULE_FILES = sorted((ROOT / "rules").glob("*.smk"))
PRESETS = sorted((ROOT / "config" / "presets").glob("*.yaml"))
PAPER_SCALE = ("mistral-7b", "llama-3-8b", "gemma-2-9b", "single-gpu")
# Rules without input files. They read a package or the network.
WITHOUT_INPUT = re.compile(r"policies\.embedded_policy|\w+\.fetch_\w+")
SECTIONS_OF_A_RULE = (
    "input",
    "output",
    "log",
    "benchmark",
    "conda",
    "threads",
    "resources",
    "params",
    "message",
    "shell",
)
PACKAGES_OF_PROGRAMS = (
    "numpy",
    "pandas",
    "pyarrow",
    "torch",
    "transformers",
    "openai",
    "alpaca_eval",
    "fastchat",
    "datasets",
)
SNAKEMAKE = (sys.executable, "-m", "snakemake", "--cores", "2")


def test_snakefile_needs_only_snakemake():
    """With conda, Snakemake runs in a separate environment without the programs' packages."""
    code = (
        "import sys\n"
        f"for name in {PACKAGES_OF_PROGRAMS}:\n"
        "    sys.modules[name] = None\n"
        "from sppo.core.config_files import read_files\n"
        "from sppo.workflow import cluster, deleted, preflight\n"
        "from sppo.workflow.configuration import resolve\n"
        "for name, run in resolve(read_files(['config/config.yaml'])).items():\n"
        "    preflight.check_inputs(name, run)\n"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": "src"}
    )


def rules() -> dict[str, str]:
    """The text of every rule in rules/, by file and name."""
    one_rule = re.compile(r"^rule (\w+):\n((?:[ \t]+.*\n|\n)+)", re.MULTILINE)
    found = {}
    for file in RULE_FILES:
        text = file.read_text(encoding="utf-8") + "\n"
        for name, body in one_rule.findall(text):
            found[f"{file.stem}.{name}"] = body
    return found


def text_of_rule_files() -> str:
    return "".join(file.read_text(encoding="utf-8") for file in RULE_FILES)


def test_all_rules_are_found_by_these_tests():
    declared = re.findall(r"^\s*(?:rule|checkpoint) \w*", text_of_rule_files(), re.MULTILINE)
    assert len(declared) == len(rules()) > 5
    assert not any("checkpoint" in line for line in declared)


@pytest.mark.parametrize("rule", rules())
def test_rule_has_all_required_sections(rule):
    body = rules()[rule]
    assert re.match(r'\s*"""\S.+\S"""\n', body), "no docstring"
    for key in SECTIONS_OF_A_RULE:
        if key != "input" or not WITHOUT_INPUT.fullmatch(rule):
            assert re.search(rf"^    {key}:", body, re.MULTILINE), f"no {key}"
    for name in ("mem_mb", "runtime"):
        amount = rf"{name}=(\d+|lambda wildcards, attempt: \d+ \* attempt),"
        assert re.search(rf"^        {amount}$", body, re.MULTILINE)
    assert re.search(r'version=STAGES\["\w+"\],', body), "a new stage version would not rerun it"
    environment = re.search(
        r'conda:\n\s+(?:"(.+)"|(?:ENGINE|OPEN_LLM)_ENVIRONMENT|preference_environment)\n', body
    )
    assert environment
    assert (ROOT / "rules" / (environment[1] or "../envs/core.yaml")).is_file()
    assert '"{PYTHON} {SRC}/' in body
    assert "{log:q}" in body


@pytest.mark.parametrize("rule", rules())
def test_rule_calls_its_program_with_known_arguments(rule):
    body = rules()[rule]
    (program,) = re.findall(r"\{PYTHON\} \{SRC\}/([\w/]+\.py)", body)
    source = (ROOT / "src" / program).read_text(encoding="utf-8")
    known = set(re.findall(r'add_argument\(\s*"--([a-z-]+)"', source))
    known |= {"replay-share", "replay-older-share"}
    for section in re.findall(r'add_section\(\s*parser, "(\w+)"', source):
        known |= {key.replace("_", "-") for key in schema()["properties"][section]["properties"]}
    if "add_engine(parser)" in source:
        known |= {key.replace("_", "-") for key in ENGINE_KEYS} | {"seed", "device", "attention"}
    asked = set(re.findall(r"--([a-z-]+) ", body.split("shell:")[1]))
    assert asked
    assert asked <= known, f"{program} has no {asked - known}"


@pytest.mark.parametrize("rule", rules())
def test_rule_writes_a_record_of_every_artifact(rule):
    (outputs,) = re.findall(r"^    output:\n((?: {8}.+\n)+)", rules()[rule], re.MULTILINE)
    entries = re.split(r"^ {8}(?=\w+=)", outputs, flags=re.MULTILINE)[1:]
    assert 2 * sum("record(" in entry for entry in entries) >= len(entries)


WILDCARDS = {
    "{shard}": "0",
    "{frozen}": "earlier1",
    "{answers}": "reference_outputs",
    "{verdict}": "against_previous",
    "{choice}_of_{n}": "nash_of_4",
    "{arena_hard_answers}": "arena_hard_reference_outputs",
    "{mt_bench_answers}": "mt_bench_reference_answers",
}


@pytest.mark.parametrize("rule", rules())
def test_stage_of_every_artifact_is_known_from_its_path(rule):
    """`make verify` needs it to find artifacts without a record, and to rebuild records."""
    (stage,) = re.findall(r'version=STAGES\["(\w+)"\],', rules()[rule])
    for name, base in re.findall(r'record\(at\("(.+?)"(, t=0)?\)\)', rules()[rule]):
        for wildcard, value in WILDCARDS.items():
            name = name.replace(wildcard, value)
        path = Path("results", "iter0" if base else "iter1", name)
        assert stage_of(path) == (None if stage == "tabulate" else stage), path


@pytest.mark.parametrize("file", RULE_FILES, ids=lambda file: file.stem)
def test_rules_file_starts_with_its_inputs_and_outputs(file):
    text = file.read_text(encoding="utf-8")
    assert re.match(r'"""Requires: .+ Gives: .+', text)


@pytest.mark.parametrize(
    "file", [file for file in RULE_FILES if file.stem != "common"], ids=lambda file: file.stem
)
def test_only_common_names_the_results_folder(file):
    assert "results/" not in file.read_text(encoding="utf-8").replace("under results/", "")


def test_snakefile_has_no_lambda():
    assert "lambda" not in (ROOT / "Snakefile").read_text(encoding="utf-8")


def test_snakefile_includes_every_rules_file():
    text = (ROOT / "Snakefile").read_text(encoding="utf-8")
    included = re.findall(r'^include: "rules/(\w+)\.smk"', text, re.MULTILINE)
    of_evaluations = {each.rule_file for each in EVALUATIONS}
    assert sorted([*included, *of_evaluations]) == [file.stem for file in RULE_FILES]


# --- profiles ---


def read_slurm_profile(folder: Path) -> tuple[dict[str, dict], str]:
    """The resources of each rule, and the warnings, of the Slurm profile read in a folder."""
    code = (
        "import json, sys, yte\n"
        "text = open(sys.argv[1], encoding='utf-8').read()\n"
        "print(json.dumps(yte.process_yaml(text, require_use_yte=True)['set-resources']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, ROOT / "profiles" / "slurm" / "config.yaml"],
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout), done.stderr


@functools.cache
def resources_in_the_slurm_profile() -> dict[str, dict]:
    """The resources of each rule in the Slurm profile, in this repository."""
    resources, warnings = read_slurm_profile(ROOT)
    assert not warnings
    return resources


def rules_and_derived_rules() -> dict[str, str]:
    """The text of every rule by name. A derived rule has the text of its base."""
    text = {name.split(".")[1]: body for name, body in rules().items()}
    derived = re.findall(r"^\s*use rule (\w+) as (\w+) with:", text_of_rule_files(), re.MULTILINE)
    return text | {name: text[base] for base, name in derived}


def local_rules() -> set[str]:
    """The rules whose jobs run on the login node."""
    return {name for name, body in rules_and_derived_rules().items() if "localrule: True" in body}


def test_rules_that_use_the_network_are_local():
    fetching = {name for name in rules_and_derived_rules() if name.startswith("fetch_")}
    others = {"base_policy", "preference_model", "sample_prompts", "push_policy"}
    assert local_rules() == fetching | others


def test_resubmitted_slurm_jobs_request_more_memory_and_time():
    """The profile or the rule itself sets the resources."""
    in_profile = resources_in_the_slurm_profile()
    submitted = rules_and_derived_rules().keys() - local_rules()
    assert in_profile.keys() <= submitted
    for name in submitted:
        for key in ("mem_mb", "runtime"):
            of_rule = re.search(rf"^ +{key}=(.+),$", rules_and_derived_rules()[name], re.MULTILINE)
            assert "attempt" in in_profile.get(name, {}).get(key, of_rule[1]), name


def test_slurm_profile_gives_gpus_to_rules_that_use_them():
    with_gpu = {name for name, asked in resources_in_the_slurm_profile().items() if "gpu" in asked}
    use_gpu = {
        name
        for name, body in rules_and_derived_rules().items()
        if re.search(r"gpu=(\w+_GPUS|gpus_if)", body)
    }
    assert with_gpu == use_gpu


def write_clone(folder: Path, version: str, rule: str, seconds: int) -> None:
    """Write a clone, as workflow/Snakefile makes it, whose only evaluation has one GPU rule."""
    package = folder / ".snakemake" / "sppo" / version / "src" / "sppo" / "evaluation"
    package.mkdir(parents=True)
    (package / "registry.py").write_text(
        f"class Evaluation:\n    gpu_rules = ('{rule}',)\nEVALUATIONS = [Evaluation]\n",
        encoding="utf-8",
    )
    os.utime(package.parents[1], (seconds, seconds))


def test_slurm_profile_reads_the_newest_clone(tmp_path):
    write_clone(tmp_path, "v2", "answer_new", seconds=2000)
    write_clone(tmp_path, "v1", "answer_old", seconds=1000)
    resources, warnings = read_slurm_profile(tmp_path)
    assert resources["answer_new"] == resources["generate_responses"]
    assert "answer_old" not in resources
    assert not warnings


def test_slurm_profile_without_a_registry_warns(tmp_path):
    resources, warnings = read_slurm_profile(tmp_path)
    (line,) = warnings.splitlines()
    assert line.startswith("warning: profiles/slurm finds no src/sppo/evaluation/registry.py")
    of_evaluations = {rule for each in EVALUATIONS for rule in each.gpu_rules}
    assert resources.keys() == resources_in_the_slurm_profile().keys() - of_evaluations


# --- dry runs ---


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A copy of the repository without results and environment."""
    folder = tmp_path_factory.mktemp("clone") / "sppo"
    for name in ("rules", "src", "config", "data", "envs", "profiles", "workflow"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Snakefile", folder)
    return folder


def dry_run(folder: Path, *words: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "OPENAI_API_KEY"}
    return subprocess.run(
        [*SNAKEMAKE, "-n", *words], cwd=folder, env=environment, capture_output=True, text=True
    )


def overlaid(text: str) -> dict:
    """A configuration with open prompts and the ranker, updated with the YAML `text`."""
    laptop = read_files([ROOT / "config" / "presets" / "laptop.yaml"])
    return merged(laptop, yaml.safe_load(text))


def write_overlay(file: Path, text: str) -> None:
    """Write a file that extends the demo's configuration with the YAML `text`."""
    content = yaml.safe_load(text) | {"extends": "config/config.yaml"}
    file.write_text(yaml.safe_dump(content), encoding="utf-8")


def check_every_run(runs: Runs) -> None:
    """Check the inputs of every run, as if every run was requested."""
    for name in runs:
        check_inputs(name, runs[name])


def jobs(done: subprocess.CompletedProcess) -> dict[str, int]:
    """The number of jobs of each rule, from the table that Snakemake prints."""
    assert done.returncode == 0, done.stdout + done.stderr
    table = (done.stdout + done.stderr).split("Job stats:")[1].split("\n\n")[0]
    return {name: int(count) for name, count in re.findall(r"^(\w+) +(\d+)$", table, re.MULTILINE)}


def evaluated(done: subprocess.CompletedProcess) -> set[str]:
    """The files alpaca_eval.json that a run would make."""
    missing = re.findall(r"Missing output files: ([^;\n]+)", done.stdout + done.stderr)
    names = {name for line in missing for name in line.split(", ")}
    return {name for name in names if name.endswith("/alpaca_eval.json")}


@pytest.mark.parametrize(
    "preset", [None, *PRESETS], ids=lambda preset: preset.stem if preset else "default"
)
@pytest.mark.parametrize("settings", ["paper", "repo"])
def test_shipped_configuration_plans_every_stage(settings, preset, copy):
    """It needs no GPU, no key and no network."""
    words = ["--config", f"settings={settings}"]
    if preset:
        words = ["--configfile", str(preset.relative_to(ROOT)), *words]
    done = dry_run(copy, *words)
    runs = resolve(read_files([preset or ROOT / "config" / "config.yaml"]))
    main = runs[""]
    shown = ["", *main["summary"]["beside"]]
    trained = sum(runs[name]["iterations"] for name in shown)
    # A control takes responses and preferences of its first iteration from the main run.
    sampled = trained - sum(runs[name]["first_iteration_from"] == "main" for name in shown)
    shards = main["responses"]["shards"]
    expected = {
        "sample_prompts": sampled,
        "generate_responses": sampled * shards,
        "annotate_preferences": sampled * shards,
        "build_pairs": trained,
        "score_reference": trained * shards,
        "train_policy": trained,
        "base_policy": 1,
    }
    planned = jobs(done)
    assert {name: planned.get(name, 0) for name in expected} == expected
    root = f"results/{main['name']}/" if main["name"] else "results/"
    assert evaluated(done) == {f"{root}iter0/alpaca_eval.json"} | {
        f"{root}{name}{'/' if name else ''}iter{t}/alpaca_eval.json"
        for name in shown
        for t in range(1, runs[name]["iterations"] + 1)
    }


def test_demo_is_annotated_and_judged_by_exact_annotators(copy):
    """Only code compares responses, and IFEval checks the answers that AlpacaEval has."""
    done = dry_run(copy, "--printshellcmds")
    text = done.stdout + done.stderr
    assert "data/ranker" not in text
    assert "data/judge" not in text
    assert re.search(r"annotate_preferences\.py .*--model verifiable ", text)
    assert re.search(r"evaluate_alpaca_eval\.py .*--judge verifiable ", text)
    planned = jobs(done)
    assert "answer_ifeval" not in planned
    # The base, three policies, and the control after one iteration.
    assert planned["evaluate_ifeval"] == 5
    assert "results/permuted/iter1/ifeval.json" in text
    # Beside these five, each trained policy is compared with the one before it.
    assert planned["judge_outputs"] == 9
    assert "ranker_estimate" not in text


def test_demo_with_other_prompts_says_what_to_set(copy, monkeypatch):
    """The demo's annotators know only the prompts of data/instructions."""
    monkeypatch.chdir(copy)
    for t in (1, 2):
        (copy / f"mine{t}.jsonl").write_text('{"instruction": "Say something."}\n' * 9)

    def check(**sections: dict) -> None:
        demo = read_files([ROOT / "config" / "config.yaml"])
        config = merged(demo, {"iterations": 2, **sections})
        check_inputs("", resolve(config)[""])

    remedy = "set preference.model and alpaca_eval.judge, or extend config/presets/laptop.yaml"
    for source in ("mine1.jsonl", "mine{t}.jsonl"):
        prompts = {"source": source, "per_iteration": None}
        said = "^config: preference.model is verifiable.* such as 'Say something.'"
        with pytest.raises(UserError, match=f"{said}.*{remedy}"):
            check(prompts=prompts)
        check(prompts=prompts, preference={"model": "ranker"})
    evaluation = {"instructions": "data/evaluation.json"}
    with pytest.raises(UserError, match=f"^config: alpaca_eval.judge is verifiable.*{remedy}"):
        check(alpaca_eval=evaluation)
    check(alpaca_eval=evaluation | {"judge": "judge"})


@pytest.mark.parametrize("settings", ["paper", "repo"])
@pytest.mark.parametrize("name", PAPER_SCALE)
def test_paper_scale_preset_has_the_paper_s_settings(name, settings):
    """Each key that the preset does not set has the value of the paper or the official code."""
    written = read_files([ROOT / "config" / "presets" / f"{name}.yaml"])
    runs = resolve(written | {"settings": settings})
    run = runs[""]
    for section, rule in schema()["properties"].items():
        for key, inner in rule.get("properties", {}).items():
            if (written.get(section) or {}).get(key) is None:
                assert run[section][key] == default_of(inner, settings), f"{section}.{key}"
    train = run["train"]
    assert (run["iterations"], train["batch_size"], train["stop_epoch"]) == (3, 64, 1)
    assert (run["responses"]["samples"], run["responses"]["engine"]) == (5, "vllm")
    assert run["preference"]["model"] == "llm-blender/PairRM"
    assert not {"spin", "dno_prct"} & {*runs}
    assert {one["train"]["batch_size"] for one in runs.usable().values()} == {64}


@pytest.mark.parametrize(
    ("words", "threads"),
    [
        (("--resources", "gpu=8", "--config", "device=gpu"), "2 2"),
        (("--resources", "gpu=8", "--configfile", "config/presets/mistral-7b.yaml"), "2 16"),
        (("--config", "device=gpu"), "16 16"),  # the default profile runs one GPU job at a time
        (("--resources", "gpu=8", "--config", "device=cpu"), "16 16"),
    ],
)
def test_gpu_jobs_share_the_cores(words, threads, copy):
    (copy / "threads.smk").write_text(
        'include: "rules/common.smk"\n'
        'print("THREADS", MODEL_THREADS, TRAINING_THREADS, file=sys.stderr)\n'
        "rule all:\n    shell: 'true'\n",
        encoding="utf-8",
    )
    done = dry_run(copy, "--cores", "16", "--snakefile", "threads.smk", *words)
    assert f"THREADS {threads}\n" in done.stderr, done.stderr


def test_gpu_rules_use_the_shared_thread_counts():
    text = rules_and_derived_rules()
    assert "threads: TRAINING_THREADS" in text["train_policy"]
    assert "threads: MODEL_THREADS" in text["score_reference"]


@pytest.mark.parametrize("name", PAPER_SCALE)
def test_documented_preset_commands_have_the_needed_flags(name):
    """Commands in the preset's header and in all documents select vLLM's environment and GPUs."""
    file = f"config/presets/{name}.yaml"
    run = resolve(read_files([ROOT / file]))[""]
    pages = [ROOT / file, ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    printed = [
        line
        for page in pages
        for line in page.read_text(encoding="utf-8").splitlines()
        if "snakemake --cores" in line and file in line and not line.endswith(" -n")
    ]
    assert printed
    for line in printed:
        assert "--use-conda" in line or run["responses"]["engine"] != "vllm", line
        # With one GPU, a job has all cores, so jobs run one after another.
        assert "--resources gpu=8" in line or run["train"]["processes"] == 1, line


def test_official_alpaca_eval_files_are_fetched_on_request(copy):
    """The official reference outputs are those of GPT-4 turbo, so only the base answers."""
    words = ("--configfile", "config/presets/mistral-7b.yaml", "--")
    planned = jobs(dry_run(copy, *words, "results/mistral-7b/iter0/alpaca_eval.json"))
    assert planned["fetch_alpaca_eval"] == planned["fetch_difficulties"] == 1
    assert planned["answer_instructions"] == 1
    assert planned["judge_outputs"] == 1
    assert "train_policy" not in planned
    assert "fetch_alpaca_eval" not in jobs(dry_run(copy))


def test_official_instructions_are_fetched_before_prompts(copy):
    """Training prompts must differ from the 805 instructions of AlpacaEval."""
    words = ("--configfile", "config/presets/mistral-7b.yaml", "--")
    planned = jobs(dry_run(copy, *words, "results/mistral-7b/iter2/prompts.parquet"))
    assert planned["fetch_alpaca_eval"] == 1
    # Iteration 2 has its own source, and its prompts must differ from those of iteration 1.
    assert planned["sample_prompts"] == 2


def test_released_checkpoint_is_evaluated_without_training(copy):
    words = (
        "--configfile",
        "config/presets/mistral-7b.yaml",
        "--config",
        "iterations=0",
        "name=sppo-iter3",
    )
    done = dry_run(copy, *words, "policy={model: UCLA-AGI/Mistral7B-PairRM-SPPO-Iter3}")
    assert evaluated(done) == {"results/sppo-iter3/iter0/alpaca_eval.json"}
    assert not {"train_policy", "generate_responses"} & jobs(done).keys()
    for name in ("mt_bench", "open_llm"):
        assert jobs(dry_run(copy, *words, "--", f"results/sppo-iter3/iter0/{name}.json"))


def test_policies_are_pushed_only_on_request(copy):
    assert "push_policy" not in jobs(dry_run(copy))
    done = dry_run(copy, "--config", "push_to_hub=me/mine-{t}", "iterations=2")
    assert jobs(done)["push_policy"] == 2
    assert "results/iter2/pushed_to_hub.json" in done.stdout + done.stderr


def test_missing_gpu_stops_a_run_before_its_first_job(copy):
    """A dry run does not check for GPUs."""
    if count_gpus():
        pytest.skip("this machine has a GPU")
    done = subprocess.run(
        [
            *SNAKEMAKE,
            "--configfile",
            "config/presets/single-gpu.yaml",
            "--",
            "results/single-gpu/iter1/policy",
        ],
        cwd=copy,
        capture_output=True,
        text=True,
    )
    assert "device is gpu, but this machine shows no GPU" in one_error(done)
    assert not (copy / "results" / "single-gpu").exists()
    shutil.rmtree(copy / "results", ignore_errors=True)


def test_api_judge_runs_without_a_gpu(copy, monkeypatch):
    """A login node judges the answers of a cluster's nodes with the same configuration."""
    if count_gpus():
        pytest.skip("this machine has a GPU")
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    for file in (
        "models/alpaca_eval/alpaca_eval_gpt4_baseline.json",
        "models/alpaca_eval/df_gamed.csv",
        "single-gpu/iter0/alpaca_eval_outputs.json",
    ):
        file = copy / "results" / file
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
        write_json(record_path(file), {"sha256": file_hash(file)})
    done = subprocess.run(
        [
            *SNAKEMAKE,
            "--configfile",
            "config/presets/single-gpu.yaml",
            "--",
            "results/single-gpu/iter0/alpaca_eval.json",
        ],
        cwd=copy,
        capture_output=True,
        text=True,
    )
    shutil.rmtree(copy / "results")
    # The judge program was started: the error about the file's content is its own.
    assert "alpaca_eval_gpt4_baseline.json is not a list of outputs" in done.stdout + done.stderr


NEEDED = {
    "key for AlpacaEval": (
        {"alpaca_eval": {"judge": "weighted_alpaca_eval_gpt4_turbo"}},
        ("alpaca_eval", "", False),
        8,
        "export OPENAI_API_KEY",
    ),
    "key for MT-Bench": (
        {"mt_bench": {"judge": "gpt-4"}},
        ("evaluate_mt_bench", "", False),
        8,
        "mt_bench.judge",
    ),
    "key for grades": (
        {
            "runs": {
                "a": {
                    "pairs": {"construction": "graded"},
                    "train": {"loss": "dpo"},
                    "grades": {"judge": "gpt-4"},
                }
            }
        },
        ("grade_responses", "a", False),
        8,
        "export OPENAI_API_KEY.*grades.judge",
    ),
    "GPU": ({"device": "gpu"}, ("train_policy", "", True), 0, "shows no GPU"),
    "GPUs of the engine": (
        {"device": "gpu", "responses": {"engine": "vllm", "tensor_parallel": 4, "shards": 8}},
        ("evaluate_open_llm", "", True),
        2,
        "responses.tensor_parallel is 4, but this machine shows 2",
    ),
    "hub token": ({"push_to_hub": "me/a-{t}"}, ("push_policy", "", False), 8, "export HF_TOKEN"),
}


@pytest.mark.parametrize(("config", "job", "gpus", "said"), NEEDED.values(), ids=NEEDED)
def test_missing_requirement_of_a_job_is_a_one_line_error(config, job, gpus, said, monkeypatch):
    for name in ("OPENAI_API_KEY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    runs = resolve(config)
    with pytest.raises(UserError, match=said) as caught:
        check_machine(runs, {job}, gpus)
    assert "\n" not in str(caught.value)

    _, run, on_gpu = job
    check_machine(runs, {("build_pairs", run, False)}, gpus)  # Other jobs do not need it.
    if on_gpu:
        check_machine(runs, {job}, 8)
        check_machine(runs, {job}, None)  # A cluster has an unknown number of GPUs.


def test_missing_vllm_is_a_one_line_error(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    runs, jobs = resolve({"responses": {"engine": "vllm"}}), {("generate_responses", "", False)}
    with pytest.raises(UserError, match="responses.engine is vllm.*--use-conda"):
        check_machine(runs, jobs, 8)
    check_machine(runs, jobs, 8, in_conda=True)
    check_machine(runs, {("build_pairs", "", False)}, 8)
    check_machine(resolve({}), jobs, 8)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    check_machine(runs, jobs, 8)


@pytest.mark.parametrize("folder", ["/home/me/my work", "/home/me/it's", "/home/$USER/x"])
def test_slurm_refuses_a_path_that_needs_quotes(folder):
    with pytest.raises(UserError, match="Slurm executor.*move the checkout"):
        check_folder_for_slurm(folder)
    check_folder_for_slurm("/home/müller/my-work_1.0/sppo")


def test_requested_target_is_planned_with_its_inputs(copy):
    done = dry_run(copy, "results/iter3/alpaca_eval.json")
    assert jobs(done)["train_policy"] == 3
    assert evaluated(done) == {"results/iter3/alpaca_eval.json"}


def test_everything_plans_all_evaluations(copy):
    planned = jobs(dry_run(copy, "everything"))
    assert planned["train_policy"] == 3 + 3 + 1  # main, k2, permuted
    assert planned["evaluate_mt_bench"] == planned["evaluate_open_llm"] == 4
    assert planned["judge_best_of_n"] == 5
    assert planned["build_response_browser"] == planned["plot_training"] == 1
    assert jobs(dry_run(copy, "paper_tables"))["paper_tables"] == 1


IMPOSSIBLE = {
    "results/expo/figures/training.svg": "the run expo trains no policy",
    "results/expo/iter1/train_log.jsonl": "results/expo/iter1/train_log.jsonl",
    "results/dno/response_browser.html": "one pair of responses to each prompt, which dno does not",
    "results/iter3/best_of_99/alpaca_eval.json": "raise best_of_n.samples, which is 16",
}


@pytest.mark.parametrize(("target", "said"), IMPOSSIBLE.items(), ids=IMPOSSIBLE)
def test_impossible_target_is_refused_before_any_job(target, said, copy):
    done = dry_run(copy, target)
    assert done.returncode
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_everything_leaves_out_what_a_run_cannot_have(copy):
    words = ["everything", "--config"]
    assert "build_response_browser" not in jobs(dry_run(copy, *words, "pairs={construction: all}"))
    planned = jobs(dry_run(copy, *words, "iterations=0", "summary={beside: []}"))
    assert not {"plot_training", "train_policy"} & planned.keys()


def test_reference_policy_of_each_method_is_scored(copy):
    """References other than pi_t are scored only in the iterations in which a method has them.

    INPO and offline DPO have the base as reference from iteration 2 on. MPO has its magnet (N = 2)
    only in iteration 2.
    """
    for run, scored in (("dpo", set()), ("inpo", {2, 3}), ("dpo_offline", {2, 3}), ("mpo", {2})):
        done = dry_run(copy, f"results/{run}/iter3/policy")
        planned = jobs(done)
        assert planned["score_reference"] == 3 + len(scored)
        assert planned["generate_responses"] == 3
        file = rf"results/{run}/iter(\d)/logps/reference/0\.parquet"
        found = {int(t) for t in re.findall(file, done.stdout + done.stderr)}
        assert found == scored, run


def test_graded_runs_use_grades_instead_of_preferences(copy):
    done = dry_run(copy, "results/dno_prct/iter3/alpaca_eval.json", "--printshellcmds")
    planned = jobs(done)
    text = done.stdout + done.stderr
    for rule in ("grade_responses", "generate_responses", "build_pairs"):
        assert planned[rule] == 3, rule
    assert "annotate_preferences" not in planned
    assert "--grades results/dno_prct/iter2/grades/0.parquet" in text
    assert "--previous results/dno_prct/iter1/pairs.parquet" in text
    assert re.search(
        r"grade_responses\.py .*--gold data/gold\.jsonl .*--judge preference --model ranker "
        r".*--probability pairwise",
        text,
    )


def test_graded_run_may_grade_the_responses_of_main(copy):
    write_overlay(
        copy / "graded.yaml",
        "runs: {dpo: {pairs: {construction: graded}, grades: {judge: openai, judge_model: m,"
        " judge_base_url: http://localhost/v1}}}",
    )
    done = dry_run(
        copy, "results/dpo/iter1/pairs.parquet", "--configfile", "graded.yaml", "--printshellcmds"
    )
    text = done.stdout + done.stderr
    assert re.search(
        r"grade_responses\.py .*--responses results/iter1/responses/0\.parquet .*--judge openai "
        r".*--output results/dpo/iter1/grades/0\.parquet",
        text,
    )
    assert "data/ranker" not in text
    assert "annotate_preferences" not in jobs(done)


def test_dice_uses_its_implicit_reward_from_iteration_2(copy):
    """In iteration 1 the ranker compares responses. Later the implicit reward compares them.

    The reward is log pi_t / pi_(t-1). The pairs of iteration 1 are replayed.
    """
    done = dry_run(copy, "results/dice/iter3/policy", "--printshellcmds")
    assert jobs(done)["annotate_preferences"] == 1
    assert jobs(done)["annotate_implicitly"] == 2
    text = done.stdout + done.stderr
    assert "--policy results/dice/iter1/policy --before results/iter0/policy" in text
    assert "--policy results/dice/iter2/policy --before results/dice/iter1/policy" in text
    assert text.count("--previous results/dice/iter1/pairs.parquet") == 2


def test_main_run_may_use_its_implicit_reward(copy):
    text = "{name: own, preference: {implicit: true}, train: {loss: dpo}}"
    write_overlay(copy / "own.yaml", text)
    planned = jobs(dry_run(copy, "--configfile", "own.yaml", "--", "results/own/iter3/policy"))
    assert (planned["annotate_preferences"], planned["annotate_implicitly"]) == (1, 2)


def test_prompts_of_an_iteration_do_not_depend_on_later_ones(copy):
    """So a run can be continued with a larger `iterations`."""
    text = "{name: own, prompts: {per_iteration: 12}}"
    write_overlay(copy / "own.yaml", text)

    def command(t: int, iterations: int) -> str:
        words = ["--printshellcmds", "--configfile", "own.yaml"]
        words += ["--config", f"iterations={iterations}"]
        done = dry_run(copy, *words, "--", f"results/own/iter{t}/prompts.parquet")
        lines = (done.stdout + done.stderr).splitlines()
        return next(line for line in lines if "/sample_prompts.py" in line)

    assert command(2, 2) == command(2, 4)
    assert "--iteration 2 --iterations 2 " in command(2, 4)


def test_iteration_beyond_the_last_is_refused(copy):
    done = dry_run(copy, "results/iter4/policy")
    assert done.returncode
    said = "error: iteration 4 is asked for, but iterations is 3; raise it"
    assert said in done.stdout + done.stderr


def test_all_jobs_get_the_options_of_the_preference_model(copy):
    """Otherwise answers would be sent to OpenAI although the user has named an own server."""
    preference = {"model": "openai:m", "base_url": "http://localhost:8000/v1", "timeout": 301}
    content = {"extends": "config/presets/laptop.yaml", "name": "own", "iterations": 1}
    (copy / "own.yaml").write_text(yaml.safe_dump(content | {"preference": preference}))
    targets = ["iter1/ranker_estimate.json", "iter1/best_of_16/alpaca_eval.json"]
    targets += ["figures/pairwise_ranker.svg"]
    words = ["--printshellcmds", "--configfile", "own.yaml", "--"]
    done = dry_run(copy, *words, *(f"results/own/{target}" for target in targets))
    asked = [line for line in (done.stdout + done.stderr).splitlines() if "openai:m" in line]
    programs = {Path(word).stem for line in asked for word in line.split() if word.endswith(".py")}
    assert programs == {
        "annotate_preferences",
        "evaluate_alpaca_eval",
        "pick_best_of_n",
        "compare_policies",
    }
    for line in asked:
        assert re.search(r"base-url http://localhost:8000/v1 .*timeout 301 ", line), line


def test_only_controls_get_flags_of_labels(copy):
    """A flag for annotated labels would make the pairs of an earlier version again."""
    done = dry_run(
        copy,
        *(f"results/{run}iter1/pairs.parquet" for run in ("", "sft/", "permuted/", "flipped/")),
        "--printshellcmds",
        "--config",
        "seeds={data: 5}",
    )
    lines = (done.stdout + done.stderr).splitlines()
    commands = {
        re.search(r"--output results/(\w*)/?iter1/pairs", line)[1]: line
        for line in lines
        if "/build_pairs.py" in line
    }
    assert "--label" not in commands[""] + commands["sft"]
    for run in ("permuted", "flipped"):
        assert f"--labels {run} " in commands[run]
        assert "--label-seed 5 " in commands[run]
        assert "--preferences results/iter1/preferences/0.parquet" in commands[run]


def test_gold_responses_need_no_comparisons(copy):
    assert (
        not {"annotate_preferences", "grade_responses"}
        & jobs(dry_run(copy, "results/spin/iter3/policy")).keys()
    )


def test_reward_conditioned_policy_is_asked_for_highest_reward(copy):
    done = dry_run(
        copy,
        "results/ra_dpo/iter2/alpaca_eval.json",
        "results/ra_dpo/iter1/mt_bench.json",
        "--printshellcmds",
    )
    asked = [
        line for line in (done.stdout + done.stderr).splitlines() if "--highest-reward" in line
    ]
    assert len(asked) == 3 and any("sample_prompts.py --iteration 2" in line for line in asked)
    assert all(
        any(f"results/ra_dpo/{file}" in line for line in asked)
        for file in ("iter2/alpaca_eval_outputs.json", "iter1/mt_bench_answers.jsonl")
    )


def test_base_asked_for_the_highest_reward_is_a_row_of_its_own(copy):
    """It is compared with the base's plain answers, which are main's."""
    done = dry_run(copy, "results/ra_dpo/summary.md", "--printshellcmds")
    assert "results/ra_dpo/iter0/alpaca_eval.json" in evaluated(done)
    lines = (done.stdout + done.stderr).splitlines()
    plain = [line for line in lines if "--output results/iter0/reference_outputs.json" in line]
    own = [line for line in lines if "results/ra_dpo/iter0/alpaca_eval_outputs.json" in line]
    assert plain and not any("--highest-reward" in line for line in plain)
    assert any("--highest-reward" in line for line in own)
    assert not any("results/ra_dpo/iter0/reference_outputs.json" in line for line in lines)


def test_run_with_other_evaluation_keys_evaluates_its_own_base(copy):
    write_overlay(copy / "mine.yaml", "runs: {a: {alpaca_eval: {limit: 50}}}")
    made = evaluated(dry_run(copy, "results/a/summary.md", "--configfile", "mine.yaml"))
    assert "results/a/iter0/alpaca_eval.json" in made
    assert "results/a/iter3/alpaca_eval.json" in made
    assert "results/iter0/alpaca_eval.json" not in made


def test_keep_policies_false_keeps_only_the_last_policy(copy):
    """The demo's control has one iteration, so its only policy is its last."""
    done = dry_run(copy, "--config", "keep_policies=false", "--printshellcmds")
    planned = jobs(done)
    assert (planned["train_dropped_policy"], planned["train_policy"]) == (2, 2)
    text = done.stdout + done.stderr
    dropped = re.findall(r"Would remove temporary output (\S+)", text)
    assert sorted(dropped) == ["results/iter1/policy", "results/iter2/policy"]


def test_summary_leaves_out_runs_that_are_evaluated_otherwise(copy):
    """Win rates against other answers, or by another judge, cannot be in one table."""
    write_overlay(
        copy / "mine.yaml",
        "{iterations: 1, summary: {beside: [a, b, c]}, runs: {a: {alpaca_eval: {limit: 50}},"
        " b: {alpaca_eval: {limit: 50}}, c: {iterations: 2, train: {loss: sppo_hard}}}}",
    )
    words = ("--configfile", "mine.yaml", "--")
    made = evaluated(dry_run(copy, *words, "results/summary.md"))
    folders = ("iter0", "iter1", "c/iter1")  # not c/iter2, because main has no second iteration
    assert made == {f"results/{folder}/alpaca_eval.json" for folder in folders}
    # a and b are compared with answers that each of them samples from the base.
    made = evaluated(dry_run(copy, *words, "results/a/summary.md"))
    assert made == {f"results/a/{folder}/alpaca_eval.json" for folder in ("iter0", "iter1")}


def test_zero_iterations_evaluate_only_the_base(copy):
    done = dry_run(copy, "--config", "iterations=0")
    assert evaluated(done) == {"results/iter0/alpaca_eval.json"}
    assert not {"train_policy", "generate_responses"} & jobs(done).keys()


def test_all_programs_get_the_same_chat_settings(copy):
    write_overlay(
        copy / "chats.yaml",
        "policy: {chat_template_kwargs: {enable_thinking: false, words: it's}, thoughts: strip}\n"
        "preference: {model: ranker, source: chat_template}\n",
    )
    done = dry_run(
        copy,
        "results/iter1/alpaca_eval.json",
        "results/iter1/mt_bench.json",
        "results/ra_dpo/iter1/pairs.parquet",
        "--configfile",
        "chats.yaml",
        "--printshellcmds",
    )
    lines = (done.stdout + done.stderr).splitlines()
    kwargs = shlex.quote('{"enable_thinking": false, "words": "it\'s"}')
    for program in (
        "sample_prompts",
        "generate_responses",
        "annotate_preferences",
        "build_pairs",
        "answer_instructions",
        "answer_mt_bench",
    ):
        run = [line for line in lines if f"/{program}.py" in line]
        assert run, program
        assert all(
            f"--chat-template-kwargs {kwargs} --template-date 2024-07-26" in line for line in run
        ), program
        assert all(
            ("--thoughts strip" in line) == program.startswith(("generate", "answer"))
            for line in run
        )


def test_prompts_exclude_the_questions_of_all_evaluations(copy):
    words = ("--configfile", "config/presets/laptop.yaml", "--printshellcmds", "--")
    done = dry_run(copy, *words, "results/laptop/iter1/prompts.parquet")
    held_out = (
        "--held-out data/evaluation.json data/instructions/held_out.jsonl"
        " data/mt_bench/question.jsonl --earlier"
    )
    assert held_out in done.stdout + done.stderr


def test_official_ifeval_prompts_are_fetched_before_prompts(copy):
    words = ("--config", "ifeval={instructions: official}")
    planned = jobs(dry_run(copy, "results/iter1/prompts.parquet", *words))
    assert planned["fetch_ifeval"] == planned["sample_prompts"] == 1


def test_ifeval_uses_equal_answers_of_alpaca_eval(copy):
    """Other decoding, another limit or other instructions need answers of their own."""
    target = "results/iter0/ifeval.json"
    instructions = "instructions: data/instructions/held_out.jsonl, limit: 9"
    decoding = "temperature: 0.5, top_p: 0.9, max_new_tokens: 30"
    same = f"{{{instructions}, {decoding}}}"
    planned = jobs(dry_run(copy, target, "--config", f"ifeval={same}", f"alpaca_eval={same}"))
    assert planned["answer_instructions"] == planned["evaluate_ifeval"] == 1
    assert "answer_ifeval" not in planned
    other = same.replace("0.5", "0.6")
    planned = jobs(dry_run(copy, target, "--config", f"ifeval={same}", f"alpaca_eval={other}"))
    assert planned["answer_ifeval"] == 1
    assert "answer_instructions" not in planned


def test_mt_bench_questions_are_fetched_before_prompts(copy):
    planned = jobs(
        dry_run(copy, "results/iter1/prompts.parquet", "--config", "mt_bench={data: fastchat}")
    )
    assert planned["fetch_mt_bench"] == planned["sample_prompts"] == 1
    corrected = ("--config", "mt_bench={data: fastchat-corrected}")
    done = dry_run(copy, "results/iter1/prompts.parquet", *corrected)
    assert jobs(done)["fetch_mt_bench"] == 1
    assert "results/models/mt_bench_corrected" in done.stdout + done.stderr


def test_run_shares_the_base_and_the_first_iteration(copy):
    """The run takes the responses and preferences of iteration 1 from main."""
    config = (
        "name: x\niterations: 2\n"
        "runs: {hard: {first_iteration_from: main, train: {loss: sppo_hard}}}\n"
    )
    write_overlay(copy / "run.yaml", config)
    done = dry_run(copy, "--configfile", "run.yaml", "--", "results/x/hard/iter2/alpaca_eval.json")
    planned = jobs(done)
    assert planned["train_policy"] == 2
    assert planned["generate_responses"] == 2
    assert planned["score_reference"] == 2
    assert planned["annotate_preferences"] == 2
    assert planned["base_policy"] == 1
    text = done.stdout + done.stderr
    assert "results/x/iter1/responses/0.parquet" in text
    assert "results/x/hard/iter1/responses" not in text
    assert "results/x/hard/iter1/policy" in text
    assert "results/x/iter1/policy" not in text


BAD = {
    "gold file without the prompt field": (
        "prompts: {field: prompt, source: chats.jsonl, per_iteration: 1}\nresponses: {shards: 1}",
        ["data/gold.jsonl line 1 has no prompt"],
    ),
    "gold responses to other prompts": (
        "pairs: {construction: gold, gold: data/gold.jsonl}\ntrain: {loss: dpo}\n"
        "prompts: {source: chats.jsonl, field: prompt, per_iteration: 1}\nresponses: {shards: 1}",
        ["pairs.gold is data/gold.jsonl, whose ids are those of no prompt in chats.jsonl"],
    ),
    "K = 1": ("responses: {samples: 1}", ["responses.samples", "K = 1"]),
    "missing prompts file": ("prompts: {source: data/nowhere.jsonl}", ["data/nowhere.jsonl"]),
    "too many prompts": (
        "prompts: {per_iteration: 100000}",
        ["prompts.per_iteration asks for 100000"],
    ),
    "too many prompts, the same in each iteration": (
        "prompts: {per_iteration: 100000, repeat: true}",
        ["asks for 100000 prompts in each iteration, but"],
    ),
    "missing evaluation file": (
        "alpaca_eval: {instructions: nowhere.json}",
        ["nowhere.json is missing"],
    ),
    "limit above the number of instructions": (
        "alpaca_eval: {limit: 100000}",
        ["alpaca_eval.limit is 100000"],
    ),
    "missing adapter": ("preference: {model: ./nowhere}", ["preference.model is ./nowhere"]),
    "preference model that does not know the evaluation's instructions": (
        "preference: {model: verifiable}\n"
        "prompts: {source: data/instructions/sentence_train.jsonl, per_iteration: 10}",
        ["preference.model is verifiable, which does not know 300 of 300", "ranker_estimate"],
    ),
    "missing judge": (
        "alpaca_eval: {judge: ./nowhere}",
        ["judge ./nowhere is missing", "alpaca_eval.judge"],
    ),
    "missing base policy": ("policy: {model: ./nowhere}", ["policy.model is './nowhere'"]),
    "unknown judge": ("alpaca_eval: {judge: no_such_judge}", ["unknown judge no_such_judge"]),
    "official reference for other instructions": (
        "alpaca_eval: {reference: official}",
        ["alpaca_eval.reference is official", "alpaca_eval.instructions"],
    ),
    "official difficulties with a limit": (
        "alpaca_eval: {instructions: official, difficulty: official, limit: 100}",
        ["alpaca_eval.difficulty is official", "limit"],
    ),
    "tracker that is not installed": (
        "train: {report_to: trackio}",
        ["train.report_to is trackio", "pip install trackio"],
    ),
    "DeepSpeed that is not installed": (
        "{train: {parallel: zero3, processes: 8}}",
        ["train.parallel is zero3", "pip install deepspeed"],
    ),
    "bitsandbytes that is not installed": (
        "{train: {optimizer: rmsprop_bnb_8bit}}",
        ["train.optimizer is rmsprop_bnb_8bit", "pip install bitsandbytes"],
    ),
    "FlashAttention that is not installed": (
        "{policy: {attention: flash_attention_2}}",
        ["policy.attention is flash_attention_2", "pip install flash-attn"],
    ),
    "missing MT-Bench questions": (
        "mt_bench: {data: nowhere}",
        ["nowhere/question.jsonl is missing"],
    ),
    "unknown MT-Bench judge": (
        "mt_bench: {judge: no_such_judge}",
        ["unknown judge no_such_judge", "mt_bench.judge"],
    ),
    "unknown judge of grades": (
        "grades: {judge: no_such_judge}",
        ["unknown judge no_such_judge", "grades.judge"],
    ),
    "judge of grades without a model": (
        "runs: {dno_prct: {grades: {judge: openai}}}",
        ["grades.judge_model"],
    ),
    "missing gold responses": (
        "runs: {dno_prct: {pairs: {gold: data/nowhere.jsonl}}}",
        ["data/nowhere.jsonl is missing", "pairs.gold"],
    ),
    "missing Open LLM items": ("open_llm: {data: ./nowhere}", ["open_llm.data is ./nowhere"]),
    "difficulties of other instructions": (
        "alpaca_eval: {difficulty: Snakefile}",
        ["not AlpacaEval's 805 instructions"],
    ),
    "reference of other instructions": (
        "alpaca_eval: {reference: other.json}",
        ["lack the reference's instruction"],
    ),
    "missing prompts file of a run": (
        "runs: {a: {prompts: {source: data/nowhere.jsonl}}}",
        ["data/nowhere.jsonl"],
    ),
    "section that is null": ("train:", ["train is null"]),
    "four instructions": (
        "alpaca_eval: {instructions: four.json, limit: null}",
        ["four.json, which has 4 instructions", "needs 5"],
    ),
    "no instructions": (
        "alpaca_eval: {instructions: none.json, limit: null}",
        ["none.json has no instructions"],
    ),
    "blank instruction": (
        "alpaca_eval: {instructions: blank.json, limit: null}",
        ["blank.json: instruction 2 is blank"],
    ),
    "instruction with half of a surrogate pair": (
        "alpaca_eval: {instructions: surrogate.json, limit: null}",
        ["surrogate.json: instruction 1", "surrogate"],
    ),
    "folder as instructions": ("alpaca_eval: {instructions: data}", ["data is a folder"]),
    "link to itself as instructions": (
        "alpaca_eval: {instructions: loop}",
        ["loop is a link that leads back to itself"],
    ),
    "long path as instructions": (
        f"alpaca_eval: {{instructions: {'x/' * 2500}y}}",
        ["is longer than"],
    ),
    "empty folder as the policy": ("policy: {model: empty}", ["empty has no config.json"]),
    "file as the policy": (
        "policy: {model: four.json}",
        ["policy.model is four.json, which is a file"],
    ),
    "space in the policy's name": (
        "policy: {model: a b}",
        ["policy.model is 'a b'", "org/model"],
    ),
    "URL as the policy": (
        "policy: {model: 'https://huggingface.co/org/model'}",
        ["policy.model is 'https", "org/model"],
    ),
    "blank name of the policy": ("policy: {model: '  '}", ["policy.model is '  '"]),
    "flag as the policy": ("policy: {model: -x/y}", ["policy.model is '-x/y'"]),
    "long name of the policy": (f"policy: {{model: {'x' * 5000}}}", ["is longer than"]),
    "link to itself as the policy": ("policy: {model: ./loop}", ["policy.model is './loop'"]),
    "typing error in the policy's folder": (
        "policy: {model: data/rankr}",
        ["data/rankr", "ranker is, in data", "policy.revision"],
    ),
    "typing error in the prompts file": (
        "prompts: {source: data/promts}",
        ["data/promts", "prompts.jsonl is, in data", "prompts.revision"],
    ),
    "folder as prompts": (
        "prompts: {source: data/mt_bench}",
        ["prompts.source is data/mt_bench, which is a folder"],
    ),
    "prompts of iteration 1 only": (
        "prompts: {source: 'one/p{t}.jsonl', per_iteration: null}",
        ["prompts.source is 'one/p2.jsonl'"],
    ),
    "link to itself as prompts": ("prompts: {source: ./loop}", ["prompts.source is './loop'"]),
    "more shards than prompts in the file": (
        "{prompts: {source: few.jsonl, per_iteration: null}, responses: {shards: 3}}",
        ["responses.shards is 3", "2 prompts"],
    ),
    "empty folder as Open LLM items": ("open_llm: {data: empty}", ["this folder is empty"]),
    "limit above the number of official instructions": (
        "alpaca_eval: {instructions: official, limit: 900}",
        ["alpaca_eval.limit is 900", "805"],
    ),
    "link to itself as Open LLM items": ("open_llm: {data: loop}", ["open_llm.data is loop"]),
    "blank path as instructions": (
        "alpaca_eval: {instructions: '\t'}",
        ["alpaca_eval.instructions is '\\t'", "is missing"],
    ),
    "path with a null character as instructions": (
        'alpaca_eval: {instructions: "\\0"}',
        ["alpaca_eval.instructions is '\\x00'", "is missing"],
    ),
    "pipe as instructions": (
        "alpaca_eval: {instructions: pipe}",
        ["alpaca_eval.instructions is 'pipe'", "neither a file nor a folder"],
    ),
    "too deeply nested JSON as instructions": (
        "alpaca_eval: {instructions: deep.json}",
        ["deep.json is not valid JSON", "too deeply"],
    ),
    "number of 5000 digits as instructions": (
        "alpaca_eval: {instructions: digits.json}",
        ["digits.json is not valid JSON"],
    ),
    "folder as gold responses": ("runs: {spin: {pairs: {gold: data}}}", ["data"]),
}
FILES = {
    "deep.json": "[" * 5000,
    "digits.json": "9" * 5000,
    "other.json": '[{"instruction": "another", "output": "a", "generator": "g"}]',
    "four.json": "[" + ", ".join(f'{{"instruction": "{n}"}}' for n in range(4)) + "]",
    "none.json": "[]",
    "blank.json": '[{"instruction": "a"}, {"instruction": " "}]',
    "surrogate.json": '[{"instruction": "a\\ud800"}]',
    "few.jsonl": "".join(f'{{"id": "{n}", "instruction": "say {n}"}}\n' for n in range(6)),
    "chats.jsonl": "".join(f'{{"prompt": "say {n}"}}\n' for n in range(9)),
    "one/p1.jsonl": '{"instruction": "say"}\n',
}


def one_error(done: subprocess.CompletedProcess) -> str:
    output = (done.stdout + done.stderr).splitlines()
    errors = [line for line in output if line.startswith("error: ")]
    assert done.returncode != 0, output
    assert len(errors) == 1, output
    assert not any("Traceback" in line or "Exception" in line for line in output), output
    return errors[0]


@pytest.mark.parametrize(("text", "said"), BAD.values(), ids=BAD)
def test_bad_input_is_found_by_the_first_checks(text, said, copy, monkeypatch):
    """rules/common.smk calls the same functions and prints their errors in one line."""
    monkeypatch.chdir(copy)
    for name, content in FILES.items():
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text(content)
    (copy / "empty").mkdir(exist_ok=True)
    if not (copy / "pipe").exists():
        os.mkfifo(copy / "pipe")
    if not (copy / "loop").is_symlink():
        (copy / "loop").symlink_to("loop")
    with pytest.raises((UserError, OSError)) as caught:
        check_every_run(resolve(overlaid(text)))
    line = explained(caught.value)
    assert line, caught.value
    assert all(word in line for word in said), caught.value
    assert "\n" not in line, caught.value


def test_repeated_prompts_are_counted_once(copy, monkeypatch):
    monkeypatch.chdir(copy)
    most = len(Path("data/gold.jsonl").read_text(encoding="utf-8").splitlines())
    overlay = f"runs: {{spin: {{prompts: {{per_iteration: {most // 2}}}}}}}"
    check_every_run(resolve(overlaid(overlay)))
    with pytest.raises(UserError, match=f"asks for {most // 2} prompts in each of 3 iterations"):
        check_every_run(
            resolve(overlaid(overlay.replace("prompts: {", "prompts: {repeat: false, ")))
        )


@pytest.mark.parametrize(
    ("text", "package"),
    [
        ("{train: {parallel: zero3, processes: 8}}", "deepspeed"),
        ("{policy: {attention: flash_attention_2}}", "flash-attn"),
    ],
)
def test_conda_environment_must_have_an_optional_package(text, package, copy, monkeypatch):
    monkeypatch.chdir(copy)
    with pytest.raises(UserError, match=f"envs/core.yaml lacks {package}; add it there"):
        check_inputs("", resolve(overlaid(text))[""], in_conda=True)
    environment = copy / "core.yaml"
    environment.write_text(f"dependencies:\n  - pip:\n      - {package}==1.0\n")
    monkeypatch.setattr(preflight, "TRAINING_ENVIRONMENT", environment)
    check_inputs("", resolve(overlaid(text))[""], in_conda=True)


def test_training_on_two_nodes_is_started_by_srun(copy, tmp_path, monkeypatch):
    text = "{train: {nodes: 2, processes: 2}}"
    main = resolve(overlaid(text))[""]
    monkeypatch.chdir(copy)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="train.nodes is 2.*srun"):
        check_inputs("", main)
    (tmp_path / "srun").touch(mode=0o755)
    check_inputs("", main)
    write_overlay(copy / "nodes.yaml", text)
    monkeypatch.undo()
    words = ("--configfile", "nodes.yaml", "--printshellcmds", "--", "results/iter1/policy")
    done = dry_run(copy, *words)
    if shutil.which("srun"):
        assert re.search(
            r"srun --overlap --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpu-bind=none"
            r" --kill-on-bad-exit=1 \S+ src/train_policy\.py ",
            done.stdout + done.stderr,
        )
    else:
        assert "train.nodes is 2" in one_error(done)


@pytest.mark.parametrize("name", ["K = 1", "missing prompts file", "unknown judge"])
def test_bad_input_is_a_one_line_error_of_a_dry_run(name, copy):
    text, said = BAD[name]
    write_overlay(copy / "bad.yaml", text)
    line = one_error(dry_run(copy, "--configfile", "bad.yaml"))
    assert all(word in line for word in said), line


def test_hub_id_with_a_commit_is_not_a_mistyped_folder(copy, monkeypatch):
    monkeypatch.chdir(copy)
    text = (
        "{policy: {model: data/rankr, revision: abc}, prompts: {source: data/promts,"
        " revision: abc}}"
    )
    check_inputs("", resolve(overlaid(text))[""])


SOURCES = {
    "repeated key": (
        b"train:\n  beta: 1\niterations: 1\ntrain: {tau: 1}\n",
        ["odd.yaml", "train twice", "lines 1 and 4"],
    ),
    "repeated key in a run": (
        b"runs:\n  a:\n    train:\n      beta: 1\n      beta: 2\n",
        ["beta twice", "lines 4 and 5"],
    ),
    "repeated key in JSON": (
        b'{"train": {"beta": 1},\n "train": {}}',
        ["train twice", "lines 1 and 2"],
    ),
    "not UTF-8": ("name: x  # é".encode("latin-1"), ["odd.yaml is not in UTF-8"]),
    "anchor that contains itself": (
        b"train: &a\n  beta: *a\n",
        ["odd.yaml line 1", "contains itself"],
    ),
    "not YAML": (b"train: [", ["odd.yaml is not a configuration in YAML"]),
    "missing file": (None, ["odd.yaml is missing"]),
    "empty file": (b"", ["odd.yaml has no keys"]),
    "list": (b"- a\n", ["odd.yaml has no keys"]),
    "too deeply nested": (b"[" * 3000, ["odd.yaml nests more deeply"]),
    "mapping as a key": (b"? {a: 1}\n: 3\n", ["odd.yaml is not a configuration in YAML"]),
    "date that does not exist": (b"name: 2024-13-45\n", ["odd.yaml is not", "month"]),
    "text with the tag of a number": (b"train: {beta: !!float x}\n", ["odd.yaml is not", "'x'"]),
    "text with the tag of a time": (b"name: !!timestamp x\n", ["odd.yaml is not"]),
    "number of 5000 digits": (b"iterations: " + b"9" * 5000, ["odd.yaml is not"]),
}


@pytest.mark.parametrize(("content", "said"), SOURCES.values(), ids=SOURCES)
def test_misleading_configuration_file_is_a_one_line_error(content, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "odd.yaml").write_bytes(content)
    with pytest.raises((UserError, OSError)) as caught:
        check_files([tmp_path / "odd.yaml"])
    line = " ".join(explained(caught.value).split())
    assert all(word in line for word in said), line


def test_json_may_be_indented_with_tabs(tmp_path):
    (tmp_path / "odd.json").write_text('{\n\t"train": {\n\t\t"beta": 1\n\t}\n}\n')
    check_files([tmp_path / "odd.json"])
    (tmp_path / "odd.json").write_text('{\n\t"train": {},\n\t"train": {}\n}\n')
    with pytest.raises(UserError, match="train twice"):
        check_files([tmp_path / "odd.json"])


@pytest.mark.parametrize(
    "file",
    [ROOT / "config" / "config.yaml", *PRESETS, ROOT / "tests" / "workflow" / "config.yaml"],
    ids=lambda file: file.stem,
)
def test_shipped_file_passes_the_file_checks(file):
    check_files([file])


def test_errors_name_the_files_read_as_configuration(copy):
    """--configfile reads a target after it as a configuration file."""
    (copy / "odd.yaml").write_text("train: {tau: 1}\n")
    made = copy / "results" / "odd" / "alpaca_eval.json"
    made.parent.mkdir(parents=True)
    made.write_text('{"win_rate": 1}')
    line = one_error(dry_run(copy, "--configfile", "odd.yaml", "results/odd/alpaca_eval.json"))
    shutil.rmtree(made.parent)
    assert "unknown key win_rate" in line
    assert line.endswith(
        "(read as configuration: odd.yaml, results/odd/alpaca_eval.json; put -- before targets)"
    )


def test_repeated_key_is_a_one_line_error_of_a_dry_run(copy):
    (copy / "odd.yaml").write_text("train: {beta: 1}\ntrain: {tau: 1}\n")
    line = one_error(dry_run(copy, "--configfile", "odd.yaml"))
    assert "odd.yaml has the key train twice" in line


# Snakemake reads these files before the Snakefile.
BEFORE_THE_SNAKEFILE = {
    "not UTF-8": (b"name: caf\xe9", "odd.yaml is not in UTF-8 (byte 9)"),
    "anchor that contains itself": (
        b"a: &x\n  b: *x",
        "odd.yaml line 1: the anchor here contains",
    ),
    "too deeply nested": (b"[" * 3000, "odd.yaml nests more deeply than can be read"),
    "missing file": (
        None,
        "odd.yaml, read as configuration, does not exist; if it is a target, put",
    ),
}


@pytest.mark.parametrize(
    "given",
    [("--configfile", "odd.yaml"), ("--configfile=odd.yaml",)],
    ids=["two words", "one word"],
)
@pytest.mark.parametrize(
    ("content", "said"), BEFORE_THE_SNAKEFILE.values(), ids=BEFORE_THE_SNAKEFILE
)
def test_file_unreadable_by_snakemake_is_a_one_line_error(content, said, given, copy):
    (copy / "odd.yaml").unlink(missing_ok=True)
    if content is not None:
        (copy / "odd.yaml").write_bytes(content)
    assert said in one_error(dry_run(copy, *given))


def test_key_without_effect_is_a_warning_at_the_start(copy):
    write_overlay(copy / "odd.yaml", "train: {tau: 1}")
    done = dry_run(copy, "--configfile", "odd.yaml")
    assert done.returncode == 0
    assert "warning: config: train.tau has no effect where train.loss is sppo\n" in done.stderr


@pytest.mark.parametrize("words", [(), ("--directory", ".")])
def test_run_from_another_folder_is_a_one_line_error(words, copy, tmp_path):
    line = one_error(dry_run(tmp_path, "-s", str(copy / "Snakefile"), *words))
    assert f"run in it: cd {copy}" in line


def test_base_policy_is_rebuilt_when_its_folder_changes(copy, tiny_policy):
    shutil.copytree(tiny_policy, copy / "mine")
    made = copy / "results" / "iter0" / "policy"
    made.mkdir(parents=True)
    for file in (made / "config.json", made.with_name("policy.record.json")):
        file.write_text("{}")
    words = ("--config", "policy={model: ./mine}", "--", "results/iter0/policy")
    subprocess.run([*SNAKEMAKE, "--touch", *words], cwd=copy, check=True, capture_output=True)
    done = dry_run(copy, *words)
    assert "Nothing to be done" in done.stdout + done.stderr

    template = copy / "mine" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    os.utime(template, (0, made.stat().st_mtime + 3600))
    done = dry_run(copy, *words)
    shutil.rmtree(copy / "results")
    assert "Updated input files: mine/chat_template.jinja" in done.stdout + done.stderr


@pytest.mark.parametrize("rule", rules())
def test_rule_quotes_paths_in_its_command(rule):
    """A user's file names may contain spaces. Only values that are several words are unquoted."""
    command = rules()[rule].split("shell:")[1]
    unquoted = set(re.findall(r"\{((?:input|output|params|log)[.\w]*)\}", command))
    assert unquoted <= {"params.on_each_node", "params.highest_reward"}


def test_snakemake_lint_finds_only_functions_next_to_rules(copy):
    """CONTRIBUTING.md explains why functions stay with the rules that use them."""
    done = subprocess.run([*SNAKEMAKE, "--lint"], cwd=copy, capture_output=True, text=True)
    found = set(re.findall(r"^    \* (.+?)(?: in line \d+)?:$", done.stderr, re.MULTILINE))
    assert found == {"Mixed rules and functions in same snakefile."}, done.stderr


def test_invalid_run_stops_only_its_own_targets(copy):
    text = "{runs: {bad: {train: {betta: 1}}, worse: {prompts: {source: data/nowhere.jsonl}}}}"
    write_overlay(copy / "odd.yaml", text)
    words = ("--configfile", "odd.yaml", "--")
    assert jobs(dry_run(copy, *words, "results/dpo/iter3/alpaca_eval.json"))
    line = one_error(dry_run(copy, *words, "results/bad/iter3/alpaca_eval.json"))
    assert "unknown key runs.bad.train.betta" in line
    line = one_error(dry_run(copy, *words, "results/worse/iter3/alpaca_eval.json"))
    assert "data/nowhere.jsonl" in line


def test_file_without_extends_has_no_demo_runs(copy):
    (copy / "own.yaml").write_text("name: own\nprompts: {per_iteration: 8}\n")
    planned = jobs(dry_run(copy, "--configfile", "own.yaml"))
    assert planned["train_policy"] == 3
    done = dry_run(copy, "--configfile", "own.yaml", "--", "results/own/dpo/iter1/policy")
    assert done.returncode != 0


MODULE = """
configfile: "mine.yaml"

module sppo:
    snakefile: "{snakefile}"
    config: config

use rule * from sppo

rule mine:
    default_target: True
    input: "results/mine/iter1/alpaca_eval.json"
    output: "report.txt"
    shell: "cp {{input}} {{output}}"
"""


def module_dry_run(folder: Path, snakefile: str) -> subprocess.CompletedProcess:
    """Dry run of another workflow in `folder`, which uses this one as a module."""
    (folder / "Snakefile").write_text(MODULE.format(snakefile=snakefile), encoding="utf-8")
    (folder / "prefer.py").write_text("def longer(prompt, responses):\n    return [0] * 5\n")
    (folder / "mine.yaml").write_text(
        "extends: config/config.yaml\nname: mine\niterations: 1\n"
        "preference: {model: prefer.py:longer}\n"
    )
    return dry_run(folder, "--printshellcmds")


def test_workflow_can_be_used_as_a_module(copy, tmp_path):
    """Results are in the other workflow's folder. Programs and data are in this repository."""
    done = module_dry_run(tmp_path, str(copy / "Snakefile"))
    planned = jobs(done)
    for rule in ("mine", "train_policy", "annotate_preferences"):
        assert planned[rule] == 1, rule
    text = done.stdout + done.stderr
    assert f"{copy}/src/annotate_preferences.py" in text
    assert f"--source {copy}/data/instructions/sentence_train.jsonl" in text
    assert "--model prefer.py:longer" in text


def test_deployed_workflow_clones_the_repository_once(copy, tmp_path):
    """snakedeploy uses workflow/Snakefile of a git repository as the module's Snakefile."""
    remote = shutil.copytree(
        copy, tmp_path / "remote", ignore=shutil.ignore_patterns("results", "pipe", "loop")
    )
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-C", str(remote)]
    for words in (["init", "--quiet", "--initial-branch=main"], ["add", "."]):
        subprocess.run([*git, *words], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message", "all"], check=True)
    folder = tmp_path / "mine"
    folder.mkdir()
    address = f"git+file://{remote}/workflow/Snakefile@main"
    for _ in range(2):
        assert jobs(module_dry_run(folder, address))["mine"] == 1
    assert [path.name for path in (folder / ".snakemake/sppo").iterdir()] == ["main"]


def test_unknown_command_line_key_is_a_one_line_error(copy):
    line = one_error(dry_run(copy, "--config", "iteratoins=3"))
    assert "unknown key iteratoins" in line
    assert "did you mean iterations?" in line


def test_section_number_can_be_set_on_the_command_line(copy):
    """Snakemake gives the values inside {...} as text."""
    planned = jobs(dry_run(copy, "--config", "responses={shards: 2}", "iterations=1"))
    assert planned["generate_responses"] == 2
    assert planned["score_reference"] == 4  # also those of the control
