"""Answer MT-Bench's questions, which have two turns, with a policy.

Reads   question.jsonl of a folder in FastChat's format, the policy
Writes  answers in FastChat's format (.jsonl), one line for each question, and a record
Paper   MT-Bench, 2306.05685; temperatures by category and 1024 tokens as in FastChat 0.2.36
Departs from FastChat: the prompt uses the policy's own chat template; answer_id is made from the
        model and the question, and there is no time stamp, so that equal runs write equal files.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import _path  # noqa: F401
from sppo.core.artifacts import recorded, write_json_lines
from sppo.core.errors import run
from sppo.core.flags import add_engine
from sppo.evaluation.mt_bench import TEMPERATURES, read_questions


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with question.jsonl")
    parser.add_argument("--policy", type=Path, required=True)
    parser.add_argument("--model-id", required=True, help="name of the policy in the answers")
    parser.add_argument(
        "--noise",
        required=True,
        help="name of the random noise; policies with the same name sample with the same noise",
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--highest-reward",
        action="store_true",
        help="ask a reward-conditioned policy for its best answer",
    )
    parser.add_argument("--max-new-tokens", type=int, default=1024)
    add_engine(parser)
    args = parser.parse_args()

    questions = read_questions(args.data)
    from sppo.policies.chats import (
        check_no_control_tokens,
        context_length,
        control_tokens,
        template_hash,
    )
    from sppo.policies.devices import start_torch
    from sppo.policies.engines import EngineOptions, open_engine
    from sppo.policies.generation import summary

    start_torch(args.tensor_parallel or 1)
    with recorded(
        "answer", args.output, [args.data / "question.jsonl", args.policy], vars(args)
    ) as facts:
        engine = open_engine(args.policy, EngineOptions.of(vars(args)))
        controls = control_tokens(engine.tokenizer)
        for question in questions:
            for text in question["turns"]:
                name = f"question {question['question_id']} of {args.data}"
                check_no_control_tokens(controls, text, name)
        context = context_length(args.policy)
        chats: dict[str, list[dict[str, str]]] = {
            str(question["question_id"]): [] for question in questions
        }
        rows = []
        for turn in (1, 2):
            for question in questions:
                chats[str(question["question_id"])].append(
                    {"role": "user", "content": question["turns"][turn - 1]}
                )
            noise = f"{args.noise}/turn{turn}"
            rows += answer_turn(engine, questions, chats, args, noise, context)
        write_json_lines(
            args.output, [answer_record(question, chats, args.model_id) for question in questions]
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
    """Add the policy's answer to every chat; return the engine's rows.

    chats: messages by question_id. noise: name of the random noise of this turn. context: the
    policy's context length in tokens, None if it is unknown. UserError if a chat and its answer do
    not fit the context.
    """
    from sppo.policies.chats import (
        HIGHEST_REWARD,
        check_fits,
        control_tokens,
        prompt_token_ids,
        with_target_reward,
    )
    from sppo.policies.generation import Sampling

    controls = control_tokens(engine.tokenizer)
    rows = []
    for temperature in sorted(set(TEMPERATURES.values())):
        prompts = []
        for question in questions:
            if TEMPERATURES[question["category"]] != temperature:
                continue
            name = f"question {question['question_id']} of {args.data}"
            chat = with_safe_answers(chats[str(question["question_id"])], controls)
            if args.highest_reward:
                chat = with_target_reward(engine.tokenizer, chat, HIGHEST_REWARD)
            ids = prompt_token_ids(engine.tokenizer, chat, name)
            check_fits(f"{name}, with the turns before it,", len(ids), args.max_new_tokens, context)
            prompts.append({"prompt_id": str(question["question_id"]), "prompt_token_ids": ids})
        if prompts:
            rows += engine.generate(
                prompts, Sampling(1, temperature, 1.0, args.max_new_tokens), args.seed, noise
            )
    for row in rows:
        chats[row["prompt_id"]].append({"role": "assistant", "content": row["text"]})
    return rows


def with_safe_answers(chat: list[dict[str, str]], controls: Any) -> list[dict[str, str]]:
    """The chat without control tokens in the policy's answers.

    Otherwise a control token that an answer spells out would be read as the end of its turn.
    """
    from sppo.policies.chats import without_control_tokens

    safe = []
    for message in chat:
        if message["role"] != "user":
            message = message | {"content": without_control_tokens(controls, message["content"])}
        safe.append(message)
    return safe


def answer_record(
    question: dict[str, Any], chats: dict[str, list[dict[str, str]]], model_id: str
) -> dict[str, Any]:
    """FastChat's record of one answer."""
    question_id = question["question_id"]
    answers = [
        message["content"] for message in chats[str(question_id)] if message["role"] == "assistant"
    ]
    return {
        "question_id": question_id,
        "answer_id": f"{model_id}/{question_id}",
        "model_id": model_id,
        "choices": [{"index": 0, "turns": answers}],
    }


if __name__ == "__main__":
    run(main)
