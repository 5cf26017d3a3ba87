"""Losses of all methods: pure functions of (B,) tensors that return one loss value per pair.

A loss names what it reads by its arguments. Each is one of these columns of a batch, or a key of
the configuration section `train`:

    logp_w, logp_l          log pi_theta(y|x) of winner and loser over response tokens, in nats
    tokens_w, tokens_l      response tokens
    longer                  tokens_w - tokens_l
    delta_w, delta_l        log pi_theta(y|x) / pi_ref(y|x), where pi_ref is the method's reference
                            (for SPPO pi_t, the policy at the start of the iteration)
    current_w, current_l    log pi_t(y|x)
    h, h_ref, h_t           log y_w - log y_l under pi_theta, pi_ref and pi_t
    h_opponents             the same under several iterates: the mean of their log y_w - log y_l
                            with the weights `train.history`
    p_hat_w, p_hat_l        P-hat(y beats pi_t)
    margin                  p_hat_w - p_hat_l
    p_wl                    P(winner beats loser)

For SPPO, RSPO, MPO and Nash-MD beta is 1 / eta of their papers. For INPO, TD-MNPO and DNO beta is
their eta.

To add a loss, write a function here or in a module of its own and add an entry to LOSSES. The
schema, the checks of the configuration and the flags of the programs follow from the entry. The
Snakefile reads this module without torch, so torch is imported only inside functions.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sppo.core.errors import UserError
from sppo.training.requirements import (
    EVERY_PAIR,
    MAGNET,
    OLDER_REFERENCE,
    OTHER_REFERENCE,
    P_HAT,
    SMOOTHED,
    TAU_WITHIN_BETA,
    WHOLE_STEP,
    WINNER_FIRST,
    Requirement,
    equal_micro_batches,
)

if TYPE_CHECKING:
    from torch import Tensor

    Pair = dict[str, Tensor]


def log_sigmoid(x: Tensor) -> Tensor:
    """log(1 / (1 + exp(-x))), stable for large |x|."""
    from torch.nn.functional import logsigmoid

    return logsigmoid(x)


def sppo(delta_w: Tensor, delta_l: Tensor, p_hat_w: Tensor, p_hat_l: Tensor, beta: float) -> Tensor:
    """The practical loss of SPPO (2405.00675, eq. 4.6) on winner and loser, shape (B,).

    1/2 sum over y in {w, l} of (delta_y - eta (P-hat_y - 1/2))^2. The factor 1/2 is the official
    code's.
    """
    return 0.5 * ((delta_w - (p_hat_w - 0.5) / beta) ** 2 + (delta_l - (p_hat_l - 0.5) / beta) ** 2)


def sppo_single(delta_w: Tensor, delta_l: Tensor, p_wl: Tensor, beta: float) -> Tensor:
    """The official code's `sppo_single`, shape (B,).

    Both targets come from the one pair: eta (P(w beats l) - 1/2) and its negative.
    """
    return sppo(delta_w, delta_l, p_wl, 1.0 - p_wl, beta)


def sppo_hard(delta_w: Tensor, delta_l: Tensor, beta: float) -> Tensor:
    """TRL's `sppo_hard`, shape (B,): targets +-eta/2, as if the winner always won.

    Like TRL's it has no factor 1/2.
    """
    return (delta_w - 0.5 / beta) ** 2 + (delta_l + 0.5 / beta) ** 2


def rspo(
    logp_w: Tensor,
    logp_l: Tensor,
    current_w: Tensor,
    current_l: Tensor,
    delta_w: Tensor,
    delta_l: Tensor,
    p_hat_w: Tensor,
    p_hat_l: Tensor,
    beta: float,
    reverse_kl_weight: float,
    forward_kl_weight: float,
    forward_kl_limit: float,
) -> Tensor:
    """Regularised SPPO (RSPO, 2503.00030), as in its authors' code, shape (B,).

    SPPO's loss, whose targets refer to pi_t, plus two terms on the log-ratios delta to an older
    policy, the base in the paper. Reverse KL: the sum of delta^2 over winner and loser. Forward KL:
    the sum of exp(min(-delta, forward_kl_limit)).
    """
    loss = sppo(logp_w - current_w, logp_l - current_l, p_hat_w, p_hat_l, beta)
    reverse = delta_w**2 + delta_l**2
    forward = sum((-delta).clamp(max=forward_kl_limit).exp() for delta in (delta_w, delta_l))
    return loss + reverse_kl_weight * reverse + forward_kl_weight * forward


def dpo(
    delta_w: Tensor,
    delta_l: Tensor,
    longer: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
    length_weight: float = 0.0,
) -> Tensor:
    """DPO (2305.18290, eq. 7) with conservative label smoothing, shape (B,).

    It is also SPIN's loss (2401.01335) with lambda = beta. With length_weight it is R-DPO
    (2403.19159, eq. 9) and iterative length-regularised DPO (2406.11817).
    """
    logit = beta * (delta_w - delta_l) + length_weight * longer
    return soft_label(logit, 1.0 - label_smoothing)


def dno(
    delta_w: Tensor,
    delta_l: Tensor,
    longer: Tensor,
    margin: Tensor,
    beta: float,
    length_weight: float = 0.0,
) -> Tensor:
    """DNO (2404.03715, Algorithm 1), shape (B,): q = sigma(r_w - r_l) with r = P-hat."""
    logit = beta * (delta_w - delta_l) + length_weight * longer
    return soft_label(logit, margin.sigmoid())


def mmpo(
    delta_w: Tensor,
    delta_l: Tensor,
    longer: Tensor,
    margin: Tensor,
    beta: float,
    gamma: float,
    length_weight: float = 0.0,
) -> Tensor:
    """MMPO (2410.03145), shape (B,): q = sigma(gamma (r_w - r_l)) with r = P-hat."""
    logit = beta * (delta_w - delta_l) + length_weight * longer
    return soft_label(logit, (gamma * margin).sigmoid())


def soft_label(logit: Tensor, q: Tensor | float) -> Tensor:
    """Cross entropy of sigma(logit) against q = P(w is preferred), (B,)."""
    return -q * log_sigmoid(logit) - (1.0 - q) * log_sigmoid(-logit)


def dpo_positive(
    delta_w: Tensor,
    delta_l: Tensor,
    longer: Tensor,
    beta: float,
    dpop_weight: float,
    length_weight: float = 0.0,
) -> Tensor:
    """DPO-Positive (2402.13228, eq. 3), shape (B,): a penalty on winners below the reference."""
    penalised = delta_w - delta_l - dpop_weight * (-delta_w).relu()
    return -log_sigmoid(beta * penalised + length_weight * longer)


def exo(delta_w: Tensor, delta_l: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """EXO on pairs (2402.00856, eq. 16), shape (B,).

    The reverse KL from the labels (1 - label_smoothing, label_smoothing) to the policy's
    probabilities that w or l is preferred, sigma(+-beta (delta_w - delta_l)).
    """
    logit = beta * (delta_w - delta_l)
    log_w = log_sigmoid(logit)
    log_l = log_sigmoid(-logit)
    of_w = log_w.exp() * (log_w - math.log1p(-label_smoothing))
    return of_w + log_l.exp() * (log_l - math.log(label_smoothing))


def nca(delta_w: Tensor, delta_l: Tensor, beta: float) -> Tensor:
    """NCA on pairs (2402.05369), as in TRL, shape (B,). It fits absolute rewards beta delta."""
    reward_w, reward_l = beta * delta_w, beta * delta_l
    both = log_sigmoid(-reward_w) + log_sigmoid(-reward_l)
    return -log_sigmoid(reward_w) - 0.5 * both


def apo_zero(delta_w: Tensor, delta_l: Tensor, beta: float) -> Tensor:
    """APO-zero (2408.06266, eq. 7), shape (B,): winners up and losers down, each on its own."""
    return 1.0 - (beta * delta_w).sigmoid() + (beta * delta_l).sigmoid()


def hinge(delta_w: Tensor, delta_l: Tensor, beta: float) -> Tensor:
    """Hinge on the difference of log-ratios, shape (B,): relu(1 - beta (delta_w - delta_l)).

    This is the hinge of TRL and of the official SPPO code. It is not the SLiC-HF (2305.10425) of
    HALOs. That one puts the hinge on the log-probabilities themselves, without a reference, and
    adds the likelihood of a target as a regulariser.
    """
    return (1.0 - beta * (delta_w - delta_l)).relu()


def ipo(
    delta_w: Tensor,
    delta_l: Tensor,
    tokens_w: Tensor,
    tokens_l: Tensor,
    beta: float,
    ipo_target: float,
    per_token: bool,
) -> Tensor:
    """IPO (2310.12036), shape (B,): regress the difference of log-ratios onto ipo_target / beta.

    ipo_target is 0.5 in the paper, and 1 in eq. (4.14) of SPPO. With per_token the log-ratios are
    divided by their response's tokens, as in TRL.
    """
    if per_token:
        delta_w, delta_l = delta_w / tokens_w, delta_l / tokens_l
    return (delta_w - delta_l - ipo_target / beta) ** 2


def kto_pair(delta_w: Tensor, delta_l: Tensor, beta: float) -> Tensor:
    """The `kto_pair` of the official SPPO code, shape (B,): the mean of its two terms.

    It is not KTO's own objective (2402.01306). KTO takes single responses, desirable or not, each
    with a weight. It estimates one KL term from prompts and responses that do not belong together,
    without a gradient. Here every response belongs to a pair, the KL terms are means of the pairs'
    own log-ratios over the batch, and gradients pass through them.
    """
    kl_w, kl_l = delta_w.mean().clamp(min=0), delta_l.mean().clamp(min=0)
    return 0.5 * (
        (1.0 - (beta * (delta_w - kl_l)).sigmoid()) + (1.0 - (beta * (kl_w - delta_l)).sigmoid())
    )


def simpo(
    logp_w: Tensor,
    logp_l: Tensor,
    tokens_w: Tensor,
    tokens_l: Tensor,
    longer: Tensor,
    beta: float,
    gamma: float,
    length_weight: float = 0.0,
) -> Tensor:
    """SimPO (2405.14734), shape (B,): log-probabilities per token, no reference."""
    logit = beta * (logp_w / tokens_w - logp_l / tokens_l) - gamma
    return -log_sigmoid(logit + length_weight * longer)


def asft(
    logp_w: Tensor, logp_l: Tensor, tokens_w: Tensor, tokens_l: Tensor, asft_weight: float
) -> Tensor:
    """ASFT (2409.10571), shape (B,), without a reference.

    -log p_w - asft_weight (log sigma(r_w) + log sigma(-r_l)), where p is the probability of a token
    in the geometric mean over a response, and r = log(p / (1 - p)). So sigma(r) is p.
    """
    log_p_w, log_p_l = logp_w / tokens_w, logp_l / tokens_l
    # The probability is at most 1 - 1e-7, as in its authors' code, so that the logarithm is finite.
    log_not_l = (-log_p_l.exp().clamp(max=1.0 - 1e-7)).log1p()
    return -log_p_w - asft_weight * (log_p_w + log_not_l)


def sft(logp_w: Tensor, tokens_w: Tensor) -> Tensor:
    """The winner's negative log-likelihood per token, shape (B,), in nats.

    The control "SFT on winners": no loser, no reference, no P-hat. It is Preferred-FT of the DPO
    paper (2305.18290, section 6) on the policy's own responses, as in RAFT (2304.06767).
    """
    return -logp_w / tokens_w


def inpo(h: Tensor, h_ref: Tensor, h_t: Tensor, beta: float, tau: float) -> Tensor:
    """INPO (2407.00617), shape (B,), with eta = beta. It needs labels and no win rates."""
    return (h - tau / beta * h_ref - (1.0 - tau / beta) * h_t - 0.5 / beta) ** 2


def mnpo(h: Tensor, h_ref: Tensor, h_opponents: Tensor, beta: float, tau: float) -> Tensor:
    """TD-MNPO (2509.23102), shape (B,), with eta = beta: INPO against several iterates.

    With `train.history: [1]` it is INPO.
    """
    return (h - tau / beta * h_ref - (1.0 - tau / beta) * h_opponents - 0.5 / beta) ** 2


def mpo(h: Tensor, h_ref: Tensor, h_t: Tensor, margin: Tensor, beta: float, tau: float) -> Tensor:
    """Magnetic mirror descent, the inner step of MPO (2410.16714), as a regression on pairs, (B,).

    ((1 + eta tau) h - h_t - eta tau h_ref - eta margin)^2, where eta = 1/beta, tau is the paper's
    alpha and h_ref is the magnet's. The paper uses a token-level policy gradient with two KL terms.
    Its exact step has the same minimiser, and therefore the same fixed point:
    log pi = (log pi_t + eta tau log pi_mag + eta P(. beats pi_t)) / (1 + eta tau) + constant.
    """
    return ((1.0 + tau / beta) * h - h_t - tau / beta * h_ref - margin / beta) ** 2


def nash_md(
    h: Tensor, h_ref: Tensor, h_t: Tensor, margin: Tensor, beta: float, tau: float
) -> Tensor:
    """Nash-MD (2312.00886) as a regression on pairs, shape (B,), with eta = 1/beta.

    (h - h_mix - eta margin)^2, where pi_mix is pi_t^(1 - tau/beta) pi_ref^(tau/beta). The margin is
    that of P(. beats pi_mix); `against_mixture` in src/train_policy.py computes it. The online form
    samples the opponent from the mixture token by token and takes a policy gradient. Here the
    responses are pi_t's, weighted to stand for the mixture's, and the loss fits the exact step
    log pi = log pi_mix + eta P(. beats pi_mix) + constant.
    """
    return (h - tau / beta * h_ref - (1.0 - tau / beta) * h_t - margin / beta) ** 2


@dataclass(frozen=True)
class Columns:
    """What losses can read of a batch, each (B,). The head of this module explains the names."""

    logp_w: Tensor
    logp_l: Tensor
    ref_w: Tensor
    ref_l: Tensor
    current_w: Tensor
    current_l: Tensor
    opponents_w: Tensor
    opponents_l: Tensor
    tokens_w: Tensor
    tokens_l: Tensor
    p_hat_w: Tensor
    p_hat_l: Tensor
    p_wl: Tensor

    @classmethod
    def of(cls, pair: Pair) -> Columns:
        return cls(
            logp_w=pair["logp_chosen"],
            logp_l=pair["logp_rejected"],
            ref_w=pair["reference_chosen"],
            ref_l=pair["reference_rejected"],
            current_w=pair["current_chosen"],
            current_l=pair["current_rejected"],
            opponents_w=pair["opponents_chosen"],
            opponents_l=pair["opponents_rejected"],
            tokens_w=pair["tokens_chosen"],
            tokens_l=pair["tokens_rejected"],
            p_hat_w=pair["p_hat_chosen"],
            p_hat_l=pair["p_hat_rejected"],
            p_wl=pair["p_chosen_beats_rejected"],
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
    def h_opponents(self) -> Tensor:
        return self.opponents_w - self.opponents_l

    @property
    def longer(self) -> Tensor:
        return self.tokens_w - self.tokens_l

    @property
    def margin(self) -> Tensor:
        return self.p_hat_w - self.p_hat_l


OF_P_HAT = {"p_hat_w", "p_hat_l", "margin", "p_wl"}
OF_REFERENCE = {"delta_w", "delta_l", "h_ref", "ref_w", "ref_l"}


class Loss:
    """A loss and what the rest of the system must know about it.

    function: its arguments name what it reads (see the head of this module); it returns (B,).
    requires: what must hold in the configuration. That pairs have P-hat is required by itself of a
    loss that reads it. trl: what TRL's DPOTrainer calls the same loss, if it has it. mixture:
    whether P-hat is against the mixture of pi_t and the reference, with the share tau / beta of the
    latter, instead of pi_t.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        requires: tuple[Requirement, ...] = (),
        trl: str | None = None,
        mixture: bool = False,
    ) -> None:
        self.function = function
        self.trl = trl
        self.mixture = mixture
        parameters = inspect.signature(function).parameters
        self.reads = tuple(parameters)
        self.optional = {
            name for name, each in parameters.items() if each.default is not inspect.Parameter.empty
        }
        self.requires = ((P_HAT,) if OF_P_HAT & {*self.reads} else ()) + requires

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares the policy with another one."""
        return bool(OF_REFERENCE & {*self.reads})

    def __call__(self, columns: Columns, options: dict[str, Any]) -> Tensor:
        """The loss of a batch, shape (B,). options: the configuration section `train`."""
        values = {}
        for name in self.reads:
            column = getattr(columns, name, None)
            if column is not None:
                values[name] = column
            elif name in options or name not in self.optional:
                values[name] = options[name]
        return self.function(**values)

    def unknown(self, options: dict[str, Any]) -> list[str]:
        """What it reads that is no column, no key of the section `train`, and not optional."""
        columns = {*Columns.__dataclass_fields__, *vars(Columns)}
        return [name for name in self.reads if name not in {*columns, *options, *self.optional}]


LOSSES: dict[str, Loss] = {
    "sppo": Loss(sppo, requires=(WINNER_FIRST,)),
    "sppo_single": Loss(sppo_single, requires=(WINNER_FIRST,)),
    "sppo_hard": Loss(sppo_hard, requires=(WINNER_FIRST,), trl="sppo_hard"),
    "rspo": Loss(rspo, requires=(OLDER_REFERENCE, WINNER_FIRST)),
    "dpo": Loss(dpo, trl="sigmoid"),
    "dpo_positive": Loss(dpo_positive),
    "exo": Loss(exo, requires=(SMOOTHED,), trl="exo_pair"),
    "nca": Loss(nca, trl="nca_pair"),
    "apo_zero": Loss(apo_zero, trl="apo_zero"),
    "hinge": Loss(hinge, trl="hinge"),
    "ipo": Loss(ipo, trl="ipo"),
    "kto_pair": Loss(kto_pair, requires=(WHOLE_STEP,)),
    "simpo": Loss(simpo),
    "asft": Loss(asft),
    "sft": Loss(sft),
    "dno": Loss(dno, requires=(WINNER_FIRST,)),
    "mmpo": Loss(mmpo, requires=(WINNER_FIRST,)),
    "inpo": Loss(inpo, requires=(TAU_WITHIN_BETA, OTHER_REFERENCE, WINNER_FIRST)),
    "mnpo": Loss(mnpo, requires=(TAU_WITHIN_BETA, OTHER_REFERENCE, WINNER_FIRST)),
    "nash_md": Loss(
        nash_md,
        requires=(TAU_WITHIN_BETA, EVERY_PAIR, OTHER_REFERENCE, WINNER_FIRST),
        mixture=True,
    ),
    "mpo": Loss(mpo, requires=(MAGNET, WINNER_FIRST)),
}


def pair_loss(name: str, pair: Pair, options: dict[str, Any]) -> Tensor:
    """The loss called `name`, shape (B,), plus two terms that any loss can have.

    `sft_weight` times `sft`, the winner's negative log-likelihood per token (RPO, 2404.19733), and
    `optimism` times beta times the mean of delta_w and delta_l (SELM, 2405.19332). SELM uses there
    the log-ratio of one more response of pi_t. Over every two of K responses our mean is the mean
    over K such responses, without computing a third sequence.

    pair: each (B,): logp_, current_ (under pi_t), reference_ (under pi_ref), opponents_ (their
    weighted mean under the iterates of `train.history`) and tokens_ of chosen and rejected,
    p_hat_chosen, p_hat_rejected, p_chosen_beats_rejected. options: the configuration
    section `train`.
    """
    if name not in LOSSES:
        raise ValueError(f"no loss {name!r}; known are {', '.join(LOSSES)}")
    columns = Columns.of(pair)
    loss = LOSSES[name](columns, options)
    shape = tuple(getattr(loss, "shape", ()))
    if shape != columns.logp_w.shape or not hasattr(loss, "requires_grad"):
        raise UserError(
            f"the loss {name} returned {type(loss).__name__} of shape {shape}; return a tensor of"
            f" shape {tuple(columns.logp_w.shape)}, one value for each pair"
        )
    if options["sft_weight"]:
        loss = loss + sft(options["sft_weight"] * columns.logp_w, columns.tokens_w)
    if options["optimism"]:
        mean = 0.5 * (columns.delta_w + columns.delta_l)
        loss = loss + options["optimism"] * options["beta"] * mean
    return loss


def has_opponents(name: str) -> bool:
    """Whether a loss reads log-probabilities under earlier iterates, too."""
    return "h_opponents" in LOSSES[name].reads


def unread_keys(name: str) -> list[str]:
    """The keys of the section `train` that only other losses than `name` read."""
    from sppo.core.config import Validator, schema  # the schema reads LOSSES

    keys = schema()["properties"]["train"]["properties"]
    needed = {key: rule.get("x-only-with", {}).get("train.loss") for key, rule in keys.items()}
    return [key for key, rule in needed.items() if rule and not Validator(rule).is_valid(name)]


def check_training(train: dict[str, Any]) -> None:
    """Raise UserError if the section `train` cannot be trained by: its trainer, loss, processes."""
    loss = LOSSES[train["loss"]]
    if train["backend"] == "trl" and loss.trl is None:
        raise UserError(
            f"config: TRL has no loss {train['loss']}; use train.loss: sppo_hard or"
            " train.backend: transformers"
        )
    if train["backend"] == "trl":
        _check_trl(train)
    if train["micro_batch_tokens"] is None or train["backend"] == "trl":
        equal_micro_batches(train)
    for requirement in loss.requires:
        if requirement.in_training:
            requirement.check(train["loss"], {"train": train})
    if not train["history"][0]:
        raise UserError(
            "config: train.history gives pi_t no weight, but it is the only opponent in the first"
            " iteration; raise the first number"
        )
    if train["processes"] % train["nodes"]:
        raise UserError(
            f"config: train.processes ({train['processes']}) is not a multiple of train.nodes"
            f" ({train['nodes']}); change one of them"
        )
    if train["backend"] == "trl" and train["processes"] > 1:
        raise UserError(
            "config: TRL's trainer is here to compare with, on one device; set train.processes: 1,"
            " or train.backend: transformers"
        )
    if train["parallel"] == "ddp":
        return
    if train["parallel"] == "hsdp" and not 1 < train["nodes"] < train["processes"]:
        raise UserError(
            "config: train.parallel hsdp divides a policy over the processes of each of several"
            f" nodes, but train.nodes is {train['nodes']} and train.processes is"
            f" {train['processes']}; set train.parallel: fsdp2"
        )
    if train["processes"] == 1:
        raise UserError(
            f"config: train.parallel {train['parallel']} divides a policy over processes, but"
            " train.processes is 1; raise it, or set train.parallel: ddp"
        )
    if "bnb" in train["optimizer"]:
        raise UserError(
            f"config: train.optimizer {train['optimizer']} does not work with train.parallel"
            f" {train['parallel']}, which divides the optimiser's state; set train.parallel: ddp,"
            " or train.optimizer: rmsprop"
        )
    if train["lora_rank"]:
        raise UserError(
            f"config: train.parallel {train['parallel']} does not work with train.lora_rank, which"
            " trains few weights; set train.parallel: ddp"
        )


def _check_trl(train: dict[str, Any]) -> None:
    """Raise `UserError` for settings that TRL's own trainer does not have."""
    for key in ("sft_weight", "optimism", "length_weight"):
        if train[key]:
            raise UserError(
                f"config: train.{key} does not work with TRL's trainer; set it to 0, or"
                " train.backend: transformers"
            )
    if train["loss"] == "dpo" and train["label_smoothing"]:
        raise UserError(
            "config: TRL's DPO has no train.label_smoothing; set it to 0, or"
            " train.backend: transformers"
        )
    if train["loss"] == "ipo" and not (train["per_token"] and train["ipo_target"] == 0.5):
        raise UserError(
            "config: TRL's IPO is per token with target 1/(2 beta); set train.per_token: true and"
            " train.ipo_target: 0.5"
        )
    if train["loss_scale"] != "none":
        raise UserError(
            "config: TRL does not scale losses; use train.loss_scale: none or"
            " train.backend: transformers"
        )
