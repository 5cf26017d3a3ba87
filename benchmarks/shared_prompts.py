"""Training time if both responses of a pair share their prompt, by lengths, as a table.

    .venv/bin/python benchmarks/shared_prompts.py --policy results/iter0/policy

Forward and backward pass of 4 pairs of random tokens on a CPU, with LoRA of rank 16. Tokens and
time are shares of those of separate sequences. The time is the shortest of --repeats. Run it on an
idle machine. `SHARING_PAYS` in src/sppo/training/lengths.py rests on it.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "src"))

import sppo  # noqa: F401  (sets OMP_WAIT_POLICY before torch is imported)
import torch

from sppo.policies.devices import compute_dtype, start_torch, weights_dtype
from sppo.policies.models import load_policy
from sppo.training.batches import (
    choose_layout,
    collate_shared,
    pair_batch,
)
from sppo.training.logps import forward_precision, response_logps
from sppo.training.trainer import with_lora

LENGTHS = ((50, 32), (50, 64), (50, 128), (200, 128), (400, 128), (200, 256), (600, 512))
PAIRS = 4


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", type=Path, required=True, help="folder of the policy")
    parser.add_argument("--precision", choices=["auto", "bfloat16", "float32"], default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    start_torch()
    dtype = compute_dtype(args.precision, "cpu")
    model = load_policy(args.policy, weights_dtype(16, dtype), "cpu")
    choose_layout(model, "cpu")  # the attention of scoring and training
    model = with_lora(model, {"lora_rank": 16, "lora_alpha": 32}, seed=0).train()
    print(f"{dtype}\n prompt response  tokens  time")
    for prompt, response in LENGTHS:
        pairs = random_pairs(prompt, response)
        columns = [
            [pair[f"{name}_token_ids"] for pair in pairs]
            for name in ("prompt", "chosen", "rejected")
        ]
        separate = shortest(model, pair_batch(pairs, "padded"), dtype, args.repeats)
        shared = shortest(model, collate_shared(*columns), dtype, args.repeats)
        tokens = (prompt + 2 * response) / (2 * (prompt + response))
        print(f"{prompt:7} {response:8} {tokens:7.2f} {shared / separate:5.2f}", flush=True)


def random_pairs(prompt: int, response: int) -> list[dict[str, Any]]:
    draw = random.Random(0)

    def ids(length: int) -> list[int]:
        return [draw.randrange(1000) for _ in range(length)]

    return [
        {
            "prompt_token_ids": ids(prompt),
            "chosen_token_ids": ids(response),
            "rejected_token_ids": ids(response),
        }
        for _ in range(PAIRS)
    ]


def shortest(model: Any, batch: dict[str, Any], dtype: torch.dtype, repeats: int) -> float:
    """The shortest seconds of a forward and a backward pass."""
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        with forward_precision("cpu", dtype):
            logps = response_logps(model, batch)
        logps.sum().backward()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


if __name__ == "__main__":
    main()
