"""The workflow's files: what every rule carries, and that every shipped configuration plans a run."""

from __future__ import annotations

import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sppo.core.artifacts import file_hash, record_path, write_json
from sppo.core.config import ENGINE_KEYS, default_of, schema
from sppo.core.config_files import check_files, read_files, update
from sppo.core.errors import UserError, explained
from sppo.evaluation.registry import EVALUATIONS
from sppo.workflow.configuration import Runs, resolve
from sppo.workflow.preflight import check_folder_for_slurm, check_inputs, check_machine, gpus_here

ROOT = Path(__file__).resolve().parents[2]
RULE_FILES = sorted((ROOT / "rules").glob("*.smk"))
PRESETS = sorted((ROOT / "config" / "presets").glob("*.yaml"))
PAPER_SCALE = ("mistral-7b", "llama-3-8b", "gemma-2-9b", "single-gpu")
FROM_OUTSIDE = (
    "policies.embedded_policy",
    "mt_bench.fetch_mt_bench",
    "alpaca_eval.fetch_alpaca_eval",
)  # they read a package or the network
SNAKEMAKE = (sys.executable, "-m", "snakemake", "--cores", "2")


def test_the_snakefile_needs_only_snakemake():
    """With conda, Snakemake runs in an environment of its own, without the programs' packages."""
    code = (
        "import sys\nfor name in ('numpy', 'pandas', 'pyarrow', 'torch', 'transformers', 'openai', 'alpaca_eval', 'fastchat', 'datasets'):\n"
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
    """Text of every rule in rules/, by file and name."""
    found = {}
    for file in RULE_FILES:
        for name, body in re.findall(
            r"^rule (\w+):\n((?:[ \t]+.*\n|\n)+)",
            file.read_text(encoding="utf-8") + "\n",
            re.MULTILINE,
        ):
            found[f"{file.stem}.{name}"] = body
    return found


def test_no_rule_escapes_this_lint():
    declared = re.findall(
        r"^\s*(?:rule|checkpoint) \w*",
        "".join(file.read_text(encoding="utf-8") for file in RULE_FILES),
        re.MULTILINE,
    )
    assert len(declared) == len(rules()) > 5 and not any("checkpoint" in line for line in declared)


@pytest.mark.parametrize("rule", rules())
def test_rule_is_described_logged_measured_and_isolated(rule):
    body = rules()[rule]
    assert re.match(r'\s*"""\S.+\S"""\n', body), "no docstring"
    for key in (
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
    ):
        assert re.search(rf"^    {key}:", body, re.MULTILINE) or (
            key == "input" and rule in FROM_OUTSIDE
        ), f"no {key}"
    assert re.search(r"^        mem_mb=\d+,$", body, re.MULTILINE) and re.search(
        r"^        runtime=\d+,$", body, re.MULTILINE
    )
    assert re.search(r'version=STAGES\["\w+"\],', body), "a raised stage version would not rerun it"
    environment = re.search(
        r'conda:\n\s+(?:"(.+)"|ENGINE_ENVIRONMENT|preference_environment)\n', body
    )
    assert environment and (ROOT / "rules" / (environment[1] or "../envs/core.yaml")).is_file()
    assert '"{PYTHON} {SRC}/' in body and "{log:q}" in body


@pytest.mark.parametrize("rule", rules())
def test_rule_calls_its_program_with_arguments_that_it_has(rule):
    """The program exists, and every artifact it is told to write has a record among the outputs."""
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
    assert asked and asked <= known, f"{program} has no {asked - known}"
    (outputs,) = re.findall(r"^    output:\n((?: {8}.+\n)+)", body, re.MULTILINE)
    entries = re.split(r"^ {8}(?=\w+=)", outputs, flags=re.MULTILINE)[1:]
    assert 2 * sum("record(" in entry for entry in entries) >= len(entries)


@pytest.mark.parametrize("file", RULE_FILES, ids=lambda file: file.stem)
def test_rules_file_opens_with_what_it_requires_and_gives(file):
    text = file.read_text(encoding="utf-8")
    assert re.match(r'"""Requires: .+ Gives: .+', text)


@pytest.mark.parametrize(
    "file", [file for file in RULE_FILES if file.stem != "common"], ids=lambda file: file.stem
)
def test_only_common_spells_the_results_folder(file):
    assert "results/" not in file.read_text(encoding="utf-8").replace("under results/", "")


def test_the_snakefile_leaves_functions_to_the_rules():
    assert "lambda" not in (ROOT / "Snakefile").read_text(encoding="utf-8")


def test_no_rules_file_is_left_out_of_the_snakefile():
    text = (ROOT / "Snakefile").read_text(encoding="utf-8")
    included = re.findall(r'^include: "rules/(\w+)\.smk"', text, re.MULTILINE)
    of_evaluations = {each.rule_file for each in EVALUATIONS}
    assert sorted([*included, *of_evaluations]) == [file.stem for file in RULE_FILES]


# --- profiles ---


def test_the_slurm_profile_sizes_every_rule_and_gives_gpus_to_those_that_can_use_one():
    sized = yaml.safe_load(
        (ROOT / "profiles" / "slurm" / "config.yaml").read_text(encoding="utf-8")
    )["set-resources"]
    text = {name.split(".")[1]: body for name, body in rules().items()}
    derived = re.findall(
        r"^\s*use rule (\w+) as (\w+) with:",
        "".join(file.read_text(encoding="utf-8") for file in RULE_FILES),
        re.MULTILINE,
    )
    text |= {name: text[base] for base, name in derived}
    assert sized.keys() == text.keys()
    assert {name for name, asked in sized.items() if "gpu" in asked} == {
        name for name, body in text.items() if re.search(r"gpu=(\w+_GPUS|gpus_if)", body)
    }
    assert all("attempt" in asked[key] for asked in sized.values() for key in ("mem_mb", "runtime"))


# --- dry runs ---


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The repository without results and environment."""
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
    """A configuration that extends the demo's."""
    config = read_files([ROOT / "config" / "config.yaml"])
    update(config, yaml.safe_load(text))
    return config


def write_overlay(file: Path, text: str) -> None:
    """The same as a file."""
    content = yaml.safe_load(text) | {"extends": "config/config.yaml"}
    file.write_text(yaml.safe_dump(content), encoding="utf-8")


def check_every_run(runs: Runs) -> None:
    """As if every run was asked for."""
    for name in runs:
        check_inputs(name, runs[name])


def jobs(done: subprocess.CompletedProcess) -> dict[str, int]:
    """Jobs by rule, from the table that Snakemake prints."""
    assert done.returncode == 0, done.stdout + done.stderr
    table = (done.stdout + done.stderr).split("Job stats:")[1].split("\n\n")[0]
    return {name: int(count) for name, count in re.findall(r"^(\w+) +(\d+)$", table, re.MULTILINE)}


def evaluated(done: subprocess.CompletedProcess) -> set[str]:
    """Evaluations that would be made."""
    written = re.findall(r"Missing output files: ([^;\n]+)", done.stdout + done.stderr)
    return {
        name for line in written for name in line.split(", ") if name.endswith("/alpaca_eval.json")
    }


@pytest.mark.parametrize(
    "preset", [None, *PRESETS], ids=lambda preset: preset.stem if preset else "default"
)
@pytest.mark.parametrize("settings", ["paper", "repo"])
def test_shipped_configuration_plans_every_stage_of_every_iteration(settings, preset, copy):
    """Within five seconds of a core, without a GPU, a key or the network."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = dry_run(
        copy,
        *(("--configfile", str(preset.relative_to(ROOT))) if preset else ()),
        "--config",
        f"settings={settings}",
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5
    main = resolve(read_files([preset or ROOT / "config" / "config.yaml"]))[""]
    planned, t, shards = jobs(done), main["iterations"], main["responses"]["shards"]
    expected = {
        "sample_prompts": t,
        "generate_responses": t * shards,
        "annotate_preferences": t * shards,
        "build_pairs": t,
        "score_reference": t,
        "train_policy": t,
        "base_policy": 1,
    }
    assert {name: planned.get(name, 0) for name in expected} == expected
    root = f"results/{main['name']}/" if main["name"] else "results/"
    assert evaluated(done) >= {f"{root}iter{i}/alpaca_eval.json" for i in range(t + 1)}


@pytest.mark.parametrize("settings", ["paper", "repo"])
@pytest.mark.parametrize("name", PAPER_SCALE)
def test_a_preset_at_paper_scale_has_the_paper_s_settings(name, settings):
    """What the preset and its base do not set is the paper's or the official code's."""
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
        (("--config", "device=gpu"), "16 16"),  # the default profile has one at a time
        (("--resources", "gpu=8", "--config", "device=cpu"), "16 16"),
    ],
)
def test_a_gpu_s_job_has_its_share_of_the_cores_and_a_training_that_of_its_gpus(
    words, threads, copy
):
    (copy / "threads.smk").write_text(
        'include: "rules/common.smk"\n'
        'print("THREADS", MODEL_THREADS, TRAINING_THREADS, file=sys.stderr)\n'
        "rule all:\n    shell: 'true'\n",
        encoding="utf-8",
    )
    done = dry_run(copy, "--cores", "16", "--snakefile", "threads.smk", *words)
    assert f"THREADS {threads}\n" in done.stderr, done.stderr
    text = rules()
    used = {
        name.split(".")[1]: re.search(r"threads: (\w+)", body)[1] for name, body in text.items()
    }
    assert used["train_policy"] == "TRAINING_THREADS" and used["score_reference"] == "MODEL_THREADS"


@pytest.mark.parametrize("name", PAPER_SCALE)
def test_the_printed_command_of_a_preset_names_what_its_jobs_need(name):
    """In its header and on every page: vLLM's own environment, and as many GPUs as shards."""
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
        assert "--resources gpu=8" in line or run["responses"]["shards"] == 1, line


def test_alpaca_eval_s_own_files_are_fetched_where_official_is_asked_for(copy):
    """And judged with: the reference is GPT-4 turbo's, so the base answers once; prompts are drawn aside from the 805."""
    words = ("--configfile", "config/presets/mistral-7b.yaml", "--")
    done = dry_run(copy, *words, "results/mistral-7b/iter0/alpaca_eval.json")
    planned = jobs(done)
    assert (
        planned["fetch_alpaca_eval"]
        == planned["answer_instructions"]
        == planned["judge_outputs"]
        == 1
        and "train_policy" not in planned
    )
    planned = jobs(dry_run(copy, *words, "results/mistral-7b/iter2/prompts.parquet"))
    assert (
        planned["fetch_alpaca_eval"] == 1 and planned["sample_prompts"] == 2
    )  # a source each, so the second is drawn aside from the first
    assert "fetch_alpaca_eval" not in jobs(dry_run(copy))


def test_a_released_checkpoint_is_evaluated_without_training(copy):
    done = dry_run(
        copy,
        "--configfile",
        "config/presets/mistral-7b.yaml",
        "--config",
        "iterations=0",
        "name=sppo-iter3",
        "policy={model: UCLA-AGI/Mistral7B-PairRM-SPPO-Iter3}",
    )
    assert (
        evaluated(done) == {"results/sppo-iter3/iter0/alpaca_eval.json"}
        and not {"train_policy", "generate_responses"} & jobs(done).keys()
    )
    assert {"mt_bench", "open_llm"} == {
        name
        for name in ("mt_bench", "open_llm")
        if jobs(
            dry_run(
                copy,
                "--configfile",
                "config/presets/mistral-7b.yaml",
                "--config",
                "iterations=0",
                "name=sppo-iter3",
                "--",
                f"results/sppo-iter3/iter0/{name}.json",
            )
        )
    }


def test_policies_are_pushed_only_where_the_configuration_says_so(copy):
    assert "push_policy" not in jobs(dry_run(copy))
    done = dry_run(copy, "--config", "push_to_hub=me/mine-{t}", "iterations=2")
    assert (
        jobs(done)["push_policy"] == 2
        and "results/iter2/pushed_to_hub.json" in done.stdout + done.stderr
    )


def test_a_real_run_asks_for_gpus_first(copy):
    """On this machine, or on any without one: what a dry run of the same passes over is one line before the first job."""
    if gpus_here():
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
    assert "device is gpu, but this machine shows no NVIDIA GPU" in one_error(done)
    assert not (copy / "results" / "single-gpu").exists()
    shutil.rmtree(copy / "results", ignore_errors=True)


def test_a_judge_behind_an_api_runs_without_a_gpu(copy, monkeypatch):
    """What a cluster's nodes answered is judged on its login node, with the same configuration."""
    if gpus_here():
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
    assert (
        "alpaca_eval_gpt4_baseline.json is not a list of outputs" in done.stdout + done.stderr
    )  # judged, as far as these go


NEEDED = {
    "a key": (
        {"alpaca_eval": {"judge": "weighted_alpaca_eval_gpt4_turbo"}},
        ("alpaca_eval", "", False),
        8,
        "export OPENAI_API_KEY",
    ),
    "a key for MT-Bench": (
        {"mt_bench": {"judge": "gpt-4"}},
        ("evaluate_mt_bench", "", False),
        8,
        "mt_bench.judge",
    ),
    "a key for grades": (
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
    "a GPU": ({"device": "gpu"}, ("train_policy", "", True), 0, "shows no NVIDIA GPU"),
    "a GPU for each shard": (
        {"device": "gpu", "responses": {"shards": 8}},
        ("generate_responses", "", True),
        2,
        "responses.shards is 8, one GPU each, but this machine shows 2",
    ),
    "a run's GPU for each shard": (
        {"runs": {"a": {"responses": {"shards": 3}}}},
        ("generate_responses", "a", True),
        2,
        "runs.a.responses.shards is 3",
    ),
    "a token": ({"push_to_hub": "me/a-{t}"}, ("push_policy", "", False), 8, "export HF_TOKEN"),
}


@pytest.mark.parametrize(("config", "job", "gpus", "said"), NEEDED.values(), ids=NEEDED)
def test_what_jobs_to_come_need_is_one_line(config, job, gpus, said, monkeypatch):
    for name in ("OPENAI_API_KEY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    runs = resolve(config)
    with pytest.raises(UserError, match=said) as caught:
        check_machine(runs, {job}, gpus)
    assert "\n" not in str(caught.value)
    check_machine(runs, {("build_pairs", job[1], False)}, gpus)  # other jobs need none of it
    if job[2]:
        check_machine(runs, {job}, 8)
        check_machine(runs, {job}, None)  # on a cluster


def test_vllm_that_is_not_installed_is_one_line_before_the_first_job(monkeypatch):
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
def test_slurm_is_refused_where_its_executor_would_divide_the_path(folder):
    with pytest.raises(UserError, match="Slurm executor.*move the checkout"):
        check_folder_for_slurm(folder)
    check_folder_for_slurm("/home/müller/my-work_1.0/sppo")


def test_gpus_are_counted_as_programs_will_see_them(monkeypatch):
    monkeypatch.setattr(Path, "glob", lambda *_: [Path(f"/dev/nvidia{i}") for i in range(4)])
    for shown, count in (("0,2", 2), ("", 0), ("0,1,2,3,4,5", 4)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
        assert gpus_here() == count
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert gpus_here() == 4


def test_the_user_s_own_target_is_planned_whole(copy):
    done = dry_run(copy, "results/iter3/alpaca_eval.json")
    assert jobs(done)["train_policy"] == 3 and evaluated(done) == {"results/iter3/alpaca_eval.json"}


def test_everything_is_every_evaluation_best_of_n_and_the_k2_run(copy):
    planned = jobs(dry_run(copy, "everything"))
    assert (
        planned["train_policy"] == 6
        and planned["evaluate_mt_bench"] == planned["evaluate_open_llm"] == 4
    )
    assert (
        planned["judge_best_of_n"] == 5
        and planned["build_response_browser"] == planned["plot_training"] == 1
    )
    assert jobs(dry_run(copy, "paper_tables"))["paper_tables"] == 1


def test_methods_refer_to_the_base_the_previous_iterate_or_a_magnet(copy):
    """References other than pi_t are scored where a method has them: INPO's base from iteration 2 on, MPO's magnet (N = 2) in 2 alone."""
    for run, scored in (("dpo", set()), ("inpo", {2, 3}), ("dpo_offline", {2, 3}), ("mpo", {2})):
        done = dry_run(copy, f"results/{run}/iter3/policy")
        planned = jobs(done)
        assert planned["score_reference"] == 3 + len(scored) and planned["generate_responses"] == 3
        found = {
            int(t)
            for t in re.findall(
                rf"results/{run}/iter(\d)/logps/reference\.parquet", done.stdout + done.stderr
            )
        }
        assert found == scored, run


def test_pairs_are_chosen_by_grades_in_place_of_preferences_where_a_run_says_so(copy):
    done = dry_run(copy, "results/dno_prct/summary.md", "--printshellcmds")
    planned, text = jobs(done), done.stdout + done.stderr
    assert (
        planned["grade_responses"] == planned["generate_responses"] == planned["build_pairs"] == 3
        and "annotate_preferences" not in planned
    )
    assert (
        "--grades results/dno_prct/iter2/grades/0.parquet" in text
        and "--previous results/dno_prct/iter1/pairs.parquet" in text
    )
    assert re.search(
        r"grade_responses\.py .*--gold data/gold\.jsonl .*--judge preference --model ranker .*--probability pairwise",
        text,
    )
    write_overlay(
        copy / "graded.yaml",
        "runs: {dpo: {pairs: {construction: graded}, grades: {judge: openai, judge_model: m,"
        " judge_base_url: http://localhost/v1}}}",
    )
    done = dry_run(
        copy, "results/dpo/iter1/pairs.parquet", "--configfile", "graded.yaml", "--printshellcmds"
    )
    text = done.stdout + done.stderr  # main's responses, the run's own grades
    assert re.search(
        r"grade_responses\.py .*--responses results/iter1/responses/0\.parquet .*--judge openai .*--output results/dpo/iter1/grades/0\.parquet",
        text,
    )
    assert "data/ranker" not in text and "annotate_preferences" not in jobs(done)


def test_dice_compares_by_its_own_reward_after_the_first_iteration(copy):
    """The first comparison is main's, by the ranker; the others are of pi_t with the iterate before it; replayed pairs are the first."""
    done = dry_run(copy, "results/dice/iter3/policy", "--printshellcmds")
    assert jobs(done)["annotate_preferences"] == 1 and jobs(done)["annotate_implicitly"] == 2
    text = done.stdout + done.stderr
    assert "--policy results/dice/iter1/policy --before results/iter0/policy" in text
    assert "--policy results/dice/iter2/policy --before results/dice/iter1/policy" in text
    assert text.count("--previous results/dice/iter1/pairs.parquet") == 2


def test_main_may_compare_by_its_own_reward(copy):
    text = "{name: own, preference: {implicit: true}, train: {loss: dpo}}"
    write_overlay(copy / "own.yaml", text)
    planned = jobs(dry_run(copy, "--configfile", "own.yaml", "--", "results/own/iter3/policy"))
    assert (planned["annotate_preferences"], planned["annotate_implicitly"]) == (1, 2)


def test_gold_responses_need_no_comparisons(copy):
    assert (
        not {"annotate_preferences", "grade_responses"}
        & jobs(dry_run(copy, "results/spin/iter3/policy")).keys()
    )


def test_a_reward_conditioned_policy_is_asked_for_its_best_when_it_has_learned_to(copy):
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


def test_a_run_that_evaluates_otherwise_has_a_base_of_its_own(copy):
    write_overlay(copy / "mine.yaml", "runs: {a: {alpaca_eval: {limit: 50}}}")
    made = evaluated(dry_run(copy, "results/a/summary.md", "--configfile", "mine.yaml"))
    assert {
        "results/a/iter0/alpaca_eval.json",
        "results/a/iter3/alpaca_eval.json",
    } <= made and "results/iter0/alpaca_eval.json" not in made


def test_without_keep_policies_all_but_the_last_are_temporary(copy):
    planned = jobs(dry_run(copy, "--config", "keep_policies=false"))
    assert (planned["train_dropped_policy"], planned["train_policy"]) == (2, 1)


def test_no_iterations_evaluate_the_base_alone(copy):
    done = dry_run(copy, "--config", "iterations=0")
    assert (
        evaluated(done) == {"results/iter0/alpaca_eval.json"}
        and not {"train_policy", "generate_responses"} & jobs(done).keys()
    )


def test_chats_are_written_alike_everywhere_and_no_evaluation_s_questions_are_drawn(copy):
    write_overlay(
        copy / "chats.yaml",
        "policy: {chat_template_kwargs: {enable_thinking: false, words: it's}, thoughts: strip}\n"
        "preference: {source: chat_template}\n",
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
        assert run and all(
            f"--chat-template-kwargs {kwargs} --template-date 2024-07-26" in line for line in run
        ), program
        assert all(
            ("--thoughts strip" in line) == program.startswith(("generate", "answer"))
            for line in run
        )
    assert any(
        "--held-out data/evaluation.json data/mt_bench/question.jsonl --earlier" in line
        for line in lines
    )


def test_mt_bench_s_questions_are_fetched_before_prompts_are_drawn(copy):
    planned = jobs(
        dry_run(copy, "results/iter1/prompts.parquet", "--config", "mt_bench={data: fastchat}")
    )
    assert planned["fetch_mt_bench"] == planned["sample_prompts"] == 1


def test_named_experiment_and_run_share_the_base_and_the_first_iteration(copy):
    """Two iterations of a run whose first responses are main's: only its second samples and compares."""
    config = "name: x\niterations: 2\nruns:\n  hard:\n    first_iteration_from: main\n    train: {loss: sppo_hard}\n"
    write_overlay(copy / "run.yaml", config)
    done = dry_run(copy, "--configfile", "run.yaml", "--", "results/x/hard/iter2/alpaca_eval.json")
    planned = jobs(done)
    assert {
        name: planned[name]
        for name in ("train_policy", "generate_responses", "annotate_preferences", "base_policy")
    } == {"train_policy": 2, "generate_responses": 2, "annotate_preferences": 2, "base_policy": 1}
    text = done.stdout + done.stderr
    assert (
        "results/x/iter1/responses/0.parquet" in text
        and "results/x/hard/iter1/responses" not in text
    )
    assert "results/x/hard/iter1/policy" in text and "results/x/iter1/policy" not in text


BAD = {
    "a file of a run": (
        "prompts: {field: prompt, source: chats.jsonl, per_iteration: 1}\nresponses: {shards: 1}",
        ["data/gold.jsonl line 1 has no prompt"],
    ),
    "K = 1": ("responses: {samples: 1}", ["responses.samples", "K = 1"]),
    "missing prompts file": ("prompts: {source: data/nowhere.jsonl}", ["data/nowhere.jsonl"]),
    "too many prompts": (
        "prompts: {per_iteration: 100000}",
        ["prompts.per_iteration asks for 100000"],
    ),
    "missing evaluation file": (
        "alpaca_eval: {instructions: nowhere.json}",
        ["nowhere.json is missing"],
    ),
    "limit beyond the end": ("alpaca_eval: {limit: 100000}", ["alpaca_eval.limit is 100000"]),
    "missing adapter": ("preference: {model: ./nowhere}", ["preference.model is ./nowhere"]),
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
    "official difficulties for some": (
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
    "file of the run is missing": (
        "runs: {a: {prompts: {source: data/nowhere.jsonl}}}",
        ["data/nowhere.jsonl"],
    ),
    "a section that is null": ("train:", ["train is None"]),
    "four instructions": (
        "alpaca_eval: {instructions: four.json, limit: null}",
        ["four.json, which has 4 instructions", "needs 5"],
    ),
    "no instructions": (
        "alpaca_eval: {instructions: none.json, limit: null}",
        ["none.json has no instructions"],
    ),
    "a blank instruction": (
        "alpaca_eval: {instructions: blank.json, limit: null}",
        ["blank.json: instruction 2 is blank"],
    ),
    "half a character": (
        "alpaca_eval: {instructions: surrogate.json, limit: null}",
        ["surrogate.json: instruction 1", "surrogate"],
    ),
    "a folder as instructions": ("alpaca_eval: {instructions: data}", ["data is a folder"]),
    "a loop of links as instructions": (
        "alpaca_eval: {instructions: loop}",
        ["loop is a link that leads back to itself"],
    ),
    "a long path as instructions": (
        f"alpaca_eval: {{instructions: {'x/' * 2500}y}}",
        ["is longer than"],
    ),
    "an empty folder as the policy": ("policy: {model: empty}", ["empty has no config.json"]),
    "a file as the policy": (
        "policy: {model: four.json}",
        ["policy.model is four.json, which is a file"],
    ),
    "a blank in the policy's name": (
        "policy: {model: a b}",
        ["policy.model is 'a b'", "org/model"],
    ),
    "an address as the policy": (
        "policy: {model: 'https://huggingface.co/org/model'}",
        ["policy.model is 'https", "org/model"],
    ),
    "nothing as the policy": ("policy: {model: '  '}", ["policy.model is '  '"]),
    "a flag as the policy": ("policy: {model: -x/y}", ["policy.model is '-x/y'"]),
    "a long name as the policy": (f"policy: {{model: {'x' * 5000}}}", ["is longer than"]),
    "a loop of links as the policy": ("policy: {model: ./loop}", ["policy.model is './loop'"]),
    "a typo in the policy's folder": (
        "policy: {model: data/rankr}",
        ["data/rankr", "ranker is, in data", "policy.revision"],
    ),
    "a typo in the prompts' file": (
        "prompts: {source: data/promts}",
        ["data/promts", "prompts.jsonl is, in data", "prompts.revision"],
    ),
    "a folder of prompts": (
        "prompts: {source: data/mt_bench}",
        ["prompts.source is data/mt_bench, which is a folder"],
    ),
    "prompts of one iteration": (
        "prompts: {source: 'one/p{t}.jsonl', per_iteration: null}",
        ["prompts.source is 'one/p2.jsonl'"],
    ),
    "a loop of links as prompts": ("prompts: {source: ./loop}", ["prompts.source is './loop'"]),
    "more shards than the file has prompts": (
        "{prompts: {source: few.jsonl, per_iteration: null}, responses: {shards: 3}}",
        ["responses.shards is 3", "2 prompts"],
    ),
    "a loop of links as Open LLM items": ("open_llm: {data: loop}", ["open_llm.data is loop"]),
    "a blank path as instructions": (
        "alpaca_eval: {instructions: '\t'}",
        ["alpaca_eval.instructions is '\\t'", "is missing"],
    ),
    "a path that no system has as instructions": (
        'alpaca_eval: {instructions: "\\0"}',
        ["alpaca_eval.instructions is '\\x00'", "is missing"],
    ),
    "a pipe as instructions": (
        "alpaca_eval: {instructions: pipe}",
        ["alpaca_eval.instructions is 'pipe'", "neither a file nor a folder"],
    ),
    "JSON that nests too deeply as instructions": (
        "alpaca_eval: {instructions: deep.json}",
        ["deep.json is not valid JSON", "too deeply"],
    ),
    "a number of thousands of digits in JSON": (
        "alpaca_eval: {instructions: digits.json}",
        ["digits.json is not valid JSON"],
    ),
    "a folder as gold": ("runs: {spin: {pairs: {gold: data}}}", ["data"]),
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
    assert done.returncode != 0 and len(errors) == 1, output
    assert not any("Traceback" in line or "Exception" in line for line in output), output
    return errors[0]


@pytest.mark.parametrize(("text", "said"), BAD.values(), ids=BAD)
def test_bad_input_is_found_by_what_the_rules_call_first(text, said, copy, monkeypatch):
    """In this process: rules/common.smk calls these two, and puts what they raise on one line."""
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
    assert line and all(word in line for word in said) and "\n" not in line, caught.value


def test_training_on_two_nodes_needs_slurm_and_is_started_on_both(copy, tmp_path, monkeypatch):
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
            r"srun --overlap --nodes=2 --ntasks=2 --ntasks-per-node=1 \S+ src/train_policy\.py ",
            done.stdout + done.stderr,
        )
    else:
        assert "train.nodes is 2" in one_error(done)


@pytest.mark.parametrize("name", ["K = 1", "missing prompts file", "unknown judge"])
def test_bad_input_is_one_line_before_any_work(name, copy):
    text, said = BAD[name]
    write_overlay(copy / "bad.yaml", text)
    line = one_error(dry_run(copy, "--configfile", "bad.yaml"))
    assert all(word in line for word in said), line


def test_hub_id_with_a_commit_is_no_typo_of_a_folder_here(copy, monkeypatch):
    monkeypatch.chdir(copy)
    text = (
        "{policy: {model: data/rankr, revision: abc}, prompts: {source: data/promts,"
        " revision: abc}}"
    )
    check_inputs("", resolve(overlaid(text))[""])


SOURCES = {
    "a key twice": (
        b"train:\n  beta: 1\niterations: 1\ntrain: {tau: 1}\n",
        ["odd.yaml", "train twice", "lines 1 and 4"],
    ),
    "a key twice in a run": (
        b"runs:\n  a:\n    train:\n      beta: 1\n      beta: 2\n",
        ["beta twice", "lines 4 and 5"],
    ),
    "a key twice in JSON": (
        b'{"train": {"beta": 1},\n "train": {}}',
        ["train twice", "lines 1 and 2"],
    ),
    "another encoding": ("name: x  # é".encode("latin-1"), ["odd.yaml is not in UTF-8"]),
    "an anchor that contains itself": (
        b"train: &a\n  beta: *a\n",
        ["odd.yaml line 1", "contains itself"],
    ),
    "no YAML": (b"train: [", ["odd.yaml is not a configuration in YAML"]),
    "missing": (None, ["odd.yaml is missing"]),
    "nothing": (b"", ["odd.yaml has no keys"]),
    "a list": (b"- a\n", ["odd.yaml has no keys"]),
    "too deep": (b"[" * 3000, ["odd.yaml nests more deeply"]),
    "a key that is a mapping": (b"? {a: 1}\n: 3\n", ["odd.yaml is not a configuration in YAML"]),
    "a day that no calendar has": (b"name: 2024-13-45\n", ["odd.yaml is not", "month"]),
    "text with the tag of a number": (b"train: {beta: !!float x}\n", ["odd.yaml is not", "'x'"]),
    "text with the tag of a time": (b"name: !!timestamp x\n", ["odd.yaml is not"]),
    "a number of thousands of digits": (b"iterations: " + b"9" * 5000, ["odd.yaml is not"]),
}


@pytest.mark.parametrize(("content", "said"), SOURCES.values(), ids=SOURCES)
def test_file_that_a_loader_would_misread_is_one_line(content, said, tmp_path, monkeypatch):
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
def test_shipped_file_is_read_as_it_stands(file):
    check_files([file])


def test_files_that_were_read_are_checked_and_named(copy):
    """A key that stands twice, and a target that --configfile took for a file."""
    (copy / "odd.yaml").write_text("train: {beta: 1}\ntrain: {tau: 1}\n")
    assert "odd.yaml has the key train twice" in one_error(
        dry_run(copy, "--configfile", "odd.yaml")
    )
    (copy / "odd.yaml").write_text("train: {tau: 1}\n")
    made = copy / "results" / "odd" / "alpaca_eval.json"
    made.parent.mkdir(parents=True)
    made.write_text('{"win_rate": 1}')
    line = one_error(dry_run(copy, "--configfile", "odd.yaml", "results/odd/alpaca_eval.json"))
    shutil.rmtree(made.parent)
    assert "unknown key win_rate" in line and line.endswith(
        "(read as configuration: odd.yaml, results/odd/alpaca_eval.json; put -- before targets)"
    )


BEFORE_THE_SNAKEFILE = {
    "another encoding": (b"name: caf\xe9", "odd.yaml is not in UTF-8 (byte 9)"),
    "an anchor that contains itself": (
        b"a: &x\n  b: *x",
        "odd.yaml line 1: the anchor here contains",
    ),
    "thousands of brackets": (b"[" * 3000, "odd.yaml nests more deeply than can be read"),
    "no such file": (
        None,
        "odd.yaml, read as configuration, does not exist; if it is a target, put",
    ),
}


@pytest.mark.parametrize(
    "given", [("--configfile", "odd.yaml"), ("--configfile=odd.yaml",)], ids=len
)
@pytest.mark.parametrize(
    ("content", "said"), BEFORE_THE_SNAKEFILE.values(), ids=BEFORE_THE_SNAKEFILE
)
def test_file_that_snakemake_cannot_read_is_one_line(content, said, given, copy):
    (copy / "odd.yaml").unlink(missing_ok=True)
    if content is not None:
        (copy / "odd.yaml").write_bytes(content)
    assert said in one_error(dry_run(copy, *given))


def test_key_without_effect_is_a_warning_at_the_start(copy):
    write_overlay(copy / "odd.yaml", "train: {tau: 1}")
    done = dry_run(copy, "--configfile", "odd.yaml")
    assert (
        done.returncode == 0
        and "warning: config: train.tau has no effect where train.loss is sppo\n" in done.stderr
    )


@pytest.mark.parametrize("words", [(), ("--directory", ".")])
def test_run_from_another_folder_is_one_line(words, copy, tmp_path):
    assert f"run in it: cd {copy}" in one_error(
        dry_run(tmp_path, "-s", str(copy / "Snakefile"), *words)
    )


def test_base_policy_is_made_anew_when_a_file_in_its_folder_was_replaced(copy, tiny_policy):
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
def test_rule_quotes_what_its_command_names(rule):
    """A user's files may have blanks in their names. Unquoted are only several words in one."""
    command = rules()[rule].split("shell:")[1]
    unquoted = set(re.findall(r"\{((?:input|output|params|log)[.\w]*)\}", command))
    assert unquoted <= {"params.on_each_node", "params.best_grade"}


def test_wrong_run_stops_only_who_asks_for_it(copy):
    text = "{runs: {bad: {train: {betta: 1}}, worse: {prompts: {source: data/nowhere.jsonl}}}}"
    write_overlay(copy / "odd.yaml", text)
    words = ("--configfile", "odd.yaml", "--")
    assert jobs(dry_run(copy, *words, "results/dpo/iter3/alpaca_eval.json"))
    line = one_error(dry_run(copy, *words, "results/bad/iter3/alpaca_eval.json"))
    assert "unknown key runs.bad.train.betta" in line
    line = one_error(dry_run(copy, *words, "results/worse/iter3/alpaca_eval.json"))
    assert "data/nowhere.jsonl" in line


def test_own_file_without_extends_has_no_runs_of_the_demo(copy):
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
    """Another workflow, in a folder of its own, that uses this one."""
    (folder / "Snakefile").write_text(MODULE.format(snakefile=snakefile), encoding="utf-8")
    (folder / "prefer.py").write_text("def longer(prompt, responses):\n    return [0] * 5\n")
    (folder / "mine.yaml").write_text(
        "extends: config/config.yaml\nname: mine\niterations: 1\n"
        "preference: {model: prefer.py:longer}\n"
    )
    return dry_run(folder, "--printshellcmds")


def test_another_workflow_uses_this_one_as_a_module(copy, tmp_path):
    """Its results are in its own folder; programs and shipped data are this repository's."""
    done = module_dry_run(tmp_path, str(copy / "Snakefile"))
    planned = jobs(done)
    assert planned["mine"] == planned["train_policy"] == planned["annotate_preferences"] == 1
    text = done.stdout + done.stderr
    assert f"{copy}/src/annotate_preferences.py" in text
    assert f"--source {copy}/data/prompts.jsonl" in text
    assert "--model prefer.py:longer" in text


def test_a_workflow_deployed_from_git_clones_the_repository_once(copy, tmp_path):
    """workflow/Snakefile, which snakedeploy writes into a module, read from a git repository."""
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


def test_unknown_key_on_the_command_line_is_one_line(copy):
    line = one_error(dry_run(copy, "--config", "iteratoins=3"))
    assert "unknown key iteratoins" in line and "did you mean iterations?" in line


def test_number_of_a_section_can_be_set_on_the_command_line(copy):
    """Snakemake hands the values inside {...} over as text."""
    assert (
        jobs(dry_run(copy, "--config", "responses={shards: 2}", "iterations=1"))[
            "generate_responses"
        ]
        == 2
    )
