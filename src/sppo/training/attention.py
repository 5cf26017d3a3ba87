"""Attention for scoring and training, where PyTorch's default is slow or cannot be used.

`SHARED`, on a CPU: the backward pass of PyTorch's fused attention takes a fifth of a training step.
Written as matrix products it takes a quarter of that time, because the heads that share keys are
computed together. But it keeps the attention weights for the backward pass, so it is only for short
rows. Scoring uses it too, so that the first training step computes the reference's numbers.

`PACKED`, on a GPU: attention inside each of the sequences that are packed into one row, also with
a sliding window or Gemma-2's soft cap.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

SHARED = "sppo_shared"
PACKED = "sppo_packed"
OURS = (SHARED, PACKED)
# In a row of 256 tokens, the kept weights take as much memory as the row's other activations.
LONGEST_ROW = 256


def use(model: PreTrainedModel, name: str) -> None:
    """Let a model use `SHARED` or `PACKED`."""
    AttentionInterface.register(SHARED, shared_attention)
    AttentionMaskInterface.register(SHARED, sdpa_mask)
    # Without a mask function of this name, transformers makes no mask.
    AttentionInterface.register(PACKED, packed_attention)
    model.set_attn_implementation(name)


def shared_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: matrix products for short rows with a mask.

    Args:
        module: the layer.
        query: (B, heads, L, D).
        key: (B, key heads, L, D); `heads / key heads` heads share one.
        value: (B, key heads, L, D).
        attention_mask: (B, 1, L, L), bool, true where a query (row) sees a key (column).
        scaling: the factor of the products of queries and keys; None for 1 / sqrt(D).
        options: other arguments of transformers, which only its own function uses.

    Returns the output (B, L, heads, D) and, instead of attention weights, None.
    """
    batch, heads, length, width = query.shape
    is_short = 1 < length == key.shape[2] <= LONGEST_ROW
    if attention_mask is None or attention_mask.dtype != torch.bool or not is_short:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
    scale = width**-0.5 if scaling is None else scaling
    shared = heads // key.shape[1]
    with torch.autocast("cpu", enabled=False):  # The products are in float32.
        queries = query.float().reshape(batch, -1, shared * length, width) * scale
        scores = queries @ key.float().transpose(2, 3)
        scores = scores.view(batch, -1, shared, length, length)
        hidden = ~attention_mask[:, :, None]
        weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
        output = weights.view(batch, -1, shared * length, length) @ value.float()
    return output.view(batch, heads, length, width).transpose(1, 2).to(query.dtype), None


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    ends: Sequence[int] = (),
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each of R sequences that are packed into one row.

    PyTorch's kernel for packed sequences computes them together. Where it cannot be used, each
    sequence is computed by itself.

    Args:
        module: the layer.
        query: (1, heads, T, D).
        key: (1, key heads, T, D).
        value: (1, key heads, T, D).
        attention_mask: None.
        scaling: the factor of the products of queries and keys; None for 1 / sqrt(D).
        sliding_window: the number of tokens that a token attends to, itself included; None for all.
        softcap: the limit of the products, as in Gemma-2; None for no limit.
        cu_seq_lens_q: (R + 1,), int32, 0 and where each sequence ends. None in a pass whose rows
            are not packed.
        max_length_q: the number of tokens of the longest sequence.
        ends: the numbers of `cu_seq_lens_q`, known without waiting for the GPU.
        options: other arguments of transformers, which only its own function uses.

    Returns the output (1, T, heads, D) and None.
    """
    # Rotary embeddings are float32 under autocast.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if cu_seq_lens_q is None:  # one sequence in each row
        ends, max_length_q = (0, query.shape[2]), query.shape[2]
    needs_mask = sliding_window is not None and max_length_q > sliding_window
    is_plain = softcap is None and not needs_mask
    if cu_seq_lens_q is not None and is_plain and query.is_cuda and _kernel_takes(query):
        return _varlen(query, key, value, cu_seq_lens_q, max_length_q, scaling), None
    mask = None if is_plain else _mask(max_length_q, sliding_window, query)
    outputs = []
    for start, end in zip(ends[:-1], ends[1:], strict=True):
        states = [each[:, :, start:end] for each in (query, key, value)]
        own = None if mask is None else mask[: end - start, : end - start]
        outputs.append(_one_sequence(module, states, own, scaling, softcap))
    return torch.cat(outputs, dim=1), None


def _mask(length: int, window: int | None, like: Tensor) -> Tensor:
    """(L, L), what is added to the products: -inf, nearly, where a token does not attend."""
    every = torch.ones(length, length, dtype=torch.bool, device=like.device)
    hidden = every.triu(1)
    if window is not None:
        hidden |= every.tril(-window)
    lowest = torch.finfo(like.dtype).min
    return torch.zeros_like(hidden, dtype=like.dtype).masked_fill(hidden, lowest)


def _one_sequence(
    module: nn.Module,
    states: list[Tensor],
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """Causal attention, (B, L, heads, D). mask: from `_mask`, needed with a window or soft cap."""
    query, key, value = states
    if softcap is not None:
        output, _ = eager_attention_forward(
            module, query, key, value, mask, scaling=scaling, softcap=softcap
        )
        return output
    output = functional.scaled_dot_product_attention(
        query, key, value, mask, is_causal=mask is None, scale=scaling, enable_gqa=True
    )
    return output.transpose(1, 2)


def _kernel_takes(query: Tensor) -> bool:
    """Whether PyTorch's kernel for packed sequences can compute this on this GPU.

    The kernel is FlashAttention. PyTorch has it for NVIDIA's GPUs from Ampere on, in 16 bits, for
    heads of up to 256 numbers.
    """
    width = query.shape[-1]
    has_kernel = torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 0)
    return has_kernel and query.dtype != torch.float32 and width <= 256 and width % 8 == 0


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scaling: float | None,
) -> Tensor:
    """`packed_attention` with PyTorch's kernel."""
    from torch.nn.attention.varlen import varlen_attn

    options = _causal_options()
    if "enable_gqa" not in options:
        shared = query.shape[1] // key.shape[1]
        key = key.repeat_interleave(shared, dim=1)
        value = value.repeat_interleave(shared, dim=1)
    query, key, value = (states[0].transpose(0, 1).contiguous() for states in (query, key, value))
    output: Any = varlen_attn(
        query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scaling, **options
    )
    return output[None]


@functools.cache
def _causal_options() -> dict[str, Any]:
    """What tells varlen_attn that attention is causal and heads share keys.

    PyTorch 2.11, on which benchmarks/gpu_check.py runs too, has other names than 2.13.
    """
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    causal = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
    return causal | ({"enable_gqa": True} if "enable_gqa" in known else {})
