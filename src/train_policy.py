"""Train the next policy on this iteration's pairs.

Reads   pairs.parquet, logps/current.parquet (log-probabilities of them under pi_t), for a method that refers to another
        policy logps/reference.parquet, the policy to start from
Writes  policy/ (a Hugging Face folder, float32), train_log.jsonl, a record beside each
Paper   2405.00675, Algorithm 1 line 6, eq. (4.6)
Departs from the paper: only where a flag says so; the defaults are the paper's. Master weights, references and sums are
        float32, whatever the forward pass computes in.

A killed training goes on from its last whole checkpoint, of two that lie in `.<policy>.work/` beside the policy
until the policy is whole. While one process trains a policy, another waits for it (`.<policy>.lock`). With --processes
above 1 this process starts them, through `accelerate launch`, and waits; each of them runs this program, and the first
one writes.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from sppo.core.artifacts import (
    STAGES,
    file_hash,
    known_hash,
    parse_json,
    read_record,
    recorded,
    remove,
    write_json,
    write_text,
    written_whole,
)
from sppo.core.errors import UserError, run, writing
from sppo.core.flags import add_section
from sppo.core.tables import read_table
from sppo.preferences.estimates import p_hat_weighted
from sppo.reporting.cards import data_of, model_card, table
from sppo.training.checkpoints import alone, last_checkpoint, remove_damaged
from sppo.training.distributed import (
    errors_once,
    first_alone,
    is_first,
    is_launched,
    join_processes,
    launch,
)
from sppo.training.losses import check_training

# What the model card tells of the method; the record beside the policy has all.
METHOD = (
    "loss",
    "beta",
    "tau",
    "gamma",
    "label_smoothing",
    "ipo_target",
    "per_token",
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
    "loss_scale",
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
        required=True,
        help="logps/current.parquet, under the policy to start from",
    )
    parser.add_argument(
        "--reference",
        type=Path,
        help="logps/reference.parquet, where the method refers to another policy",
    )
    parser.add_argument("--policy", type=Path, required=True, help="policy to start from")
    parser.add_argument("--output", type=Path, required=True, help="folder of the trained policy")
    parser.add_argument("--log", type=Path, required=True, help="train_log.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["auto", "cpu", "gpu"], default="auto")
    parser.add_argument("--attention", default=None)
    add_section(parser, "train", skip=("reference_every",))
    args = parser.parse_args()
    check_training(vars(args))
    args.reference = args.reference or args.current
    if args.processes > 1 and not is_launched():
        # Of several nodes each would wait for the others' start.
        if args.nodes > 1 or not finished_meanwhile(args):
            launch(vars(args), args.device)
        return
    with errors_once(), contextlib.ExitStack() as lock:
        if is_first():  # the launcher, if there is one, has waited
            waited = lock.enter_context(alone(args.output, wait=args.processes == 1))
            if waited and is_made(args):
                return
        train(args)


def finished_meanwhile(args: argparse.Namespace) -> bool:
    """Wait until nobody else trains this policy; whether one did and has made what is asked for."""
    with alone(args.output) as waited:
        return waited and is_made(args)


def is_made(args: argparse.Namespace) -> bool:
    """Whether policy and log are there, whole, of the same inputs, arguments and stage version."""
    inputs = {str(path): known_hash(path) for path in inputs_of(args)}
    asked = inputs, STAGES["train"], json.loads(json.dumps(vars(args), default=str))
    for artifact in (args.output, args.log):
        record = read_record(artifact) if artifact.exists() else None
        if record is None or record["sha256"] != file_hash(artifact):
            return False
        if asked != tuple(record.get(key) for key in ("inputs", "stage_version", "arguments")):
            return False
    print(f"{args.output} has been made meanwhile by the process that was waited for", flush=True)
    return True


def inputs_of(args: argparse.Namespace) -> list[Path]:
    """What a training reads, whose hashes tell one from another."""
    return [args.pairs, args.current, args.reference, args.policy]


def train(args: argparse.Namespace) -> None:
    """Train, then write policy, log and records."""
    pairs = read_table(args.pairs, "pairs")
    if not pairs:
        raise UserError(f"{args.pairs} has no pairs; its record counts why they were dropped")
    for name in ("current", "reference"):
        pairs = joined(pairs, args.pairs, getattr(args, name), name)
    if args.loss == "nash_md":
        pairs = against_mixture(pairs, args.tau / args.beta)
    # Only now what takes seconds to import.
    import torch

    from sppo.policies.models import (
        compute_dtype,
        load_policy,
        load_tokenizer,
        pick_device,
        start_torch,
        weights_dtype,
    )
    from sppo.training.trainer import check_kept_update, make_trainer, make_trl_trainer

    start_torch()
    os.environ.setdefault(
        "TENSORBOARD_LOGGING_DIR", str(args.output.parent / "tensorboard")
    )  # the work folder goes when all is done
    device = pick_device(args.device)
    join_processes(args.processes, device)
    dtype = compute_dtype(args.precision, device)
    options, inputs = vars(args), inputs_of(args)
    record = recorded if is_first() else lambda *_: contextlib.nullcontext({})
    with (
        record("train", args.output, inputs, options) as facts,
        record("train", args.log, inputs, options),
    ):
        tokenizer = load_tokenizer(args.policy)
        model = load_policy(
            args.policy,
            weights_dtype(args.lora_rank, dtype),
            device if args.parallel == "ddp" else None,
            args.attention,
        )
        model.config.use_cache = False
        work = work_folder(args)
        if args.backend == "trl":
            trainer: Any = make_trl_trainer(
                model, tokenizer, pairs, options, dtype, device, work, args.seed
            )
        else:
            trainer = make_trainer(model, pairs, options, dtype, device, work, args.seed)
        with writing(work):
            trainer.train(
                resume_from_checkpoint=str(last) if (last := last_checkpoint(work)) else None
            )
        history = [line for line in trainer.state.log_history if "loss" in line]
        if not all(
            math.isfinite(line[key])
            for line in history
            for key in ("loss", "grad_norm")
            if key in line
        ):
            raise UserError(
                f"training of {args.output} gave a loss or gradient that is not a number; lower train.learning_rate"
            )
        kept = (
            check_kept_update(trainer.model)
            if args.lora_rank and dtype == torch.bfloat16 and is_first()
            else None
        )
        trained, weights = whole_policy(trainer, args)
        if not is_first():
            return
        trained.config.use_cache = True
        with written_whole(args.output) as temporary:
            trained.save_pretrained(temporary, state_dict=weights)
            tokenizer.save_pretrained(temporary)
            (temporary / "README.md").write_text(
                card(args, len(pairs), trainer.state.global_step, history[-1]), encoding="utf-8"
            )
        write_text(args.log, "".join(json.dumps(line) + "\n" for line in history))
        tokens = sum(
            len(p["prompt_token_ids"]) * 2
            + len(p["chosen_token_ids"])
            + len(p["rejected_token_ids"])
            for p in pairs
        )
        facts |= {
            "pairs": len(pairs),
            "steps": trainer.state.global_step,
            "tokens_an_epoch": tokens,
            "computed_in": str(dtype),
            "step_0": getattr(trainer, "step_0", None),
            "final": history[-1],
        }
        facts |= {"lora_update_left_in_bfloat16": kept} if kept is not None else {}
        shutil.rmtree(work)


def card(args: argparse.Namespace, pairs: int, steps: int, last: dict[str, Any]) -> str:
    """The policy's model card, of what is known when it is trained."""
    method = {
        key: value for key, value in vars(args).items() if key in METHOD and value is not None
    }
    figures = {
        key: last[key]
        for key in ("loss", "log_ratio_chosen", "log_ratio_rejected", "reward_accuracy")
        if key in last
    }
    other = f"The loss `{args.loss}`, whose paper src/sppo/training/losses.py names, in the workflow of SPPO"
    words = (
        "Self-play preference optimisation" if args.loss.startswith("sppo") else other
    ) + ", https://arxiv.org/abs/2405.00675"
    if args.loss != "simpo":
        words += f"; log-ratios refer to {'the' if args.reference == args.current else 'an older policy than the'} policy it was trained from"
    return model_card(
        args.policy,
        f"A policy of iterative preference optimisation, loss {args.loss}",
        {
            "Data": data_of(args.pairs),
            "Method": f"{words}.\n\n" + table(method | {"pairs": pairs, "steps": steps}),
            "Figures of the last step": table(figures),
        },
        tag=args.loss,
    )


def whole_policy(trainer: Any, args: argparse.Namespace) -> tuple[Any, dict | None]:
    """The trained model, LoRA merged into it, and its weights where processes hold parts of them: then the first gets all."""
    import torch.distributed

    from sppo.training.trainer import merged

    weights = None
    if args.parallel != "ddp":
        gathered = (
            trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}
        )  # the first one's; tied weights as if they were two
        weights = {
            name: weight
            for name, weight in gathered.items()
            if name not in trainer.model.all_tied_weights_keys
        }
    if (
        torch.distributed.is_initialized()
    ):  # for the others' patience has a limit, and the first one has yet to write
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return merged(trainer.model) if args.lora_rank else trainer.model, weights


def joined(pairs: list[dict], source: Path, path: Path, name: str) -> list[dict]:
    """Pairs, read from `source`, with the log-probabilities of `path` as <name>_chosen and <name>_rejected."""
    by_id = {row["pair_id"]: row for row in read_table(path, "logps")}
    if by_id.keys() != {pair["pair_id"] for pair in pairs}:
        raise UserError(
            f"{path} does not belong to {source}: their pairs differ; delete it and run again"
        )
    return [
        {
            **pair,
            f"{name}_chosen": by_id[pair["pair_id"]]["chosen_logp"],
            f"{name}_rejected": by_id[pair["pair_id"]]["rejected_logp"],
        }
        for pair in pairs
    ]


def against_mixture(pairs: list[dict], share: float) -> list[dict]:
    """Pairs with P-hat against Nash-MD's mixture pi_t^(1 - share) pi_ref^share in place of pi_t.

    Needs every two responses of a prompt; two that are no pair were a tie, or one text.
    """
    prompts: dict[str, list[dict]] = {}
    for pair in pairs:
        prompts.setdefault(pair["prompt_id"], []).append(pair)
    found = {}
    for prompt_id, own in prompts.items():
        ratio = {
            pair[f"{end}_sample_id"]: pair[f"reference_{end}"] - pair[f"current_{end}"]
            for pair in own
            for end in ("chosen", "rejected")
        }
        place = {sample: i for i, sample in enumerate(ratio)}
        P = np.full((len(place), len(place)), 0.5)
        for pair in own:
            w, l = place[pair["chosen_sample_id"]], place[pair["rejected_sample_id"]]
            P[w, l], P[l, w] = pair["p_chosen_beats_rejected"], 1 - pair["p_chosen_beats_rejected"]
        estimates = p_hat_weighted(P, share * np.array(list(ratio.values())))
        found[prompt_id] = {sample: float(estimates[i]) for sample, i in place.items()}
    return [
        pair
        | {
            f"p_hat_{end}": found[pair["prompt_id"]][pair[f"{end}_sample_id"]]
            for end in ("chosen", "rejected")
        }
        for pair in pairs
    ]


def work_folder(args: argparse.Namespace) -> Path:
    """Where checkpoints lie: emptied if it belongs to other inputs, settings or stage version, and
    without those that are damaged."""
    work = args.output.with_name(f".{args.output.name}.work")
    with first_alone() as here:
        if here:
            settings = {
                key: str(value)
                for key, value in vars(args).items()
                if key not in ("output", "log", "report_to")
            }
            inputs = [known_hash(path) for path in inputs_of(args)]
            fingerprint = hashlib.sha256(
                json.dumps([settings, inputs, STAGES["train"]], sort_keys=True).encode()
            ).hexdigest()
            label = work / "made_for.json"
            if made_for(label) != fingerprint:
                remove(work)
            write_json(label, fingerprint)
            remove_damaged(work)
    return work


def made_for(label: Path) -> str | None:
    """The fingerprint that a work folder was made for, None if its label does not say."""
    try:
        return parse_json(label.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


if __name__ == "__main__":
    run(main)
