"""Estimate P-hat from the logits and choose the pairs for training.

Reads   prompts.parquet (for its order), all shards of responses/ and preferences/.
        For `--construction gold`: gold responses (JSONL), and the policy, for its tokenizer.
        For `--construction graded`: all shards of grades/ instead of preferences/, and gold
        responses if there are any.
        For `--replay-share`: an earlier iteration's pairs and their record.
Writes  pairs.parquet and its record, which counts the dropped pairs by reason
Paper   2405.00675, section 5.1: P-hat over the K responses. The winner has the highest mean logit,
        the loser the lowest; training uses this pair.
        `best_vs_second` and `best_vs_random`: the code of COMAL, 2410.23223, and of RA-DPO.
        `all`: 2404.03715, Algorithm 1, every two responses.
        `gold`: 2401.01335, the gold response against one of the policy's responses.
        `graded`: 2404.03715, Algorithm 2 (DNO-Prct), every two responses whose grades differ
        enough.
        `--even-lengths` and `--truncated leave_out`: DICE, 2406.09760.
        `--target-reward`: RA-DPO, 2410.08067, with P-hat instead of a reward model's grades.
        `--labels permuted` and `flipped` are controls and in no paper: the preferences of a prompt
        are about other responses to it (src/sppo/preferences/labels.py). The record counts the
        prompts whose logits this changed.
Departs from 2404.03715 in `graded`: the grades are 6 P-hat by default.
        Pairs of `graded` and `gold` have no P-hat, because the gold response is not one of the K.
        Their P-hat columns contain grade / 6, or 1 and 0, and P(chosen beats rejected) is 1. No
        loss may read these columns.
Departs from INPO, 2407.00617: the mean logit decides winner and loser, not a tournament. With
        cyclic preferences the loser can beat the winner when only these two are compared; such
        pairs are kept.
Departs from the official code: `--probability blender` is its Bradley-Terry model of the scores. If
        all scores are equal, the official code uses one response as both winner and loser; here
        such prompts are dropped.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sppo.core.artifacts import read_record, recorded
from sppo.core.config import OF_CHATS
from sppo.core.errors import UserError, run
from sppo.core.flags import add_section
from sppo.core.tables import read_table, write_table
from sppo.policies.prompts import read_gold
from sppo.preferences.estimates import even_length_penalty, mean_logits
from sppo.preferences.grades import GOLD, read_grades
from sppo.preferences.labels import ANNOTATED, relabelled
from sppo.preferences.pairs import Dropped, Rules, pairs_of, without_truncated


class Inputs(NamedTuple):
    """What pairs are chosen from, each by prompt_id.

    responses and gold: rows of the table `responses`, the former by sample_id. logits: rows of the
    table `preferences`; empty if the pairs do not need them. grades: by sample_id.
    """

    messages: dict[str, Any]
    responses: dict[str, dict[int, dict[str, Any]]]
    logits: dict[str, dict[str, Any]]
    grades: dict[str, dict[int, float]]
    gold: dict[str, dict[str, Any]]


def main() -> None:
    args = arguments()
    # The kind of shards that decide the pairs, if any.
    kind = {"graded": "grades", "gold": None}.get(args.construction, "preferences")
    shards: list[Path] = getattr(args, kind) if kind else []
    read = read_inputs(args, kind, shards)
    files = [args.prompts, *args.responses, *shards]
    files += [Path(path) for path in (args.gold, args.previous) if path]
    with recorded("select", args.output, files, vars(args)) as facts:
        dropped = Counter({"tie": 0, "identical": 0, "empty": 0, "truncated": 0})
        if args.truncated == "leave_out":
            logits, dropped["truncated"] = leave_out_truncated(read.logits, read.responses)
            read = read._replace(logits=logits)
        if args.labels != ANNOTATED:
            facts["relabelled_prompts"] = relabel(read.logits, args.labels, args.label_seed)
        if args.even_lengths:
            facts["length_penalty"] = even_out_lengths(read.logits, read.responses)
        found = chosen_pairs(read, Rules.of(vars(args)), kind == "preferences", dropped)
        if args.target_reward:
            found, dropped["same_grade"] = twice_with_target_rewards(
                found, read.logits, read.messages, args
            )
        new = len(found)
        if args.previous:
            found += replayed(
                args.previous, args.replay_share, args.replay_older_share, args.replay_seed
            )
        pairs = [row | {"pair_id": number} for number, row in enumerate(found)]
        write_table(args.output, pairs, "pairs")
        facts |= {
            "prompts": len(read.messages),
            "pairs": len(pairs),
            "replayed": len(pairs) - new,
            "dropped": dict(dropped),
            **statistics(pairs),
        }


def arguments() -> argparse.Namespace:
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
        help="shards that replace preferences, for --construction graded",
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--policy",
        type=Path,
        help="policy whose tokenizer is used for gold responses and target rewards",
    )
    parser.add_argument("--replay-seed", type=int, default=0)
    parser.add_argument("--label-seed", type=int, default=0, help="seed of --labels permuted")
    parser.add_argument("--loser-seed", type=int, default=0, help="seed of best_vs_random")
    parser.add_argument(
        "--previous", type=Path, help="an earlier iteration's pairs.parquet, for --replay-share"
    )
    add_section(parser, "pairs")
    add_section(parser, "replay", skip=("iteration",), prefix="replay_")
    add_section(parser, "policy", only=OF_CHATS)
    return parser.parse_args()


def read_inputs(args: argparse.Namespace, kind: str | None, shards: list[Path]) -> Inputs:
    """The tables that the arguments name. UserError if they do not belong together.

    kind: `preferences`, `grades` or None, which the shards hold.
    """
    if kind and len(shards) != len(args.responses):
        raise UserError(
            f"--construction {args.construction} needs a shard of --{kind} for each of "
            "--responses; give all"
        )
    messages = {row["prompt_id"]: row["messages"] for row in read_table(args.prompts, "prompts")}
    logits: dict[str, dict[str, Any]] = {}
    if kind == "preferences":
        for path in shards:
            logits |= {row["prompt_id"]: row for row in read_table(path, kind)}
    responses: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for path in args.responses:
        for row in read_table(path, "responses"):
            responses[row["prompt_id"]][row["sample_id"]] = row
    incomplete = first_incomplete(messages, responses, logits if kind == "preferences" else None)
    if incomplete is not None:
        raise UserError(
            f"prompt {incomplete} lacks responses or preferences; delete "
            f"{args.responses[0].parent} and {(shards or args.responses)[0].parent} and run again"
        )
    gold: dict[str, dict[str, Any]] = {}
    if args.gold and args.construction in ("gold", "graded"):
        gold = gold_responses(Path(args.gold), args.policy)
    grades = read_grades(shards, responses, gold) if kind == "grades" else {}
    return Inputs(messages, responses, logits, grades, gold)


def chosen_pairs(
    read: Inputs, rules: Rules, by_preferences: bool, dropped: Counter[str]
) -> list[dict[str, Any]]:
    """The columns of the chosen pairs, in the order of the prompts.

    by_preferences: whether a prompt without logits has no pair. dropped: counts the prompts and
    pairs that are dropped, by reason.
    """
    found: list[dict[str, Any]] = []
    for prompt_id in read.messages:
        if by_preferences and prompt_id not in read.logits:
            continue
        for pair in pairs_of(
            read.responses[prompt_id],
            read.logits.get(prompt_id),
            read.grades.get(prompt_id, {}),
            read.gold.get(prompt_id),
            rules,
        ):
            if isinstance(pair, Dropped):
                dropped[pair.reason] += 1
            else:
                found.append({"prompt_id": prompt_id, **pair.columns()})
    return found


def first_incomplete(
    prompt_ids: Iterable[str],
    responses: dict[str, dict[int, dict[str, Any]]],
    logits: dict[str, dict[str, Any]] | None,
) -> str | None:
    """The first prompt without responses, or whose row of `logits` does not compare all of them.

    logits: rows of the table `preferences` by prompt_id; None if the pairs do not need them.
    """
    for prompt_id in prompt_ids:
        if prompt_id not in responses:
            return prompt_id
        if logits is None:
            continue
        compared = logits.get(prompt_id, {}).get("sample_ids")
        if compared != sorted(responses[prompt_id]):
            return prompt_id
    return None


def replayed(path: Path, share: float, share_of_older: float, seed: int) -> list[dict[str, Any]]:
    """Random pairs of an earlier iteration.

    They are a share of the pairs that the iteration built, and then `share_of_older` of the pairs
    that it replayed itself. UserError if the record does not tell the two apart.
    """
    pairs = read_table(path, "pairs")
    draw = random.Random(seed)
    record = read_record(path) or {}
    if "replayed" not in record:
        raise UserError(
            f"the record of {path} does not say how many of its pairs were replayed; "
            f"delete {path} and make it again, or set replay.share: 0"
        )
    # A table has the pairs that were built first, and the replayed ones after them.
    number_built = len(pairs) - record["replayed"]
    built = pairs[:number_built]
    older = pairs[number_built:]
    chosen = draw.sample(built, round(share * len(built)))
    return chosen + draw.sample(older, round(share_of_older * len(older)))


def gold_responses(path: Path, policy: Path) -> dict[str, dict[str, Any]]:
    """Gold responses by prompt_id, as rows of the table `responses`.

    Their token ids end with the token that ends a response in the chat template. UserError names a
    broken line.
    """
    from sppo.policies.chats import load_tokenizer, stop_token_ids

    tokenizer = load_tokenizer(policy)
    stop = stop_token_ids(policy, tokenizer)[0]
    rows = {}
    for prompt_id, text in read_gold(path).items():
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        rows[prompt_id] = {
            "text": text,
            "sample_id": GOLD,
            "finish_reason": "stop",
            "token_ids": ids + [stop],
        }
    return rows


def leave_out_truncated(
    logits: dict[str, dict[str, Any]], responses: dict[str, dict[int, dict[str, Any]]]
) -> tuple[dict[str, dict[str, Any]], int]:
    """The preferences among complete responses, and the number of prompts that have too few."""
    left = {
        prompt_id: row
        for prompt_id, preferences in logits.items()
        if (row := without_truncated(preferences, responses[prompt_id])) is not None
    }
    return left, len(logits) - len(left)


def relabel(logits: dict[str, dict[str, Any]], labels: str, seed: int) -> int:
    """Replace all logits by `relabelled` ones; return the number of prompts that this changed."""
    changed = 0
    for prompt_id, row in logits.items():
        annotated = np.array(row["logits"])
        row["logits"] = relabelled(annotated, labels, prompt_id, seed)
        changed += not np.array_equal(row["logits"], annotated)
    return changed


def even_out_lengths(
    logits: dict[str, dict[str, Any]], responses: dict[str, dict[int, dict[str, Any]]]
) -> float:
    """Subtract a penalty for length, in characters, from all logits; return the penalty."""
    lengths = {}
    for prompt_id, row in logits.items():
        texts = [responses[prompt_id][sample_id]["text"] for sample_id in row["sample_ids"]]
        lengths[prompt_id] = np.array([float(len(text)) for text in texts])
    # A mean logit contains both orders of a pair, and the penalty is subtracted from each order. So
    # the scores are half the mean logits.
    scores = [mean_logits(np.array(row["logits"])) / 2 for row in logits.values()]
    alpha = even_length_penalty(scores, list(lengths.values()))
    for prompt_id, row in logits.items():
        length = lengths[prompt_id]
        row["logits"] = np.array(row["logits"]) - alpha * (length[:, None] - length)
    return alpha


def twice_with_target_rewards(
    pairs: list[dict[str, Any]],
    logits: dict[str, dict[str, Any]],
    messages: dict[str, list[Any]],
    args: argparse.Namespace,
) -> tuple[list[dict[str, Any]], int]:
    """Two pairs from each pair, with different target rewards in the prompt (RA-DPO, 2410.08067).

    The prompt of the first asks for the winner's reward. The prompt of the second asks for the
    loser's reward, and winner and loser are swapped. A reward is 1 + 9 P, where P is the mean
    probability of beating the K - 1 other responses. So a response that always wins has the reward
    10. Pairs whose two rewards are equal are dropped; their number is the second result.
    """
    from sppo.policies.chats import load_tokenizer, prompt_token_ids, with_target_reward

    tokenizer = load_tokenizer(args.policy, args.chat_template_kwargs, args.template_date)
    found: list[dict[str, Any]] = []
    equal = 0
    for pair in pairs:
        prompt_id = pair["prompt_id"]
        k = len(logits[prompt_id]["sample_ids"])
        # P-hat includes the response itself with 1/2.
        reward_chosen = round(1 + 9 * (k * pair["p_hat_chosen"] - 0.5) / (k - 1), 1)
        reward_rejected = round(1 + 9 * (k * pair["p_hat_rejected"] - 0.5) / (k - 1), 1)
        if reward_chosen == reward_rejected:
            equal += 1
            continue
        for row, reward in ((pair, reward_chosen), (swapped(pair), reward_rejected)):
            asked = with_target_reward(tokenizer, messages[prompt_id], reward)
            ids = prompt_token_ids(tokenizer, asked, f"prompt {prompt_id}")
            found.append(row | {"prompt_token_ids": ids})
    return found, equal


def swapped(pair: dict[str, Any]) -> dict[str, Any]:
    """The pair with its winner as the loser and its loser as the winner."""
    result = pair | {"p_chosen_beats_rejected": 1 - pair["p_chosen_beats_rejected"]}
    for column in ("{}", "{}_token_ids", "{}_sample_id", "p_hat_{}"):
        chosen = column.format("chosen")
        rejected = column.format("rejected")
        result |= {chosen: pair[rejected], rejected: pair[chosen]}
    return result


def statistics(pairs: list[dict[str, Any]]) -> dict[str, float]:
    """Means over pairs of P-hat and of the number of tokens, of winners and losers."""
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
