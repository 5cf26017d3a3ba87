"""What a configuration will cost, before any of it is spent: tokens, FLOPs, GPU-hours, memory, disk, dollars.

Reads   the configuration as Snakemake would, its main run; nothing is run or fetched
Writes  tables on standard output, by iteration and stage
Formulas are in src/sppo/reporting/cost_model.py; docs/paper_scale.md says how far they were off on runs that were measured. Lengths and the shares of a
GPU's peak are assumptions until you measure: src/tools/check_estimate.py reads both off the records of a finished run.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _path  # noqa: F401
from sppo.core.artifacts import ROOT, read_json
from sppo.core.config_files import read_files
from sppo.core.errors import UserError, run
from sppo.core.flags import of_iteration
from sppo.policies.shapes import SHAPES, Shape, shape_of
from sppo.preferences.base import find_kind, local_kind, settings_for
from sppo.reporting import cost_model
from sppo.reporting.cost_model import GB, GPUS, Gpu, Use
from sppo.workflow.configuration import resolve

JUDGE_PROMPT = 350  # tokens of GPT-4 turbo's template in alpaca-eval: 1398 characters, four a token
STORED_BYTES = 9  # of a stored token: its id, and its text
MT_BENCH = 160  # grades of a policy: 80 questions, two turns


@dataclass(frozen=True)
class Row:
    """One stage of one iteration. `seconds` is None where the stage does not fit on the GPU."""

    iteration: int
    stage: str
    samples: float
    tokens: float
    flops: float
    seconds: float | None
    memory: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config",
        type=Path,
        nargs="*",
        default=[],
        help="configuration files, such as a preset; without any, the demo's",
    )
    parser.add_argument(
        "--settings", choices=["paper", "repo"], help="in place of the configuration's"
    )
    parser.add_argument("--gpu", choices=list(GPUS), default="H100")
    parser.add_argument(
        "--gpus", type=int, help="that train one policy together; default: train.processes"
    )
    parser.add_argument("--peak-tflops", type=float, help="bfloat16, of another GPU")
    parser.add_argument("--memory-gb", type=float, help="of another GPU")
    parser.add_argument("--bandwidth-tb", type=float, help="TB/s, of another GPU")
    parser.add_argument(
        "--mfu-training",
        type=float,
        default=0.35,
        help="assumed share of the peak FLOP/s in training (default: %(default)s)",
    )
    parser.add_argument(
        "--mfu-forward",
        type=float,
        default=0.4,
        help="the same in forward passes (default: %(default)s)",
    )
    parser.add_argument(
        "--bandwidth-share",
        type=float,
        default=0.6,
        help="assumed share of the bandwidth in generation (default: %(default)s)",
    )
    parser.add_argument(
        "--prompts",
        type=int,
        default=20000,
        help="in one iteration, where the source is on the hub (default: %(default)s)",
    )
    parser.add_argument(
        "--prompt-tokens", type=int, default=200, help="assumed mean (default: %(default)s)"
    )
    parser.add_argument(
        "--response-tokens",
        type=int,
        default=450,
        help="assumed mean, if max_new_tokens allows (default: %(default)s)",
    )
    parser.add_argument(
        "--longest-prompt",
        type=int,
        default=2048,
        help="assumed, where prompts.max_tokens is null (default: %(default)s)",
    )
    parser.add_argument("--price", type=float, help="dollars of a GPU-hour; none is assumed")
    parser.add_argument(
        "--judge-price",
        type=float,
        help="dollars for a million tokens that the judge's API reads; none is assumed",
    )
    args = parser.parse_args()

    config = configuration(args.config, args.settings)
    shape, gpu = shape_of_policy(config["policy"]), GPUS[args.gpu]
    gpu = Gpu(
        args.peak_tflops * 1e12 if args.peak_tflops else gpu.flops,
        args.memory_gb * GB if args.memory_gb else gpu.memory,
        args.bandwidth_tb * 1e12 if args.bandwidth_tb else gpu.bandwidth,
    )
    use = Use(
        args.mfu_training, args.mfu_forward, args.bandwidth_share, config["responses"]["batch_size"]
    )
    args.gpus = args.gpus or config["train"]["processes"]
    rows = all_rows(config, shape, gpu, use, args)
    print(
        f"{config['name'] or 'The default'}, settings {config['settings']}: {config['policy']['model']}, {shape.weights / GB:.2f} billion weights, "
        f"on {args.gpus} x {args.gpu}.\n{as_table(rows, gpu)}\n{summary(rows, config, shape, args)}"
    )


def configuration(files: list[Path], settings: str | None) -> dict[str, Any]:
    """The main run, resolved as the Snakefile does."""
    written = read_files(files or [ROOT / "config" / "config.yaml"])
    return resolve(written | ({"settings": settings} if settings else {}))[""]


def shape_of_policy(policy: dict[str, Any]) -> Shape:
    """From the table of published shapes, a model folder, or the hub's local cache."""
    from huggingface_hub import try_to_load_from_cache

    if policy["model"] in SHAPES:
        return SHAPES[policy["model"]]
    file: Any = Path(policy["model"]).expanduser() / "config.json"
    if not file.is_file() and policy["model"].count("/") == 1:
        file = try_to_load_from_cache(policy["model"], "config.json", revision=policy["revision"])
    if not isinstance(file, (str, Path)) or not Path(file).is_file():
        raise UserError(
            f"policy.model is {policy['model']}, whose shape is not known here; give a model folder or one that was fetched, or one of "
            f"{', '.join(SHAPES)}"
        )
    return shape_of(read_json(Path(file)))


def prompts_of_an_iteration(config: dict[str, Any], assumed: int) -> int:
    """As configured; all of a file, divided; or what is assumed of a hub data set."""
    prompts = config["prompts"]
    if prompts["per_iteration"] or not Path(prompts["source"]).is_file():
        return prompts["per_iteration"] or assumed
    lines = Path(prompts["source"]).read_bytes().split(b"\n")
    return sum(1 for line in lines if line.strip()) // max(config["iterations"], 1)


def instructions_of(evaluation: dict[str, Any]) -> int:
    return evaluation["limit"] or (
        805
        if evaluation["instructions"] == "official"
        else len(read_json(Path(evaluation["instructions"])))
    )


def all_rows(
    config: dict[str, Any], shape: Shape, gpu: Gpu, use: Use, args: argparse.Namespace
) -> list[Row]:
    """Stages of iterations 1 to T, and the evaluation of 0 to T; the base answers twice if it is the reference too."""
    responses, evaluation = config["responses"], config["alpaca_eval"]
    prompts, k, p = (
        prompts_of_an_iteration(config, args.prompts),
        responses["samples"],
        args.prompt_tokens,
    )
    r, longest = (
        min(args.response_tokens, responses["max_new_tokens"]),
        config["prompts"]["max_tokens"] or args.longest_prompt,
    )
    n, answer = instructions_of(evaluation), min(args.response_tokens, evaluation["max_new_tokens"])
    pairs = prompts * {"all": k * (k - 1) // 2, "graded": k * (k + 1) // 2}.get(
        config["pairs"]["construction"], 1
    )  # of graded ones at most
    pairs *= 2 if config["pairs"]["target_reward"] else 1

    def drawn(t: int, stage: str, asked: int, samples: int, length: int, most: int) -> Row:
        prefill = cost_model.forward_flops(shape, asked * p, p / 2, 0)
        decoding = cost_model.decode_seconds(
            shape, gpu, use, asked * samples * length, p + length / 2
        )
        memory = 2 * shape.weights + cost_model.concurrent_sequences(
            shape, gpu, p + length / 2, use
        ) * shape.kv_bytes * (p + length / 2)
        return Row(
            t,
            stage,
            asked * samples,
            asked * samples * length,
            cost_model.generate_flops(shape, asked, p, samples, length),
            decoding and decoding + prefill / (gpu.flops * use.forward),
            max(memory, 2 * shape.weights + shape.kv_bytes * (longest + most)),
        )

    def compared(
        t: int, stage: str, model: str, asked: int, samples: int, length: int
    ) -> list[Row]:
        """The stage of a preference model; none if nobody knows what it costs."""
        kind = find_kind(settings_for(model, backend=config["preference"]["backend"]))
        cost = kind and kind.cost(model, asked, p, samples, length)
        if not cost:
            return []
        seconds = cost.flops / (gpu.flops * use.forward)
        return [Row(t, stage, asked, cost.tokens, cost.flops, seconds, 4 * cost.weights)]

    rows = []
    for t in range(config["iterations"] + 1):
        if t:
            train = of_iteration(config["train"], t)
            lora, micro = train["lora_rank"], min(train["micro_batch_size"], train["batch_size"])
            scored = cost_model.score_flops(shape, pairs, p, r)
            trained = (
                scored
                * train["stop_epoch"]
                * cost_model.train_factor(bool(lora), train["gradient_checkpointing"])
            )
            sizes = (micro, longest, responses["max_new_tokens"])
            eager = config["policy"]["attention"] == "eager"
            rows += [
                drawn(t, "generate", prompts, k, r, responses["max_new_tokens"]),
                *compared(t, "annotate", config["preference"]["model"], prompts, k, r),
                Row(
                    t,
                    "reference",
                    pairs,
                    2 * pairs * (p + r),
                    scored,
                    scored / (gpu.flops * use.forward),
                    cost_model.score_bytes(shape, *sizes, bool(lora), eager=eager),
                ),
                Row(
                    t,
                    "train",
                    pairs,
                    2 * pairs * (p + r) * train["stop_epoch"],
                    trained,
                    trained / (gpu.flops * use.training),
                    cost_model.train_bytes(
                        shape, args.gpus, *sizes, lora, train["gradient_checkpointing"], eager=eager
                    ),
                ),
            ]
        rows.append(
            drawn(
                t,
                "answer",
                n * (2 if t == 0 and evaluation["reference"] == "base" else 1),
                1,
                answer,
                evaluation["max_new_tokens"],
            )
        )
        if local_kind(evaluation["judge"]):
            rows += compared(t, "judge", evaluation["judge"], n, 2, answer)
        rows += compared(t, "ranker_estimate", config["preference"]["model"], n, 2, answer)
    return rows


def as_table(rows: list[Row], gpu: Gpu) -> str:
    """Markdown; what needs more memory than the GPU has is marked."""
    lines = [
        "| t | stage | samples | tokens | PFLOP | GPU-hours | peak GB |",
        "|--:|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        hours = short(row.seconds / 3600) if row.seconds is not None else "does not fit"
        lines.append(
            f"| {row.iteration} | {row.stage} | {row.samples:,.0f} | {row.tokens:,.0f} | {short(row.flops / 1e15)} | {hours} | "
            f"{row.memory / GB:.1f}{' (too much)' if row.memory > gpu.memory else ''} |"
        )
    return "\n".join(lines)


def short(value: float) -> str:
    """Three digits of a number below 100, none behind the point above."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def summary(rows: list[Row], config: dict[str, Any], shape: Shape, args: argparse.Namespace) -> str:
    """Totals: hours, disk, what the judge reads, dollars where prices are given."""
    t, hours = config["iterations"], sum(row.seconds or 0 for row in rows) / 3600
    tokens = sum(row.tokens for row in rows if row.stage in ("generate", "answer"))
    disk = (2 + 4 * t + (8 if t else 0)) * shape.weights + STORED_BYTES * tokens
    dollars = (
        f"${hours * args.price:,.0f} at ${args.price:g} an hour"
        if args.price is not None
        else "no price given (--price)"
    )
    lines = [
        f"GPU-hours: {hours:,.1f}, {hours / args.gpus:,.1f} hours on {args.gpus} if all are busy; {dollars}",
        f"Disk: {disk / GB:,.1f} GB: the base, {t} policies in float32, one training's checkpoint, texts",
    ]
    evaluation, answer = (
        config["alpaca_eval"],
        min(args.response_tokens, config["alpaca_eval"]["max_new_tokens"]),
    )
    graded = min(args.response_tokens, config["mt_bench"]["max_new_tokens"])
    for what, section, calls, each in (
        (
            "AlpacaEval",
            evaluation,
            instructions_of(evaluation) * (t + 1),
            JUDGE_PROMPT + args.prompt_tokens + 2 * answer,
        ),
        (
            "MT-Bench, if it is made",
            config["mt_bench"],
            MT_BENCH * (t + 1),
            JUDGE_PROMPT + 2 * args.prompt_tokens + 2 * graded,
        ),
    ):
        if local_kind(section["judge"]):
            continue
        millions, price = calls * each / 1e6, "no price given (--judge-price)"
        if args.judge_price is not None:
            price = f"${millions * args.judge_price:,.0f} at ${args.judge_price:g} a million"
        lines.append(
            f"{what} asks {section['judge_model'] or section['judge']} {calls:,} times, {millions:,.1f} million tokens read: {price}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
