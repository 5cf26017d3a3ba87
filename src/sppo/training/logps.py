"""Summed log-probabilities of responses, in float32, without logits of prompts or padding.

Scoring and training use the same form of batch: sequences padded on the right, without an attention
mask. In a causal model no token attends to later tokens, so padding does not change the result.
Without a mask, the attention kernels use their causal implementation, and no row of a mask is empty
(cuDNN's backward pass gives NaN for such rows).
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
    """Batch token ids: each row is a prompt and its response, padded on the right.

    Returns `input_ids` (B, L) and `response_places` (N,): the positions of the N response tokens of
    all rows in the flattened ids. The positions are computed from lengths. Comparing ids with the
    id of the padding would be wrong, because many models use EOS as padding.
    """
    sequences = [[*p, *r] for p, r in zip(prompts, responses, strict=True)]
    length = max(len(sequence) for sequence in sequences)
    ids = torch.zeros(len(sequences), length, dtype=torch.long)
    places = []
    for row, (prompt, sequence) in enumerate(zip(prompts, sequences, strict=True)):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        places.append(torch.arange(len(prompt), len(sequence)) + row * length)
    return {"input_ids": ids, "response_places": torch.cat(places)}


def response_logps(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """log pi(y|x) of each row of a batch from `collate`, (B,), nats.

    The sum over the response's tokens, in float32.
    """
    return token_logps(model, batch).sum(1)


def token_logps(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """log pi of each response token, (B, L), nats, float32; 0 at tokens of prompts and padding."""
    ids, places = batch["input_ids"], batch["response_places"]
    with head_reads(model, places - 1):  # The position before a token predicts it.
        logits = model(input_ids=ids, use_cache=False).logits  # (N, V)
    targets = ids.flatten()[places]
    logps = -functional.cross_entropy(logits.float(), targets, reduction="none")
    flat = torch.zeros(ids.numel(), dtype=torch.float32, device=ids.device)
    return flat.index_copy(0, places, logps).view_as(ids)


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
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        gradient = gradient.bfloat16()
        return gradient @ weight, gradient.T @ x


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


def pair_batch(pairs: list[dict[str, Any]]) -> dict[str, Tensor]:
    """B rows of the table `pairs` as a batch of 2B sequences: all chosen, then all rejected."""
    prompts = [pair["prompt_token_ids"] for pair in pairs]
    chosen = [pair["chosen_token_ids"] for pair in pairs]
    rejected = [pair["rejected_token_ids"] for pair in pairs]
    return collate(prompts + prompts, chosen + rejected)


def pair_length(pair: dict[str, Any]) -> int:
    """The number of tokens of the longer sequence of a pair, with the prompt."""
    longer = max(len(pair["chosen_token_ids"]), len(pair["rejected_token_ids"]))
    return len(pair["prompt_token_ids"]) + longer


def _batches(lengths: list[int], size: int) -> list[list[int]]:
    """Indices of sequences in batches of `size`, in ascending order of their lengths."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [order[i : i + size] for i in range(0, len(order), size)]


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
) -> list[dict[str, Any]]:
    """Rows of the table `logps` for `pairs` under a frozen model, in the order of `pairs`.

    Pairs of similar lengths are computed together. A log-probability that is not finite is a
    UserError that names its pair.
    """
    rows: list[dict[str, Any]] = [{} for _ in pairs]
    lengths = [pair_length(pair) for pair in pairs]
    with torch.inference_mode(), forward_precision(device, dtype):
        for batch in progress(_batches(lengths, micro_batch_size), "reference log-probabilities"):
            inputs = _on_device(pair_batch([pairs[index] for index in batch]), device)
            logps = response_logps(model, inputs).cpu()
            names = [f"pair {pairs[index]['pair_id']}" for index in batch]
            check_finite(logps, names + names, "log-probability under the frozen policy")
            chosen, rejected = logps.chunk(2)
            for place, index in enumerate(batch):
                rows[index] = {
                    "pair_id": pairs[index]["pair_id"],
                    "chosen_logp": chosen[place].item(),
                    "rejected_logp": rejected[place].item(),
                }
    return rows


def frozen_response_logps(
    model: nn.Module,
    responses: list[dict[str, Any]],
    dtype: torch.dtype,
    device: str,
    batch_size: int,
) -> list[float]:
    """log pi(y|x), nats, of rows of the table `responses` under a frozen model, in their order.

    Responses of similar lengths are computed together. A log-probability that is not finite is a
    UserError that names the prompt and the sample.
    """
    logps = [0.0] * len(responses)
    lengths = [len(row["prompt_token_ids"]) + len(row["token_ids"]) for row in responses]
    with torch.inference_mode(), forward_precision(device, dtype):
        for batch in progress(_batches(lengths, batch_size), "log-probabilities of responses"):
            rows = [responses[index] for index in batch]
            prompts = [row["prompt_token_ids"] for row in rows]
            inputs = _on_device(collate(prompts, [row["token_ids"] for row in rows]), device)
            batch_logps = response_logps(model, inputs).cpu()
            names = [f"sample {row['sample_id']} of prompt {row['prompt_id']}" for row in rows]
            check_finite(batch_logps, names, "log-probability under the policy")
            for index, logp in zip(batch, batch_logps.tolist(), strict=True):
                logps[index] = logp
    return logps


def _on_device(batch: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    return {name: values.to(device) for name, values in batch.items()}


def check_finite(values: Tensor, names: list[str], what: str) -> None:
    """Raise a UserError that names the first of `values` (B,) that is NaN or infinite."""
    finite = values.isfinite().tolist()
    if not all(finite):
        first = finite.index(False)
        raise UserError(
            f"the {what} of {names[first]} is {values[first].item()}; the policy's weights are "
            "damaged or overflow: check the policy, or set precision: float32"
        )
