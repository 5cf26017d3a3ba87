"""Chats as token ids, and hidden states, for preference models that are language models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sppo.core.errors import UserError
from sppo.core.progress import progress
from sppo.policies.chats import (
    context_length,
    control_tokens,
    load_tokenizer,
    render_chat,
    without_control_tokens,
)
from sppo.policies.padding import padded
from sppo.preferences.base import ComparisonError
from sppo.preferences.length_batches import batches

Sequences = list[list[int]]


class ChatReader:
    """The tokenizer of a preference model's folder. UserError if it has no chat template."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = load_tokenizer(folder)
        self.controls = control_tokens(self.tokenizer)
        self.context = context_length(folder)

    def safe(self, chat: list[dict[str, str]]) -> list[dict[str, str]]:
        """The chat, with a space in each control token that a text spells out."""
        return [
            message | {"content": without_control_tokens(self.controls, message["content"])}
            for message in chat
        ]

    def rendered(self, index: int, chat: list[dict[str, str]], answer_next: bool) -> str:
        """The chat's text. index: of the group, for a `ComparisonError`."""
        try:
            return render_chat(self.tokenizer, chat, answer_next=answer_next)
        except UserError as error:
            raise ComparisonError(index, str(error)) from None

    def ids(self, index: int, text: str, add_special_tokens: bool = False) -> list[int]:
        """The token ids of a rendered chat. `ComparisonError` if the model cannot read so many."""
        ids = self.tokenizer(text, add_special_tokens=add_special_tokens).input_ids
        if self.context is not None and len(ids) > self.context:
            raise ComparisonError(
                index,
                f"a comparison has {len(ids)} tokens, but the model reads {self.context}; lower"
                " responses.max_new_tokens or prompts.max_tokens",
            )
        return ids


@torch.inference_mode()
def states_at(
    backbone: Any, sequences: Sequences, places: list[list[int]], budget: int, device: str
) -> list[Tensor]:
    """The last hidden states of a causal model at some tokens of each sequence.

    Args:
        backbone: the model without its head.
        sequences: token ids.
        places: the positions in each sequence.
        budget: the most tokens in a pass, with padding.
        device: cpu, cuda or mps.

    Returns (number of places, width) for each sequence, float32, on the CPU.
    """
    found: list[Tensor] = [torch.empty(0)] * len(sequences)
    work = batches([len(ids) for ids in sequences], budget)
    for batch in progress(work, "compare") if len(work) > 1 else work:
        ids, mask = padded([sequences[index] for index in batch], 0, device)
        states = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        for row, index in enumerate(batch):
            found[index] = states[row, places[index]].float().cpu()
    return found
