"""Loading policies: complete, finite and of the named architecture, otherwise a one-line error."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging

import prepare_policy
from sppo.core.artifacts import file_hash, write_json
from sppo.core.errors import UserError
from sppo.policies import chats, folders
from sppo.policies.chats import load_tokenizer, tokenizer_class
from sppo.policies.folders import check_policy, link_files
from sppo.policies.models import load_policy
from sppo.preferences.embedded_network import load_base

ROOT = Path(__file__).resolve().parents[2]
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
        r"they lack .* and \d+ more, and also have transformer\.model.* and \d+ more",
    ),
    "a missing layer": (
        lambda weights: without(weights, "layers.1."),
        r"they lack (model\.)?layers\.1\.\S+, .* more",
    ),
    "a missing weight": (
        lambda weights: without(weights, "model.norm"),
        r"they lack (model\.)?norm\.weight;",
    ),
    "an extra weight": (
        lambda weights: weights | {"value.weight": torch.ones(2)},
        r"they also have value\.weight;",
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
    ids=["policy", "base model of a ranker"],
)
def test_wrong_or_not_finite_weights_are_a_one_line_error(load, change, policy, capfd):
    logging.disable_progress_bar()  # as start_torch does
    changed, said = CHANGES[change]
    change_weights(policy, changed)
    with pytest.raises(UserError, match=said) as caught:
        load(policy)
    assert str(policy) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_harmless_extra_weights_are_accepted(policy):
    """A stored copy of a tied head, rotary buffers of old versions, and a head in a base model."""

    def add_head_and_buffer(weights: dict) -> dict:
        return weights | {
            "lm_head.weight": weights["model.embed_tokens.weight"].clone(),
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        }

    change_weights(policy, add_head_and_buffer)
    load_policy(policy, torch.float32, "cpu")
    load_base(policy, torch.float32)
    config = json.loads((policy / "config.json").read_text())
    (policy / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    load_policy(policy, torch.float32, "cpu")
    load_base(policy, torch.float32)


@pytest.mark.parametrize("damage", ["empty", "cut", "list", "null", "no text"])
@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_of_a_policy_is_named(name, damage, policy):
    file = policy / name
    whole = file.read_bytes()
    contents = {
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "list": b"[]",
        "null": b"null",
        "no text": b"\xff" * 40,
    }
    file.write_bytes(contents[damage])
    with pytest.raises(UserError, match=f"policy/{name} ") as caught:
        check_policy(policy)
    assert "\n" not in str(caught.value)


def test_user_s_policy_without_a_chat_template_is_refused(policy):
    check_policy(policy, made_here=False)
    for file in policy.glob("*chat_template*"):
        file.unlink()
    settings = json.loads((policy / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (policy / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="has no chat template; use an instruction-tuned model"):
        check_policy(policy, made_here=False)
    with pytest.raises(UserError, match="has no chat template"):
        load_tokenizer(policy)


@pytest.mark.parametrize("content", ["{}", '{"version": "1.0", "model": {"type": "none"}}'])
def test_an_invalid_tokenizer_is_a_one_line_error(content, policy):
    (policy / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="cannot load the tokenizer of .*tokenizer.json") as caught:
        load_tokenizer(policy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}},
            "needs its own code .auto_map",
        ),
        ({"model_type": "nonsense"}, "cannot use .*config.json"),
        ({"hidden_size": "wide"}, "cannot use .*config.json"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "are quantised .gptq"),
    ],
)
def test_an_unusable_model_is_refused_before_any_work(
    more, said, policy, tmp_path, program, monkeypatch
):
    """prepare_policy refuses it, runs no code of its folder and asks no question."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    config = json.loads((policy / "config.json").read_text())
    (policy / "config.json").write_text(json.dumps(config | more))
    (policy / "own.py").write_text("raise SystemExit('executed')")
    with pytest.raises(UserError, match=said):
        program(prepare_policy, "--model", policy, "--output", tmp_path / "iter0" / "policy")


def test_a_model_that_is_no_causal_language_model_is_refused(policy, monkeypatch):
    """Only loading finds this out."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    config = json.loads((policy / "config.json").read_text())
    (policy / "config.json").write_text(json.dumps(config | {"model_type": "t5"}))
    with pytest.raises(UserError, match="cannot load the model in"):
        load_policy(policy, torch.float32, "cpu")


def test_links_within_a_checkout_survive_a_move_of_it(policy, tmp_path, monkeypatch):
    """They are relative."""
    checkout = tmp_path / "checkout"
    shutil.copytree(policy, checkout / "results/models/m")
    monkeypatch.setattr(folders, "ROOT", checkout)
    (checkout / "results/iter0").mkdir()
    link_files(checkout / "results/models/m", checkout / "results/iter0/policy")
    before = file_hash(checkout / "results/iter0/policy")
    checkout.rename(tmp_path / "moved")
    check_policy(tmp_path / "moved/results/iter0/policy")
    assert file_hash(tmp_path / "moved/results/iter0/policy") == before


def test_links_out_of_a_checkout_are_absolute(policy, tmp_path, monkeypatch):
    checkout = tmp_path / "checkout"
    (checkout / "results/iter0").mkdir(parents=True)
    monkeypatch.setattr(folders, "ROOT", checkout)
    link_files(policy, checkout / "results/iter0/outside")
    target = os.readlink(checkout / "results/iter0/outside/config.json")
    assert target == str(policy / "config.json")


def test_a_broken_link_is_named_with_its_target(policy):
    (policy / "tokenizer.json").unlink()
    (policy / "tokenizer.json").symlink_to("/nowhere/tokenizer.json")
    with pytest.raises(
        UserError,
        match="policy/tokenizer.json is a link to /nowhere/tokenizer.json, which does not exist",
    ):
        check_policy(policy)


def test_a_tokenizer_with_a_named_class_needs_no_pytorch(tiny_policy):
    """The class is that which AutoTokenizer finds, which imports PyTorch."""
    code = (
        "import sys\n"
        "from sppo.policies.chats import load_tokenizer\n"
        f"tokenizer = load_tokenizer({str(tiny_policy)!r})\n"
        "assert 'torch' not in sys.modules\n"
        "from transformers import AutoTokenizer\n"
        f"automatic = AutoTokenizer.from_pretrained({str(tiny_policy)!r}, padding_side='left')\n"
        "assert type(tokenizer) is type(automatic)\n"
        "assert tokenizer('One, two.\\n') == automatic('One, two.\\n')\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr


def test_a_tokenizer_with_its_own_class_is_left_to_transformers(tmp_path):
    import transformers

    for settings in (
        {"tokenizer_class": "GPT2Tokenizer"},
        {"tokenizer_class": "TokenizersBackend", "auto_map": {}},
    ):
        write_json(tmp_path / "tokenizer_config.json", settings)
        assert tokenizer_class(tmp_path) is transformers.AutoTokenizer
    assert tokenizer_class(tmp_path / "none") is transformers.AutoTokenizer


@pytest.mark.parametrize(
    ("tokens", "wanted"),
    [
        (
            30,
            "question 3 has 30 tokens, and .* 71, but .* has 100; .* max_new_tokens to at most 70",
        ),
        (99, "to at most 1$"),
        (100, "a policy with a longer context"),
    ],
)
def test_a_prompt_that_does_not_fit_has_a_remedy(tokens, wanted):
    with pytest.raises(UserError, match=wanted):
        chats.check_fits("question 3", tokens, 71, 100)


def test_a_prompt_fits_with_its_answer_or_without_a_known_limit():
    chats.check_fits("question 3", 30, 70, 100)
    chats.check_fits("question 3", 30, 71, None)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_memory_is_used_again():
    """Of ten tensors of 100 MB one after another, some cause no page faults, of 24,000 possible.

    Not all, because a small block can take a part of the freed memory.
    """
    code = (
        "import resource, torch\n"
        "from sppo.policies.devices import start_torch\n"
        "start_torch(gpus=0)\n"
        "def faults_of_a_tensor():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    torch.zeros(25_000_000)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "fewest = min(faults_of_a_tensor() for _ in range(10))\n"
        "print(torch.cuda.is_available() or fewest < 1000)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.stdout.strip() == "True", done.stderr
