"""Arena-Hard v2: how often a policy's answers are preferred to a baseline's answers.

Reads   questions, the policy's and the reference's answers in alpaca-eval's format
Writes  arena_hard.json (per cent, with 95% intervals, also at equal style; by category), the
        judgments (.jsonl) and their records
Source  arXiv 2406.11939, lmarena/arena-hard-auto
Departs from its authors by default: the questions are this repository's own, the reference is the
        base policy, and the judge is the embedded one, whose P(policy beats reference) is the
        outcome. With a judge behind an API: intervals are over questions, lengths for style control
        are in characters, and differences of style are not centred
        (src/sppo/evaluation/arena_hard.py says why).
"""

from __future__ import annotations

import argparse
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import _path  # noqa: F401
from sppo.core.artifacts import file_hash, recorded, write_json, write_json_lines
from sppo.core.chat_client import Client, concurrently
from sppo.core.config import DEVICES
from sppo.core.errors import UserError, run
from sppo.evaluation.alpaca_eval import read_outputs
from sppo.evaluation.arena_hard import (
    BASELINE,
    MAX_TOKENS,
    PUBLISHED_JUDGES,
    QUESTIONS,
    TIMEOUT,
    contradict,
    figures,
    label_of,
    messages,
    outcomes_of,
    style_difference,
)
from sppo.evaluation.judges import ARENA_HARD, second_wins
from sppo.evaluation.results import check_policy
from sppo.preferences.base import (
    load_preference_model,
    local_kind,
    model_files,
    settings_for,
)

Row = dict[str, Any]
# Samples for the interval at equal style. They are few, because each is a regression of its own.
STYLE_BOOTSTRAP = 200


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--instructions", type=Path, required=True, help="the questions")
    parser.add_argument("--outputs", type=Path, required=True, help="the policy's answers")
    parser.add_argument("--reference", type=Path, required=True, help="the answers to compare with")
    parser.add_argument("--judge", required=True, help="as arena_hard.judge")
    parser.add_argument(
        "--judge-base", type=Path, help="Hugging Face folder of the embedded judge's base"
    )
    parser.add_argument("--judge-model", help="model name for openai")
    parser.add_argument("--judge-base-url", help="address of the server for openai")
    parser.add_argument("--bootstrap", type=int, default=10000, help="samples for the interval")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--output", type=Path, required=True, help="arena_hard.json")
    parser.add_argument("--judgments", type=Path, required=True, help="JSON lines")
    args = parser.parse_args()

    ARENA_HARD.check(vars(args))
    outputs, reference = answered(args.outputs, args.reference)
    check_policy(args.outputs, outputs[0]["generator"])
    possible_inputs = [args.outputs, args.reference, args.instructions, args.judge_base]
    inputs = [path for path in possible_inputs if path] + model_files(args.judge, None)
    with recorded("arena_hard", args.output, inputs, vars(args)):
        judge = judge_locally if local_kind(args.judge) else judge_by_api
        judged, details = judge(outputs, reference, args)
        rows = [
            row
            | {
                "prompt_id": ours.get("prompt_id"),
                "category": ours.get("dataset", ""),
                "style": style_difference(ours["output"], theirs["output"]),
            }
            for row, ours, theirs in zip(judged, outputs, reference, strict=True)
        ]
        with recorded("arena_hard", args.judgments, inputs, vars(args)):
            write_json_lines(args.judgments, rows)
        usable = [row for row in rows if row["outcomes"]]
        categories = sorted({row["category"] for row in usable})
        official = file_hash(args.instructions) == QUESTIONS.sha256
        draws = (args.bootstrap, STYLE_BOOTSTRAP, args.seed)
        write_json(
            args.output,
            figures(usable, *draws)
            | {
                "categories": {
                    name: figures([row for row in usable if row["category"] == name], *draws)
                    for name in categories
                },
                "without_verdict": len(rows) - len(usable),
                "official": official,
                "comparable_with_published": official
                and reference[0]["generator"] == BASELINE
                and details.get("published_judge", False),
                "instructions": str(args.instructions),
                "judge": args.judge,
                "judge_details": details,
                "policy": outputs[0]["generator"],
                "reference": reference[0]["generator"],
                "versions": {name: metadata.version(name) for name in ("openai", "scipy")},
                "judgments": str(args.judgments),
            },
        )


def answered(outputs: Path, reference: Path) -> tuple[list[Row], list[Row]]:
    """The policy's and the reference's answers, in the order of the policy's."""
    ours = read_outputs(outputs)
    known = {row["instruction"]: row for row in read_outputs(reference)}
    missing = [row["instruction"] for row in ours if row["instruction"] not in known]
    if missing:
        raise UserError(
            f"{reference} has no answer to {missing[0][:60]!r}; give answers to all questions as"
            " arena_hard.reference"
        )
    return ours, [known[row["instruction"]] for row in ours]


def judge_locally(
    outputs: list[Row], reference: list[Row], args: argparse.Namespace
) -> tuple[list[Row], Row]:
    """P(policy beats reference) of a preference model, and facts about it."""
    kind = local_kind(args.judge)
    assert kind is not None
    settings = settings_for(args.judge, base_url=args.judge_base_url)
    model = load_preference_model(settings, args.judge_base, args.device)
    comparisons = [
        (ours["instruction"], theirs["output"], ours["output"])
        for ours, theirs in zip(outputs, reference, strict=True)
    ]
    wins = second_wins(model, comparisons, "question")
    rows = [{"win_probability": each, "outcomes": [each]} for each in wins]
    files = kind.files(args.judge)
    return rows, {"kind": kind.kind, "sha256": file_hash(files[0]) if files else None}


def judge_by_api(
    outputs: list[Row], reference: list[Row], args: argparse.Namespace
) -> tuple[list[Row], Row]:
    """The labels of a judge behind an API in both orders, and facts about it."""
    name = args.judge_model if args.judge == "openai" else args.judge
    cache = args.output.parent / ".judgments" / "arena_hard.jsonl"
    client = Client(
        name,
        args.judge_base_url,
        cache,
        readable=lambda answer: label_of(answer) is not None,
        timeout=TIMEOUT,
    )
    games = []
    for ours, theirs in zip(outputs, reference, strict=True):
        games.append(messages(ours, theirs["output"], ours["output"]))
        games.append(messages(ours, ours["output"], theirs["output"]))
    tokens = sum(len(each["content"]) for game in games for each in game) // 4
    print(
        f"{name}: {len(games):,} judgments, about {tokens:,} tokens to read and"
        f" {len(games) * 1000:,} to write; finished ones are kept in {cache}",
        file=sys.stderr,
        flush=True,
    )
    answers = concurrently(
        lambda game: client.ask(game, temperature=0, max_tokens=MAX_TOKENS), games, "judged games"
    )
    client.check_unreadable(len(games))
    rows: list[Row] = []
    for as_b, as_a in zip(answers[::2], answers[1::2], strict=True):
        labels = label_of(as_b), label_of(as_a)
        both = (labels[0], labels[1]) if labels[0] and labels[1] else None
        rows.append({"games": labels, "outcomes": outcomes_of(both) if both else []})
    complete = [row["games"] for row in rows if row["outcomes"]]
    if not complete:
        raise UserError(f"judge {name} gave no verdict in both orders; name another judge")
    return rows, {
        "model": name,
        "base_url": args.judge_base_url,
        "published_judge": args.judge_base_url is None and name in PUBLISHED_JUDGES,
        "contradictions": 100 * sum(map(contradict, complete)) / len(complete),
    }


if __name__ == "__main__":
    run(main)
