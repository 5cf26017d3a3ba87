"""How the pairs of an optimiser step are divided into forward passes, over all processes.

All passes of a step that run at the same time should take equally long, because processes wait for
each other, and a batch should have little padding. So the pairs of a step are sorted by length, and
a micro-batch has as many neighbours as its limit allows: a number of pairs, or of tokens. With a
limit of tokens, long pairs have small batches and short pairs large ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Pair = dict[str, Any]
MicroBatch = list[Pair]


def divided(
    steps: Sequence[Sequence[Pair]],
    processes: int,
    most_pairs: int,
    most_tokens: int | None,
    tokens: Callable[[MicroBatch], int],
) -> list[list[MicroBatch]]:
    """The micro-batches of each step: a multiple of `processes`, and equally many in every step.

    Args:
        steps: the pairs of each step, the longest first.
        processes: number of processes. Number p computes micro-batch p, p + processes, ...
        most_pairs: the largest number of pairs in a micro-batch; used if `most_tokens` is None.
        most_tokens: the largest number of tokens; a pair that alone has more is a micro-batch.
        tokens: the tokens that a pass over a micro-batch computes, with padding.

    Each step has its pairs once. Where pairs are missing, one is repeated with weight 0.
    """

    def fits(group: MicroBatch) -> bool:
        return len(group) <= most_pairs if most_tokens is None else tokens(group) <= most_tokens

    filled = [_filled(step, fits) for step in steps]
    number = max(len(groups) for groups in filled)
    number += -number % processes
    return [_extended(groups, number, tokens) for groups in filled]


def _filled(pairs: Sequence[Pair], fits: Callable[[MicroBatch], bool]) -> list[MicroBatch]:
    """The fewest micro-batches of neighbours that fit."""
    groups: list[MicroBatch] = []
    for pair in pairs:
        if groups and fits([*groups[-1], pair]):
            groups[-1].append(pair)
        else:
            groups.append([pair])
    return groups


def _extended(
    groups: list[MicroBatch], number: int, tokens: Callable[[MicroBatch], int]
) -> list[MicroBatch]:
    """`number` micro-batches, the one with most tokens first: large ones are halved."""
    groups = list(groups)
    while len(groups) < number:
        largest = max(
            (index for index, group in enumerate(groups) if len(group) > 1),
            key=lambda index: tokens(groups[index]),
            default=None,
        )
        if largest is None:
            groups.append([groups[-1][-1] | {"weight": 0.0}])
            continue
        group = groups[largest]
        middle = len(group) // 2
        groups[largest : largest + 1] = [group[:middle], group[middle:]]
    return sorted(groups, key=tokens, reverse=True)


def efficiency(
    groups: Sequence[MicroBatch],
    processes: int,
    tokens: Callable[[MicroBatch], int],
    needed: Callable[[Pair], int],
) -> dict[str, float]:
    """How much of a step's computation is for its pairs' own tokens.

    Args:
        groups: the micro-batches of the step, from `divided`.
        processes: number of processes.
        tokens: the tokens that a pass over a micro-batch computes, with padding.
        needed: the tokens of a pair, without padding.

    Returns `padded_share`, needed tokens over computed ones, and `balanced_share`, needed tokens
    over those that all processes could compute while the slowest one does: processes x the sum over
    passes of the largest micro-batch.
    """
    own = sum(needed(pair) for group in groups for pair in group if pair.get("weight", 1.0))
    sizes = [tokens(group) for group in groups]
    passes = [sizes[start : start + processes] for start in range(0, len(sizes), processes)]
    return {
        "padded_share": own / sum(sizes),
        "balanced_share": own / (processes * sum(max(each) for each in passes)),
    }
