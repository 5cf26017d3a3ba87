"""A game whose actions are words, which a language model answers to one prompt.

A policy is the vector log pi (n,) of the log-probabilities of the n words, in nats. Each is the sum
over the word's tokens and the end token. The probabilities sum to less than 1, because the model
can also give other answers. Over the words alone, the policy is softmax(log pi). As P is known,
every target of the loss and every exact update is known, too.

The expected results are written here, before any training, with their reasons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.special import softmax

from sppo.preferences.estimates import p_hat_weighted
from sppo.theory.claims import Claim
from sppo.theory.games import Array, duality_gap, l2_log_ratio, mwu_bound

TOPIC = 19  # of these claims, in sppo.theory.claims.TOPICS

# What is expected. The trainer takes a fixed number of optimiser steps and does not solve the
# regression exactly. A step size eta that is wrong by a tenth should be seen, but not a regression
# that is nearly solved.
SLOPE_ERROR = 0.1  # largest |slope - 1| of the realised log-ratios on the targets
R2 = 0.95  # smallest R^2: targets explain nearly everything that happened to the words
# Largest total variation to the exact update, as a share of the distance that the exact update
# moves. A policy that does not move has 1.
TV_SHARE = 0.2
WIN_ERROR = 0.02  # largest |P(new beats old) - P(exact beats old)|
# A mutant must fail clearly: its `departure` must be at least twice the largest that passes.
DEPARTURE = 2.0

CORRECT = "correct"
MEAN = "mean of log-probabilities"
BASE = "reference is the base"
NO_SELF = "P-hat without self"
SWAPPED = "winner and loser swapped"
DOUBLE = "factor 2 in eta"
# Mutants by the iteration in which they are trained. Before it, all iterations are correct.
MUTANTS = {MEAN: 1, BASE: 2, NO_SELF: 1, SWAPPED: 1, DOUBLE: 1}


def cyclic_game(n: int, win: float) -> Array:
    """P (n, n) of n actions, n odd: i beats j with probability `win` if (i - j) mod n is odd.

    Every action beats as many as beat it, so that the equilibrium is uniform. With five actions it
    is the game of rock, paper, scissors, Spock and lizard, in this order.
    """
    i, j = np.indices((n, n))
    return np.where(i == j, 0.5, np.where((i - j) % n % 2 == 1, win, 1 - win))


def couples(n: int) -> list[tuple[int, int]]:
    """Pairs of different words that contain every word; with odd n, the first is in two pairs."""
    return [(i, (i + 1) % n) for i in range(0, n, 2)]


def estimates(P: Array, log_pi: Array, variant: str) -> Array:
    """P-hat(y beats pi) of every word, (n,), exact: the opponent is the policy over the words.

    The mutant `NO_SELF` leaves y out of the opponents of y.
    """
    wins = p_hat_weighted(P, log_pi)
    if variant != NO_SELF:
        return wins
    pi = softmax(log_pi)
    return (wins - 0.5 * pi) / (1 - pi)


def pairs_table(
    P: Array,
    p_hat: Array,
    words: tuple[str, ...],
    prompt: list[int],
    responses: list[list[int]],
    variant: str,
) -> list[dict[str, Any]]:
    """Rows of the table `pairs`: every word is in at least one; the winner is the likelier one.

    prompt, responses: token ids. The mutant `SWAPPED` exchanges the responses of each pair, but not
    their P-hats.
    """
    rows = []
    for number, (i, j) in enumerate(couples(len(words))):
        w, l = (i, j) if P[i, j] > 0.5 else (j, i)
        chosen, rejected = (l, w) if variant == SWAPPED else (w, l)
        rows.append(
            {
                "pair_id": number,
                "prompt_id": "word game",
                "prompt_token_ids": prompt,
                "chosen": words[chosen],
                "chosen_token_ids": responses[chosen],
                "chosen_sample_id": chosen,
                "rejected": words[rejected],
                "rejected_token_ids": responses[rejected],
                "rejected_sample_id": rejected,
                "p_hat_chosen": float(p_hat[w]),
                "p_hat_rejected": float(p_hat[l]),
                "p_chosen_beats_rejected": float(P[w, l]),
            }
        )
    return rows


@dataclass(frozen=True)
class Step:
    """One trained iteration: log-probabilities (n,) before and after, in nats."""

    eta: float
    variant: str
    iteration: int
    P: Array
    before: Array
    after: Array

    @property
    def target(self) -> Array:
        """eta (P(y beats pi_t) - 1/2), the log-ratio that the loss asks for, (n,)."""
        return self.eta * (p_hat_weighted(self.P, self.before) - 0.5)

    @property
    def log_ratio(self) -> Array:
        """log pi_{t+1}(y)/pi_t(y), (n,)."""
        return self.after - self.before

    @property
    def exact(self) -> Array:
        """The update of multiplicative weights, eq. (4.1), over the words, (n,)."""
        return softmax(self.before + self.target)

    @property
    def minimiser(self) -> Array:
        """The log-ratios (n,) that minimise the loss over all policies.

        They are the targets unless the words' probabilities would then sum to more than 1.
        """
        weights = np.bincount(np.ravel(couples(len(self.before)))).astype(float)
        pi = np.maximum(np.exp(self.before), 1e-300)
        return l2_log_ratio(pi, self.target, weights)

    @property
    def of_minimiser(self) -> Array:
        """The policy over the words (n,) that minimises the loss."""
        return softmax(self.before + self.minimiser)


class Measures(NamedTuple):
    """What is measured of a trained iteration; TV is total variation over the words."""

    mass_before: float  # probability of all words together
    mass_after: float
    largest_target: float  # |target|, nats
    slope: float  # of the realised log-ratios on the targets
    intercept: float  # nats
    r2: float
    rms: float  # root mean square of realised - target, nats
    tv_moved: float  # from pi_t to the exact update
    tv_trained: float  # from the trained policy to the exact update
    tv_loss: float  # from the trained policy to the minimiser of the loss
    tv_limit: float  # from the minimiser of the loss to the exact update
    minimiser_slope: float  # slope of the minimiser's log-ratios on the targets
    wins: float  # P(trained beats pi_t)
    wins_exact: float  # P(exact update beats pi_t)
    gap: float  # duality gap of the trained policy

    @property
    def tv_share(self) -> float:
        """The distance to the exact update, as a share of what the update moves."""
        return self.tv_trained / max(self.tv_moved, 1e-12)

    @property
    def loss_share(self) -> float:
        """The distance to the minimiser of the loss, as a share of what the update moves."""
        return self.tv_loss / max(self.tv_moved, 1e-12)

    @property
    def departure(self) -> float:
        """The larger of |slope - 1| and the TV share, each over the largest value that passes."""
        return max(abs(self.slope - 1) / SLOPE_ERROR, self.tv_share / TV_SHARE)


def total_variation(p: Array, q: Array) -> float:
    """Total variation distance of two policies (n,)."""
    return 0.5 * float(np.abs(p - q).sum())


def explained(values: Array, fitted: Array) -> float:
    """R^2 of a fit: the share of the values' variance that it explains; 0 if all are equal."""
    total = float(((values - values.mean()) ** 2).sum())
    return 1 - float(((values - fitted) ** 2).sum()) / total if total else 0.0


def measure(step: Step) -> Measures:
    """All measures of one trained iteration."""
    old, new = softmax(step.before), softmax(step.after)
    slope, intercept = np.polyfit(step.target, step.log_ratio, 1)
    return Measures(
        mass_before=float(np.exp(step.before).sum()),
        mass_after=float(np.exp(step.after).sum()),
        largest_target=float(np.abs(step.target).max()),
        slope=float(slope),
        intercept=float(intercept),
        r2=explained(step.log_ratio, slope * step.target + intercept),
        rms=float(np.sqrt(np.mean((step.log_ratio - step.target) ** 2))),
        tv_moved=total_variation(old, step.exact),
        tv_trained=total_variation(new, step.exact),
        tv_loss=total_variation(new, step.of_minimiser),
        tv_limit=total_variation(step.of_minimiser, step.exact),
        minimiser_slope=float(np.polyfit(step.target, step.minimiser, 1)[0]),
        wins=float(new @ step.P @ old),
        wins_exact=float(step.exact @ step.P @ old),
        gap=duality_gap(step.P, new),
    )


class AverageGap(NamedTuple):
    """The duality gap of the average of pi_1 to pi_T, and the bound of theorem 4.1."""

    T: int
    gap: float
    bound: float


def average_gap(steps: list[Step]) -> AverageGap:
    """For the correct iterations of one eta; pi_1 is the policy before the first of them."""
    policies = [softmax(step.before) for step in steps]
    T = len(policies)
    bound = mwu_bound(policies[0], steps[0].eta, T)
    return AverageGap(T, duality_gap(steps[0].P, np.mean(policies, axis=0)), bound)


def correct_claims(steps: list[Step], reachable: bool) -> list[Claim]:
    """What is expected of the correct iterations of one eta, in their order.

    reachable: whether the targets can be reached. If not, as with hundreds of nats, only the
    direction is expected.
    """
    eta = steps[0].eta
    measures = [measure(step) for step in steps]
    name = f"word game, eta {eta:g}"
    claims = [
        Claim(
            TOPIC,
            f"{name}: smallest P(pi_t+1 beats pi_t)",
            min(each.wins for each in measures),
            ">=",
            "0.5",
        )
    ]
    if not reachable:
        return claims
    average = average_gap(steps)
    return [
        Claim(
            TOPIC,
            f"{name}: largest |slope - 1| of log-ratios on targets",
            max(abs(each.slope - 1) for each in measures),
            "<=",
            str(SLOPE_ERROR),
        ),
        Claim(TOPIC, f"{name}: smallest R^2", min(each.r2 for each in measures), ">=", str(R2)),
        Claim(
            TOPIC,
            f"{name}: largest TV to the exact update over the TV that it moves",
            max(each.tv_share for each in measures),
            "<=",
            str(TV_SHARE),
        ),
        Claim(
            TOPIC,
            f"{name}: largest TV to the minimiser of the loss over the TV that the update moves",
            max(each.loss_share for each in measures),
            "<=",
            str(TV_SHARE),
        ),
        *claims,
        Claim(
            TOPIC,
            f"{name}: largest difference of P(pi_t+1 beats pi_t) from the exact update's",
            max(abs(each.wins - each.wins_exact) for each in measures),
            "<=",
            str(WIN_ERROR),
        ),
        Claim(
            TOPIC,
            f"{name}: gap of the average of {average.T} policies over the bound of theorem 4.1",
            average.gap / average.bound,
            "<=",
            "1",
        ),
    ]


def mutant_claim(step: Step) -> Claim:
    """A mutant is expected to fail clearly."""
    return Claim(
        TOPIC,
        f"word game, eta {step.eta:g}, mutant '{step.variant}' fails: the larger of |slope - 1| "
        "and the TV share, over what may pass",
        measure(step).departure,
        ">=",
        str(DEPARTURE),
    )
