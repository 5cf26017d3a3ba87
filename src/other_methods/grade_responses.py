"""Grade the responses to each prompt of one shard, and its gold response, from 0 to 6.

Reads   prompts.parquet, responses/{shard}.parquet, gold responses (JSONL) if there are any; the
        preference model, or a judge behind an OpenAI-compatible server
Writes  grades/{shard}.parquet (sample_id -1 is the gold response) and its record, which counts
        loops and responses without a grade; finished judgments in grades/.judgments/, so that no
        judgment is asked for twice
Paper   2404.03715, Algorithm 2: GPT-4-Turbo adds up six points; a response that repeats itself is a
        negative example, regardless of its grade
Departs from the paper: the wording of the six points is not from the paper
        (src/sppo/preferences/grades.py), and a response with a loop has the grade 0.
        `--judge preference`, the default, uses no rubric. Its grade is 6 P-hat(y beats the pool),
        where the pool is the prompt's K responses and its gold response. This grade is relative to
        the pool, but the paper's grade is absolute. The mean over a pool is always 3, however good
        its responses are, and the highest possible grade in a pool of n is 6 - 3/n.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import _path  # noqa: F401
from sppo.core.artifacts import recorded
from sppo.core.chat_client import Client, concurrently
from sppo.core.config import DEVICES, OF_CHATS
from sppo.core.errors import run
from sppo.core.flags import add_section
from sppo.core.tables import read_responses, write_table
from sppo.evaluation.judges import GRADES
from sppo.policies.prompts import read_gold
from sppo.preferences.base import compare, load_preference_model, model_files
from sppo.preferences.estimates import p_hat, win_probabilities
from sppo.preferences.grades import GOLD, HIGHEST, loops, read_score, rubric
from sppo.preferences.prompt_reader import PromptReader

LONGEST = 1024  # maximum number of tokens of a judgment
Pools = dict[str, dict[int, str]]  # texts by prompt_id and sample_id
Grades = dict[tuple[str, int], float | None]  # by (prompt_id, sample_id)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--responses", type=Path, required=True)
    parser.add_argument(
        "--gold",
        type=Path,
        nargs="?",
        help="JSONL of gold responses, with id (of the prompt) and response",
    )
    parser.add_argument(
        "--policy", type=Path, help="policy whose chat template --source chat_template uses"
    )
    parser.add_argument(
        "--ranker-base", type=Path, nargs="?", help="folder of the adapter's base model"
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--device",
        choices=DEVICES,
        default="auto",
        help="where the preference model runs",
    )
    add_section(parser, "preference", skip=("revision", "implicit"))
    add_section(parser, "pairs", only=("probability", "logit_scale"))
    add_section(parser, "grades")
    add_section(parser, "policy", only=OF_CHATS)
    args = parser.parse_args()

    GRADES.check(vars(args))
    responses, prompts = read_responses(args.responses, args.prompts)
    messages = {prompt_id: prompt["messages"] for prompt_id, prompt in prompts.items()}
    pools: Pools = defaultdict(dict)
    for row in responses:
        pools[row["prompt_id"]][row["sample_id"]] = row["text"]
    gold = read_gold(args.gold) if args.gold else {}
    for prompt_id in pools.keys() & gold.keys():
        pools[prompt_id][GOLD] = gold[prompt_id]
    looping = {
        (prompt_id, sample_id)
        for prompt_id, pool in pools.items()
        for sample_id, text in pool.items()
        if loops(text)
    }
    inputs = [args.prompts, args.responses]
    if args.gold:
        inputs.append(args.gold)
    if args.judge == "preference":
        inputs += model_files(args.model, args.ranker_base, backend=args.backend)
    with recorded("grade", args.output, inputs, vars(args)) as facts:
        if args.judge == "preference":
            grades, grader = by_preference(pools, messages, args)
        else:
            grades, grader = by_judge(pools, messages, looping, args)
        grades |= dict.fromkeys(looping, 0.0)
        rows = [
            {"prompt_id": prompt_id, "sample_id": sample_id, "grade": grades[prompt_id, sample_id]}
            for prompt_id, pool in pools.items()
            for sample_id in sorted(pool)
            if grades[prompt_id, sample_id] is not None
        ]
        write_table(args.output, rows, "grades")
        facts |= {
            "prompts": len(pools),
            "grader": grader,
            "graded": len(rows),
            "ungraded": len(grades) - len(rows),
            "looping": len(looping),
            "gold": sum(GOLD in pool for pool in pools.values()),
            "mean_grade": mean([row for row in rows if row["sample_id"] != GOLD]),
            "mean_grade_gold": mean([row for row in rows if row["sample_id"] == GOLD]),
        }


def by_preference(
    pools: Pools, messages: dict[str, list[dict[str, Any]]], args: argparse.Namespace
) -> tuple[Grades, str]:
    """6 P-hat of each text within its pool, and the preference model's name."""
    model = load_preference_model(vars(args), args.ranker_base, args.device)
    reader = PromptReader(args.source, args.policy, args.chat_template_kwargs, args.template_date)
    groups = {
        prompt_id: reader.group(messages[prompt_id], list(pool.values()))
        for prompt_id, pool in pools.items()
    }
    grades: Grades = {}
    for prompt_id, logits in compare(model, groups).items():
        estimates = p_hat(win_probabilities(logits, args.probability, args.logit_scale))
        for sample_id, estimate in zip(pools[prompt_id], estimates, strict=True):
            grades[prompt_id, sample_id] = HIGHEST * float(estimate)
    return grades, model.name


def by_judge(
    pools: Pools,
    messages: dict[str, list[dict[str, Any]]],
    looping: set[tuple[str, int]],
    args: argparse.Namespace,
) -> tuple[Grades, str]:
    """The judge's score of each text without a loop, and the judge's name.

    The score is None if the judge's answer contains no score. looping: texts with a loop, by
    (prompt_id, sample_id).
    """
    name = args.judge_model if args.judge == "openai" else args.judge
    cache = args.output.parent / ".judgments" / f"{args.output.stem}.jsonl"
    client = Client(name, args.judge_base_url, cache, lambda answer: read_score(answer) is not None)
    asked = [
        (prompt_id, sample_id)
        for prompt_id, pool in pools.items()
        for sample_id in pool
        if (prompt_id, sample_id) not in looping
    ]

    def grade(key: tuple[str, int]) -> float | None:
        prompt_id, sample_id = key
        question = rubric(messages[prompt_id], pools[prompt_id][sample_id])
        return read_score(client.ask(question, temperature=0, max_tokens=LONGEST))

    grades = dict(zip(asked, concurrently(grade, asked, "graded responses"), strict=True))
    client.check_unreadable(len(asked))
    return grades, name


def mean(rows: list[dict[str, Any]]) -> float | None:
    """The mean grade; None if there are no rows."""
    return sum(row["grade"] for row in rows) / len(rows) if rows else None


if __name__ == "__main__":
    run(main)
