"""Speed of the stages, as ratios to a named baseline that is measured in the same run.

    .venv/bin/python benchmarks/run.py

Run it after `make demo`, on an idle machine. It reads the demo's prompts, pairs and base policy, so
lengths are the demo's.

generation   our engine, against transformers' `generate` on the same prompts and K
training     our trainer, against TRL's DPOTrainer on the same pairs (sppo_hard, precomputed
             reference), with LoRA as in the demo and with all weights
scoring      the reference pass, against the forward passes of our training of all weights, against
             that whole training, and against itself with float32 weights, which autocast rounds in
             every forward pass; always on the same pairs
annotation   PairRM's network by our code, against llm-blender; only after `make test-pairrm`, which
             makes llm-blender's environment (benchmarks/pairrm.py)
demo         a whole run, against that of commit 7cfe2db with the same work (benchmarks/demo.py), in
             runs per hour; only in a clone that has this commit

On a CPU, our programs are also compared with themselves without `keep_freed_memory`: the C library
then returns freed memory to the system, which is its default.

"limit" is the speed if the stage only computed its matrix products, "goal" the ratio that the
project aims at on two cores. All speeds are in tokens per second. Tokens of training and scoring
count the prompt of a pair twice. The speed of a machine varies over time, so compare ratios within
one run. PairRM takes some minutes, the demo a quarter of an hour.

The second table is about the run that was finished: how long its jobs took, and how much of this
was start-up, which is the time before a program begins its work. Its last line is the dry run of
the demo.
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
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "src"))

import sppo  # noqa: F401  (sets OMP_WAIT_POLICY before torch is imported)
import torch

import demo
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
from sppo.training.batches import choose_layout, pair_batch
from sppo.training.lengths import pair_length, sequence_tokens
from sppo.training.logps import forward_precision, frozen_logps, response_logps
from sppo.training.trainer import make_trainer, make_trl_trainer

K = 5  # responses to each prompt
FREED_MEMORY_RETURNED = "freed memory returned"
ROUNDED_IN_EVERY_PASS = "weights rounded in every pass"
FORWARD = "forward passes of our training"
LLM_BLENDER = "llm-blender"
RANKS = (16, 0)  # of LoRA; 0 trains all weights
BATCH = 8  # pairs in a step and in a forward pass
COLUMNS = ("stage", "baseline", "ours", "theirs", "ratio", "goal", "limit")
GOALS = {  # of the ratio, on two cores
    ("generation", "transformers"): 3.0,
    ("training", "TRL"): 2.5,
    ("scoring", FORWARD): 2.0,
    ("annotation", LLM_BLENDER): 4.0,
    ("demo", f"commit {demo.EARLIER}"): 1.67,
}
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


class Workload(NamedTuple):
    """What every program of the comparison works on."""

    policy: Path
    prompts: list[dict[str, Any]]
    pairs: list[dict[str, Any]]
    tokens: int  # of the longest response in generation
    precision: str
    dtype: torch.dtype
    device: str


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
    parser.add_argument(
        "--no-pairrm", action="store_true", help="leave out PairRM, which takes some minutes"
    )
    parser.add_argument(
        "--no-demo", action="store_true", help="leave out the demo, a quarter of an hour"
    )
    parser.add_argument("--baseline", help=argparse.SUPPRESS)  # the program calls itself
    args = parser.parse_args()
    if not (args.results / "iter1/pairs.parquet").is_file():
        raise UserError(f"{args.results} has no iter1/pairs.parquet; run make demo first")
    if args.baseline not in (None, FORWARD, ROUNDED_IN_EVERY_PASS, LLM_BLENDER):
        # Only our programs let malloc keep freed memory, which makes any program faster.
        devices.keep_freed_memory = lambda: None
    start_torch()
    device = pick_device("auto")
    if args.baseline == LLM_BLENDER:
        print(json.dumps(annotation(device)))
        return
    work = Workload(
        args.results / "iter0/policy",
        read_table(args.results / "iter1/prompts.parquet", "prompts")[: args.prompts],
        read_table(args.results / "iter1/pairs.parquet", "pairs")[: args.prompts],
        args.tokens,
        args.precision,
        compute_dtype(args.precision, device),
        device,
    )
    if args.baseline:
        print(json.dumps(BASELINES[args.baseline](work)))
        return
    # Before this process needs memory itself.
    others = {name: in_own_process(name) for name in BASELINES if applies(name, work)}
    rows = compared(work, others)
    if not args.no_pairrm and pairrm.environment():
        rows.append(in_own_process(LLM_BLENDER))
    if not args.no_demo and demo.has_history():
        now, then = demo.seconds()
        rows.append(row_of("demo", f"commit {demo.EARLIER}", 3600 / now, 3600 / then, None))
    jobs = [*start_up(args.results), dry_run()]
    if args.json:
        for row in [*rows, *jobs]:
            print(json.dumps(row))
        return
    print(f"{processor()}, {os.cpu_count()} cores, {device}, {work.dtype}, commit {git_revision()}")
    print("| " + " | ".join(COLUMNS) + " |\n|---|---|--:|--:|--:|--:|--:|")
    for row in rows:
        cells = [row["stage"], row["baseline"], f"{row['ours']:.0f}", f"{row['theirs']:.0f}"]
        goal = "-" if row["goal"] is None else f"{row['goal']:g}"
        limit = "-" if row["limit"] is None else f"{row['limit']:.0f}"
        print("| " + " | ".join([*cells, f"{row['ratio']:.2f}", goal, limit]) + " |")
    print("\n| job | seconds | of these start-up |\n|---|--:|--:|")
    for row in jobs:
        print(f"| {row['job']} | {row['seconds']:.1f} | {row['start_up']:.1f} |")


def applies(baseline: str, work: Workload) -> bool:
    """Whether a baseline differs from our programs on this device and in this number format."""
    if baseline == FREED_MEMORY_RETURNED:
        return work.device == "cpu"
    if baseline == ROUNDED_IN_EVERY_PASS:
        return work.dtype != torch.float32
    return True


def in_own_process(baseline: str) -> dict[str, Any]:
    """What a baseline prints in a process of its own, with the arguments of this one.

    It is tokens per second by stage, and for llm-blender a whole row.
    """
    command = [sys.executable, *sys.argv, "--baseline", baseline]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compared(work: Workload, others: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """A row for each stage of each baseline."""
    ours = speeds_of_ours(work)
    others = others | {"our training of all weights": {"scoring": ours[training_stage(0)]}}
    limits = limits_of(work)
    return [
        row_of(stage, baseline.partition(":")[0], ours[stage], speed, limits[stage])
        for baseline, speeds in others.items()
        for stage, speed in speeds.items()
    ]


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


def dry_run() -> dict[str, Any]:
    """The line of `snakemake -n`, all of which is start-up."""
    words = ["-m", "snakemake", "--dry-run", "--quiet", "--cores", "all", demo.RESULT]
    began = time.perf_counter()
    subprocess.run([sys.executable, *words], cwd=REPOSITORY, check=True, capture_output=True)
    seconds = time.perf_counter() - began
    return {"job": "snakemake -n", "seconds": seconds, "start_up": seconds}


def row_of(
    stage: str, baseline: str, ours: float, theirs: float, limit: float | None
) -> dict[str, Any]:
    goal = GOALS.get((stage.partition(",")[0], baseline))
    values = (stage, baseline, ours, theirs, ours / theirs, goal, limit)
    return dict(zip(COLUMNS, values, strict=True))


def speeds_of_ours(work: Workload) -> dict[str, float]:
    """Tokens per second of our programs by stage.

    The time of the reference log-probabilities is not part of a training.
    """
    found = {"generation": speed_of_generation(work)}
    for lora_rank in RANKS:
        model = load_frozen_policy(work.policy, lora_rank, work.dtype, work.device)
        found["scoring"], logps = speed_of_scoring(work, model)
        scored = work._replace(pairs=with_reference(work.pairs, logps))
        found[training_stage(lora_rank)] = speed_of_training("ours", scored, lora_rank)
    return found


def training_stage(lora_rank: int) -> str:
    return f"training, LoRA of rank {lora_rank}" if lora_rank else "training, all weights"


def limits_of(work: Workload) -> dict[str, float]:
    """Tokens per second of each stage if it only computed its matrix products."""
    model = load_policy(work.policy, work.dtype, work.device)
    sequences = K * len(work.prompts)
    step = sum(map(sequence_tokens, work.pairs)) // len(work.pairs) * BATCH
    trained = step / products(model, step, work.dtype, work.device, is_trained=True)
    return {
        "generation": sequences
        / products(model, sequences, work.dtype, work.device, is_trained=False),
        **{training_stage(rank): trained for rank in RANKS},
        "scoring": step / products(model, step, work.dtype, work.device, is_trained=False),
    }


def speed_of_generation(work: Workload) -> float:
    """Tokens per second of our engine."""
    engine = engine_of(work)
    engine.generate(work.prompts[:2], Sampling(K, 1.0, 1.0, 2), 0, "warm-up")
    began = time.perf_counter()
    rows = engine.generate(work.prompts, Sampling(K, 1.0, 1.0, work.tokens), 0, "benchmark")
    return sum(len(row["token_ids"]) for row in rows) / (time.perf_counter() - began)


def engine_of(work: Workload) -> TransformersEngine:
    return TransformersEngine(
        work.policy,
        precision=work.precision,
        device=work.device,
        attention=None,
        batch_size=K * len(work.prompts),
    )


def speed_of_transformers(work: Workload) -> float:
    """Tokens per second of transformers' `generate` on the same prompts."""
    engine = engine_of(work)
    pad = engine.stop_ids[0]
    all_ids = [prompt["prompt_token_ids"] for prompt in work.prompts]
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
            max_new_tokens=work.tokens,
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


def speed_of_scoring(work: Workload, model: Any) -> tuple[float, list[dict[str, Any]]]:
    """Tokens per second of the reference pass, and its log-probabilities."""
    began = time.perf_counter()
    logps = frozen_logps(model, work.pairs, work.dtype, work.device, BATCH)
    return sum(map(sequence_tokens, work.pairs)) / (time.perf_counter() - began), logps


def speed_of_training(name: str, work: Workload, lora_rank: int) -> float:
    """Tokens per second of the trainer `ours` or `TRL`."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(name, work, lora_rank, Path(folder))
        began = time.perf_counter()
        trainer.train()
        return sum(map(sequence_tokens, work.pairs)) / (time.perf_counter() - began)


def annotation(device: str) -> dict[str, Any]:
    """The row of PairRM."""
    official = pairrm.environment()
    assert official is not None  # the caller has looked
    found = pairrm.speeds(official, 3, device)
    seconds = products(found.model, found.tokens, found.dtype, device, is_trained=False)
    limit = found.tokens / seconds
    return row_of("annotation, PairRM", LLM_BLENDER, found.ours, found.theirs, limit)


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


def trainer_of(name: str, work: Workload, lora_rank: int, folder: Path) -> Any:
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
    model = load_policy(work.policy, weights_dtype(lora_rank, work.dtype), work.device)
    model.config.use_cache = False
    where = (work.dtype, work.device, folder, 0)
    if name == "ours":
        return make_trainer(model, work.pairs, options, *where)
    return make_trl_trainer(model, load_tokenizer(work.policy), work.pairs, options, *where)


def speed_of_forward(work: Workload) -> float:
    """Tokens per second of the forward passes of a training of all weights."""
    model = load_policy(work.policy, torch.float32, work.device).train()
    layout = choose_layout(model, work.device)
    by_length = sorted(work.pairs, key=pair_length, reverse=True)
    began = time.perf_counter()
    for i in range(0, len(by_length), BATCH):
        batch = pair_batch(by_length[i : i + BATCH], layout)
        inputs = {
            key: value.to(work.device) if torch.is_tensor(value) else value
            for key, value in batch.items()
        }
        with forward_precision(work.device, work.dtype):
            response_logps(model, inputs).sum().item()  # .item() waits for a GPU
    return sum(map(sequence_tokens, work.pairs)) / (time.perf_counter() - began)


def speed_with_rounding(work: Workload) -> float:
    """Tokens per second of the reference pass with float32 weights, which autocast rounds."""
    model = load_policy(work.policy, torch.float32, work.device)
    return speed_of_scoring(work, model)[0]


# Tokens per second by stage, each in a process of its own. The table has the names up to the colon.
BASELINES: dict[str, Callable[[Workload], dict[str, float]]] = {
    "transformers": lambda work: {"generation": speed_of_transformers(work)},
    **{
        f"TRL:{rank}": lambda work, rank=rank: {
            training_stage(rank): speed_of_training("TRL", work, rank)
        }
        for rank in RANKS
    },
    FREED_MEMORY_RETURNED: speeds_of_ours,
    FORWARD: lambda work: {"scoring": speed_of_forward(work)},
    ROUNDED_IN_EVERY_PASS: lambda work: {"scoring": speed_with_rounding(work)},
}

if __name__ == "__main__":
    run(main)
