"""Speed of the stages, as ratios to a named baseline that is measured in the same run.

    .venv/bin/python benchmarks/run.py --policy results/models/SmolLM2-135M-Instruct

Generation  our engine, compared with transformers' `generate(do_sample=True)` on the same prompts
            and K
Training    our trainer in bfloat16 and float32, compared with TRL's DPOTrainer (sppo_hard,
            precomputed reference) on the same pairs
Limits      only the matrix products that the stage needs

The speed of a machine varies over time. Compare ratios within one run, not seconds of two runs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "src"))
K = 5  # responses to each prompt

import sppo  # noqa: F401  (sets OMP_WAIT_POLICY before torch is imported)
import torch

from sppo.core.config import default_of, schema
from sppo.policies.generation import Sampling, TransformersEngine
from sppo.policies.models import (
    compute_dtype,
    load_policy,
    pick_device,
    prompt_token_ids,
    start_torch,
)
from sppo.training.logps import frozen_logps, pair_length
from sppo.training.trainer import make_trainer, make_trl_trainer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each response")
    args = parser.parse_args()
    start_torch()
    device = pick_device("auto")
    engine = TransformersEngine(
        args.policy, precision="auto", device=device, attention=None, batch_size=K * args.prompts
    )
    prompts = read_prompts(args.prompts, engine)
    rows = generation(engine, prompts, args.tokens)
    pairs = [
        {
            "pair_id": i,
            "prompt_token_ids": prompt["prompt_token_ids"],
            "chosen_token_ids": rows[K * i]["token_ids"],
            "rejected_token_ids": rows[K * i + 1]["token_ids"],
            "p_hat_chosen": 0.8,
            "p_hat_rejected": 0.2,
            "p_chosen_beats_rejected": 0.9,
        }
        for i, prompt in enumerate(prompts)
    ]
    training(args.policy, pairs, engine, device)


def read_prompts(count: int, engine: TransformersEngine) -> list[dict]:
    """`count` of our prompts as token ids, evenly spread over the file."""
    lines = (REPOSITORY / "data/prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = []
    for line in lines[:: len(lines) // count][:count]:
        row = json.loads(line)
        messages = [{"role": "user", "content": row["instruction"]}]
        ids = prompt_token_ids(engine.tokenizer, messages)
        prompts.append({"prompt_id": row["id"], "prompt_token_ids": ids})
    return prompts


def generation(engine: TransformersEngine, prompts: list[dict], tokens: int) -> list[dict]:
    """Print the tokens per second of our engine and of `generate`; returns our responses."""
    engine.generate(prompts[:2], Sampling(K, 1.0, 1.0, 2), 0, "warm-up")
    began = time.perf_counter()
    rows = engine.generate(prompts, Sampling(K, 1.0, 1.0, tokens), 0, "benchmark")
    ours = sum(len(row["token_ids"]) for row in rows) / (time.perf_counter() - began)
    theirs = speed_of_transformers(engine, prompts, tokens)
    step = sum(products(engine, K * len(prompts)) for _ in range(3)) / 3
    print(
        f"generation      ours {ours:7.0f} tokens/s, transformers {theirs:7.0f}, "
        f"ratio {ours / theirs:.2f}; only the matrix products {K * len(prompts) / step:.0f}"
    )
    return rows


def speed_of_transformers(engine: TransformersEngine, prompts: list[dict], tokens: int) -> float:
    """Tokens per second of transformers' `generate` on the same prompts."""
    pad = engine.stop_ids[0]
    all_ids = [prompt["prompt_token_ids"] for prompt in prompts]
    width = max(map(len, all_ids))
    input_ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in all_ids])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in all_ids])
    torch.manual_seed(0)
    began = time.perf_counter()
    with torch.inference_mode():
        output = engine.model.generate(
            input_ids.to(engine.device),
            attention_mask=mask.to(engine.device),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=K,
            max_new_tokens=tokens,
            pad_token_id=pad,
        )
    seconds = time.perf_counter() - began
    # A response ends with its first stop token. Without one it has the full length.
    stops = (output[:, width:] == pad).int()
    lengths = torch.where(stops.any(1), stops.argmax(1) + 1, stops.shape[1])
    return int(lengths.sum()) / seconds


def products(engine: TransformersEngine, rows: int) -> float:
    """Seconds of the matrix products of one decoding step of `rows` sequences."""
    layers = [m for m in engine.model.modules() if isinstance(m, torch.nn.Linear)]
    inputs = {
        n: torch.randn(rows, n, dtype=engine.dtype, device=engine.device)
        for n in {m.in_features for m in layers}
    }
    with torch.inference_mode():
        began = time.perf_counter()
        for layer in layers:
            layer(inputs[layer.in_features])
        if engine.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began


def training(policy: Path, pairs: list[dict], engine: TransformersEngine, device: str) -> None:
    """Print the tokens per second of one epoch, for our trainer and TRL's in both precisions.

    The time of the reference log-probabilities is not included.
    """
    tokens = sum(
        2 * len(pair["prompt_token_ids"])
        + len(pair["chosen_token_ids"])
        + len(pair["rejected_token_ids"])
        for pair in pairs
    )
    speeds = {}
    for name, precision in (
        ("ours", "auto"),
        ("ours", "float32"),
        ("TRL", "auto"),
        ("TRL", "float32"),
    ):
        dtype = compute_dtype(precision, device)
        with tempfile.TemporaryDirectory() as work:
            trainer = trainer_of(name, policy, pairs, engine, dtype, device, Path(work))
            began = time.perf_counter()
            trainer.train()
            speeds[name, dtype] = tokens / (time.perf_counter() - began)
    longest = max(map(pair_length, pairs))
    for (name, dtype), speed in speeds.items():
        precision = str(dtype).removeprefix("torch.")
        print(
            f"training        {name:4} {precision:8} {speed:7.0f} tokens/s, "
            f"{speed / speeds['TRL', dtype]:.2f} of TRL in {precision} "
            f"({len(pairs)} pairs, longest {longest} tokens)"
        )


def trainer_of(
    name: str,
    policy: Path,
    pairs: list[dict],
    engine: TransformersEngine,
    dtype: torch.dtype,
    device: str,
    work: Path,
) -> Any:
    """The trainer `ours` or `TRL`, ready to start."""
    rules = schema()["properties"]["train"]["properties"]
    options = {key: default_of(rule, "paper") for key, rule in rules.items()} | {
        "loss": "sppo_hard",
        "learning_rate": 1e-5,
        "schedule_total_epochs": 1,
        "batch_size": 8,
        "micro_batch_size": 4,
        "checkpoint_steps": 10_000,
    }
    model = load_policy(policy, torch.float32, device)
    model.config.use_cache = False
    if name == "TRL":
        return make_trl_trainer(model, engine.tokenizer, pairs, options, dtype, device, work, 0)
    scored = []
    for pair, logps in zip(pairs, frozen_logps(model, pairs, dtype, device, 4), strict=True):
        row = dict(pair)
        for role in ("current", "reference"):
            for side in ("chosen", "rejected"):
                row[f"{role}_{side}"] = logps[f"{side}_logp"]
        scored.append(row)
    return make_trainer(model, scored, options, dtype, device, work, 0)


if __name__ == "__main__":
    main()
