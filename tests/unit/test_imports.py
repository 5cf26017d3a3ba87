"""Imports: only lower layers, no circular imports, and no program imports another program."""

from __future__ import annotations

import ast
import importlib.util
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src"
# From the bottom to the top. A layer may import itself and the layers before it.
LAYERS = (
    "core",
    "policies",
    "preferences",
    "training",
    "evaluation",
    "theory",
    "reporting",
    "workflow",
)
MODULES = sorted(file for file in (SOURCE / "sppo").rglob("*.py") if file.stem != "__init__")
PROGRAMS = sorted(
    file
    for file in SOURCE.rglob("*.py")
    if not file.is_relative_to(SOURCE / "sppo") and file.stem != "_path"
)
ALGORITHM_1 = {
    "sample_prompts",
    "generate_responses",
    "annotate_preferences",
    "build_pairs",
    "score_reference",
    "train_policy",
}


def imported(file: Path) -> set[str]:
    """All dotted names that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(SOURCE).with_suffix("").parts)


@pytest.mark.parametrize("file", MODULES, ids=module_name)
def test_module_imports_only_lower_layers(file):
    _, layer, _ = module_name(file).split(".")
    above = LAYERS[LAYERS.index(layer) + 1 :]
    for name in imported(file):
        assert not name.startswith(tuple(f"sppo.{higher}" for higher in above)), name


def test_modules_have_no_circular_imports():
    names = {module_name(file) for file in MODULES}
    graph = {module_name(file): imported(file) & names for file in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(error.args[1]))


@pytest.mark.parametrize("file", PROGRAMS, ids=lambda file: file.stem)
def test_program_imports_no_other_program(file):
    programs = {program.stem for program in PROGRAMS}
    assert not {name.split(".")[0] for name in imported(file)} & programs


def test_src_has_only_the_programs_of_algorithm_1_on_top():
    assert {file.stem for file in SOURCE.glob("*.py")} == ALGORITHM_1


REPOSITORY = SOURCE.parent
FOLDERS = [REPOSITORY / name for name in ("src", "tests", "benchmarks")]
EVERY_FILE = sorted(file for folder in FOLDERS for file in folder.rglob("*.py"))


@pytest.mark.parametrize("file", EVERY_FILE, ids=lambda file: str(file.relative_to(REPOSITORY)))
def test_names_imported_from_the_project_exist(file):
    """Also inside functions, and in slow tests and benchmarks, which a fast run does not import."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        if node.module.split(".")[0] not in ("sppo", "tests"):
            continue
        module = importlib.import_module(node.module)
        for name in (alias.name for alias in node.names):
            found = hasattr(module, name) or importlib.util.find_spec(f"{node.module}.{name}")
            assert found, f"{node.module} has no {name}"
