"""What a loss can require of the configuration, each with the line that a user reads.

A loss names its requirements in its entry of `sppo.training.losses.LOSSES`; the checks of the
configuration go through them. This module imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sppo.core.errors import UserError

Config = dict[str, Any]


@dataclass(frozen=True)
class Requirement:
    """A condition on a resolved configuration.

    reason: what the loss does, after "train.loss <name>". remedy: what to set. Both are formatted
    with the sections of the configuration, such as {train[tau]}. in_training: whether the section
    `train` alone decides, so that a program that knows only this section can check it too.
    """

    holds: Callable[[Config], bool]
    reason: str
    remedy: str
    in_training: bool = False

    def check(self, name: str, config: Config) -> None:
        """Raise UserError if the configuration does not meet this requirement of loss `name`."""
        if not self.holds(config):
            line = f"config: train.loss {name} {self.reason}; {self.remedy}"
            raise UserError(line.format_map(config))


def smallest(value: float | list[float]) -> float:
    """The smallest value over the iterations of a key that can be a list."""
    return min(value) if isinstance(value, list) else value


# The values of pairs.construction that do not choose by the preferences among the K responses.
WITHOUT_PREFERENCES = ("gold", "graded")
P_HAT = Requirement(
    lambda config: config["pairs"]["construction"] not in WITHOUT_PREFERENCES,
    "learns from P-hat, which pairs.construction {pairs[construction]} does not give",
    "set train.loss: dpo, or another pairs.construction",
)
EVERY_PAIR = Requirement(
    lambda config: (
        config["pairs"]["construction"] == "all"
        and not config["pairs"]["margin"]
        and not config["replay"]["share"]
        and config["pairs"]["truncated"] != "drop"
    ),
    "weights all responses to a prompt against each other",
    "set pairs.construction: all, pairs.margin: 0, replay.share: 0, and pairs.truncated: keep or"
    " leave_out",
)
OTHER_REFERENCE = Requirement(
    lambda config: config["train"]["tau"] > 0 and config["train"]["reference_every"] != 1,
    "stays close to a policy other than pi_t",
    "set train.tau above 0, and train.reference_every: null (the base) or above 1",
)
MAGNET = Requirement(
    lambda config: config["train"]["tau"] == 0 or config["train"]["reference_every"] != 1,
    "draws the policy towards another one than pi_t where train.tau is above 0",
    "set train.reference_every: null (the base) or above 1, or train.tau: 0",
)
OLDER_REFERENCE = Requirement(
    lambda config: config["train"]["reference_every"] != 1,
    "has a regulariser towards a policy other than pi_t",
    "set train.reference_every: null (the base) or above 1",
)
SMOOTHED = Requirement(
    lambda config: config["train"]["label_smoothing"] > 0,
    "takes the logarithm of train.label_smoothing",
    "set train.label_smoothing above 0, such as 0.001",
    in_training=True,
)
TAU_WITHIN_BETA = Requirement(
    lambda config: config["train"]["tau"] <= smallest(config["train"]["beta"]),
    "gives pi_t a negative weight, because train.tau ({train[tau]}) is above train.beta"
    " ({train[beta]})",
    "lower train.tau",
    in_training=True,
)
WHOLE_STEP = Requirement(
    lambda config: (
        config["train"]["micro_batch_size"] >= config["train"]["batch_size"]
        and config["train"]["micro_batch_tokens"] is None
        and config["train"]["processes"] == 1
    ),
    "takes means over a step",
    "set train.micro_batch_size to train.batch_size, train.micro_batch_tokens: null and"
    " train.processes: 1",
    in_training=True,
)
WINNER_FIRST = Requirement(
    lambda config: not config["pairs"]["target_reward"],
    "cannot learn from swapped pairs, which pairs.target_reward adds",
    "set another train.loss, such as dpo or ipo, or pairs.target_reward: false",
)


def trains_on_one_pair(pairs: Config, replay_share: float) -> bool:
    """Whether each prompt gives one pair of its own responses, as the response browser shows it.

    pairs: the section `pairs`. replay_share: the key `replay.share`.
    """
    is_chosen_otherwise = pairs["construction"] in ("all", *WITHOUT_PREFERENCES)
    is_more = pairs["even_lengths"] or pairs["target_reward"] or replay_share
    return not (is_chosen_otherwise or is_more)


def equal_micro_batches(train: Config) -> tuple[int, int]:
    """Pairs in a micro-batch of one process, and micro-batches of one process in a step.

    Raises UserError if batch_size cannot be divided like this over all processes.
    """
    share, left = divmod(train["batch_size"], train["processes"])
    micro = min(train["micro_batch_size"], share)
    if left or share % micro:
        times = f" x train.processes ({train['processes']})" if train["processes"] > 1 else ""
        raise UserError(
            f"config: train.batch_size ({train['batch_size']}) is not a multiple of"
            f" train.micro_batch_size ({train['micro_batch_size']}){times}; change one of them"
        )
    return micro, share // micro
