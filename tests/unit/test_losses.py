"""Losses compared with golden values, an independent implementation and closed forms."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from sppo.core.config import default_of, schema
from sppo.core.errors import UserError
from sppo.theory import games
from sppo.training.losses import LOSSES, Loss, pair_loss, unread_keys
from sppo.training.requirements import P_HAT

OPTIONS = {
    key: default_of(rule, "paper")
    for key, rule in schema()["properties"]["train"]["properties"].items()
}
# One pair of which reference values of the losses are known: log-probabilities under the policy,
# the reference and pi_t; numbers of tokens; P-hat of both responses; P(w beats l).
GOLDEN = {
    "logp_chosen": -50.0,
    "logp_rejected": -61.0,
    "reference_chosen": -52.0,
    "reference_rejected": -60.0,
    "current_chosen": -51.0,
    "current_rejected": -60.5,
    "opponents_chosen": -51.5,
    "opponents_rejected": -60.25,
    "tokens_chosen": 20.0,
    "tokens_rejected": 25.0,
    "p_hat_chosen": 0.8,
    "p_hat_rejected": 0.2,
    "p_chosen_beats_rejected": 0.9,
}
# The options of each loss in the tests below.
CASES = {name: {} for name in LOSSES} | {
    "dpo": {"label_smoothing": 0.1, "sft_weight": 0.005, "length_weight": 0.05},
    "dno": {"length_weight": 0.02},
    "dpo_positive": {"dpop_weight": 5.0, "length_weight": 0.03},
    "exo": {"label_smoothing": 0.001},
    "asft": {"asft_weight": 0.7},
    "mnpo": {"tau": 0.0003},
    "rspo": {"reverse_kl_weight": 0.3, "forward_kl_weight": 0.2, "forward_kl_limit": 3.0},
    "ipo": {"per_token": True, "ipo_target": 1.0},
    "simpo": {"gamma": 1.5, "length_weight": 0.01},
    "hinge": {"optimism": 0.01},
    "mmpo": {"gamma": 3.0, "length_weight": 0.02},
    "inpo": {"tau": 0.03},
    "nash_md": {"tau": 0.0005},
    "mpo": {"tau": 0.3},
}


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def by_hand(
    name: str,
    rows: list[dict[str, float]],
    beta: float,
    tau=0.0,
    gamma=1.0,
    label_smoothing=0.0,
    ipo_target=0.5,
    per_token=False,
    sft_weight=0.0,
    optimism=0.0,
    length_weight=0.0,
    dpop_weight=50.0,
    asft_weight=1.0,
    reverse_kl_weight=0.5,
    forward_kl_weight=0.1,
    forward_kl_limit=10.0,
) -> list[float]:
    """The losses of pairs in plain Python, from the formulas of the papers.

    It shares no code with sppo.training.losses.
    """
    losses = []
    ratio_w = [row["logp_chosen"] - row["reference_chosen"] for row in rows]
    ratio_l = [row["logp_rejected"] - row["reference_rejected"] for row in rows]
    for row, w, l in zip(rows, ratio_w, ratio_l):
        pw, pl, p = row["p_hat_chosen"], row["p_hat_rejected"], row["p_chosen_beats_rejected"]
        h = row["logp_chosen"] - row["logp_rejected"]
        ref = row["reference_chosen"] - row["reference_rejected"]
        prev = row["current_chosen"] - row["current_rejected"]
        eta = 1 / beta
        longer = length_weight * (row["tokens_chosen"] - row["tokens_rejected"])
        if name == "sppo":
            loss = ((w - eta * (pw - 0.5)) ** 2 + (l - eta * (pl - 0.5)) ** 2) / 2
        elif name == "sppo_single":
            loss = ((w - eta * (p - 0.5)) ** 2 + (l + eta * (p - 0.5)) ** 2) / 2
        elif name == "sppo_hard":
            loss = (w - eta / 2) ** 2 + (l + eta / 2) ** 2  # TRL has no factor 1/2
        elif name in ("dpo", "dno", "mmpo"):
            labels = {
                "dpo": 1 - label_smoothing,
                "dno": sigmoid(pw - pl),
                "mmpo": sigmoid(gamma * (pw - pl)),
            }
            q = labels[name]
            z = beta * (w - l) + longer
            loss = -q * log_sigmoid(z) - (1 - q) * log_sigmoid(-z)
        elif name == "dpo_positive":
            loss = -log_sigmoid(beta * (w - l - dpop_weight * max(0.0, -w)) + longer)
        elif name == "exo":  # KL(policy || labels) over the two responses
            policy = [sigmoid(beta * (w - l)), sigmoid(beta * (l - w))]
            labels = [1 - label_smoothing, label_smoothing]
            loss = sum(q * (math.log(q) - math.log(p)) for q, p in zip(policy, labels) if q > 0)
        elif name == "nca":
            loss = -log_sigmoid(beta * w) - log_sigmoid(-beta * w) / 2 - log_sigmoid(-beta * l) / 2
        elif name == "apo_zero":
            loss = sigmoid(-beta * w) + sigmoid(beta * l)
        elif name == "rspo":
            target_w, target_l = eta * (pw - 0.5), eta * (pl - 0.5)
            own_w = row["logp_chosen"] - row["current_chosen"]
            own_l = row["logp_rejected"] - row["current_rejected"]
            loss = ((own_w - target_w) ** 2 + (own_l - target_l) ** 2) / 2
            loss += reverse_kl_weight * (w**2 + l**2)
            loss += forward_kl_weight * math.exp(min(-w, forward_kl_limit))
            loss += forward_kl_weight * math.exp(min(-l, forward_kl_limit))
        elif name == "hinge":
            loss = max(0.0, 1 - beta * (w - l))
        elif name == "ipo":
            a, b = w, l
            if per_token:
                a, b = w / row["tokens_chosen"], l / row["tokens_rejected"]
            loss = (a - b - ipo_target / beta) ** 2
        elif name == "kto_pair":
            kl_w, kl_l = max(0.0, sum(ratio_w) / len(rows)), max(0.0, sum(ratio_l) / len(rows))
            loss = (1 - sigmoid(beta * (w - kl_l)) + 1 - sigmoid(beta * (kl_w - l))) / 2
        elif name == "simpo":
            a = row["logp_chosen"] / row["tokens_chosen"]
            b = row["logp_rejected"] / row["tokens_rejected"]
            loss = -log_sigmoid(beta * (a - b) - gamma + longer)
        elif name == "asft":
            a = row["logp_chosen"] / row["tokens_chosen"]
            p_w = min(math.exp(a), 1 - 1e-7)
            p_l = min(math.exp(row["logp_rejected"] / row["tokens_rejected"]), 1 - 1e-7)
            odds = [math.log(p / (1 - p)) for p in (p_w, p_l)]
            loss = -a - asft_weight * (log_sigmoid(odds[0]) + log_sigmoid(-odds[1]))
        elif name == "sft":
            loss = -row["logp_chosen"] / row["tokens_chosen"]
        elif name == "inpo":
            loss = (h - tau / beta * ref - (beta - tau) / beta * prev - 1 / (2 * beta)) ** 2
        elif name == "mnpo":
            against = row["opponents_chosen"] - row["opponents_rejected"]
            loss = (h - tau / beta * ref - (beta - tau) / beta * against - 1 / (2 * beta)) ** 2
        elif name == "nash_md":
            mixture = (1 - tau / beta) * prev + tau / beta * ref
            loss = (h - mixture - (pw - pl) / beta) ** 2
        elif name == "mpo":
            loss = ((1 + eta * tau) * h - prev - eta * tau * ref - eta * (pw - pl)) ** 2
        loss += sft_weight * -row["logp_chosen"] / row["tokens_chosen"]
        loss += optimism * beta * (w + l) / 2
        losses.append(loss)
    return losses


def ours(
    name: str, rows: list[dict[str, float]], beta: float, **options: object
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a batch in float64, and the batch's columns.

    The policy's log-probabilities require gradients.
    """
    pair = {key: torch.tensor([row[key] for row in rows], dtype=torch.float64) for key in rows[0]}
    for side in ("chosen", "rejected"):
        pair[f"logp_{side}"].requires_grad_()
    return pair_loss(name, pair, OPTIONS | {"beta": beta} | options), pair


def random_rows(n: int, seed: int) -> list[dict[str, float]]:
    draw = random.Random(seed)
    rows = []
    for _ in range(n):
        row = {f"tokens_{side}": float(draw.randint(3, 60)) for side in ("chosen", "rejected")}
        for side in ("chosen", "rejected"):
            row[f"logp_{side}"] = -2 * row[f"tokens_{side}"] + draw.gauss(0, 8)
            row |= {
                f"{of}_{side}": row[f"logp_{side}"] + draw.gauss(0, 8)
                for of in ("current", "reference", "opponents")
            }
        rows.append(
            row
            | {
                name: draw.random()
                for name in ("p_hat_chosen", "p_hat_rejected", "p_chosen_beats_rejected")
            }
        )
    return rows


@pytest.mark.parametrize(
    ("name", "value", "options"),
    [
        ("sppo", 89102.5, {"beta": 1e-3}),
        ("sppo_single", 158802.5, {"beta": 1e-3}),
        ("sppo_hard", 497005.0, {"beta": 1e-3}),
        ("dpo", 0.5543552444685271, {"beta": 0.1}),
        ("dpo", 0.5843552444685272, {"beta": 0.1, "label_smoothing": 0.1}),
        ("dpo", 0.5668552444685271, {"beta": 0.1, "sft_weight": 0.005}),
        ("ipo", 4.0, {"beta": 0.1}),
        ("ipo", 23.619600000000002, {"beta": 0.1, "per_token": True}),
        ("ipo", 0.49 / 0.1**2, {"beta": 0.1, "ipo_target": 1.0}),
        ("simpo", 1.4023778760079761, {"beta": 2.0, "gamma": 1.0}),
        ("hinge", 0.7, {"beta": 0.1}),
        ("sft", 2.5, {"beta": 0.1}),
        ("inpo", 9604.0, {"beta": 0.005, "tau": 0.005 / 3}),
    ],
)
def test_loss_has_its_golden_value(name, value, options):
    assert ours(name, [GOLDEN], **options)[0].item() == pytest.approx(value, rel=1e-12)


def test_soft_label_losses_have_their_golden_values():
    """The label of DNO is sigma(d) and the label of MMPO is sigma(gamma d), with d = 0.8 - 0.2.

    Here gamma gives MMPO the label 0.9 = P(w beats l). The label of DNO is sigma(0.6) = 0.6457.
    """
    mmpo, _ = ours("mmpo", [GOLDEN], beta=0.1, gamma=math.log(9) / 0.6)
    assert mmpo.item() == pytest.approx(0.5843552444685273, rel=1e-12)
    dno, _ = ours("dno", [GOLDEN], beta=0.1)
    assert dno.item() == pytest.approx(0.66066, abs=5e-6)


def test_golden_sppo_loss_times_beta_squared():
    assert 1e-3**2 * ours("sppo", [GOLDEN], 1e-3)[0].item() == pytest.approx(0.0891025, rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("beta", [1e-3, 0.1, 2.0])
def test_batch_loss_equals_a_loop_over_pairs(name, beta):
    rows = random_rows(17, seed=1)
    assert ours(name, rows, beta, **CASES[name])[0].tolist() == pytest.approx(
        by_hand(name, rows, beta, **CASES[name]), rel=1e-12
    )


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("beta", [1e-3, 0.1])
def test_gradients_equal_central_differences(name, beta):
    rows = random_rows(5, seed=2)
    h = 1e-3
    loss, pair = ours(name, rows, beta, **CASES[name])
    keys = ("logp_chosen", "logp_rejected")
    # A loss without the loser has no gradient there: zeros.
    gradients = torch.autograd.grad(loss.sum(), [pair[key] for key in keys], materialize_grads=True)

    def total(i: int, key: str, step: float) -> float:
        """The sum of all losses after `step` is added to one log-probability."""
        moved = {**rows[i], key: rows[i][key] + step}
        return sum(by_hand(name, [*rows[:i], moved, *rows[i + 1 :]], beta, **CASES[name]))

    for key, gradient in zip(keys, gradients):
        for i, got in enumerate(gradient.tolist()):
            slope = (total(i, key, h) - total(i, key, -h)) / (2 * h)
            assert got == pytest.approx(slope, rel=1e-4, abs=1e-5)


def test_keys_of_other_losses_are_known():
    assert {"tau", "history", "gamma", "dpop_weight", "length_weight"} <= set(unread_keys("sppo"))
    assert not {"tau", "history"} & set(unread_keys("mnpo"))
    assert not {"beta", "sft_weight", "learning_rate"} & set(unread_keys("sft"))
    assert "length_weight" not in unread_keys("dpo")
    for name, loss in LOSSES.items():
        assert ("loss_scale" in unread_keys(name)) == ("beta" not in loss.reads)
    assert {"loss_scale"} <= set(unread_keys("sft")) & set(unread_keys("asft"))


def test_loss_is_a_choice_of_the_configuration():
    choices = schema()["properties"]["train"]["properties"]["loss"]["enum"]
    assert {"sppo", "sppo_single", "dpo", "hinge", "ipo", "kto_pair"} < set(choices)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_requires_p_hat_exactly_if_it_uses_it(name):
    """The configuration refuses such a loss if the pairs have no P-hat."""
    rows = random_rows(5, seed=3)
    other = [row | {key: 1 - row[key] ** 2 for key in row if key.startswith("p_")} for row in rows]
    before, _ = ours(name, rows, 0.1, **CASES[name])
    after, _ = ours(name, other, 0.1, **CASES[name])
    changed = before.tolist() != after.tolist()
    assert changed == (P_HAT in LOSSES[name].requires)


def pair_of(
    delta_w: float, delta_l: float, n: int = 1, **numbers: float
) -> dict[str, torch.Tensor]:
    """`n` pairs with these log-ratios to the reference and to pi_t."""
    row = {
        "reference_chosen": 0.0,
        "reference_rejected": 0.0,
        "current_chosen": 0.0,
        "current_rejected": 0.0,
        "opponents_chosen": 0.0,
        "opponents_rejected": 0.0,
        "logp_chosen": delta_w,
        "logp_rejected": delta_l,
        "tokens_chosen": 1.0,
        "tokens_rejected": 1.0,
        "p_hat_chosen": 0.5,
        "p_hat_rejected": 0.5,
        "p_chosen_beats_rejected": 0.5,
    }
    row |= numbers
    return {
        key: torch.full((n,), value, dtype=torch.float64, requires_grad=key.startswith("logp_"))
        for key, value in row.items()
    }


def test_sppo_is_minimal_at_the_target_of_each_log_ratio():
    """SPPO has a target for each log-ratio. DPO and IPO determine only their difference."""
    pair = pair_of(0.4 / 0.01, -0.3 / 0.01, p_hat_chosen=0.9, p_hat_rejected=0.2)
    loss = pair_loss("sppo", pair, OPTIONS | {"beta": 0.01})
    loss.sum().backward()
    assert loss.item() == pytest.approx(0, abs=1e-20)
    assert pair["logp_chosen"].grad.item() == pytest.approx(0, abs=1e-10)
    assert pair["logp_rejected"].grad.item() == pytest.approx(0, abs=1e-10)


def test_first_sppo_loss_of_a_strict_order_of_five():
    """K = 5 in a strict order: P-hat is 0.9 and 0.1, the targets at eta = 1000 are +-400 nats."""
    pair = pair_of(0.0, 0.0, 3, p_hat_chosen=0.9, p_hat_rejected=0.1)
    assert pair_loss("sppo", pair, OPTIONS | {"beta": 1e-3}).tolist() == pytest.approx(
        [160000.0] * 3, rel=1e-6
    )


def test_inpo_and_mpo_losses_are_proportional():
    """INPO(eta_I, tau) and MMD(eta, alpha) have one minimiser if the two P-hats differ by 1/2.

    Here eta_I = (1 + eta alpha) / eta and tau = alpha.
    """
    eta = 4.0
    alpha = 0.3
    row = GOLDEN | {"p_hat_chosen": 0.75, "p_hat_rejected": 0.25}
    beta = (1 + eta * alpha) / eta
    inpo = ours("inpo", [row], beta=beta, tau=alpha)[0].item()
    mpo = ours("mpo", [row], beta=1 / eta, tau=alpha)[0].item()
    assert mpo == pytest.approx((1 + eta * alpha) ** 2 * inpo, rel=1e-12)


def test_sft_reads_only_the_winner():
    """No log-ratio, no margin and no label: every other column can be anything."""
    assert set(LOSSES["sft"].reads) == {"logp_w", "tokens_w"}
    assert not LOSSES["sft"].has_reference
    rows = random_rows(7, seed=4)
    others = random_rows(7, seed=5)
    of_winner = ("logp_chosen", "tokens_chosen")
    mixed = [b | {key: a[key] for key in of_winner} for a, b in zip(rows, others)]
    loss, pair = ours("sft", rows, 0.1)
    assert loss.tolist() == ours("sft", mixed, 2.0)[0].tolist()
    loss.sum().backward()
    assert pair["logp_rejected"].grad is None
    assert torch.equal(pair["logp_chosen"].grad, -1 / pair["tokens_chosen"])


def test_sft_is_the_term_that_sft_weight_adds():
    rows = random_rows(7, seed=6)
    plain, added = (ours("hinge", rows, 0.1, sft_weight=weight)[0] for weight in (0.0, 1.0))
    assert (added - plain).tolist() == pytest.approx(ours("sft", rows, 0.1)[0].tolist(), rel=1e-12)


def test_unknown_loss_is_refused_by_name():
    with pytest.raises(ValueError, match="'dop'"):
        pair_loss("dop", pair_of(0.0, 0.0), OPTIONS)


def test_exact_nash_md_step_has_zero_loss():
    game = games.GAMES["comal3"]
    beta = 2.0
    tau = 0.3
    start, once, twice = games.play(games.nash_md(game.P, game.start, game.start, beta, tau), 2)
    mixture = once ** (1 - tau / beta) * start ** (tau / beta)
    won = game.P @ (mixture / mixture.sum())
    rows = [
        {
            "logp_chosen": np.log(twice[w]),
            "logp_rejected": np.log(twice[l]),
            "current_chosen": np.log(once[w]),
            "current_rejected": np.log(once[l]),
            "opponents_chosen": np.log(once[w]),
            "opponents_rejected": np.log(once[l]),
            "reference_chosen": np.log(start[w]),
            "reference_rejected": np.log(start[l]),
            "p_hat_chosen": won[w],
            "p_hat_rejected": won[l],
            "p_chosen_beats_rejected": game.P[w, l],
            "tokens_chosen": 1.0,
            "tokens_rejected": 1.0,
        }
        for w, l in ((0, 1), (1, 2), (2, 0))
    ]
    assert ours("nash_md", rows, beta, tau=tau)[0].tolist() == pytest.approx([0, 0, 0], abs=1e-20)
    assert min(ours("nash_md", rows, beta, tau=0.0)[0].tolist()) > 1e-5


def test_loss_that_returns_no_value_per_pair_is_refused(monkeypatch):
    monkeypatch.setitem(LOSSES, "mine", Loss(lambda delta_w, delta_l: (delta_w - delta_l).mean()))
    with pytest.raises(UserError, match="loss mine returned .* one value for each pair"):
        pair_loss("mine", pair_of(0.0, 0.0, 2), OPTIONS)


def test_argument_with_a_default_can_be_no_key_of_the_section(monkeypatch):
    monkeypatch.setitem(LOSSES, "mine", Loss(lambda delta_w, scale=2.0: scale * delta_w))
    assert pair_loss("mine", pair_of(1.5, 0.0), OPTIONS).tolist() == [3.0]


def test_asft_is_finite_for_a_response_of_probability_1():
    logp = torch.zeros(1, requires_grad=True)
    loss = LOSSES["asft"].function(logp, logp, torch.ones(1), torch.ones(1), 1.0)
    loss.sum().backward()
    assert loss.isfinite().all() and logp.grad.isfinite().all()
