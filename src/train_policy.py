"""Train the next policy on this iteration's pairs.

Reads   pairs.parquet, logps/current/*.parquet (log-probabilities of the pairs under pi_t),
        logps/reference/*.parquet (only for a method that refers to another policy than pi_t),
        logps/earlier<j>/*.parquet (only for a method with several opponents), and pi_t, the policy
        to start from
Writes  policy/ (a Hugging Face folder, float32) and train_log.jsonl, with a record of each
Paper   2405.00675, Algorithm 1 line 6, eq. (4.6)
Departs from the paper: only if a flag is set; the defaults are the paper's. Master weights,
        references and sums are float32, also if the forward pass computes in bfloat16.

A killed training resumes from its last complete checkpoint. Two checkpoints are stored in
`.<policy>.work/` beside the policy, until the policy is written. Only one process trains a policy
at a time; another one waits for it (`.<policy>.lock`). With --processes above 1, this program
starts that many processes with `accelerate launch` and waits for them. Each of them runs this
program, and the first one writes the files.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import inspect
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sppo.core.artifacts import (
    file_hash,
    known_hash,
    parse_json,
    read_record,
    recorded,
    remove,
    write_json,
    write_json_lines,
    written_whole,
)
from sppo.core.config import DEVICES, running_keys, schema
from sppo.core.errors import UserError, run, writing
from sppo.core.flags import add_section
from sppo.core.stages import STAGES
from sppo.core.tables import read_table
from sppo.preferences.estimates import p_hat_weighted
from sppo.reporting.cards import data_of, model_card, table
from sppo.training.checkpoints import exclusive_lock, last_checkpoint, remove_damaged
from sppo.training.distributed import (
    barrier_at_end,
    errors_once,
    is_launched,
    is_main_process,
    join_processes,
    launch,
)
from sppo.training.losses import LOSSES, check_training, unread_keys

# The options that the model card lists, besides those that only some losses read. The policy's
# record has all.
METHOD = (
    "loss",
    "beta",
    "history",
    "sft_weight",
    "optimism",
    "learning_rate",
    "optimizer",
    "lr_schedule",
    "warmup_ratio",
    "schedule_total_epochs",
    "stop_epoch",
    "batch_size",
    "max_grad_norm",
    "lora_rank",
    "seed",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument(
        "--current",
        type=Path,
        nargs="+",
        required=True,
        help="logps/current/*.parquet: log-probabilities under the policy to start from",
    )
    parser.add_argument(
        "--reference",
        type=Path,
        nargs="+",
        help="logps/reference/*.parquet, if the method refers to another policy",
    )
    parser.add_argument(
        "--earlier",
        type=Path,
        nargs="+",
        default=[],
        help="logps/earlier<j>/*.parquet, all of pi_t-1, then all of pi_t-2, ...",
    )
    parser.add_argument("--policy", type=Path, required=True, help="policy to start from")
    parser.add_argument("--output", type=Path, required=True, help="folder of the trained policy")
    parser.add_argument("--log", type=Path, required=True, help="train_log.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--attention", default=None)
    add_section(parser, "train", skip=("reference_every", "lookahead"))
    args = parser.parse_args()
    check_training(vars(args))
    args.reference = args.reference or args.current
    if args.processes > 1 and not is_launched():
        # Several nodes do not wait for the lock, because they would wait for each other.
        if args.nodes > 1 or not finished_meanwhile(args):
            launch(vars(args), args.device)
        return
    with errors_once(), contextlib.ExitStack() as lock:
        if is_main_process():
            # With several processes, the launcher has already waited for the lock.
            waited = lock.enter_context(exclusive_lock(args.output, wait=args.processes == 1))
            if waited and is_made(args):
                return
        train(args)


def finished_meanwhile(args: argparse.Namespace) -> bool:
    """Wait until no other process trains this policy.

    Returns whether there was one and it has made the policy that these arguments ask for.
    """
    with exclusive_lock(args.output) as waited:
        return waited and is_made(args)


def is_made(args: argparse.Namespace) -> bool:
    """Whether policy and log exist, made with these inputs, arguments and stage version."""
    expected = {
        "inputs": {str(path): known_hash(path) for path in inputs_of(args)},
        "stage_version": STAGES["train"],
        "arguments": json.loads(json.dumps(vars(args), default=str)),
    }
    for artifact in (args.output, args.log):
        record = read_record(artifact) if artifact.exists() else None
        if record is None or record["sha256"] != file_hash(artifact):
            return False
        if any(record.get(key) != value for key, value in expected.items()):
            return False
    print(f"{args.output} has been made meanwhile by the process that was waited for", flush=True)
    return True


def inputs_of(args: argparse.Namespace) -> list[Path]:
    """The files and folders that a training reads."""
    reference = args.reference if args.reference != args.current else []
    return [args.pairs, *args.current, *reference, *args.earlier, args.policy]


def train(args: argparse.Namespace) -> None:
    """Train the policy, then write policy, log and records."""
    pairs = load_pairs(args)
    # These imports take seconds, so they come after the checks of the pairs.
    import torch

    from sppo.policies.chats import load_tokenizer
    from sppo.policies.devices import compute_dtype, pick_device, start_torch
    from sppo.policies.lora_update import read_factors, trained_factors
    from sppo.training.trainer import share_kept_in_bfloat16

    start_torch()
    # The default folder is in the work folder, which is removed at the end.
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(args.output.parent / "tensorboard"))
    device = pick_device(args.device)
    join_processes(args.processes, device)
    dtype = compute_dtype(args.precision, device)
    with records(args) as facts:
        tokenizer = load_tokenizer(args.policy)
        trainer, work = load_trainer(args, tokenizer, pairs, dtype, device)
        last = last_checkpoint(work)
        with writing(work):
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        history = [line for line in trainer.state.log_history if "loss" in line]
        check_history(history, args.output)
        kept = None
        factors = None
        if args.lora_rank and is_main_process():
            if dtype == torch.bfloat16:
                kept = share_kept_in_bfloat16(trainer.model)
                print(f"LoRA: merged weights in bfloat16 keep {kept:.0%} of the update", flush=True)
            factors = trained_factors(trainer.model, read_factors(args.policy))
        trained, weights = whole_policy(trainer, args)
        if not is_main_process():
            return
        card_text = card(args, len(pairs), trainer.state.global_step, history[-1])
        write_policy(args.output, trained, weights, tokenizer, card_text, factors)
        write_json_lines(args.log, history)
        facts |= facts_of(trainer, pairs, dtype, history[-1])
        if kept is not None:
            facts["lora_update_left_in_bfloat16"] = kept
        shutil.rmtree(work)


def load_pairs(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The pairs, with their log-probabilities under pi_t and under the method's reference."""
    pairs = read_table(args.pairs, "pairs")
    if not pairs:
        raise UserError(f"{args.pairs} has no pairs; its record counts why they were dropped")
    for name in ("current", "reference"):
        pairs = joined(pairs, args.pairs, getattr(args, name), name)
    pairs = with_opponents(pairs, args)
    if LOSSES[args.loss].mixture:
        pairs = against_mixture(pairs, args.tau / args.beta)
    return pairs


def joined(
    pairs: list[dict[str, Any]], source: Path, shards: list[Path], name: str
) -> list[dict[str, Any]]:
    """Pairs with the log-probabilities in `shards` as <name>_chosen and <name>_rejected.

    `source` is the file of the pairs. A UserError if the shards together have other pairs.
    """
    by_id = {row["pair_id"]: row for shard in shards for row in read_table(shard, "logps")}
    if by_id.keys() != {pair["pair_id"] for pair in pairs}:
        raise UserError(
            f"{shards[0].parent} does not belong to {source}: their pairs differ; delete it and"
            " run again"
        )
    return [
        {
            **pair,
            f"{name}_chosen": by_id[pair["pair_id"]]["chosen_logp"],
            f"{name}_rejected": by_id[pair["pair_id"]]["rejected_logp"],
        }
        for pair in pairs
    ]


def with_opponents(pairs: list[dict[str, Any]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Pairs with opponents_chosen and opponents_rejected, the weighted means of log-probabilities.

    The opponents are pi_t and earlier iterates, with the weights `args.history`.
    """
    files = len(args.current)
    if len(args.earlier) != files * (len(args.history) - 1):
        raise UserError(
            f"--history has {len(args.history)} weights, so --earlier needs"
            f" {files * (len(args.history) - 1)} files, but has {len(args.earlier)}; give the"
            " log-probabilities under each earlier opponent"
        )
    names = ["current"]
    for number, begin in enumerate(range(0, len(args.earlier), files), 1):
        names.append(f"earlier{number}")
        pairs = joined(pairs, args.pairs, args.earlier[begin : begin + files], names[-1])
    shares = [weight / sum(args.history) for weight in args.history]
    weighted = list(zip(shares, names, strict=True))
    return [
        pair
        | {
            f"opponents_{end}": sum(share * pair[f"{name}_{end}"] for share, name in weighted)
            for end in ("chosen", "rejected")
        }
        for pair in pairs
    ]


def against_mixture(pairs: list[dict[str, Any]], share: float) -> list[dict[str, Any]]:
    """Pairs with P-hat against Nash-MD's mixture pi_t^(1 - share) pi_ref^share instead of pi_t.

    The pairs must include every two responses of a prompt, except ties and equal texts.
    """
    pairs_of_prompts: dict[str, list[dict[str, Any]]] = {}
    for pair in pairs:
        pairs_of_prompts.setdefault(pair["prompt_id"], []).append(pair)
    estimates = {
        prompt_id: mixture_estimates(pairs_of_prompt, share)
        for prompt_id, pairs_of_prompt in pairs_of_prompts.items()
    }
    changed = []
    for pair in pairs:
        p_hat = estimates[pair["prompt_id"]]
        changed.append(
            pair
            | {
                "p_hat_chosen": p_hat[pair["chosen_sample_id"]],
                "p_hat_rejected": p_hat[pair["rejected_sample_id"]],
            }
        )
    return changed


def mixture_estimates(pairs: list[dict[str, Any]], share: float) -> dict[int, float]:
    """P-hat(y beats the mixture) of each response y of one prompt, by sample id.

    The responses are samples of pi_t. In the mixture, response y has the weight
    (pi_ref(y) / pi_t(y))^share, up to a factor. Two responses without a pair have P = 1/2.
    """
    log_ratios: dict[int, float] = {}  # log pi_ref(y) - log pi_t(y), by sample id
    for pair in pairs:
        for end in ("chosen", "rejected"):
            log_ratio = pair[f"reference_{end}"] - pair[f"current_{end}"]
            log_ratios[pair[f"{end}_sample_id"]] = log_ratio
    index_of = {sample_id: index for index, sample_id in enumerate(log_ratios)}
    P = np.full((len(index_of), len(index_of)), 0.5)  # P[i, j] = P(response i beats response j)
    for pair in pairs:
        w, l = index_of[pair["chosen_sample_id"]], index_of[pair["rejected_sample_id"]]
        P[w, l] = pair["p_chosen_beats_rejected"]
        P[l, w] = 1 - pair["p_chosen_beats_rejected"]
    estimates = p_hat_weighted(P, share * np.array(list(log_ratios.values())))
    return {sample_id: float(estimates[index]) for sample_id, index in index_of.items()}


@contextlib.contextmanager
def records(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Write the records of policy and log when the block ends; only the main process does it.

    Yields a dict of facts that are added to the policy's record.
    """
    if not is_main_process():
        yield {}
        return
    inputs, options = inputs_of(args), vars(args)
    with (
        recorded("train", args.output, inputs, options) as facts,
        recorded("train", args.log, inputs, options),
    ):
        yield facts


def load_trainer(
    args: argparse.Namespace, tokenizer: Any, pairs: list[dict[str, Any]], dtype: Any, device: str
) -> tuple[Any, Path]:
    """The trainer of the policy to start from, and the folder of its checkpoints."""
    from sppo.policies.devices import weights_dtype
    from sppo.policies.models import load_policy
    from sppo.training.trainer import make_trainer, make_trl_trainer

    model = load_policy(
        args.policy,
        weights_dtype(args.lora_rank, dtype),
        device if args.parallel == "ddp" else None,
        args.attention,
    )
    model.config.use_cache = False
    work = work_folder(args)
    options = vars(args)
    if args.backend == "trl":
        trainer: Any = make_trl_trainer(
            model, tokenizer, pairs, options, dtype, device, work, args.seed
        )
    else:
        trainer = make_trainer(model, pairs, options, dtype, device, work, args.seed)
    return trainer, work


def check_history(history: list[dict[str, Any]], output: Path) -> None:
    """Raise a UserError if a loss or gradient norm of the training log is not finite.

    `PairTrainer` stops at such a step; TRL's trainer does not.
    """
    for line in history:
        for key in ("loss", "grad_norm"):
            if key in line and not math.isfinite(line[key]):
                raise UserError(
                    f"the training of {output} gave a loss or gradient norm that is not finite; "
                    "lower train.learning_rate"
                )


def write_policy(
    output: Path,
    model: Any,
    weights: dict[str, Any] | None,
    tokenizer: Any,
    card_text: str,
    factors: dict[str, Any] | None = None,
) -> None:
    """Write the policy's folder: model, tokenizer and model card.

    `weights` are the weights to write; None for those of `model`. `factors` are those of LoRA's
    update.
    """
    from sppo.policies.lora_update import write_factors

    model.config.use_cache = True
    with written_whole(output) as temporary:
        model.save_pretrained(temporary, state_dict=weights)
        tokenizer.save_pretrained(temporary)
        if factors:
            write_factors(temporary, factors)
        (temporary / "README.md").write_text(card_text, encoding="utf-8")


def facts_of(
    trainer: Any, pairs: list[dict[str, Any]], dtype: Any, last: dict[str, Any]
) -> dict[str, Any]:
    """What the policy's record says of the training; `last` is the last line of the log."""
    from sppo.training.lengths import sequence_tokens

    return {
        "pairs": len(pairs),
        "steps": trainer.state.global_step,
        "tokens_an_epoch": sum(sequence_tokens(pair) for pair in pairs),
        "computed_in": str(dtype),
        "step_0": getattr(trainer, "step_0", None),
        "final": last,
    }


def card(args: argparse.Namespace, pairs: int, steps: int, last: dict[str, Any]) -> str:
    """The policy's model card; `last` is the last line of the training log."""
    rules = schema()["properties"]["train"]["properties"]
    of_losses = {key for key, rule in rules.items() if "x-loss-parameter" in rule}
    shown = {*METHOD, *of_losses} - set(unread_keys(args.loss))
    method = {key: value for key, value in vars(args).items() if key in shown and value is not None}
    figures: dict[str, Any] = {
        key: last[key]
        for key in ("loss", "log_ratio_chosen", "log_ratio_rejected", "reward_accuracy")
        if key in last
    }
    return model_card(
        args.policy,
        f"A policy of iterative preference optimisation, loss {args.loss}",
        {
            "Data": data_of(args.pairs),
            "Method": f"{method_in_words(args)}.\n\n"
            + table(method | {"pairs": pairs, "steps": steps}),
            "Figures of the last step": table(figures),
        },
        tag=args.loss,
    )


def method_in_words(args: argparse.Namespace) -> str:
    """The sentence of the model card about the method, without its full stop."""
    if args.loss in ("sppo", "sppo_single", "sppo_hard"):
        method = "Self-play preference optimisation"
    else:
        method = (
            f"The loss `{args.loss}`, whose paper src/sppo/training/losses.py names, in the "
            "workflow of SPPO"
        )
    words = f"{method}, https://arxiv.org/abs/2405.00675"
    if not LOSSES[args.loss].has_reference:
        return words
    if args.reference == args.current:
        return f"{words}; log-ratios refer to the policy it was trained from"
    return (
        f"{words}; log-ratios of the loss refer to an older policy than the policy it was trained "
        "from, those in the figures below to the policy it was trained from"
    )


def whole_policy(trainer: Any, args: argparse.Namespace) -> tuple[Any, dict[str, Any] | None]:
    """The trained model with LoRA merged into it, and its weights if processes hold parts of them.

    Then the main process gets the whole weights, and the others get an empty dict. With
    --parallel ddp the weights are None, because each process holds all of them.
    """
    from sppo.training.trainer import merged

    weights = gathered_weights(trainer) if args.parallel != "ddp" else None
    leave_processes()
    model = merged(trainer.model) if args.lora_rank else trainer.model
    return model, weights


def gathered_weights(trainer: Any) -> dict[str, Any]:
    """The whole weights of a divided model in the main process; an empty dict in the others."""
    gathered = trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}
    # `gathered` contains tied weights twice, under both of their names.
    tied = trainer.model.all_tied_weights_keys
    return {name: weight for name, weight in gathered.items() if name not in tied}


def leave_processes() -> None:
    """Wait for the other processes and leave their group, if there is one.

    The main process still has to write the policy, and the others would stop waiting for it after
    a time limit.
    """
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def work_folder(args: argparse.Namespace) -> Path:
    """The folder of the checkpoints, `.<policy>.work`.

    The main process removes its contents if they belong to other inputs, settings or another stage
    version, and removes damaged checkpoints.
    """
    work = args.output.with_name(f".{args.output.name}.work")
    with barrier_at_end() as is_main:
        if is_main:
            expected = fingerprint(args)
            label = work / "made_for.json"
            if made_for(label) != expected:
                remove(work)
            write_json(label, expected)
            remove_damaged(work)
    return work


def fingerprint(args: argparse.Namespace) -> str:
    """A hash of everything that decides the result of a training."""
    settings = {
        key: str(value)
        for key, value in vars(args).items()
        if key not in ("output", "log", *running_keys("train"))
    }
    inputs = [known_hash(path) for path in inputs_of(args)]
    # A checkpoint made by an older version of the loss must not be resumed. Other code of the
    # training has its version in STAGES.
    code = inspect.getsource(LOSSES[args.loss].function)
    text = json.dumps([settings, inputs, STAGES["train"], code], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def made_for(label: Path) -> str | None:
    """The fingerprint that a work folder's label stores, None if the label cannot be read."""
    try:
        return parse_json(label.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


if __name__ == "__main__":
    run(main)
