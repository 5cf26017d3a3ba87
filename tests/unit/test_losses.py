"""Losses: the golden values, an independent re-implementation, gradients, the closed form before the first step."""

from __future__ import annotations

import random

import pytest
import torch

from sppo.losses import LOSSES, pair_loss

# policy - reference of winner and loser, P-hat of both, P(winner beats loser): ../shared/spec/golden.json.
GOLDEN = dict(delta_w=-50.0 + 52.0, delta_l=-61.0 + 60.0, p_hat_w=0.8, p_hat_l=0.2, p_wl=0.9, beta=1e-3)


def by_hand(name: str, delta_w: float, delta_l: float, p_hat_w: float, p_hat_l: float, p_wl: float, beta: float) -> float:
    """One pair in plain Python, from the formulas of the specification and not from ours."""
    eta = 1 / beta
    if name == "sppo":
        return ((delta_w - eta * (p_hat_w - 0.5)) ** 2 + (delta_l - eta * (p_hat_l - 0.5)) ** 2) / 2
    if name == "sppo_single":
        return ((delta_w - eta * (p_wl - 0.5)) ** 2 + (delta_l + eta * (p_wl - 0.5)) ** 2) / 2
    return (delta_w - eta / 2) ** 2 + (delta_l + eta / 2) ** 2  # TRL has no factor 1/2


def ours(name: str, rows: list[dict[str, float]], beta: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss of a batch in float64, and the two log-ratios as leaves."""
    columns = {key: torch.tensor([row[key] for row in rows], dtype=torch.float64) for key in rows[0]}
    delta_w, delta_l = columns["delta_w"].requires_grad_(), columns["delta_l"].requires_grad_()
    pair = {"p_hat_chosen": columns["p_hat_w"], "p_hat_rejected": columns["p_hat_l"], "p_chosen_beats_rejected": columns["p_wl"]}
    return pair_loss(name, delta_w, delta_l, pair, beta), delta_w, delta_l


def random_rows(n: int, seed: int) -> list[dict[str, float]]:
    draw = random.Random(seed)
    return [dict(delta_w=draw.gauss(0, 30), delta_l=draw.gauss(0, 30), p_hat_w=draw.random(), p_hat_l=draw.random(), p_wl=draw.random())
            for _ in range(n)]


@pytest.mark.parametrize(("name", "value"), [("sppo", 89102.5), ("sppo_single", 158802.5), ("sppo_hard", 497005.0)])
def test_golden_value(name, value):
    row = {key: number for key, number in GOLDEN.items() if key != "beta"}
    loss, _, _ = ours(name, [row], GOLDEN["beta"])
    assert loss.item() == pytest.approx(value, rel=1e-12)


def test_golden_value_times_beta_squared():
    row = {key: number for key, number in GOLDEN.items() if key != "beta"}
    assert 1e-3 ** 2 * ours("sppo", [row], 1e-3)[0].item() == pytest.approx(0.0891025, rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("beta", [1e-3, 0.1, 2.0])
def test_batch_equals_a_loop_over_pairs(name, beta):
    rows = random_rows(17, seed=1)
    loss, _, _ = ours(name, rows, beta)
    assert loss.tolist() == pytest.approx([by_hand(name, **row, beta=beta) for row in rows], rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("beta", [1e-3, 0.1])
def test_gradients_equal_central_differences_of_the_loop(name, beta):
    rows, h = random_rows(5, seed=2), 1e-3
    loss, delta_w, delta_l = ours(name, rows, beta)
    loss.sum().backward()
    for leaf, key in ((delta_w, "delta_w"), (delta_l, "delta_l")):
        for got, row in zip(leaf.grad.tolist(), rows, strict=True):
            up, down = (by_hand(name, **{**row, key: row[key] + step}, beta=beta) for step in (h, -h))
            assert got == pytest.approx((up - down) / (2 * h), rel=1e-5, abs=1e-5)


def test_sppo_is_least_where_every_log_ratio_meets_its_own_target():
    """Pointwise, unlike DPO and IPO, which fix only the difference of the two."""
    row = dict(delta_w=0.4 / 0.01, delta_l=-0.3 / 0.01, p_hat_w=0.9, p_hat_l=0.2, p_wl=0.5)
    loss, delta_w, delta_l = ours("sppo", [row], 0.01)
    loss.sum().backward()
    assert loss.item() == pytest.approx(0, abs=1e-20)
    assert delta_w.grad.item() == delta_l.grad.item() == pytest.approx(0, abs=1e-10)


def test_first_step_of_a_strict_order_of_five_costs_160000():
    """K = 5 in a strict total order: P-hat 0.9 and 0.1, targets of +-400 nats at eta = 1000."""
    zero, p = torch.zeros(3), {"p_hat_chosen": torch.full((3,), 0.9), "p_hat_rejected": torch.full((3,), 0.1)}
    assert pair_loss("sppo", zero, zero, p, 1e-3).tolist() == pytest.approx([160000.0] * 3, rel=1e-6)


def test_unknown_loss_is_refused_by_name():
    with pytest.raises(ValueError, match="'dop'"):
        pair_loss("dop", torch.zeros(1), torch.zeros(1), {}, 1.0)
