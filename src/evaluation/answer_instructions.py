"""Answer the evaluation instructions with a policy.

Reads   evaluation instructions in alpaca-eval's form, the policy
Writes  outputs in alpaca-eval's form (with prompt_id, sample_id, finish_reason, tokens), `--samples` to an
        instruction, and a record
Departs from the paper: decoding is a configuration key; the published rows use temperature 0.7 or 0.9.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import _path  # noqa: F401
from sppo.core.artifacts import recorded, write_json
from sppo.core.errors import UserError, run
from sppo.core.flags import add_engine
from sppo.policies.prompts import BEST_GRADE, read_instructions, with_goal


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--instructions", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=None, help="only the first so many")
    parser.add_argument("--policy", type=Path, required=True)
    parser.add_argument("--generator", required=True, help="name of the policy in the outputs")
    parser.add_argument(
        "--noise", required=True, help="name of the noise; policies that share it share their noise"
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=1, help="answers to each instruction")
    parser.add_argument(
        "--best-grade",
        action="store_true",
        help="a reward-conditioned policy is asked for its best",
    )
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--max-new-tokens", type=int, default=2048)
    add_engine(parser)
    args = parser.parse_args()

    instructions = read_instructions(args.instructions, args.limit)
    from sppo.policies.engines import EngineOptions, open_engine
    from sppo.policies.generation import Sampling, summary
    from sppo.policies.models import (
        check_no_control_tokens,
        context_length,
        control_tokens,
        prompt_token_ids,
        start_torch,
        template_hash,
    )

    start_torch(args.tensor_parallel or 1)
    with recorded("answer", args.output, [args.instructions, args.policy], vars(args)) as facts:
        engine = open_engine(args.policy, EngineOptions.of(vars(args)))
        context, controls = context_length(args.policy), control_tokens(engine.tokenizer)
        prompts = []
        for number, row in enumerate(instructions):
            messages = [{"role": "user", "content": row["instruction"]}]
            name = f"instruction {number} of {args.instructions}"
            check_no_control_tokens(controls, row["instruction"], name)
            asked = with_goal(messages, BEST_GRADE) if args.best_grade else messages
            ids = prompt_token_ids(engine.tokenizer, asked, name)
            if context and len(ids) + args.max_new_tokens > context:
                raise UserError(
                    f"{name} has {len(ids)} tokens and does not fit the policy's "
                    f"context of {context} with alpaca_eval.max_new_tokens = {args.max_new_tokens}; lower that"
                )
            prompts.append(
                {"prompt_id": str(row.get("prompt_id", number)), "prompt_token_ids": ids}
            )
        rows = engine.generate(
            prompts,
            Sampling(args.samples, args.temperature, args.top_p, args.max_new_tokens),
            args.seed,
            args.noise,
        )
        answered = [instruction for instruction in instructions for _ in range(args.samples)]
        write_json(
            args.output,
            [
                {
                    "dataset": instruction.get("dataset", ""),
                    "instruction": instruction["instruction"],
                    "output": row["text"],
                    "generator": args.generator,
                    "prompt_id": row["prompt_id"],
                    "sample_id": row["sample_id"],
                    "finish_reason": row["finish_reason"],
                    "tokens": len(row["token_ids"]),
                }
                for instruction, row in zip(answered, rows, strict=True)
            ],
        )
        facts |= summary(rows) | {
            "computed_in": str(engine.dtype),
            "chat_template_sha256": template_hash(engine.tokenizer),
        }


if __name__ == "__main__":
    run(main)
