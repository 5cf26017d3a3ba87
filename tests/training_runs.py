"""Pairs, folders and comparisons that the tests of training share.

tests/unit/test_training.py runs the programs in its own process, tests/multi_process in others.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from safetensors.torch import load_file

VOCABULARY = 49152
END_TOKEN = 2


def make_pairs(n: int, seed: int = 0) -> list[dict]:
    """n pairs of random token ids, of many lengths, with P-hats in the range that K = 5 gives."""
    draw = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(low, high))]

    return [
        {
            "pair_id": i,
            "prompt_id": f"p{i}",
            "prompt_token_ids": ids(3, 12),
            "chosen": "a",
            "chosen_token_ids": ids(2, 14) + [END_TOKEN],
            "chosen_sample_id": 0,
            "rejected": "b",
            "rejected_token_ids": ids(2, 14),
            "rejected_sample_id": 1,
            "p_hat_chosen": draw.uniform(0.5, 0.9),
            "p_hat_rejected": draw.uniform(0.1, 0.5),
            "p_chosen_beats_rejected": draw.uniform(0.5, 1.0),
        }
        for i in range(n)
    ]


def option_words(options: dict[str, object]) -> list[str]:
    """Options of a program as words of its command line: {"beta": 1} gives ["--beta", "1"].

    Values with spaces are several words.
    """
    words = []
    for key, value in options.items():
        words += [f"--{key.replace('_', '-')}", *str(value).split()]
    return words


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest difference of any weight."""
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


class TrainingFolder:
    """A folder where trainings of one start policy write policies and logs."""

    def __init__(self, folder: Path, policy: Path) -> None:
        self.folder = folder
        self.policy = policy

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / name / "model.safetensors")

    def start(self) -> dict[str, torch.Tensor]:
        """Weights of the policy that training starts from."""
        return load_file(self.policy / "model.safetensors")

    def log(self, name: str) -> list[dict]:
        """The log of the training `name`, one dictionary a step."""
        lines = (self.folder / f"{name}.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]
