"""Permuted and flipped labels: what they keep, and what they change."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from sppo.preferences.estimates import mean_logits, p_hat, win_probabilities, winner_and_loser
from sppo.preferences.labels import relabelled

ESTIMATES = [("pairwise", 0.5), ("pairwise", 1.0), ("blender", 0.5)]


def prompts() -> dict[str, np.ndarray]:
    """Matrices of logits by prompt id: without symmetry, K from 2 to 8, small and large entries."""
    draw = np.random.default_rng(7)
    return {
        f"prompt {number}": draw.normal(scale=10.0 ** (number % 4 - 1), size=(k, k))
        for number, k in enumerate(draw.integers(2, 9, size=60))
    }


def moves(k: int, prompt_id: str, seed: int) -> tuple[int, ...]:
    """The response whose logits each of K responses gets, read off a matrix of K^2 numbers."""
    number = np.arange(k * k, dtype=float).reshape(k, k)
    return tuple(int(value) // k for value in relabelled(number, "permuted", prompt_id, seed)[:, 0])


@pytest.mark.parametrize(("probability", "scale"), ESTIMATES)
def test_permuted_labels_keep_the_values_of_p_hat(probability, scale):
    for prompt_id, logits in prompts().items():
        before = p_hat(win_probabilities(logits, probability, scale))
        permuted = relabelled(logits, "permuted", prompt_id, 0)
        after = p_hat(win_probabilities(permuted, probability, scale))
        # Sums over the responses in another order may differ in their last bits.
        assert sorted(after) == pytest.approx(sorted(before), abs=1e-14)


def test_permuted_labels_are_those_of_permuted_responses():
    """Each entry is a logit of the same two responses, in loops."""
    for prompt_id, logits in prompts().items():
        k = len(logits)
        order = moves(k, prompt_id, 0)
        assert sorted(order) == list(range(k))
        permuted = relabelled(logits, "permuted", prompt_id, 0)
        for i in range(k):
            for j in range(k):
                assert permuted[i, j] == logits[order[i], order[j]]


def test_permutation_depends_on_prompt_and_seed_only():
    ids = [f"prompt {number}" for number in range(40)]
    forwards = {prompt_id: moves(5, prompt_id, 3) for prompt_id in ids}
    backwards = {prompt_id: moves(5, prompt_id, 3) for prompt_id in reversed(ids)}
    assert forwards == backwards
    assert len(set(forwards.values())) > 20  # of 120 permutations
    assert forwards != {prompt_id: moves(5, prompt_id, 4) for prompt_id in ids}


def test_all_permutations_are_equally_probable():
    """The identity too. Each has the expected count 500 and the standard deviation 20."""
    counts = Counter(moves(3, f"prompt {number}", 0) for number in range(3000))
    assert set(counts) == set(permutations(range(3)))
    assert all(abs(count - 500) < 100 for count in counts.values())


def test_permutation_is_the_same_on_every_machine():
    """Pairs of a run that resumes elsewhere must not change."""
    assert moves(5, "prompt 1", 0) == (2, 4, 1, 0, 3)


@pytest.mark.parametrize(("probability", "scale"), ESTIMATES)
def test_flipped_labels_exchange_both_ends_of_every_pair(probability, scale):
    for prompt_id, logits in prompts().items():
        flipped = relabelled(logits, "flipped", prompt_id, 0)
        before = win_probabilities(logits, probability, scale)
        after = win_probabilities(flipped, probability, scale)
        assert after == pytest.approx(before.T, abs=1e-15)
        assert p_hat(after) == pytest.approx(1 - p_hat(before), abs=1e-14)
        assert np.array_equal(mean_logits(flipped), -mean_logits(logits))
        winner, loser = winner_and_loser(mean_logits(logits))
        assert winner_and_loser(mean_logits(flipped)) == (loser, winner)


def test_transposed_and_negated_logits_give_the_same_p():
    for prompt_id, logits in prompts().items():
        flipped = relabelled(logits, "flipped", prompt_id, 0)
        assert np.array_equal(win_probabilities(flipped), win_probabilities(-logits))
        assert sorted(flipped.ravel()) == sorted(logits.ravel())


def test_labels_flipped_twice_are_the_annotated_ones():
    for prompt_id, logits in prompts().items():
        once = relabelled(logits, "flipped", prompt_id, 0)
        assert not np.array_equal(once, logits)
        assert np.array_equal(relabelled(once, "flipped", prompt_id, 0), logits)
        assert np.array_equal(relabelled(logits, "annotated", prompt_id, 0), logits)


@pytest.mark.parametrize("labels", ["permuted", "flipped"])
def test_relabelling_leaves_its_argument_unchanged(labels):
    logits = np.arange(25.0).reshape(5, 5)
    before = logits.copy()
    result = relabelled(logits, labels, "prompt 1", 0)
    result += 1
    assert np.array_equal(logits, before)
    assert result.flags["C_CONTIGUOUS"]


def test_unknown_labels_are_refused():
    with pytest.raises(ValueError, match="'shuffled'"):
        relabelled(np.zeros((2, 2)), "shuffled", "prompt 1", 0)
