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
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
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
    ends: Sequence[int] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each of R sequences that are packed into one row.

    PyTorch's kernel for packed sequences computes them together. Where it cannot be used, each
    sequence is computed by itself, with transformers' functions.

    Args:
        module: the layer.
        query: (1, heads, T, D).
        key: (1, key heads, T, D).
        value: (1, key heads, T, D).
        attention_mask: None.
        scaling: the factor of the products of queries and keys; None for 1 / sqrt(D).
        sliding_window: the number of tokens that a token attends to, itself included; None for all.
        softcap: the limit of the products, as in Gemma-2; None for no limit.
        cu_seq_lens_q: (R + 1,), int32, 0 and where each sequence ends.
        ends: the same numbers, known without waiting for the GPU.
        options: other arguments of transformers, which only its own functions use.

    Returns the output (1, T, heads, D) and None. RuntimeError if the row is not packed.
    """
    if cu_seq_lens_q is None or ends is None:
        raise RuntimeError("a model whose sequences are packed was given rows that are not")
    # Rotary embeddings are float32 under autocast.
    query, key = query.to(value.dtype), key.to(value.dtype)
    lengths = [end - start for start, end in zip(ends[:-1], ends[1:], strict=True)]
    if softcap is None and query.is_cuda and _kernel_takes(query, sliding_window):
        states = (query, key, value)
        return _varlen(states, cu_seq_lens_q, max(lengths), scaling, sliding_window), None
    forward: Callable[..., tuple[Tensor, Any]]
    forward = sdpa_attention_forward if softcap is None else eager_attention_forward
    outputs = []
    # Slices would cost a gradient of all tokens for each sequence.
    parts = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    for length, (q, k, v) in zip(lengths, parts, strict=True):
        is_cut = sliding_window is not None and length > sliding_window
        # Without a mask, SDPA is causal.
        mask = _mask(length, sliding_window, query) if is_cut or softcap is not None else None
        outputs.append(forward(module, q, k, v, mask, scaling=scaling, softcap=softcap)[0])
    return torch.cat(outputs, dim=1), None


def _mask(length: int, window: int | None, like: Tensor) -> Tensor:
    """(L, L), what is added to the products: -inf, nearly, where a token does not attend."""
    every = torch.ones(length, length, dtype=torch.bool, device=like.device)
    hidden = every.triu(1)
    if window is not None:
        hidden |= every.tril(-window)
    lowest = torch.finfo(like.dtype).min
    return torch.zeros_like(hidden, dtype=like.dtype).masked_fill(hidden, lowest)


def _kernel_takes(query: Tensor, window: int | None) -> bool:
    """Whether PyTorch's kernel for packed sequences can compute this on this GPU.

    The kernel is FlashAttention. PyTorch has it for NVIDIA's GPUs from Ampere on, in 16 bits, for
    heads of up to 256 numbers.
    """
    width = query.shape[-1]
    return (
        torch.version.hip is None
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and query.dtype != torch.float32
        and width <= 256
        and width % 8 == 0
        and (window is None or "window_size" in _parameters_of_varlen())
    )


def _varlen(
    states: tuple[Tensor, Tensor, Tensor],
    cu_seqlens: Tensor,
    max_seqlen: int,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """`packed_attention` with PyTorch's kernel. states: queries, keys and values."""
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = states
    known = _parameters_of_varlen()
    options: dict[str, Any] = {"is_causal": True}  # older versions
    if "window_size" in known:
        # Before and after a token, without the token itself; -1: no limit.
        options = {"window_size": (-1 if window is None else window - 1, 0)}
    shared = query.shape[1] // key.shape[1]
    if "enable_gqa" in known:
        options["enable_gqa"] = shared > 1
    else:
        key, value = repeat_kv(key, shared), repeat_kv(value, shared)
    query, key, value = (each[0].transpose(0, 1).contiguous() for each in (query, key, value))
    output: Any = varlen_attn(
        query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scaling, **options
    )
    return output[None]


@functools.cache
def _parameters_of_varlen() -> frozenset[str]:
    """The names of varlen_attn's parameters, which differ between versions of PyTorch."""
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)
