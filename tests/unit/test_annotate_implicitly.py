"""The implicit reward of a response: beta times its log-ratio of pi_t and the iterate before it."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

import annotate_implicitly
from sppo.core.artifacts import read_json, record_path
from sppo.core.errors import UserError
from sppo.core.tables import read_table, write_table
from sppo.policies.models import load_policy


@pytest.fixture
def policies(tiny_policy, tmp_path):
    """pi_t-1, and pi_t with slightly different weights."""
    shutil.copytree(tiny_policy, tmp_path / "policy")
    model = load_policy(tmp_path / "policy", torch.float32, "cpu")
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    model.save_pretrained(tmp_path / "policy")
    return tiny_policy, tmp_path / "policy"


@pytest.fixture
def annotate(tmp_path, policies, program):
    before, policy = policies

    def call(responses: list[dict], *more: object):
        write_table(
            tmp_path / "prompts.parquet",
            [
                {
                    "prompt_id": name,
                    "category": "",
                    "messages": [{"role": "user", "content": name}],
                    "prompt_token_ids": [5, 6],
                    "source": "s",
                }
                for name in "ab"
            ],
            "prompts",
        )
        write_table(tmp_path / "responses.parquet", responses, "responses")
        program(
            annotate_implicitly,
            "--prompts",
            tmp_path / "prompts.parquet",
            "--responses",
            tmp_path / "responses.parquet",
            "--policy",
            policy,
            "--before",
            before,
            "--output",
            tmp_path / "out.parquet",
            "--beta",
            "0.1",
            "--device",
            "cpu",
            *more,
        )
        return read_table(tmp_path / "out.parquet", "preferences")

    return call


def response(prompt_id: str, sample: int, *tokens: int) -> dict:
    return {
        "prompt_id": prompt_id,
        "sample_id": sample,
        "seed": 0,
        "prompt_token_ids": [5, 6],
        "token_ids": list(tokens),
        "text": "t",
        "finish_reason": "stop",
    }


RESPONSES = [
    response("a", 0, 7, 8, 2),
    response("a", 1, 9, 2),
    response("b", 0, 7, 2),
    response("b", 1, 30, 31, 32, 33, 2),
    response("b", 2, 2),
]


@pytest.mark.parametrize("batches", [("--micro-batch-size", "1"), ("--micro-batch-tokens", "12")])
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 2e-5), ("bfloat16", 1e-2)])
def test_logits_are_differences_of_implicit_rewards(
    precision, tolerance, batches, annotate, policies, tmp_path
):
    def logp(folder, tokens: list[int]) -> float:
        model = load_policy(folder, torch.float64, "cpu")
        with torch.inference_mode():
            logits = model(torch.tensor([[5, 6, *tokens]])).logits[0]
        # Position 1 is the last token of the prompt; its logits predict the first response token.
        return sum(
            torch.log_softmax(logits[1 + place], 0)[token].item()
            for place, token in enumerate(tokens)
        )

    before, policy = policies
    rows = annotate(RESPONSES, *batches, "--precision", precision)
    assert [(row["prompt_id"], row["sample_ids"]) for row in rows] == [
        ("a", [0, 1]),
        ("b", [0, 1, 2]),
    ]
    for row in rows:
        answers = [one["token_ids"] for one in RESPONSES if one["prompt_id"] == row["prompt_id"]]
        rewards = [0.1 * (logp(policy, tokens) - logp(before, tokens)) for tokens in answers]
        differences = np.subtract.outer(rewards, rewards)
        np.testing.assert_allclose(row["logits"], differences, atol=tolerance)
        assert np.abs(row["logits"]).max() > 2 * tolerance
    assert read_json(record_path(tmp_path / "out.parquet"))["prompts"] == 2


def test_a_response_to_an_unknown_prompt_is_refused(annotate, tmp_path):
    with pytest.raises(UserError, match="answers prompt c, which"):
        annotate([response("c", 0, 7, 2)])
    assert not (tmp_path / "out.parquet").exists()
