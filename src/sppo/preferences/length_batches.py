"""Batches of sequences with similar lengths, for models that read text."""

from __future__ import annotations


def batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices into `lengths` in batches, the longest first.

    The padded size of a batch is at most `budget`, unless a batch has only one element.
    """
    found: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        # The first element of a batch is its longest.
        if found and (len(found[-1]) + 1) * lengths[found[-1][0]] <= budget:
            found[-1].append(index)
        else:
            found.append([index])
    return found
