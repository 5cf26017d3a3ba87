"""ExPO: every weight lies on the line from base through aligned."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file

import extrapolate_policy
from sppo.errors import UserError
from sppo.models import check_policy, load_policy


@pytest.fixture
def aligned(tiny_policy, tmp_path):
    shutil.copytree(tiny_policy, tmp_path / "aligned")
    model = load_policy(tmp_path / "aligned", torch.float32, "cpu")
    with torch.no_grad():
        for number, weight in enumerate(model.parameters()):
            weight.add_(0.01 * number)
    model.save_pretrained(tmp_path / "aligned")
    return tmp_path / "aligned"


def test_weights_are_carried_on_from_the_base(program, tiny_policy, aligned, tmp_path):
    program(extrapolate_policy, "--base", tiny_policy, "--aligned", aligned, "--alpha", "0.5", "--output", tmp_path / "out")

    base, middle, out = (load_file(folder / "model.safetensors") for folder in (tiny_policy, aligned, tmp_path / "out"))
    assert base.keys() == out.keys()
    for name in base:
        torch.testing.assert_close(out[name], 1.5 * middle[name] - 0.5 * base[name])
    check_policy(tmp_path / "out")


def test_policies_of_other_shapes_are_refused(program, tiny_policy, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2))
    small.save_pretrained(tmp_path / "small")
    shutil.copy(tiny_policy / "tokenizer_config.json", tmp_path / "small")
    with pytest.raises(UserError, match="different shapes"):
        program(extrapolate_policy, "--base", tmp_path / "small", "--aligned", tiny_policy, "--alpha", "0.5", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()
