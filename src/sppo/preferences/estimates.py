"""Preference estimates: from the K x K logits of one prompt to P, P-hat, winner and loser.

Pure functions on numpy arrays. L[i, j] is the logit that response i beats response j as the preference
model read them, in the order (i, j); its diagonal is ignored. SPPO is arXiv 2405.00675.
"""

from __future__ import annotations

import bisect

import numpy as np
from numpy.typing import NDArray

from sppo.core.errors import UserError

Array = NDArray[np.float64]


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)) without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * np.asarray(x, dtype=np.float64)))


def _relative(logits: Array) -> Array:
    """L - L^T, skew-symmetric: both orders of every pair together; (K, K)."""
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
    """s_i = mean over j of (L_ij - L_ji), shape (K,): the score that winner and loser are the ends of.

    Zero diagonal inside the mean, as in llm-blender's `rank` and the paper's section 5.1.
    """
    return _relative(logits).mean(axis=1)


def win_probabilities(
    logits: Array, probability: str = "pairwise", logit_scale: float = 0.5
) -> Array:
    """P(y_i beats y_j), shape (K, K); P + P^T = 1 and the diagonal is 1/2, exactly.

    `pairwise`: sigma(c (L - L^T)), a general preference that may be cyclic (the paper, section 5.1; c = 1/2
    is the mean of both orders). `blender`: sigma(s_i - s_j) from the mean logits, the Bradley-Terry collapse
    of the official compute_prob.py, under which a cyclic triple becomes three ties.
    """
    if probability == "pairwise":
        x = logit_scale * _relative(logits)
    elif probability == "blender":
        scores = mean_logits(logits)
        x = scores[:, None] - scores[None, :]
    else:
        raise ValueError(f"probability is {probability!r}, not pairwise or blender")
    return sigmoid(x)


def p_hat(probabilities: Array) -> Array:
    """P-hat(y_i beats pi_t) = mean over j of P(y_i beats y_j), shape (K,).

    i = j is included and contributes 1/2 (section 5.1), so the mean of P-hat over i is exactly 1/2.
    """
    return np.asarray(probabilities, dtype=np.float64).mean(axis=1)


def p_hat_weighted(probabilities: Array, log_weights: Array) -> Array:
    """P-hat(y_i beats pi'), shape (K,), where pi' is another policy than the one that gave the K responses.

    Self-normalised importance weights: log_weights (K,) are log pi'/pi of each response, up to a constant.
    """
    weights = np.exp(log_weights - np.max(log_weights))
    return np.asarray(probabilities, dtype=np.float64) @ (weights / weights.sum())


def even_length_penalty(scores: list[Array], lengths: list[Array]) -> float:
    """alpha >= 0 with which the ends of scores - alpha lengths differ least in length on average over prompts; each entry (K,).

    DICE, 2406.09760, which tries alpha in steps of 0.001. The mean difference falls with alpha, in steps where two responses of a
    prompt change places, so that bisection over these finds it exactly. 0 if winners are no longer than losers without it.
    """

    def difference(alpha: float) -> float:
        ends = [
            (length[(score - alpha * length).argmax()], length[(score - alpha * length).argmin()])
            for score, length in zip(scores, lengths, strict=True)
        ]
        return float(np.mean([winner - loser for winner, loser in ends]))

    places = np.concatenate(
        [
            ((s[:, None] - s)[longer] / (n[:, None] - n)[longer])
            for s, n in zip(scores, lengths, strict=True)
            for longer in [n[:, None] > n]
        ]
    )
    places = np.unique(places[places > 0])
    alphas = [0.0, *(places[:-1] + places[1:]) / 2, *(2 * places[-1:])]  # one in each step
    first = bisect.bisect_left(
        alphas, 0.0, key=lambda alpha: -difference(alpha)
    )  # where winners are no longer than losers
    return float(
        min(alphas[max(first - 1, 0) : first + 1], key=lambda alpha: abs(difference(alpha)))
    )


def winner_and_loser(scores: Array) -> tuple[int, int] | None:
    """Indices of the highest and the lowest score; None if all are equal, which is no preference."""
    scores = np.asarray(scores)
    winner, loser = int(scores.argmax()), int(scores.argmin())
    return None if scores[winner] == scores[loser] else (winner, loser)
