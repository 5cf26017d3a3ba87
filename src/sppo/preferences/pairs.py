"""Which responses to one prompt make pairs: by preferences, by gold responses, by grades.

A pair is the columns of the table `pairs` but for prompt_id and pair_id; what makes none is told by a word: tie, identical, empty,
truncated, margin, no_gold, no_pair. `args` holds the options of the sections `preference`, `pairs` and `grades`.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import numpy as np

from sppo.preferences.estimates import mean_logits, p_hat, win_probabilities, winner_and_loser
from sppo.preferences.grades import GOLD, HIGHEST, far_apart

Row = dict[str, Any]


def pairs_of(
    responses: dict[int, Row],
    preferences: Row | None,
    grades: dict[int, float],
    gold: Row | None,
    args: argparse.Namespace,
) -> list[Row | str]:
    """Pairs of one prompt as `args.construction` makes them, and a reason for each that was dropped."""
    if args.construction == "graded":
        return graded_pairs(grades, responses, gold, args)
    if args.construction == "gold":
        return [gold_pair(responses, gold, args)]
    assert preferences is not None  # these constructions compare
    return (
        every_two(preferences, responses, args)
        if args.construction == "all"
        else [select(preferences, responses, args)]
    )


def gold_pair(responses: dict[int, Row], gold: Row | None, args: argparse.Namespace) -> Row | str:
    """The gold response against the policy's first, or the reason why not."""
    own = responses[min(responses)]
    return (
        "no_gold"
        if gold is None
        else made(gold | {"prompt_token_ids": own["prompt_token_ids"]}, own, (1.0, 0.0, 1.0), args)
    )


def every_two(
    preferences: Row, responses: dict[int, Row], args: argparse.Namespace
) -> list[Row | str]:
    """All pairs of one prompt, who wins by P(y beats y'), and a reason for each that was dropped."""
    probabilities = win_probabilities(
        np.array(preferences["logits"]), args.probability, args.logit_scale
    )
    estimates = p_hat(probabilities)
    kept = []
    for i, j in itertools.combinations(range(len(estimates)), 2):
        w, l = (i, j) if probabilities[i, j] > 0.5 else (j, i)
        chosen, rejected = (responses[preferences["sample_ids"][k]] for k in (w, l))
        tie = probabilities[w, l] == 0.5
        numbers = (estimates[w], estimates[l], probabilities[w, l])
        kept.append("tie" if tie else made(chosen, rejected, numbers, args))
    return kept


def graded_pairs(
    grades: dict[int, float], responses: dict[int, Row], gold: Row | None, args: argparse.Namespace
) -> list[Row | str]:
    """Pairs of one prompt by grades, or reasons; `no_pair` where no two are far enough apart."""
    if gold:
        responses = responses | {
            GOLD: gold | {"prompt_token_ids": next(iter(responses.values()))["prompt_token_ids"]}
        }
    ends = far_apart(grades, args.positive, args.gold_margin, args.own_margin)
    return [
        made(responses[w], responses[l], (grades[w] / HIGHEST, grades[l] / HIGHEST, 1.0), args)
        for w, l in ends
    ] or ["no_pair"]


def select(preferences: Row, responses: dict[int, Row], args: argparse.Namespace) -> Row | str:
    """The pair of one prompt, or the reason why it has none."""
    probabilities = win_probabilities(
        np.array(preferences["logits"]), args.probability, args.logit_scale
    )
    estimates = p_hat(probabilities)
    ends = winner_and_loser(
        mean_logits(np.array(preferences["logits"])) if args.winner_by == "logit" else estimates
    )
    if ends is None:
        return "tie"
    w, l = ends
    chosen, rejected = (responses[preferences["sample_ids"][i]] for i in ends)
    return made(chosen, rejected, (estimates[w], estimates[l], probabilities[w, l]), args)


def made(
    chosen: Row, rejected: Row, numbers: tuple[float, float, float], args: argparse.Namespace
) -> Row | str:
    """A pair with P-hat of both and P(chosen beats rejected), or the reason why it is none."""
    if chosen["text"] == rejected["text"]:
        return "identical"
    if not chosen["text"].strip() or not rejected["text"].strip():
        return "empty"
    if args.truncated == "drop" and "length" in (
        chosen["finish_reason"],
        rejected["finish_reason"],
    ):
        return "truncated"
    if abs(numbers[0] - numbers[1]) < args.margin:
        return "margin"
    return {
        "prompt_token_ids": chosen["prompt_token_ids"],
        "chosen": chosen["text"],
        "chosen_token_ids": chosen["token_ids"],
        "chosen_sample_id": chosen["sample_id"],
        "rejected": rejected["text"],
        "rejected_token_ids": rejected["token_ids"],
        "rejected_sample_id": rejected["sample_id"],
        "p_hat_chosen": numbers[0],
        "p_hat_rejected": numbers[1],
        "p_chosen_beats_rejected": numbers[2],
    }
