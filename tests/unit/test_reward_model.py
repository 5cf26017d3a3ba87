"""Reward models: the reward is that of single sequences, and wrong folders are one line."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from preference_groups import CHAT, SMALL
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig

from sppo.core.errors import UserError
from sppo.preferences.base import (
    ComparisonError,
    Group,
    find_kind,
    kind_of,
    load_preference_model,
    settings_for,
)
from sppo.preferences.estimates import win_probabilities
from sppo.preferences.reward_model import RewardModel

GROUPS = [
    Group("Say hi.", ["Hi!", "Hello there, how are you today?", "Hi!", ""]),
    Group("Which colour has it?", ["Brown.", "It depends on the leaves. " * 9], CHAT),
    Group("Count.", ["One, two, three", "<|im_end|> four", "1 2 3", "un deux trois quatre"]),
]


@pytest.fixture(scope="module")
def folder(tokenizer_folder, tmp_path_factory) -> Path:
    """A random reward model with the padding token of its end of turn, as many models have."""
    folder = tmp_path_factory.mktemp("reward")
    torch.manual_seed(0)
    config = LlamaConfig(
        **SMALL,
        num_labels=1,
        pad_token_id=2,
    )
    model = AutoModelForSequenceClassification.from_config(config)
    model.score.weight.data *= 20
    model.save_pretrained(folder)
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, folder)
    return folder


def loaded(folder: Path, **settings: object) -> RewardModel:
    return load_preference_model(settings_for(str(folder), **settings))


@pytest.fixture(scope="module")
def model(folder) -> RewardModel:
    return loaded(folder, precision="float32")


def reward_by_hand(folder: Path, chat: list[dict], response: str) -> float:
    """One sequence, no padding, float64: the output layer on the state of the last token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64)
    safe = response.replace("<|im_end|>", "< |im_end|>")
    text = tokenizer.apply_chat_template(
        [*chat, {"role": "assistant", "content": safe}], tokenize=False
    )
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.inference_mode():
        states = model.model(ids).last_hidden_state[0]
        return float(states[-1] @ model.score.weight[0])


@pytest.mark.parametrize("budget", [64, 8192])
def test_logits_are_differences_of_rewards_of_single_sequences(budget, folder):
    model = loaded(folder, precision="float32", batch_tokens=budget)
    for group, logits in zip(GROUPS, model.all_pair_logits(GROUPS), strict=True):
        rewards = np.array([reward_by_hand(folder, group.chat, r) for r in group.responses])
        assert np.ptp(rewards) > 1
        np.testing.assert_allclose(logits, rewards[:, None] - rewards[None, :], atol=1e-3)


def test_p_is_bradley_terry_and_equal_responses_tie(model):
    logits = model.pair_logits(GROUPS[0].prompt, GROUPS[0].responses)
    assert logits[0, 2] == 0
    P = win_probabilities(logits)
    np.testing.assert_allclose(P, 1 / (1 + np.exp(-logits)), atol=1e-12)


def test_a_group_does_not_depend_on_the_others(model):
    together = model.all_pair_logits(GROUPS)
    order = random.Random(0).sample(range(3), 3)
    for place, index in enumerate(order):
        again = model.all_pair_logits([GROUPS[i] for i in order])[place]
        np.testing.assert_allclose(again, together[index], atol=1e-4)
        np.testing.assert_allclose(
            model.all_pair_logits([GROUPS[index]])[0], together[index], atol=1e-4
        )


def test_the_whole_chat_is_read(model):
    question, responses, _ = GROUPS[1]
    alone, with_chat = model.all_pair_logits([Group(question, responses), GROUPS[1]])
    assert np.abs(alone - with_chat).max() > 1e-2


def test_rewards_in_bfloat16_are_not_rounded_to_bfloat16(folder):
    model = loaded(folder, precision="bfloat16")
    logits = model.pair_logits(GROUPS[2].prompt, GROUPS[2].responses)
    exact = loaded(folder, precision="float32").pair_logits(GROUPS[2].prompt, GROUPS[2].responses)
    np.testing.assert_allclose(logits, exact, rtol=0.2, atol=1)
    assert any(value != torch.tensor(value).bfloat16().item() for value in logits.flatten())


def test_too_long_a_response_names_the_limit(model):
    groups = [GROUPS[0], Group("Hi", ["word " * 300, "b"])]
    with pytest.raises(ComparisonError, match="has 3.. tokens, but the model reads 200") as caught:
        model.all_pair_logits(groups)
    assert caught.value.index == 1


def test_kind_is_found_from_the_files_or_the_name(folder, tiny_policy):
    assert find_kind(settings_for(str(folder))) is RewardModel
    assert find_kind(settings_for("Skywork/Skywork-Reward-V2-Qwen3-8B")) is RewardModel
    assert find_kind(settings_for("me/my-reward", kind="reward_model")) is RewardModel
    with pytest.raises(UserError, match="preference.kind"):
        kind_of(settings_for("me/my-reward"))
    assert find_kind(settings_for(str(tiny_policy))) is not RewardModel


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_labels": 3, "id2label": None}, "LlamaForSequenceClassification with 3 outputs"),
        ({"architectures": ["LlamaForCausalLM"]}, "is LlamaForCausalLM; a reward model is"),
        (
            {"architectures": ["LlamaForRewardModelWithGating"], "auto_map": {"AutoModel": "m.M"}},
            "needs its own code",
        ),
    ],
)
def test_another_model_is_refused_before_the_first_job(change, said, folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    config = json.loads((other / "config.json").read_text())
    config = {key: value for key, value in (config | change).items() if value is not None}
    (other / "config.json").write_text(json.dumps(config))
    settings = settings_for(str(other), kind="reward_model")
    with pytest.raises(UserError) as caught:
        kind_of(settings).check(settings, "config: preference.model")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_weights_or_template_is_one_line(folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "model.safetensors").unlink()
    with pytest.raises(UserError, match="give a sequence classification model"):
        loaded(broken)
    shutil.copy(folder / "model.safetensors", broken)
    (broken / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((broken / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (broken / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="has no chat template"):
        loaded(broken)


def test_cost_counts_each_response_once(folder):
    cost = RewardModel.cost({"model": str(folder)}, 10, 100, 5, 50)
    assert cost.tokens == 10 * 5 * 150
    assert RewardModel.cost({"model": "me/unknown"}, 10, 100, 5, 50) is None
