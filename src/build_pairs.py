"""Estimate P-hat from the logits and choose winner and loser of every prompt.

Reads   prompts.parquet (its order), all shards of responses/ and preferences/
Writes  pairs.parquet and its record, which counts what was dropped and why
Paper   2405.00675, section 5.1: P-hat over the K responses; winner and loser by the mean logit; these two are trained on.
Departs from the official code: `--probability blender` is its collapse to scores; where all scores are equal it takes
        one response as winner and loser, here such prompts are dropped.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from sppo.artifacts import recorded
from sppo.config import add_section
from sppo.errors import UserError, run
from sppo.preference import mean_logits, p_hat, win_probabilities, winner_and_loser
from sppo.tables import read_table, write_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--responses", type=Path, nargs="+", required=True)
    parser.add_argument("--preferences", type=Path, nargs="+", required=True)
    parser.add_argument("--output", type=Path, required=True)
    add_section(parser, "preference", skip=("model", "source"))
    args = parser.parse_args()

    order = [row["prompt_id"] for row in read_table(args.prompts, "prompts")]
    logits = {row["prompt_id"]: row for path in args.preferences for row in read_table(path, "preferences")}
    responses: dict[str, dict[int, dict]] = defaultdict(dict)
    for path in args.responses:
        for row in read_table(path, "responses"):
            responses[row["prompt_id"]][row["sample_id"]] = row
    for prompt_id in order:
        if prompt_id not in logits or logits[prompt_id]["sample_ids"] != sorted(responses.get(prompt_id, ())):
            raise UserError(f"prompt {prompt_id} lacks responses or preferences; delete {args.responses[0].parent} and "
                            f"{args.preferences[0].parent} and run again")
    with recorded("select", args.output, [args.prompts, *args.responses, *args.preferences], vars(args)) as facts:
        pairs, dropped = [], Counter({"tie": 0, "identical": 0, "empty": 0, "truncated": 0})
        for number, prompt_id in enumerate(order):
            pair = select(logits[prompt_id], responses[prompt_id], args)
            if isinstance(pair, str):
                dropped[pair] += 1
            else:
                pairs.append({"pair_id": number, "prompt_id": prompt_id, **pair})
        write_table(args.output, pairs, "pairs")
        facts |= {"prompts": len(order), "pairs": len(pairs), "dropped": dict(dropped), **statistics(pairs)}


def select(preferences: dict[str, Any], responses: dict[int, dict], args: argparse.Namespace) -> dict[str, Any] | str:
    """The pair of one prompt, or the reason why it has none."""
    probabilities = win_probabilities(np.array(preferences["logits"]), args.probability, args.logit_scale)
    estimates = p_hat(probabilities)
    ends = winner_and_loser(mean_logits(np.array(preferences["logits"])) if args.winner_by == "logit" else estimates)
    if ends is None:
        return "tie"
    w, l = ends
    chosen, rejected = (responses[preferences["sample_ids"][i]] for i in ends)
    if chosen["text"] == rejected["text"]:
        return "identical"
    if not chosen["text"].strip() or not rejected["text"].strip():
        return "empty"
    if args.truncated == "drop" and "length" in (chosen["finish_reason"], rejected["finish_reason"]):
        return "truncated"
    return {"prompt_token_ids": chosen["prompt_token_ids"],
            "chosen": chosen["text"], "chosen_token_ids": chosen["token_ids"], "chosen_sample_id": chosen["sample_id"],
            "rejected": rejected["text"], "rejected_token_ids": rejected["token_ids"], "rejected_sample_id": rejected["sample_id"],
            "p_hat_chosen": estimates[w], "p_hat_rejected": estimates[l], "p_chosen_beats_rejected": probabilities[w, l]}


def statistics(pairs: list[dict[str, Any]]) -> dict[str, float]:
    """Means over pairs: P-hat of both ends, and how much longer (tokens) winners are."""
    if not pairs:
        return {}
    return {"mean_p_hat_chosen": float(np.mean([p["p_hat_chosen"] for p in pairs])),
            "mean_p_hat_rejected": float(np.mean([p["p_hat_rejected"] for p in pairs])),
            "mean_tokens_chosen": float(np.mean([len(p["chosen_token_ids"]) for p in pairs])),
            "mean_tokens_rejected": float(np.mean([len(p["rejected_token_ids"]) for p in pairs]))}


if __name__ == "__main__":
    run(main)
