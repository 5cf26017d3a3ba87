"""Training: step-0 identity, micro-batches, schedule, TRL as oracle, kill and resume, LoRA."""

from __future__ import annotations

import contextlib
import math
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import TrainingFolder, distance, make_pairs, option_words
from transformers.models.llama.modeling_llama import LlamaMLP

import prepare_policy
import score_reference
import train_policy
from sppo.core.artifacts import file_hash, read_json, record_path, write_json
from sppo.core.config import default_of, schema
from sppo.core.errors import UserError
from sppo.core.tables import read_table, write_table
from sppo.policies import lora_update
from sppo.policies.folders import check_policy
from sppo.policies.hub import LORA_FACTORS
from sppo.policies.lora_update import UpdatedLinear, read_factors
from sppo.policies.models import load_policy
from sppo.reporting.cards import header
from sppo.training import attention, logps, trainer
from sppo.training.batches import pair_batch
from sppo.training.checkpoints import exclusive_lock, last_checkpoint, remove_damaged
from sppo.training.lengths import (
    needed_tokens,
    pair_length,
)
from sppo.training.logps import response_logps
from sppo.training.losses import Loss
from sppo.training.trainer import (
    IDENTITY_TOLERANCE,
    collate_pairs,
    identity_fault,
    make_trainer,
    plan,
    training_order,
)

LOGP_COLUMNS = [
    f"{of}_{end}" for of in ("current", "reference", "opponents") for end in ("chosen", "rejected")
]
DEFAULTS = {
    key: default_of(rule, "paper")
    for key, rule in schema()["properties"]["train"]["properties"].items()
}


class Place(TrainingFolder):
    """A folder with pairs and their log-probabilities under the tiny policy.

    `score` and `train` run the programs on these files.
    """

    def __init__(self, folder: Path, policy: Path, program, n: int) -> None:
        super().__init__(folder, policy)
        self.program = program
        self.pairs = folder / "pairs.parquet"
        self.reference = folder / "logps.parquet"
        write_table(self.pairs, make_pairs(n), "pairs")
        self.score(self.policy, "float32")

    def score(
        self, policy: Path, precision: str, micro_batch_size: int = 3, lora_rank: int = 0
    ) -> None:
        self.program(
            score_reference,
            "--pairs",
            self.pairs,
            "--policy",
            policy,
            "--precision",
            precision,
            "--device",
            "cpu",
            "--micro-batch-size",
            micro_batch_size,
            "--lora-rank",
            lora_rank,
            "--output",
            self.reference,
        )

    def train(self, name: str, **options: object) -> dict[str, torch.Tensor]:
        """Weights of the policy that training with these options gives; the defaults are quick."""
        options = {
            "precision": "float32",
            "device": "cpu",
            "learning_rate": 1e-3,
            "optimizer": "sgd",
            "max_grad_norm": 0.0,
            "warmup_ratio": 0.0,
            "lr_schedule": "constant",
            "schedule_total_epochs": 1,
            "stop_epoch": 1,
            "batch_size": 4,
            "micro_batch_size": 4,
        } | options
        self.program(
            train_policy,
            "--pairs",
            self.pairs,
            "--current",
            self.reference,
            "--policy",
            self.policy,
            "--output",
            self.folder / name,
            "--log",
            self.folder / f"{name}.jsonl",
            *option_words(options),
        )
        return self.weights(name)


@pytest.fixture
def place(tmp_path, tiny_policy, program) -> Place:
    return Place(tmp_path, tiny_policy, program, n=10)


# --- step 0 ---


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_log_ratios_are_0_when_both_passes_share_a_batch(precision, place):
    """Both programs run, with the parquet file between them.

    All pairs have the same length, so both programs use the same order.
    """
    pairs = make_pairs(4)
    for pair, prompt_length in zip(pairs, (4, 7, 12, 5), strict=True):
        pair["prompt_token_ids"] = [9] * prompt_length
        pair["chosen_token_ids"] = [*range(20, 43 - prompt_length), 2]
        pair["rejected_token_ids"] = pair["rejected_token_ids"][:5]
    write_table(place.pairs, pairs, "pairs")
    place.score(place.policy, precision, 4)
    place.train("policy", precision=precision)
    step_0 = read_json(record_path(place.folder / "policy"))["step_0"]
    # The SPPO loss where every log-ratio is 0 and 1 / beta is 1000.
    targets = [
        (1000 * (p["p_hat_chosen"] - 0.5), 1000 * (p["p_hat_rejected"] - 0.5)) for p in pairs
    ]
    closed = sum(winner**2 / 2 + loser**2 / 2 for winner, loser in targets) / 4
    first = place.log("policy")[0]
    assert step_0["log_ratio_per_token"] == 0.0
    assert step_0["loss"] == step_0["closed_form"] == pytest.approx(closed, rel=1e-6)
    assert first["log_ratio_chosen"] == 0.0
    assert first["loss"] == pytest.approx(closed, rel=1e-6)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("reference_batch", [1, 10])
def test_step_0_identity_holds_with_other_batch_sizes(precision, reference_batch, place):
    place.score(place.policy, precision, reference_batch)
    place.train("policy", precision=precision, loss="sppo", batch_size=8, micro_batch_size=4)
    step_0 = read_json(record_path(place.folder / "policy"))["step_0"]
    ratio_tolerance, loss_tolerance = {"float32": (1e-3, 1e-3), "bfloat16": (5e-2, 2e-2)}[precision]
    assert step_0["log_ratio_per_token"] < ratio_tolerance
    assert step_0["loss"] == pytest.approx(step_0["closed_form"], rel=loss_tolerance)


@pytest.mark.parametrize("dtype", IDENTITY_TOLERANCE)
@pytest.mark.parametrize("tokens", [1, 100])
def test_log_ratios_beyond_rounding_are_a_fault(dtype, tokens):
    """One response is far off, or all 16 a little: the limit grows with the root of the length."""
    base, each = IDENTITY_TOLERANCE[dtype]
    lengths = torch.full((16,), float(tokens))
    one_off = torch.zeros(16)
    one_off[7] = -1.0
    all_off = torch.tensor([1.0, -1.0] * 8) / 4
    for ratios in (one_off, all_off):
        for nats in (0.5, 3.0):  # a token; improbable ones have larger errors
            logps = -nats * lengths
            each_limit = math.sqrt(base**2 + (max(nats, 1) * each) ** 2 * 16 * tokens)
            assert identity_fault(0.99 * each_limit * ratios, logps, lengths, dtype) is None
            fault = identity_fault(1.01 * each_limit * ratios, logps, lengths, dtype)
            assert fault.startswith(f"the log-ratios of 16 responses, {16 * tokens} tokens, are ")


def test_a_nan_log_ratio_is_a_fault():
    ratios = torch.tensor([0.0, math.nan])
    assert "are nan nats" in identity_fault(ratios, torch.zeros(2), torch.ones(2), torch.float32)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_reference_of_another_policy_is_refused(precision, place, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(place.policy, other)
    model = load_policy(other, torch.float32, "cpu")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    model.save_pretrained(other)
    place.score(other, precision)
    with pytest.raises(UserError, match="step-0 identity.*another policy"):
        place.train("policy", precision=precision)
    assert not (tmp_path / "policy").exists()
    assert not (tmp_path / "policy.jsonl").exists()
    assert not record_path(tmp_path / "policy").exists()


def shift_one_reference(place: Place, position: int) -> None:
    """Change the reference of the pair at this position of the training order."""
    lengths = [pair_length(pair) for pair in read_table(place.pairs, "pairs")]
    pair_id = training_order(lengths, 4, 1, 0)[position]
    rows = read_table(place.reference, "logps")
    (row,) = [row for row in rows if row["pair_id"] == pair_id]
    row["rejected_logp"] += 0.5
    write_table(place.reference, rows, "logps")
    record_path(place.reference).unlink()


def test_step_0_check_sees_the_last_pair_of_the_first_step(place, tmp_path):
    shift_one_reference(place, 3)
    with pytest.raises(UserError, match="step-0 identity: the log-ratios of 8 responses"):
        place.train("policy", micro_batch_size=1)
    assert not (tmp_path / "policy").exists()


def test_step_0_check_ignores_pairs_after_the_first_step(place):
    shift_one_reference(place, -1)
    place.train("policy", micro_batch_size=1)


def test_reference_of_other_pairs_is_refused(place):
    rows = read_table(place.reference, "logps")
    write_table(place.reference, rows[:-1], "logps")
    with pytest.raises(UserError, match="does not belong to"):
        place.train("policy")


def test_pairs_without_rows_are_refused(place):
    write_table(place.pairs, [], "pairs")
    with pytest.raises(UserError, match="has no pairs"):
        place.train("policy")


# --- batches ---


def test_weights_do_not_depend_on_micro_batches(place):
    """Ten pairs in batches of four: two full steps and one of two pairs with the same weight."""
    options = {"beta": 0.01, "learning_rate": 1e-5}
    whole = place.train("policy4", micro_batch_size=4, **options)
    assert len(place.log("policy4")) == 3
    moved = distance(place.start(), whole)
    assert moved > 1e-3
    shortest = min(needed_tokens(pair) for pair in read_table(place.pairs, "pairs"))
    divisions = {
        "policy1": {"micro_batch_size": 1},
        "policy2": {"micro_batch_size": 2},
        "one_each": {"micro_batch_tokens": 1},
        "by_tokens": {"micro_batch_tokens": 4 * shortest},
    }
    for name, division in divisions.items():
        accumulated = place.train(name, **division, **options)
        assert distance(whole, accumulated) < 1e-4 * moved
        for ours, theirs in zip(place.log(name), place.log("policy4"), strict=True):
            for column in ("loss", "log_ratio_chosen", "log_ratio_rejected", "grad_norm"):
                assert ours[column] == pytest.approx(theirs[column], rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("more", [{}, {"gradient_checkpointing": True}, {"lora_rank": 4}])
def test_packed_batches_train_what_padded_ones_do(more, place, monkeypatch):
    """Programs pack only on a GPU, so the test chooses the layout."""

    def choose_packed(model, device):
        attention.use(model, attention.PACKED)
        return "packed"

    options = {"beta": 0.01, "learning_rate": 1e-4 if "lora_rank" in more else 1e-5} | more
    padded = place.train("padded", **options)
    for module in (trainer, logps):
        monkeypatch.setattr(module, "choose_layout", choose_packed)
    place.score(place.policy, "float32")
    packed = place.train("packed", micro_batch_tokens=100, **options)
    moved = distance(place.start(), padded)
    assert moved > 1e-3
    assert distance(padded, packed) < 1e-4 * moved
    for ours, theirs in zip(place.log("packed"), place.log("padded"), strict=True):
        for column in ("loss", "log_ratio_chosen", "log_ratio_rejected", "grad_norm"):
            assert ours[column] == pytest.approx(theirs[column], rel=1e-4, abs=1e-3)


def test_one_sgd_step_equals_the_gradient_computed_by_hand(place):
    """An independent forward and backward pass, pair by pair, with the loss written out.

    The step has ten pairs; its batch size is sixteen.
    """
    pairs = read_table(place.pairs, "pairs")
    references = read_table(place.reference, "logps")
    stepped = place.train(
        "policy", batch_size=16, micro_batch_size=4, learning_rate=1e-6, beta=0.01
    )
    model = load_policy(place.policy, torch.float32, "cpu")
    for pair, reference in zip(pairs, references, strict=True):
        w, l = response_logps(model, pair_batch([pair], "padded"))
        loss = (
            (w - reference["chosen_logp"] - 100 * (pair["p_hat_chosen"] - 0.5)) ** 2
            + (l - reference["rejected_logp"] - 100 * (pair["p_hat_rejected"] - 0.5)) ** 2
        ) / 2
        (loss / len(pairs)).backward()
    start = place.start()
    largest = 0.0
    for name, weight in model.named_parameters():
        if name in start:
            expected = -1e-6 * weight.grad
            size = expected.abs().max().item()
            largest = max(largest, size)
            torch.testing.assert_close(
                stepped[name] - start[name], expected, rtol=0, atol=2e-7 + 1e-3 * size
            )
    assert largest > 1e-5


LENGTHS = [random.Random(i).randint(5, 50) for i in range(23)]


def test_training_order_has_every_pair_once_per_epoch():
    """A step of 8 can span two epochs and is sorted by length, so only the counts are exact."""
    order = training_order(LENGTHS, 8, 3, seed=1)
    epochs = [order[i : i + 23] for i in range(0, 69, 23)]
    assert len(order) == 69
    assert all(order.count(i) == 3 for i in range(23))
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_each_step_is_sorted_by_length():
    order = training_order(LENGTHS, 8, 3, seed=1)
    for start in range(0, 69, 8):
        step = [LENGTHS[i] for i in order[start : start + 8]]
        assert step == sorted(step, reverse=True)


def test_training_order_depends_on_the_seed_only():
    order = training_order(LENGTHS, 8, 3, seed=1)
    assert order == training_order(LENGTHS, 8, 3, seed=1)
    assert order != training_order(LENGTHS, 8, 3, seed=2)


# --- several processes; tests/multi_process compares the weights that they train ---


def test_pairs_of_weight_0_change_nothing(place):
    """`micro_batches.divided` repeats a pair with weight 0 where pairs are missing."""
    rows = [pair | dict.fromkeys(LOGP_COLUMNS, -40.0) for pair in read_table(place.pairs, "pairs")]
    found = []
    for given in (rows, rows + [rows[-1] | {"weight": 0.0}] * 6):
        model = load_policy(place.policy, torch.float32, "cpu")
        options = DEFAULTS | {"batch_size": 16, "micro_batch_size": 16, "schedule_total_epochs": 1}
        trainer = make_trainer(model, rows, options, torch.float32, "cpu", place.folder / "work", 0)
        trainer.step_0 = {}  # no step-0 check: no policy gives these references
        loss = trainer.compute_loss(model, collate_pairs(given, "padded"))
        loss.backward()
        (counted,) = trainer._step_rows
        sums = (counted[:, 1:2] * counted[:, 2:]).sum(0).tolist()
        found.append((loss.item(), model.model.norm.weight.grad, sums))
    (loss, gradient, sums), (padded_loss, padded_gradient, padded_sums) = found
    assert loss == pytest.approx(padded_loss, rel=1e-5)
    assert sums == pytest.approx(padded_sums, rel=1e-5)
    torch.testing.assert_close(
        gradient, padded_gradient, rtol=1e-4, atol=1e-4 * gradient.abs().max().item()
    )


@pytest.mark.parametrize(("started", "wanted"), [("2", 1), ("4", 2)])
def test_processes_that_another_launcher_started_are_counted(started, wanted, place, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", started)
    with pytest.raises(
        UserError, match=f"{started} processes were started, but train.processes is {wanted}"
    ):
        place.train("policy", processes=wanted)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"parallel": "fsdp2"}, "fsdp2 needs GPUs"),
        ({"nodes": 2}, "NODE_RANK"),
        ({"batch_size": 5}, "batch_size"),
        ({"loss": "kto_pair"}, "kto_pair takes means over a step"),
    ],
)
def test_options_that_cannot_start_are_refused_before_any_work(options, said, place, monkeypatch):
    for name in ("NODE_RANK", "SLURM_NODEID", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=said):
        place.train("policy", processes=2, **options)
    assert not (place.folder / ".policy.work").exists()


def test_a_taken_port_is_a_one_line_error(place, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("NODE_RANK", "0")
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(UserError, match="MASTER_PORT"):
            place.train("policy", processes=2, nodes=2)


# --- schedule ---


@pytest.mark.parametrize(
    ("epochs", "mean", "last"), [(18, 1.38e-7, 2.77e-7), (6, 3.41e-7, 4.64e-7), (1, 2.5e-7, 0.0)]
)
def test_first_epoch_follows_the_long_schedule(epochs, mean, last, tmp_path):
    """312 steps of 64 pairs, stopped after epoch 1.

    The schedule has 18 epochs (paper), 6 (model card of Llama-3) or 1 (official scripts).
    """
    options = DEFAULTS | {"schedule_total_epochs": epochs}
    pairs = [make_pairs(1)[0] | dict.fromkeys(LOGP_COLUMNS, 0.0)] * (312 * 64)
    assert plan(len(pairs), options) == (312, 312 * epochs)
    trainer = make_trainer(
        torch.nn.Linear(1, 1), pairs, options, torch.float32, "cpu", tmp_path / "work", 0
    )
    assert trainer.args.max_steps == 312
    trainer.create_optimizer_and_scheduler(trainer.args.max_steps)
    rates = []
    for _ in range(312):
        rates.append(trainer.lr_scheduler.get_last_lr()[0])
        trainer.lr_scheduler.step()
    assert sum(rates) / 312 == pytest.approx(mean, rel=0.01)
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(last, rel=0.01, abs=1e-10)


@pytest.mark.parametrize(
    ("n", "options", "steps"),
    [
        (10, {"batch_size": 4, "stop_epoch": 1, "schedule_total_epochs": 1}, (3, 3)),
        (10, {"batch_size": 4, "stop_epoch": 1.5, "schedule_total_epochs": 18}, (4, 45)),
        (3, {"batch_size": 64, "stop_epoch": 1, "schedule_total_epochs": 18}, (1, 1)),
        (64, {"batch_size": 64, "stop_epoch": 0.5, "schedule_total_epochs": 0.5}, (1, 1)),
    ],
)
def test_plan_counts_steps_with_ragged_ends(n, options, steps):
    assert plan(n, options) == steps


def test_log_has_a_line_per_step_with_all_columns(place):
    place.train("policy", learning_rate=1e-6)
    log = place.log("policy")
    assert {
        "step",
        "loss",
        "log_ratio_chosen",
        "log_ratio_rejected",
        "reward_accuracy",
        "learning_rate",
        "grad_norm",
        "epoch",
        "tokens_per_second",
    } <= log[0].keys()
    assert [line["step"] for line in log] == [1, 2, 3]
    assert abs(log[0]["log_ratio_chosen"]) < 1e-3
    assert all(0 <= line["reward_accuracy"] <= 1 for line in log)
    assert all(line["tokens_per_second"] > 0 for line in log)


def test_warm_up_follows_the_long_schedule(place):
    """40 pairs in steps of 4 make ten steps, of which five are warm-up.

    The log has the rate that the step used, so the first one is 0.
    """
    place.train(
        "policy",
        lr_schedule="linear",
        warmup_ratio=0.5,
        schedule_total_epochs=4,
        stop_epoch=1,
        learning_rate=1e-6,
    )
    rates = [line["learning_rate"] for line in place.log("policy")]
    assert rates == pytest.approx([1e-6 * i / 5 for i in range(3)], abs=1e-12)


# --- TRL ---


def test_our_trainer_equals_trl_on_sppo_hard(place):
    """The same pairs in the same order; TRL computes its references itself.

    RMSProp turns gradients that are 0 up to rounding into steps of full size, so the sign of the
    step may differ in single weights. The mean difference is compared instead.
    """
    options = {
        "loss": "sppo_hard",
        "beta": 0.1,
        "learning_rate": 1e-4,
        "micro_batch_size": 2,
        "optimizer": "rmsprop",
        "lr_schedule": "linear",
        "warmup_ratio": 0.1,
        "max_grad_norm": 1.0,
        "schedule_total_epochs": 2,
    }
    ours = place.train("ours", backend="transformers", **options)
    theirs = place.train("trl", backend="trl", **options)
    moved = distance(place.start(), theirs)
    differences = torch.cat([(ours[name] - theirs[name]).abs().flatten() for name in ours])
    assert moved > 1e-4
    assert differences.mean().item() < 1e-3 * moved
    our_log, trl_log = place.log("ours"), place.log("trl")
    assert [line["learning_rate"] for line in our_log] == [
        line["learning_rate"] for line in trl_log
    ]
    assert our_log[0]["grad_norm"] == pytest.approx(trl_log[0]["grad_norm"], rel=1e-3)


@pytest.mark.parametrize(
    "loss",
    [
        {"loss": "sppo_hard"},
        {"loss": "dpo"},
        {"loss": "ipo", "per_token": "true"},
        {"loss": "exo", "label_smoothing": 0.01},
        {"loss": "nca"},
        {"loss": "apo_zero"},
    ],
    ids=str,
)
def test_our_trainer_equals_trl_in_every_weight_under_sgd(place, loss):
    rate = 1e-4 if loss["loss"] == "sppo_hard" else 1e-1
    options = loss | {"beta": 0.1, "learning_rate": rate, "micro_batch_size": 2}
    ours = place.train("ours", backend="transformers", **options)
    theirs = place.train("trl", backend="trl", **options)
    moved = distance(place.start(), theirs)
    assert moved > 1e-3
    assert distance(ours, theirs) < 1e-3 * moved


# --- a reference that is not the previous iterate ---


def test_loss_uses_the_reference_and_identity_uses_the_start(place, tmp_path):
    """DPO with another reference than the start policy: the loss before step 1 is not log 2."""
    other = tmp_path / "other"
    shutil.copytree(place.policy, other)
    model = load_policy(other, torch.float32, "cpu")
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
    model.save_pretrained(other)
    place.program(
        score_reference,
        "--pairs",
        place.pairs,
        "--policy",
        other,
        "--precision",
        "float32",
        "--device",
        "cpu",
        "--output",
        place.folder / "other.parquet",
    )
    for options in ({}, {"reference": place.folder / "other.parquet"}):
        place.train("policy", loss="dpo", beta=0.1, **options)
        step_0 = read_json(record_path(place.folder / "policy"))["step_0"]
        assert step_0["log_ratio_per_token"] < 1e-3
        assert step_0["loss"] == pytest.approx(step_0["closed_form"], rel=1e-3)
        is_log_2 = step_0["loss"] == pytest.approx(math.log(2), rel=1e-4)
        assert is_log_2 == ("reference" not in options)


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "hinge"},
        {"loss": "kto_pair"},
        {"loss": "simpo", "beta": 2.0, "gamma": 1.0},
        {"loss": "sft"},
        {"loss": "dno"},
        {"loss": "mmpo", "gamma": 4.0},
        {"loss": "inpo", "tau": 0.03},
        {"loss": "mpo", "tau": 0.03},
        {"loss": "nash_md", "tau": 0.03},
        {"loss": "mnpo", "tau": 0.03},
        {"loss": "rspo"},
        {"loss": "dpo_positive"},
        {"loss": "exo", "label_smoothing": 0.001},
        {"loss": "nca"},
        {"loss": "apo_zero"},
        {"loss": "asft"},
        {"loss": "dpo", "length_weight": 0.05},
        {"loss": "dpo", "sft_weight": 1.0, "optimism": 0.1},
    ],
    ids=str,
)
def test_every_other_loss_starts_at_its_closed_form_and_falls(place, tmp_path, options):
    """Ten epochs over the same pairs, which a policy can learn; pi_ref differs from pi_t."""
    references = {row["pair_id"]: row for row in read_table(place.reference, "logps")}
    other = [
        row | {"chosen_logp": row["chosen_logp"] - 1.5, "rejected_logp": row["rejected_logp"] + 0.5}
        for row in references.values()
    ]
    write_table(tmp_path / "other.parquet", other, "logps")
    place.train(
        "policy",
        reference=tmp_path / "other.parquet",
        batch_size=10,
        micro_batch_size=10,
        stop_epoch=10,
        schedule_total_epochs=10,
        learning_rate=1e-5,
        optimizer="adamw_torch",
        **{"beta": 0.1} | options,
    )
    step_0 = read_json(record_path(place.folder / "policy"))["step_0"]
    losses = [line["loss"] for line in place.log("policy")]
    assert step_0["log_ratio_per_token"] < 1e-3
    assert losses[0] == pytest.approx(step_0["closed_form"], rel=1e-3, abs=1e-3)
    assert losses[-1] < losses[0]


def test_nash_md_opponent_is_the_estimated_mixture():
    """Three responses 0, 1, 2; 1 and 2 tie, so they make no pair.

    Mixture 1 is the reference, which has all its weight on response 2; mixture 0 is uniform.
    """

    def pair(winner, loser, p, winner_reference):
        return {
            "prompt_id": "x",
            "chosen_sample_id": winner,
            "rejected_sample_id": loser,
            "p_chosen_beats_rejected": p,
            "current_chosen": -5.0,
            "current_rejected": -7.0,
            "reference_chosen": winner_reference,
            "reference_rejected": -7.0,
            "p_hat_chosen": 0.0,
            "p_hat_rejected": 0.0,
        }

    pairs = [pair(0, 1, 0.9, -5.0), pair(2, 0, 0.8, 995.0)]

    zero_one, two_zero = train_policy.against_mixture(pairs, 1.0)
    # Response 0 loses to 2 with 0.8; 1 ties with 2; 2 ties with itself.
    assert zero_one["p_hat_chosen"] == pytest.approx(0.2)
    assert zero_one["p_hat_rejected"] == pytest.approx(0.5)
    assert two_zero["p_hat_chosen"] == pytest.approx(0.5)
    assert two_zero["p_hat_rejected"] == pytest.approx(0.2)

    zero_one, _ = train_policy.against_mixture(pairs, 0.0)
    assert zero_one["p_hat_chosen"] == pytest.approx((0.5 + 0.9 + 0.2) / 3)
    assert zero_one["p_hat_rejected"] == pytest.approx((0.1 + 0.5 + 0.5) / 3)


def test_opponents_are_the_weighted_iterates(place, tmp_path):
    """With half the weight on an earlier iterate, h of the opponents is the mean of both."""
    current = read_table(place.reference, "logps")
    earlier = [
        row | {"chosen_logp": row["chosen_logp"] - 3.0, "rejected_logp": row["rejected_logp"] + 1.0}
        for row in current
    ]
    write_table(tmp_path / "earlier.parquet", earlier, "logps")
    options = {"loss": "mnpo", "beta": 0.1, "tau": 0.02, "batch_size": 10, "micro_batch_size": 10}
    losses = {}
    for name, more in (
        ("inpo", {"loss": "inpo"}),
        ("alone", {}),
        ("half", {"history": "1 1", "earlier": tmp_path / "earlier.parquet"}),
    ):
        place.train(name, **options | more)
        losses[name] = place.log(name)[0]["loss"]
    # At log-ratio 0 the loss is ((1 - tau / beta) (h_t - h_opponents) - 1 / (2 beta))^2, and here
    # h_opponents is h_t - 2.
    assert losses["inpo"] == pytest.approx(25.0, rel=1e-3)
    assert losses["alone"] == pytest.approx(losses["inpo"], rel=1e-6)
    assert losses["half"] == pytest.approx((0.8 * 2.0 - 5.0) ** 2, rel=1e-3)


def test_opponents_without_log_probabilities_are_refused(place):
    with pytest.raises(UserError, match="--earlier needs 1 files"):
        place.train("policy", loss="mnpo", beta=0.1, tau=0.02, history="1 1")


# --- kill and resume ---


class Killed(BaseException):
    """No Exception, so that no code under test catches it, as no code can catch a kill."""


def train_until(place: Place, monkeypatch, name: str, step: int, **options: object) -> None:
    """Train and stop as if the process were killed after this step."""

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == step:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(trainer.StepLog, "on_step_begin", on_step_begin)
        with pytest.raises(Killed):
            place.train(name, **options)


RESUMABLE = {
    "batch_size": 2,
    "micro_batch_size": 1,
    "checkpoint_steps": 1,
    "optimizer": "rmsprop",
    "learning_rate": 1e-4,
    "lr_schedule": "linear",
    "warmup_ratio": 0.3,
    "schedule_total_epochs": 2,
}


def test_killed_training_resumes_to_the_same_weights(place, monkeypatch, capsys):
    whole = place.train("whole", **RESUMABLE)
    train_until(place, monkeypatch, "policy", 3, **RESUMABLE)
    assert not (place.folder / "policy").exists()
    assert not record_path(place.folder / "policy").exists()
    assert (place.folder / ".policy.work" / "checkpoint-3").is_dir()
    half_written = place.folder / ".policy.work" / "checkpoint-4"
    half_written.mkdir()
    (half_written / "model.safetensors").write_bytes(b"cut")
    capsys.readouterr()
    resumed = place.train("policy", **RESUMABLE)
    assert printed_steps(capsys) == ["4", "5"], "it started again or skipped a step"
    assert distance(whole, resumed) < 1e-7
    whole_log, resumed_log = place.log("whole"), place.log("policy")
    for line in whole_log + resumed_log:
        del line["tokens_per_second"]
    assert whole_log == resumed_log
    assert not [path.name for path in place.folder.iterdir() if path.name.startswith(".")]


def printed_steps(capsys) -> list[str]:
    """Numbers of the steps that training printed since the last call."""
    lines = capsys.readouterr().out.splitlines()
    return [line.split()[1] for line in lines if line.startswith("step ")]


DAMAGES = {
    "removed": lambda file: file.unlink(),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-9]),
    "emptied": lambda file: file.write_bytes(b""),
    "a bit flipped": lambda file: file.write_bytes(with_flip(file.read_bytes())),
}


def with_flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.fixture(scope="module")
def killed(tmp_path_factory, tiny_policy):
    """A folder where training was killed after step 3 of 5, and the weights of a whole training."""
    with pytest.MonkeyPatch.context() as patch:

        def call(module, *words):
            patch.setattr("sys.argv", [module.__file__, *map(str, words)])
            module.main()

        place = Place(tmp_path_factory.mktemp("killed"), tiny_policy, call, n=10)
        whole = place.train("whole", **RESUMABLE)
        train_until(place, patch, "policy", 3, **RESUMABLE)
        shutil.copytree(place.folder / ".policy.work", place.folder / "kept")
        yield place, whole


@pytest.fixture
def work(killed) -> Path:
    """The work folder of the killed training, as the kill left it."""
    place, _ = killed
    folder = place.folder / ".policy.work"
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(place.folder / "kept", folder))


def test_a_checkpoint_has_all_files_to_resume_from(work):
    names = {file.name for file in (work / "checkpoint-3").rglob("*")}
    assert {
        "model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "trainer_state.json",
        "manifest.json",
    } <= names


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_checkpoint_file_is_named(damage, work, capsys):
    """The damaged checkpoint is removed, and the one before it is used."""
    for file in sorted((work / "checkpoint-3").rglob("*")):
        if not file.is_file():
            continue
        copy = shutil.copytree(work, work.with_name("each"), dirs_exist_ok=True)
        DAMAGES[damage](copy / file.relative_to(work))
        remove_damaged(copy)
        expected = file.name
        if file.name == "manifest.json" and damage == "removed":
            expected = "not written completely"
        (line,) = capsys.readouterr().err.splitlines()
        assert "checkpoint-3 cannot be used" in line
        assert expected in line
        assert last_checkpoint(copy) == copy / "checkpoint-2"
        assert not (copy / "checkpoint-3").exists()


@pytest.mark.parametrize(
    ("damaged", "steps"),
    [
        ([(3, "optimizer.pt", "removed")], "345"),
        ([(3, "model.safetensors", "a bit flipped")], "345"),
        ([(3, "scheduler.pt", "emptied")], "345"),
        ([(3, "rng_state.pth", "cut")], "345"),
        ([(3, "manifest.json", "removed")], "345"),
        ([(3, "optimizer.pt", "a bit flipped"), (2, "trainer_state.json", "emptied")], "12345"),
    ],
    ids=str,
)
def test_damaged_checkpoints_do_not_change_the_weights(damaged, steps, killed, work, capsys):
    place, whole = killed
    for step, name, damage in damaged:
        DAMAGES[damage](work / f"checkpoint-{step}" / name)
    assert distance(whole, place.train("policy", **RESUMABLE)) < 1e-7
    assert printed_steps(capsys) == list(steps)


@pytest.mark.parametrize("changed", ["stage version", "the loss's code"])
def test_checkpoint_of_older_code_is_not_resumed(changed, killed, work, capsys, monkeypatch):
    place, _ = killed
    if changed == "stage version":
        monkeypatch.setitem(train_policy.STAGES, "train", train_policy.STAGES["train"] + 1)
    else:
        corrected = Loss(lambda delta_w, delta_l: delta_l - delta_w)
        monkeypatch.setitem(train_policy.LOSSES, "sppo", corrected)
    place.train("policy", **RESUMABLE)
    assert printed_steps(capsys) == list("12345")


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_work_folder_label_restarts_the_training(damage, killed, work, capsys):
    place, whole = killed
    DAMAGES[damage](work / "made_for.json")
    assert distance(whole, place.train("policy", **RESUMABLE)) < 1e-7
    assert printed_steps(capsys) == list("12345")


@pytest.mark.parametrize("kind", ["a file", "a dead link"])
def test_a_file_or_link_named_like_a_checkpoint_is_removed(kind, work, capsys):
    odd = work / "checkpoint-9"
    if kind == "a file":
        odd.write_text("x")
    else:
        odd.symlink_to("nowhere")
    remove_damaged(work)
    assert "checkpoint-9 cannot be used" in capsys.readouterr().err
    assert not os.path.lexists(odd)
    assert last_checkpoint(work) == work / "checkpoint-3"


def test_a_file_named_like_the_work_folder_is_removed(killed, work, capsys):
    place, whole = killed
    shutil.rmtree(work)
    work.write_text("x")
    assert distance(whole, place.train("policy", **RESUMABLE)) < 1e-7
    assert printed_steps(capsys) == list("12345")


def test_two_checkpoints_are_kept_until_training_ends(work):
    names = sorted(folder.name for folder in work.glob("checkpoint-*"))
    assert names == ["checkpoint-2", "checkpoint-3"]


def test_no_checkpoint_is_written_after_the_last_step(place, monkeypatch):
    written = []
    monkeypatch.setattr(trainer, "write_manifest", lambda folder: written.append(folder.name))
    place.train("policy", **RESUMABLE)
    assert written == [f"checkpoint-{step}" for step in (1, 2, 3, 4)]


def test_full_disk_is_one_line_and_training_can_resume(place, monkeypatch, capsys):
    whole = place.train("whole", **RESUMABLE)

    save = trainer.PairTrainer._save_optimizer_and_scheduler

    def fail_at_step_3(self, *arguments):
        if self.state.global_step == 3:
            # torch.save does not name the full disk in its error.
            raise RuntimeError(
                "[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"
            )
        return save(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.PairTrainer, "_save_optimizer_and_scheduler", fail_at_step_3)
        with pytest.raises(
            UserError, match="no space left on device while writing .*policy.work.*MiB free"
        ):
            place.train("policy", **RESUMABLE)
    capsys.readouterr()
    assert distance(whole, place.train("policy", **RESUMABLE)) < 1e-7
    assert printed_steps(capsys) == list("345")


# --- one at a time ---

HOLDER = """
import sys, time
from pathlib import Path
sys.path.insert(0, {source!r})
from sppo.training.checkpoints import exclusive_lock
with exclusive_lock(Path({output!r})):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(place):
    """Another process that holds the lock of `policy` until it reads a line."""
    code = HOLDER.format(
        source=str(Path(train_policy.__file__).parent), output=str(place.folder / "policy")
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def end_soon(holder) -> None:
    threading.Timer(0.5, lambda: holder.communicate("\n")).start()


def test_second_training_waits_and_uses_the_first_one_s_policy(place, holder, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(
            train_policy, "exclusive_lock", lambda *_, **__: contextlib.nullcontext(False)
        )
        place.train("policy")
    before = (place.folder / "policy" / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    end_soon(holder)
    place.train("policy")
    said = capsys.readouterr()
    assert said.err.splitlines() == [
        f"process {holder.pid} on {socket.gethostname()} is training "
        f"{place.folder}/policy already; waiting for its end (end it to train here)"
    ]
    assert "has been made meanwhile" in said.out
    assert "step 1" not in said.out
    assert (place.folder / "policy" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("left", ["no policy", "other settings", "a damaged policy"])
def test_second_training_trains_if_the_first_policy_differs(
    left, place, holder, monkeypatch, capsys
):
    if left != "no policy":
        options = {"learning_rate": 2e-3} if left == "other settings" else {}
        with monkeypatch.context() as patch:
            patch.setattr(
                train_policy, "exclusive_lock", lambda *_, **__: contextlib.nullcontext(False)
            )
            place.train("policy", **options)
    if left == "a damaged policy":
        (place.folder / "policy" / "config.json").write_text("{}")
    capsys.readouterr()
    end_soon(holder)
    place.train("policy")
    assert printed_steps(capsys) == ["1", "2", "3"]


def test_a_process_that_does_not_wait_is_told_who_trains(place, holder):
    with (
        pytest.raises(
            UserError,
            match=(
                f"process {holder.pid} on .* is training .*policy already; wait until it has ended"
            ),
        ),
        exclusive_lock(place.folder / "policy", wait=False),
    ):
        pytest.fail("both train")


def test_the_lock_of_a_killed_process_blocks_nobody(place, holder, capsys):
    holder.kill()
    holder.wait()
    assert (place.folder / ".policy.lock").exists()
    with exclusive_lock(place.folder / "policy") as waited:
        assert not waited
    assert capsys.readouterr().err == ""
    assert not (place.folder / ".policy.lock").exists()


def test_checkpoint_of_other_settings_is_not_used(place, monkeypatch, capsys):
    train_until(place, monkeypatch, "policy", 2, **RESUMABLE)
    assert printed_steps(capsys) == ["1", "2"]
    place.train("policy", **RESUMABLE | {"learning_rate": 2e-4})
    assert printed_steps(capsys) == ["1", "2", "3", "4", "5"]


def test_checkpoint_of_other_inputs_is_not_used(place, monkeypatch, capsys):
    train_until(place, monkeypatch, "policy", 2, **RESUMABLE)
    write_table(place.pairs, make_pairs(10, seed=9), "pairs")
    place.score(place.policy, "float32")
    capsys.readouterr()
    place.train("policy", **RESUMABLE)
    assert printed_steps(capsys) == ["1", "2", "3", "4", "5"]


# --- other options ---


def test_lora_trains_and_writes_a_plain_model_folder(place):
    trained = place.train("policy", lora_rank=4, learning_rate=1e-2, beta=0.1, max_grad_norm=1.0)
    assert read_json(record_path(place.folder / "policy"))["step_0"]["log_ratio_per_token"] < 1e-3
    check_policy(place.folder / "policy")
    assert not list((place.folder / "policy").glob("adapter*"))
    start = place.start()
    moved = {name for name in start if not torch.equal(start[name], trained[name])}
    assert trained.keys() == start.keys()
    assert moved == {name for name in start if "proj" in name}
    model = load_policy(place.folder / "policy", torch.float32, "cpu")
    assert type(model).__name__ == "LlamaForCausalLM"


def test_lora_with_the_same_seed_gives_the_same_policy(place):
    options = {"lora_rank": 4, "learning_rate": 1e-2, "beta": 0.1, "max_grad_norm": 1.0}
    first = place.train("first", **options, seed=3)
    torch.rand(5)  # what the process drew before must not matter
    again = place.train("again", **options, seed=3)
    other = place.train("other", **options, seed=4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_lora_in_bfloat16_merges_in_float32(place):
    """The base weights are rounded to bfloat16, for the reference too.

    The update of the adapters is not rounded, although it is smaller than bfloat16 resolves.
    """
    place.score(place.policy, "bfloat16", lora_rank=4)
    words = {
        "precision": "bfloat16",
        "lora_rank": 4,
        "gradient_checkpointing": "true",
        "beta": 0.1,
        "max_grad_norm": 1.0,
    }
    trained = place.train("policy", learning_rate=1e-3, **words)
    start = place.start()
    assert all(weight.dtype == torch.float32 for weight in trained.values())
    assert read_json(place.folder / "policy" / "config.json")["dtype"] == "float32"
    for name, weight in trained.items():
        rounded = start[name].bfloat16().float()
        assert torch.equal(weight, rounded) != ("proj" in name)
        assert (weight - rounded).abs().max() < 2**-8 * rounded.abs().max()


@pytest.mark.parametrize(("size", "left"), [(1e-5, 0.28), (3e-5, 0.69), (1e-4, 0.99)])
def test_share_of_a_lora_update_that_bfloat16_keeps(size, left):
    """Compared with a simulation: weights of standard deviation 0.02, updates of `size`."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(1000, 1000, bias=False))
    model[0].weight.data.normal_(std=0.02).copy_(model[0].weight.bfloat16())
    model = get_peft_model(model, LoraConfig(r=64, lora_alpha=64, target_modules=["0"]))
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data.normal_(std=math.sqrt(size) / 64**0.25)
    assert trainer.share_kept_in_bfloat16(model) == pytest.approx(left, abs=0.03)


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_a_lora_policy_is_read_with_its_whole_update(precision, place):
    """Two iterations, with updates that rounding to bfloat16 would lose: both are kept.

    In bfloat16 the policy's outputs are those of float32 up to the rounding of the computation.
    """
    words = {"precision": precision, "lora_rank": 4, "beta": 0.1, "max_grad_norm": 1.0}
    start = place.start()
    place.score(place.policy, precision, lora_rank=4)
    place.train("first", learning_rate=1e-3, **words)
    place.score(place.folder / "first", precision, lora_rank=4)
    record = read_json(record_path(place.folder / "first"))
    place.policy = place.folder / "first"
    place.train("second", learning_rate=1e-3, **words)
    step_0 = read_json(record_path(place.folder / "second"))["step_0"]
    assert step_0["mean_log_ratio_per_token"] < 1e-2
    if precision == "bfloat16":
        assert record["lora_update_left_in_bfloat16"] < 0.5

    factors = read_factors(place.folder / "second")
    assert {a.shape[0] for a, _ in factors.values()} == {8}, "both iterations have rank 4"
    whole = load_file(place.folder / "second" / "model.safetensors")
    exact = load_policy(place.folder / "second", torch.float32, "cpu")
    assert not any(isinstance(module, UpdatedLinear) for module in exact.modules())
    read = load_policy(place.folder / "second", torch.bfloat16, "cpu")
    for name, (a, b) in factors.items():
        layer = read.get_submodule(name)
        assert isinstance(layer, UpdatedLinear)
        assert layer.weight.dtype == layer.update_a.dtype == torch.bfloat16
        base = start[f"{name}.weight"]
        changed = (layer.weight.detach() != base.bfloat16()).float().mean()
        assert changed == 0 if precision == "bfloat16" else changed < 1e-3
        update = whole[f"{name}.weight"] - (
            base.bfloat16().float() if precision == "bfloat16" else base
        )
        assert (b @ a - update).norm() < 0.02 * update.norm()
        kept = (layer.update_b @ layer.update_a).float()
        assert (kept - update).norm() < 0.02 * update.norm()
    assert read.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize(("rate", "refused"), [(1e-3, True), (1.0, False)])
def test_a_lost_update_is_refused_by_readers_of_merged_weights(rate, refused, place):
    place.score(place.policy, "bfloat16", lora_rank=4)
    words = {"precision": "bfloat16", "lora_rank": 4, "beta": 0.1, "max_grad_norm": 1.0}
    place.train("policy", learning_rate=rate, **words)
    if refused:
        with pytest.raises(UserError, match=r"vLLM .* keep only \d+% of its LoRA update; set resp"):
            lora_update.check_merged(place.folder / "policy", "vLLM")
    else:
        lora_update.check_merged(place.folder / "policy", "vLLM")


def test_an_update_apart_is_an_adapter_that_peft_reads(place, tmp_path):
    """Weights and adapter, read by peft, give the logits of this repository's own reader."""
    from peft import PeftModel

    place.score(place.policy, "bfloat16", lora_rank=4)
    words = {"precision": "bfloat16", "lora_rank": 4, "beta": 0.1, "max_grad_norm": 1.0}
    place.train("policy", learning_rate=1e-1, **words)
    policy = place.folder / "policy"
    factors = read_factors(policy)
    apart = tmp_path / "apart"
    apart.mkdir()
    lora_update.write_apart(policy, factors, apart)
    base = load_policy(apart, torch.bfloat16, "cpu")
    start = place.start()
    for name, weight in base.named_parameters():
        assert torch.equal(weight, start[name].bfloat16()), name
    ids = torch.arange(40)[None] + 100
    with torch.inference_mode():
        without = base(ids).logits.float()
        found = PeftModel.from_pretrained(base, apart / lora_update.ADAPTER)(ids).logits.float()
        expected = load_policy(policy, torch.bfloat16, "cpu")(ids).logits.float()
    assert (expected - without).norm() > 5 * (expected - found).norm()


def test_an_update_of_unknown_weights_is_refused(place, tmp_path):
    place.score(place.policy, "bfloat16", lora_rank=4)
    words = {"precision": "bfloat16", "lora_rank": 4, "beta": 0.1, "max_grad_norm": 1.0}
    place.train("policy", **words)
    factors = read_factors(place.folder / "policy")
    factors["model.other"] = next(iter(factors.values()))
    (tmp_path / "apart").mkdir()
    with pytest.raises(UserError, match=r"has no weights of model\.other, which its LoRA update"):
        lora_update.write_apart(place.folder / "policy", factors, tmp_path / "apart")


def test_a_damaged_update_of_a_lora_policy_is_named(place):
    place.score(place.policy, "bfloat16", lora_rank=4)
    words = {"precision": "bfloat16", "lora_rank": 4, "beta": 0.1, "max_grad_norm": 1.0}
    place.train("policy", **words)
    with (place.folder / "policy" / LORA_FACTORS).open("r+b") as file:
        file.truncate(100)
    with pytest.raises(UserError, match="lora_update.factors is damaged.*make it again"):
        load_policy(place.folder / "policy", torch.bfloat16, "cpu")


def test_share_of_a_kept_lora_update_is_recorded(place):
    place.score(place.policy, "bfloat16", lora_rank=4)
    words = {"precision": "bfloat16", "lora_rank": 4, "beta": 0.1, "max_grad_norm": 1.0}
    place.train("policy", learning_rate=1.0, **words)
    assert read_json(record_path(place.folder / "policy"))["lora_update_left_in_bfloat16"] > 0.5


def test_model_card_names_data_method_results_and_licence(place, tmp_path):
    """Cards of two iterations.

    The same inputs give the same text, because the folder's hash covers it.
    """
    model = tmp_path / "little"
    base = place.folder / "iter0" / "policy"
    shutil.copytree(place.policy, model)
    (model / "README.md").write_text(
        "---\nlicense: gemma\nlicense_link: https://example.org\ndatasets: [x]\n---\n# Little\n"
    )
    place.program(prepare_policy, "--model", model, "--output", base)
    prompts = place.folder / "prompts.parquet"
    write_json(
        record_path(prompts),
        {
            "stage": "sample",
            "sha256": "1",
            "prompts": 10,
            "commit": "c0ffee",
            "arguments": {"source": "org/prompts-{t}", "iteration": 2},
        },
    )
    write_json(
        record_path(place.pairs),
        {
            "stage": "select",
            "sha256": file_hash(place.pairs),
            "inputs": {str(prompts): "1"},
            "replayed": 4,
            "arguments": {"construction": "all", "even_lengths": False, "target_reward": True},
        },
    )
    place.policy = base
    place.train("first", loss_scale="beta_squared")
    place.train("again", loss_scale="beta_squared")
    text = (place.folder / "first" / "README.md").read_text()
    assert text == (place.folder / "again" / "README.md").read_text()
    assert str(tmp_path) not in text
    for words in (
        "10 prompts of org/prompts-2 at c0ffee",
        "every two responses of each prompt, each also swapped",
        "; 4 pairs of an earlier",
        "refer to the policy it was trained from",
        "| loss | sppo |",
        "| beta | 0.001 |",
        "| pairs | 10 |",
        "| reward_accuracy | ",
        "little: gemma",
    ):
        assert words in text, words
    place.policy = place.folder / "first"
    place.score(place.policy, "float32")
    shutil.copy(place.reference, place.folder / "older.parquet")
    place.train("second", loss="dpo", reference=place.folder / "older.parquet")
    text = (place.folder / "second" / "README.md").read_text()
    assert "the loss `dpo`" in text.lower()
    assert "log-ratios of the loss refer to an older policy than" in text
    own = {
        "base_model": "little",
        "library_name": "transformers",
        "license": "gemma",
        "license_link": "https://example.org",
    }
    assert header(place.folder / "first") == own | {"tags": ["preference-optimization", "sppo"]}
    assert header(place.folder / "second") == own | {"tags": ["preference-optimization", "dpo"]}


def test_learning_rate_0_changes_no_weight(place):
    """Warm-up starts at 0. Reading, training and writing change no weight, even in bfloat16."""
    place.score(place.policy, "bfloat16")
    trained = place.train(
        "policy",
        precision="bfloat16",
        lr_schedule="linear",
        warmup_ratio=1.0,
        batch_size=10,
        micro_batch_size=10,
    )
    assert distance(place.start(), trained) == 0
    assert read_json(place.folder / "policy" / "config.json")["dtype"] == "float32"
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (place.folder / "policy" / name).is_file()


def test_master_weights_stay_float32_in_bfloat16_training(place):
    """Updates far below the resolution of bfloat16 (2^-8 of a weight) are kept."""
    place.score(place.policy, "bfloat16")
    trained = place.train("policy", precision="bfloat16", optimizer="rmsprop", learning_rate=1e-6)
    start = place.start()
    name = "model.layers.0.mlp.up_proj.weight"
    assert trained[name].dtype == torch.float32
    step = (trained[name] - start[name]).abs()
    assert (step > 0).float().mean() > 0.9
    assert step.max() < 1e-4


def test_beta_squared_scales_the_gradient_only(place):
    """The scale is beta^2 = 1e-4: a learning rate of 1e-2 then makes the same step as 1e-6."""
    options = {"batch_size": 10, "micro_batch_size": 5, "beta": 0.01}
    plain = place.train("plain", learning_rate=1e-6, **options)
    scaled = place.train("scaled", learning_rate=1e-2, loss_scale="beta_squared", **options)
    moved = distance(place.start(), plain)
    assert moved > 1e-5
    assert distance(plain, scaled) < 1e-3 * moved
    plain_step, scaled_step = place.log("plain")[0], place.log("scaled")[0]
    assert scaled_step["loss"] == pytest.approx(plain_step["loss"], rel=1e-6)
    assert scaled_step["grad_norm"] == pytest.approx(1e-4 * plain_step["grad_norm"], rel=1e-4)


def test_training_moves_winners_up_and_losers_down(place):
    place.train(
        "policy",
        loss="sppo",
        beta=0.1,
        learning_rate=1e-4,
        batch_size=5,
        micro_batch_size=5,
        schedule_total_epochs=6,
        stop_epoch=6,
    )
    first, last = place.log("policy")[0], place.log("policy")[-1]
    assert last["log_ratio_chosen"] > 0.1 > -0.1 > last["log_ratio_rejected"]
    assert last["loss"] < first["loss"]


def test_gradient_checkpointing_changes_no_weight(place, monkeypatch):
    computed = []
    forward = LlamaMLP.forward
    monkeypatch.setattr(
        LlamaMLP, "forward", lambda self, states: computed.append(self) or forward(self, states)
    )
    weights, passes = {}, {}
    for every in (0, 1, 2):
        computed.clear()
        more = {"gradient_checkpointing": "true", "checkpointed_layers": every} if every else {}
        weights[every] = place.train(f"every_{every}", **more)
        passes[every] = len(computed)
        assert distance(weights[0], weights[every]) < 1e-7
    # The tiny policy has two layers: none, both or one of them is computed twice.
    assert (passes[1], passes[2]) == (2 * passes[0], 1.5 * passes[0])


def test_nan_or_infinite_loss_is_refused(place):
    with pytest.raises(
        UserError,
        match=(
            r"(loss of pair \d in step 2|gradient norm of step \d \(pairs \d, \d\)) "
            r"is (nan|inf).*(learning_rate|precision)"
        ),
    ):
        place.train(
            "policy",
            learning_rate=1e30,
            batch_size=2,
            micro_batch_size=2,
            beta=1e-3,
            checkpoint_steps=1,
        )
    assert not (place.folder / "policy").exists()


def test_infinite_gradient_norm_stops_before_the_step_is_kept(place, monkeypatch):
    """Without clipping, no other check would notice."""
    monkeypatch.setattr(trainer.PairTrainer, "_get_grad_norm", lambda *_, **__: math.inf)
    with pytest.raises(
        UserError,
        match=r"gradient norm of step 1 \(pairs \d+, \d+\) is inf; lower train.learning_rate",
    ):
        place.train("policy", batch_size=2, micro_batch_size=1, checkpoint_steps=1, max_grad_norm=0)
    assert not list((place.folder / ".policy.work").glob("checkpoint-*"))


def test_record_counts_pairs_steps_and_tokens(place):
    place.train("policy", stop_epoch=1)
    record = read_json(record_path(place.folder / "policy"))
    tokens = 0
    for pair in read_table(place.pairs, "pairs"):
        tokens += 2 * len(pair["prompt_token_ids"])
        tokens += len(pair["chosen_token_ids"]) + len(pair["rejected_token_ids"])
    assert record["pairs"] == 10
    assert record["steps"] == 3
    assert record["tokens_an_epoch"] == tokens
    assert set(record["inputs"]) == {str(place.pairs), str(place.reference), str(place.policy)}
    assert record["final"] == place.log("policy")[-1]
