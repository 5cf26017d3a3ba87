"""The check of one GPU: every section on a CPU, and the report of a section that fails."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_check.py"
spec = importlib.util.spec_from_file_location("gpu_check", PROGRAM)
gpu_check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu_check)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_section_reports_and_none_fails_on_a_cpu(tmp_path):
    report = tmp_path / "report.jsonl"
    done = subprocess.run(
        [sys.executable, PROGRAM, "--shape", "tiny", "--device", "cpu", "--output", report],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},
        check=False,
    )
    rows = lines(report)
    assert [row for row in rows if row["status"] == "failed"] == [], done.stderr
    assert done.returncode == 0, done.stderr
    assert {row["section"] for row in rows} == {"environment", *gpu_check.LIMITS, "summary"}
    assert rows[-1]["section"] == "summary" and rows[-1]["values"]["failed"] == 0
    assert {
        "section",
        "name",
        "status",
        "values",
        "seconds",
        "card",
        "torch",
        "cuda",
        "transformers",
    } == rows[0].keys()
    assert all(row["card"] == "cpu" and row["torch"] for row in rows)


@pytest.mark.parametrize(
    ("command", "name", "value"),
    [
        (["sleep", "60"], "time limit", {"limit_seconds": 0.2}),
        (["false"], "crash", {"exit_status": 1}),
    ],
)
def test_a_section_that_hangs_or_crashes_is_reported(command, name, value, tmp_path, monkeypatch):
    report = tmp_path / "report.jsonl"
    report.touch()
    start = subprocess.Popen
    monkeypatch.setattr(gpu_check.subprocess, "Popen", lambda words, **more: start(command, **more))
    monkeypatch.setitem(gpu_check.LIMITS, "sdpa", 0.2 if name == "time limit" else 60)
    gpu_check.supervise("sdpa", argparse.Namespace(shape="7b", device="cpu", output=report))
    (row,) = lines(report)
    assert (row["section"], row["name"], row["status"]) == ("sdpa", name, "failed")
    assert row["values"] == value


def test_a_failed_step_is_reported_and_the_section_continues(tmp_path):
    report = gpu_check.Report(tmp_path / "report.jsonl", "sdpa", {"card": "cpu"})
    with report.step("one"):
        raise RuntimeError("CUDA out of memory")
    report.measure("two", loss=math.nan)
    rows = lines(tmp_path / "report.jsonl")
    assert [(row["name"], row["status"], row["values"]) for row in rows] == [
        ("one", "failed", {"error": "RuntimeError: CUDA out of memory"}),
        ("two", "measured", {"loss": "nan"}),
    ]


def test_sections_may_take_ten_minutes_together():
    assert sum(gpu_check.LIMITS.values()) <= 600


def test_ways_to_compute_log_probabilities_agree():
    """Padding on the left and packing: each equals padding on the right in float32."""
    import torch

    model = gpu_check.make_model(gpu_check.TINY, 2, "cpu").eval()
    pairs = gpu_check.make_pairs(512, [(5, 3, 7), (9, 1, 4), (2, 12, 2)])
    with torch.no_grad():
        ours = gpu_check.project_logps(model, pairs, "cpu")
        padded = gpu_check.left_padded_logps(model, pairs, "cpu")
        assert torch.allclose(ours, padded, atol=1e-4)
        packed = gpu_check.project_logps(model, pairs, "cpu", "packed")
        assert torch.allclose(ours, packed, atol=1e-4)
        capped = gpu_check.capped_model(gpu_check.TINY, 2, "cpu")
        pairs = gpu_check.make_pairs(512, [(25, 3, 7), (9, 1, 4), (2, 12, 2)])
        ours = gpu_check.project_logps(capped, pairs, "cpu")
        packed = gpu_check.project_logps(capped, pairs, "cpu", "packed")
        assert torch.allclose(ours, packed, atol=1e-4)
        for layer in capped.model.layers:
            layer.self_attn.attn_logit_softcapping = None
        without_cap = gpu_check.project_logps(capped, pairs, "cpu", "packed")
        assert (ours - without_cap).abs().max() > 0.1
