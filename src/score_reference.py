"""Compute the log-probabilities of one shard of this iteration's pairs under a frozen policy, once.

Reads   pairs.parquet, the frozen policy (pi_t, or another reference if a method needs one)
Writes  logps/<current or reference>/<shard>.parquet and its record
Paper   2405.00675, the denominator in eq. (4.6)

Difference from the official code: it keeps a second copy of the model in memory and computes these
log-probabilities in every training step.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sppo.core.artifacts import recorded
from sppo.core.config import DEVICES
from sppo.core.errors import UserError, run
from sppo.core.flags import add_section
from sppo.core.tables import read_table, write_table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--policy", type=Path, required=True, help="the frozen policy")
    parser.add_argument("--shard", type=int, default=0)
    parser.add_argument("--shards", type=int, default=1, help="number of shards of the pairs")
    parser.add_argument("--output", type=Path, required=True)
    # The same as in training, so that log-ratios begin at 0.
    add_section(
        parser,
        "train",
        only=("micro_batch_size", "micro_batch_tokens", "precision", "lora_rank"),
    )
    parser.add_argument(
        "--rounded",
        action="store_true",
        help="round all weights, as training with --parallel fsdp2 or hsdp does",
    )
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--attention", default=None)
    args = parser.parse_args()

    pairs = read_table(args.pairs, "pairs")
    if not pairs:
        raise UserError(f"{args.pairs} has no pairs; see in its record why pairs were dropped")
    pairs = pairs[args.shard :: args.shards]
    # Imported late because loading PyTorch takes seconds.
    from sppo.policies.devices import compute_dtype, pick_device, start_torch
    from sppo.policies.models import load_frozen_policy
    from sppo.training.logps import frozen_logps

    start_torch()
    device = pick_device(args.device)
    dtype = compute_dtype(args.precision, device)
    with recorded("reference", args.output, [args.pairs, args.policy], vars(args)) as facts:
        model = load_frozen_policy(
            args.policy, args.lora_rank, dtype, device, args.attention, args.rounded
        )
        rows = frozen_logps(
            model, pairs, dtype, device, args.micro_batch_size, args.micro_batch_tokens
        )
        write_table(args.output, rows, "logps")
        facts |= {"pairs": len(rows), "computed_in": str(dtype)}


if __name__ == "__main__":
    run(main)
