"""ExPO: every weight is on the line from base through aligned."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file

import extrapolate_policy
from sppo.core.errors import UserError
from sppo.policies.folders import check_policy
from sppo.policies.models import load_policy


@pytest.fixture
def aligned(tiny_policy, tmp_path):
    """The tiny policy with other weights."""
    shutil.copytree(tiny_policy, tmp_path / "aligned")
    model = load_policy(tmp_path / "aligned", torch.float32, "cpu")
    with torch.no_grad():
        for number, weight in enumerate(model.parameters()):
            weight.add_(0.01 * number)
    model.save_pretrained(tmp_path / "aligned")
    return tmp_path / "aligned"


def test_weights_are_extrapolated_from_the_base(program, tiny_policy, aligned, tmp_path):
    program(
        extrapolate_policy,
        "--base",
        tiny_policy,
        "--aligned",
        aligned,
        "--alpha",
        "0.5",
        "--output",
        tmp_path / "out",
    )

    base = load_file(tiny_policy / "model.safetensors")
    middle = load_file(aligned / "model.safetensors")
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert base.keys() == out.keys()
    for name in base:
        torch.testing.assert_close(out[name], 1.5 * middle[name] - 0.5 * base[name])
    check_policy(tmp_path / "out")


@pytest.mark.parametrize("shard", ["10GB", "2MB"])
def test_the_base_is_read_tensor_by_tensor(
    program, tiny_policy, aligned, tmp_path, shard, monkeypatch
):
    """The base is in bfloat16, in one file or several.

    The weights equal those computed from two whole policies, although only one is in memory.
    """
    base = tmp_path / "base"
    shutil.copytree(tiny_policy, base, ignore=shutil.ignore_patterns("*.safetensors"))
    load_policy(tiny_policy, torch.bfloat16, "cpu").save_pretrained(base, max_shard_size=shard)
    base_weights = load_policy(base, torch.float32, "cpu").state_dict()
    aligned_weights = load_policy(aligned, torch.float32, "cpu").state_dict()
    wanted = {
        name: weight + 0.3 * (weight - base_weights[name])
        for name, weight in aligned_weights.items()
    }
    loaded = []
    monkeypatch.setattr(
        "sppo.policies.models.load_policy",
        lambda folder, *rest: loaded.append(folder) or load_policy(folder, *rest),
    )

    program(
        extrapolate_policy,
        "--base",
        base,
        "--aligned",
        aligned,
        "--alpha",
        "0.3",
        "--output",
        tmp_path / "out",
    )

    found = load_policy(tmp_path / "out", torch.float32, "cpu").state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert loaded == [aligned], "only one policy may be loaded whole"


@pytest.mark.parametrize("change", ["one layer more", "one layer less"])
def test_a_base_with_other_layers_is_refused(change, program, aligned, tmp_path, tiny_policy):
    from transformers import AutoConfig, LlamaForCausalLM

    config = AutoConfig.from_pretrained(tiny_policy)
    config.num_hidden_layers += 1 if change == "one layer more" else -1
    shutil.copytree(tiny_policy, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="different shapes"):
        program(
            extrapolate_policy,
            "--base",
            tmp_path / "base",
            "--aligned",
            aligned,
            "--alpha",
            "0.5",
            "--output",
            tmp_path / "out",
        )


def test_policies_of_other_shapes_are_refused(program, tiny_policy, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    small.save_pretrained(tmp_path / "small")
    shutil.copy(tiny_policy / "tokenizer_config.json", tmp_path / "small")
    with pytest.raises(UserError, match="different shapes"):
        program(
            extrapolate_policy,
            "--base",
            tmp_path / "small",
            "--aligned",
            tiny_policy,
            "--alpha",
            "0.5",
            "--output",
            tmp_path / "out",
        )
    assert not (tmp_path / "out").exists()
