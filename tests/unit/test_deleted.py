"""Deleted artifacts are rebuilt. Only this part of the code uses Snakemake's internals."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sppo.core.artifacts import write_json
from sppo.workflow.deleted import deleted_artifacts, force_deleted

ROOT = Path(__file__).resolve().parents[2]
CHAIN = """
import sys
sys.path.insert(0, {source!r})
from sppo.workflow.deleted import force_deleted

force_deleted(workflow, lambda: ["second", "nobody needs this"])

rule third:
    input: "second"
    output: "third"
    shell: "touch {{output}}"

rule second:
    input: "first"
    output: "second"
    shell: "touch {{output}}"

rule first:
    output: "first"
    shell: "touch {{output}}"
"""


def test_deleted_file_and_its_dependents_are_planned(tmp_path):
    """If this fails with a new Snakemake, adapt sppo/workflow/deleted.py to its internals."""
    (tmp_path / "Snakefile").write_text(CHAIN.format(source=str(ROOT / "src")), encoding="utf-8")
    for age, name in enumerate(("third", "first")):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    words = [sys.executable, "-m", "snakemake", "-n", "--cores", "1", "--rerun-triggers", "mtime"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    planned = done.stdout + done.stderr
    assert "rule second:" in planned
    assert "rule third:" in planned
    assert "rule first:" not in planned
    assert "nobody" not in planned


def test_unsupported_snakemake_is_a_clear_error():
    with pytest.raises(RuntimeError, match=r"this version of Snakemake.*sppo/workflow/deleted.py"):
        force_deleted(SimpleNamespace(), list)


def test_deleted_artifacts_are_found_from_their_records(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = Path("results")
    for name, inputs in (("pairs", ["prompts", "results/iter0/policy"]), ("kept", [])):
        record = {"artifact": f"results/{name}", "inputs": inputs}
        (root / name).parent.mkdir(exist_ok=True)
        write_json(root / f"{name}.record.json", record)
    (root / "broken.record.json").write_text("{", encoding="utf-8")
    (root / "kept").touch()
    assert deleted_artifacts(root, keep_policies=True) == ["results/iter0/policy", "results/pairs"]
    assert deleted_artifacts(root, keep_policies=False) == ["results/pairs"]
