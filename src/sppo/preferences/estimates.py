"""Preference estimates: from the K x K logits of one prompt to P, P-hat, winner and loser.

All functions are pure and use numpy arrays. L[i, j] is the logit that response i beats response j
when the preference model reads them in the order (i, j). The diagonal of L is ignored. "The paper"
is SPPO, arXiv 2405.00675.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from math import comb

import numpy as np
from numpy.typing import NDArray

from sppo.core.errors import UserError

SMALLEST = 1e-9  # the smallest distance of P from 0 and 1 in `logits_of`
Array = NDArray[np.float64]
TIE = 1e-9  # P within this distance of 1/2 is a tie, and so are scores: rounding can move them


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)) without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * np.asarray(x, dtype=np.float64)))


def _relative(logits: Array) -> Array:
    """L - L^T, which combines both orders of every pair: (K, K), skew-symmetric.

    UserError if a logit is NaN or infinite.
    """
    logits = np.asarray(logits, dtype=np.float64)
    if logits.ndim != 2 or logits.shape[0] != logits.shape[1]:
        raise ValueError(f"logits have shape {logits.shape}, not (K, K)")
    if not np.isfinite(logits).all():
        raise UserError(
            "the preference model gave logits that are NaN or infinite; check its "
            "weights, or run it in float32"
        )
    return logits - logits.T


def mean_logits(logits: Array) -> Array:
    """s_i = mean over j of (L_ij - L_ji), shape (K,).

    The winner has the highest score, the loser the lowest. The mean includes j = i with 0, as in
    llm-blender's `rank` and the paper's section 5.1.
    """
    return _relative(logits).mean(axis=1)


def win_probabilities(
    logits: Array, probability: str = "pairwise", logit_scale: float = 0.5
) -> Array:
    """P(y_i beats y_j), shape (K, K); P + P^T = 1 and the diagonal is 1/2, exactly.

    `pairwise`: sigma(c (L - L^T)) with c = `logit_scale`, a general preference that may be cyclic
    (the paper, section 5.1; c = 1/2 is the mean of both orders). `blender`: sigma(s_i - s_j) with
    the mean logits s. This Bradley-Terry model is used in the official compute_prob.py; it turns a
    cyclic triple into three ties.
    """
    if probability == "pairwise":
        x = logit_scale * _relative(logits)
    elif probability == "blender":
        scores = mean_logits(logits)
        x = scores[:, None] - scores[None, :]
    else:
        raise ValueError(f"probability is {probability!r}, not pairwise or blender")
    return sigmoid(x)


def logits_of(probabilities: Array) -> Array:
    """Logits (K, K) of exact probabilities, for a model that computes P itself.

    Logits must be finite, so P counts as at least `SMALLEST` from 0 and 1.
    """
    P = np.clip(probabilities, SMALLEST, 1.0 - SMALLEST)
    return np.log(P) - np.log1p(-P)


def p_hat(probabilities: Array) -> Array:
    """P-hat(y_i beats pi_t) = mean over j of P(y_i beats y_j), shape (K,).

    j = i is included and contributes 1/2 (section 5.1), so the mean of P-hat over i is exactly 1/2.
    """
    return np.asarray(probabilities, dtype=np.float64).mean(axis=1)


def p_hat_weighted(probabilities: Array, log_weights: Array) -> Array:
    """P-hat(y_i beats pi'), shape (K,), for a policy pi' other than the responses' policy pi.

    The estimate uses self-normalised importance weights. log_weights (K,) are log pi'(y)/pi(y) of
    each response, up to a constant.
    """
    weights = np.exp(log_weights - np.max(log_weights))
    return np.asarray(probabilities, dtype=np.float64) @ (weights / weights.sum())


def cyclic_triples(probabilities: Sequence[Array]) -> float | None:
    """The share of cyclic triples among all triples of responses to the same prompt, in [0, 1].

    probabilities: P of each prompt, (K, K). i beats j if P[i, j] > 1/2. A triple is cyclic if i
    beats j, j beats k and k beats i; so a triple with a tie is not. The denominator is the number
    of triples of all prompts together. None if there are none, because every K is below 3.
    """
    triples = sum(comb(len(P), 3) for P in probabilities)
    return sum(_cycles(P) for P in probabilities) / triples if triples else None


def cyclic_prompts(probabilities: Sequence[Array]) -> float | None:
    """The share of prompts with at least one cyclic triple of responses, in [0, 1].

    As in `cyclic_triples`. The denominator is the number of prompts with at least 3 responses. None
    if there are none.
    """
    cyclic = [_cycles(P) > 0 for P in probabilities if len(P) >= 3]
    return sum(cyclic) / len(cyclic) if cyclic else None


def _cycles(P: Array) -> int:
    """The number of cyclic triples of the responses to one prompt."""
    beats = _beats(P).astype(int)
    # The trace counts every closed walk of three steps, so each cycle once for each start.
    return int(np.trace(beats @ beats @ beats)) // 3


def condorcet_winner(probabilities: Sequence[Array]) -> float | None:
    """The share of prompts with a response that beats each other response, in [0, 1].

    probabilities: P of each prompt, (K, K). i beats j if P[i, j] > 1/2. So equal responses, which
    tie, cannot win. The denominator is the number of prompts with at least 3 responses, since with
    fewer no preference is cyclic. None if there are none.
    """
    matrices = [np.asarray(P) for P in probabilities if len(P) >= 3]
    won = [bool((_beats(P).sum(axis=1) == len(P) - 1).any()) for P in matrices]
    return sum(won) / len(won) if won else None


def _beats(P: Array) -> NDArray[np.bool_]:
    """Whether i beats j, (K, K)."""
    return np.asarray(P, dtype=np.float64) > 0.5 + TIE


def even_length_penalty(scores: list[Array], lengths: list[Array]) -> float:
    """The length penalty alpha >= 0 under which winners are about as long as losers.

    The winner of a prompt has the highest score - alpha * length, the loser the lowest. alpha is
    chosen so that the mean difference of their lengths over all prompts is closest to 0. It is 0 if
    winners are not longer than losers without a penalty.

    scores, lengths: for each prompt an array (K,). Source: DICE, 2406.09760, which tries alpha in
    steps of 0.001. Here alpha is exact: the mean difference is a step function of alpha that only
    falls, so a bisection over its steps finds the best one. Without prompts it is 0.
    """
    if not scores:
        return 0.0

    def difference(alpha: float) -> float:
        """Mean length of winners minus mean length of losers, under the penalty alpha."""
        differences = []
        for score, length in zip(scores, lengths, strict=True):
            penalised = score - alpha * length
            differences.append(length[penalised.argmax()] - length[penalised.argmin()])
        return float(np.mean(differences))

    alphas = _penalties_between_swaps(scores, lengths)
    # The first alpha under which winners are not longer than losers; the best is it or the one
    # before it.
    first = bisect.bisect_left(alphas, 0.0, key=lambda alpha: -difference(alpha))
    candidates = alphas[max(first - 1, 0) : first + 1]
    return float(min(candidates, key=lambda alpha: abs(difference(alpha))))


def _penalties_between_swaps(scores: list[Array], lengths: list[Array]) -> list[float]:
    """0 and one penalty in each interval in which no two responses of a prompt change order.

    Responses i and j have the same penalised score at alpha = (s_i - s_j) / (n_i - n_j), with score
    s and length n.
    """
    swaps_by_prompt = []
    for score, length in zip(scores, lengths, strict=True):
        is_longer = length[:, None] > length
        score_gaps = (score[:, None] - score)[is_longer]
        length_gaps = (length[:, None] - length)[is_longer]
        swaps_by_prompt.append(score_gaps / length_gaps)
    swaps = np.concatenate(swaps_by_prompt)
    swaps = np.unique(swaps[swaps > 0])
    between = (swaps[:-1] + swaps[1:]) / 2
    after_last = 2 * swaps[-1:]  # empty if there are no swaps
    return [0.0, *between, *after_last]


def is_tie(score: float, other: float = 0.5) -> bool:
    """Whether two scores, or P and 1/2, are equal except for rounding."""
    return abs(score - other) <= TIE


def winner_and_loser(scores: Array) -> tuple[int, int] | None:
    """Indices of the highest and the lowest score; None if all scores tie."""
    scores = np.asarray(scores)
    winner = int(scores.argmax())
    loser = int(scores.argmin())
    return None if is_tie(scores[winner], scores[loser]) else (winner, loser)
