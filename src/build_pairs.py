"""Estimate P-hat from the logits and choose the pairs that are trained on.

Reads   prompts.parquet (its order), all shards of responses/ and preferences/; gold responses (JSONL) and the policy,
        whose tokenizer reads them, for `--construction gold`; an earlier iteration's pairs and their record for `--replay-share`.
        For `--construction graded` all shards of grades/ in place of preferences/, and gold responses if there are any
Writes  pairs.parquet and its record, which counts what was dropped and why
Paper   2405.00675, section 5.1: P-hat over the K responses; winner and loser by the mean logit; these two are trained on.
        `all`: 2404.03715, Algorithm 1, every two responses. `gold`: 2401.01335, the gold response against one of the policy's.
        `--even-lengths`: DICE, 2406.09760. `--target-reward`: RA-DPO, 2410.08067, with P-hat in place of a reward model's grades.
        `graded`: 2404.03715, Algorithm 2 (DNO-Prct), every two far enough apart by their grades.
Departs from 2404.03715 in `graded`: a gold response never loses, where the paper takes all pairs.
        Pairs of `graded` and `gold` have no P-hat, for gold is none of the K: its columns hold grade / 6, or 1 and 0, that of P(chosen beats
        rejected) 1, and no loss may read them.
Departs from INPO, 2407.00617: winner and loser are the ends of the mean logit, not of a tournament, and stay a pair where the loser beats the
        winner in the comparison of these two, which cyclic preferences allow.
Departs from the official code: `--probability blender` is its collapse to scores; where all scores are equal it takes
        one response as winner and loser, here such prompts are dropped.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from sppo.core.artifacts import read_record, recorded
from sppo.core.config import OF_CHATS
from sppo.core.errors import UserError, run
from sppo.core.flags import add_section
from sppo.core.tables import read_table, write_table
from sppo.policies.prompts import read_gold, with_target_reward
from sppo.preferences.estimates import even_length_penalty, mean_logits
from sppo.preferences.grades import GOLD, read_grades
from sppo.preferences.pairs import Dropped, Rules, pairs_of


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--responses", type=Path, nargs="+", required=True)
    parser.add_argument("--preferences", type=Path, nargs="*", default=[])
    parser.add_argument(
        "--grades",
        type=Path,
        nargs="*",
        default=[],
        help="in place of preferences, for --construction graded",
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--policy", type=Path, help="whose tokenizer reads gold responses and target rewards"
    )
    parser.add_argument("--replay-seed", type=int, default=0)
    parser.add_argument(
        "--previous", type=Path, help="an earlier iteration's pairs.parquet, for --replay-share"
    )
    add_section(parser, "pairs")
    add_section(parser, "replay", skip=("iteration",), prefix="replay_")
    add_section(parser, "policy", only=OF_CHATS)
    args = parser.parse_args()

    by = {"graded": "grades", "gold": None}.get(args.construction, "preferences")
    judged = getattr(args, by) if by else []
    if by and len(judged) != len(args.responses):
        raise UserError(
            f"--construction {args.construction} needs a shard of --{by} for each of --responses; give all"
        )
    messages = {row["prompt_id"]: row["messages"] for row in read_table(args.prompts, "prompts")}
    order = list(messages)
    logits = (
        {row["prompt_id"]: row for path in judged for row in read_table(path, by)}
        if by == "preferences"
        else {}
    )
    responses: dict[str, dict[int, dict]] = defaultdict(dict)
    for path in args.responses:
        for row in read_table(path, "responses"):
            responses[row["prompt_id"]][row["sample_id"]] = row
    for prompt_id in order:
        compared = logits.get(prompt_id, {}).get("sample_ids") == sorted(
            responses.get(prompt_id, ())
        )
        if prompt_id not in responses or by == "preferences" and not compared:
            raise UserError(
                f"prompt {prompt_id} lacks responses or preferences; delete {args.responses[0].parent} and "
                f"{(judged or args.responses)[0].parent} and run again"
            )
    gold = (
        gold_responses(Path(args.gold), args.policy)
        if args.gold and args.construction in ("gold", "graded")
        else {}
    )
    grades = read_grades(judged, responses, gold) if by == "grades" else {}
    more = [Path(path) for path in (args.gold, args.previous) if path]
    with recorded(
        "select", args.output, [args.prompts, *args.responses, *judged, *more], vars(args)
    ) as facts:
        if args.even_lengths:
            facts["length_penalty"] = even_out_lengths(logits, responses)
        found, dropped = [], Counter({"tie": 0, "identical": 0, "empty": 0, "truncated": 0})
        rules = Rules.of(vars(args))
        for prompt_id in order:
            for pair in pairs_of(
                responses[prompt_id],
                logits.get(prompt_id),
                grades.get(prompt_id, {}),
                gold.get(prompt_id),
                rules,
            ):
                if isinstance(pair, Dropped):
                    dropped[pair.reason] += 1
                else:
                    found.append({"prompt_id": prompt_id, **pair.columns()})
        if args.target_reward:
            found, dropped["same_grade"] = twice_with_target_rewards(found, logits, messages, args)
        new = len(found)
        if args.previous:
            found += replayed(
                args.previous, args.replay_share, args.replay_older_share, args.replay_seed
            )
        pairs = [row | {"pair_id": number} for number, row in enumerate(found)]
        write_table(args.output, pairs, "pairs")
        facts |= {
            "prompts": len(order),
            "pairs": len(pairs),
            "replayed": len(pairs) - new,
            "dropped": dict(dropped),
            **statistics(pairs),
        }


def replayed(path: Path, share: float, share_of_older: float, seed: int) -> list[dict[str, Any]]:
    """Pairs of an earlier iteration, drawn at random: a share of those that it made, which come first, and one of those that it had replayed itself."""
    pairs, draw = read_table(path, "pairs"), random.Random(seed)
    record = read_record(path) or {}
    if "replayed" not in record:
        raise UserError(
            f"the record of {path} does not say how many of its pairs were replayed; "
            f"delete {path} and make it again, or set replay.share: 0"
        )
    made = len(pairs) - record["replayed"]
    return [
        pair
        for some, of_them in ((pairs[:made], share), (pairs[made:], share_of_older))
        for pair in draw.sample(some, round(of_them * len(some)))
    ]


def gold_responses(path: Path, policy: Path) -> dict[str, dict[str, Any]]:
    """Gold responses by prompt, with token ids that end as the chat template ends a response.

    UserError names a broken line.
    """
    from sppo.policies.models import load_tokenizer, stop_token_ids

    tokenizer = load_tokenizer(policy)
    stop = stop_token_ids(policy, tokenizer)[0]
    return {
        name: {
            "text": text,
            "sample_id": GOLD,
            "finish_reason": "stop",
            "token_ids": tokenizer(
                text, add_special_tokens=False, split_special_tokens=True
            ).input_ids
            + [stop],
        }
        for name, text in read_gold(path).items()
    }


def even_out_lengths(
    logits: dict[str, dict[str, Any]], responses: dict[str, dict[int, dict]]
) -> float:
    """Take the penalty for length, in characters, from all logits; returns it."""
    lengths = {
        name: np.array(
            [float(len(responses[name][sample]["text"])) for sample in row["sample_ids"]]
        )
        for name, row in logits.items()
    }
    # Half, for both orders of a pair are in it, and the penalty is taken from each.
    alpha = even_length_penalty(
        [mean_logits(np.array(row["logits"])) / 2 for row in logits.values()],
        list(lengths.values()),
    )
    for name, row in logits.items():
        row["logits"] = np.array(row["logits"]) - alpha * (lengths[name][:, None] - lengths[name])
    return alpha


def twice_with_target_rewards(
    pairs: list[dict[str, Any]],
    logits: dict[str, dict],
    messages: dict[str, list],
    args: argparse.Namespace,
) -> tuple[list[dict[str, Any]], int]:
    """Each pair with the prompt asking for the winner's grade, and turned round with the prompt asking for the loser's; and how many had one grade.

    A grade is 1 + 9 P-hat over the K - 1 others, so that one that surely beats them all has a 10.
    """
    from sppo.policies.models import load_tokenizer, prompt_token_ids

    tokenizer = load_tokenizer(args.policy, args.chat_template_kwargs, args.template_date)
    found, same = [], 0
    for pair in pairs:
        k = len(logits[pair["prompt_id"]]["sample_ids"])
        grades = [
            round(1 + 9 * (k * pair[f"p_hat_{end}"] - 0.5) / (k - 1), 1)
            for end in ("chosen", "rejected")
        ]
        if grades[0] == grades[1]:
            same += 1
            continue
        turned = pair | {"p_chosen_beats_rejected": 1 - pair["p_chosen_beats_rejected"]}
        for name in ("{}", "{}_token_ids", "{}_sample_id", "p_hat_{}"):
            turned |= {
                name.format("chosen"): pair[name.format("rejected")],
                name.format("rejected"): pair[name.format("chosen")],
            }
        for row, grade in zip((pair, turned), grades, strict=True):
            asked = with_target_reward(messages[pair["prompt_id"]], grade)
            ids = prompt_token_ids(tokenizer, asked, f"prompt {pair['prompt_id']}")
            found.append(row | {"prompt_token_ids": ids})
    return found, same


def statistics(pairs: list[dict[str, Any]]) -> dict[str, float]:
    """Means over pairs: P-hat of both ends, and how much longer (tokens) winners are."""
    if not pairs:
        return {}
    return {
        "mean_p_hat_chosen": float(np.mean([p["p_hat_chosen"] for p in pairs])),
        "mean_p_hat_rejected": float(np.mean([p["p_hat_rejected"] for p in pairs])),
        "mean_tokens_chosen": float(np.mean([len(p["chosen_token_ids"]) for p in pairs])),
        "mean_tokens_rejected": float(np.mean([len(p["rejected_token_ids"]) for p in pairs])),
    }


if __name__ == "__main__":
    run(main)
