"""Train a preference model of the embedded form on comparisons that another one made.

    .venv/bin/python src/tools/distil_ranker.py --prompts results/iter1/prompts.parquet \
        --responses results/iter1/responses/0.parquet \
        --preferences results/iter1/preferences/0.parquet \
        --base results/models/SmolLM2-135M-Instruct --comparisons 1000 --output results/proxy

Reads   prompts, responses and preferences of an iteration, the base model
Writes  a folder that `preference.model` takes: adapter.safetensors, ranker.json,
        training_instructions.txt; ranker.json has the agreement with the teacher
Paper   the form is GPM's (2410.02197); learning a proxy of a known preference and measuring how far
        optimisation can be trusted is Gao et al.'s (2210.10760)

All pairs of a prompt's K responses are learned at once, with the cross entropy against the
teacher's P. A fifth of the prompts, by hash, is never learned from. The agreement is measured on
these.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import _path  # noqa: F401
import sppo  # noqa: F401  (sets OMP_WAIT_POLICY before torch is imported)
import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

from sppo.core.artifacts import recorded, written_whole
from sppo.core.errors import UserError, run
from sppo.core.tables import read_table
from sppo.policies.devices import compute_dtype
from sppo.preferences.embedded_data import instruction_hash
from sppo.preferences.embedded_network import (
    PreferenceEmbedder,
    clip_gradients,
    load_base,
    optimizer_of,
    skew_logits,
)
from sppo.preferences.estimates import condorcet_winner, win_probabilities

TESTED = 5  # every fifth prompt, by hash, is for the agreement
PROMPTS_PER_STEP = 4


class Comparisons(NamedTuple):
    """The K responses to one prompt, and the teacher's P[i, j] that i beats j, (K, K)."""

    prompt: str
    responses: list[str]
    P: np.ndarray


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--responses", type=Path, nargs="+", required=True, help="all shards")
    parser.add_argument("--preferences", type=Path, nargs="+", required=True, help="all shards")
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--comparisons", type=int, help="learn from about so many pairs (default: from all)"
    )
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="of the LoRA weights")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    learned, tested = read_comparisons(args)
    torch.manual_seed(args.seed)
    backbone, tokenizer = load_base(args.base, compute_dtype("auto", "cpu"))
    config = backbone.config
    spec: dict[str, Any] = {
        "name": args.output.name,
        "base": args.base.name,
        "base_shape": [config.hidden_size, config.num_hidden_layers, config.vocab_size],
        "layers": min(16, config.num_hidden_layers),
        "lora_from": min(6, config.num_hidden_layers // 2),
        "lora_rank": 16,
        "dimensions": 4,
        "max_prompt_tokens": 96,
        "max_answer_tokens": 208,
        "logit_scale": 1.0,
        "length_weight": 0.0,
        "seed": args.seed,
        "epochs": args.epochs,
        "prompts_per_step": PROMPTS_PER_STEP,
        "learning_rate": args.learning_rate,
        "comparisons": sum(pairs_of(each.responses) for each in learned),
    }
    model = PreferenceEmbedder(backbone, tokenizer, spec, args.seed).train()
    train(args, model, learned)
    spec["logit_scale"] = scale(model, learned)
    spec["held_out"] = agreement(model, tested)
    spec["versions"] = {name: version(name) for name in ("torch", "transformers", "numpy")}
    inputs = [args.prompts, *args.responses, *args.preferences, args.base]
    with recorded("distil", args.output, inputs, vars(args)) as facts:
        write(args.output, model, spec, [each.prompt for each in learned])
        facts |= spec["held_out"] | {"comparisons": spec["comparisons"]}
    print(json.dumps({"comparisons": spec["comparisons"], **spec["held_out"]}))


def pairs_of(responses: list[str]) -> int:
    return len(responses) * (len(responses) - 1) // 2


def read_comparisons(args: argparse.Namespace) -> tuple[list[Comparisons], list[Comparisons]]:
    """The comparisons to learn from, at most --comparisons, and those to test on."""
    words = {row["prompt_id"]: row["messages"] for row in read_table(args.prompts, "prompts")}
    texts: dict[str, dict[int, str]] = {}
    for path in args.responses:
        for row in read_table(path, "responses"):
            texts.setdefault(row["prompt_id"], {})[row["sample_id"]] = row["text"]
    learned, tested, pairs = [], [], 0
    for path in args.preferences:
        for row in read_table(path, "preferences"):
            if row["prompt_id"] not in words or row["prompt_id"] not in texts:
                raise UserError(
                    f"{path} has prompt {row['prompt_id']}, which the prompts or responses lack;"
                    " give all files of one iteration"
                )
            responses = [texts[row["prompt_id"]][sample] for sample in row["sample_ids"]]
            prompt = words[row["prompt_id"]][-1]["content"]
            P = win_probabilities(np.array(row["logits"]), "pairwise")
            found = Comparisons(prompt, responses, P)
            if int(instruction_hash(prompt), 16) % TESTED == 0:
                tested.append(found)
            elif args.comparisons is None or pairs < args.comparisons:
                learned.append(found)
                pairs += pairs_of(responses)
    if not learned or not tested:
        raise UserError("there are too few prompts to learn from and to test on; give more")
    if args.comparisons is not None and pairs < args.comparisons:
        raise UserError(f"there are {pairs} pairs to learn from; lower --comparisons")
    return learned, tested


def upper(matrix: Any) -> Any:
    """The entries of a (K, K) matrix above its diagonal."""
    i, j = np.triu_indices(matrix.shape[0], 1)
    return matrix[i, j]


def train(args: argparse.Namespace, model: PreferenceEmbedder, learned: list[Comparisons]) -> None:
    """Train with AdamW, warm-up and linear decay to zero."""
    model.standardise([(each.prompt, each.responses) for each in learned[:32]])
    draw = np.random.default_rng(args.seed)
    orders = [draw.permutation(len(learned)) for _ in range(args.epochs)]
    steps = [
        order[i : i + PROMPTS_PER_STEP]
        for order in orders
        for i in range(0, len(order), PROMPTS_PER_STEP)
    ]
    optimizer, schedule = optimizer_of(model, args.learning_rate, len(steps))
    for number, step in enumerate(steps, 1):
        total = 0.0
        for index in step:
            prompt, responses, P = learned[index]
            logits = upper(skew_logits(model(prompt, responses)))
            loss = cross_entropy(logits, torch.tensor(upper(P), dtype=logits.dtype))
            (loss / len(step)).backward()
            total += loss.item() / len(step)
        clip_gradients(optimizer)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if number % 20 == 0 or number == len(steps):
            print(f"step {number} of {len(steps)}: loss {total:.4f}", file=sys.stderr, flush=True)


@torch.no_grad()
def logits_on(model: PreferenceEmbedder, comparisons: list[Comparisons]) -> list[np.ndarray]:
    """The logits (K, K) of each prompt's responses, without a scale."""
    model.eval()
    found = [skew_logits(model(each.prompt, each.responses).double()) for each in comparisons]
    model.train()
    return [logits.numpy() for logits in found]


def scale(model: PreferenceEmbedder, learned: list[Comparisons]) -> float:
    """The factor of the logits that fits the teacher's P best, of 0.25 to 4, on 100 prompts."""
    some = learned[:100]
    logits = np.concatenate([upper(each) for each in logits_on(model, some)])
    P = np.concatenate([upper(each.P) for each in some])
    factors = np.geomspace(0.25, 4, 41)
    losses = [np.mean(np.logaddexp(0, factor * logits) - P * factor * logits) for factor in factors]
    return float(factors[int(np.argmin(losses))])


def agreement(model: PreferenceEmbedder, tested: list[Comparisons]) -> dict[str, Any]:
    """How often model and teacher prefer the same response, on prompts that were not learned.

    `agreement`: of the pairs on which the teacher has a preference. `best`: of the prompts, how
    often the model's best response is one of the teacher's best. `without_condorcet_winner`: the
    agreement on prompts where no response beats all others.
    """
    right: list[np.ndarray] = []
    cyclic: list[np.ndarray] = []
    best = []
    for (_, _, P), logits in zip(tested, logits_on(model, tested), strict=True):
        teacher, student = upper(P), upper(logits)
        same = ((teacher > 0.5) == (student > 0))[np.abs(teacher - 0.5) > 1e-9]
        right.append(same)
        if condorcet_winner([P]) == 0:
            cyclic.append(same)
        means = P.mean(1)
        best.append(means[int(logits.mean(1).argmax())] >= means.max() - 1e-9)
    return {
        "prompts": len(tested),
        "agreement": round(float(np.concatenate(right).mean()), 4),
        "best": round(float(np.mean(best)), 4),
        "without_condorcet_winner": (
            round(float(np.concatenate(cyclic).mean()), 4) if cyclic else None
        ),
        "prompts_without_condorcet_winner": len(cyclic),
    }


def write(
    output: Path, model: PreferenceEmbedder, spec: dict[str, Any], prompts: list[str]
) -> None:
    """Write the adapter's folder."""
    tensors = {name: t.to(torch.bfloat16).contiguous() for name, t in model.adapter().items()}
    hashes = sorted(map(instruction_hash, prompts))
    with written_whole(output) as folder:
        folder.mkdir(exist_ok=True)
        save_file(tensors, folder / "adapter.safetensors")
        (folder / "ranker.json").write_text(json.dumps(spec, indent=2) + "\n", encoding="utf-8")
        (folder / "training_instructions.txt").write_text(
            "\n".join(hashes) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    run(main)
