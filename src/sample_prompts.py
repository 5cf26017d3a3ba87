"""Draw the prompts of one iteration.

Reads   a JSONL file or a hub data set; the evaluations' questions, which are excluded; the base
        policy's tokenizer; the prompts of earlier iterations, if each iteration has its own source
Writes  prompts.parquet and its record
Paper   2405.00675, Algorithm 1 line 3: three disjoint portions, one for each iteration
        `--repeat`: SPIN, 2401.01335: the same prompts in each iteration

Differences from the official code: the held-out prompts are disjoint from the training prompts (in
the official code they are 500 of the training prompts). A repeated prompt is used once. Questions
of the evaluations are excluded also if case, white space or closing punctuation differ.
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
    is_held_out,
    normalised,
    read_instructions,
    read_prompts,
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
        help="evaluation instructions, and MT-Bench's question.jsonl or its folder; they are never "
        "drawn",
    )
    parser.add_argument(
        "--earlier",
        type=Path,
        nargs="*",
        default=[],
        help="prompts.parquet of earlier iterations; these prompts are not drawn again",
    )
    parser.add_argument("--policy", type=Path, required=True)
    parser.add_argument(
        "--response-tokens",
        type=int,
        required=True,
        help="number of tokens to reserve for a response",
    )
    parser.add_argument(
        "--highest-reward",
        action="store_true",
        help="ask a reward-conditioned policy for its best answer",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    add_section(parser, "prompts")
    add_section(parser, "policy", only=OF_CHATS)
    args = parser.parse_args()

    source = args.source.replace("{t}", str(args.iteration))
    own_source = source != args.source  # each iteration has its own source
    revision = revision_of(args.revision, args.iteration)
    prompts, commit, empty = read_prompts(source, revision, args.split, args.field)
    held_out: set[str] = set()
    for path in args.held_out:
        held_out |= evaluation_questions(path)
    allowed = [prompt for prompt in prompts if not is_held_out(prompt, held_out)]
    earlier: set[tuple[str, ...]] = set()
    for path in args.earlier:
        earlier |= {chat_key(row["messages"]) for row in read_table(path, "prompts")}
    available = without_repetitions(allowed, earlier)
    inputs = [*args.held_out, args.policy, *args.earlier]
    if Path(source).is_file():
        inputs.append(Path(source))
    with recorded("sample", args.output, inputs, vars(args)) as facts:
        alone = own_source or args.repeat  # no other iteration takes a part of the prompts
        number, parts = (1, 1) if alone else (args.iteration, args.iterations)
        drawn = portion(available, args.per_iteration, number, parts, args.seed, source)
        rows, dropped = with_token_ids(drawn, source, args)
        write_table(args.output, rows, "prompts")
        facts |= {
            "prompts": len(rows),
            "available": len(available),
            "set_aside": len(prompts) - len(allowed),
            "repeated": len(allowed) - len(available),
            "empty": empty,
            "dropped": dropped,
            "commit": commit,
        }


def evaluation_questions(path: Path) -> set[str]:
    """The normalised questions of an evaluation: instructions, or the first turns of MT-Bench.

    A folder or a file question.jsonl is MT-Bench's.
    """
    if path.is_dir() or path.name == "question.jsonl":
        questions = read_questions(path if path.is_dir() else path.parent)
        return {normalised(row["turns"][0]) for row in questions}
    return {normalised(row["instruction"]) for row in read_instructions(path)}


def revision_of(revisions: str | None, t: int) -> str | None:
    """The commit for iteration t: the single one, or the t-th of several separated by commas.

    None if there is none. UserError if there are several, but fewer than t.
    """
    commits = (revisions or "").replace(" ", "").split(",")
    if len(commits) > 1 and t > len(commits):
        raise UserError(
            f"prompts.revision names {len(commits)} commits, and this is iteration {t}; name one "
            "for each iteration"
        )
    commit = commits[0] if len(commits) == 1 else commits[t - 1]
    return commit or None


def chat_key(messages: list[dict[str, str]]) -> tuple[str, ...]:
    """A key for a chat: two prompts with equal keys are the same prompt.

    It has the roles and texts of the messages, without white space around the texts.
    """
    return tuple(f"{message['role']}: {message['content'].strip()}" for message in messages)


def without_repetitions(
    prompts: list[dict[str, Any]], earlier: set[tuple[str, ...]]
) -> list[dict[str, Any]]:
    """The first occurrence of each prompt that is not in `earlier`, a set of keys by `chat_key`."""
    seen = set(earlier)
    kept = []
    for prompt in prompts:
        key = chat_key(prompt["messages"])
        if key not in seen:
            seen.add(key)
            kept.append(prompt)
    return kept


def portion(
    prompts: list[dict[str, Any]], size: int | None, t: int, parts: int, seed: int, source: str
) -> list[dict[str, Any]]:
    """The t-th of `parts` disjoint portions of the shuffled prompts.

    Each portion has `size` prompts, or as many as possible if it is None. UserError if there are
    too few prompts.
    """
    size = size or len(prompts) // parts
    if size * parts > len(prompts) or size == 0:
        size = max(size, 1)
        raise UserError(
            f"prompts: {parts} iterations of {size} need {size * parts} prompts, but {source} has "
            f"{len(prompts)} outside the evaluation set; lower prompts.per_iteration or give more "
            "prompts"
        )
    shuffled = list(prompts)
    random.Random(seed).shuffle(shuffled)
    return shuffled[(t - 1) * size : t * size]


def with_token_ids(
    prompts: list[dict[str, Any]], source: str, args: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Rows of the table `prompts`, and the number of dropped prompts by reason.

    UserError if a prompt cannot be used and must not be dropped, or if all were dropped.
    """
    from sppo.policies.chats import (
        HIGHEST_REWARD,
        context_length,
        control_tokens,
        load_tokenizer,
        prompt_token_ids,
        with_target_reward,
    )

    tokenizer = load_tokenizer(args.policy, args.chat_template_kwargs, args.template_date)
    context = context_length(args.policy)
    if context and args.response_tokens >= context:
        raise UserError(
            f"responses.max_new_tokens is {args.response_tokens}, which leaves no room for a "
            f"prompt in the policy's context of {context}; lower responses.max_new_tokens"
        )
    controls = control_tokens(tokenizer)
    rows: list[dict[str, Any]] = []
    dropped = {
        "longer_than_max_tokens": 0,
        "holds_special_tokens": 0,
        "refused_by_chat_template": 0,
    }
    for prompt in prompts:
        # A control token in the text could end the user's message.
        if any(token in message["content"] for message in prompt["messages"] for token in controls):
            dropped["holds_special_tokens"] += 1
            continue
        messages = prompt["messages"]
        if args.highest_reward:
            messages = with_target_reward(tokenizer, messages, HIGHEST_REWARD)
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
                f"prompt {prompt['id']} has {len(ids)} tokens, which with {args.response_tokens} "
                f"for the response exceed the policy's context of {context}; shorten it, lower "
                "responses.max_new_tokens, or set prompts.max_tokens to drop such prompts"
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
