"""How the pairs of an optimiser step are divided into forward passes, over all processes.

All passes of a step that run at the same time should take equally long, because processes wait for
each other, and a batch should have little padding. A limit of tokens gives long pairs small batches
and short pairs large ones. With padding, a micro-batch contains pairs of similar length. With
packing it can contain any pairs, so micro-batches can have nearly equal numbers of tokens.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

from sppo.training.lengths import Pair

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
    most = max(len(groups) for groups in filled)
    most += -most % processes
    neighbours = [_extended(groups, most, tokens) for groups in filled]
    if processes == 1:
        return neighbours
    for number in range(processes, most + 1, processes):
        spread = [_extended(_spread(step, number, tokens), number, tokens) for step in steps]
        if all(len(group) == 1 or fits(group) for groups in spread for group in groups):
            ways = (neighbours, spread)
            return min(ways, key=lambda way: sum(_longest_path(g, processes, tokens) for g in way))
    return neighbours


def _filled(pairs: Sequence[Pair], fits: Callable[[MicroBatch], bool]) -> list[MicroBatch]:
    """The fewest micro-batches of neighbours that fit."""
    groups: list[MicroBatch] = []
    for pair in pairs:
        if groups and fits([*groups[-1], pair]):
            groups[-1].append(pair)
        else:
            groups.append([pair])
    return groups


def _spread(
    pairs: Sequence[Pair], number: int, tokens: Callable[[MicroBatch], int]
) -> list[MicroBatch]:
    """At most `number` micro-batches: each pair, the longest first, joins the smallest one."""
    groups: list[MicroBatch] = [[] for _ in range(min(number, len(pairs)))]
    sizes = [(0, index) for index in range(len(groups))]  # a heap
    for pair in pairs:
        _, index = heapq.heappop(sizes)
        groups[index].append(pair)
        heapq.heappush(sizes, (tokens(groups[index]), index))
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
    return {
        "padded_share": own / sum(tokens(group) for group in groups),
        "balanced_share": own / (processes * _longest_path(groups, processes, tokens)),
    }


def _longest_path(
    groups: Sequence[MicroBatch], processes: int, tokens: Callable[[MicroBatch], int]
) -> int:
    """The sum over passes of the tokens of the largest micro-batch that is computed in the pass."""
    sizes = [tokens(group) for group in groups]
    return sum(max(sizes[start : start + processes]) for start in range(0, len(sizes), processes))
