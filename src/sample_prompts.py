"""Draw one iteration's prompts.

Reads   a JSONL file or a hub data set, the evaluation instructions (set aside first), the base policy's tokenizer; where each
        iteration has a source of its own, the prompts of those before it
Writes  prompts.parquet and its record
Paper   2405.00675, Algorithm 1 line 3: three disjoint portions, one an iteration.
Departs from the official code: the held-out prompts are disjoint from training; theirs are 500 rows of it. A prompt that stands twice
        is taken once.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

from sppo.artifacts import recorded
from sppo.config import add_section
from sppo.errors import UserError, run
from sppo.prompts import BEST_GRADE, read_instructions, read_prompts, with_goal
from sppo.tables import read_table, write_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iteration", type=int, required=True)
    parser.add_argument("--iterations", type=int, required=True)
    parser.add_argument("--held-out", type=Path, required=True, help="evaluation instructions; none of them is drawn")
    parser.add_argument("--earlier", type=Path, nargs="*", default=[], help="prompts.parquet of earlier iterations, which are not drawn again")
    parser.add_argument("--policy", type=Path, required=True)
    parser.add_argument("--response-tokens", type=int, required=True, help="room to leave for a response")
    parser.add_argument("--best-grade", action="store_true", help="a reward-conditioned policy is asked for its best")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    add_section(parser, "prompts")
    args = parser.parse_args()

    source = args.source.replace("{t}", str(args.iteration))
    prompts, commit = read_prompts(source, revision_of(args.revision, args.iteration), args.split, args.field)
    held_out = {row["instruction"].strip() for row in read_instructions(args.held_out)}
    set_apart = [prompt for prompt in prompts if prompt["messages"][-1]["content"].strip() not in held_out]
    free = without_repetitions(set_apart, {said(row["messages"]) for path in args.earlier for row in read_table(path, "prompts")})
    inputs = [args.held_out, args.policy, *args.earlier] + ([Path(source)] if Path(source).is_file() else [])
    with recorded("sample", args.output, inputs, vars(args)) as facts:
        one_source_each = source != args.source
        drawn = portion(free, args.per_iteration, 1 if one_source_each else args.iteration,
                        1 if one_source_each else args.iterations, args.seed, source)
        rows, dropped = with_token_ids(drawn, source, args)
        write_table(args.output, rows, "prompts")
        facts |= {"prompts": len(rows), "available": len(free), "set_aside": len(prompts) - len(set_apart),
                  "repeated": len(set_apart) - len(free), "dropped": dropped, "commit": commit}


def revision_of(revisions: str | None, t: int) -> str | None:
    """The commit for iteration t: the one that is given, or the t-th of several."""
    commits = (revisions or "").replace(" ", "").split(",")
    if len(commits) > 1 and t > len(commits):
        raise UserError(f"prompts.revision names {len(commits)} commits, and this is iteration {t}; name one an iteration")
    return (commits[0] if len(commits) == 1 else commits[t - 1]) or None


def said(messages: list[dict[str, str]]) -> tuple[str, ...]:
    """What makes two prompts the same one: who says what, white space around it apart."""
    return tuple(f"{message['role']}: {message['content'].strip()}" for message in messages)


def without_repetitions(prompts: list[dict[str, Any]], earlier: set[tuple[str, ...]]) -> list[dict[str, Any]]:
    """The prompts that neither `earlier` holds nor a prompt before them is."""
    first = {said(prompt["messages"]): prompt for prompt in reversed(prompts)}
    return [prompt for prompt in prompts if first[said(prompt["messages"])] is prompt and said(prompt["messages"]) not in earlier]


def portion(prompts: list[dict[str, Any]], size: int | None, t: int, parts: int, seed: int, source: str) -> list[dict[str, Any]]:
    """The t-th of `parts` disjoint portions of the shuffled prompts, each of `size` prompts (None: as many as fit)."""
    size = size or len(prompts) // parts
    if size * parts > len(prompts) or size == 0:
        raise UserError(f"prompts: {parts} iterations of {max(size, 1)} ask for {max(size, 1) * parts} prompts, {source} has "
                        f"{len(prompts)} outside the evaluation set; lower prompts.per_iteration or give more prompts")
    shuffled = list(prompts)
    random.Random(seed).shuffle(shuffled)
    return shuffled[(t - 1) * size:t * size]


def with_token_ids(prompts: list[dict[str, Any]], source: str, args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Rows of the table `prompts`, and how many were dropped and why."""
    from sppo.models import context_length, load_tokenizer, prompt_token_ids

    tokenizer, context = load_tokenizer(args.policy), context_length(args.policy)
    special = set(tokenizer.all_special_tokens)
    rows: list[dict[str, Any]] = []
    dropped = {"longer_than_max_tokens": 0, "holds_special_tokens": 0}
    for prompt in prompts:
        # Text that the tokenizer would read as control tokens could end the user's turn.
        if any(token in message["content"] for message in prompt["messages"] for token in special):
            dropped["holds_special_tokens"] += 1
            continue
        ids = prompt_token_ids(tokenizer, with_goal(prompt["messages"], BEST_GRADE) if args.best_grade else prompt["messages"])
        if args.max_tokens and len(ids) > args.max_tokens:
            dropped["longer_than_max_tokens"] += 1
            continue
        if context and len(ids) + args.response_tokens > context:
            raise UserError(f"prompt {prompt['id']} has {len(ids)} tokens; with {args.response_tokens} for the response it does not "
                            f"fit the policy's context of {context}; shorten it, or set prompts.max_tokens to drop such prompts")
        rows.append({"prompt_id": prompt["id"], "category": prompt["category"], "messages": prompt["messages"],
                     "prompt_token_ids": ids, "source": source})
    if not rows:
        raise UserError(f"prompts: all {len(prompts)} prompts drawn from {source} were dropped ({dropped}); raise prompts.max_tokens")
    return rows, dropped


if __name__ == "__main__":
    run(main)
