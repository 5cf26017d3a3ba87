"""The training benchmark: its row for a tiny shape, and its FLOPs compared with PyTorch's count."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks" / "train_throughput.py"
spec = importlib.util.spec_from_file_location("train_throughput", PROGRAM)
train_throughput = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train_throughput)


def test_flops_equal_those_that_pytorch_counts():
    """PyTorch counts more than training needs, so the difference is subtracted.

    It counts all products of eager attention, although causal attention needs half of them. It
    also counts the logits at the last token of the prompt.
    """
    shape = train_throughput.SHAPES["tiny"]
    model = train_throughput.random_policy(shape, "cpu")
    model.set_attn_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        model(torch.ones(1, 64, dtype=torch.long), logits_to_keep=41)
    half_of_attention = 2 * shape["num_hidden_layers"] * shape["hidden_size"] * 64**2
    logits_of_one_token = 2 * shape["hidden_size"] * shape["vocab_size"]
    needed = counted.get_total_flops() - half_of_attention - logits_of_one_token
    assert train_throughput.flops(24, 40, shape) == 4 * needed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "more"),
    [
        ("ours", []),
        ("ours", ["--ragged", "--micro-batch-tokens", "64"]),
        ("trl", []),
        ("trl_precomputed", ["--ragged"]),
    ],
)
def test_a_tiny_shape_gives_a_row(trainer, more):
    done = subprocess.run(
        [
            sys.executable,
            PROGRAM,
            "--trainer",
            trainer,
            "--shape",
            "tiny",
            "--prompt-tokens",
            "16",
            "--response-tokens",
            "16",
            "--batch-size",
            "4",
            "--micro-batch-size",
            "2",
            "--steps",
            "4",
            "--device",
            "cpu",
            *more,
        ],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},
    )
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["trainer"] == trainer
    assert row["tokens"] == "16 + 16"
    assert row["steps"] == 2
    assert row["device"] == "cpu"
    all_tokens = 2 * 4 * 32 / row["seconds_a_step"]
    if "--ragged" in more:
        assert 0.2 * all_tokens < row["tokens_per_second"] < 0.9 * all_tokens
    else:
        assert row["tokens_per_second"] == pytest.approx(all_tokens, rel=0.1)
    if trainer == "ours":
        assert 0.4 < row["padded_share"] <= 1
    else:
        assert row["padded_share"] is None
    assert 0 < row["mfu_percent"] < 100
    assert row["peak_memory_gib"] > 0
    assert (row["of_these_reference_beforehand"] > 0) == (trainer != "trl")
