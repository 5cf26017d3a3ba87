"""Loading policies: whole, finite and of the architecture that they name, or one line that says why not."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging

import prepare_policy
from sppo.core.artifacts import file_hash
from sppo.core.errors import UserError
from sppo.policies import models
from sppo.policies.models import check_policy, link_files, load_policy, load_tokenizer
from sppo.preferences.embedded import load_base

DAMAGED = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "model.safetensors",
)


@pytest.fixture
def policy(tiny_policy, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_policy, tmp_path / "policy"))


def change_weights(policy: Path, change) -> None:
    weights = load_file(policy / "model.safetensors")
    save_file(change(weights), policy / "model.safetensors", metadata={"format": "pt"})


def without(weights: dict, part: str) -> dict:
    return {name: weight for name, weight in weights.items() if part not in name}


CHANGES = {
    "renamed": (
        lambda weights: {f"transformer.{name}": weight for name, weight in weights.items()},
        r"they lack .* and \d+ more, and have besides transformer\.model.* and \d+ more",
    ),
    "a layer missing": (
        lambda weights: without(weights, "layers.1."),
        r"they lack (model\.)?layers\.1\.\S+, .* more",
    ),
    "one missing": (
        lambda weights: without(weights, "model.norm"),
        r"they lack (model\.)?norm\.weight;",
    ),
    "one too many": (
        lambda weights: weights | {"value.weight": torch.ones(2)},
        r"they have besides value\.weight;",
    ),
    "another shape": (
        lambda weights: weights | {"model.norm.weight": torch.ones(7)},
        r"they have in another shape (model\.)?norm\.weight;",
    ),
    "NaN": (
        lambda weights: weights | {"model.norm.weight": torch.full((64,), float("nan"))},
        r"not all finite: (model\.)?norm\.weight has NaN",
    ),
    "infinity": (
        lambda weights: weights | {"model.norm.weight": torch.tensor([1.0] * 63 + [-float("inf")])},
        r"not all finite: (model\.)?norm\.weight",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "load",
    [
        lambda folder: load_policy(folder, torch.float32, "cpu"),
        lambda folder: load_base(folder, torch.float32),
    ],
    ids=["policy", "base of a ranker"],
)
def test_weights_of_another_model_or_that_are_not_finite_are_one_line(load, change, policy, capfd):
    logging.disable_progress_bar()  # as start_torch does
    changed, said = CHANGES[change]
    change_weights(policy, changed)
    with pytest.raises(UserError, match=said) as caught:
        load(policy)
    assert str(policy) in str(caught.value) and "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_tied_head_old_rotary_buffers_and_a_base_s_head_are_no_difference(policy):
    change_weights(
        policy,
        lambda weights: (
            weights
            | {
                "lm_head.weight": weights["model.embed_tokens.weight"].clone(),
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
            }
        ),
    )
    load_policy(policy, torch.float32, "cpu")
    load_base(policy, torch.float32)
    config = json.loads((policy / "config.json").read_text())
    (policy / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    load_policy(policy, torch.float32, "cpu")
    load_base(policy, torch.float32)


@pytest.mark.parametrize("damage", ["empty", "cut", "list", "no object", "bytes"])
@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_file_of_a_policy_is_one_line_that_names_it(name, damage, policy):
    file = policy / name
    whole = file.read_bytes()
    file.write_bytes(
        {
            "empty": b"",
            "cut": whole[: len(whole) // 2],
            "list": b"[]",
            "no object": b"null",
            "bytes": b"\xff" * 40,
        }[damage]
    )
    with pytest.raises(UserError, match=f"policy/{name} ") as caught:
        check_policy(policy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["{}", '{"version": "1.0", "model": {"type": "none"}}'])
def test_tokenizer_that_is_none_is_one_line(content, policy):
    (policy / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="cannot load the tokenizer of .*tokenizer.json") as caught:
        load_tokenizer(policy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}},
            "needs code of its own .auto_map",
        ),
        ({"model_type": "nonsense"}, "cannot use .*config.json"),
        ({"hidden_size": "wide"}, "cannot use .*config.json"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "are quantised .gptq"),
        ({"model_type": "t5"}, "cannot load the model in"),
    ],
)
def test_model_that_cannot_be_used_is_one_line_before_any_work(
    more, said, policy, tmp_path, program, monkeypatch
):
    """By the rule that puts it in its place, with one exception that only loading shows; no prompt on a terminal."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    config = json.loads((policy / "config.json").read_text())
    (policy / "config.json").write_text(json.dumps(config | more))
    (policy / "own.py").write_text("raise SystemExit('executed')")
    with pytest.raises(UserError, match=said):
        if more.get("model_type") == "t5":
            load_policy(policy, torch.float32, "cpu")
        else:
            program(prepare_policy, "--model", policy, "--output", tmp_path / "iter0" / "policy")


def test_links_within_a_checkout_are_relative_so_that_it_can_be_moved(
    policy, tmp_path, monkeypatch
):
    checkout = tmp_path / "checkout"
    shutil.copytree(policy, checkout / "results/models/m")
    monkeypatch.setattr(models, "ROOT", checkout)
    (checkout / "results/iter0").mkdir()
    link_files(checkout / "results/models/m", checkout / "results/iter0/policy")
    link_files(policy, checkout / "results/iter0/outside")
    assert os.readlink(checkout / "results/iter0/outside/config.json") == str(
        policy / "config.json"
    )
    before = file_hash(checkout / "results/iter0/policy")
    checkout.rename(tmp_path / "moved")
    check_policy(tmp_path / "moved/results/iter0/policy")
    assert file_hash(tmp_path / "moved/results/iter0/policy") == before


def test_link_to_nothing_is_one_line_that_says_where_it_points(policy):
    (policy / "tokenizer.json").unlink()
    (policy / "tokenizer.json").symlink_to("/nowhere/tokenizer.json")
    with pytest.raises(
        UserError,
        match="policy/tokenizer.json is a link to /nowhere/tokenizer.json, which does not exist",
    ):
        check_policy(policy)
