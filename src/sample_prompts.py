"""Draw one iteration's prompts.

Reads   a JSONL file or a hub data set, the evaluations' questions (set aside first), the base
        policy's tokenizer; where each iteration has a source of its own, the prompts of those
        before it
Writes  prompts.parquet and its record
Paper   2405.00675, Algorithm 1 line 3: three disjoint portions, one per iteration.
Departs from the official code: the held-out prompts are disjoint from training; theirs are 500 rows of it. A prompt that stands twice
        is taken once. What an evaluation asks is set aside whatever its case, white space and
        closing mark.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

from sppo.core.artifacts import recorded
from sppo.core.config import OF_CHATS
from sppo.core.errors import UserError, run
from sppo.core.flags import add_section
from sppo.core.tables import read_table, write_table
from sppo.evaluation.mt_bench import read_questions
from sppo.policies.prompts import (
    BEST_GRADE,
    is_held_out,
    normalised,
    read_instructions,
    read_prompts,
    with_goal,
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--iteration", type=int, required=True)
    parser.add_argument("--iterations", type=int, required=True)
    parser.add_argument(
        "--held-out",
        type=Path,
        nargs="+",
        required=True,
        help="evaluation instructions, and MT-Bench's question.jsonl or its "
        "folder; none of them is drawn",
    )
    parser.add_argument(
        "--earlier",
        type=Path,
        nargs="*",
        default=[],
        help="prompts.parquet of earlier iterations, which are not drawn again",
    )
    parser.add_argument("--policy", type=Path, required=True)
    parser.add_argument(
        "--response-tokens", type=int, required=True, help="room to leave for a response"
    )
    parser.add_argument(
        "--best-grade",
        action="store_true",
        help="a reward-conditioned policy is asked for its best",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    add_section(parser, "prompts")
    add_section(parser, "policy", only=OF_CHATS)
    args = parser.parse_args()

    source = args.source.replace("{t}", str(args.iteration))
    revision = revision_of(args.revision, args.iteration)
    prompts, commit, empty = read_prompts(source, revision, args.split, args.field)
    held_out = {question for path in args.held_out for question in asked_in(path)}
    set_apart = [prompt for prompt in prompts if not is_held_out(prompt, held_out)]
    free = without_repetitions(
        set_apart,
        {said(row["messages"]) for path in args.earlier for row in read_table(path, "prompts")},
    )
    inputs = [*args.held_out, args.policy, *args.earlier]
    inputs += [Path(source)] if Path(source).is_file() else []
    with recorded("sample", args.output, inputs, vars(args)) as facts:
        one_source_each = source != args.source
        drawn = portion(
            free,
            args.per_iteration,
            1 if one_source_each else args.iteration,
            1 if one_source_each else args.iterations,
            args.seed,
            source,
        )
        rows, dropped = with_token_ids(drawn, source, args)
        write_table(args.output, rows, "prompts")
        facts |= {
            "prompts": len(rows),
            "available": len(free),
            "set_aside": len(prompts) - len(set_apart),
            "repeated": len(set_apart) - len(free),
            "empty": empty,
            "dropped": dropped,
            "commit": commit,
        }


def asked_in(path: Path) -> set[str]:
    """What an evaluation asks, normalised: instructions of AlpacaEval, first turns of MT-Bench."""
    if path.is_dir() or path.suffix == ".jsonl":
        questions = read_questions(path if path.is_dir() else path.parent)
        return {normalised(row["turns"][0]) for row in questions}
    return {normalised(row["instruction"]) for row in read_instructions(path)}


def revision_of(revisions: str | None, t: int) -> str | None:
    """The commit for iteration t: the one that is given, or the t-th of several."""
    commits = (revisions or "").replace(" ", "").split(",")
    if len(commits) > 1 and t > len(commits):
        raise UserError(
            f"prompts.revision names {len(commits)} commits, and this is iteration {t}; name one per iteration"
        )
    return (commits[0] if len(commits) == 1 else commits[t - 1]) or None


def said(messages: list[dict[str, str]]) -> tuple[str, ...]:
    """What makes two prompts the same one: who says what, white space around it apart."""
    return tuple(f"{message['role']}: {message['content'].strip()}" for message in messages)


def without_repetitions(
    prompts: list[dict[str, Any]], earlier: set[tuple[str, ...]]
) -> list[dict[str, Any]]:
    """The prompts that neither `earlier` holds nor a prompt before them is."""
    first = {said(prompt["messages"]): prompt for prompt in reversed(prompts)}
    return [
        prompt
        for prompt in prompts
        if first[said(prompt["messages"])] is prompt and said(prompt["messages"]) not in earlier
    ]


def portion(
    prompts: list[dict[str, Any]], size: int | None, t: int, parts: int, seed: int, source: str
) -> list[dict[str, Any]]:
    """The t-th of `parts` disjoint portions of the shuffled prompts, each of `size` prompts (None: as many as fit)."""
    size = size or len(prompts) // parts
    if size * parts > len(prompts) or size == 0:
        raise UserError(
            f"prompts: {parts} iterations of {max(size, 1)} ask for {max(size, 1) * parts} prompts, {source} has "
            f"{len(prompts)} outside the evaluation set; lower prompts.per_iteration or give more prompts"
        )
    shuffled = list(prompts)
    random.Random(seed).shuffle(shuffled)
    return shuffled[(t - 1) * size : t * size]


def with_token_ids(
    prompts: list[dict[str, Any]], source: str, args: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Rows of the table `prompts`, and how many were dropped and why."""
    from sppo.policies.models import (
        context_length,
        control_tokens,
        load_tokenizer,
        prompt_token_ids,
    )

    tokenizer = load_tokenizer(args.policy, args.chat_template_kwargs, args.template_date)
    context = context_length(args.policy)
    if context and args.response_tokens >= context:
        raise UserError(
            f"responses.max_new_tokens is {args.response_tokens}, which leaves no room "
            f"for a prompt in the policy's context of {context}; lower "
            "responses.max_new_tokens"
        )
    controls = control_tokens(tokenizer)
    rows: list[dict[str, Any]] = []
    dropped = {
        "longer_than_max_tokens": 0,
        "holds_special_tokens": 0,
        "refused_by_chat_template": 0,
    }
    for prompt in prompts:
        # Text that the tokenizer would read as control tokens could end the user's turn.
        if any(token in message["content"] for message in prompt["messages"] for token in controls):
            dropped["holds_special_tokens"] += 1
            continue
        messages = prompt["messages"]
        if args.best_grade:
            messages = with_goal(messages, BEST_GRADE)
        try:
            ids = prompt_token_ids(tokenizer, messages, f"prompt {prompt['id']} of {source}")
        except UserError as error:
            if args.refused == "error":
                raise UserError(f"{error}, or set prompts.refused: drop") from error
            dropped["refused_by_chat_template"] += 1
            continue
        if args.max_tokens and len(ids) > args.max_tokens:
            dropped["longer_than_max_tokens"] += 1
            continue
        if context and len(ids) + args.response_tokens > context:
            raise UserError(
                f"prompt {prompt['id']} has {len(ids)} tokens; with {args.response_tokens} for the response it does not "
                f"fit the policy's context of {context}; shorten it, lower "
                "responses.max_new_tokens, or set prompts.max_tokens to drop such "
                "prompts"
            )
        rows.append(
            {
                "prompt_id": prompt["id"],
                "category": prompt["category"],
                "messages": prompt["messages"],
                "prompt_token_ids": ids,
                "source": source,
            }
        )
    if not rows:
        raise UserError(
            f"prompts: all {len(prompts)} prompts drawn from {source} were dropped "
            f"({dropped}); raise prompts.max_tokens, or give other prompts"
        )
    return rows, dropped


if __name__ == "__main__":
    run(main)
