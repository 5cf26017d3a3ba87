"""Training speed of a full-size policy on one GPU, as a table row in JSON.

    .venv/bin/python benchmarks/train_throughput.py --trainer ours

The policy has one of the shapes of --shape and random weights. The pairs have 512 + 512 random
tokens, and the responses are trained on. With --ragged their lengths are drawn at random up to
these numbers, as in chats: log-normal with a standard deviation of 0.8 and a median of a third.

--trainer  ours             computes reference log-probabilities once, with the code of
                            src/score_reference.py, and then runs our trainer
           trl              TRL's DPOTrainer with its defaults: the reference policy is in memory
                            beside the policy and is evaluated in each step
           trl_precomputed  the same, but reference log-probabilities are computed before the first
                            step

Run each trainer in its own process, so that peak memory is measured for it alone. The seconds per
step are the mean of the steps after --warmup. They include the step's share of the reference pass
and of the setup of the trainer. Tokens are the pairs' own, without padding, and with the prompt in
both sequences of a pair.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "src"))

import sppo  # noqa: F401  (sets OMP_WAIT_POLICY before torch is imported)
import torch
from tokenizers import Tokenizer, models
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from sppo.core.artifacts import package_versions
from sppo.core.config import DEVICES, default_of, schema
from sppo.policies.devices import compute_dtype, pick_device, start_torch
from sppo.training.lengths import sequence_tokens
from sppo.training.logps import frozen_logps
from sppo.training.trainer import in_training_order, make_trainer, make_trl_trainer

SHAPES = {
    "mistral-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
    },
    "tiny": {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "sliding_window": None,
    },
}


class Clock(TrainerCallback):
    """Records the time at which each step ended."""

    def __init__(self, device: str) -> None:
        self.device, self.ends = device, []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        synchronise(self.device)
        self.ends.append(time.perf_counter())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trainer", choices=["ours", "trl", "trl_precomputed"], required=True)
    parser.add_argument("--shape", choices=SHAPES, default="mistral-7b")
    parser.add_argument("--layers", type=int, help="fewer layers, for a GPU with less memory")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--response-tokens", type=int, default=512)
    parser.add_argument("--ragged", action="store_true", help="draw the lengths, see above")
    parser.add_argument("--batch-size", type=int, default=64, help="pairs in a step")
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--micro-batch-tokens", type=int, help="instead, only for ours")
    parser.add_argument("--lora-rank", type=int, default=0)
    parser.add_argument(
        "--no-checkpointing",
        action="store_true",
        help="keep activations; the default, as in TRL, is to compute them twice",
    )
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument(
        "--warmup", type=int, default=2, help="number of first steps that do not count"
    )
    parser.add_argument(
        "--peak-tflops",
        type=float,
        help="peak by the data sheet of the device; by default measured with a large product",
    )
    parser.add_argument("--device", choices=DEVICES, default="auto")
    args = parser.parse_args()
    if not 1 <= args.warmup < args.steps:
        parser.error("--warmup must be at least 1 and below --steps")
    if args.micro_batch_tokens and args.trainer != "ours":
        parser.error("TRL has no --micro-batch-tokens")
    start_torch()
    device = pick_device(args.device)
    dtype = compute_dtype("auto", device)
    row = {
        "trainer": args.trainer,
        "shape": args.shape,
        "layers": args.layers or SHAPES[args.shape]["num_hidden_layers"],
        "tokens": f"{args.prompt_tokens} + {args.response_tokens}",
        "ragged": args.ragged,
        "batch_size": args.batch_size,
        "micro_batch_size": args.micro_batch_size,
        "micro_batch_tokens": args.micro_batch_tokens,
        "lora_rank": args.lora_rank,
        "checkpointing": not args.no_checkpointing,
        "computed_in": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "packages": package_versions(),
    }
    try:
        row |= measured(args, device, dtype)
    except torch.OutOfMemoryError:
        row |= {"out_of_memory": True}
    print(json.dumps(row))


def measured(args: argparse.Namespace, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Seconds per step, tokens per second, MFU and peak memory of one trainer."""
    rules = schema()["properties"]["train"]["properties"]
    options = {key: default_of(rule, "paper") for key, rule in rules.items()} | {
        "loss": "sppo_hard",
        "batch_size": args.batch_size,
        "micro_batch_size": args.micro_batch_size,
        "micro_batch_tokens": args.micro_batch_tokens,
        "lora_rank": args.lora_rank,
        "gradient_checkpointing": not args.no_checkpointing,
        "checkpoint_steps": args.steps,
        "schedule_total_epochs": 1,
    }
    shape = dict(SHAPES[args.shape])
    if args.layers:
        shape["num_hidden_layers"] = args.layers
    pairs = random_pairs(args, shape["vocab_size"])
    model = random_policy(shape, device)
    clock, began = Clock(device), time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        if args.trainer == "ours":
            rows = frozen_logps(
                model, pairs, dtype, device, args.micro_batch_size, args.micro_batch_tokens
            )
            for pair, row in zip(pairs, rows, strict=True):
                for role in ("current", "reference", "opponents"):
                    for side in ("chosen", "rejected"):
                        pair[f"{role}_{side}"] = row[f"{side}_logp"]
            trainer = make_trainer(model, pairs, options, dtype, device, Path(work), 0)
        else:
            reference = random_policy(shape, device) if args.trainer == "trl" else None
            trainer = make_trl_trainer(
                model,
                tokenizer(shape["vocab_size"]),
                pairs,
                options,
                dtype,
                device,
                Path(work),
                0,
                reference,
            )
        synchronise(device)
        # TRL by default evaluates the reference in each step, so its step already includes it.
        before = 0.0 if args.trainer == "trl" else (time.perf_counter() - began) / args.steps
        trainer.add_callback(clock)
        trainer.train()
    steps = args.steps - args.warmup
    step = (clock.ends[-1] - clock.ends[args.warmup - 1]) / steps + before
    counted = in_training_order(pairs, options, 0)[args.warmup * args.batch_size :]
    tokens = sum(sequence_tokens(pair) for pair in counted) / steps
    if device == "cuda":
        memory = torch.cuda.max_memory_allocated()
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
    peak = args.peak_tflops or product_tflops(dtype, device)
    needed = sum(
        flops(len(pair["prompt_token_ids"]), len(pair[f"{side}_token_ids"]), shape)
        for pair in counted
        for side in ("chosen", "rejected")
    )
    mfu_percent = 100 * needed / steps / step / peak / 1e12
    shares = getattr(trainer, "shares", [])[args.warmup :]
    return {
        "steps": steps,
        "seconds_a_step": round(step, 3),
        "of_these_reference_beforehand": round(before, 3),
        "tokens_per_second": round(tokens / step, 1),
        "mfu_percent": round(mfu_percent, 2),
        "peak_tflops": round(peak, 3),
        "peak_from": "data sheet" if args.peak_tflops else "measured",
        "peak_memory_gib": round(memory / 2**30, 2),
        # Of our trainer: the pairs' tokens, with the prompt once, over those that are computed.
        "padded_share": round(sum(share["padded_share"] for share in shares) / steps, 3) or None,
    }


def random_pairs(args: argparse.Namespace, vocabulary: int) -> list[dict[str, Any]]:
    """Pairs of random tokens for all steps."""
    draw = torch.Generator().manual_seed(0)
    lengths = random.Random(0)

    def ids(longest: int) -> list[int]:
        length = longest
        if args.ragged:
            drawn = round(longest / 3 * math.exp(lengths.gauss(0.0, 0.8)))
            length = max(1, min(longest, drawn))
        return torch.randint(3, vocabulary, (length,), generator=draw).tolist()

    return [
        {
            "pair_id": i,
            "prompt_token_ids": ids(args.prompt_tokens),
            "chosen_token_ids": ids(args.response_tokens),
            "rejected_token_ids": ids(args.response_tokens),
            "p_hat_chosen": 0.8,
            "p_hat_rejected": 0.2,
            "p_chosen_beats_rejected": 0.9,
        }
        for i in range(args.batch_size * args.steps)
    ]


def random_policy(shape: dict[str, Any], device: str) -> MistralForCausalLM:
    """A float32 policy of this shape; each call gives the same weights."""
    torch.manual_seed(0)
    with torch.device(device):
        model = MistralForCausalLM(
            MistralConfig(
                **shape,
                tie_word_embeddings=False,
                use_cache=False,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            )
        )
    return model.eval()


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer from which TRL takes the pad id; the pairs are token ids already."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, vocabulary)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "<pad>")),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )


def flops(prompt: int, response: int, shape: dict[str, Any]) -> float:
    """FLOPs that the training on a sequence of these tokens needs, in any implementation.

    They are a forward pass of the reference, and a forward and a backward pass (twice a forward
    pass) of the policy. A pass has the products with weights, the logits of the response only, and
    causal attention. Activations that are computed twice count once.
    """
    length = prompt + response
    hidden = shape["hidden_size"]
    keys = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    layer = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * shape["intermediate_size"]
    forward = (
        shape["num_hidden_layers"] * (2 * layer * length + 2 * hidden * length**2)
        + 2 * hidden * shape["vocab_size"] * response
    )
    return (1 + 3) * forward


def product_tflops(dtype: torch.dtype, device: str) -> float:
    """TFLOP/s of one large matrix product, as an upper limit for this machine.

    It is the fastest of ten measurements. No training reaches it.
    """
    size = 8192 if device == "cuda" else 512
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        a @ b
        synchronise(device)
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds) / 1e12


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
