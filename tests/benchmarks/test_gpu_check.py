"""The check of one GPU: all of it on a processor, and what it says of a section that hangs or
crashes.
"""

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


@pytest.mark.slow
def test_every_section_reports_on_a_processor_and_none_fails(tmp_path):
    report = tmp_path / "report.jsonl"
    done = subprocess.run(
        [sys.executable, PROGRAM, "--shape", "tiny", "--device", "cpu", "--output", report],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},
        check=False,
    )
    rows = lines(report)
    assert [row for row in rows if row["status"] == "failed"] == [] and done.returncode == 0, (
        done.stderr
    )
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
def test_a_section_that_hangs_or_crashes_is_a_line(command, name, value, tmp_path, monkeypatch):
    report, start = tmp_path / "report.jsonl", subprocess.Popen
    report.touch()
    monkeypatch.setattr(gpu_check.subprocess, "Popen", lambda words, **more: start(command, **more))
    monkeypatch.setitem(gpu_check.LIMITS, "sdpa", 0.2 if name == "time limit" else 60)
    gpu_check.supervise("sdpa", argparse.Namespace(shape="7b", device="cpu", output=report))
    assert [
        (row["section"], row["name"], row["status"], row["values"]) for row in lines(report)
    ] == [("sdpa", name, "failed", value)]


def test_what_fails_in_one_step_is_a_line_and_the_section_goes_on(tmp_path):
    report = gpu_check.Report(tmp_path / "report.jsonl", "sdpa", {"card": "cpu"})
    with report.step("one"):
        raise RuntimeError("CUDA out of memory")
    report.measure("two", loss=math.nan)
    assert [
        (row["name"], row["status"], row["values"]) for row in lines(tmp_path / "report.jsonl")
    ] == [
        ("one", "failed", {"error": "RuntimeError: CUDA out of memory"}),
        ("two", "measured", {"loss": "nan"}),
    ]


def test_sections_may_take_ten_minutes_together():
    assert sum(gpu_check.LIMITS.values()) <= 600


def test_ways_to_compute_log_probabilities_agree():
    """Padded left, packed with whole and with chunked logits: each is what the project computes,
    float32.
    """
    import torch

    model = gpu_check.make_model(gpu_check.TINY, 2, "cpu").eval()
    pairs = gpu_check.make_pairs(512, [(5, 3, 7), (9, 1, 4), (2, 12, 2)])
    with torch.no_grad():
        ours = gpu_check.project_logps(model, pairs, "cpu")
        assert torch.allclose(ours, gpu_check.left_padded_logps(model, pairs, "cpu"), atol=1e-4)
        gpu_check.use_varlen(model)
        for head in (gpu_check.plain_head, lambda *a: gpu_check.chunked_head(*a, size=4)):
            assert torch.allclose(
                ours, gpu_check.packed_logps(model, pairs, "cpu", head), atol=1e-4
            )
