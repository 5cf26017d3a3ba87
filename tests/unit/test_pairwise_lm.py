"""Language models that answer A or B: the logits of single sequences, in both orders."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from preference_groups import CHAT
from transformers import AutoModelForCausalLM, AutoTokenizer

import prepare_preference_model
from sppo.core.errors import UserError
from sppo.preferences.base import (
    ComparisonError,
    Group,
    find_kind,
    kind_of,
    load_preference_model,
    settings_for,
)
from sppo.preferences.pairwise_lm import PairwiseModel

GROUPS = [
    Group("Say hi.", ["Hi!", "Hello there, how are you today?", "Hi!"]),
    Group("Which colour has it?", ["Brown.", "It depends. " * 9, "<|im_end|> Red."], CHAT),
]


def loaded(folder, **settings) -> PairwiseModel:
    return load_preference_model(
        settings_for(str(folder), kind="pairwise_lm", precision="float32", **settings)
    )


@pytest.fixture(scope="module")
def model(tiny_policy) -> PairwiseModel:
    return loaded(tiny_policy)


@pytest.fixture(scope="module")
def by_hand(tiny_policy):
    """The steps of the model's card for one ordered pair, in float64."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    plain = AutoTokenizer.from_pretrained(tiny_policy)
    plain.chat_template = (
        "\n{% for message in messages %}{% if loop.index0 % 2 == 0 %}\n\n<turn> user\n"
        " {{ message['content'] }}{% else %}\n\n<turn> assistant\n {{ message['content'] }}"
        "{% endif %}{% endfor %}\n\n\n"
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float64)
    (a,), (b,) = (tokenizer.encode(letter, add_special_tokens=False) for letter in "AB")

    def logit(chat: list[dict], first: str, second: str) -> float:
        context = plain.apply_chat_template(chat, tokenize=False)
        first, second = (t.replace("<|im_end|>", "< |im_end|>") for t in (first, second))
        prompt = f"[CONTEXT] {context} [RESPONSE A] {first} [RESPONSE B] {second} \n"
        message = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        ids = tokenizer.encode(
            text.replace(tokenizer.bos_token, ""), return_tensors="pt", add_special_tokens=False
        )
        with torch.inference_mode():
            logits = model(ids).logits[0, -1]
        return float(logits[a] - logits[b])

    return logit


@pytest.mark.parametrize("budget", [64, 8192])
def test_logits_are_those_of_the_model_s_card(budget, tiny_policy, by_hand):
    model = loaded(tiny_policy, batch_tokens=budget)
    for group, logits in zip(GROUPS, model.all_pair_logits(GROUPS), strict=True):
        expected = [
            [0.0 if a == b else by_hand(group.chat, a, b) for b in group.responses]
            for a in group.responses
        ]
        assert np.abs(expected).max() > 1e-2
        np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_both_orders_are_read(model):
    logits = model.pair_logits(GROUPS[0].prompt, GROUPS[0].responses)
    assert logits[0, 1] != -logits[1, 0]
    assert logits[0, 2] == logits[2, 0] == 0
    assert model.pair_logits("Hi", []).shape == (0, 0)
    assert model.pair_logits("Hi", ["one"]).tolist() == [[0.0]]


def test_a_group_does_not_depend_on_the_others(model):
    together = model.all_pair_logits(GROUPS)
    for group, logits in zip(GROUPS, together, strict=True):
        np.testing.assert_allclose(model.all_pair_logits([group])[0], logits, atol=1e-5)


def test_too_long_a_pair_names_the_limit(model):
    with pytest.raises(ComparisonError, match="tokens, but the model reads") as caught:
        model.all_pair_logits([GROUPS[0], Group("Hi", ["word " * 9000, "b"])])
    assert caught.value.index == 1


def test_kind_is_found_from_the_name_or_the_key(tiny_policy):
    name = "RLHFlow/pair-preference-model-LLaMA3-8B"
    assert find_kind(settings_for(name)) is PairwiseModel
    assert find_kind(settings_for(str(tiny_policy), kind="pairwise_lm")) is PairwiseModel
    assert find_kind(settings_for(str(tiny_policy))) is None


def test_a_prepared_folder_keeps_its_kind(program, tiny_policy, tmp_path):
    """Its files are those of any language model."""
    prepared = tmp_path / "preference_model"
    program(
        prepare_preference_model,
        "--model",
        tiny_policy,
        "--kind",
        "pairwise_lm",
        "--output",
        prepared,
    )
    assert find_kind(settings_for(str(prepared))) is PairwiseModel
    assert loaded(prepared).pair_logits("Hi", ["a", "b"]).shape == (2, 2)


@pytest.mark.parametrize(
    ("model", "said"),
    [("nowhere/at/all", "neither a folder nor a hub id"), ("{tokenizer}", "no named architecture")],
)
def test_another_model_is_refused_before_the_first_job(model, said, tokenizer_folder):
    name = model.format(tokenizer=tokenizer_folder)
    settings = settings_for(name, kind="pairwise_lm")
    with pytest.raises(UserError, match=said):
        kind_of(settings).check(settings, "config: preference.model")
