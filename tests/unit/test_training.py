"""Training: the step-0 identity, micro-batches, the schedule, TRL as oracle, kill and resume, LoRA."""

from __future__ import annotations

import contextlib
import json
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
from accelerate.data_loader import BatchSamplerShard
from safetensors.torch import load_file
from torch.utils.data import BatchSampler, SequentialSampler

import prepare_policy
import score_reference
import train_policy
from sppo.core.artifacts import file_hash, read_json, record_path, write_json
from sppo.core.config import default_of, schema
from sppo.core.errors import UserError
from sppo.core.tables import read_table, write_table
from sppo.policies.models import check_policy, load_policy
from sppo.reporting.cards import header
from sppo.training import trainer
from sppo.training.checkpoints import alone, last_checkpoint, remove_damaged
from sppo.training.logps import pair_batch, pair_length, response_logps
from sppo.training.trainer import (
    IDENTITY_TOLERANCE,
    collate_pairs,
    identity_fault,
    make_trainer,
    pad_to_multiple,
    plan,
    training_order,
)

DEFAULTS = {
    key: default_of(rule, "paper")
    for key, rule in schema()["properties"]["train"]["properties"].items()
}


def make_pairs(n: int, seed: int = 0) -> list[dict]:
    """Pairs of random token ids, of many lengths, with P-hats as K = 5 gives them."""
    draw = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(3, 49152) for _ in range(draw.randint(low, high))]

    return [
        {
            "pair_id": i,
            "prompt_id": f"p{i}",
            "prompt_token_ids": ids(3, 12),
            "chosen": "a",
            "chosen_token_ids": ids(2, 14) + [2],
            "chosen_sample_id": 0,
            "rejected": "b",
            "rejected_token_ids": ids(2, 14),
            "rejected_sample_id": 1,
            "p_hat_chosen": draw.uniform(0.5, 0.9),
            "p_hat_rejected": draw.uniform(0.1, 0.5),
            "p_chosen_beats_rejected": draw.uniform(0.5, 1.0),
        }
        for i in range(n)
    ]


class Place:
    """A folder with pairs and their references under the tiny policy; runs of the programs in it."""

    def __init__(self, folder: Path, policy: Path, program, n: int) -> None:
        self.folder, self.policy, self.program = folder, policy, program
        self.pairs, self.reference = folder / "pairs.parquet", folder / "logps.parquet"
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
        """Weights of the policy that these options train; the defaults here are plain and quick."""
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
        words = [
            word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", value)
        ]
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
            *words,
        )
        return load_file(self.folder / name / "model.safetensors")

    def log(self, name: str) -> list[dict]:
        return [
            json.loads(line) for line in (self.folder / f"{name}.jsonl").read_text().splitlines()
        ]

    def start(self) -> dict[str, torch.Tensor]:
        return load_file(self.policy / "model.safetensors")


@pytest.fixture
def place(tmp_path, tiny_policy, program) -> Place:
    return Place(tmp_path, tiny_policy, program, n=10)


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest difference of any weight."""
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


# --- step 0 ---


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_log_ratios_are_exactly_0_when_both_passes_share_a_batch(precision, place):
    """Through the programs and the parquet file between them. Pairs of one length, so that both put them in one order."""
    pairs = make_pairs(4)
    for pair, prompt in zip(pairs, (4, 7, 12, 5), strict=True):
        pair["prompt_token_ids"], pair["chosen_token_ids"] = (
            [9] * prompt,
            [*range(20, 43 - prompt), 2],
        )
        pair["rejected_token_ids"] = pair["rejected_token_ids"][:5]
    write_table(place.pairs, pairs, "pairs")
    place.score(place.policy, precision, 4)
    place.train("policy", precision=precision)
    step_0 = read_json(record_path(place.folder / "policy"))["step_0"]
    closed = (
        sum(
            (1000 * (p["p_hat_chosen"] - 0.5)) ** 2 / 2
            + (1000 * (p["p_hat_rejected"] - 0.5)) ** 2 / 2
            for p in pairs
        )
        / 4
    )
    assert step_0["log_ratio_per_token"] == 0.0
    assert step_0["loss"] == step_0["closed_form"] == pytest.approx(closed, rel=1e-6)
    assert (place.log("policy")[0]["log_ratio_chosen"], place.log("policy")[0]["loss"]) == (
        0.0,
        pytest.approx(closed, rel=1e-6),
    )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("reference_batch", [1, 10])
def test_identity_holds_through_the_cached_reference_with_other_batches(
    precision, reference_batch, place
):
    place.score(place.policy, precision, reference_batch)
    place.train("policy", precision=precision, loss="sppo", batch_size=8, micro_batch_size=4)
    step_0 = read_json(record_path(place.folder / "policy"))["step_0"]
    assert step_0["log_ratio_per_token"] < (1e-3 if precision == "float32" else 5e-2)
    assert step_0["loss"] == pytest.approx(
        step_0["closed_form"], rel=1e-3 if precision == "float32" else 2e-2
    )


@pytest.mark.parametrize("dtype", IDENTITY_TOLERANCE)
@pytest.mark.parametrize("tokens", [1, 100])
def test_log_ratios_beyond_rounding_are_another_policy(dtype, tokens):
    """One response that is off, then all of 16 a little: the limit grows with the root of the length."""
    base, each = IDENTITY_TOLERANCE[dtype]
    lengths = torch.full((16,), float(tokens))
    limit = math.sqrt(base**2 + each**2 * 16 * tokens)
    one, all_of_them = torch.zeros(16), torch.tensor([1.0, -1.0] * 8) / 4
    one[7] = -1.0
    for ratios in (one, all_of_them):
        assert identity_fault(0.99 * limit * ratios, lengths, dtype) is None
        fault = identity_fault(1.01 * limit * ratios, lengths, dtype)
        assert fault.startswith(f"the log-ratios of 16 responses, {16 * tokens} tokens, are ")


def test_log_ratio_that_is_no_number_is_no_rounding():
    assert "are nan nats" in identity_fault(
        torch.tensor([0.0, math.nan]), torch.ones(2), torch.float32
    )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_reference_of_another_policy_is_refused_and_nothing_is_kept(precision, place, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(place.policy, other)
    model = load_policy(other, torch.float32, "cpu")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    model.save_pretrained(other)
    place.score(other, precision)
    with pytest.raises(UserError, match="step-0 identity.*another policy"):
        place.train("policy", precision=precision)
    assert not (tmp_path / "policy").exists() and not (tmp_path / "policy.jsonl").exists()
    assert not record_path(tmp_path / "policy").exists()


@pytest.mark.parametrize("last", [False, True])
def test_every_pair_of_the_first_step_is_compared_with_the_reference(last, place, tmp_path):
    """One pair in passes of one pair each; pairs after the first step are not looked at."""
    lengths = [pair_length(pair) for pair in read_table(place.pairs, "pairs")]
    order = training_order(lengths, 4, 1, 0)
    rows = read_table(place.reference, "logps")
    (row,) = [row for row in rows if row["pair_id"] == order[-1 if last else 3]]
    row["rejected_logp"] += 0.5
    write_table(place.reference, rows, "logps")
    record_path(place.reference).unlink()
    if last:
        place.train("policy", micro_batch_size=1)
        return
    with pytest.raises(UserError, match="step-0 identity: the log-ratios of 8 responses"):
        place.train("policy", micro_batch_size=1)
    assert not (tmp_path / "policy").exists()


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


def test_weights_do_not_depend_on_micro_batches_even_if_the_last_batch_is_ragged(place):
    """Ten pairs in batches of four: two full steps and one of two pairs, which weighs no less."""
    options = {"beta": 0.01, "learning_rate": 1e-5}
    whole = place.train("policy4", micro_batch_size=4, **options)
    assert len(place.log("policy4")) == 3
    moved = distance(place.start(), whole)
    assert moved > 1e-3
    for size in (1, 2):
        assert (
            distance(whole, place.train(f"policy{size}", micro_batch_size=size, **options))
            < 1e-4 * moved
        )
        for ours, theirs in zip(place.log(f"policy{size}"), place.log("policy4"), strict=True):
            for column in ("loss", "log_ratio_chosen", "log_ratio_rejected", "grad_norm"):
                assert ours[column] == pytest.approx(theirs[column], rel=1e-4, abs=1e-3)


def test_one_sgd_step_is_the_gradient_of_the_mean_loss_by_hand(place):
    """An independent forward and backward pass, pair by pair, with the loss written out; ten pairs in a step meant for sixteen."""
    pairs, references = read_table(place.pairs, "pairs"), read_table(place.reference, "logps")
    stepped = place.train(
        "policy", batch_size=16, micro_batch_size=4, learning_rate=1e-6, beta=0.01
    )
    model = load_policy(place.policy, torch.float32, "cpu")
    for pair, reference in zip(pairs, references, strict=True):
        w, l = response_logps(model, pair_batch([pair]))
        loss = (
            (w - reference["chosen_logp"] - 100 * (pair["p_hat_chosen"] - 0.5)) ** 2
            + (l - reference["rejected_logp"] - 100 * (pair["p_hat_rejected"] - 0.5)) ** 2
        ) / 2
        (loss / len(pairs)).backward()
    start, largest = place.start(), 0.0
    for name, weight in model.named_parameters():
        if name in start:
            step = -1e-6 * weight.grad
            largest = max(largest, step.abs().max().item())
            torch.testing.assert_close(
                stepped[name] - start[name],
                step,
                rtol=0,
                atol=2e-7 + 1e-3 * step.abs().max().item(),
            )
    assert largest > 1e-5


def test_order_holds_every_pair_once_an_epoch_and_steps_do_not_depend_on_micro_batches():
    lengths = [random.Random(i).randint(5, 50) for i in range(23)]
    order = training_order(lengths, 8, 3, seed=1)
    epochs = [order[i : i + 23] for i in range(0, 69, 23)]
    assert len(order) == 69
    # Steps of 8 run across the ends of epochs and are sorted by length, so epochs are told by counts.
    assert (
        all(order.count(i) == 3 for i in range(23)) and len({tuple(epoch) for epoch in epochs}) == 3
    )
    for start in range(0, 69, 8):
        step = [lengths[i] for i in order[start : start + 8]]
        assert step == sorted(step, reverse=True)
    assert order == training_order(lengths, 8, 3, seed=1) != training_order(lengths, 8, 3, seed=2)


# --- several processes; what they train is in tests/multi_process ---


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2])
def test_processes_make_the_same_steps_and_count_no_pair_twice(processes, micro):
    """As accelerate hands batches out: 11 pairs in steps of 8, the second one ragged."""
    rows = pad_to_multiple([{"pair_id": i} for i in range(11)], processes * micro)
    batches = list(BatchSampler(SequentialSampler(rows), micro, drop_last=False))
    shares = [
        list(
            BatchSamplerShard(
                BatchSampler(SequentialSampler(rows), micro, drop_last=False), processes, rank
            )
        )
        for rank in range(processes)
    ]
    assert {len(share) for share in shares} == {len(batches) // processes}, (
        "a process would wait for ever"
    )
    accumulated = 8 // micro // processes
    for step, pairs in enumerate((range(8), range(8, 11))):
        held = [
            rows[i]
            for share in shares
            for batch in share[step * accumulated : (step + 1) * accumulated]
            for i in batch
        ]
        assert sorted(row["pair_id"] for row in held if row.get("weight", 1.0)) == list(pairs)


def test_pairs_of_weight_0_change_neither_loss_nor_gradient_nor_log(place):
    """The last of 10 pairs again, as `pad_to_multiple` repeats it."""
    rows = [
        pair
        | {
            f"{of}_{side}": -40.0
            for of in ("current", "reference")
            for side in ("chosen", "rejected")
        }
        for pair in read_table(place.pairs, "pairs")
    ]
    found = []
    for given in (rows, pad_to_multiple(rows, 16)):
        model = load_policy(place.policy, torch.float32, "cpu")
        options = DEFAULTS | {"batch_size": 16, "micro_batch_size": 16, "schedule_total_epochs": 1}
        trainer = make_trainer(model, rows, options, torch.float32, "cpu", place.folder / "work", 0)
        trainer.step_0 = {}  # these references are of no policy
        loss = trainer.compute_loss(model, collate_pairs(given))
        loss.backward()
        (counted,) = trainer._step_rows
        sums = (counted[:, 1:2] * counted[:, 2:]).sum(0).tolist()
        found.append((loss.item(), model.model.norm.weight.grad, sums))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5) and found[0][2] == pytest.approx(
        found[1][2], rel=1e-5
    )
    torch.testing.assert_close(
        found[0][1], found[1][1], rtol=1e-4, atol=1e-4 * found[0][1].abs().max().item()
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
        ({"machines": 2}, "NODE_RANK"),
        ({"batch_size": 5}, "batch_size"),
        ({"loss": "kto_pair"}, "kto_pair takes means over a step"),
    ],
)
def test_what_cannot_be_started_is_one_line_before_any_work(options, said, place, monkeypatch):
    for name in ("NODE_RANK", "SLURM_NODEID", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=said):
        place.train("policy", processes=2, **options)
    assert not (place.folder / ".policy.work").exists()


def test_port_that_is_taken_is_one_line(place, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for name, value in {
            "NODE_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(taken.getsockname()[1]),
        }.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match="MASTER_PORT"):
            place.train("policy", processes=2, machines=2)


# --- schedule ---


@pytest.mark.parametrize(
    ("epochs", "mean", "last"), [(18, 1.38e-7, 2.77e-7), (6, 3.41e-7, 4.64e-7), (1, 2.5e-7, 0.0)]
)
def test_first_epoch_s_learning_rates_are_those_of_the_paper_s_long_schedule(
    epochs, mean, last, tmp_path
):
    """312 steps of 64 pairs, stopped after epoch 1 of 18 (paper), 6 (Llama-3's card), 1 (scripts)."""
    options = DEFAULTS | {"schedule_total_epochs": epochs}
    pairs = [
        make_pairs(1)[0]
        | dict.fromkeys(
            ("current_chosen", "current_rejected", "reference_chosen", "reference_rejected"), 0.0
        )
    ] * (312 * 64)
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


def test_log_has_its_columns_and_learning_rates_warm_up_over_the_long_schedule(place):
    place.train(
        "policy",
        lr_schedule="linear",
        warmup_ratio=0.5,
        schedule_total_epochs=4,
        stop_epoch=1,
        learning_rate=1e-6,
    )
    log = place.log("policy")
    assert {
        "step",
        "loss",
        "log_ratio_chosen",
        "log_ratio_rejected",
        "order_right",
        "learning_rate",
        "grad_norm",
        "epoch",
        "tokens_per_second",
    } <= log[0].keys()
    assert [line["step"] for line in log] == [1, 2, 3]
    # 40 pairs in steps of 4: ten steps, five of them warm-up. The rate is the one that the step was made with, 0 at first.
    assert [line["learning_rate"] for line in log] == pytest.approx(
        [1e-6 * i / 5 for i in range(3)], abs=1e-12
    )
    assert abs(log[0]["log_ratio_chosen"]) < 1e-3
    assert all(0 <= line["order_right"] <= 1 and line["tokens_per_second"] > 0 for line in log)


# --- TRL ---


def test_our_trainer_equals_trl_s_on_sppo_hard(place):
    """The same pairs in the same order; TRL computes its references itself."""
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
    ours, theirs = (
        place.train("ours", backend="transformers", **options),
        place.train("trl", backend="trl", **options),
    )
    moved = distance(place.start(), theirs)
    # RMSProp makes steps of like size from gradients that are 0 but for rounding: their signs may differ in single weights.
    spread = torch.cat([(ours[name] - theirs[name]).abs().flatten() for name in ours])
    assert moved > 1e-4
    assert spread.mean().item() < 1e-3 * moved
    mine, its = place.log("ours"), place.log("trl")
    assert [line["learning_rate"] for line in mine] == [line["learning_rate"] for line in its]
    assert mine[0]["grad_norm"] == pytest.approx(its[0]["grad_norm"], rel=1e-3)


@pytest.mark.parametrize(
    "loss", [{"loss": "sppo_hard"}, {"loss": "dpo"}, {"loss": "ipo", "per_token": "true"}], ids=str
)
def test_our_trainer_equals_trl_s_weight_by_weight_under_sgd(place, loss):
    rate = {"sppo_hard": 1e-4, "dpo": 1e-1, "ipo": 1e-1}[loss["loss"]]
    options = loss | {"beta": 0.1, "learning_rate": rate, "micro_batch_size": 2}
    ours, theirs = (
        place.train("ours", backend="transformers", **options),
        place.train("trl", backend="trl", **options),
    )
    moved = distance(place.start(), theirs)
    assert moved > 1e-3
    assert distance(ours, theirs) < 1e-3 * moved


# --- a reference that is not the previous iterate ---


def test_log_ratios_refer_to_the_reference_and_the_identity_to_the_start(place, tmp_path):
    """DPO against another policy than the one that training starts from: the loss before the first step is not log 2."""
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
    for reference in ([], ["--reference", place.folder / "other.parquet"]):
        place.train(
            "policy", loss="dpo", beta=0.1, **({"reference": reference[1]} if reference else {})
        )
        step_0 = read_json(record_path(place.folder / "policy"))["step_0"]
        assert step_0["log_ratio_per_token"] < 1e-3 and step_0["loss"] == pytest.approx(
            step_0["closed_form"], rel=1e-3
        )
        assert (step_0["loss"] == pytest.approx(math.log(2), rel=1e-4)) == (not reference)


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "hinge"},
        {"loss": "kto_pair"},
        {"loss": "simpo", "beta": 2.0, "gamma": 1.0},
        {"loss": "dno"},
        {"loss": "mmpo", "gamma": 4.0},
        {"loss": "inpo", "tau": 0.03},
        {"loss": "mpo", "tau": 0.03},
        {"loss": "nash_md", "tau": 0.03},
        {"loss": "dpo", "sft_weight": 1.0, "optimism": 0.1},
    ],
    ids=lambda options: options["loss"],
)
def test_every_other_loss_starts_at_its_closed_form_and_falls(place, tmp_path, options):
    """Ten times over the same pairs, which a policy can learn; pi_ref is another policy than pi_t."""
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
    step_0, losses = (
        read_json(record_path(place.folder / "policy"))["step_0"],
        [line["loss"] for line in place.log("policy")],
    )
    assert step_0["log_ratio_per_token"] < 1e-3 and losses[0] == pytest.approx(
        step_0["closed_form"], rel=1e-3, abs=1e-3
    )
    assert losses[-1] < losses[0]


def test_nash_md_s_opponent_is_the_mixture_estimated_from_all_responses():
    """Three responses a, b, c; b and c tie, so they are no pair. All weight on c, then none moved."""

    def pair(w, l, p, ratio_w, ratio_l):
        return {
            "prompt_id": "x",
            "chosen_sample_id": w,
            "rejected_sample_id": l,
            "p_chosen_beats_rejected": p,
            "current_chosen": -5.0,
            "current_rejected": -7.0,
            "reference_chosen": -5.0 + ratio_w,
            "reference_rejected": -7.0 + ratio_l,
            "p_hat_chosen": 0.0,
            "p_hat_rejected": 0.0,
        }

    pairs = [pair(0, 1, 0.9, 0.0, 0.0), pair(2, 0, 0.8, 1000.0, 0.0)]
    against_c = [
        one[f"p_hat_{end}"]
        for one in train_policy.against_mixture(pairs, 1.0)
        for end in ("chosen", "rejected")
    ]
    assert against_c == pytest.approx([0.2, 0.5, 0.5, 0.2])  # a loses to c, b and c tie with it
    plain = train_policy.against_mixture(pairs, 0.0)
    assert plain[0]["p_hat_chosen"] == pytest.approx((0.5 + 0.9 + 0.2) / 3) and plain[0][
        "p_hat_rejected"
    ] == pytest.approx((0.1 + 0.5 + 0.5) / 3)


# --- kill and resume ---


class Killed(BaseException):
    """Not an Exception: nothing may catch it on the way, as nothing catches a kill."""


def train_until(place: Place, monkeypatch, name: str, step: int, **options: object) -> None:
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


def test_killed_training_goes_on_from_its_checkpoint_to_the_same_weights(
    place, monkeypatch, capsys
):
    whole = place.train("whole", **RESUMABLE)
    train_until(place, monkeypatch, "policy", 3, **RESUMABLE)
    assert (
        not (place.folder / "policy").exists() and not record_path(place.folder / "policy").exists()
    )
    assert (place.folder / ".policy.work" / "checkpoint-3").is_dir()
    half_written = place.folder / ".policy.work" / "checkpoint-4"
    half_written.mkdir()
    (half_written / "model.safetensors").write_bytes(b"cut")
    capsys.readouterr()
    resumed = place.train("policy", **RESUMABLE)
    assert steps_said(capsys) == ["4", "5"], "it began again, or skipped"
    assert distance(whole, resumed) < 1e-7
    timeless = [
        [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in place.log(name)]
        for name in ("whole", "policy")
    ]
    assert timeless[0] == timeless[1]
    assert sorted(path.name for path in place.folder.iterdir() if path.name.startswith(".")) == []


def steps_said(capsys) -> list[str]:
    return [
        line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("step ")
    ]


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
    """A place where a training was killed after step 3 of 5, and the weights of one that was not."""
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
    folder = killed[0].folder / ".policy.work"
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(killed[0].folder / "kept", folder))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_of_a_checkpoint_is_named_and_the_one_before_is_used(
    damage, work, capsys
):
    files = sorted(
        file.relative_to(work) for file in (work / "checkpoint-3").rglob("*") if file.is_file()
    )
    assert {
        "model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "trainer_state.json",
        "manifest.json",
    } <= {file.name for file in files}
    for file in files:
        whole = shutil.copytree(work, work.with_name("each"), dirs_exist_ok=True)
        DAMAGES[damage](whole / file)
        remove_damaged(whole)
        said = capsys.readouterr().err.splitlines()
        named = (
            "not written completely"
            if file.name == "manifest.json" and damage == "removed"
            else file.name
        )
        assert len(said) == 1 and "checkpoint-3 cannot be used" in said[0] and named in said[0]
        assert (
            last_checkpoint(whole) == whole / "checkpoint-2"
            and not (whole / "checkpoint-3").exists()
        )


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
def test_training_with_a_damaged_checkpoint_gives_the_weights_of_an_undisturbed_one(
    damaged, steps, killed, work, capsys
):
    place, whole = killed
    for step, name, damage in damaged:
        DAMAGES[damage](work / f"checkpoint-{step}" / name)
    assert distance(whole, place.train("policy", **RESUMABLE)) < 1e-7
    assert steps_said(capsys) == list(steps)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_label_of_the_work_folder_is_one_of_other_inputs(damage, killed, work, capsys):
    place, whole = killed
    DAMAGES[damage](work / "made_for.json")
    assert distance(whole, place.train("policy", **RESUMABLE)) < 1e-7
    assert steps_said(capsys) == list("12345")


@pytest.mark.parametrize("kind", ["a file", "a dead link"])
def test_what_is_no_folder_in_a_checkpoint_s_place_is_removed(kind, work, capsys):
    odd = work / "checkpoint-9"
    odd.write_text("x") if kind == "a file" else odd.symlink_to("nowhere")
    remove_damaged(work)
    assert "checkpoint-9 cannot be used" in capsys.readouterr().err and not os.path.lexists(odd)
    assert last_checkpoint(work) == work / "checkpoint-3"


def test_file_in_the_work_folder_s_place_is_removed(killed, work, capsys):
    place, whole = killed
    shutil.rmtree(work)
    work.write_text("x")
    assert distance(whole, place.train("policy", **RESUMABLE)) < 1e-7
    assert steps_said(capsys) == list("12345")


def test_two_checkpoints_are_kept_until_the_policy_is_whole(work):
    assert sorted(folder.name for folder in work.glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-3",
    ]


def test_full_disk_while_a_checkpoint_is_written_is_one_line_and_training_goes_on_later(
    place, monkeypatch, capsys
):
    whole = place.train("whole", **RESUMABLE)

    def full(self, *_):
        if self.state.global_step == 3:
            raise RuntimeError(
                "[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"
            )  # torch.save says no more
        return saved(self, *_)

    saved = trainer.PairTrainer._save_optimizer_and_scheduler
    with monkeypatch.context() as patch:
        patch.setattr(trainer.PairTrainer, "_save_optimizer_and_scheduler", full)
        with pytest.raises(
            UserError, match="no space left on device while writing .*policy.work.*MiB free"
        ):
            place.train("policy", **RESUMABLE)
    capsys.readouterr()
    assert distance(whole, place.train("policy", **RESUMABLE)) < 1e-7
    assert steps_said(capsys) == list("345")


# --- one at a time ---

HOLDER = """
import sys, time
from pathlib import Path
sys.path.insert(0, {source!r})
from sppo.training.checkpoints import alone
with alone(Path({output!r})):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(place):
    """Another process that holds the lock of `policy` until it is told to end."""
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


def test_second_training_waits_and_takes_the_policy_that_the_first_one_made(
    place, holder, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        patch.setattr(train_policy, "alone", lambda *_, **__: contextlib.nullcontext(False))
        place.train("policy")
    before = (place.folder / "policy" / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    end_soon(holder)
    place.train("policy")
    said = capsys.readouterr()
    assert said.err.splitlines() == [
        f"process {holder.pid} on {socket.gethostname()} is training {place.folder}/policy already; waiting for its end "
        "(end it to train here)"
    ]
    assert "has been made meanwhile" in said.out and "step 1" not in said.out
    assert (place.folder / "policy" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("left", ["nothing", "one of other settings", "a damaged one"])
def test_second_training_trains_if_the_first_one_made_something_else(
    left, place, holder, monkeypatch, capsys
):
    if left != "nothing":
        with monkeypatch.context() as patch:
            patch.setattr(train_policy, "alone", lambda *_, **__: contextlib.nullcontext(False))
            place.train(
                "policy", **({"learning_rate": 2e-3} if left == "one of other settings" else {})
            )
        if left == "a damaged one":
            (place.folder / "policy" / "config.json").write_text("{}")
    capsys.readouterr()
    end_soon(holder)
    place.train("policy")
    assert steps_said(capsys) == ["1", "2", "3"]


def test_process_that_cannot_wait_is_told_who_trains(place, holder):
    with (
        pytest.raises(
            UserError,
            match=f"process {holder.pid} on .* is training .*policy already; wait until it has ended",
        ),
        alone(place.folder / "policy", wait=False),
    ):
        pytest.fail("both train")


def test_lock_that_a_killed_process_left_holds_nobody_up(place, holder, capsys):
    holder.kill()
    holder.wait()
    assert (place.folder / ".policy.lock").exists()
    with alone(place.folder / "policy") as waited:
        assert not waited
    assert capsys.readouterr().err == "" and not (place.folder / ".policy.lock").exists()


def test_checkpoint_of_other_settings_is_not_used(place, monkeypatch, capsys):
    train_until(place, monkeypatch, "policy", 2, **RESUMABLE)
    assert steps_said(capsys) == ["1", "2"]
    place.train("policy", **RESUMABLE | {"learning_rate": 2e-4})
    assert steps_said(capsys) == ["1", "2", "3", "4", "5"]


def test_checkpoint_of_other_inputs_is_not_used(place, monkeypatch, capsys):
    train_until(place, monkeypatch, "policy", 2, **RESUMABLE)
    write_table(place.pairs, make_pairs(10, seed=9), "pairs")
    place.score(place.policy, "float32")
    capsys.readouterr()
    place.train("policy", **RESUMABLE)
    assert steps_said(capsys) == ["1", "2", "3", "4", "5"]


# --- what else the options do ---


def test_lora_trains_holds_the_identity_and_gives_a_plain_folder(place):
    trained = place.train("policy", lora_rank=4, learning_rate=1e-2, beta=0.1, max_grad_norm=1.0)
    assert read_json(record_path(place.folder / "policy"))["step_0"]["log_ratio_per_token"] < 1e-3
    check_policy(place.folder / "policy")
    assert not list((place.folder / "policy").glob("adapter*"))
    start = place.start()
    moved = {name for name in start if not torch.equal(start[name], trained[name])}
    assert trained.keys() == start.keys() and moved == {name for name in start if "proj" in name}
    model = load_policy(place.folder / "policy", torch.float32, "cpu")
    assert type(model).__name__ == "LlamaForCausalLM"


def test_lora_in_bfloat16_holds_frozen_weights_in_it_and_merges_in_float32(place, monkeypatch):
    """The base is rounded, its reference with it; what the adapters learned is not, though it is smaller than bfloat16 resolves."""
    monkeypatch.setattr(trainer, "check_kept_update", trainer.share_kept_in_bfloat16)
    place.score(place.policy, "bfloat16", lora_rank=4)
    words = {
        "precision": "bfloat16",
        "lora_rank": 4,
        "gradient_checkpointing": "true",
        "beta": 0.1,
        "max_grad_norm": 1.0,
    }
    trained, start = place.train("policy", learning_rate=1e-3, **words), place.start()
    assert all(weight.dtype == torch.float32 for weight in trained.values())
    assert read_json(place.folder / "policy" / "config.json")["dtype"] == "float32"
    for name, weight in trained.items():
        rounded = start[name].bfloat16().float()
        assert torch.equal(weight, rounded) != ("proj" in name)
        assert (weight - rounded).abs().max() < 2**-8 * rounded.abs().max()


@pytest.mark.parametrize(("size", "left"), [(1e-5, 0.28), (3e-5, 0.69), (1e-4, 0.99)])
def test_share_of_a_lora_update_that_bfloat16_keeps(size, left):
    """Against a simulation: weights of standard deviation 0.02, updates of `size`."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(1000, 1000, bias=False))
    model[0].weight.data.normal_(std=0.02).copy_(model[0].weight.bfloat16())
    model = get_peft_model(model, LoraConfig(r=64, lora_alpha=64, target_modules=["0"]))
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data.normal_(std=math.sqrt(size) / 64**0.25)
    assert trainer.share_kept_in_bfloat16(model) == pytest.approx(left, abs=0.03)


def test_lora_update_that_bfloat16_would_drop_is_refused(place, capsys):
    place.score(place.policy, "bfloat16", lora_rank=4)
    words = {"precision": "bfloat16", "lora_rank": 4, "beta": 0.1, "max_grad_norm": 1.0}
    with pytest.raises(
        UserError, match=r"only \d+% of the LoRA update is left.*raise train.learning_rate"
    ):
        place.train("policy", learning_rate=1e-3, **words)
    assert (
        not (place.folder / "policy").exists()
        and "of the update is left" in capsys.readouterr().out
    )
    place.train("policy", learning_rate=1.0, **words)
    assert read_json(record_path(place.folder / "policy"))["lora_update_left_in_bfloat16"] > 0.5


def test_model_card_tells_data_method_figures_and_the_base_s_licence(place, tmp_path):
    """From iteration to iteration, and the same text from the same inputs: the folder's hash covers it."""
    model, base = tmp_path / "little", place.folder / "iter0" / "policy"
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
            "arguments": {"construction": "all", "even_lengths": False, "goals": True},
        },
    )
    place.policy = base
    place.train("first", loss_scale="beta_squared")
    place.train("again", loss_scale="beta_squared")
    text = (place.folder / "first" / "README.md").read_text()
    assert text == (place.folder / "again" / "README.md").read_text() and str(tmp_path) not in text
    for words in (
        "10 prompts of org/prompts-2 at c0ffee",
        "every two responses of each prompt, both ways round",
        "; 4 pairs of an earlier",
        "refer to the policy it was trained from",
        "| loss | sppo |",
        "| beta | 0.001 |",
        "| pairs | 10 |",
        "| order_right | ",
        "little: gemma",
    ):
        assert words in text, words
    place.policy = place.folder / "first"
    place.score(place.policy, "float32")
    shutil.copy(place.reference, place.folder / "older.parquet")
    place.train("second", loss="dpo", reference=place.folder / "older.parquet")
    assert (
        "the loss `dpo`" in (text := (place.folder / "second" / "README.md").read_text()).lower()
        and "refer to an older policy than" in text
    )
    own = {
        "base_model": "little",
        "library_name": "transformers",
        "license": "gemma",
        "license_link": "https://example.org",
    }
    assert header(place.folder / "first") == own | {"tags": ["preference-optimization", "sppo"]}
    assert header(place.folder / "second") == own | {"tags": ["preference-optimization", "dpo"]}


def test_policy_that_was_not_trained_is_the_one_it_came_from(place):
    """A step of learning rate 0: reading, training and writing change no weight, in bfloat16 either."""
    place.score(place.policy, "bfloat16")
    assert (
        distance(
            place.start(),
            place.train(
                "policy",
                precision="bfloat16",
                lr_schedule="linear",
                warmup_ratio=1.0,
                batch_size=10,
                micro_batch_size=10,
            ),
        )
        == 0
    )
    assert read_json(place.folder / "policy" / "config.json")["dtype"] == "float32"
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (place.folder / "policy" / name).is_file()


def test_master_weights_stay_float32_when_the_computation_is_bfloat16(place):
    """Updates far below bfloat16's resolution of a weight (2^-8 of it) must arrive."""
    place.score(place.policy, "bfloat16")
    trained, start = (
        place.train("policy", precision="bfloat16", optimizer="rmsprop", learning_rate=1e-6),
        place.start(),
    )
    name = "model.layers.0.mlp.up_proj.weight"
    assert trained[name].dtype == torch.float32
    step = (trained[name] - start[name]).abs()
    assert (step > 0).float().mean() > 0.9 and step.max() < 1e-4


def test_beta_squared_scales_the_gradient_and_not_the_reported_loss(place):
    plain = place.train("plain", batch_size=10, micro_batch_size=5, beta=0.01, learning_rate=1e-6)
    scaled = place.train(
        "scaled",
        batch_size=10,
        micro_batch_size=5,
        beta=0.01,
        learning_rate=1e-2,
        loss_scale="beta_squared",
    )
    assert distance(place.start(), plain) > 1e-5
    assert distance(plain, scaled) < 1e-3 * distance(place.start(), plain)
    assert place.log("scaled")[0]["loss"] == pytest.approx(place.log("plain")[0]["loss"], rel=1e-6)
    assert place.log("scaled")[0]["grad_norm"] == pytest.approx(
        1e-4 * place.log("plain")[0]["grad_norm"], rel=1e-4
    )


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


def test_gradient_checkpointing_changes_no_weight(place):
    assert (
        distance(place.train("plain"), place.train("saving", gradient_checkpointing="true")) < 1e-7
    )


def test_loss_that_is_no_number_is_refused_and_no_policy_is_written(place):
    with pytest.raises(
        UserError,
        match=r"(loss of pair \d in step 2|gradient norm of step \d \(pairs \d, \d\)) is (nan|inf).*learning_rate|precision",
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
    """Without clipping, where nothing else would notice."""
    monkeypatch.setattr(trainer.PairTrainer, "_get_grad_norm", lambda *_, **__: math.inf)
    with pytest.raises(
        UserError,
        match=r"gradient norm of step 1 \(pairs \d+, \d+\) is inf; lower train.learning_rate",
    ):
        place.train("policy", batch_size=2, micro_batch_size=1, checkpoint_steps=1, max_grad_norm=0)
    assert not list((place.folder / ".policy.work").glob("checkpoint-*"))


def test_record_counts_pairs_steps_and_tokens(place):
    place.train("policy", stop_epoch=1)
    record, pairs = (
        read_json(record_path(place.folder / "policy")),
        read_table(place.pairs, "pairs"),
    )
    tokens = sum(
        2 * len(p["prompt_token_ids"]) + len(p["chosen_token_ids"]) + len(p["rejected_token_ids"])
        for p in pairs
    )
    assert (record["pairs"], record["steps"], record["tokens_an_epoch"]) == (10, 3, tokens)
    assert set(record["inputs"]) == {str(place.pairs), str(place.reference), str(place.policy)}
    assert record["final"] == place.log("policy")[-1]
