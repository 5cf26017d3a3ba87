"""Summed log-probabilities of responses, in float32, without logits of prompts or padding.

Scoring and training share one form of batch: sequences padded on the right, no attention mask. In a
causal model nothing sees what stands behind it, so that padding changes no response. The attention
kernels then take their causal path, and no row of a mask is empty (cuDNN's backward pass gives NaN
there).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sppo.core.errors import UserError
from sppo.core.progress import progress


def collate(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """Batch token ids: each row a prompt and its response, padded right.

    Returns input_ids (B, L) and response_places (N,), where the N response tokens of all rows stand
    in the flattened ids. Places come from lengths, never from comparing ids with a pad id: the pad
    of many models is their EOS.
    """
    length = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    ids = torch.zeros(len(prompts), length, dtype=torch.long)
    places = []
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor([*prompt, *response])
        places.append(torch.arange(len(prompt), end) + row * length)
    return {"input_ids": ids, "response_places": torch.cat(places)}


def response_logps(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """log pi(y|x) of each row, shape (B,), nats: summed over response tokens in float32."""
    return token_logps(model, batch).sum(1)


def token_logps(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """log pi of each response token, (B, L), nats, float32; 0 where none stands."""
    ids, places = batch["input_ids"], batch["response_places"]
    with head_reads(model, places - 1):  # what predicts a token stands before it
        logits = model(input_ids=ids, use_cache=False).logits  # (N, V)
    targets = ids.flatten()[places]
    found = -functional.cross_entropy(logits.float(), targets, reduction="none")
    table = torch.zeros(ids.numel(), dtype=torch.float32, device=ids.device)
    return table.index_copy(0, places, found).view_as(ids)


@contextmanager
def head_reads(model: nn.Module, places: Tensor) -> Iterator[None]:
    """Let the model compute logits at these N places of the flattened batch alone: float32 (N, V).

    The head is replaced and not called from here, so that what a model does with its logits, such
    as Gemma-2's soft cap, stays. Bfloat16 logits of 16 and above are rounded to an eighth; a token's
    log-probability would carry that error, differently in each batch.
    """
    inner: Any = getattr(model, "module", model)
    head = inner.get_output_embeddings()

    def forward(states: Tensor) -> Tensor:
        chosen = states.flatten(0, 1)[places]
        if torch.is_autocast_enabled(states.device.type) or chosen.dtype == torch.bfloat16:
            logits = Float32Product.apply(chosen.bfloat16(), head.weight.bfloat16())
        else:
            logits = chosen @ head.weight.T
        bias = getattr(head, "bias", None)
        return logits if bias is None else logits + bias

    head.forward = forward
    try:
        yield
    finally:
        del head.forward


class Float32Product(torch.autograd.Function):
    """x W^T of bfloat16 x (N, H) and W (V, H), float32 (N, V): multiplied in bfloat16, not rounded to it.

    The gradient is rounded to bfloat16, as autocast does.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        with torch.autocast(x.device.type, enabled=False):  # it would round the product again
            if x.is_cuda:
                return torch.mm(x, weight.T, out_dtype=torch.float32)
            with bfloat16_products():
                return x.float() @ weight.float().T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        gradient = gradient.bfloat16()
        return gradient @ weight, gradient.T @ x


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Float32 matrix products may use a processor's bfloat16 units: exact where factors are bfloat16."""
    # torch puts an object in the module's place, which type checkers do not see.
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def pair_batch(pairs: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Rows of the table `pairs` as one batch of 2B sequences: all chosen, then all rejected."""
    prompts = [pair["prompt_token_ids"] for pair in pairs]
    chosen = [pair["chosen_token_ids"] for pair in pairs]
    rejected = [pair["rejected_token_ids"] for pair in pairs]
    return collate(prompts + prompts, chosen + rejected)


def pair_length(pair: dict[str, Any]) -> int:
    """Tokens that the longer sequence of a pair fills in a batch."""
    longer = max(len(pair["chosen_token_ids"]), len(pair["rejected_token_ids"]))
    return len(pair["prompt_token_ids"]) + longer


def _batches(lengths: list[int], size: int) -> list[list[int]]:
    """Indices in batches of like lengths."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [order[i : i + size] for i in range(0, len(order), size)]


def forward_precision(device: str, dtype: torch.dtype) -> torch.autocast:
    """Float32 weights computed with in `dtype`: the same casts in every pass.

    Uncached, because a cache keeps a cast of all weights, 2 bytes each, until the block ends.
    """
    enabled = dtype == torch.bfloat16
    return torch.autocast(device, torch.bfloat16, enabled=enabled, cache_enabled=False)


def frozen_logps(
    model: nn.Module,
    pairs: list[dict[str, Any]],
    dtype: torch.dtype,
    device: str,
    micro_batch_size: int,
) -> list[dict[str, Any]]:
    """Rows of the table `logps` under a frozen model, batched by length, in the order of `pairs`.

    A log-probability that is not a number is a UserError that names its pair.
    """
    rows: dict[int, dict[str, Any]] = {}
    lengths = [pair_length(pair) for pair in pairs]
    with torch.inference_mode(), forward_precision(device, dtype):
        for batch in progress(_batches(lengths, micro_batch_size), "reference log-probabilities"):
            inputs = pair_batch([pairs[i] for i in batch])
            logps = response_logps(model, {k: v.to(device) for k, v in inputs.items()}).cpu()
            names = [f"pair {pairs[i]['pair_id']}" for i in batch]
            check_finite(logps, names + names, "log-probability under the frozen policy")
            for i, chosen, rejected in zip(batch, *logps.chunk(2), strict=True):
                rows[i] = {
                    "pair_id": pairs[i]["pair_id"],
                    "chosen_logp": chosen.item(),
                    "rejected_logp": rejected.item(),
                }
    return [rows[i] for i in range(len(pairs))]


def frozen_response_logps(
    model: nn.Module,
    responses: list[dict[str, Any]],
    dtype: torch.dtype,
    device: str,
    batch_size: int,
) -> list[float]:
    """log pi(y|x), nats, of rows of the table `responses` under a frozen model, in their order.

    One that is not a number is a UserError that names prompt and sample.
    """
    logps = [0.0] * len(responses)
    lengths = [len(row["prompt_token_ids"]) + len(row["token_ids"]) for row in responses]
    with torch.inference_mode(), forward_precision(device, dtype):
        for batch in progress(_batches(lengths, batch_size), "log-probabilities of responses"):
            some = [responses[i] for i in batch]
            inputs = collate([r["prompt_token_ids"] for r in some], [r["token_ids"] for r in some])
            found = response_logps(model, {k: v.to(device) for k, v in inputs.items()}).cpu()
            names = [f"sample {r['sample_id']} of prompt {r['prompt_id']}" for r in some]
            check_finite(found, names, "log-probability under the policy")
            for i, logp in zip(batch, found.tolist(), strict=True):
                logps[i] = logp
    return logps


def check_finite(values: Tensor, names: list[str], what: str) -> None:
    """UserError naming the first of `values` (B,) that is NaN or infinite."""
    finite = values.isfinite().tolist()
    if not all(finite):
        first = finite.index(False)
        raise UserError(
            f"the {what} of {names[first]} is {values[first].item()}; the policy's weights are damaged "
            "or overflow: check the policy, or set precision: float32"
        )
