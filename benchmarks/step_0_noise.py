"""Rounding errors of log-ratios before the first step. They set the tolerance of the step-0 check.

    .venv/bin/python benchmarks/step_0_noise.py --policy results/models/SmolLM2-135M-Instruct

Reads   the policy; our prompts, evaluation instructions and gold responses as texts of all lengths
Prints  for each precision:
        * the difference between two scorings of the same responses, with other neighbours and
          other padding: standard deviation and largest value, by length of the response;
        * the number of false alarms in 10,000 random draws of a first step's pairs;
        * the share of draws in which the check detects a policy that is a small step away. The step
          moves each weight by the same size against the gradient of SPPO's loss. The first step of
          AdamW with this learning rate does the same. So does RMSProp with a tenth of the rate,
          because its mean of squares starts at 0.

First, each weight is changed at random by up to 1/512 of itself. The embedded policy's weights
have four bits, and many of them are halfway between two numbers of bfloat16. Without the change the
smallest step would change the rounding of all these weights along the gradient and move the policy
by a nat per response.

The program takes half an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "src"))

import sppo  # noqa: F401  (sets OMP_WAIT_POLICY before torch is imported)
import torch

from sppo.core.config import DEVICES
from sppo.policies.chats import load_tokenizer, prompt_token_ids
from sppo.policies.devices import pick_device, start_torch
from sppo.policies.models import load_policy
from sppo.training.batches import collate
from sppo.training.logps import forward_precision, response_logps, token_logps
from sppo.training.trainer import identity_fault

DRAWS = 10_000
PAIRS = (1, 4, 16, 64)  # pairs in a step
LENGTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
STEPS = (1e-6, 3e-6, 1e-5)
Sequences = list[tuple[list[int], list[int]]]  # token ids of prompt and response


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", type=Path, required=True)
    parser.add_argument("--responses", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0, help="seed of texts, weights and batches")
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument(
        "--precision", choices=["bfloat16", "float32"], nargs="*", default=["bfloat16", "float32"]
    )
    args = parser.parse_args()
    start_torch()
    device = pick_device(args.device)
    sequences = read_sequences(args.policy, args.responses, args.seed)
    for name in args.precision:
        measure(args.policy, sequences, getattr(torch, name), device, args.seed)


def read_sequences(policy: Path, count: int, seed: int) -> Sequences:
    """Prompts and responses as token ids; responses have a few to 401 tokens."""
    tokenizer = load_tokenizer(policy)
    draw = random.Random(seed)
    data = REPOSITORY / "data"
    instructions = [json.loads(line)["instruction"] for line in (data / "prompts.jsonl").open()]
    evaluation = json.loads((data / "evaluation.json").read_text())
    instructions += [row["instruction"] for row in evaluation]
    gold = [json.loads(line)["response"] for line in (data / "gold.jsonl").open()]
    texts = instructions + gold + [" ".join(draw.sample(gold, 3)) for _ in range(60)]
    draw.shuffle(texts)
    found = []
    for text in texts[:count]:
        messages = [{"role": "user", "content": draw.choice(instructions)}]
        ids = tokenizer(text, add_special_tokens=False).input_ids[:400]
        found.append((prompt_token_ids(tokenizer, messages), [*ids, tokenizer.eos_token_id]))
    return found


def measure(policy: Path, sequences: Sequences, dtype: torch.dtype, device: str, seed: int) -> None:
    """Print the figures of one precision."""
    model = load_generic(policy, device, seed)
    by_length = sorted(range(len(sequences)), key=lambda i: sum(map(len, sequences[i])))
    shuffled = random.Random(seed + 1).sample(by_length, len(by_length))
    one = score(model, sequences, by_length, 16, dtype, device)
    two = score(model, sequences, shuffled, 7, dtype, device)
    noise = [a - b for a, b in zip(one, two, strict=True)]
    print(f"\n{dtype}: {len(noise)} responses, {sum(map(len, noise))} tokens\n")
    print_noise(noise)
    false_alarms = ", ".join(str(alarms(noise, one, dtype, DRAWS, pairs)) for pairs in PAIRS)
    print(f"\nFalse alarms in {DRAWS} draws of {PAIRS} pairs: {false_alarms}", flush=True)
    subset = shuffled[:400]
    for step in STEPS:
        moved = load_generic(policy, device, seed)
        take_step(moved, [sequences[i] for i in shuffled[-16:]], step, dtype, device)
        after = score(moved, sequences, subset, 7, dtype, device)
        ratios = [after[i] - one[i] for i in subset]
        size = torch.stack([row.sum() for row in ratios]).square().mean().sqrt()
        before = [one[i] for i in subset]
        found = [alarms(ratios, before, dtype, 1000, pairs) for pairs in PAIRS]
        detected = ", ".join(f"{number / 10:.1f}%" for number in found)
        print(
            f"A step of {step:g}: log-ratios of {size:.3f} nats, detected in {detected}", flush=True
        )


def print_noise(noise: list[torch.Tensor]) -> None:
    """Print a table of the differences, which are given for each token of each response."""
    print(
        "| first tokens | responses | standard deviation | largest "
        "| relative to one token's deviation x sqrt(n) |"
    )
    print("|--:|--:|--:|--:|--:|")
    token_deviation = torch.cat(noise).std().item()
    for n in LENGTHS:
        sums = torch.stack([row[:n].sum() for row in noise if len(row) >= n])
        deviation = sums.std().item()
        print(
            f"| {n} | {len(sums)} | {deviation:.4f} | {sums.abs().max():.4f} | "
            f"{deviation / token_deviation / n**0.5:.2f} |"
        )


@torch.no_grad()
def load_generic(policy: Path, device: str, seed: int) -> torch.nn.Module:
    """The policy, with weights that are not near to numbers of bfloat16."""
    model = load_policy(policy, torch.float32, "cpu")
    draw = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.mul_(1 + (2 * torch.rand(weight.shape, generator=draw) - 1) / 512)
    return model.to(device)


@torch.inference_mode()
def score(
    model: torch.nn.Module,
    sequences: Sequences,
    order: list[int],
    size: int,
    dtype: torch.dtype,
    device: str,
) -> list[torch.Tensor]:
    """Log-probabilities of each response's tokens, scored in batches of `size` in this order.

    Returns one float64 vector for each sequence; it is empty for sequences not in `order`.
    """
    found: dict[int, torch.Tensor] = {}
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        batch = collate(*zip(*(sequences[i] for i in rows), strict=True))
        batch = {key: value.to(device) for key, value in batch.items()}
        with forward_precision(device, dtype):
            logps = token_logps(model, batch).cpu().double()
        for row, i in zip(logps, rows, strict=True):
            found[i] = row[: len(sequences[i][1])]
    return [found.get(i, torch.empty(0)) for i in range(len(sequences))]


def alarms(
    ratios: list[torch.Tensor],
    logps: list[torch.Tensor],
    dtype: torch.dtype,
    draws: int,
    pairs: int,
) -> int:
    """The number of draws in which the step-0 check takes the policy for another one.

    A draw has two responses for each pair. Each response is cut at a random length, because the
    first tokens of a response are a response too.
    """
    draw = random.Random(2)
    found = 0
    for _ in range(draws):
        drawn = [draw.randrange(len(ratios)) for _ in range(2 * pairs)]
        lengths = [draw.randint(1, len(ratios[i])) for i in drawn]
        sums, logp_sums = (
            torch.stack([rows[i][:length].sum() for i, length in zip(drawn, lengths, strict=True)])
            for rows in (ratios, logps)
        )
        tokens = torch.tensor(lengths, dtype=sums.dtype)
        found += identity_fault(sums, logp_sums, tokens, dtype) is not None
    return found


def take_step(
    model: torch.nn.Module, sequences: Sequences, step: float, dtype: torch.dtype, device: str
) -> None:
    """Move each weight by `step` against its gradient; the first half of the responses wins."""
    batch = collate(*zip(*sequences, strict=True))
    with forward_precision(device, dtype):
        logps = response_logps(model, {key: value.to(device) for key, value in batch.items()})
    winners, losers = logps.chunk(2)
    # The gradient of SPPO's loss at log-ratio 0, up to a factor, if all targets have one size.
    (losers.sum() - winners.sum()).backward()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.grad is not None:
                weight.sub_(step * weight.grad.sign())


if __name__ == "__main__":
    main()
