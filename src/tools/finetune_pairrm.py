"""Fine-tune PairRM on a preference data set of your own.

    python src/tools/finetune_pairrm.py --model PAIRRM_FOLDER --pairs pairs.jsonl --output my_ranker

Reads   a folder with the files of llm-blender/PairRM or PairRM-hf, and a preference data set in
        TRL's form: a file, a folder, or a data set on the hub
Writes  a folder in the layout of --model, which `preference.model` takes, with a card (README.md)
        and hashes of the training instructions. The card has the agreement with held-out labels
        before and after.
Paper   LLM-Blender, 2306.02561: each pair is read in both orders, with cross entropy of its label
Departs from the paper: AdamW with linear decay, no dropout, one label for a pair; the prompt is the
        user's last message

A tenth of the instructions is held out, by hash. Weights are float32, and a GPU computes in
bfloat16 where it can.
"""

from __future__ import annotations

import argparse
import math
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn.functional import logsigmoid

import _path  # noqa: F401
import sppo  # noqa: F401  (sets OMP_WAIT_POLICY before torch is imported)
from sppo.core.artifacts import recorded, written_whole
from sppo.core.config import DEVICES
from sppo.core.errors import UserError, run
from sppo.core.flags import at_least
from sppo.core.progress import progress
from sppo.policies.devices import compute_dtype, pick_device, start_torch
from sppo.preferences.embedded_data import for_calibration, instruction_hash
from sppo.preferences.labelled_pairs import read_labelled_pairs
from sppo.preferences.length_batches import batches
from sppo.preferences.pairrm_files import check_pairrm
from sppo.preferences.pairrm_network import PairRM
from sppo.reporting.cards import table

Triple = tuple[Any, Any, Any]  # ids of a prompt, of the chosen answer and of the rejected one
WARM_UP = 0.1  # of the steps
MAX_GRAD_NORM = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, type=Path, help="folder of a PairRM")
    parser.add_argument("--pairs", required=True, help="preference data set")
    parser.add_argument("--split", default="train", help="of a data set on the hub")
    parser.add_argument("--revision", help="of a data set on the hub")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--epochs", type=at_least(1), default=1)
    parser.add_argument("--batch-size", type=at_least(1), default=32, help="pairs in a step")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--batch-tokens", type=at_least(64), default=8192, help="of a forward pass")
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    layout = check_pairrm(args.model)
    if args.output.exists():
        raise UserError(f"{args.output} exists; name a new folder as --output")
    frame, excluded = read_labelled_pairs(args.pairs, args.revision, args.split)
    held_out = frame["instruction"].map(for_calibration)
    if held_out.all() or not held_out.any():
        raise UserError(
            f"{args.pairs} has {frame['instruction'].nunique()} instructions, too few to train and"
            " to hold out a tenth; give more"
        )
    start_torch()
    torch.manual_seed(args.seed)
    device = pick_device(args.device)
    model = PairRM(args.model, device, precision="float32", batch_tokens=args.batch_tokens)
    training = read_triples(model, frame[~held_out].to_dict("records"))
    checked = read_triples(model, frame[held_out].to_dict("records"))
    if not training or not checked:
        raise UserError(
            f"{args.pairs}: the answers of all pairs are equal where the model cuts them; give"
            " pairs that differ earlier"
        )
    inputs = [args.model, *(path for path in [Path(args.pairs)] if path.exists())]
    with recorded("preference_source", args.output, inputs, vars(args)) as facts:
        before = agreement(model, checked)
        steps = train(model, training, args)
        after = agreement(model, checked)
        facts |= {"layout": layout, "steps": steps, "before": before, "after": after}
        facts |= {"pairs": len(training), "held_out_pairs": len(checked), "excluded": excluded}
        with written_whole(args.output) as folder:
            shutil.copytree(args.model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
            weights = {name: value.cpu() for name, value in model.model.state_dict().items()}
            save_file(weights, folder / "model.safetensors", {"format": "pt"})
            hashes = {instruction_hash(text) for text in frame["instruction"][~held_out]}
            (folder / "training_instructions.txt").write_text("\n".join(sorted(hashes)) + "\n")
            (folder / "README.md").write_text(card(args, facts), encoding="utf-8")
    print(
        f"agreement with {len(checked)} held-out labels: {before['agreement']:.3f} before,"
        f" {after['agreement']:.3f} after"
    )


def read_triples(model: PairRM, rows: list[dict[str, Any]]) -> list[Triple]:
    """The truncated ids of each row. Pairs that are equal after truncation are left out."""
    groups = [(row["instruction"], [row["output_1"], row["output_2"]]) for row in rows]
    read = model.read(groups)
    found = []
    for each in read:
        if len(each.answers) == 2:
            first, second = each.answers
            found.append((each.source, first, second))
    return found


def passes(triples: list[Triple], budget: int) -> list[list[Triple]]:
    """The triples in forward passes of at most `budget` tokens, with both orders of a pair."""
    lengths = [2 * sum(map(len, triple)) for triple in triples]
    return [[triples[index] for index in batch] for batch in batches(lengths, budget)]


def losses(model: PairRM, triples: list[Triple]) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each pair, and its logit that the chosen answer wins (mean of both orders)."""
    swapped = [(source, second, first) for source, first, second in triples]
    dtype = compute_dtype("auto", model.device)
    is_mixed = model.device != "cpu" and dtype != torch.float32
    with torch.autocast(model.device, dtype=torch.bfloat16, enabled=is_mixed):
        logits = model.model(*model.inputs(triples + swapped)).float()
    chosen_first, chosen_second = logits.split(len(triples))
    both = -(logsigmoid(chosen_first) + logsigmoid(-chosen_second)) / 2
    return both, (chosen_first - chosen_second) / 2


@torch.no_grad()
def agreement(model: PairRM, triples: list[Triple]) -> dict[str, float]:
    """Share of pairs whose chosen answer wins, and the mean loss."""
    found = [losses(model, batch) for batch in passes(triples, model.batch_tokens)]
    logits = torch.cat([logit for _, logit in found])
    loss = torch.cat([loss for loss, _ in found]).mean().item()
    wins = (logits > 0).float() + (logits == 0).float() / 2
    return {"agreement": wins.mean().item(), "loss": loss}


def train(model: PairRM, triples: list[Triple], args: argparse.Namespace) -> int:
    """Train all weights; returns the number of steps. UserError if the loss is not finite."""
    order = random.Random(args.seed)
    steps: list[list[Triple]] = []
    for _ in range(args.epochs):
        shuffled = order.sample(triples, len(triples))
        starts = range(0, len(shuffled), args.batch_size)
        steps += [shuffled[start : start + args.batch_size] for start in starts]
    optimizer = torch.optim.AdamW(model.model.parameters(), args.learning_rate, weight_decay=0.0)
    warm_up = math.ceil(WARM_UP * len(steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, (len(steps) - step) / (len(steps) - warm_up + 1)),
    )
    model.model.eval()  # without dropout
    for number, step in enumerate(progress(steps, "steps"), 1):
        for batch in passes(step, args.batch_tokens):
            loss = losses(model, batch)[0].sum() / len(step)
            loss.backward()
            if not torch.isfinite(loss):
                raise UserError(f"the loss of step {number} is not finite; lower --learning-rate")
        torch.nn.utils.clip_grad_norm_(model.model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return len(steps)


def card(args: argparse.Namespace, facts: dict[str, Any]) -> str:
    """The model's card."""
    measured = {
        "agreement with held-out labels, before": facts["before"]["agreement"],
        "agreement with held-out labels, after": facts["after"]["agreement"],
        "loss on held-out pairs, before": facts["before"]["loss"],
        "loss on held-out pairs, after": facts["after"]["loss"],
        "held-out pairs": facts["held_out_pairs"],
    }
    recipe = {
        "pairs": facts["pairs"],
        "steps": facts["steps"],
        "pairs in a step": args.batch_size,
        "learning rate": args.learning_rate,
        "seed": args.seed,
    }
    return (
        f"# A preference model, fine-tuned from {args.model.name}\n\nPairRM"
        " (https://arxiv.org/abs/2306.02561) on pairs of"
        f" {Path(args.pairs).name}. A tenth of the instructions is held out, by hash.\n\n"
        f"## Measured\n\n{table(measured)}\n## Recipe\n\n{table(recipe)}\n## Licence\n\n"
        "The model that it started from and the pairs have their own licences.\n"
    )


if __name__ == "__main__":
    run(main)
