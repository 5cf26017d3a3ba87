"""Lengths of pairs, and the tokens that a pass over them computes; imports nothing heavy.

`batches.py` describes the layouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

Pair = dict[str, Any]
Layout = Literal["padded", "packed", "shared"]

# Sharing pays if at most this share of the tokens is left. Attention with a mask takes longer than
# causal attention. On two cores, a step of the demo takes 0.7 to 0.8 of the time, one with prompts
# of 600 and responses of 512 tokens the same time, though it has 0.73 of the tokens
# (benchmarks/shared_prompts.py).
SHARING_PAYS = 0.8


def sharing_pays(pairs: Sequence[Pair]) -> bool:
    """Whether these pairs have enough fewer tokens, with padding, if they share prompts."""
    return _longest_shared(pairs) <= SHARING_PAYS * 2 * _longest_separate(pairs)


def computed_tokens(pairs: Sequence[Pair], layout: Layout) -> int:
    """The tokens that a pass over these pairs computes, with padding, see `pair_batch`."""
    if layout == "packed":
        return sum(sequence_tokens(pair) for pair in pairs)
    if layout == "shared" and sharing_pays(pairs):
        return len(pairs) * _longest_shared(pairs)
    return 2 * len(pairs) * _longest_separate(pairs)


def needed_tokens(pair: Pair) -> int:
    """The tokens of a pair, with its prompt once."""
    return sum(len(pair[f"{part}_token_ids"]) for part in ("prompt", "chosen", "rejected"))


def sequence_tokens(pair: Pair) -> int:
    """The tokens of both sequences of a pair, each with the prompt."""
    return needed_tokens(pair) + len(pair["prompt_token_ids"])


def pair_length(pair: Pair) -> int:
    """The number of tokens of the longer sequence of a pair, with the prompt."""
    longer = max(len(pair["chosen_token_ids"]), len(pair["rejected_token_ids"]))
    return len(pair["prompt_token_ids"]) + longer


def _longest_shared(pairs: Sequence[Pair]) -> int:
    return max(needed_tokens(pair) for pair in pairs)


def _longest_separate(pairs: Sequence[Pair]) -> int:
    return max(pair_length(pair) for pair in pairs)
