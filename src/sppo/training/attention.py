"""Attention for training on a CPU: faster than PyTorch's kernel for short rows with a mask.

The backward pass of PyTorch's fused attention takes a fifth of a training step on a CPU. Written as
matrix products it takes a quarter of that time, because the heads that share keys are computed
together. But it keeps the attention weights for the backward pass, so it is only for short rows.
Scoring uses it too, so that the first training step computes the reference's numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sppo_cpu"
# In a row of 256 tokens, the kept weights take as much memory as the row's other activations.
LONGEST_ROW = 256


def use_products(model: PreTrainedModel) -> None:
    """Let a model that uses PyTorch's fused attention use this one where it is faster."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it.

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
