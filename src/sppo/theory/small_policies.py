"""Policies small enough that every response can be listed, trained by the real trainer: the bridge from code to theory.

There is one prompt; responses are all strings of `length` letters, so that probabilities sum to 1 and a policy is a vector pi (n,).
"""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sppo.core.config import default_of, schema
from sppo.preferences.estimates import p_hat, winner_and_loser
from sppo.training.logps import collate, frozen_logps, response_logps
from sppo.training.trainer import make_trainer

Array = NDArray[np.float64]
PROMPT = [
    0,
    1,
]  # two unlike tokens: after [0], a first letter 0 would look to attention like the prompt itself


class SoftmaxTable(nn.Module):
    """One logit a response, each of one letter: pi = softmax(logits). A head alone, on a state of 1."""

    def __init__(self, pi: Array) -> None:
        super().__init__()
        self.head = nn.Linear(1, len(pi), bias=False)
        self.head.weight.data = torch.tensor(np.log(pi), dtype=torch.float32)[:, None]

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(torch.ones(*input_ids.shape, 1)))


def tiny_transformer(letters: int, seed: int) -> nn.Module:
    """A two-layer Llama over `letters` tokens with random weights, large enough that its first policy is not uniform."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=letters,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=8,
            initializer_range=0.1,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
        )
    )


def strings(letters: int, length: int) -> list[list[int]]:
    """Token ids of all letters**length responses."""
    return [list(word) for word in itertools.product(range(letters), repeat=length)]


def probabilities(model: nn.Module, responses: list[list[int]]) -> Array:
    """pi of every response, shape (n,), by the code that training uses."""
    with torch.inference_mode():
        return (
            response_logps(model, collate([PROMPT] * len(responses), responses))
            .double()
            .exp()
            .numpy()
        )


def expected_pairs(
    responses: list[list[int]], pi: Array, P: Array, rows: int
) -> list[dict[str, Any]]:
    """Each response as often as it is likely, to the nearest of 2 `rows`, with its exact P(y beats pi): the loss in expectation."""
    counts = np.maximum(np.round(2 * rows * pi).astype(int), 1)
    ends = np.repeat(np.arange(len(pi)), counts)
    ends = ends[: len(ends) - len(ends) % 2]
    return [_pair(responses, w, l, P @ pi, P) for w, l in zip(ends[::2], ends[1::2])]


def sampled_pairs(
    responses: list[list[int]],
    pi: Array,
    P: Array,
    K: int,
    prompts: int,
    draw: np.random.Generator,
    ends_only: bool,
) -> list[dict[str, Any]]:
    """K responses to each prompt, P-hat among them; each in two pairs, or winner and loser alone as in the paper's section 5.1."""
    pairs = []
    for sample in draw.choice(len(pi), size=(prompts, K), p=pi / pi.sum()):
        won = p_hat(P[np.ix_(sample, sample)])
        if ends_only:
            ends = winner_and_loser(won)
            chosen = [ends] if ends else []
        else:
            chosen = [(i, (i + 1) % K) for i in range(K)]
        estimates = {
            int(y): w for y, w in zip(sample, won)
        }  # the same response has the same estimate
        pairs += [_pair(responses, sample[w], sample[l], estimates, P) for w, l in chosen]
    return pairs


def _pair(responses: list[list[int]], w: int, l: int, estimates: Any, P: Array) -> dict[str, Any]:
    return {
        "prompt_token_ids": PROMPT,
        "chosen_token_ids": responses[w],
        "rejected_token_ids": responses[l],
        "p_hat_chosen": float(estimates[int(w)]),
        "p_hat_rejected": float(estimates[int(l)]),
        "p_chosen_beats_rejected": float(P[w, l]),
    }


def train(
    model: nn.Module,
    pairs: list[dict[str, Any]],
    eta: float,
    learning_rate: float,
    steps: int,
    work: Path,
) -> None:
    """One SPPO iteration in place: reference log-probabilities, then the real trainer on all pairs at every step."""
    options = {
        key: default_of(rule, "paper")
        for key, rule in schema()["properties"]["train"]["properties"].items()
    }
    options |= {
        "beta": 1 / eta,
        "learning_rate": learning_rate,
        "optimizer": "adamw_torch",
        "batch_size": len(pairs),
        "micro_batch_size": len(pairs),
        "schedule_total_epochs": steps,
        "stop_epoch": steps,
        "max_grad_norm": 1e9,
        "checkpoint_steps": steps,
    }
    numbered = [pair | {"pair_id": number} for number, pair in enumerate(pairs)]
    frozen = frozen_logps(model, numbered, torch.float32, "cpu", len(pairs))
    rows = [
        pair
        | {
            f"{of}_{end}": row[f"{end}_logp"]
            for of in ("current", "reference")
            for end in ("chosen", "rejected")
        }
        for pair, row in zip(numbered, frozen)
    ]
    make_trainer(model, rows, options, torch.float32, "cpu", work, seed=0).train()
