"""Speed of the stages, as ratios to a named baseline that is measured in the same run.

    .venv/bin/python benchmarks/run.py

Run it after `make demo`, on an idle machine. It reads the demo's prompts, pairs and base policy, so
lengths are the demo's.

generation   our engine, against transformers' `generate` on the same prompts and K
training     our trainer, against TRL's DPOTrainer on the same pairs (sppo_hard, precomputed
             reference), with LoRA as in the demo and with all weights
scoring      the reference pass, against our training of all weights on the same pairs
annotation   PairRM's network by our code, against llm-blender; only after `make test-pairrm`, which
             makes llm-blender's environment (benchmarks/pairrm.py)

"limit" is the speed if the stage only computed its matrix products. All speeds are in tokens per
second. Tokens of training and scoring count the prompt of a pair twice. The speed of a machine
varies over time, so compare ratios within one run.

The second table is about the run that was finished: how long its jobs took, and how much of this
was start-up, which is the time before a program begins its work.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "src"))

import sppo  # noqa: F401  (sets OMP_WAIT_POLICY before torch is imported)
import torch

import pairrm
from sppo.core.artifacts import git_revision, read_record
from sppo.core.config import default_of, schema
from sppo.core.errors import UserError, run
from sppo.core.tables import read_table
from sppo.policies import devices
from sppo.policies.generation import Sampling, TransformersEngine
from sppo.policies.chats import load_tokenizer
from sppo.policies.devices import compute_dtype, pick_device, start_torch, weights_dtype
from sppo.policies.models import load_frozen_policy, load_policy
from sppo.training.logps import frozen_logps
from sppo.training.lengths import sequence_tokens
from sppo.training.trainer import make_trainer, make_trl_trainer

K = 5  # responses to each prompt
RANKS = (16, 0)  # of LoRA; 0 trains all weights
BATCH = 8  # pairs in a step and in a forward pass
COLUMNS = ("stage", "baseline", "ours", "theirs", "ratio", "limit")
ARTIFACTS = {  # of an iteration, by the name of the file that says how long its job took
    "sample_prompts": "prompts.parquet",
    "generate_responses.0": "responses/0.parquet",
    "annotate_preferences.0": "preferences/0.parquet",
    "build_pairs": "pairs.parquet",
    "score_reference.current.0": "logps/current/0.parquet",
    "train_policy": "policy",
    "alpaca_eval_outputs": "alpaca_eval_outputs.json",
    "alpaca_eval": "alpaca_eval.json",
    "ifeval": "ifeval.json",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--results", type=Path, default=Path("results"), help="a finished run (default: results)"
    )
    parser.add_argument("--prompts", type=int, default=72, help="prompts and pairs (default: 72)")
    parser.add_argument("--tokens", type=int, default=32, help="longest response (default: 32)")
    parser.add_argument("--precision", choices=["auto", "bfloat16", "float32"], default="auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object for each row")
    parser.add_argument("--theirs", help=argparse.SUPPRESS)  # the program calls itself
    args = parser.parse_args()
    policy = args.results / "iter0/policy"
    if not (args.results / "iter1/pairs.parquet").is_file():
        raise UserError(f"{args.results} has no iter1/pairs.parquet; run make demo first")
    if args.theirs:
        # Only our programs let malloc keep freed memory, which makes any program faster.
        devices.keep_freed_memory = lambda: None
    start_torch()
    device = pick_device("auto")
    dtype = compute_dtype(args.precision, device)
    prompts = read_table(args.results / "iter1/prompts.parquet", "prompts")[: args.prompts]
    pairs = read_table(args.results / "iter1/pairs.parquet", "pairs")[: args.prompts]
    if args.theirs == "transformers":
        print(speed_of_transformers(policy, prompts, args.tokens, args.precision, device))
        return
    if args.theirs:
        lora_rank = int(args.theirs.removeprefix("TRL"))
        print(speed_of_training("TRL", policy, pairs, lora_rank, dtype, device))
        return
    # Before this process needs memory itself.
    others = {name: theirs(name) for name in ("transformers", *(f"TRL{rank}" for rank in RANKS))}
    rows = [
        generation(policy, prompts, args.tokens, args.precision, device, others),
        *training(policy, pairs, dtype, device, others),
        *annotation(device),
    ]
    jobs = start_up(args.results)
    if args.json:
        for row in [*rows, *jobs]:
            print(json.dumps(row))
        return
    print(f"{processor()}, {os.cpu_count()} cores, {device}, {dtype}, commit {git_revision()}")
    print("| " + " | ".join(COLUMNS) + " |\n|---|---|--:|--:|--:|--:|")
    for row in rows:
        cells = [row["stage"], row["baseline"], f"{row['ours']:.0f}", f"{row['theirs']:.0f}"]
        print("| " + " | ".join([*cells, f"{row['ratio']:.2f}", f"{row['limit']:.0f}"]) + " |")
    print("\n| job | seconds | of these start-up |\n|---|--:|--:|")
    for row in jobs:
        print(f"| {row['job']} | {row['seconds']:.1f} | {row['start_up']:.1f} |")


def theirs(name: str) -> float:
    """Tokens per second of another program, `transformers` or `TRL<rank of LoRA>`.

    It runs in a process of its own, with the arguments of this one.
    """
    command = [sys.executable, *sys.argv, "--theirs", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def start_up(results: Path) -> list[dict[str, Any]]:
    """Mean seconds of each kind of job over the iterations, and of its start-up.

    Snakemake measured the whole job, and the artifact's record has the seconds of the work.
    """
    found = []
    for job, artifact in ARTIFACTS.items():
        whole, work = [], []
        for table in sorted((results / "benchmarks").glob(f"iter[1-9]*/{job}.tsv")):
            record = read_record(results / table.parent.name / artifact)
            if record and "seconds" in record:
                whole.append(float(table.read_text(encoding="utf-8").split("\n")[1].split("\t")[0]))
                work.append(record["seconds"])
        if whole:
            seconds = sum(whole) / len(whole)
            row = {"job": job, "seconds": seconds, "start_up": seconds - sum(work) / len(work)}
            found.append(row)
    return found


def processor() -> str:
    """The processor's name, as Linux gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown processor"
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")


def row_of(stage: str, baseline: str, ours: float, theirs: float, limit: float) -> dict[str, Any]:
    return dict(zip(COLUMNS, (stage, baseline, ours, theirs, ours / theirs, limit), strict=True))


def generation(
    policy: Path,
    prompts: list[dict[str, Any]],
    tokens: int,
    precision: str,
    device: str,
    others: dict[str, float],
) -> dict[str, Any]:
    """The row of our engine and of `generate`, which is in `others`, from `theirs`."""
    size = K * len(prompts)
    engine = engine_of(policy, precision, device, size)
    engine.generate(prompts[:2], Sampling(K, 1.0, 1.0, 2), 0, "warm-up")
    began = time.perf_counter()
    rows = engine.generate(prompts, Sampling(K, 1.0, 1.0, tokens), 0, "benchmark")
    ours = sum(len(row["token_ids"]) for row in rows) / (time.perf_counter() - began)
    limit = size / products(engine.model, size, engine.dtype, device, is_trained=False)
    return row_of("generation", "transformers", ours, others["transformers"], limit)


def engine_of(policy: Path, precision: str, device: str, size: int) -> TransformersEngine:
    return TransformersEngine(
        policy, precision=precision, device=device, attention=None, batch_size=size
    )


def speed_of_transformers(
    policy: Path, prompts: list[dict[str, Any]], tokens: int, precision: str, device: str
) -> float:
    """Tokens per second of transformers' `generate` on the same prompts."""
    engine = engine_of(policy, precision, device, K * len(prompts))
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


def products(model: Any, rows: int, dtype: torch.dtype, device: str, is_trained: bool) -> float:
    """The shortest seconds of the matrix products of all linear layers for `rows` tokens.

    A training computes three products for each layer.
    """
    shapes = [
        (layer.in_features, layer.out_features)
        for layer in model.modules()
        if isinstance(layer, torch.nn.Linear)
    ]
    inputs = {n: torch.randn(rows, n, dtype=dtype, device=device) for n, _ in shapes}
    weights = [torch.randn(m, n, dtype=dtype, device=device) for n, m in shapes]
    outputs = {m: torch.randn(rows, m, dtype=dtype, device=device) for _, m in shapes}

    def multiply() -> None:
        for (n, m), weight in zip(shapes, weights, strict=True):
            inputs[n] @ weight.T
            if is_trained:
                outputs[m] @ weight
                outputs[m].T @ inputs[n]

    return shortest(multiply, device)


def shortest(work: Callable[[], Any], device: str, repeats: int = 3) -> float:
    """The shortest seconds that `work` takes."""
    seconds = []
    with torch.inference_mode():
        for _ in range(repeats):
            began = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
    return min(seconds)


def training(
    policy: Path,
    pairs: list[dict[str, Any]],
    dtype: torch.dtype,
    device: str,
    others: dict[str, float],
) -> list[dict[str, Any]]:
    """The rows of our trainer and TRL's, which is in `others`, and that of scoring.

    The time of the reference log-probabilities is not part of a training.
    """
    tokens = sum(sequence_tokens(pair) for pair in pairs)
    step = tokens // len(pairs) * BATCH
    found = []
    speeds = {}
    for lora_rank in RANKS:
        model = load_frozen_policy(policy, lora_rank, dtype, device)
        began = time.perf_counter()
        scored = with_reference(pairs, frozen_logps(model, pairs, dtype, device, BATCH))
        speeds["scoring"] = tokens / (time.perf_counter() - began)
        speeds["ours"] = speed_of_training("ours", policy, scored, lora_rank, dtype, device)
        limit = step / products(model, step, dtype, device, is_trained=True)
        stage = f"training, LoRA of rank {lora_rank}" if lora_rank else "training, all weights"
        found.append(row_of(stage, "TRL", speeds["ours"], others[f"TRL{lora_rank}"], limit))
    limit = step / products(model, step, dtype, device, is_trained=False)
    row = row_of("scoring", "our training of all weights", speeds["scoring"], speeds["ours"], limit)
    return [*found, row]


def speed_of_training(
    name: str,
    policy: Path,
    pairs: list[dict[str, Any]],
    lora_rank: int,
    dtype: torch.dtype,
    device: str,
) -> float:
    """Tokens per second of the trainer `ours` or `TRL`."""
    tokens = sum(sequence_tokens(pair) for pair in pairs)
    with tempfile.TemporaryDirectory() as work:
        trainer = trainer_of(name, policy, pairs, lora_rank, dtype, device, Path(work))
        began = time.perf_counter()
        trainer.train()
        return tokens / (time.perf_counter() - began)


def annotation(device: str) -> list[dict[str, Any]]:
    """The row of PairRM; none without llm-blender's environment."""
    official = pairrm.environment()
    if official is None:
        return []
    found = pairrm.speeds(official, 3, device)
    seconds = products(found.model, found.tokens, found.dtype, device, is_trained=False)
    return [
        row_of(
            "annotation, PairRM", "llm-blender", found.ours, found.theirs, found.tokens / seconds
        )
    ]


def with_reference(
    pairs: list[dict[str, Any]], logps: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The pairs with their log-probabilities under pi_t, which is also the reference."""
    return [
        pair
        | {
            f"{role}_{side}": row[f"{side}_logp"]
            for role in ("current", "reference", "opponents")
            for side in ("chosen", "rejected")
        }
        for pair, row in zip(pairs, logps, strict=True)
    ]


def trainer_of(
    name: str,
    policy: Path,
    pairs: list[dict[str, Any]],
    lora_rank: int,
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
        "batch_size": BATCH,
        "micro_batch_size": BATCH,
        "lora_rank": lora_rank,
        "lora_alpha": 32,
        "checkpoint_steps": 10_000,
    }
    model = load_policy(policy, weights_dtype(lora_rank, dtype), device)
    model.config.use_cache = False
    if name == "ours":
        return make_trainer(model, pairs, options, dtype, device, work, 0)
    tokenizer = load_tokenizer(policy)
    return make_trl_trainer(model, tokenizer, pairs, options, dtype, device, work, 0)


if __name__ == "__main__":
    run(main)
