"""General preference models, compared with the computation of the authors' example code."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from preference_groups import CHAT, SMALL
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from sppo.core.errors import UserError
from sppo.preferences.base import (
    ComparisonError,
    Group,
    find_kind,
    kind_of,
    load_preference_model,
    settings_for,
)
from sppo.preferences.estimates import condorcet_winner, win_probabilities
from sppo.preferences.gpm import GeneralPreferenceModel

GROUPS = [
    Group("Say hi.", ["Hi!", "Hello there, how are you today?", "Hi!", "Yo.", "Good day"]),
    Group("Which colour has it?", ["Brown.", "It depends on the leaves. " * 9], CHAT),
    Group("Count.", ["One, two, three", "1 2 3", "un deux trois quatre"]),
]


@pytest.fixture(scope="module")
def folder(tokenizer_folder, tmp_path_factory) -> Path:
    """A random model with heads of four dimensions, as the authors' class saves it."""
    folder = tmp_path_factory.mktemp("gpm")
    torch.manual_seed(0)
    config = LlamaConfig(
        **SMALL,
        architectures=["CustomRewardModel"],
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights["value_head.weight"] = torch.randn(4, 32)
    weights["prompt_head.weight"] = torch.randn(2, 32)
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def model(folder) -> GeneralPreferenceModel:
    return load_preference_model(settings_for(str(folder), precision="float32"))


class Example:
    """The steps of the authors' example for one chat, without its library code, in float64."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).model
        weights = load_file(folder / "model.safetensors")
        self.value_head = weights["value_head.weight"].double()
        self.prompt_head = weights["prompt_head.weight"].double()

    def read(self, chat: list[dict], response: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The vector of unit length, and the state at the end of the prompt."""
        whole = [*chat, {"role": "assistant", "content": response}]
        ids = self.tokenizer(self.tokenizer.apply_chat_template(whole, tokenize=False)).input_ids
        asked = self.tokenizer(self.tokenizer.apply_chat_template(chat, tokenize=False)).input_ids
        ids[-1] = self.tokenizer.eos_token_id
        with torch.inference_mode():
            states = self.model(torch.tensor([ids])).last_hidden_state[0]
        value = self.value_head @ states[-1]
        return value / value.norm(), states[len(ids) - (len(ids) - len(asked)) - 1]

    def logit(self, chat: list[dict], first: str, second: str) -> float:
        v, state = self.read(chat, first)
        w, _ = self.read(chat, second)
        block_values = (self.prompt_head @ state).softmax(-1)
        R = torch.zeros(4, 4, dtype=torch.double)
        for i in (0, 2):
            R[i, i + 1], R[i + 1, i] = -block_values[i // 2], block_values[i // 2]
        return float(v @ R.T @ w) / 0.1


@pytest.mark.parametrize("budget", [64, 8192])
def test_logits_are_those_of_the_authors_example(budget, folder):
    model = load_preference_model(
        settings_for(str(folder), precision="float32", batch_tokens=budget)
    )
    example = Example(folder)
    for group, logits in zip(GROUPS, model.all_pair_logits(GROUPS), strict=True):
        expected = [
            [example.logit(group.chat, a, b) for b in group.responses] for a in group.responses
        ]
        assert np.abs(expected).max() > 0.5
        np.testing.assert_allclose(logits, expected, atol=1e-3)


def test_preferences_are_skew_symmetric_and_can_be_cyclic(model):
    draw = np.random.default_rng(0)
    words = np.array(["tea", "sun", "is", "a", "cold", "wet", "Rome", "runs", "7", "so"])
    groups = [
        Group(f"Question {n}?", [" ".join(draw.choice(words, 4)) for _ in range(5)])
        for n in range(30)
    ]
    found = [win_probabilities(logits) for logits in model.all_pair_logits(groups)]
    for P in found:
        np.testing.assert_allclose(P + P.T, 1, atol=1e-12)
    assert condorcet_winner(found) < 1


def test_equal_responses_tie_and_no_response_is_allowed(model):
    logits = model.pair_logits(GROUPS[0].prompt, GROUPS[0].responses)
    assert logits[0, 2] == 0
    np.testing.assert_array_equal(logits[0], logits[2])
    assert model.pair_logits("Hi", []).shape == (0, 0)


def test_too_long_a_response_names_the_limit(model):
    with pytest.raises(ComparisonError, match="tokens, but the model reads 200") as caught:
        model.all_pair_logits([GROUPS[0], Group("Hi", ["word " * 300, "b"])])
    assert caught.value.index == 1


def test_kind_is_found_from_the_weights_or_the_name(folder, tiny_policy):
    assert find_kind(settings_for(str(folder))) is GeneralPreferenceModel
    assert find_kind(settings_for("general-preference/GPM-Gemma-2B")) is GeneralPreferenceModel
    assert find_kind(settings_for(str(tiny_policy))) is not GeneralPreferenceModel


def test_heads_that_do_not_fit_are_one_line(folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    weights = load_file(other / "model.safetensors")
    weights["prompt_head.weight"] = torch.randn(3, 32)
    (other / "model.safetensors").unlink()
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="value_head has 4 rows, which must be even and twice"):
        load_preference_model(settings_for(str(other)))


def test_a_model_without_heads_is_refused_before_the_first_job(tiny_policy):
    settings = settings_for(str(tiny_policy), kind="gpm")
    with pytest.raises(UserError, match=r"has no weights value_head\.weight") as caught:
        kind_of(settings).check(settings, "config: preference.model")
    assert "\n" not in str(caught.value)
