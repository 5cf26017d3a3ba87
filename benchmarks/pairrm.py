"""Speed of PairRM: our code beside llm-blender's, on the same random weights and prompts.

    .venv/bin/python benchmarks/pairrm.py

It needs llm-blender's own environment in .cache, which `make test-pairrm` makes; benchmarks/run.py
then has this row too. The network has the size of DeBERTa-v3-base and random weights. Each of the
K = 5 answers to a prompt has 10 to 300 words, cut at 128 tokens. All pairs are compared in both
orders. llm-blender takes one prompt at a time, as in SPPO's rank.py.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "src"))

import sppo  # noqa: F401  (sets OMP_WAIT_POLICY before torch is imported)

from sppo.core.errors import UserError, run
from sppo.policies.devices import pick_device, start_torch
from sppo.preferences.base import Group

K = 5
MAKE = REPOSITORY / "tests/parity/official_pairrm.py"
INSTRUCTIONS = REPOSITORY / "data/prompts.jsonl"
SIZE = (192, 128, INSTRUCTIONS, 768, 12)  # tokens of a prompt and of an answer; width, layers


class Speeds(NamedTuple):
    """Tokens that each program reads per second, with the prompt counted in each ordered pair."""

    ours: float
    theirs: float
    model: Any  # our network
    tokens: int  # of all pairs
    dtype: Any


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--llm-blender", type=Path, help=argparse.SUPPRESS)  # it calls itself
    args = parser.parse_args()
    if args.llm_blender:
        print(json.dumps(seconds_of_llm_blender(args.llm_blender, questions(args.prompts))))
        return
    start_torch()
    official = environment()
    if official is None:
        raise UserError("llm-blender's environment is missing; run make test-pairrm first")
    found = speeds(official, args.prompts, pick_device("auto"))
    print(
        f"PairRM in {found.dtype}: {found.ours:.0f} tokens/s, llm-blender {found.theirs:.0f},"
        f" ratio {found.ours / found.theirs:.2f}"
    )


def environment() -> Path | None:
    """The interpreter of llm-blender's environment, None if there is none."""
    found = sorted((REPOSITORY / ".cache").glob("llm-blender-*/installed"))
    return found[-1].parent / "bin/python" if found else None


def speeds(official: Path, prompts: int, device: str) -> Speeds:
    """Both programs on the same random checkpoint."""
    from sppo.preferences.pairrm_network import PairRM

    groups = questions(prompts)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        run_official(official, [MAKE, "make", model, *SIZE])
        words = [__file__, "--prompts", prompts, "--llm-blender", model / "llm-blender"]
        theirs = json.loads(run_official(official, words).splitlines()[-1])
        network = PairRM(model / "llm-blender", device)
        read = network.read(groups)
        tokens = sum(
            len(prompt.source) + len(prompt.answers[i]) + len(prompt.answers[j])
            for prompt in read
            for i, j in prompt.pairs()
        )
        ours = seconds_of(network.all_pair_logits, groups)
    return Speeds(tokens / ours, tokens / theirs, network.model, tokens, network.dtype)


def run_official(official: Path, words: list[Any]) -> str:
    """What a program prints that runs in llm-blender's environment."""
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY / "src")}
    done = subprocess.run(
        [official, *map(str, words)],
        env=offline,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    return done.stdout


def seconds_of_llm_blender(model: Path, groups: list[tuple[str, list[str]]]) -> float:
    """Seconds of llm-blender for all pairs."""
    from sppo.preferences.base import load_preference_model, settings_for

    settings = settings_for(str(model), backend="llm_blender")
    blender = load_preference_model(settings, None, "auto")
    return seconds_of(blender.all_pair_logits, [Group(*group) for group in groups])


def seconds_of(compare: Any, groups: list[Any]) -> float:
    """Seconds of all groups, after the first was compared once."""
    compare(groups[:1])
    began = time.perf_counter()
    compare(groups)
    return time.perf_counter() - began


def questions(prompts: int) -> list[tuple[str, list[str]]]:
    """Our instructions, each with K answers made of random words from the instructions."""
    draw = random.Random(0)
    lines = INSTRUCTIONS.read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["instruction"] for line in lines]
    words = " ".join(texts).split()

    def answer() -> str:
        start, length = draw.randrange(len(words) - 300), draw.randrange(10, 300)
        return " ".join(words[start : start + length])

    return [(text, [answer() for _ in range(K)]) for text in draw.sample(texts, prompts)]


if __name__ == "__main__":
    run(main)
