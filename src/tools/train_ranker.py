"""Train one of the two embedded preference models on GPT-4's AlpacaEval annotations.

    python src/tools/train_ranker.py --name ranker --base results/models/SmolLM2-135M-Instruct \
        --annotations AE1.parquet AE2.parquet --steps 190 --seed 1 --output data/ranker

1. Take the part of the instructions that belongs to the name (ranker or judge, 40% each, by hash).
2. Form groups of an instruction, its reference answer, models' answers and three corrupted answers.
3. Learn all labelled pairs of a group at once, with the soft cross entropy of sigma(s(i, j)).
4. Fit the scale of the logits and the weight of length on a tenth of the part, which the gradient
   never sees.
5. Write the adapter's folder, complete or not at all.

The budget is a number of steps, so the same settings always give the same adapter on one machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import _path  # noqa: F401
import sppo  # noqa: F401  (sets OMP_WAIT_POLICY before torch is imported)
import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

from sppo.core.errors import run
from sppo.core.flags import at_least
from sppo.policies.devices import compute_dtype
from sppo.preferences.embedded_network import (
    PreferenceEmbedder,
    clip_gradients,
    length_gaps,
    load_base,
    optimizer_of,
    skew_logits,
)
from sppo.preferences.embedded_data import (
    LabelledGroup,
    instruction_hash,
    load_annotations,
    make_groups,
    part_of,
    shorter_weight,
)

CORRUPTED_SHARE = 0.3  # of the loss
GROUPS_PER_STEP = 2
GROUP_SIZE = 7  # models' answers in a group
LONGER_WINS = 0.6  # share of the pairs that the longer answer wins, by weight
CHECK_EVERY = 100  # steps between two evaluations on held-out pairs
DIMENSIONS = 4  # of an answer's embedding, an even number
MAX_PROMPT_TOKENS = 96


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", required=True, choices=("ranker", "judge"))
    parser.add_argument("--base", required=True, type=Path, help="folder of the base model")
    parser.add_argument("--annotations", required=True, nargs="+", type=Path)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--steps", type=at_least(1), default=190)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--lora-from", type=int, default=6)
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--max-answer-tokens", type=int, default=208)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def group_loss(logits: torch.Tensor, group: LabelledGroup, shorter: float) -> torch.Tensor:
    """Mean cross entropy of the labelled pairs of one group.

    logits: (K, K), the logit that answer i beats answer j.
    shorter: weight of the pairs that the shorter answer wins; other pairs have weight 1.
    """

    def mean_loss(pairs: list[tuple[int, int, float]], weights: list[float]) -> torch.Tensor:
        better, worse, target = zip(*pairs)
        losses = cross_entropy(
            logits[list(better), list(worse)], torch.tensor(target), reduction="none"
        )
        return (losses * torch.tensor(weights)).sum() / sum(weights)

    longer = [len(group.texts[i]) > len(group.texts[j]) for i, j, _ in group.pairs]
    loss = mean_loss(group.pairs, [1.0 if wins else shorter for wins in longer])
    if not group.corrupted:
        return loss
    copies = [worse for _, worse, _ in group.corrupted]
    # An off-topic answer loses to every answer of the group, but each copy counts once in all.
    weights = [1 / copies.count(worse) for worse in copies]
    return (1 - CORRUPTED_SHARE) * loss + CORRUPTED_SHARE * mean_loss(group.corrupted, weights)


@torch.no_grad()
def held_out_logits(model: PreferenceEmbedder, groups: list[LabelledGroup]) -> pd.DataFrame:
    """The pairs of held-out groups, one row for each.

    Columns: kind (reference, cross or corrupted), and logit and length gap of (better, worse).
    """
    model.eval()
    rows = []
    for group in groups:
        s = skew_logits(model(group.instruction, group.texts).double())
        gaps = length_gaps(group.texts)
        for i, j, _ in group.pairs:
            kind = "reference" if 0 in (i, j) else "cross"
            rows.append((kind, float(s[i, j]), gaps[i, j]))
        for i, j, _ in group.corrupted:
            rows.append(("corrupted", float(s[i, j]), gaps[i, j]))
    model.train()
    return pd.DataFrame(rows, columns=["kind", "logit", "gap"])


def agreement(rows: pd.DataFrame) -> dict[str, float]:
    """Share of pairs by kind for which the logit, without length, prefers the better answer."""
    return rows["logit"].gt(0).groupby(rows["kind"]).mean().round(4).to_dict()


def calibrate(rows: pd.DataFrame) -> tuple[float, float]:
    """The logit_scale and the length_weight.

    They are the coefficients of a logistic regression of "better wins" on logit and length gap,
    without intercept, by Newton's method. A small ridge penalty keeps them finite for separable
    data.
    """
    x = rows[["logit", "gap"]].to_numpy()
    w = np.zeros(2)
    for _ in range(30):
        lost = 1 / (1 + np.exp(x @ w))
        hessian = (x.T * (lost * (1 - lost))) @ x + 0.01 * np.eye(2)
        w += np.linalg.solve(hessian, x.T @ lost - 0.01 * w)
    return float(w[0]), float(w[1])


def train(
    args: argparse.Namespace, model: PreferenceEmbedder, files: list[Any], held_out: list[Any]
) -> list[dict[str, Any]]:
    """Train with AdamW, warm-up and linear decay to zero at --steps; returns the log's lines."""
    epochs = 0
    groups: list[Any] = []
    log: list[dict[str, Any]] = []
    needed = args.steps * GROUPS_PER_STEP
    while len(groups) < needed:
        groups += make_groups(files, GROUP_SIZE, 1000 * args.seed + epochs, False, args.name)
        epochs += 1
    shorter = shorter_weight(groups, LONGER_WINS)
    model.standardise([(group.instruction, group.texts) for group in groups[:32]])
    optimizer, schedule = optimizer_of(model, args.learning_rate, args.steps)
    began, last_message = time.monotonic(), 0.0
    recent: list[float] = []  # losses since the last line of the log
    for step in range(args.steps):
        for group in groups[step * GROUPS_PER_STEP : (step + 1) * GROUPS_PER_STEP]:
            loss = group_loss(skew_logits(model(group.instruction, group.texts)), group, shorter)
            (loss / GROUPS_PER_STEP).backward()
            recent.append(loss.item())
        clip_gradients(optimizer)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        check = (step + 1) % CHECK_EVERY == 0
        if check or time.monotonic() - last_message >= 60:
            line = {
                "step": step + 1,
                "loss": round(float(np.mean(recent)), 4),
                "seconds": round(time.monotonic() - began),
            }
            if check:
                line |= agreement(held_out_logits(model, held_out[:20]))
            print(json.dumps(line), file=sys.stderr, flush=True)
            log.append(line)
            last_message, recent = time.monotonic(), []
    return log


def write(
    args: argparse.Namespace, model: PreferenceEmbedder, spec: dict[str, Any], files: list[Any]
) -> None:
    """Write the adapter's files into a folder beside --output and then move them there.

    Other files in --output stay, such as the model card and its plot.
    """
    args.output.parent.mkdir(parents=True, exist_ok=True)
    folder = args.output.with_name(f".{args.output.name}.unfinished")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    save_file(
        {name: t.to(torch.bfloat16).contiguous() for name, t in model.adapter().items()},
        folder / "adapter.safetensors",
    )
    (folder / "ranker.json").write_text(json.dumps(spec, indent=2) + "\n")
    hashes = sorted(
        {
            instruction_hash(instruction)
            for frame in files
            for instruction in frame["instruction"].unique()
            if part_of(instruction) == args.name
        }
    )
    (folder / "training_instructions.txt").write_text("\n".join(hashes) + "\n")
    args.output.mkdir(exist_ok=True)
    for file in sorted(folder.iterdir()):
        os.replace(file, args.output / file.name)
    folder.rmdir()


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    files = [load_annotations(path)[0] for path in args.annotations]
    backbone, tokenizer = load_base(args.base, compute_dtype("auto", "cpu"))
    shape = [
        backbone.config.hidden_size,
        backbone.config.num_hidden_layers,
        backbone.config.vocab_size,
    ]
    recipe = {k: v for k, v in vars(args).items() if k not in ("base", "annotations", "output")}
    spec = {
        "name": args.name,
        "base": args.base.name,
        "base_shape": shape,
        **recipe,
        "groups_per_step": GROUPS_PER_STEP,
        "group_size": GROUP_SIZE,
        "dimensions": DIMENSIONS,
        "max_prompt_tokens": MAX_PROMPT_TOKENS,
        "longer_wins": LONGER_WINS,
        "check_every": CHECK_EVERY,
        "logit_scale": 1.0,
        "length_weight": 0.0,
    }
    model = PreferenceEmbedder(backbone, tokenizer, spec, args.seed).train()
    held_out = make_groups(files, GROUP_SIZE, args.seed, True, args.name)
    spec["log"] = train(args, model, files, held_out)
    final = held_out_logits(model, held_out)
    spec["logit_scale"], spec["length_weight"] = calibrate(final[final["kind"] == "reference"])
    spec["held_out"] = {"n": final["kind"].value_counts().to_dict(), "agreement": agreement(final)}
    spec["annotations"] = [path.name for path in args.annotations]
    spec["versions"] = {p: version(p) for p in ("torch", "transformers", "numpy", "pandas")}
    spec["license"] = "CC-BY-NC-4.0 (inherited from the AlpacaEval annotations)"
    write(args, model, spec, files)


if __name__ == "__main__":
    run(main)
