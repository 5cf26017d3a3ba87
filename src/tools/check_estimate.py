"""How far the formulas of src/tools/estimate_cost.py are from a run that was made: FLOPs against its seconds, memory against its peak.

Reads   the records, prompts, responses and pairs under a results folder, such as results/laptop
Writes  a table on standard output: of every stage that costs, its FLOPs, measured seconds and speed, the speed as a multiple of all
        stages' together, which is the factor that an estimate from one speed is off, and peak memory by formula and as measured
The speeds divided by a GPU's peak are the --mfu-forward and --mfu-training of src/tools/estimate_cost.py for your machine.
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
from sppo.preferences.base import find_kind, settings_for
from sppo.reporting import cost_model
from sppo.reporting.cost_model import Shape


@dataclass(frozen=True)
class Measured:
    """A stage as formula and record have it; `formula_mib` is None where no formula is."""

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
            f"{args.results} has no iter*/policy; name the folder of a run whose policies are kept"
        )
    shape = cost_model.shape_of(read_json(policies[0]))
    found = [
        row
        for folder in sorted(args.results.glob("iter*"), key=iteration)
        for row in of_iteration(folder, shape)
    ]
    if not found:
        raise UserError(
            f"{args.results} has no records of generation, annotation, scoring or training; let a run finish first"
        )
    print(as_table(found))


def of_iteration(folder: Path, shape: Shape) -> list[Measured]:
    """The costly stages of one iteration, as far as they were made."""
    found = []
    for path in sorted(folder.glob("responses/*.parquet")):
        rows, record = read_table(path, "responses"), recorded(path)
        samples, prompts = record["arguments"]["samples"], len({row["prompt_id"] for row in rows})
        prompt, response = mean(rows, "prompt_token_ids"), mean(rows, "token_ids")
        found.append(
            measured(
                path, record, cost_model.generate_flops(shape, prompts, prompt, samples, response)
            )
        )
        compared = folder / "preferences" / path.name
        if not compared.is_file():
            continue  # the policy's own reward compared
        asked = recorded(compared)["arguments"]
        settings = settings_for(asked["model"], backend=asked.get("backend", "transformers"))
        kind = find_kind(settings)
        cost = kind and kind.cost(asked["model"], prompts, prompt, samples, response)
        if cost:
            found.append(measured(compared, recorded(compared), cost.flops))
    if (folder / "pairs.parquet").is_file():
        pairs = read_table(folder / "pairs.parquet", "pairs")
        prompt, response = (
            mean(pairs, "prompt_token_ids"),
            (mean(pairs, "chosen_token_ids") + mean(pairs, "rejected_token_ids")) / 2,
        )
        longest = (
            max(len(pair["prompt_token_ids"]) for pair in pairs),
            max(
                len(pair[f"{side}_token_ids"]) for pair in pairs for side in ("chosen", "rejected")
            ),
        )
        scored = cost_model.score_flops(shape, len(pairs), prompt, response)
        for name in ("logps/current.parquet", "policy"):
            record = recorded(folder / name)
            if not record:
                continue
            options, width = (
                record["arguments"],
                2 if record["computed_in"] == "torch.bfloat16" else 4,
            )
            eager = options.get("attention") == "eager"
            lora, checkpointing = (
                options.get("lora_rank", 0),
                options.get("gradient_checkpointing", False),
            )
            if record["stage"] == "train":
                factor = options["stop_epoch"] * cost_model.train_factor(bool(lora), checkpointing)
                memory = cost_model.train_bytes(
                    shape,
                    1,
                    options["micro_batch_size"],
                    *longest,
                    lora,
                    checkpointing,
                    width,
                    eager,
                )
            else:
                factor = 1
                memory = cost_model.score_bytes(
                    shape, options["micro_batch_size"], *longest, bool(lora), width, eager
                )
            found.append(measured(folder / name, record, scored * factor, memory))
    return found


def recorded(artifact: Path) -> dict[str, Any]:
    """The artifact's record; empty if there is none."""
    record = read_record(artifact) or {}
    if record.get("rebuilt"):
        raise UserError(
            f"the record of {artifact} was rebuilt, so its seconds are not known; name "
            "a run whose records are those of its stages"
        )
    return record


def measured(
    artifact: Path, record: dict[str, Any], flops: float, memory: float | None = None
) -> Measured:
    return Measured(
        str(artifact),
        flops,
        record["seconds"],
        memory and memory / 2**20,
        record["peak_memory_mib"],
    )


def mean(rows: list[dict[str, Any]], column: str) -> float:
    return sum(len(row[column]) for row in rows) / len(rows)


def as_table(found: list[Measured]) -> str:
    """Markdown, and the two factors in a line."""
    speed = sum(row.flops for row in found) / sum(row.seconds for row in found)
    lines = [
        "| artifact | TFLOP | seconds | GFLOP/s | of all stages' | peak MiB by formula | measured |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in found:
        own = row.flops / row.seconds
        lines.append(
            f"| {row.artifact} | {row.flops / 1e12:.2f} | {row.seconds:.0f} | {own / 1e9:.0f} | {own / speed:.2f} | "
            f"{'-' if row.formula_mib is None else f'{row.formula_mib:.0f}'} | {row.peak_mib} |"
        )
    off = max(
        max(row.flops / row.seconds / speed, speed / (row.flops / row.seconds)) for row in found
    )
    memory = [
        max(row.formula_mib / row.peak_mib, row.peak_mib / row.formula_mib)
        for row in found
        if row.formula_mib
    ]
    lines.append(
        f"\nAll stages: {speed / 1e9:.0f} GFLOP/s. From that one speed the seconds of a stage are off by a factor of {off:.1f} at most"
        + (f", peak memory by {max(memory):.1f}." if memory else ".")
    )
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
