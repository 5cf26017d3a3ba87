"""Compare the formulas of src/tools/estimate_cost.py with a finished run.

FLOPs are compared with the measured seconds, and estimated memory with the measured peak.

Reads   the records, prompts, responses and pairs under a results folder, such as results/laptop
Writes  a table on standard output with one line for each costly stage: its FLOPs, its measured
        seconds, its speed, its speed relative to the speed of all stages together, and its peak
        memory by the formula and as measured. An estimate that assumes one speed for all stages is
        wrong by the factor of the relative speed.

The speeds divided by a GPU's peak are the --mfu-forward and --mfu-training of
src/tools/estimate_cost.py for your machine.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _path  # noqa: F401
from sppo.core.artifacts import iteration, read_json, read_record
from sppo.core.errors import UserError, run
from sppo.core.tables import read_table
from sppo.policies.shapes import Shape, shape_of
from sppo.preferences.base import find_kind, settings_for
from sppo.reporting import cost_model


@dataclass(frozen=True)
class Measured:
    """The figures of a stage by formula and by record.

    `flops` and `formula_mib` come from formulas, `seconds` and `peak_mib` from the record. There is
    no memory formula for some stages; `formula_mib` is then None.
    """

    artifact: str
    flops: float
    seconds: float
    formula_mib: float | None
    peak_mib: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="folder of one run, such as results/laptop")
    args = parser.parse_args()

    policies = sorted(args.results.glob("iter*/policy/config.json"))
    if not policies:
        raise UserError(
            f"{args.results} has no iter*/policy; name the folder of a run that keeps its policies"
        )
    shape = shape_of(read_json(policies[0]))
    found: list[Measured] = []
    for folder in sorted(args.results.glob("iter*"), key=iteration):
        found += of_generation(folder, shape) + of_training(folder, shape)
    if not found:
        raise UserError(
            f"{args.results} has no records of generation, annotation, scoring or training; "
            "let a run finish first"
        )
    print(as_table(found))


def of_generation(folder: Path, shape: Shape) -> list[Measured]:
    """The generation and the annotation of each shard of one iteration.

    Annotation is included if a preference model whose cost is known compared the responses.
    """
    found = []
    for path in sorted(folder.glob("responses/*.parquet")):
        rows = read_table(path, "responses")
        record = recorded(path)
        samples = record["arguments"]["samples"]
        prompts = len({row["prompt_id"] for row in rows})
        prompt, response = mean_length(rows, "prompt_token_ids"), mean_length(rows, "token_ids")
        flops = cost_model.generate_flops(shape, prompts, prompt, samples, response)
        found.append(measured(path, record, flops))

        preferences = folder / "preferences" / path.name
        asked = recorded(preferences)["arguments"] if preferences.is_file() else {}
        if "model" not in asked:
            continue  # the policy's own reward compared the responses
        settings = settings_for(asked["model"], backend=asked.get("backend", "transformers"))
        kind = find_kind(settings)
        cost = kind.cost(settings, prompts, prompt, samples, response) if kind else None
        if cost and cost.flops:
            found.append(measured(preferences, recorded(preferences), cost.flops))
    return found


def of_training(folder: Path, shape: Shape) -> list[Measured]:
    """The scoring of the pairs and the training of one iteration, as far as they were made."""
    if not (folder / "pairs.parquet").is_file():
        return []
    pairs = read_table(folder / "pairs.parquet", "pairs")
    sides = ("chosen_token_ids", "rejected_token_ids")
    prompt = mean_length(pairs, "prompt_token_ids")
    response = sum(mean_length(pairs, side) for side in sides) / 2
    longest_prompt = max(len(pair["prompt_token_ids"]) for pair in pairs)
    longest_response = max(len(pair[side]) for pair in pairs for side in sides)
    score_flops = cost_model.score_flops(shape, len(pairs), prompt, response)
    found = []
    for path in [*sorted(folder.glob("logps/current/*.parquet")), folder / "policy"]:
        record = recorded(path)
        if not record:
            continue
        options = record["arguments"]
        bytes_per_number = 2 if record["computed_in"] == "torch.bfloat16" else 4
        eager = options.get("attention") == "eager"
        lora_rank = options.get("lora_rank", 0)
        # Scoring has no steps, so its passes are as large as their limit allows.
        limits = {"micro_batch_tokens": None, "batch_size": len(pairs)} | options
        passes = cost_model.largest_passes(limits, longest_prompt, longest_response)
        if record["stage"] == "train":
            every = cost_model.checkpointed_every(options)
            factor = cost_model.train_factor(shape, bool(lora_rank), every)
            flops = score_flops * (options["stop_epoch"] * factor)
            memory = max(
                cost_model.train_bytes(shape, 1, *sizes, lora_rank, every, bytes_per_number, eager)
                for sizes in passes
            )
        else:
            flops = score_flops * record["pairs"] / len(pairs)
            memory = max(
                cost_model.score_bytes(shape, *sizes, bool(lora_rank), bytes_per_number, eager)
                for sizes in passes
            )
        found.append(measured(path, record, flops, memory))
    return found


def recorded(artifact: Path) -> dict[str, Any]:
    """The artifact's record; empty if it has none. A rebuilt record is a UserError."""
    record = read_record(artifact) or {}
    if record.get("rebuilt"):
        raise UserError(
            f"the record of {artifact} was rebuilt and has no seconds; "
            "name a run with its original records"
        )
    return record


def measured(
    artifact: Path, record: dict[str, Any], flops: float, memory: float | None = None
) -> Measured:
    """The figures of one artifact; `memory` is in bytes."""
    formula_mib = memory and memory / 2**20
    return Measured(str(artifact), flops, record["seconds"], formula_mib, record["peak_memory_mib"])


def mean_length(rows: list[dict[str, Any]], column: str) -> float:
    """The mean length of the lists in a column."""
    return sum(len(row[column]) for row in rows) / len(rows)


def as_table(found: list[Measured]) -> str:
    """A Markdown table, and a line with the largest errors of seconds and of memory."""
    total_speed = sum(row.flops for row in found) / sum(row.seconds for row in found)
    lines = [
        "| artifact | TFLOP | seconds | GFLOP/s | relative to all stages "
        "| peak MiB by formula | measured |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in found:
        speed = row.flops / row.seconds
        formula = "-" if row.formula_mib is None else f"{row.formula_mib:.0f}"
        lines.append(
            f"| {row.artifact} | {row.flops / 1e12:.2f} | {row.seconds:.0f} | {speed / 1e9:.0f} "
            f"| {speed / total_speed:.2f} | {formula} | {row.peak_mib} |"
        )
    speeds = [row.flops / row.seconds for row in found]
    speed_error = max(max(speed / total_speed, total_speed / speed) for speed in speeds)
    summary = (
        f"\nAll stages: {total_speed / 1e9:.0f} GFLOP/s. An estimate from this speed is wrong by a "
        f"factor of at most {speed_error:.1f} for the seconds of a stage"
    )
    memory_errors = [
        max(row.formula_mib / row.peak_mib, row.peak_mib / row.formula_mib)
        for row in found
        if row.formula_mib
    ]
    if memory_errors:
        summary += f" and at most {max(memory_errors):.1f} for peak memory"
    lines.append(f"{summary}.")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
