"""The choice of a prompt's pairs of responses: by preferences, gold responses or grades."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import Any

import numpy as np

from sppo.preferences.estimates import (
    is_tie,
    mean_logits,
    p_hat,
    win_probabilities,
    winner_and_loser,
)
from sppo.preferences.grades import GOLD, HIGHEST, far_apart

Row = dict[str, Any]


@dataclass(frozen=True)
class Rules:
    """How pairs are chosen: keys of the configuration section `pairs`."""

    construction: str  # best_vs_worst, best_vs_second, best_vs_random, all, gold or graded
    probability: str
    logit_scale: float
    winner_by: str  # logit or p_hat
    truncated: str  # keep, drop or leave_out
    margin: float  # minimum difference of P-hat
    winner_grade: float = 0.0  # minimum grade of a winner
    gold_grade_margin: float = 0.0
    own_grade_margin: float = 0.0
    loser_seed: int = 0  # of best_vs_random

    @classmethod
    def of(cls, options: dict[str, Any]) -> Rules:
        """The rules from a program's options, which may contain others."""
        names = cls.__dataclass_fields__.keys() & options.keys()
        return cls(**{name: options[name] for name in names})


@dataclass(frozen=True)
class Pair:
    """Two rows of the table `responses`, with their estimates of P-hat and P."""

    chosen: Row
    rejected: Row
    p_hat_chosen: float
    p_hat_rejected: float
    p_chosen_beats_rejected: float

    def columns(self) -> Row:
        """The columns of the table `pairs`, except prompt_id and pair_id."""
        row: Row = {"prompt_token_ids": self.chosen["prompt_token_ids"]}
        for side, response in (("chosen", self.chosen), ("rejected", self.rejected)):
            row[side] = response["text"]
            row[f"{side}_token_ids"] = response["token_ids"]
            row[f"{side}_sample_id"] = response["sample_id"]
        return row | {
            "p_hat_chosen": self.p_hat_chosen,
            "p_hat_rejected": self.p_hat_rejected,
            "p_chosen_beats_rejected": self.p_chosen_beats_rejected,
        }


@dataclass(frozen=True)
class Dropped:
    """Two responses, or all responses to a prompt, that give no pair.

    reason: tie, identical, empty, truncated, margin, no_gold or no_pair.
    """

    reason: str


def pairs_of(
    responses: dict[int, Row],
    preferences: Row | None,
    grades: dict[int, float],
    gold: Row | None,
    rules: Rules,
) -> list[Pair | Dropped]:
    """The pairs of one prompt, and the dropped ones.

    responses: by sample_id. preferences: the prompt's row of the table `preferences`, for all
    constructions but gold and graded. grades: by sample_id, for graded. gold: the gold response,
    for gold and graded.
    """
    if rules.construction == "graded":
        return graded_pairs(grades, responses, gold, rules)
    if rules.construction == "gold":
        return [gold_pair(responses, gold, rules)]
    if preferences is None:
        raise ValueError(f"construction {rules.construction} needs preferences")
    if rules.construction == "all":
        return all_pairs(preferences, responses, rules)
    return [winner_against_loser(preferences, responses, rules)]


def winner_against_loser(
    preferences: Row, responses: dict[int, Row], rules: Rules
) -> Pair | Dropped:
    """The best response of one prompt against the worst one, or another that the rules name.

    best_vs_worst: SPPO (2405.00675, section 5.1). best_vs_second: the code of COMAL (2410.23223).
    best_vs_random: the data of RA-DPO (2410.08067); the loser depends on seed and prompt only.
    """
    logits = np.array(preferences["logits"])
    probabilities = win_probabilities(logits, rules.probability, rules.logit_scale)
    estimates = p_hat(probabilities)
    scores = np.asarray(mean_logits(logits) if rules.winner_by == "logit" else estimates)
    ends = winner_and_loser(scores)
    if ends is None:
        return Dropped("tie")
    winner, loser = ends
    others = [index for index in range(len(scores)) if index != winner]
    if rules.construction == "best_vs_second":
        loser = max(others, key=lambda index: scores[index])
    elif rules.construction == "best_vs_random":
        draw = random.Random(f"loser/{rules.loser_seed}/{preferences['prompt_id']}")
        loser = draw.choice(others)
    if is_tie(scores[winner], scores[loser]):
        return Dropped("tie")
    return _pair(preferences, responses, probabilities, winner, loser, rules)


def without_truncated(preferences: Row, responses: dict[int, Row]) -> Row | None:
    """The preferences among the responses that are complete; None if fewer than half are (DICE).

    preferences: the prompt's row of the table `preferences`, with the logits of K responses.
    """
    sample_ids = preferences["sample_ids"]
    complete = [
        index
        for index, sample_id in enumerate(sample_ids)
        if responses[sample_id]["finish_reason"] != "length"
    ]
    if len(complete) < max(2, len(sample_ids) / 2):
        return None
    return preferences | {
        "sample_ids": [sample_ids[index] for index in complete],
        "logits": np.array(preferences["logits"])[np.ix_(complete, complete)],
    }


def all_pairs(preferences: Row, responses: dict[int, Row], rules: Rules) -> list[Pair | Dropped]:
    """Every two responses of one prompt (DNO, 2404.03715); y wins if P(y beats y') > 1/2."""
    logits = np.array(preferences["logits"])
    probabilities = win_probabilities(logits, rules.probability, rules.logit_scale)
    found: list[Pair | Dropped] = []
    for i, j in itertools.combinations(range(len(probabilities)), 2):
        if is_tie(probabilities[i, j]):
            found.append(Dropped("tie"))
            continue
        winner, loser = (i, j) if probabilities[i, j] > 0.5 else (j, i)
        found.append(_pair(preferences, responses, probabilities, winner, loser, rules))
    return found


def gold_pair(responses: dict[int, Row], gold: Row | None, rules: Rules) -> Pair | Dropped:
    """The gold response against the policy's first response (SPIN, 2401.01335)."""
    if gold is None:
        return Dropped("no_gold")
    own = responses[min(responses)]
    gold = gold | {"prompt_token_ids": own["prompt_token_ids"]}
    return kept_or_dropped(Pair(gold, own, 1.0, 0.0, 1.0), rules)


def graded_pairs(
    grades: dict[int, float], responses: dict[int, Row], gold: Row | None, rules: Rules
) -> list[Pair | Dropped]:
    """Every two responses whose grades are far enough apart (DNO-Prct, 2404.03715)."""
    if gold:
        own = next(iter(responses.values()))
        gold = gold | {"prompt_token_ids": own["prompt_token_ids"]}
        responses = responses | {GOLD: gold}
    found: list[Pair | Dropped] = []
    for winner, loser in far_apart(
        grades, rules.winner_grade, rules.gold_grade_margin, rules.own_grade_margin
    ):
        pair = Pair(
            responses[winner],
            responses[loser],
            grades[winner] / HIGHEST,
            grades[loser] / HIGHEST,
            1.0,
        )
        found.append(kept_or_dropped(pair, rules))
    return found or [Dropped("no_pair")]


def _pair(
    preferences: Row,
    responses: dict[int, Row],
    probabilities: np.ndarray,
    winner: int,
    loser: int,
    rules: Rules,
) -> Pair | Dropped:
    """The pair of two indices into `probabilities`, (K, K)."""
    estimates = p_hat(probabilities)
    sample_ids = preferences["sample_ids"]
    pair = Pair(
        responses[sample_ids[winner]],
        responses[sample_ids[loser]],
        estimates[winner],
        estimates[loser],
        probabilities[winner, loser],
    )
    return kept_or_dropped(pair, rules)


def kept_or_dropped(pair: Pair, rules: Rules) -> Pair | Dropped:
    """The pair, or the reason why it is not trained on."""
    chosen, rejected = pair.chosen, pair.rejected
    if chosen["text"] == rejected["text"]:
        return Dropped("identical")
    if not chosen["text"].strip() or not rejected["text"].strip():
        return Dropped("empty")
    cut_off = "length" in (chosen["finish_reason"], rejected["finish_reason"])
    if rules.truncated == "drop" and cut_off:
        return Dropped("truncated")
    if abs(pair.p_hat_chosen - pair.p_hat_rejected) < rules.margin:
        return Dropped("margin")
    return pair
