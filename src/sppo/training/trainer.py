"""Training on pairs: our trainer, and TRL's own as the oracle.

Ours is `transformers.Trainer` with three public methods of its own: `compute_loss` (the SPPO family),
`get_batch_samples` (a step's loss is the mean over its pairs, however they are cut into micro-batches and divided over
processes) and `create_scheduler` (the schedule may be longer than the training).
"""

from __future__ import annotations

import math
import random
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from sppo.core.errors import UserError
from sppo.training.checkpoints import seal
from sppo.training.distributed import first_alone
from sppo.training.logps import (
    check_finite,
    forward_precision,
    pair_batch,
    pair_length,
    response_logps,
)
from sppo.training.losses import LOSSES, pair_loss
from sppo.training.requirements import micro_batches

# Log-ratios before the first step are rounding alone: what other neighbours and other padding change.
# Errors of tokens nearly cancel, so that they grow with the root of the length, while those of
# another policy add up. The root of the sum of squared log-ratios of responses of n tokens in all is
# at most sqrt(base^2 + each^2 n) nats. benchmarks/step_0_noise.py measures it: bfloat16's standard
# deviation is about 0.01 for each root of a token, with rare responses ten times as far off.
IDENTITY_TOLERANCE = {torch.float32: (2e-3, 5e-4), torch.bfloat16: (0.4, 0.04)}

# Of each pair: the preference model's estimates, and log-probabilities under pi_t and the method's reference.
NUMBERS = (
    "p_hat_chosen",
    "p_hat_rejected",
    "p_chosen_beats_rejected",
    "current_chosen",
    "current_rejected",
    "reference_chosen",
    "reference_rejected",
)


def training_order(lengths: list[int], batch_size: int, epochs: int, seed: int) -> list[int]:
    """Indices of pairs in the order of training: shuffled in every epoch, cut into steps, each sorted by length.

    So micro-batches hold pairs of like length, and which pairs make a step does not depend on micro-batches.
    """
    order: list[int] = []
    for epoch in range(epochs):
        indices = list(range(len(lengths)))
        random.Random(f"{seed}/{epoch}").shuffle(indices)
        order += indices
    steps = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return [i for step in steps for i in sorted(step, key=lambda i: (-lengths[i], i))]


def plan(n_pairs: int, options: dict[str, Any]) -> tuple[int, int]:
    """Optimiser steps until `stop_epoch`, and those that the learning-rate schedule is laid out for."""
    stop = math.ceil(n_pairs * options["stop_epoch"] / options["batch_size"])
    total = math.ceil(n_pairs * options["schedule_total_epochs"] / options["batch_size"])
    return stop, max(stop, total)


def collate_pairs(pairs: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch of B pairs: 2B sequences (chosen, then rejected) and the pairs' own numbers, each (B,)."""
    batch = pair_batch(pairs)
    for name in NUMBERS:
        batch[name] = torch.tensor([pair[name] for pair in pairs], dtype=torch.float32)
    for end in ("chosen", "rejected"):
        batch[f"tokens_{end}"] = torch.tensor([len(pair[f"{end}_token_ids"]) for pair in pairs])
    batch["sequence_tokens"] = torch.tensor([sequence_tokens(pair) for pair in pairs])
    batch["pair_id"] = torch.tensor([pair["pair_id"] for pair in pairs])
    batch["weight"] = torch.tensor([pair.get("weight", 1.0) for pair in pairs])
    return batch


def sequence_tokens(pair: dict[str, Any]) -> int:
    """Tokens of both sequences of a pair, each with the prompt."""
    responses = len(pair["chosen_token_ids"]) + len(pair["rejected_token_ids"])
    return 2 * len(pair["prompt_token_ids"]) + responses


def identity_fault(ratios: Tensor, tokens: Tensor, dtype: torch.dtype) -> str | None:
    """Why log-ratios (n,) of responses of so many tokens (n,) are no rounding, None if they are."""
    base, each = IDENTITY_TOLERANCE[dtype]
    size, length = ratios.double().square().sum().sqrt().item(), int(tokens.sum())
    limit = math.sqrt(base**2 + each**2 * length)
    if size < limit:
        return None
    return (
        f"the log-ratios of {len(ratios)} responses, {length} tokens, are {size:.3g} nats (root of "
        f"the sum of squares) before the first update, and rounding gives at most {limit:.3g}"
    )


def pad_to_multiple(rows: list[dict[str, Any]], size: int) -> list[dict[str, Any]]:
    """Rows up to a multiple of `size`, the last one repeated with weight 0: processes must make passes of like number, and count no pair twice."""
    return rows + [rows[-1] | {"weight": 0.0}] * (-len(rows) % size)


# What a log line tells as means over the step's pairs.
MEANS = ("loss", "log_ratio_chosen", "log_ratio_rejected", "reward_accuracy")


class PairTrainer(Trainer):
    """Trains on pairs with any loss of `losses.py`; for SPPO, arXiv 2405.00675, eq. 4.6."""

    def __init__(
        self,
        *,
        options: dict[str, Any],
        schedule_steps: int,
        dtype: torch.dtype,
        **kwargs: Any,
    ) -> None:
        super().__init__(data_collator=collate_pairs, **kwargs)
        self.options, self.schedule_steps, self.dtype = options, schedule_steps, dtype
        self.model_accepts_loss_kwargs = (
            True  # the loss is divided by the step's pairs, in compute_loss
        )
        self._step_rows: list[
            Tensor
        ] = []  # of each micro-batch since the last log line: (B, COLUMNS)
        self._step_began = time.monotonic()
        self._step_0_rows: list[Tensor] = []  # of each micro-batch of the first step: (B, 7)
        self.step_0: dict[str, float] | None = None

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        pairs = torch.tensor(float(sum(batch["weight"].sum() for batch in batches)), device=device)
        # The mean over processes that follows the backward pass divides by their number once more.
        return batches, self.accelerator.reduce(pairs, "sum") / self.accelerator.num_processes

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        return super().create_scheduler(self.schedule_steps, optimizer)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        # The same float32 weights and casts as in the reference pass, also where weights are divided over processes.
        with forward_precision(inputs["input_ids"].device.type, self.dtype):
            logps = response_logps(model, inputs)
        chosen, rejected = logps.chunk(2)
        delta_w, delta_l = chosen - inputs["current_chosen"], rejected - inputs["current_rejected"]
        losses = pair_loss(
            self.options["loss"],
            inputs | {"logp_chosen": chosen, "logp_rejected": rejected},
            self.options,
        )
        if self.state.global_step == 0 and self.step_0 is None:
            self._keep_step_0(losses, delta_w, delta_l, inputs)
        self._count(losses, delta_w, delta_l, inputs)
        scale = self.options["beta"] ** 2 if self.options["loss_scale"] == "beta_squared" else 1.0
        loss = (
            scale
            * (losses * inputs["weight"]).sum()
            / (num_items_in_batch if num_items_in_batch is not None else inputs["weight"].sum())
        )
        return (loss, logps) if return_outputs else loss

    def _keep_step_0(
        self, losses: Tensor, delta_w: Tensor, delta_l: Tensor, inputs: dict[str, Tensor]
    ) -> None:
        """Keep a micro-batch of the first step, and what the loss is where all log-ratios are 0."""
        itself = {
            "logp_chosen": inputs["current_chosen"],
            "logp_rejected": inputs["current_rejected"],
        }
        closed = pair_loss(self.options["loss"], inputs | itself, self.options)
        columns = (
            inputs["weight"],
            losses,
            closed,
            delta_w,
            delta_l,
            inputs["tokens_chosen"],
            inputs["tokens_rejected"],
        )
        self._step_0_rows.append(
            torch.stack([column.detach().double() for column in columns], dim=1)
        )

    def _check_step_0(self) -> None:
        """In the first step the policy was pi_t: its log-ratios to it are 0, else UserError.

        On all pairs of the step, for of few pairs rounding hides a policy that is near. The loss and
        its closed form are recorded beside each other.
        """
        rows = self.accelerator.gather(torch.cat(self._step_0_rows))
        self._step_0_rows = []
        losses, closed, *columns = rows[rows[:, 0] > 0, 1:].T
        ratios, tokens = torch.cat(columns[:2]), torch.cat(columns[2:])
        self.step_0 = {
            "log_ratio_per_token": (ratios.abs() / tokens).max().item(),
            "mean_log_ratio_per_token": abs((ratios.sum() / tokens.sum()).item()),
            "loss": losses.mean().item(),
            "closed_form": closed.mean().item(),
        }
        if fault := identity_fault(ratios, tokens, self.dtype):
            raise UserError(
                f"step-0 identity: {fault}; the reference log-probabilities belong to another "
                "policy: delete them and run again"
            )

    def _count(
        self, losses: Tensor, delta_w: Tensor, delta_l: Tensor, inputs: dict[str, Tensor]
    ) -> None:
        """Keep a micro-batch for the next log line. On its device: reading numbers would make a GPU wait."""
        of_pairs = (inputs["pair_id"], inputs["weight"], inputs["sequence_tokens"])
        columns = (*of_pairs, losses, delta_w, delta_l, delta_w > delta_l)
        self._step_rows.append(torch.stack([column.detach().double() for column in columns], dim=1))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Our own columns in place of the Trainer's loss: unscaled, means over pairs of all processes, nats.

        A loss, log-ratio or gradient norm that is not a finite number is a UserError that names step and
        pairs. It comes before the step's checkpoint is written.
        """
        if self._step_0_rows:
            self._check_step_0()
        if "loss" in logs and self._step_rows:
            rows = torch.cat(self._step_rows)
            self._check_numbers(rows, logs.get("grad_norm"))
            weight = rows[:, 1:2]
            sums = torch.cat([weight.sum(0), (weight * rows[:, 2:]).sum(0)])
            pairs, tokens, *totals = self.accelerator.reduce(sums, "sum").tolist()
            now = time.monotonic()
            means = {name: total / pairs for name, total in zip(MEANS, totals, strict=True)}
            logs = {**logs, **means, "tokens_per_second": tokens / (now - self._step_began)}
            self._step_rows, self._step_began = [], now
        super().log(logs, start_time)

    def _check_numbers(self, rows: Tensor, gradient_norm: float | None) -> None:
        where = f"step {self.state.global_step}"
        names = [f"pair {int(pair_id)} in {where}" for pair_id in rows[:, 0].tolist()]
        check_finite(rows[:, 3], names, "loss")
        if gradient_norm is not None and not math.isfinite(gradient_norm):
            pairs = ", ".join(str(int(pair_id)) for pair_id in rows[:, 0].tolist())
            raise UserError(
                f"the gradient norm of {where} (pairs {pairs}) is {gradient_norm}; lower "
                "train.learning_rate, set train.loss_scale: beta_squared, or train.precision: float32"
            )


class StepLog(TrainerCallback):
    """A line a step for the log of a job that nobody watches."""

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        if logs and "loss" in logs and state.is_world_process_zero:
            ratios = "".join(
                f", {name.replace('_', '-', 1).replace('_', ' of ')} {logs[name]:+.2f}"
                for name in ("log_ratio_chosen", "log_ratio_rejected")
                if name in logs
            )
            print(
                f"step {state.global_step} of {state.max_steps}: loss {logs['loss']:.6g}{ratios}",
                flush=True,
            )


class SealCheckpoints(TrainerCallback):
    """Makes a checkpoint count, when all processes have written their parts of it.

    Hashing reads it once more, from memory where that has room; the first process does it while the
    others wait, and a checkpoint is rare.
    """

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        with first_alone():  # all have come here, so all is written
            pass
        with first_alone() as here:
            if here:
                seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def trainer_arguments(
    options: dict[str, Any], steps: int, schedule_steps: int, device: str, work: Path, seed: int
) -> dict[str, Any]:
    """Arguments that our trainer and TRL's share."""
    micro, accumulated = micro_batches(options)
    fsdp = options["parallel"] == "fsdp2"
    return {
        "output_dir": str(work),
        "max_steps": steps,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulated,
        "learning_rate": options["learning_rate"],
        "optim": options["optimizer"],
        "lr_scheduler_type": options["lr_schedule"],
        "weight_decay": 0.0,
        # In steps of the whole schedule, which is longer than the training if stop_epoch ends it early.
        "warmup_steps": math.ceil(options["warmup_ratio"] * schedule_steps),
        "max_grad_norm": options["max_grad_norm"],
        "use_cpu": device == "cpu",
        "seed": seed,
        "data_seed": seed,
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        "dataloader_pin_memory": device != "cpu",
        # FSDP has its own checkpointing, which `accelerate launch` was told of, and would keep whole gradients between micro-batches.
        "activation_checkpointing": options["gradient_checkpointing"] and not fsdp,
        "accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": fsdp}},
        "ddp_find_unused_parameters": False,
        "logging_steps": 1,
        "logging_first_step": True,
        # A training shorter than that leaves nothing to go on from.
        "save_strategy": "steps" if steps > options["checkpoint_steps"] else "no",
        "save_steps": options["checkpoint_steps"],
        "save_total_limit": 2,
        "report_to": options["report_to"],
        "disable_tqdm": True,
        "run_name": work.parent.name,
    }


def make_trainer(
    model: nn.Module,
    pairs: list[dict[str, Any]],
    options: dict[str, Any],
    dtype: torch.dtype,
    device: str,
    work: Path,
    seed: int,
) -> PairTrainer:
    """Our trainer for rows of `pairs` that carry all `NUMBERS`."""
    steps, schedule_steps = plan(len(pairs), options)
    order = training_order(
        [pair_length(p) for p in pairs],
        options["batch_size"],
        math.ceil(options["stop_epoch"]),
        seed,
    )
    arguments = TrainingArguments(
        **trainer_arguments(options, steps, schedule_steps, device, work, seed)
    )
    if arguments.deepspeed_plugin:  # DeepSpeed switches an autocast off that it does not know of
        arguments.deepspeed_plugin.deepspeed_config["torch_autocast"] = {
            "enabled": dtype == torch.bfloat16,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        }  # float32 is exchanged
    rows = [pairs[i] for i in order]
    if options["processes"] > 1:
        rows = pad_to_multiple(rows, options["processes"] * arguments.per_device_train_batch_size)
    trainer = PairTrainer(
        model=with_lora(model, options),
        args=arguments,
        train_dataset=rows,
        options=options,
        schedule_steps=schedule_steps,
        dtype=dtype,
        callbacks=[StepLog(), SealCheckpoints()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def make_trl_trainer(
    model: PreTrainedModel,
    tokenizer: Any,
    pairs: list[dict[str, Any]],
    options: dict[str, Any],
    dtype: torch.dtype,
    device: str,
    work: Path,
    seed: int,
    reference: PreTrainedModel | None = None,
) -> Trainer:
    """TRL's DPOTrainer on the same token ids in the same order; it computes its own references, which are pi_t.

    All of them before the first step, or, if it is given pi_t as a second model, as it does by default, those of each step in the step.
    """
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class TokenIdTrainer(DPOTrainer):
        """DPOTrainer that takes token ids as they are instead of making them again from text."""

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            return super().create_scheduler(schedule_steps, optimizer)

    steps, schedule_steps = plan(len(pairs), options)
    order = training_order(
        [pair_length(p) for p in pairs],
        options["batch_size"],
        math.ceil(options["stop_epoch"]),
        seed,
    )
    rows = [
        {
            "prompt_ids": list(pairs[i]["prompt_token_ids"]),
            "chosen_ids": list(pairs[i]["chosen_token_ids"]),
            "rejected_ids": list(pairs[i]["rejected_token_ids"]),
        }
        for i in order
    ]
    shared = trainer_arguments(options, steps, schedule_steps, device, work, seed)
    arguments = DPOConfig(
        **shared
        | {
            "bf16": dtype == torch.bfloat16,
            "remove_unused_columns": True,
            "gradient_checkpointing": options["gradient_checkpointing"],
        },
        loss_type=[str(LOSSES[options["loss"]].trl)],
        beta=options["beta"],
        precompute_ref_log_probs=reference is None,
        max_length=None,
    )
    trainer = TokenIdTrainer(
        model=with_lora(model, options),
        ref_model=reference,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[StepLog(), SealCheckpoints()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def with_lora(model: Any, options: dict[str, Any]) -> Any:
    """The model itself, or with LoRA adapters on all linear layers if `lora_rank` is not 0."""
    if options["lora_rank"] == 0:
        return model
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        model,
        LoraConfig(
            r=options["lora_rank"],
            lora_alpha=options["lora_alpha"],
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )


def merged(model: Any) -> PreTrainedModel:
    """The policy with its adapters added to the weights: in float32, for bfloat16 would round most of them away, and on the CPU, which has room."""
    return model.to("cpu").float().merge_and_unload()


def share_kept_in_bfloat16(model: Any) -> float:
    """How much of what LoRA adapters learned is left when the merged policy is read in bfloat16, 0 to 1.

    The projection of the rounded update on the update, over all adapted weights. bfloat16 resolves 1/256
    of a weight: of an update 2,000 times smaller than its weights about a quarter is left.
    """
    kept = whole = 0.0
    for module in model.modules():
        if not hasattr(module, "lora_A"):
            continue
        update = module.get_delta_weight("default").detach().float()
        weight = module.get_base_layer().weight.detach().float()
        left = (weight + update).bfloat16().float() - weight.bfloat16().float()
        kept += (left * update).sum().item()
        whole += update.square().sum().item()
    return kept / whole if whole else 1.0


def check_kept_update(model: Any) -> float:
    """`share_kept_in_bfloat16`, printed; less than a half is a UserError.

    The next iteration, vLLM and the reference read a LoRA policy in bfloat16.
    """
    share = share_kept_in_bfloat16(model)
    print(
        f"LoRA: {share:.0%} of the update is left where the policy is read in bfloat16", flush=True
    )
    if share < 0.5:
        raise UserError(
            f"only {share:.0%} of what LoRA learned is left where the policy is read in bfloat16, as the next iteration does; "
            "raise train.learning_rate, set train.precision: float32, or train all weights with train.lora_rank: 0"
        )
    return share
