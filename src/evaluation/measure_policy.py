"""Measure what a training did: realised log-ratios against targets, and the distance to the base.

Reads   pairs.parquet and logps/current/*.parquet of an iteration, the policy that it trained, the
        prompts of the iteration, the base policy
Writes  measurements.json and its record
Paper   2405.00675, eq. (4.4): the log-ratio of each response should be eta (P-hat - 1/2)

The distance is KL(policy || base) of whole responses in nats, estimated from one new response to
each prompt, sampled with temperature 1 and without top_p. So it has no bias but noise, whose
standard error is given.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

import _path  # noqa: F401
from sppo.core.artifacts import recorded, write_json
from sppo.core.config import DEVICES, ENGINE_KEYS, MODEL_SOURCE
from sppo.core.errors import UserError, run
from sppo.core.flags import add_section
from sppo.core.tables import read_table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument(
        "--current", type=Path, nargs="+", required=True, help="logps/current/*.parquet"
    )
    parser.add_argument("--policy", type=Path, required=True, help="the trained policy")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--base", type=Path, required=True, help="the base policy")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--iteration", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=DEVICES, default="auto")
    of_training = ("micro_batch_size", "micro_batch_tokens", "precision", "lora_rank", "beta")
    add_section(parser, "train", only=of_training)
    keys = [key for key in ENGINE_KEYS if key != "precision"]  # the training's
    add_section(parser, "responses", only=(*keys, "max_new_tokens"))
    add_section(parser, "policy", skip=MODEL_SOURCE)
    args = parser.parse_args()

    pairs = read_table(args.pairs, "pairs")
    before = {row["pair_id"]: row for file in args.current for row in read_table(file, "logps")}
    if before.keys() != {pair["pair_id"] for pair in pairs}:
        raise UserError(
            f"{args.current[0].parent} does not belong to {args.pairs}; delete it and run again"
        )
    prompts = read_table(args.prompts, "prompts")
    from sppo.policies.devices import compute_dtype, pick_device, start_torch
    from sppo.policies.engines import EngineOptions, generated
    from sppo.policies.generation import Sampling
    from sppo.policies.models import load_frozen_policy
    from sppo.training.logps import frozen_logps, frozen_response_logps

    start_torch(args.tensor_parallel or 1)
    device = pick_device(args.device)
    dtype = compute_dtype(args.precision, device)
    inputs = [args.pairs, *args.current, args.policy, args.prompts, args.base]
    with recorded("measure", args.output, inputs, vars(args)) as facts:
        options = EngineOptions.of(vars(args))
        sampling = Sampling(1, 1.0, 1.0, args.max_new_tokens)
        purpose = f"measure{args.iteration}"
        responses = generated(args.policy, options, prompts, sampling, args.seed, purpose)

        size, tokens = args.micro_batch_size, args.micro_batch_tokens
        scored = (dtype, device, 2 * size, tokens)  # of responses; a pair has two
        model = load_frozen_policy(args.policy, args.lora_rank, dtype, device, args.attention)
        after = frozen_logps(model, pairs, dtype, device, size, tokens)
        own = frozen_response_logps(model, responses, *scored)
        del model
        model = load_frozen_policy(args.base, args.lora_rank, dtype, device, args.attention)
        of_base = frozen_response_logps(model, responses, *scored)
        ratios = [
            {end: row[f"{end}_logp"] - before[row["pair_id"]][f"{end}_logp"] for end in ENDS}
            for row in after
        ]
        found = realised(pairs, ratios, 1 / args.beta) | distance(np.subtract(own, of_base))
        write_json(args.output, found)
        facts |= {"pairs": len(pairs), "responses": len(responses), "computed_in": str(dtype)}
    print(", ".join(f"{key} {value}" for key, value in found.items()))


ENDS = ("chosen", "rejected")


def realised(
    pairs: list[dict[str, Any]], ratios: list[dict[str, float]], eta: float
) -> dict[str, Any]:
    """What the training made of the log-ratios log pi/pi_t of the pairs, in nats.

    The regression is over winners and losers together: log-ratio = slope eta (P-hat - 1/2) +
    intercept. SPPO wants slope 1, intercept 0 and r_squared 1. For another method, slope eta is
    the eta at which SPPO would want the same log-ratios.
    """
    chosen, rejected = (np.array([ratio[end] for ratio in ratios]) for end in ENDS)
    p_hats = [np.array([pair[f"p_hat_{end}"] for pair in pairs]) for end in ENDS]
    targets = eta * (np.concatenate(p_hats) - 0.5)
    values = np.concatenate([chosen, rejected])
    slope, intercept = np.polyfit(targets, values, 1) if np.ptp(targets) > 0 else (np.nan, np.nan)
    correlation = np.corrcoef(targets, values)[0, 1] if np.ptp(targets) and np.ptp(values) else 0.0
    return {
        "pairs": len(pairs),
        "eta": eta,
        "slope": float(slope),
        "intercept": float(intercept),
        "r_squared": float(correlation**2),
        "log_ratio_chosen": float(chosen.mean()),
        "log_ratio_rejected": float(rejected.mean()),
        "winners_raised": float((chosen > 0).mean()),
        "order_right": float((chosen > rejected).mean()),
    }


def distance(log_ratios: np.ndarray) -> dict[str, float]:
    """KL(policy || base) and its standard error from log pi/pi_0 of samples of the policy, (N,)."""
    return {
        "kl": float(log_ratios.mean()),
        "kl_standard_error": float(log_ratios.std(ddof=1) / np.sqrt(len(log_ratios))),
    }


if __name__ == "__main__":
    run(main)
