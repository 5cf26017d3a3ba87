"""The division of steps into micro-batches: complete, within limits, and balanced."""

from __future__ import annotations

import math
import random

import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, SequentialSampler

from sppo.training.lengths import (
    computed_tokens,
    needed_tokens,
    pair_length,
    sequence_tokens,
)
from sppo.training.micro_batches import divided, efficiency


def tokens(group: list[dict]) -> int:
    return computed_tokens(group, "padded")


def random_steps(pairs: int, batch: int) -> list[list[dict]]:
    """Pairs with lengths as in chats: most are short, a few are ten times as long."""
    draw = random.Random(0)

    def length(median: float) -> int:
        return max(1, round(draw.lognormvariate(0, 0.8) * median))

    rows = [
        {
            "pair_id": number,
            "prompt_token_ids": [1] * length(100),
            "chosen_token_ids": [1] * length(250),
            "rejected_token_ids": [1] * length(250),
        }
        for number in range(pairs)
    ]
    steps = [rows[start : start + batch] for start in range(0, pairs, batch)]
    return [sorted(step, key=pair_length, reverse=True) for step in steps]


@pytest.mark.parametrize("processes", [1, 2, 8])
@pytest.mark.parametrize(("most_pairs", "most_tokens"), [(1, None), (4, None), (9, 4096), (9, 50)])
def test_each_step_has_its_pairs_once_within_the_limit(processes, most_pairs, most_tokens):
    steps = random_steps(75, 16)  # the last step has 11 pairs
    found = divided(steps, processes, most_pairs, most_tokens, tokens)
    numbers = {len(groups) for groups in found}
    assert len(numbers) == 1, "all steps have one gradient accumulation"
    assert numbers.pop() % processes == 0, "one process would wait forever"
    for step, groups in zip(steps, found, strict=True):
        counted = [pair["pair_id"] for group in groups for pair in group if pair.get("weight", 1.0)]
        assert sorted(counted) == sorted(pair["pair_id"] for pair in step)
        assert all(groups)
        sizes = [tokens(group) for group in groups]
        assert sizes == sorted(sizes, reverse=True)
        for group, size in zip(groups, sizes, strict=True):
            if most_tokens is None:
                assert len(group) <= most_pairs
            else:
                assert size <= most_tokens or len(group) == 1


def test_processes_compute_similar_sizes_at_a_time():
    """accelerate gives process p the micro-batches p, p + 2, ..."""
    (groups,) = divided(random_steps(16, 16), 2, 2, None, tokens)
    sizes = [tokens(group) for group in groups]
    together = [abs(a - b) for a, b in zip(sizes[::2], sizes[1::2])]
    halves = [abs(a - b) for a, b in zip(sizes[: len(sizes) // 2], sizes[len(sizes) // 2 :])]
    assert sum(together) < sum(halves) / 2
    batches = BatchSampler(SequentialSampler(groups), 1, drop_last=False)
    shares = [[i for (i,) in BatchSamplerShard(batches, 2, rank)] for rank in range(2)]
    assert shares == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_packed_pairs_are_spread_evenly_over_processes():
    """Eight processes wait for less than 5% of the time, in as few passes as the limit allows."""

    def packed(group: list[dict]) -> int:
        return computed_tokens(group, "packed")

    steps = random_steps(512, 64)
    found = divided(steps, 8, 4, 8192, packed)
    fewest = max(sum(packed([pair]) for pair in step) for step in steps) / 8192
    assert len(found[0]) == 8 * math.ceil(fewest / 8)
    assert all(packed(group) <= 8192 for groups in found for group in groups)
    for groups in found:
        assert efficiency(groups, 8, packed, sequence_tokens)["balanced_share"] > 0.95


@pytest.mark.parametrize(
    ("layout", "most_tokens", "share"),
    [
        ("padded", None, 0.32),
        ("padded", 8192, 0.54),
        ("packed", None, 0.55),
        ("packed", 8192, 0.84),
    ],
)
def test_balanced_share_is_as_documented(layout, most_tokens, share):
    """The table of docs/performance.md."""

    def size(group: list[dict]) -> int:
        return computed_tokens(group, layout)

    steps = random_steps(2048, 64)
    found = divided(steps, 8, 4, most_tokens, size)
    shares = [efficiency(groups, 8, size, needed_tokens)["balanced_share"] for groups in found]
    assert sum(shares) / len(shares) == pytest.approx(share, abs=0.006)


def test_a_limit_of_tokens_leaves_less_padding_and_waiting():
    """On eight processes, against micro-batches of four pairs."""
    steps = random_steps(512, 64)

    def mean(most_tokens: int | None, name: str) -> float:
        found = divided(steps, 8, 4, most_tokens, tokens)
        shares = [efficiency(groups, 8, tokens, needed_tokens)[name] for groups in found]
        return sum(shares) / len(shares)

    assert mean(4096, "padded_share") > mean(None, "padded_share")
    assert mean(4096, "balanced_share") > 1.5 * mean(None, "balanced_share")


def test_efficiency_counts_padding_and_waiting():
    long, short = (
        {"prompt_token_ids": [], "chosen_token_ids": [1] * n, "rejected_token_ids": [1] * n}
        for n in (30, 10)
    )
    found = efficiency([[long], [short, short], [short, short]], 3, tokens, needed_tokens)
    # No padding: 60 + 40 + 40 tokens. Three processes could compute 3 x 60 at the same time.
    assert found == {"padded_share": 140 / 140, "balanced_share": 140 / 180}
    repeated = short | {"weight": 0.0}
    found = efficiency([[long, short], [repeated]], 2, tokens, needed_tokens)
    assert found == {"padded_share": 80 / (120 + 20), "balanced_share": 80 / 240}
