"""Training on pairs: this project's trainer, and TRL's trainer for comparison.

`PairTrainer` is `transformers.Trainer` and overrides four of its public methods. `compute_loss`
computes the losses of `losses.py`. `get_batch_samples` makes a step's loss the mean over its pairs,
for any division of the pairs into micro-batches and over processes. `create_scheduler` allows a
learning-rate schedule that is longer than the training. `log` adds means over a step's pairs to the
log line, and refuses numbers that are not finite.
"""

from __future__ import annotations

import functools
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
    set_seed,
)

from sppo.core.errors import UserError
from sppo.policies.lora_update import fold_update
from sppo.policies.models import float32_states
from sppo.training.batches import Batch, choose_layout, pair_batch
from sppo.training.checkpoints import write_manifest
from sppo.training.distributed import FSDP, barrier_at_end
from sppo.training.lengths import (
    Layout,
    computed_tokens,
    needed_tokens,
    pair_length,
    sequence_tokens,
)
from sppo.training.logps import check_finite, forward_precision, response_logps
from sppo.training.losses import LOSSES, pair_loss
from sppo.training.micro_batches import divided, efficiency
from sppo.training.requirements import equal_micro_batches

# Before the first update, log-ratios to pi_t are not 0 only because of rounding: a sequence is
# computed in another batch with other padding than in the reference pass. Rounding errors of tokens
# nearly cancel, so their sum grows with the square root of the length. If the references belong to
# another policy, the differences of tokens add up instead. For responses of n tokens in total, the
# root of the sum of squared log-ratios may be at most sqrt(base^2 + each^2 n) nats. The values here
# are (base, each), measured by benchmarks/step_0_noise.py: in bfloat16 the standard deviation is
# about 0.01 sqrt(n), and the log-ratios of rare responses are ten times larger. They are larger too
# where tokens are improbable, as in gold responses: the rounding of such a token's logit does not
# cancel against that of the normaliser. So a response counts as n max(1, nats per token)^2 tokens.
IDENTITY_TOLERANCE = {torch.float32: (2e-3, 5e-4), torch.bfloat16: (0.4, 0.04)}

# The numbers that each pair carries: the preference model's estimates, and the log-probabilities
# (nats) of both responses under pi_t, under the method's reference, and their weighted mean under
# the opponents of `train.history`.
NUMBERS = (
    "p_hat_chosen",
    "p_hat_rejected",
    "p_chosen_beats_rejected",
    "current_chosen",
    "current_rejected",
    "reference_chosen",
    "reference_rejected",
    "opponents_chosen",
    "opponents_rejected",
)


def training_order(lengths: list[int], batch_size: int, epochs: int, seed: int) -> list[int]:
    """Indices of pairs in the order of training, over all epochs.

    The pairs are shuffled in every epoch and divided into steps. Each step is sorted by length, the
    longest pair first, so that the pairs of a micro-batch have similar lengths. The pairs of a step
    do not depend on the size of micro-batches.
    """
    shuffled: list[int] = []
    for epoch in range(epochs):
        indices = list(range(len(lengths)))
        random.Random(f"{seed}/{epoch}").shuffle(indices)
        shuffled += indices
    order: list[int] = []
    for start in range(0, len(shuffled), batch_size):
        step = shuffled[start : start + batch_size]
        order += sorted(step, key=lambda index: (-lengths[index], index))
    return order


def plan(n_pairs: int, options: dict[str, Any]) -> tuple[int, int]:
    """The number of optimiser steps until `stop_epoch`, and that of the learning-rate schedule."""
    stop = math.ceil(n_pairs * options["stop_epoch"] / options["batch_size"])
    total = math.ceil(n_pairs * options["schedule_total_epochs"] / options["batch_size"])
    return stop, max(stop, total)


def collate_pairs(pairs: list[dict[str, Any]], layout: Layout) -> Batch:
    """A batch of B pairs from `pair_batch`, and numbers of shape (B,).

    The numbers are `NUMBERS`, the tokens of each response, the tokens of both sequences, the id and
    the weight of each pair.
    """
    batch = pair_batch(pairs, layout)
    for name in NUMBERS:
        batch[name] = torch.tensor([pair[name] for pair in pairs], dtype=torch.float32)
    for end in ("chosen", "rejected"):
        batch[f"tokens_{end}"] = torch.tensor([len(pair[f"{end}_token_ids"]) for pair in pairs])
    batch["sequence_tokens"] = torch.tensor([sequence_tokens(pair) for pair in pairs])
    batch["pair_id"] = torch.tensor([pair["pair_id"] for pair in pairs])
    batch["weight"] = torch.tensor([pair.get("weight", 1.0) for pair in pairs])
    return batch


def collate_micro_batch(rows: list[list[dict[str, Any]]], layout: Layout) -> Batch:
    """The batch of the only row that a data loader gives at once, a micro-batch."""
    (pairs,) = rows
    return collate_pairs(pairs, layout)


def identity_fault(ratios: Tensor, logps: Tensor, tokens: Tensor, dtype: torch.dtype) -> str | None:
    """Why log-ratios are larger than rounding explains, see `IDENTITY_TOLERANCE`; None if not.

    Args:
        ratios: log-ratios of n responses to pi_t before the first update, (n,), nats.
        logps: their log-probabilities under pi_t, (n,), nats.
        tokens: the number of tokens of each response, (n,).
        dtype: the type that the forward pass computes in.
    """
    base, each = IDENTITY_TOLERANCE[dtype]
    size = ratios.double().square().sum().sqrt().item()
    length = int(tokens.sum())
    counted = tokens * (-logps / tokens).clamp(min=1).square()
    limit = math.sqrt(base**2 + each**2 * float(counted.sum()))
    if size < limit:
        return None
    return (
        f"the log-ratios of {len(ratios)} responses, {length} tokens, are {size:.3g} nats (root of "
        f"the sum of squares) before the first update, but rounding explains at most {limit:.3g}"
    )


# The columns of the training log that are means over a step's pairs.
MEANS = ("loss", "log_ratio_chosen", "log_ratio_rejected", "reward_accuracy")


def stack_columns(*columns: Tensor) -> Tensor:
    """Stack columns (B,) to rows (B, columns) in float64, without gradients.

    On their device, except on Apple's GPUs, which have no float64.
    """
    values = [column.detach() for column in columns]
    if any(column.device.type == "mps" for column in values):
        values = [column.cpu() for column in values]
    return torch.stack([column.double() for column in values], dim=1)


class PairTrainer(Trainer):
    """Trains on pairs with any loss of `losses.py`; for SPPO it is eq. (4.6) of arXiv 2405.00675.

    Args:
        options: the options of the training, as in the section `train` of the configuration.
        schedule_steps: the number of steps of the learning-rate schedule.
        dtype: the type that the forward pass computes in.
        layout: the layout of the batches.
        shares: for each step what `micro_batches.efficiency` says, for the log.
        kwargs: the arguments of `transformers.Trainer`.
    """

    def __init__(
        self,
        *,
        options: dict[str, Any],
        schedule_steps: int,
        dtype: torch.dtype,
        layout: Layout,
        shares: list[dict[str, float]],
        **kwargs: Any,
    ) -> None:
        super().__init__(
            data_collator=functools.partial(collate_micro_batch, layout=layout), **kwargs
        )
        self.shares = shares
        self.options = options
        self.schedule_steps = schedule_steps
        self.dtype = dtype
        # Tells the Trainer that compute_loss divides by the number of pairs of the step.
        self.model_accepts_loss_kwargs = True
        # One tensor (B, 7) per micro-batch since the last log line, see `_count`.
        self._step_rows: list[Tensor] = []
        self._step_began = time.monotonic()
        # One tensor (B, 9) per micro-batch of the first step, see `_keep_step_0`.
        self._step_0_rows: list[Tensor] = []
        # What `_check_step_0` measured, for the record of the policy.
        self.step_0: dict[str, float] | None = None

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """The micro-batches of a step, and the divisor of their losses in `compute_loss`.

        The divisor is the number of pairs of the step divided by the number of processes, because
        the gradients are averaged over the processes after the backward pass.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        pairs = torch.tensor(float(sum(batch["weight"].sum() for batch in batches)), device=device)
        return batches, self.accelerator.reduce(pairs, "sum") / self.accelerator.num_processes

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The learning-rate schedule over `schedule_steps` instead of the training's steps."""
        return super().create_scheduler(self.schedule_steps, optimizer)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of a micro-batch of B pairs, divided by `num_items_in_batch`.

        The divisor is from `get_batch_samples`; without it, the weights' sum. With
        `return_outputs`, also the log-probabilities (2B,) of all chosen, then all rejected
        responses.
        """
        # The same float32 weights and casts as in the reference pass, also if the weights are
        # divided over processes.
        with forward_precision(inputs["input_ids"].device.type, self.dtype):
            logps = response_logps(model, inputs)
        chosen, rejected = logps.chunk(2)
        delta_w = chosen - inputs["current_chosen"]
        delta_l = rejected - inputs["current_rejected"]
        losses = pair_loss(
            self.options["loss"],
            inputs | {"logp_chosen": chosen, "logp_rejected": rejected},
            self.options,
        )
        if self.state.global_step == 0 and self.step_0 is None:
            self._keep_step_0(losses, delta_w, delta_l, inputs)
        self._count(losses, delta_w, delta_l, inputs)
        scale = self.options["beta"] ** 2 if self.options["loss_scale"] == "beta_squared" else 1.0
        divisor = num_items_in_batch
        if divisor is None:
            divisor = inputs["weight"].sum()
        loss = scale * (losses * inputs["weight"]).sum() / divisor
        return (loss, logps) if return_outputs else loss

    def _keep_step_0(
        self, losses: Tensor, delta_w: Tensor, delta_l: Tensor, inputs: dict[str, Tensor]
    ) -> None:
        """Keep a micro-batch of the first step, with its loss if all log-ratios to pi_t were 0."""
        at_current = {
            "logp_chosen": inputs["current_chosen"],
            "logp_rejected": inputs["current_rejected"],
        }
        closed = pair_loss(self.options["loss"], inputs | at_current, self.options)
        self._step_0_rows.append(
            stack_columns(
                inputs["weight"],
                losses,
                closed,
                delta_w,
                delta_l,
                inputs["current_chosen"],
                inputs["current_rejected"],
                inputs["tokens_chosen"],
                inputs["tokens_rejected"],
            )
        )

    def _check_step_0(self) -> None:
        """Raise a UserError if the policy before the first update was not pi_t.

        Its log-ratios to pi_t must be 0 up to rounding. All pairs of the step are checked together,
        because with few pairs a similar policy cannot be distinguished from rounding. `step_0`
        keeps the loss and the loss at log-ratio 0, for comparison.
        """
        own = torch.cat(self._step_0_rows)
        self._step_0_rows = []
        # Processes have different numbers of pairs; the rows that are added have the weight 0.
        rows = self.accelerator.gather(self.accelerator.pad_across_processes(own, pad_index=0))
        counted = rows[rows[:, 0] > 0, 1:]  # without the pairs of weight 0
        losses, closed = counted[:, 0], counted[:, 1]
        ratios, logps, tokens = (counted[:, i : i + 2].flatten() for i in (2, 4, 6))
        self.step_0 = {
            "log_ratio_per_token": (ratios.abs() / tokens).max().item(),
            "mean_log_ratio_per_token": abs((ratios.sum() / tokens.sum()).item()),
            "loss": losses.mean().item(),
            "closed_form": closed.mean().item(),
        }
        fault = identity_fault(ratios, logps, tokens, self.dtype)
        if fault:
            raise UserError(
                f"step-0 identity: {fault}; the reference log-probabilities belong to another "
                "policy: delete them and run again"
            )

    def _count(
        self, losses: Tensor, delta_w: Tensor, delta_l: Tensor, inputs: dict[str, Tensor]
    ) -> None:
        """Keep a micro-batch for the next log line.

        The numbers stay on their device, because reading them would make a GPU wait.
        """
        self._step_rows.append(
            stack_columns(
                inputs["pair_id"],
                inputs["weight"],
                inputs["sequence_tokens"],
                losses,
                delta_w,
                delta_l,
                delta_w > delta_l,
            )
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add a step's own columns to a log line: `MEANS`, and tokens per second.

        The means are over the pairs of all processes, in nats; the loss is unscaled and replaces
        the Trainer's. A loss or gradient norm that is not finite is a UserError that names the step
        and the pairs; it is raised before the step's checkpoint is written.
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
            logs |= self.shares[self.state.global_step - 1]
            self._step_rows = []
            self._step_began = now
        super().log(logs, start_time)

    def _check_numbers(self, rows: Tensor, gradient_norm: float | None) -> None:
        """Raise a UserError if a loss in `rows` or the gradient norm is not finite."""
        step = f"step {self.state.global_step}"
        pair_ids = [int(pair_id) for pair_id in rows[:, 0].tolist()]
        check_finite(rows[:, 3], [f"pair {pair_id} in {step}" for pair_id in pair_ids], "loss")
        if gradient_norm is not None and not math.isfinite(gradient_norm):
            pairs = ", ".join(map(str, pair_ids))
            raise UserError(
                f"the gradient norm of {step} (pairs {pairs}) is {gradient_norm}; lower "
                "train.learning_rate, set train.loss_scale: beta_squared, or set "
                "train.precision: float32"
            )


class StepLog(TrainerCallback):
    """Prints one line per step on stdout, because a job has no progress bar."""

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        line = f"step {state.global_step} of {state.max_steps}: loss {logs['loss']:.6g}"
        for response in ("chosen", "rejected"):
            ratio = logs.get(f"log_ratio_{response}")
            if ratio is not None:
                line += f", log-ratio of {response} {ratio:+.2f}"
        print(line, flush=True)


class SkipLastCheckpoint(TrainerCallback):
    """Prevents the checkpoint that the Trainer writes after the last step.

    Nothing would read it, because the policy is saved then. At paper scale it has 60 GB.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_save = False


class WriteManifests(TrainerCallback):
    """Writes a checkpoint's manifest after all processes have written their parts of it.

    Hashing reads the checkpoint once more, from memory if there is room. The main process does it
    while the others wait; checkpoints are rare.
    """

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        with barrier_at_end():
            pass  # After this, all processes have written their parts.
        with barrier_at_end() as is_main:
            if is_main:
                write_manifest(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def trainer_arguments(
    options: dict[str, Any],
    steps: int,
    schedule_steps: int,
    device: str,
    work: Path,
    seed: int,
    batches: tuple[int, int],
) -> dict[str, Any]:
    """The arguments that `make_trainer` and `make_trl_trainer` share.

    Args:
        options: the options of the training.
        steps: the number of optimiser steps until the end of the training.
        schedule_steps: the number of steps of the learning-rate schedule.
        device: cpu, cuda or mps.
        work: the folder of the checkpoints.
        seed: the seed of the training.
        batches: the rows of a micro-batch, and the micro-batches of one process in a step.
    """
    micro, accumulated = batches
    fsdp = options["parallel"] in FSDP
    return {
        "output_dir": str(work),
        "max_steps": steps,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulated,
        "learning_rate": options["learning_rate"],
        "optim": options["optimizer"],
        "lr_scheduler_type": options["lr_schedule"],
        "weight_decay": 0.0,
        # A share of the whole schedule, which is longer than the training if stop_epoch ends it
        # early.
        "warmup_steps": math.ceil(options["warmup_ratio"] * schedule_steps),
        "max_grad_norm": options["max_grad_norm"],
        "use_cpu": device == "cpu",
        "seed": seed,
        "data_seed": seed,
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        "dataloader_pin_memory": device == "cuda",
        # Also under FSDP, whose own checkpointing covers all layers.
        "activation_checkpointing": options["gradient_checkpointing"],
        "activation_checkpointing_kwargs": {
            "use_reentrant": False,
            "every_n_layers": options["checkpointed_layers"],
        },
        # Without this, FSDP would keep whole gradients between micro-batches.
        "accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": fsdp}},
        "ddp_find_unused_parameters": False,
        "logging_steps": 1,
        "logging_first_step": True,
        # A training that has at most that many steps writes no checkpoint.
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
    """The `PairTrainer` for rows of the table `pairs` that carry all `NUMBERS`.

    Args:
        model: the policy pi_t.
        pairs: the rows.
        options: the options of the training.
        dtype: the type that the forward pass computes in.
        device: cpu, cuda or mps.
        work: the folder of the checkpoints.
        seed: the seed of the order of pairs and of the training.
    """
    steps, schedule_steps = plan(len(pairs), options)
    processes = options["processes"]
    layout = choose_layout(model, device)

    def tokens(group: list[dict[str, Any]]) -> int:
        return computed_tokens(group, layout)

    rows = in_training_order(pairs, options, seed)
    size = options["batch_size"]
    groups = divided(
        [rows[start : start + size] for start in range(0, len(rows), size)],
        processes,
        most_pairs=min(options["micro_batch_size"], size // processes),
        most_tokens=options["micro_batch_tokens"],
        tokens=tokens,
    )
    batches = (1, len(groups[0]) // processes)  # a row of the data is a whole micro-batch
    arguments = TrainingArguments(
        **trainer_arguments(options, steps, schedule_steps, device, work, seed, batches)
    )
    if arguments.deepspeed_plugin:
        # DeepSpeed switches autocast off unless its own configuration enables it. Without safe
        # modules, processes exchange float32.
        arguments.deepspeed_plugin.deepspeed_config["torch_autocast"] = {
            "enabled": dtype == torch.bfloat16,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        }
    trainer = PairTrainer(
        model=with_lora(model, options, seed),
        args=arguments,
        train_dataset=[group for step in groups for group in step],
        options=options,
        schedule_steps=schedule_steps,
        dtype=dtype,
        layout=layout,
        shares=[efficiency(step, processes, tokens, needed_tokens) for step in groups],
        callbacks=[StepLog(), SkipLastCheckpoint(), WriteManifests()],
    )
    trainer.remove_callback(PrinterCallback)
    if options["parallel"] in FSDP and dtype == torch.bfloat16:
        gather_in_bfloat16(trainer.accelerator, model)
    return trainer


def gather_in_bfloat16(accelerator: Any, model: Any) -> None:
    """Make FSDP2 gather bfloat16 weights, which is half of the traffic; call it before training.

    Each process rounds its part of the float32 weights before it sends it. Gradients are added in
    float32, and the residual stream is float32, as under autocast of float32 weights. The frozen
    policy rounds the same weights (`load_frozen_policy`), so log-ratios begin at 0.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    float32_states(model)


def in_training_order(
    pairs: list[dict[str, Any]], options: dict[str, Any], seed: int
) -> list[dict[str, Any]]:
    """The rows of `pairs` in the order of training, over all epochs."""
    order = training_order(
        [pair_length(pair) for pair in pairs],
        options["batch_size"],
        math.ceil(options["stop_epoch"]),
        seed,
    )
    return [pairs[index] for index in order]


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
    """TRL's DPOTrainer on the same token ids in the same order as in `make_trainer`.

    It computes the log-probabilities under its reference, pi_t, itself: all before the first step,
    or, if `reference` is given, those of each step in that step, as TRL does by default.

    Args:
        model: the policy pi_t.
        tokenizer: its tokenizer.
        pairs, options, dtype, device, work, seed: as in `make_trainer`.
        reference: pi_t as a second model.
    """
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class TokenIdTrainer(DPOTrainer):
        """DPOTrainer that uses the given token ids instead of tokenizing texts."""

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            return super().create_scheduler(schedule_steps, optimizer)

    steps, schedule_steps = plan(len(pairs), options)
    rows = [
        {
            "prompt_ids": list(pair["prompt_token_ids"]),
            "chosen_ids": list(pair["chosen_token_ids"]),
            "rejected_ids": list(pair["rejected_token_ids"]),
        }
        for pair in in_training_order(pairs, options, seed)
    ]
    shared = trainer_arguments(
        options, steps, schedule_steps, device, work, seed, equal_micro_batches(options)
    )
    arguments = DPOConfig(
        **shared
        | {
            "bf16": dtype == torch.bfloat16,
            "remove_unused_columns": True,
            "gradient_checkpointing": options["gradient_checkpointing"],
        },
        loss_type=[str(LOSSES[options["loss"]].trl)],
        beta=options["beta"],
        label_smoothing=options.get("label_smoothing", 0.0),
        precompute_ref_log_probs=reference is None,
        max_length=None,
    )
    trainer = TokenIdTrainer(
        model=with_lora(model, options, seed),
        ref_model=reference,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[StepLog(), SkipLastCheckpoint(), WriteManifests()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def with_lora(model: Any, options: dict[str, Any], seed: int) -> Any:
    """The model with LoRA adapters on all linear layers, or unchanged if `lora_rank` is 0.

    One factor of each adapter is random. The Trainer sets its seed only after the adapters exist.
    """
    if options["lora_rank"] == 0:
        return model
    from peft import LoraConfig, get_peft_model

    set_seed(seed)
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
    """The policy with its LoRA adapters merged into the weights.

    In float32, because bfloat16 would round most of the update away, and on the CPU, because it has
    enough memory.
    """
    whole = model.to("cpu").float().merge_and_unload()
    fold_update(whole)
    return whole


def share_kept_in_bfloat16(model: Any) -> float:
    """The share, 0 to 1, of this LoRA update that is left if merged weights are read in bfloat16.

    This project's programs keep the update apart, but others, such as vLLM, read merged weights.

    It is the projection of the rounded update onto the update, over all adapted weights. bfloat16
    resolves 1/256 of a weight: about a quarter is left of an update that is 2,000 times smaller
    than the weights.
    """
    kept = 0.0
    whole = 0.0
    for module in model.modules():
        if not hasattr(module, "lora_A"):
            continue
        update = module.get_delta_weight("default").detach().float()
        weight = module.get_base_layer().weight.detach().float()
        left = (weight + update).bfloat16().float() - weight.bfloat16().float()
        kept += (left * update).sum().item()
        whole += update.square().sum().item()
    return kept / whole if whole else 1.0
