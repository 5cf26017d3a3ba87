"""Rules for the source files that ruff and mypy do not check."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
LONGEST_NAME = 59  # characters
LONGEST_LINE = 100  # characters, as for ruff in pyproject.toml


def test_names_of_tests_have_fewer_than_60_characters():
    long_names = []
    for file in sorted(TESTS.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if node.name.startswith("test_") and len(node.name) > LONGEST_NAME:
                long_names.append(f"{file.relative_to(TESTS)}:{node.lineno} {node.name}")
    assert not long_names, "\n".join(long_names)


def test_lines_of_workflow_files_have_at_most_100_characters():
    """snakefmt does not break long strings and comments."""
    files = [ROOT / "Snakefile", ROOT / "Makefile", ROOT / "workflow" / "Snakefile"]
    for pattern in ("rules/*.smk", "profiles/*/config.yaml", "requirements*.txt"):
        found = sorted(ROOT.glob(pattern))
        assert found, pattern
        files += found
    long_lines = [
        f"{file.relative_to(ROOT)}:{number}"
        for file in files
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
        if len(line) > LONGEST_LINE
    ]
    assert not long_lines, "\n".join(long_lines)
