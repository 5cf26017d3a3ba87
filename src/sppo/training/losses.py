"""Losses of all methods: pure functions on (B,) tensors, one loss value a pair.

Symbols: `delta_w` and `delta_l` are log pi_theta(y|x) / pi_ref(y|x) of winner and loser, summed over response tokens,
in nats, where pi_ref is what the method refers to (for SPPO pi_t, the policy at the start of the iteration); `h`, `h_t`
and `h_ref` are log y_w - log y_l under pi_theta, pi_t and pi_ref; `p_hat_w` and `p_hat_l` are P-hat(y beats pi_t);
`p_wl` is P(winner beats loser). For SPPO, MPO and Nash-MD beta = 1 / eta of their papers; for INPO and DNO beta is their eta.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Pair = dict[str, Tensor]


def sppo(delta_w: Tensor, delta_l: Tensor, p_hat_w: Tensor, p_hat_l: Tensor, beta: float) -> Tensor:
    """The practical loss of SPPO (2405.00675), eq. (4.6), on winner and loser; shape (B,).

    1/2 sum over y in {w, l} of (delta_y - eta (P-hat_y - 1/2))^2. The factor 1/2 is the official code's.
    """
    return 0.5 * ((delta_w - (p_hat_w - 0.5) / beta) ** 2 + (delta_l - (p_hat_l - 0.5) / beta) ** 2)


def sppo_single(delta_w: Tensor, delta_l: Tensor, p_wl: Tensor, beta: float) -> Tensor:
    """The official code's `sppo_single`, shape (B,): both targets from the one pair, +-eta (P(w beats l) - 1/2)."""
    return sppo(delta_w, delta_l, p_wl, 1.0 - p_wl, beta)


def sppo_hard(delta_w: Tensor, delta_l: Tensor, beta: float) -> Tensor:
    """TRL's `sppo_hard`, shape (B,): targets +-eta/2, as if the winner always won; without the factor 1/2."""
    return (delta_w - 0.5 / beta) ** 2 + (delta_l + 0.5 / beta) ** 2


def dpo(delta_w: Tensor, delta_l: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO (2305.18290, eq. 7) with conservative label smoothing, shape (B,). SPIN's loss (2401.01335) with lambda = beta."""
    return soft_label(delta_w, delta_l, torch.full_like(delta_w, 1.0 - label_smoothing), beta)


def soft_label(delta_w: Tensor, delta_l: Tensor, q: Tensor, beta: float) -> Tensor:
    """Cross entropy of sigma(beta (delta_w - delta_l)) against q = P(w is preferred), shape (B,). DNO (2404.03715), Algorithm 1:
    q = sigma(r_w - r_l) with r = P-hat; MMPO: q = sigma(gamma (r_w - r_l))."""
    logit = beta * (delta_w - delta_l)
    return -q * logsigmoid(logit) - (1.0 - q) * logsigmoid(-logit)


def hinge(delta_w: Tensor, delta_l: Tensor, beta: float) -> Tensor:
    """Hinge on the difference of log-ratios, shape (B,): relu(1 - beta (delta_w - delta_l)).

    TRL and the official SPPO code have it so. It is not the SLiC-HF (2305.10425) of HALOs, whose
    hinge is on the log-probabilities themselves, without a reference, and which adds the likelihood
    of a target as a regulariser.
    """
    return torch.relu(1.0 - beta * (delta_w - delta_l))


def ipo(delta_w: Tensor, delta_l: Tensor, target: float) -> Tensor:
    """IPO (2310.12036), shape (B,): the difference regressed onto 1/(2 beta), or 1/beta as in SPPO's eq. (4.14)."""
    return (delta_w - delta_l - target) ** 2


def kto_pair(delta_w: Tensor, delta_l: Tensor, beta: float) -> Tensor:
    """The `kto_pair` of the official SPPO code, shape (B,): mean of its two terms.

    It is not KTO's own objective (2402.01306). That one takes single responses, desirable or not,
    each with a weight, and estimates one KL term, for both kinds, from prompts and responses that
    do not belong together, without a gradient. Here every response belongs to a pair, the KL terms
    are means over the batch of the pairs' own log-ratios, and gradients pass through them.
    """
    kl_w, kl_l = delta_w.mean().clamp(min=0), delta_l.mean().clamp(min=0)
    return 0.5 * (
        (1.0 - torch.sigmoid(beta * (delta_w - kl_l)))
        + (1.0 - torch.sigmoid(beta * (kl_w - delta_l)))
    )


def simpo(mean_w: Tensor, mean_l: Tensor, beta: float, gamma: float) -> Tensor:
    """SimPO (2405.14734), shape (B,), on log-probabilities per token; no reference."""
    return -logsigmoid(beta * (mean_w - mean_l) - gamma)


def inpo(h: Tensor, h_ref: Tensor, h_t: Tensor, beta: float, tau: float) -> Tensor:
    """INPO (2407.00617), shape (B,), eta = beta: needs labels, no win rates."""
    return (h - tau / beta * h_ref - (1.0 - tau / beta) * h_t - 0.5 / beta) ** 2


def mpo(h: Tensor, h_ref: Tensor, h_t: Tensor, margin: Tensor, beta: float, tau: float) -> Tensor:
    """Magnetic mirror descent, the inner step of MPO (2410.16714), as a regression on pairs, shape (B,):

    ((1 + eta tau) h - h_t - eta tau h_ref - eta margin)^2, eta = 1/beta, tau the paper's alpha, h_ref the magnet's.
    The paper has a token-level policy gradient with two KL terms instead; its exact step has this minimiser,
    log pi = (log pi_t + eta tau log pi_mag + eta P(. beats pi_t)) / (1 + eta tau) + constant, so the fixed point is the same.
    """
    return ((1.0 + tau / beta) * h - h_t - tau / beta * h_ref - margin / beta) ** 2


def nash_md(
    h: Tensor, h_ref: Tensor, h_t: Tensor, margin: Tensor, beta: float, tau: float
) -> Tensor:
    """Nash-MD (2312.00886) as a regression on pairs, shape (B,), eta = 1/beta: (h - h_mix - eta margin)^2, where pi_mix is
    pi_t^(1 - tau/beta) pi_ref^(tau/beta) and the margin that of P(. beats pi_mix), see `against_mixture` in src/train_policy.py.

    The online form samples the opponent from the mixture token by token and takes a policy gradient; here the responses are pi_t's,
    weighted to stand for the mixture's, and the exact step log pi = log pi_mix + eta P(. beats pi_mix) + constant is fitted.
    """
    return (h - tau / beta * h_ref - (1.0 - tau / beta) * h_t - margin / beta) ** 2


@dataclass(frozen=True)
class Terms:
    """The symbols of this module's head for a batch, each (B,)."""

    logp_w: Tensor
    logp_l: Tensor
    ref_w: Tensor
    ref_l: Tensor
    current_w: Tensor
    current_l: Tensor
    tokens_w: Tensor
    tokens_l: Tensor
    p_hat_w: Tensor
    p_hat_l: Tensor
    p_wl: Tensor
    per_token: bool = False

    @classmethod
    def of(cls, pair: Pair, per_token: bool) -> Terms:
        """per_token: whether IPO divides log-ratios by their tokens."""
        return cls(
            logp_w=pair["logp_chosen"],
            logp_l=pair["logp_rejected"],
            ref_w=pair["reference_chosen"],
            ref_l=pair["reference_rejected"],
            current_w=pair["current_chosen"],
            current_l=pair["current_rejected"],
            tokens_w=pair["tokens_chosen"],
            tokens_l=pair["tokens_rejected"],
            p_hat_w=pair["p_hat_chosen"],
            p_hat_l=pair["p_hat_rejected"],
            p_wl=pair["p_chosen_beats_rejected"],
            per_token=per_token,
        )

    @property
    def delta_w(self) -> Tensor:
        return self.logp_w - self.ref_w

    @property
    def delta_l(self) -> Tensor:
        return self.logp_l - self.ref_l

    @property
    def h(self) -> Tensor:
        return self.logp_w - self.logp_l

    @property
    def h_ref(self) -> Tensor:
        return self.ref_w - self.ref_l

    @property
    def h_t(self) -> Tensor:
        return self.current_w - self.current_l

    @property
    def margin(self) -> Tensor:
        return self.p_hat_w - self.p_hat_l

    @property
    def ipo_w(self) -> Tensor:
        return self.delta_w / self.tokens_w if self.per_token else self.delta_w

    @property
    def ipo_l(self) -> Tensor:
        return self.delta_l / self.tokens_l if self.per_token else self.delta_l


# What each loss takes of a batch. A new method is a function above, a line here and its name in config/schema.yaml.
LOSSES: dict[str, Callable[[Terms, dict[str, Any]], Tensor]] = {
    "sppo": lambda x, o: sppo(x.delta_w, x.delta_l, x.p_hat_w, x.p_hat_l, o["beta"]),
    "sppo_single": lambda x, o: sppo_single(x.delta_w, x.delta_l, x.p_wl, o["beta"]),
    "sppo_hard": lambda x, o: sppo_hard(x.delta_w, x.delta_l, o["beta"]),
    "dpo": lambda x, o: dpo(x.delta_w, x.delta_l, o["beta"], o["label_smoothing"]),
    "hinge": lambda x, o: hinge(x.delta_w, x.delta_l, o["beta"]),
    "ipo": lambda x, o: ipo(x.ipo_w, x.ipo_l, o["ipo_target"] / o["beta"]),
    "kto_pair": lambda x, o: kto_pair(x.delta_w, x.delta_l, o["beta"]),
    "simpo": lambda x, o: simpo(
        x.logp_w / x.tokens_w, x.logp_l / x.tokens_l, o["beta"], o["gamma"]
    ),
    "dno": lambda x, o: soft_label(x.delta_w, x.delta_l, torch.sigmoid(x.margin), o["beta"]),
    "mmpo": lambda x, o: soft_label(
        x.delta_w, x.delta_l, torch.sigmoid(o["gamma"] * x.margin), o["beta"]
    ),
    "inpo": lambda x, o: inpo(x.h, x.h_ref, x.h_t, o["beta"], o["tau"]),
    "nash_md": lambda x, o: nash_md(x.h, x.h_ref, x.h_t, x.margin, o["beta"], o["tau"]),
    "mpo": lambda x, o: mpo(x.h, x.h_ref, x.h_t, x.margin, o["beta"], o["tau"]),
}


def pair_loss(name: str, pair: Pair, options: dict[str, Any]) -> Tensor:
    """The loss called `name`, shape (B,), plus two terms that any loss can have:

    `sft_weight` times the winner's negative log-likelihood per token (RPO, 2404.19733), and `optimism` times beta times
    the mean of delta_w and delta_l (SELM, 2405.19332). SELM has there the log-ratio of one more response that pi_t gave; over every two of
    K responses our mean is that of K such responses, and no third sequence is computed.

    `pair` holds, each (B,): logp_, current_ (under pi_t), reference_ (under pi_ref) and tokens_ of chosen and rejected,
    p_hat_chosen, p_hat_rejected, p_chosen_beats_rejected. `options` is the configuration section `train`.
    """
    if name not in LOSSES:
        raise ValueError(f"no loss {name!r}; known are {', '.join(LOSSES)}")
    x = Terms.of(pair, options["per_token"])
    loss = LOSSES[name](x, options)
    if options["sft_weight"]:
        loss = loss - options["sft_weight"] * x.logp_w / x.tokens_w
    if options["optimism"]:
        loss = loss + options["optimism"] * options["beta"] * 0.5 * (x.delta_w + x.delta_l)
    return loss
