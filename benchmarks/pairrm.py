"""How fast PairRM compares responses: ours against llm-blender, on the same machine and prompts.

    .venv/bin/python benchmarks/pairrm.py --model FOLDER --official .cache/llm-blender-*/bin/python

FOLDER is PairRM in llm-blender's layout; tests/parity/official_pairrm.py makes random ones of any size. `--official` is the interpreter
of llm-blender's environment, which `make test-pairrm` makes; there this file runs itself. Prompts are ours, answers 10 to 300 words,
all pairs of K = 5 in both orders, one prompt at a time for llm-blender, as SPPO's rank.py has it. Then the difference that
bfloat16 makes to P.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "src"))

import sppo  # noqa: F401  (sets OMP_WAIT_POLICY before torch is imported)
import numpy as np

from sppo.policies.models import pick_device, start_torch
from sppo.preferences.estimates import win_probabilities

K = 5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument(
        "--official",
        type=Path,
        help="interpreter of llm-blender's environment; not given, ours alone",
    )
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument(
        "--backend",
        choices=["transformers", "llm_blender"],
        default="transformers",
        help="for this file's call of itself",
    )
    args = parser.parse_args()
    start_torch()
    device, groups = pick_device("auto"), questions(args.prompts)
    if args.backend == "llm_blender":
        from sppo.preferences.base import load_preference_model, settings_for

        settings = settings_for(str(args.model), backend="llm_blender")
        timed("llm-blender", load_preference_model(settings, None, device), groups)
        return
    from sppo.preferences.pairrm_network import PairRM

    probabilities = {}
    for precision in ("float32", "bfloat16"):
        model = PairRM(args.model, device, precision)
        probabilities[precision] = np.array(
            [win_probabilities(logits) for logits in timed(f"ours {precision}", model, groups)]
        )
    if args.official:
        subprocess.run(
            [
                args.official,
                __file__,
                "--model",
                args.model,
                "--prompts",
                str(args.prompts),
                "--backend",
                "llm_blender",
            ],
            check=True,
        )
    exact = probabilities["float32"]
    gap = np.abs(exact - probabilities["bfloat16"])
    print(
        f"P by bfloat16   differs from float32's by {gap.max():.4f} at most, {gap.mean():.4f} in the "
        f"mean, where P is {exact.min():.2f} to {exact.max():.2f}"
    )


def questions(prompts: int) -> list[tuple[str, list[str]]]:
    """Instructions of ours, each with K answers made of others."""
    draw = random.Random(0)
    texts = [
        json.loads(line)["instruction"]
        for line in (REPOSITORY / "data/prompts.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    words = " ".join(texts).split()

    def answer() -> str:
        start, length = draw.randrange(len(words) - 300), draw.randrange(10, 300)
        return " ".join(words[start : start + length])

    return [(text, [answer() for _ in range(K)]) for text in draw.sample(texts, prompts)]


def timed(name: str, model, groups: list[tuple[str, list[str]]]) -> list[np.ndarray]:
    """All logits; prints pairs a second, after a warm-up."""
    model.all_pair_logits(groups[:2])
    began = time.perf_counter()
    logits = model.all_pair_logits(groups)
    seconds = time.perf_counter() - began
    print(
        f"{name:15} {len(groups) * K * (K - 1) / seconds:7.1f} ordered pairs/s on {model.device}",
        flush=True,
    )
    return logits


if __name__ == "__main__":
    main()
