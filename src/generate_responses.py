"""Sample K responses to each prompt of one shard.

Reads   prompts.parquet, the policy
Writes  responses/{shard}.parquet and its record
Paper   2405.00675, Algorithm 1 line 4 (K = 5, temperature 1.0, top-p 1.0)

Differences from the official code: all K samples are one request. The seed of a sample depends on
(data seed, iteration, prompt, sample); the official code repeats five seeds in every iteration and
shard. BOS is never written twice. Finish reasons and token ids are kept.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sppo.core.artifacts import recorded
from sppo.core.config import DEVICES, MODEL_SOURCE
from sppo.core.errors import run
from sppo.core.flags import add_section
from sppo.core.tables import read_table, write_table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--policy", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--iteration", type=int, required=True)
    parser.add_argument(
        "--shard",
        type=int,
        default=0,
        help="number of this shard, from 0; there are --shards of them",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=DEVICES, default="auto")
    add_section(parser, "responses")
    add_section(parser, "policy", skip=MODEL_SOURCE)
    args = parser.parse_args()

    prompts = read_table(args.prompts, "prompts")[args.shard :: args.shards]
    # Imported late because loading PyTorch takes seconds.
    from sppo.policies.chats import template_hash
    from sppo.policies.devices import start_torch
    from sppo.policies.engines import EngineOptions, open_engine
    from sppo.policies.generation import Sampling, summary

    start_torch(args.tensor_parallel or 1)
    with recorded("generate", args.output, [args.prompts, args.policy], vars(args)) as facts:
        engine = open_engine(args.policy, EngineOptions.of(vars(args)))
        sampling = Sampling(args.samples, args.temperature, args.top_p, args.max_new_tokens)
        rows = engine.generate(prompts, sampling, args.seed, f"iter{args.iteration}")
        write_table(args.output, rows, "responses")
        facts |= summary(rows) | {
            "computed_in": str(engine.dtype),
            "chat_template_sha256": template_hash(engine.tokenizer),
        }


if __name__ == "__main__":
    run(main)
