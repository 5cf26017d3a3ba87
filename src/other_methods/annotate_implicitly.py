"""Compare the K responses to each prompt of one shard by the policy's own implicit reward.

Reads   prompts.parquet, responses/{shard}.parquet, the policy pi_t, the iterate before it
Writes  preferences/{shard}.parquet (K x K logits a prompt) and its record
Paper   DICE, 2406.09760: the reward r(y) = beta log(pi_t(y|x) / pi_t-1(y|x)) that DPO has given pi_t
The logit that y_i beats y_j is r(y_i) - r(y_j), so that what reads preferences needs to know nothing of this.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import _path  # noqa: F401
from sppo.core.artifacts import recorded
from sppo.core.errors import UserError, run
from sppo.core.tables import read_table, write_table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--responses", type=Path, required=True)
    parser.add_argument(
        "--policy", type=Path, required=True, help="pi_t, which wrote the responses"
    )
    parser.add_argument(
        "--before", type=Path, required=True, help="pi_t-1, which pi_t was trained from"
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--beta", type=float, required=True, help="of the training that gave pi_t")
    parser.add_argument(
        "--micro-batch-size",
        type=int,
        default=8,
        help="pairs in one forward pass: twice as many responses",
    )
    parser.add_argument("--precision", choices=["auto", "bfloat16", "float32"], default="auto")
    parser.add_argument(
        "--lora-rank",
        type=int,
        default=0,
        help="the same as in training: LoRA keeps the weights in that precision",
    )
    parser.add_argument("--device", choices=["auto", "cpu", "gpu"], default="auto")
    parser.add_argument("--attention", default=None)
    args = parser.parse_args()

    known = {row["prompt_id"] for row in read_table(args.prompts, "prompts")}
    responses = read_table(args.responses, "responses")
    if foreign := next(
        (row["prompt_id"] for row in responses if row["prompt_id"] not in known), None
    ):
        raise UserError(
            f"{args.responses} answers prompt {foreign}, which {args.prompts} lacks; delete it and run again"
        )
    from sppo.policies.models import (
        compute_dtype,
        load_policy,
        pick_device,
        start_torch,
        weights_dtype,
    )
    from sppo.training.logps import frozen_response_logps

    start_torch()
    device = pick_device(args.device)
    dtype = compute_dtype(args.precision, device)
    with recorded(
        "annotate",
        args.output,
        [args.prompts, args.responses, args.policy, args.before],
        vars(args),
    ) as facts:
        logps = []
        for folder in (
            args.policy,
            args.before,
        ):  # one at a time: they need not fit beside each other
            model = load_policy(
                folder, weights_dtype(args.lora_rank, dtype), device, args.attention
            )
            logps.append(
                np.array(
                    frozen_response_logps(
                        model, responses, dtype, device, 2 * args.micro_batch_size
                    )
                )
            )
            del model
        of_prompt: dict[str, list[tuple[int, float]]] = {}
        for row, reward in zip(responses, args.beta * (logps[0] - logps[1]), strict=True):
            of_prompt.setdefault(row["prompt_id"], []).append((row["sample_id"], float(reward)))
        rows = []
        for prompt_id, rewards in of_prompt.items():
            r = np.array([reward for _, reward in rewards])
            rows.append(
                {
                    "prompt_id": prompt_id,
                    "sample_ids": [sample for sample, _ in rewards],
                    "logits": (r[:, None] - r).tolist(),
                }
            )
        write_table(args.output, rows, "preferences")
        facts |= {
            "prompts": len(rows),
            "preference_model": f"{args.beta:g} log {args.policy}/{args.before}",
            "computed_in": str(dtype),
            "mean_reward": float(np.mean(args.beta * (logps[0] - logps[1]))) if responses else None,
        }


if __name__ == "__main__":
    run(main)
