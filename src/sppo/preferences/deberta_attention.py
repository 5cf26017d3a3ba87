"""Attention of DeBERTa-v3 without gathering, for bfloat16.

Source: DeBERTa, He et al. 2020, arXiv 2006.03654, eq. (4): the score of query i and key j is

    (q_i . k_j + q_i . r_(i-j) + k_j . s_(i-j)) / sqrt(3 D)

where r and s are keys and queries of relative positions. The class of transformers multiplies q and
k by all positions that have an embedding, and then gathers one product for each i and j. That takes
a third of PairRM's time on a CPU. Here q and k are multiplied by one row for each distance i - j.
The products that belong to i and j then lie at equal steps in memory, so views replace gathering.

This has more products, which cost little in bfloat16. In float32 it is slower for texts above 500
tokens, so there the class of transformers remains. Both compute the same up to rounding.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import DebertaV2Config, DebertaV2Model
from transformers.models.deberta_v2.modeling_deberta_v2 import (
    DisentangledSelfAttention,
    make_log_bucket_position,
)


class AttentionByDistance(DisentangledSelfAttention):
    """The attention of a layer, with the parameters of the class of transformers."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        output_attentions: bool = False,
        query_states: Tensor | None = None,
        relative_pos: Tensor | None = None,
        rel_embeddings: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """New states (B, L, H D) of H heads of width D.

        Args:
            hidden_states: (B, L, H D).
            attention_mask: (B, 1, L, L), 0 where a key or a query is padding.
            rel_embeddings: (2 S, H D), those of the relative positions -S to S - 1.
            output_attentions, query_states, relative_pos: not used; for the class of transformers.
        """
        assert rel_embeddings is not None
        batch, length, _ = hidden_states.shape
        heads, width = self.num_attention_heads, self.attention_head_size
        q, k, v = (
            projection(hidden_states).view(batch, length, heads, width).permute(2, 0, 1, 3)
            for projection in (self.query_proj, self.key_proj, self.value_proj)
        )  # (H, B, L, D)
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()

        # The distances i - j, from 1 - L to L - 1, and unused ones up to a multiple of 8, which a
        # GPU's fast products need.
        distances = torch.arange(1 - length, length + (1 - 2 * length) % 8, device=q.device)
        half = self.pos_ebd_size

        def by_distance(projection: Any, distances: Tensor) -> Tensor:
            buckets = make_log_bucket_position(
                distances, self.position_buckets, self.max_relative_positions
            )
            rows = (buckets.long() + half).clamp(0, 2 * half - 1)
            positions = projection(rel_embeddings[: 2 * half]) / math.sqrt(3 * width)
            return positions.view(-1, heads, width)[rows].permute(1, 2, 0).contiguous()

        # (H, D, 2 L - 1 or more). The distances of r are in descending order, so that the products
        # of one query with the distances to keys 0 to L - 1 are neighbours.
        r = by_distance(self.key_proj, -distances)
        s = by_distance(self.query_proj, distances)
        keys = attention_mask[:, 0, :1].bool()  # (B, 1, L); the first query is never padding
        states = attend(q, k, v, r, s, None if bool(keys.all()) else ~keys)
        return states.permute(1, 2, 0, 3).reshape(batch, length, -1), None


def attend(q: Tensor, k: Tensor, v: Tensor, r: Tensor, s: Tensor, padding: Tensor | None) -> Tensor:
    """The states (H, B, L, D) of queries, keys and values (H, B, L, D).

    r, s: (H, D, 2 L - 1 or more), for each distance, divided by the scale. padding: (B, 1, L), the
    keys that no query may see.
    """
    heads, batch, length, width = q.shape
    products = r.shape[-1]
    with_r = torch.bmm(q.reshape(heads, -1, width), r)  # (H, B L, products)
    with_s = torch.bmm(k.reshape(heads, -1, width), s)
    # The products of query i and key j are with_r[i, L - 1 + j - i] and with_s[j, L - 1 + i - j].
    shape = (heads * batch, length, length)
    next_text = length * products
    scores = with_s.as_strided(shape, (next_text, 1, products - 1), length - 1).contiguous()
    scores += with_r.as_strided(shape, (next_text, products - 1, 1), length - 1)

    q, k, v = (states.reshape(-1, length, width) for states in (q, k, v))
    scores.baddbmm_(q, k.transpose(1, 2), alpha=1 / math.sqrt(3 * width))
    if padding is not None:
        of_heads = scores.view(heads, batch, length, length)
        of_heads.masked_fill_(padding, torch.finfo(scores.dtype).min)
    return torch.bmm(scores.softmax(-1), v).view(heads, batch, length, width)


def attend_by_distance(model: DebertaV2Model) -> None:
    """Make the layers of a model use `AttentionByDistance`, if they have DeBERTa-v3's positions."""
    if not has_positions_of_v3(model.config):
        return
    for module in model.modules():
        if type(module) is DisentangledSelfAttention:
            module.__class__ = AttentionByDistance


def has_positions_of_v3(config: DebertaV2Config) -> bool:
    """Whether positions are relative, in buckets, and projected like queries and keys."""
    return (
        config.relative_attention
        and getattr(config, "share_att_key", False)
        and getattr(config, "position_buckets", -1) > 0
        and {"c2p", "p2c"} <= set(config.pos_att_type or ())
    )
