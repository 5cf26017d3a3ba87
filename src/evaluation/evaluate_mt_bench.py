"""MT-Bench scores of a policy.

Reads   answers in FastChat's format, the folder with question.jsonl, judge_prompts.jsonl and
        reference_answer*.jsonl; for an embedded judge also the base policy's answers
Writes  mt_bench.json: the average (1 to 10), by turn and by category, and the number of failures;
        the judgments (.jsonl); their records
Paper   MT-Bench, 2306.05685; 2405.00675 reports it with GPT-4 as judge
Departs from the paper by default: the questions are this repository's own, and a grade is the
        embedded judge's probability that the answer beats the base's answer, mapped to the scale 1
        to 10 (5.5 is the level of the base). `comparable_with_published` says whether the scores
        are comparable with published ones.
"""

from __future__ import annotations

import argparse
from importlib import metadata
from pathlib import Path

import _path  # noqa: F401
from sppo.core.artifacts import file_hash, recorded, write_json, write_json_lines
from sppo.core.chat_client import Client
from sppo.core.config import DEVICES
from sppo.core.errors import UserError, run
from sppo.evaluation.judges import MT_BENCH
from sppo.evaluation.mt_bench import (
    OFFICIAL,
    grade_by_api,
    grade_locally,
    is_official,
    rating_is_readable,
    read_answers,
    read_questions,
    scores,
    win_rates,
)
from sppo.evaluation.results import check_policy
from sppo.preferences.base import load_preference_model, local_kind, model_files, settings_for

VERSIONS = ("fschat", "openai", "torch", "transformers")
PUBLISHED_JUDGES = ("gpt-4", "gpt-4-0613")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="folder with question.jsonl, judge_prompts.jsonl, reference_answer*.jsonl",
    )
    parser.add_argument("--answers", type=Path, required=True, help="the policy's answers")
    parser.add_argument(
        "--reference", type=Path, help="the base policy's answers, for an embedded judge"
    )
    parser.add_argument(
        "--judge",
        required=True,
        help="judge, ranker, an adapter folder, openai, or an OpenAI model such as gpt-6-luna",
    )
    parser.add_argument(
        "--judge-base", type=Path, help="Hugging Face folder of the embedded judge's base"
    )
    parser.add_argument("--judge-model", help="model name for openai")
    parser.add_argument(
        "--judge-base-url",
        help="address of the server for openai, such as http://localhost:8000/v1",
    )
    parser.add_argument(
        "--device",
        choices=DEVICES,
        default="auto",
        help="where the embedded judge runs",
    )
    parser.add_argument("--output", type=Path, required=True, help="mt_bench.json")
    parser.add_argument(
        "--judgments", type=Path, required=True, help="file for the judgments, .jsonl"
    )
    args = parser.parse_args()

    MT_BENCH.check(vars(args))
    questions = read_questions(args.data)
    answers = read_answers(args.answers, questions)
    policy = next(iter(answers.values()))["model_id"]
    check_policy(args.answers, policy)
    possible_inputs = [
        args.answers,
        args.reference,
        args.data,
        args.judge_base,
        *model_files(args.judge, None),
    ]
    inputs = [path for path in possible_inputs if path]
    kind = local_kind(args.judge)
    with recorded("mt_bench", args.output, inputs, vars(args)):
        if kind:
            if not args.reference or (kind.needs_base and not args.judge_base):
                raise UserError(
                    f"judge {args.judge} compares two answers; give the base policy's answers with "
                    "--reference, and the judge's base model with --judge-base"
                )
            settings = settings_for(args.judge, base_url=args.judge_base_url)
            model = load_preference_model(settings, args.judge_base, args.device)
            rows = grade_locally(
                questions, answers, read_answers(args.reference, questions), model, args.judge
            )
            files = kind.files(args.judge)
            details = {
                "adapter": args.judge,
                "adapter_sha256": file_hash(files[0]) if files else None,
                "grade": "1 + 9 P(answer beats the base's answer)",
            }
        else:
            name = args.judge_model if args.judge == "openai" else args.judge
            cache = args.output.parent / ".judgments" / "mt_bench.jsonl"
            client = Client(name, args.judge_base_url, cache, rating_is_readable)
            rows = grade_by_api(questions, answers, args.data, client)
            details = {"model": name, "base_url": args.judge_base_url}
        with recorded("mt_bench", args.judgments, inputs, vars(args)):
            write_json_lines(args.judgments, rows)
        official = {name: is_official(args.data, name) for name in OFFICIAL}
        categories = {row["question_id"]: row["category"] for row in questions}
        write_json(
            args.output,
            scores(rows, categories)
            | {
                "against_base": win_rates(rows) if kind else None,
                "comparable_with_published": all(official.values())
                and args.judge in PUBLISHED_JUDGES,
                "official_questions": official["question.jsonl"],
                "official_references": official["reference_answer_gpt-4.jsonl"],
                "data": str(args.data),
                "judge": args.judge,
                "judge_details": details,
                "policy": policy,
                "versions": {name: metadata.version(name) for name in VERSIONS},
                "judgments": str(args.judgments),
            },
        )


if __name__ == "__main__":
    run(main)
