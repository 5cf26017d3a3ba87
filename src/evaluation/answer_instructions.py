"""Answer the evaluation instructions with a policy.

Reads   evaluation instructions in alpaca-eval's format, the policy
Writes  outputs in alpaca-eval's format (with prompt_id, sample_id, finish_reason, tokens),
        `--samples` for each instruction, and a record
Departs from the paper: the configuration sets the decoding; the published rows use temperature 0.7
or 0.9.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import _path  # noqa: F401
from sppo.core.artifacts import recorded, write_json
from sppo.core.errors import run
from sppo.core.flags import add_engine
from sppo.policies.prompts import read_instructions


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--instructions", type=Path, required=True)
    parser.add_argument(
        "--limit", type=int, default=None, help="number of instructions to read; default: all"
    )
    parser.add_argument("--policy", type=Path, required=True)
    parser.add_argument("--generator", required=True, help="name of the policy in the outputs")
    parser.add_argument(
        "--noise",
        required=True,
        help="name of the random noise; policies with the same name sample with the same noise",
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=1, help="answers to each instruction")
    parser.add_argument(
        "--highest-reward",
        action="store_true",
        help="ask a reward-conditioned policy for its best answer",
    )
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--max-new-tokens", type=int, default=2048)
    add_engine(parser)
    args = parser.parse_args()

    instructions = read_instructions(args.instructions, args.limit)
    from sppo.policies.chats import template_hash
    from sppo.policies.devices import start_torch
    from sppo.policies.engines import EngineOptions, open_engine
    from sppo.policies.generation import Sampling, summary

    start_torch(args.tensor_parallel or 1)
    with recorded("answer", args.output, [args.instructions, args.policy], vars(args)) as facts:
        engine = open_engine(args.policy, EngineOptions.of(vars(args)))
        rows = engine.generate(
            prompts_of(instructions, engine.tokenizer, args),
            Sampling(args.samples, args.temperature, args.top_p, args.max_new_tokens),
            args.seed,
            args.noise,
        )
        # The engine gives all samples of the first instruction, then those of the second, ...
        answered = [instruction for instruction in instructions for _ in range(args.samples)]
        write_json(
            args.output,
            [
                output_of(instruction, row, args.generator)
                for instruction, row in zip(answered, rows, strict=True)
            ],
        )
        facts |= summary(rows) | {
            "computed_in": str(engine.dtype),
            "chat_template_sha256": template_hash(engine.tokenizer),
        }


def prompts_of(
    instructions: list[dict[str, Any]], tokenizer: Any, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """The engine's prompts, one for each instruction.

    UserError if an instruction contains a control token, or does not fit the policy's context
    together with its answer.
    """
    from sppo.policies.chats import (
        HIGHEST_REWARD,
        check_fits,
        check_no_control_tokens,
        context_length,
        control_tokens,
        prompt_token_ids,
        with_target_reward,
    )

    context = context_length(args.policy)
    controls = control_tokens(tokenizer)
    prompts = []
    for number, row in enumerate(instructions):
        name = f"instruction {number} of {args.instructions}"
        check_no_control_tokens(controls, row["instruction"], name)
        messages = [{"role": "user", "content": row["instruction"]}]
        if args.highest_reward:
            messages = with_target_reward(tokenizer, messages, HIGHEST_REWARD)
        ids = prompt_token_ids(tokenizer, messages, name)
        check_fits(name, len(ids), args.max_new_tokens, context)
        prompts.append({"prompt_id": str(row.get("prompt_id", number)), "prompt_token_ids": ids})
    return prompts


def output_of(instruction: dict[str, Any], row: dict[str, Any], generator: str) -> dict[str, Any]:
    """One answer in alpaca-eval's format. row: the engine's row of the answer."""
    return {
        "dataset": instruction.get("dataset", ""),
        "instruction": instruction["instruction"],
        "output": row["text"],
        "generator": generator,
        "prompt_id": row["prompt_id"],
        "sample_id": row["sample_id"],
        "finish_reason": row["finish_reason"],
        "tokens": len(row["token_ids"]),
    }


if __name__ == "__main__":
    run(main)
