"""Answer MT-Bench's questions of two turns with a policy.

Reads   question.jsonl of a folder in FastChat's form, the policy
Writes  answers in FastChat's form (.jsonl), one record a question, and a record
Paper   MT-Bench, 2306.05685; temperatures by category and 1024 tokens as in FastChat 0.2.36
Departs from FastChat: the prompt is the policy's own chat template; answer_id is made from model and question, and
        there is no time stamp, so that equal runs give equal files.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import _path  # noqa: F401
from sppo.core.artifacts import recorded, write_text
from sppo.core.errors import UserError, run
from sppo.core.flags import add_engine
from sppo.evaluation.mt_bench import TEMPERATURES, read_questions
from sppo.policies.prompts import BEST_GRADE, with_goal


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with question.jsonl")
    parser.add_argument("--policy", type=Path, required=True)
    parser.add_argument("--model-id", required=True, help="name of the policy in the answers")
    parser.add_argument(
        "--noise", required=True, help="name of the noise; policies that share it share their noise"
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--best-grade",
        action="store_true",
        help="a reward-conditioned policy is asked for its best",
    )
    parser.add_argument("--max-new-tokens", type=int, default=1024)
    add_engine(parser)
    args = parser.parse_args()

    questions = read_questions(args.data)
    from sppo.policies.engines import EngineOptions, open_engine
    from sppo.policies.generation import summary
    from sppo.policies.models import (
        check_no_control_tokens,
        context_length,
        control_tokens,
        start_torch,
        template_hash,
    )

    start_torch(args.tensor_parallel or 1)
    with recorded(
        "answer", args.output, [args.data / "question.jsonl", args.policy], vars(args)
    ) as facts:
        engine = open_engine(args.policy, EngineOptions.of(vars(args)))
        controls = control_tokens(engine.tokenizer)
        for question in questions:
            for turn in question["turns"]:
                name = f"question {question['question_id']} of {args.data}"
                check_no_control_tokens(controls, turn, name)
        chats: dict[str, list[dict[str, str]]] = {
            str(question["question_id"]): [] for question in questions
        }
        rows = []
        for turn in (1, 2):
            for question in questions:
                chats[str(question["question_id"])].append(
                    {"role": "user", "content": question["turns"][turn - 1]}
                )
            rows += answer_turn(
                engine,
                questions,
                chats,
                args,
                f"{args.noise}/turn{turn}",
                context_length(args.policy),
            )
        write_text(
            args.output,
            "".join(
                json.dumps(answer_record(question, chats, args.model_id), ensure_ascii=False) + "\n"
                for question in questions
            ),
        )
        facts |= summary(rows) | {
            "computed_in": str(engine.dtype),
            "chat_template_sha256": template_hash(engine.tokenizer),
        }


def answer_turn(
    engine: Any,
    questions: list[dict[str, Any]],
    chats: dict[str, list[dict[str, str]]],
    args: argparse.Namespace,
    noise: str,
    context: int | None,
) -> list[dict[str, Any]]:
    """Add the policy's answer to every chat; returns the engine's rows."""
    from sppo.policies.generation import Sampling
    from sppo.policies.models import control_tokens, prompt_token_ids, without_control_tokens

    controls = control_tokens(engine.tokenizer)
    rows = []
    for temperature in sorted(set(TEMPERATURES.values())):
        prompts = []
        for question in questions:
            if TEMPERATURES[question["category"]] != temperature:
                continue
            chat = chats[str(question["question_id"])]
            # What the policy said must not be read as the end of its turn, whatever it spells.
            chat = [
                message
                if message["role"] == "user"
                else message | {"content": without_control_tokens(controls, message["content"])}
                for message in chat
            ]
            asked = with_goal(chat, BEST_GRADE) if args.best_grade else chat
            ids = prompt_token_ids(
                engine.tokenizer, asked, f"question {question['question_id']} of {args.data}"
            )
            if context and len(ids) + args.max_new_tokens > context:
                raise UserError(
                    f"question {question['question_id']} of {args.data} has {len(ids)} tokens with what came before and does not fit "
                    f"the policy's context of {context} with mt_bench.max_new_tokens = {args.max_new_tokens}; lower that"
                )
            prompts.append({"prompt_id": str(question["question_id"]), "prompt_token_ids": ids})
        if prompts:
            rows += engine.generate(
                prompts, Sampling(1, temperature, 1.0, args.max_new_tokens), args.seed, noise
            )
    for row in rows:
        chats[row["prompt_id"]].append({"role": "assistant", "content": row["text"]})
    return rows


def answer_record(
    question: dict[str, Any], chats: dict[str, list[dict[str, str]]], model_id: str
) -> dict[str, Any]:
    """FastChat's record of one answer."""
    number = question["question_id"]
    spoken = [
        message["content"] for message in chats[str(number)] if message["role"] == "assistant"
    ]
    return {
        "question_id": number,
        "answer_id": f"{model_id}/{number}",
        "model_id": model_id,
        "choices": [{"index": 0, "turns": spoken}],
    }


if __name__ == "__main__":
    run(main)
