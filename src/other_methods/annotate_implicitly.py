"""Compare the K responses to each prompt of one shard by the policy's own implicit reward.

Reads   prompts.parquet, responses/{shard}.parquet, the policy pi_t, the policy pi_t-1 before it
Writes  preferences/{shard}.parquet (K x K logits for each prompt) and its record
Paper   DICE, 2406.09760: DPO gives pi_t the reward r(y) = beta log(pi_t(y|x) / pi_t-1(y|x))

The logit that y_i beats y_j is r(y_i) - r(y_j). The output has the format of other preferences, so
the later stages need no changes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

import _path  # noqa: F401
from sppo.core.artifacts import recorded
from sppo.core.config import DEVICES
from sppo.core.errors import run
from sppo.core.flags import add_section
from sppo.core.tables import read_responses, write_table


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
        "--before", type=Path, required=True, help="pi_t-1, from which pi_t was trained"
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--beta", type=float, required=True, help="beta of the training that gave pi_t"
    )
    # The same as in training, so that log-ratios begin at 0.
    batches = ("micro_batch_size", "micro_batch_tokens")
    add_section(parser, "train", only=(*batches, "precision", "lora_rank"))
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--attention", default=None)
    args = parser.parse_args()

    responses, _ = read_responses(args.responses, args.prompts)
    from sppo.policies.devices import compute_dtype, pick_device, start_torch
    from sppo.policies.models import load_frozen_policy
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
        # One policy at a time, because both may not fit into memory together.
        for folder in (args.policy, args.before):
            model = load_frozen_policy(folder, args.lora_rank, dtype, device, args.attention)
            of_policy = frozen_response_logps(
                model, responses, dtype, device, 2 * args.micro_batch_size, args.micro_batch_tokens
            )
            logps.append(np.array(of_policy))
            del model
        rewards = args.beta * (logps[0] - logps[1])
        rows = rows_of(responses, rewards)
        write_table(args.output, rows, "preferences")
        facts |= {
            "prompts": len(rows),
            "preference_model": f"{args.beta:g} log {args.policy}/{args.before}",
            "computed_in": str(dtype),
            "mean_reward": float(np.mean(rewards)) if responses else None,
        }


def rows_of(responses: list[dict[str, Any]], rewards: np.ndarray) -> list[dict[str, Any]]:
    """The rows of the table `preferences`, one for each prompt, from the responses' rewards."""
    by_prompt: dict[str, list[tuple[int, float]]] = {}
    for row, reward in zip(responses, rewards, strict=True):
        by_prompt.setdefault(row["prompt_id"], []).append((row["sample_id"], float(reward)))
    rows = []
    for prompt_id, samples in by_prompt.items():
        r = np.array([reward for _, reward in samples])
        rows.append(
            {
                "prompt_id": prompt_id,
                "sample_ids": [sample_id for sample_id, _ in samples],
                "logits": (r[:, None] - r).tolist(),
            }
        )
    return rows


if __name__ == "__main__":
    run(main)
