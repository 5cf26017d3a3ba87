"""Grade the responses to each prompt of one shard, and the gold one, from 0 to 6.

Reads   prompts.parquet, responses/{shard}.parquet, gold responses (JSONL) if there are any; the preference model, or a judge
        behind an OpenAI-compatible server
Writes  grades/{shard}.parquet (sample_id -1 is the gold response) and its record, which counts loops and what has no grade;
        finished judgments in grades/.judgments/, so that no one is asked for twice
Paper   2404.03715, Algorithm 2: GPT-4-Turbo adds up six points; what repeats itself is a negative whatever its grade
Departs from it: the wording of the six points is ours (src/sppo/preferences/grades.py), and a response with a loop is graded 0.
        `--judge preference`, the default, is a stand-in without any rubric: 6 P-hat(y beats the pool of this prompt's K responses and
        its gold one). That is relative to the pool, where the paper's grade is absolute: its mean over a pool is 3 however
        good all are, and no response of a pool of n has more than 6 - 3/n.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import _path  # noqa: F401
from sppo.core.artifacts import recorded
from sppo.core.config import OF_CHATS
from sppo.core.errors import UserError, run
from sppo.core.flags import add_section
from sppo.core.tables import read_table, write_table
from sppo.evaluation.judges import GRADES, Client, concurrently
from sppo.policies.prompts import read_gold
from sppo.preferences.base import compare, load_preference_model, model_files
from sppo.preferences.estimates import p_hat, win_probabilities
from sppo.preferences.grades import GOLD, HIGHEST, loops, read_score, rubric
from sppo.preferences.prompt_reader import PromptReader

LONGEST = 1024  # tokens of a judgment
Pools = dict[str, dict[int, str]]  # texts by prompt and sample_id
Grades = dict[tuple[str, int], float | None]


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
        help="JSONL of gold responses, with id of the prompt and response",
    )
    parser.add_argument(
        "--policy", type=Path, help="its chat template is used by --source chat_template"
    )
    parser.add_argument(
        "--ranker-base", type=Path, nargs="?", help="model folder that an adapter sits on"
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "gpu"],
        default="auto",
        help="where the preference model runs",
    )
    add_section(parser, "preference", skip=("revision", "implicit"))
    add_section(parser, "pairs", only=("probability", "logit_scale"))
    add_section(parser, "grades")
    add_section(parser, "policy", only=OF_CHATS)
    args = parser.parse_args()

    GRADES.check(vars(args))
    messages = {row["prompt_id"]: row["messages"] for row in read_table(args.prompts, "prompts")}
    pools: Pools = defaultdict(dict)
    for row in read_table(args.responses, "responses"):
        if row["prompt_id"] not in messages:
            raise UserError(
                f"{args.responses} answers prompt {row['prompt_id']}, which {args.prompts} lacks; delete it and run again"
            )
        pools[row["prompt_id"]][row["sample_id"]] = row["text"]
    gold = read_gold(args.gold) if args.gold else {}
    for prompt_id in pools.keys() & gold.keys():
        pools[prompt_id][GOLD] = gold[prompt_id]
    looping = {
        (prompt_id, k)
        for prompt_id, pool in pools.items()
        for k, text in pool.items()
        if loops(text)
    }
    inputs = [args.prompts, args.responses, *([args.gold] if args.gold else [])]
    if args.judge == "preference":
        inputs += model_files(args.model, args.ranker_base, backend=args.backend)
    with recorded("grade", args.output, inputs, vars(args)) as facts:
        grades, grader = (
            by_preference(pools, messages, args)
            if args.judge == "preference"
            else by_judge(pools, messages, looping, args)
        )
        grades |= dict.fromkeys(looping, 0.0)
        rows = [
            {"prompt_id": prompt_id, "sample_id": k, "grade": grades[prompt_id, k]}
            for prompt_id, pool in pools.items()
            for k in sorted(pool)
            if grades[prompt_id, k] is not None
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
    pools: Pools, messages: dict[str, list[dict]], args: argparse.Namespace
) -> tuple[Grades, str]:
    """6 P-hat of each text within its pool, and the preference model's name."""
    from sppo.policies.models import pick_device, start_torch

    start_torch()
    model = load_preference_model(vars(args), args.ranker_base, pick_device(args.device))
    reader = PromptReader(args.source, args.policy, args.chat_template_kwargs, args.template_date)
    groups = {
        prompt_id: (reader.text(messages[prompt_id]), list(pool.values()))
        for prompt_id, pool in pools.items()
    }
    grades: Grades = {}
    for prompt_id, logits in compare(model, groups).items():
        estimates = p_hat(win_probabilities(logits, args.probability, args.logit_scale))
        for k, estimate in zip(pools[prompt_id], estimates, strict=True):
            grades[prompt_id, k] = HIGHEST * float(estimate)
    return grades, model.name


def by_judge(
    pools: Pools, messages: dict[str, list[dict]], looping: set, args: argparse.Namespace
) -> tuple[Grades, str]:
    """The judge's score of each text that has no loop, None where its answer has none; and the judge's name."""
    name = args.judge_model if args.judge == "openai" else args.judge
    cache = args.output.parent / ".judgments" / f"{args.output.stem}.jsonl"
    client = Client(name, args.judge_base_url, cache, lambda answer: read_score(answer) is not None)
    asked = [
        (prompt_id, k)
        for prompt_id, pool in pools.items()
        for k in pool
        if (prompt_id, k) not in looping
    ]

    def grade(place: tuple[str, int]) -> float | None:
        prompt_id, k = place
        return read_score(
            client.ask(
                rubric(messages[prompt_id], pools[prompt_id][k]), temperature=0, max_tokens=LONGEST
            )
        )

    grades = dict(zip(asked, concurrently(grade, asked, "graded responses"), strict=True))
    client.check_unreadable(len(asked))
    return grades, name


def mean(rows: list[dict]) -> float | None:
    return sum(row["grade"] for row in rows) / len(rows) if rows else None


if __name__ == "__main__":
    run(main)
