"""The six tasks of the Open LLM Leaderboard v1, by lm-eval.

Reads   the policy; the tasks' data: `hub` (the official sets), or a folder of JSON lines in their fields
        (data/open_llm: small items of our own, not comparable with published scores)
Writes  open_llm.json (per cent, with standard errors) and its record
Paper   2405.00675, Table 3; shots and metrics of the leaderboard, prompts and scoring of lm-eval
Departs from the leaderboard: the harness is lm-eval 0.4.13, not the commit of 2023 that it pinned, which matters for
        MMLU; the leaderboard's MMLU is the unweighted mean over subjects, given as `mmlu_unweighted` beside the
        harness's own `mmlu`, weighted by size, which `average` uses as the paper's harness does.
"""

from __future__ import annotations

import argparse
import math
import os
from importlib import metadata
from pathlib import Path
from typing import Any

import _path  # noqa: F401
from sppo.core.artifacts import recorded, write_json
from sppo.core.errors import UserError, run
from sppo.core.flags import add_section

# task: (shots, metric), as the leaderboard had them
TASKS = {
    "arc_challenge": (25, "acc_norm,none"),
    "truthfulqa_mc2": (0, "acc,none"),
    "winogrande": (5, "acc,none"),
    "gsm8k": (5, "exact_match,strict-match"),
    "hellaswag": (10, "acc_norm,none"),
    "mmlu": (5, "acc,none"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="open_llm.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["auto", "cpu", "gpu"], default="auto")
    parser.add_argument("--attention", default=None)
    add_section(parser, "open_llm")
    args = parser.parse_args()

    from sppo.policies.models import check_policy, compute_dtype, pick_device, start_torch

    check_policy(args.policy)
    tasks = harness_tasks(args.data, args.max_shots)
    if args.data != "hub":
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    start_torch()
    device = pick_device(args.device)
    inputs = [args.policy] if args.data == "hub" else [args.policy, Path(args.data)]
    attention = {"attn_implementation": args.attention} if args.attention else {}
    with recorded("open_llm", args.output, inputs, vars(args)) as facts:
        model = HFLM(
            pretrained=str(args.policy),
            dtype=compute_dtype(args.precision, device),
            device=device,
            batch_size=args.batch_size,
            **attention,
        )
        try:
            found = simple_evaluate(
                model,
                tasks=[{"group": "open_llm", "task": tasks}],
                limit=args.limit,
                log_samples=False,
                random_seed=args.seed,
                numpy_random_seed=args.seed,
                torch_random_seed=args.seed,
                fewshot_random_seed=args.seed,
            )
        except (OSError, ConnectionError, ValueError) as error:
            raise UserError(
                f"lm-eval cannot run on the data of {args.data}: {str(error).splitlines()[0]}; check the network, or set "
                "open_llm.data to a folder"
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
                "versions": {
                    p: metadata.version(p) for p in ("lm-eval", "transformers", "datasets", "torch")
                },
            },
        )
        facts["items"] = scores["n"]


def shots_of(task: str, max_shots: int | None) -> int:
    """The leaderboard's number of examples, or fewer."""
    return TASKS[task][0] if max_shots is None else min(TASKS[task][0], max_shots)


def harness_tasks(data: str, max_shots: int | None) -> list[dict[str, Any]]:
    """The tasks for lm-eval: its own, with the leaderboard's shots, on the hub's data or on a folder's."""
    members = []
    for name in TASKS:
        shots = {"num_fewshot": shots_of(name, max_shots)}
        if data == "hub":
            members += [
                {"task": task, **shots} for task in (mmlu_tasks() if name == "mmlu" else [name])
            ]
            continue
        folder = Path(data) / name
        if not folder.is_dir():
            raise UserError(
                f"open_llm.data is {data}, but there is no folder {folder}; give `hub`, or a folder with all six tasks"
            )
        for task in sorted(path.name for path in folder.iterdir()) if name == "mmlu" else [None]:
            files = {
                file.stem: str(file.resolve())
                for file in sorted((folder / task if task else folder).glob("*.jsonl"))
            }
            if not files:
                raise UserError(
                    f"{folder / (task or '')} has no .jsonl files; add test.jsonl and the examples' split"
                )
            members.append(
                {
                    "task": f"mmlu_{task}" if task else name,
                    **shots,
                    "dataset_path": "json",
                    "dataset_name": None,
                    "dataset_kwargs": {"data_files": files},
                }
            )
    return members


def mmlu_tasks() -> list[str]:
    """lm-eval's 57 subjects."""
    import lm_eval

    return sorted(
        file.stem
        for file in (Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default").glob(
            "mmlu_*.yaml"
        )
    )


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Per cent and standard error of the six tasks, MMLU both ways, and the plain mean of the six."""
    results, sizes = (
        found["results"],
        {task: size["effective"] for task, size in found["n-samples"].items()},
    )
    scores: dict[str, Any] = {}
    errors: dict[str, float] = {}
    counts: dict[str, int] = {}
    for name, (_, metric) in TASKS.items():
        parts = [task for task in results if task.startswith("mmlu_")] if name == "mmlu" else [name]
        n = sum(sizes[task] for task in parts)
        accuracy = [results[task][metric] for task in parts]
        error = [results[task][metric.replace(",", "_stderr,")] for task in parts]
        scores[name] = 100 * sum(a * sizes[task] for a, task in zip(accuracy, parts)) / n
        known = all(isinstance(e, float) for e in error)
        errors[name] = (
            100 * math.sqrt(sum((e * sizes[task]) ** 2 for e, task in zip(error, parts))) / n
            if known
            else math.nan
        )
        counts[name] = n
        if name == "mmlu":
            scores["mmlu_unweighted"] = 100 * sum(accuracy) / len(accuracy)
    scores["average"] = sum(scores[name] for name in TASKS) / len(TASKS)
    errors["average"] = math.sqrt(sum(errors[name] ** 2 for name in TASKS)) / len(TASKS)
    return scores | {
        "stderr": {name: None if math.isnan(e) else e for name, e in errors.items()},
        "n": counts,
    }


if __name__ == "__main__":
    run(main)
