"""Rules for the source files that ruff and mypy do not check."""

from __future__ import annotations

import ast
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
LONGEST_NAME = 59  # characters


def test_names_of_tests_have_fewer_than_60_characters():
    long_names = []
    for file in sorted(TESTS.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if node.name.startswith("test_") and len(node.name) > LONGEST_NAME:
                long_names.append(f"{file.relative_to(TESTS)}:{node.lineno} {node.name}")
    assert not long_names, "\n".join(long_names)
