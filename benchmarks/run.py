"""How fast the stages are, as ratios against a named baseline measured in the same run.

    .venv/bin/python benchmarks/run.py --policy results/models/SmolLM2-135M-Instruct

Generation  our engine                     against  transformers' own `generate(do_sample=True)`, same prompts and K
Training    our trainer, bfloat16, float32 against  TRL's DPOTrainer (sppo_hard, precomputed reference), same pairs
Limits      matrix products of the shapes that the stage needs, and nothing else

Machines are noisy: look at ratios within one run, not at seconds across runs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "src"))

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
    parser.add_argument("--tokens", type=int, default=64, help="of each response")
    args = parser.parse_args()
    start_torch()
    device = pick_device("auto")
    engine = TransformersEngine(
        args.policy, precision="auto", device=device, attention=None, batch_size=5 * args.prompts
    )
    lines = (REPOSITORY / "data/prompts.jsonl").read_text(encoding="utf-8").splitlines()
    chosen = [json.loads(line) for line in lines[:: len(lines) // args.prompts][: args.prompts]]
    prompts = [
        {
            "prompt_id": row["id"],
            "prompt_token_ids": prompt_token_ids(
                engine.tokenizer, [{"role": "user", "content": row["instruction"]}]
            ),
        }
        for row in chosen
    ]
    rows = generation(engine, prompts, args.tokens)
    pairs = [
        {
            "pair_id": i,
            "prompt_token_ids": p["prompt_token_ids"],
            "chosen_token_ids": rows[5 * i]["token_ids"],
            "rejected_token_ids": rows[5 * i + 1]["token_ids"],
            "p_hat_chosen": 0.8,
            "p_hat_rejected": 0.2,
            "p_chosen_beats_rejected": 0.9,
        }
        for i, p in enumerate(prompts)
    ]
    training(args.policy, pairs, engine, device)


def generation(engine: TransformersEngine, prompts: list[dict], tokens: int) -> list[dict]:
    """Tokens a second of ours and of plain `generate`; returns our responses."""
    engine.generate(prompts[:2], Sampling(5, 1.0, 1.0, 2), 0, "warm-up")
    began = time.perf_counter()
    rows = engine.generate(prompts, Sampling(5, 1.0, 1.0, tokens), 0, "benchmark")
    ours = sum(len(row["token_ids"]) for row in rows) / (time.perf_counter() - began)

    width = max(len(p["prompt_token_ids"]) for p in prompts)
    ids = torch.tensor(
        [
            [engine.stop_ids[0]] * (width - len(p["prompt_token_ids"])) + p["prompt_token_ids"]
            for p in prompts
        ]
    )
    mask = torch.tensor(
        [
            [0] * (width - len(p["prompt_token_ids"])) + [1] * len(p["prompt_token_ids"])
            for p in prompts
        ]
    )
    torch.manual_seed(0)
    began = time.perf_counter()
    with torch.inference_mode():
        output = engine.model.generate(
            ids.to(engine.device),
            attention_mask=mask.to(engine.device),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=5,
            max_new_tokens=tokens,
            pad_token_id=engine.stop_ids[0],
        )
    seconds = time.perf_counter() - began
    ends = (output[:, width:] == engine.stop_ids[0]).int()
    theirs = int(torch.where(ends.any(1), ends.argmax(1) + 1, ends.shape[1]).sum()) / seconds
    matmuls = sum(products(engine, 5 * len(prompts)) for _ in range(3)) / 3
    print(
        f"generation      ours {ours:7.0f} tokens/s, transformers {theirs:7.0f}, ratio {ours / theirs:.2f}; "
        f"its matrix products alone {5 * len(prompts) / matmuls:.0f}"
    )
    return rows


def products(engine: TransformersEngine, rows: int) -> float:
    """Seconds that one decoding step spends at least: every linear layer once, on `rows` sequences."""
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
    """Pairs a second of one epoch: ours in bfloat16 and float32, and TRL's, references not counted."""
    options = {
        key: default_of(rule, "paper")
        for key, rule in schema()["properties"]["train"]["properties"].items()
    }
    options |= {
        "loss": "sppo_hard",
        "learning_rate": 1e-5,
        "schedule_total_epochs": 1,
        "batch_size": 8,
        "micro_batch_size": 4,
        "checkpoint_steps": 10_000,
    }
    tokens = sum(
        2 * len(p["prompt_token_ids"]) + len(p["chosen_token_ids"]) + len(p["rejected_token_ids"])
        for p in pairs
    )
    found = {}
    for name, precision in (
        ("ours", "auto"),
        ("ours", "float32"),
        ("TRL", "auto"),
        ("TRL", "float32"),
    ):
        dtype = compute_dtype(precision, device)
        model = load_policy(policy, torch.float32, device)
        model.config.use_cache = False
        with tempfile.TemporaryDirectory() as work:
            if name == "TRL":
                trainer = make_trl_trainer(
                    model, engine.tokenizer, pairs, options, dtype, device, Path(work), 0
                )
            else:
                logps = frozen_logps(model, pairs, dtype, device, 4)
                scored = [
                    {
                        **p,
                        **{
                            f"{of}_{side}": r[f"{side}_logp"]
                            for of in ("current", "reference")
                            for side in ("chosen", "rejected")
                        },
                    }
                    for p, r in zip(pairs, logps, strict=True)
                ]
                trainer = make_trainer(model, scored, options, dtype, device, Path(work), 0)
            began = time.perf_counter()
            trainer.train()
            found[name, dtype] = tokens / (time.perf_counter() - began)
    for (name, dtype), speed in found.items():
        precision = str(dtype).removeprefix("torch.")
        print(
            f"training        {name:4} {precision:8} {speed:7.0f} tokens/s, "
            f"{speed / found['TRL', dtype]:.2f} of TRL in {precision} "
            f"({len(pairs)} pairs, longest {max(map(pair_length, pairs))} tokens)"
        )


if __name__ == "__main__":
    main()
