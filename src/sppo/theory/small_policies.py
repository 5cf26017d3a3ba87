"""Policies so small that all their responses can be listed, trained by the real trainer.

They allow a comparison of the code with the theory. There is one prompt, and the responses are all
strings of `length` letters. Their probabilities sum to 1, so a policy is a vector pi (n,).
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
from sppo.training.batches import collate
from sppo.training.logps import frozen_logps, response_logps
from sppo.training.trainer import make_trainer

Array = NDArray[np.float64]
# Two different tokens: after the prompt [0], attention could not distinguish a first letter 0 from
# the prompt.
PROMPT = [0, 1]


class SoftmaxTable(nn.Module):
    """A policy with one logit for each response of one letter: pi = softmax(logits).

    It has a language head only, whose input is always 1.
    """

    def __init__(self, pi: Array) -> None:
        super().__init__()
        self.head = nn.Linear(1, len(pi), bias=False)
        self.head.weight.data = torch.tensor(np.log(pi), dtype=torch.float32)[:, None]

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(torch.ones(*input_ids.shape, 1)))


def tiny_transformer(letters: int, seed: int) -> nn.Module:
    """A two-layer Llama with `letters` tokens and random weights.

    Its initial weights are large, so that its first policy is not uniform.
    """
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
    """Token ids of all letters**length responses, in lexicographic order."""
    return [list(word) for word in itertools.product(range(letters), repeat=length)]


def probabilities(model: nn.Module, responses: list[list[int]]) -> Array:
    """pi of every response, shape (n,), computed by the code that training uses."""
    batch = collate([PROMPT] * len(responses), responses)
    with torch.inference_mode():
        return response_logps(model, batch).double().exp().numpy()


def expected_pairs(
    responses: list[list[int]], pi: Array, P: Array, rows: int
) -> list[dict[str, Any]]:
    """About `rows` pairs with which the loss is the expected loss.

    Each response occurs in proportion to its probability (rounded, but at least once among the
    2 `rows` places), and its P-hat is the exact P(y beats pi).
    """
    counts = np.maximum(np.round(2 * rows * pi).astype(int), 1)
    places = np.repeat(np.arange(len(pi)), counts)
    places = places[: len(places) - len(places) % 2]
    return [_pair(responses, w, l, P @ pi, P) for w, l in zip(places[::2], places[1::2])]


def sampled_pairs(
    responses: list[list[int]],
    pi: Array,
    P: Array,
    K: int,
    prompts: int,
    draw: np.random.Generator,
    ends_only: bool,
) -> list[dict[str, Any]]:
    """Pairs of K sampled responses for each prompt, with P-hat estimated among the K responses.

    Each response is in two pairs. With `ends_only`, there is one pair for each prompt, the winner
    and the loser, as in the paper's section 5.1.
    """
    pairs = []
    for sample in draw.choice(len(pi), size=(prompts, K), p=pi / pi.sum()):
        sample_estimates = p_hat(P[np.ix_(sample, sample)])
        if ends_only:
            ends = winner_and_loser(sample_estimates)
            places = [ends] if ends else []
        else:
            places = [(i, (i + 1) % K) for i in range(K)]
        # Equal responses have equal estimates, so that a response identifies its estimate.
        estimates = {int(y): estimate for y, estimate in zip(sample, sample_estimates)}
        pairs += [_pair(responses, sample[w], sample[l], estimates, P) for w, l in places]
    return pairs


def _pair(
    responses: list[list[int]], w: int, l: int, estimates: Array | dict[int, Any], P: Array
) -> dict[str, Any]:
    """A training pair of the responses with numbers w (chosen) and l; P-hat is in `estimates`."""
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
    optimizer: str = "adamw_torch",
    loss: str = "sppo",
    reference: list[dict[str, Any]] | None = None,
) -> None:
    """Train the model in place for one SPPO iteration, in float32.

    The code for frozen policies computes the reference log-probabilities. The real trainer then
    takes `steps` steps, each on all pairs.

    optimizer, loss: keys of the section `train`. reference: rows of `score` under another policy;
    by default the reference is the current policy, as in SPPO.
    """
    options = {
        key: default_of(rule, "paper")
        for key, rule in schema()["properties"]["train"]["properties"].items()
    }
    options |= {
        "loss": loss,
        "beta": 1 / eta,
        "learning_rate": learning_rate,
        "optimizer": optimizer,
        "batch_size": len(pairs),
        "micro_batch_size": len(pairs),
        "micro_batch_tokens": None,
        "schedule_total_epochs": steps,
        "stop_epoch": steps,
        "max_grad_norm": 1e9,
        "checkpoint_steps": steps,
    }
    current = score(model, pairs)
    rows = []
    for pair, now, before in zip(numbered(pairs), current, reference or current, strict=True):
        columns = {
            "current_chosen": now["chosen_logp"],
            "current_rejected": now["rejected_logp"],
            "reference_chosen": before["chosen_logp"],
            "reference_rejected": before["rejected_logp"],
            "opponents_chosen": now["chosen_logp"],
            "opponents_rejected": now["rejected_logp"],
        }
        rows.append(pair | columns)
    make_trainer(model, rows, options, torch.float32, "cpu", work, seed=0).train()


def score(model: nn.Module, pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the table `logps` for these pairs under the model, by the code for references."""
    return frozen_logps(model, numbered(pairs), torch.float32, "cpu", len(pairs))


def numbered(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pairs with pair_id 0, 1, ..."""
    return [pair | {"pair_id": number} for number, pair in enumerate(pairs)]
