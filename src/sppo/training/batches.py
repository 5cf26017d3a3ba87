"""Token ids of prompts and responses as batches, in three layouts.

Padded: each row is a prompt and one response, padded on the right, without an attention mask. In a
causal model no token attends to later tokens, so padding does not change the result. Without a
mask, attention kernels use their causal implementation. With one, cuDNN's backward pass can give
NaN, see `avoid_cudnn_attention`.

Packed: the same sequences one after the other in a single row, without padding. Positions restart
at 0 in each sequence, and tokens attend only within their own sequence.

Shared: each row is a prompt, its chosen and its rejected response, so the prompt is computed once.
A mask hides the chosen response from the rejected one, whose positions follow the prompt.

Scoring and training use the same layout, see `choose_layout`. All give the same log-probabilities
up to rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sppo.policies.devices import avoid_cudnn_attention
from sppo.policies.padding import padded
from sppo.training import attention
from sppo.training.lengths import Layout, Pair, sharing_pays

Tokens = Sequence[int]
Batch = dict[str, Any]

# Models whose layers take `position_ids`, and either a mask (B, 1, L, L) or the ends of packed
# sequences. Tests compare each layout of each of them with single sequences.
MODELS = frozenset({"llama", "mistral", "qwen2", "qwen3"})
# A model that limits its attention logits (soft cap) can be packed, but not share prompts.
CAPPED_MODELS = frozenset({"gemma2"})


def choose_layout(model: nn.Module, device: str) -> Layout:
    """The layout for passes of this model, whose attention is prepared for it.

    A CPU shares prompts. A GPU packs sequences. In a check of 8 layers on an H200, packed sequences
    of random lengths gave 1.6 times as many tokens per second as padded ones (docs/performance.md).
    A model with another attention implementation than transformers' choice is padded. That choice
    is SDPA, and eager attention for a soft cap.

    Args:
        model: the policy, before it is wrapped for several processes or LoRA.
        device: cpu, cuda or mps.
    """
    if not isinstance(model, PreTrainedModel):
        return "padded"
    config: Any = model.config
    implementation = config._attn_implementation
    known = config.model_type in MODELS and implementation in ("sdpa", *attention.OURS)
    capped = config.model_type in CAPPED_MODELS and implementation in ("eager", *attention.OURS)
    has_window = getattr(config, "sliding_window", None) is not None
    if device == "cpu" and known and not has_window:
        attention.use(model, attention.SHARED)
        return "shared"
    if device == "cuda" and has_window:
        avoid_cudnn_attention()  # a window needs a mask wherever no kernel has windows
    if device == "cuda" and (known or capped):
        attention.use(model, attention.PACKED)
        return "packed"
    return "padded"


def collate(prompts: Sequence[Tokens], responses: Sequence[Tokens]) -> Batch:
    """The padded layout of R sequences.

    Returns
        input_ids: (R, L), each row a prompt and its response.
        reads: (N,), the positions in the flattened ids that predict the N response tokens.
        response_ids: (R, M), the response tokens, padded on the right.
        slots: (N,), the positions of the response tokens in the flattened `response_ids`.

    Positions are computed from lengths. Comparing ids with the id of the padding would be wrong,
    because many models use EOS as padding.
    """
    ids, _ = padded([[*p, *r] for p, r in zip(prompts, responses, strict=True)], 0)
    begins = [row * ids.shape[1] + len(prompt) for row, prompt in enumerate(prompts)]
    return {"input_ids": ids, **_response_fields(responses, begins)}


def collate_packed(prompts: Sequence[Tokens], responses: Sequence[Tokens]) -> Batch:
    """The packed layout of R sequences with T tokens together.

    Returns what `collate` does, with `input_ids` (1, T), and
        position_ids: (1, T), of each token in its own sequence.
        cu_seqlens: (R + 1,), int32, 0 and where each sequence ends.
        ends: the same numbers as a list.
    """
    sequences = [[*p, *r] for p, r in zip(prompts, responses, strict=True)]
    lengths = [len(sequence) for sequence in sequences]
    ends = [0, *itertools.accumulate(lengths)]
    begins = [start + len(prompt) for start, prompt in zip(ends[:-1], prompts, strict=True)]
    return {
        "input_ids": torch.tensor([[token for sequence in sequences for token in sequence]]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seqlens": torch.tensor(ends, dtype=torch.int32),
        "ends": ends,
        **_response_fields(responses, begins),
    }


def collate_shared(
    prompts: Sequence[Tokens], chosen: Sequence[Tokens], rejected: Sequence[Tokens]
) -> Batch:
    """The shared layout of B pairs; the 2B responses are all chosen, then all rejected ones.

    Returns what `collate` does, with `input_ids` (B, L), and
        position_ids: (B, L), of each token in its own sequence.
        segment_ids: (B, L), 1 for tokens of chosen responses, 2 for those of rejected ones, 0 for
            those of prompts and for padding.
    """
    rows = list(zip(prompts, chosen, rejected, strict=True))
    ids, _ = padded([[*prompt, *first, *second] for prompt, first, second in rows], 0)
    positions = torch.zeros_like(ids)
    segment_ids = torch.zeros_like(ids)
    ends_of_prompts = []
    begins: dict[int, list[int]] = {1: [], 2: []}
    for row, (prompt, *responses) in enumerate(rows):
        start = row * ids.shape[1]
        positions[row, : len(prompt)] = torch.arange(len(prompt))
        ends_of_prompts.append(start + len(prompt) - 1)
        begin = len(prompt)
        for segment, response in enumerate(responses, 1):
            own = slice(begin, begin + len(response))
            positions[row, own] = torch.arange(len(response)) + len(prompt)
            segment_ids[row, own] = segment
            begins[segment].append(start + begin)
            begin += len(response)
    return {
        "input_ids": ids,
        "position_ids": positions,
        "segment_ids": segment_ids,
        # The prompt's end predicts the first token of both responses.
        **_response_fields([*chosen, *rejected], begins[1] + begins[2], ends_of_prompts * 2),
    }


def _response_fields(
    responses: Sequence[Tokens], begins: list[int], before: list[int] | None = None
) -> Batch:
    """`reads`, `response_ids` and `slots`, see `collate`.

    Args:
        responses: the token ids of each response.
        begins: the position of each response's first token in the flattened ids.
        before: the position that predicts it; the one before it if None.
    """
    response_ids, _ = padded(responses, 0)
    reads, slots = [], []
    for number, (response, begin) in enumerate(zip(responses, begins, strict=True)):
        places = torch.arange(len(response))
        own_reads = places + begin - 1
        if before is not None:
            own_reads[:1] = before[number]
        reads.append(own_reads)
        slots.append(places + number * response_ids.shape[1])
    return {
        "reads": torch.cat(reads),
        "response_ids": response_ids,
        "slots": torch.cat(slots),
    }


def attention_mask(segment_ids: Tensor) -> Tensor:
    """Which tokens (last axis) each token attends to: (B, 1, L, L), bool, from (B, L).

    Earlier tokens of the prompt and of the same response. Padding attends to the prompt, so no row
    is empty.
    """
    own = segment_ids[:, None, :] == segment_ids[:, :, None]
    of_prompt = segment_ids[:, None, :] == 0
    return (own | of_prompt).tril()[:, None]


def sequence_batch(prompts: Sequence[Tokens], responses: Sequence[Tokens], layout: Layout) -> Batch:
    """Sequences that are not pairs, packed or padded."""
    return (collate_packed if layout == "packed" else collate)(prompts, responses)


def pair_batch(pairs: Sequence[Pair], layout: Layout) -> Batch:
    """B rows of the table `pairs`; the 2B responses are all chosen, then all rejected ones.

    In the layout `shared`, prompts are shared only where it pays.
    """
    prompts, chosen, rejected = (
        [pair[f"{part}_token_ids"] for pair in pairs] for part in ("prompt", "chosen", "rejected")
    )
    if layout == "shared" and sharing_pays(pairs):
        return collate_shared(prompts, chosen, rejected)
    return sequence_batch(prompts + prompts, chosen + rejected, layout)
