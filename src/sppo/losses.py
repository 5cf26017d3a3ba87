"""Losses: pure functions on (B,) tensors of summed log-ratios, one loss value a pair.

Symbols of the SPPO paper (arXiv 2405.00675): `delta_w` and `delta_l` are log pi_theta(y|x) / pi_t(y|x) of
winner and loser, summed over response tokens, in nats; `p_hat_w` and `p_hat_l` are P-hat(y beats pi_t);
`p_wl` is P(winner beats loser); beta = 1 / eta.
"""

from __future__ import annotations

from torch import Tensor

LOSSES = ("sppo", "sppo_single", "sppo_hard")


def sppo(delta_w: Tensor, delta_l: Tensor, p_hat_w: Tensor, p_hat_l: Tensor, beta: float) -> Tensor:
    """The practical loss, eq. (4.6), on winner and loser; shape (B,).

    1/2 sum over y in {w, l} of (delta_y - eta (P-hat_y - 1/2))^2. The factor 1/2 is the official code's.
    """
    return 0.5 * ((delta_w - (p_hat_w - 0.5) / beta) ** 2 + (delta_l - (p_hat_l - 0.5) / beta) ** 2)


def sppo_single(delta_w: Tensor, delta_l: Tensor, p_wl: Tensor, beta: float) -> Tensor:
    """The official code's `sppo_single`, shape (B,): both targets from the one pair, +-eta (P(w beats l) - 1/2)."""
    return sppo(delta_w, delta_l, p_wl, 1.0 - p_wl, beta)


def sppo_hard(delta_w: Tensor, delta_l: Tensor, beta: float) -> Tensor:
    """TRL's `sppo_hard`, shape (B,): targets +-eta/2, as if the winner always won; without the factor 1/2."""
    return (delta_w - 0.5 / beta) ** 2 + (delta_l + 0.5 / beta) ** 2


def pair_loss(name: str, delta_w: Tensor, delta_l: Tensor, pair: dict[str, Tensor], beta: float) -> Tensor:
    """The loss called `name`, shape (B,), with what it needs taken from `pair`.

    `pair` holds p_hat_chosen, p_hat_rejected and p_chosen_beats_rejected, each (B,).
    """
    if name == "sppo":
        return sppo(delta_w, delta_l, pair["p_hat_chosen"], pair["p_hat_rejected"], beta)
    if name == "sppo_single":
        return sppo_single(delta_w, delta_l, pair["p_chosen_beats_rejected"], beta)
    if name == "sppo_hard":
        return sppo_hard(delta_w, delta_l, beta)
    raise ValueError(f"no loss {name!r}; known are {', '.join(LOSSES)}")
