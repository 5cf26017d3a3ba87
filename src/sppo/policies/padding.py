"""Sequences of token ids with different lengths as a matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def padded(
    sequences: Sequence[Sequence[int]],
    value: int,
    device: str = "cpu",
    side: Literal["left", "right"] = "right",
) -> tuple[Tensor, Tensor]:
    """B sequences padded with `value` to the longest, and their attention mask, both (B, L), int64.

    The mask is 1 at tokens and 0 at padding, whatever `value` is.
    """
    # Without the type, an empty sequence would be float32.
    rows = [torch.tensor(tokens, dtype=torch.long) for tokens in sequences]
    ones = [torch.ones_like(row) for row in rows]
    ids = pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)
    mask = pad_sequence(ones, batch_first=True, padding_side=side)
    return ids.to(device), mask.to(device)
