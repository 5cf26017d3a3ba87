"""Summed log-probabilities of responses, in float32, without logits of prompts or padding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sppo.core.errors import UserError
from sppo.core.progress import progress
from sppo.training.batches import (
    Batch,
    attention_mask,
    choose_layout,
    pair_batch,
    sequence_batch,
)
from sppo.training.lengths import (
    computed_tokens,
    pair_length,
)
from sppo.training.micro_batches import divided


def response_logps(model: nn.Module, batch: Batch) -> Tensor:
    """log pi(y|x) of each of the R responses of a batch, (R,), nats.

    The sum over the response's tokens, in float32. The order is that of `batches.collate` and its
    companions.
    """
    return token_logps(model, batch).sum(1)


def token_logps(model: nn.Module, batch: Batch) -> Tensor:
    """log pi of each response token, (R, M), nats, float32; 0 after the end of a response."""
    more = {}
    if "segment_ids" in batch:
        more = {
            "position_ids": batch["position_ids"],
            "attention_mask": attention_mask(batch["segment_ids"]),
        }
    if "cu_seqlens" in batch:
        more = {
            "position_ids": batch["position_ids"],
            "cu_seq_lens_q": batch["cu_seqlens"],
            "ends": batch["ends"],
        }
    with head_reads(model, batch["reads"]):
        logits = model(input_ids=batch["input_ids"], use_cache=False, **more).logits  # (N, V)
    response_ids, slots = batch["response_ids"], batch["slots"]
    targets = response_ids.flatten()[slots]
    logps = -functional.cross_entropy(logits.float(), targets, reduction="none")
    flat = torch.zeros(response_ids.numel(), dtype=torch.float32, device=logps.device)
    return flat.index_copy(0, slots, logps).view_as(response_ids)


@contextmanager
def head_reads(model: nn.Module, places: Tensor) -> Iterator[None]:
    """Make the model compute logits only at N positions of the flattened batch: float32 (N, V).

    The model itself still calls its output layer, whose `forward` is replaced. Thus everything else
    that the model does with its logits, such as Gemma-2's soft cap, remains. The logits are
    float32, because bfloat16 rounds logits of 16 and above to multiples of 1/8. Log-probabilities
    would have that error, and a different one in each batch.
    """
    inner: Any = getattr(model, "module", model)  # the model without its distributed wrapper
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
    """x W^T in float32 (N, V), of bfloat16 x (N, H) and W (V, H).

    The factors are bfloat16, but the product is not rounded to bfloat16. The gradient is, as in
    autocast.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        with torch.autocast(x.device.type, enabled=False):  # Autocast would round the product.
            if x.is_cuda:
                return torch.mm(x, weight.T, out_dtype=torch.float32)
            with bfloat16_products():
                return x.float() @ weight.float().T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        gradient = gradient.bfloat16()
        # With LoRA the output layer is not trained.
        return gradient @ weight, gradient.T @ x if ctx.needs_input_grad[1] else None


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Let float32 matrix products use a CPU's bfloat16 units; exact if the factors are bfloat16."""
    # torch replaces this module with an object, so type checkers do not find `matmul`.
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _batches(lengths: list[int], size: int, most_tokens: int | None) -> list[list[int]]:
    """Indices of sequences in batches of `size`, in ascending order of their lengths.

    With `most_tokens`, a batch has at most so many tokens instead, with padding, but at least one
    sequence.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        room = size if most_tokens is None else max(1, most_tokens // lengths[index])
        if not batches or len(batches[-1]) >= room:
            batches.append([])
        batches[-1].append(index)
    return batches


def forward_precision(device: str, dtype: torch.dtype) -> torch.autocast:
    """Autocast for float32 weights that are computed with in `dtype`: the same casts in every pass.

    Autocast's cache is off, because it would keep a bfloat16 copy of all weights, 2 bytes each,
    until the end of the block.
    """
    enabled = dtype == torch.bfloat16
    return torch.autocast(device, torch.bfloat16, enabled=enabled, cache_enabled=False)


def frozen_logps(
    model: nn.Module,
    pairs: list[dict[str, Any]],
    dtype: torch.dtype,
    device: str,
    micro_batch_size: int,
    micro_batch_tokens: int | None = None,
) -> list[dict[str, Any]]:
    """Rows of the table `logps` for `pairs` under a frozen model, in the order of `pairs`.

    Pairs of similar lengths are computed together, as many as in training. A log-probability that
    is not finite is a UserError that names its pair.
    """
    rows: dict[Any, dict[str, Any]] = {}
    layout = choose_layout(model, device)
    by_length = sorted(pairs, key=pair_length, reverse=True)
    batches = divided(
        [by_length],
        processes=1,
        most_pairs=micro_batch_size,
        most_tokens=micro_batch_tokens,
        tokens=lambda group: computed_tokens(group, layout),
    )[0]
    with torch.inference_mode(), forward_precision(device, dtype):
        for batch in progress(batches, "reference log-probabilities"):
            inputs = _on_device(pair_batch(batch, layout), device)
            logps = response_logps(model, inputs).cpu()
            names = [f"pair {pair['pair_id']}" for pair in batch]
            check_finite(logps, names + names, "log-probability under the frozen policy")
            for pair, chosen, rejected in zip(batch, *logps.view(2, -1).tolist(), strict=True):
                rows[pair["pair_id"]] = {
                    "pair_id": pair["pair_id"],
                    "chosen_logp": chosen,
                    "rejected_logp": rejected,
                }
    return [rows[pair["pair_id"]] for pair in pairs]


def frozen_response_logps(
    model: nn.Module,
    responses: list[dict[str, Any]],
    dtype: torch.dtype,
    device: str,
    batch_size: int,
    most_tokens: int | None = None,
) -> list[float]:
    """log pi(y|x), nats, of rows of the table `responses` under a frozen model, in their order.

    Responses of similar lengths are computed together, `batch_size` of them, or instead as many as
    have at most `most_tokens` tokens with padding. A log-probability that is not finite is a
    UserError that names the prompt and the sample.
    """
    layout = choose_layout(model, device)
    logps = [0.0] * len(responses)
    lengths = [len(row["prompt_token_ids"]) + len(row["token_ids"]) for row in responses]
    with torch.inference_mode(), forward_precision(device, dtype):
        batches = _batches(lengths, batch_size, most_tokens)
        for batch in progress(batches, "log-probabilities of responses"):
            rows = [responses[index] for index in batch]
            prompts = [row["prompt_token_ids"] for row in rows]
            answers = [row["token_ids"] for row in rows]
            inputs = _on_device(sequence_batch(prompts, answers, layout), device)
            batch_logps = response_logps(model, inputs).cpu()
            names = [f"sample {row['sample_id']} of prompt {row['prompt_id']}" for row in rows]
            check_finite(batch_logps, names, "log-probability under the policy")
            for index, logp in zip(batch, batch_logps.tolist(), strict=True):
                logps[index] = logp
    return logps


def _on_device(batch: Batch, device: str) -> Batch:
    return {
        name: values.to(device) if isinstance(values, Tensor) else values
        for name, values in batch.items()
    }


def check_finite(values: Tensor, names: list[str], what: str) -> None:
    """Raise a UserError that names the first of `values` (B,) that is NaN or infinite."""
    finite = values.isfinite().tolist()
    if not all(finite):
        first = finite.index(False)
        raise UserError(
            f"the {what} of {names[first]} is {values[first].item()}; the policy's weights are "
            "damaged or overflow, or the loss is undefined there: check them, or set precision: "
            "float32"
        )
