"""Estimate the cost of a configuration: tokens, FLOPs, GPU-hours, time, memory, disk, dollars.

Reads   the main run of the configuration, as Snakemake reads it, with the evaluations that its
        summary shows; it runs and downloads nothing
Writes  tables on standard output, by iteration and stage
The formulas are in src/sppo/reporting/cost_model.py. How long GPUs wait for each other in training
is simulated with random lengths. docs/paper_scale.md compares the formulas with
measured runs. Lengths and the shares of a GPU's peak are assumptions until they are measured:
src/tools/check_estimate.py reads both from the records of a finished run.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _path  # noqa: F401
from sppo.core.artifacts import ROOT, read_json
from sppo.core.config import GPU_MEMORY
from sppo.core.config_files import read_files
from sppo.core.errors import UserError, run
from sppo.core.flags import at_least, of_iteration, positive
from sppo.evaluation import alpaca_eval, arena_hard, ifeval
from sppo.policies.prompts import read_instructions
from sppo.policies.shapes import SHAPES, Shape, shape_of
from sppo.preferences.base import find_kind, local_kind, settings_for
from sppo.reporting import cost_model
from sppo.reporting.cost_model import GB, GPUS, Gpu, Use
from sppo.training.distributed import FSDP
from sppo.training.losses import has_opponents
from sppo.workflow.configuration import resolve

# Tokens of GPT-4 turbo's template in alpaca-eval: 1398 characters, four per token.
JUDGE_PROMPT = 350
STORED_BYTES = 9  # bytes of a stored token: its id and its text
OFFICIAL_SIZES = {
    "alpaca_eval": alpaca_eval.CANONICAL_SIZE,
    "ifeval": ifeval.OFFICIAL_SIZE,
    "arena_hard": arena_hard.OFFICIAL_SIZE,
}
GENERATED = (
    "generate",
    "answer",
    "answer_ifeval",
    "answer_arena_hard",
)  # stages whose tokens are stored
TRAINS = ("generate", "annotate", "reference", "train")  # stages of an iteration without evaluation
# Evaluations whose cost is in the table.
COUNTED = ("alpaca_eval", "against_previous", "ranker_estimate", "ifeval", "arena_hard")
MT_BENCH = 160  # grades of a policy: 80 questions, two turns


@dataclass(frozen=True)
class Row:
    """One stage of one iteration.

    seconds: of all GPUs together; None if the stage does not fit. memory: peak of one GPU in bytes.
    gpus: the number of GPUs that work on the stage at once. rounds: the number of jobs that each of
    them runs, one after another. model: that compares, for a stage of a preference model. requests:
    that it sends to a server; then `tokens` are those that the server reads.
    """

    iteration: int
    stage: str
    samples: float
    tokens: float
    flops: float
    seconds: float | None
    memory: float
    gpus: int = 1
    rounds: int = 1
    model: str = ""
    requests: float = 0

    def minutes(self, start_up: float) -> float | None:
        """From start to end, with `start_up` seconds of each job."""
        if self.seconds is None:
            return None
        return (self.seconds / self.gpus + self.rounds * start_up) / 60


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config",
        type=Path,
        nargs="*",
        default=[],
        help="configuration files, such as a preset; default: the demo's",
    )
    parser.add_argument(
        "--settings", choices=["paper", "repo"], help="replaces the configuration's value"
    )
    parser.add_argument("--gpu", choices=list(GPUS), default="H100")
    parser.add_argument(
        "--gpus",
        type=at_least(1),
        help="number of GPUs that train a policy; default: train.processes",
    )
    parser.add_argument("--peak-tflops", type=positive, help="bfloat16 TFLOP/s of another GPU")
    parser.add_argument("--memory-gb", type=positive, help="memory of another GPU in GB")
    parser.add_argument("--bandwidth-tb", type=positive, help="bandwidth of another GPU in TB/s")
    parser.add_argument(
        "--mfu-training",
        type=positive,
        default=0.35,
        help="assumed share of the peak FLOP/s in training (default: %(default)s)",
    )
    parser.add_argument(
        "--mfu-forward",
        type=positive,
        default=0.4,
        help="assumed share of the peak FLOP/s in forward passes (default: %(default)s)",
    )
    parser.add_argument(
        "--bandwidth-share",
        type=positive,
        default=0.6,
        help="assumed share of the bandwidth in generation (default: %(default)s)",
    )
    parser.add_argument(
        "--start-up",
        type=float,
        default=60,
        help="assumed seconds in which a job imports packages and loads its models "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--prompts",
        type=at_least(1),
        default=20000,
        help="prompts in one iteration, if the source is on the hub (default: %(default)s)",
    )
    parser.add_argument(
        "--prompt-tokens",
        type=at_least(1),
        default=200,
        help="assumed mean length of prompts (default: %(default)s)",
    )
    parser.add_argument(
        "--response-tokens",
        type=at_least(1),
        default=450,
        help="assumed mean length of responses, at most max_new_tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--longest-prompt",
        type=at_least(1),
        default=2048,
        help="assumed length of the longest prompt, if prompts.max_tokens is null "
        "(default: %(default)s)",
    )
    parser.add_argument("--price", type=float, help="dollars per GPU-hour; there is no default")
    parser.add_argument(
        "--judge-price",
        type=float,
        help="dollars per million tokens that the judge's API reads; there is no default",
    )
    args = parser.parse_args()

    config = configuration(args.config, args.settings)
    shape = shape_of_policy(config["policy"])
    gpu = GPUS[args.gpu]
    gpu = Gpu(
        args.peak_tflops * 1e12 if args.peak_tflops else gpu.flops,
        args.memory_gb * GB if args.memory_gb else gpu.memory,
        args.bandwidth_tb * 1e12 if args.bandwidth_tb else gpu.bandwidth,
    )
    use = Use(
        args.mfu_training,
        args.mfu_forward,
        args.bandwidth_share,
        most_sequences(config, gpu),
        config["responses"]["gpu_memory"] or GPU_MEMORY,
    )
    args.gpus = args.gpus or config["train"]["processes"]
    rows = all_rows(config, shape, gpu, use, args)
    print(
        f"{config['name'] or 'The default'}, settings {config['settings']}: "
        f"{config['policy']['model']}, {shape.weights / GB:.2f} billion weights, "
        f"on {args.gpus} x {args.gpu}."
    )
    if beside := config["summary"]["beside"]:
        print(f"Not counted: the runs that the summary shows beside it ({', '.join(beside)})")
    if others := [name for name in config["summary"]["evaluations"] if name not in COUNTED]:
        print(f"Not counted: the evaluations {', '.join(others)}")
    print(as_table(rows, gpu, args.start_up))
    print(summary(rows, config, shape, args))


def configuration(files: list[Path], settings: str | None) -> dict[str, Any]:
    """The configuration of the main run, resolved as in the Snakefile."""
    written = read_files(files or [ROOT / "config" / "config.yaml"])
    return resolve(written | ({"settings": settings} if settings else {}))[""]


def shape_of_policy(policy: dict[str, Any]) -> Shape:
    """The policy's shape, from the table `SHAPES`, a model folder, or the hub's local cache.

    UserError if the shape is unknown.
    """
    from huggingface_hub import try_to_load_from_cache

    if policy["model"] in SHAPES:
        return SHAPES[policy["model"]]
    file: Any = Path(policy["model"]).expanduser() / "config.json"
    if not file.is_file() and policy["model"].count("/") == 1:
        file = try_to_load_from_cache(policy["model"], "config.json", revision=policy["revision"])
    if not isinstance(file, (str, Path)) or not Path(file).is_file():
        raise UserError(
            f"policy.model is {policy['model']}, whose shape is unknown here; give a model folder, "
            f"a model that was fetched, or one of {', '.join(SHAPES)}"
        )
    return shape_of(read_json(Path(file)))


def most_sequences(config: dict[str, Any], gpu: Gpu) -> int:
    """The number of sequences that the engine generates at the same time."""
    responses = config["responses"]
    if responses["batch_size"]:
        return responses["batch_size"]
    if responses["engine"] == "transformers":
        return 64
    # vLLM's own choice, which is the smaller number for an A100 too.
    return 1024 if gpu.memory >= 70 * GB and gpu.flops > GPUS["A100"].flops else 256


def prompts_of_an_iteration(config: dict[str, Any], assumed: int) -> int:
    """Number of prompts in an iteration.

    It is the configured number, or an equal share of the lines of a file, or `assumed` for a hub
    data set.
    """
    prompts = config["prompts"]
    if prompts["per_iteration"]:
        return prompts["per_iteration"]
    source = Path(prompts["source"].replace("{t}", "1"))
    if not source.is_file():
        return assumed
    lines = source.read_bytes().split(b"\n")
    is_divided = not prompts["repeat"] and "{t}" not in prompts["source"]
    parts = max(config["iterations"], 1) if is_divided else 1
    return sum(1 for line in lines if line.strip()) // parts


def instructions_of(config: dict[str, Any], evaluation: str) -> int:
    """Number of instructions of the evaluation `alpaca_eval`, `ifeval` or `arena_hard`."""
    section = config[evaluation]
    if section["limit"]:
        return section["limit"]
    if section["instructions"] == "official":
        return OFFICIAL_SIZES[evaluation]
    return len(read_instructions(Path(section["instructions"])))


def pairs_of_a_prompt(pairs: dict[str, Any], samples: int) -> int:
    """Maximum number of pairs of one prompt. pairs: the section `pairs`."""
    if pairs["construction"] == "all":
        number = samples * (samples - 1) // 2
    elif pairs["construction"] == "graded":
        # The gold response is one more; all pairs can have grades that are far enough apart.
        number = samples * (samples + 1) // 2
    else:
        number = 1
    return number * 2 if pairs["target_reward"] else number


def times_scored(train: dict[str, Any], t: int) -> int:
    """How many policies score the pairs of iteration t: pi_t, and those that the method adds.

    They are the reference, if it is not pi_t, the earlier opponents of MNPO, and the auxiliary
    policy of ONPO.
    """
    every = train["reference_every"]
    reference = 0 if every is None else (t - 1) - (t - 1) % every
    opponents = len(train["history"][:t]) if has_opponents(train["loss"]) else 1
    return opponents + (reference != t - 1) + train["lookahead"]


@dataclass(frozen=True)
class Estimator:
    """The rows of the stages, from mean lengths in tokens.

    longest: length of the longest prompt in tokens. gpus: number of GPUs that train a policy; the
    shards of other stages use as many at once.
    """

    config: dict[str, Any]
    shape: Shape
    gpu: Gpu
    use: Use
    prompt: int
    response: int
    longest: int
    gpus: int

    @property
    def sharded(self) -> tuple[int, int]:
        """The number of GPUs that work on the shards of a stage at once, and of jobs for each."""
        shards = self.config["responses"]["shards"]
        gpus = min(self.gpus, shards)
        return gpus, math.ceil(shards / gpus)

    def generation(
        self,
        t: int,
        stage: str,
        prompts: int,
        samples: int,
        length: int,
        max_length: int,
        jobs: tuple[int, int] = (1, 1),
    ) -> Row:
        """A stage that generates `samples` responses to each prompt. jobs: as `sharded`."""
        shape, gpu, use = self.shape, self.gpu, self.use
        context = self.prompt + length / 2
        tokens = prompts * samples * length
        prefill = cost_model.forward_flops(shape, prompts * self.prompt, self.prompt / 2, 0)
        seconds = cost_model.decode_seconds(shape, gpu, use, tokens, context)
        if seconds:
            seconds += prefill / (gpu.flops * use.forward)
        sequences = cost_model.concurrent_sequences(shape, gpu, context, use)
        typical = 2 * shape.weights + sequences * shape.kv_bytes * context
        longest = 2 * shape.weights + shape.kv_bytes * (self.longest + max_length)
        flops = cost_model.generate_flops(shape, prompts, self.prompt, samples, length)
        memory = max(typical, longest)
        return Row(t, stage, prompts * samples, tokens, flops, seconds, memory, *jobs)

    def comparison(
        self,
        t: int,
        stage: str,
        settings: dict[str, Any],
        prompts: int,
        samples: int,
        length: int,
        jobs: tuple[int, int] = (1, 1),
    ) -> list[Row]:
        """The stage of a preference model; empty if its cost is unknown.

        settings: the section `preference` that names the model. jobs: as `sharded`.
        """
        model = settings["model"]
        kind = find_kind(settings)
        cost = kind.cost(settings, prompts, self.prompt, samples, length) if kind else None
        if not cost:
            if t == self.config["iterations"]:  # the last iteration has all stages
                print(f"Not counted: {stage}, because the cost of {model} is not known")
            return []
        seconds = cost.flops / (self.gpu.flops * self.use.forward)
        memory = 4 * cost.weights
        return [
            Row(
                t,
                stage,
                prompts,
                cost.tokens,
                cost.flops,
                seconds,
                memory,
                *jobs,
                model,
                cost.requests,
            )
        ]

    def training(self, t: int, pairs: int) -> list[Row]:
        """The stages that score the pairs and train the policy of iteration t."""
        shape, gpu, use = self.shape, self.gpu, self.use
        train = of_iteration(self.config["train"], t)
        rank = train["lora_rank"]
        every = cost_model.checkpointed_every(train)
        eager = self.config["policy"]["attention"] == "eager"
        longest_response = self.config["responses"]["max_new_tokens"]
        passes = cost_model.largest_passes(train, self.longest, longest_response)
        tokens = 2 * pairs * (self.prompt + self.response)
        scored = cost_model.score_flops(shape, pairs, self.prompt, self.response)
        factor = cost_model.train_factor(shape, bool(rank), every)
        trainings = 2 if train["lookahead"] else 1
        trained = trainings * scored * train["stop_epoch"] * factor
        scorings = times_scored(train, t)
        rounded = bool(rank) or train["parallel"] in FSDP
        copies = train["nodes"] if train["parallel"] == "hsdp" else 1
        divided_over = max(1, self.gpus // copies)
        # See choose_layout in training/batches.py.
        attention = self.config["policy"]["attention"]
        packs = attention in (None, "sdpa") or (eager and shape.softcap)
        balance = cost_model.load_balance(
            train,
            self.gpus,
            "packed" if packs else "padded",
            self.prompt,
            self.response,
            self.longest,
            longest_response,
        )
        return [
            Row(
                t,
                "reference",
                pairs,
                scorings * tokens,
                scorings * scored,
                scorings * scored / (gpu.flops * use.forward),
                max(
                    cost_model.score_bytes(shape, *sizes, rounded, eager=eager) for sizes in passes
                ),
                *self.sharded,
            ),
            Row(
                t,
                "train",
                pairs,
                trainings * tokens * train["stop_epoch"],
                trained,
                trained / (gpu.flops * use.training) / balance,
                max(
                    cost_model.train_bytes(shape, divided_over, *sizes, rank, every, eager=eager)
                    for sizes in passes
                ),
                self.gpus,
            ),
        ]


def all_rows(
    config: dict[str, Any], shape: Shape, gpu: Gpu, use: Use, args: argparse.Namespace
) -> list[Row]:
    """The stages of iterations 1 to T, and the evaluation of iterations 0 to T.

    The base answers the instructions twice if it is also the reference.
    """
    responses = config["responses"]
    samples = responses["samples"]
    prompts = prompts_of_an_iteration(config, args.prompts)
    response = min(args.response_tokens, responses["max_new_tokens"])
    pairs = prompts * pairs_of_a_prompt(config["pairs"], samples)
    ranker = config["preference"]
    evaluation = config["alpaca_eval"]
    shown = config["summary"]["evaluations"]
    instructions = instructions_of(config, "alpaca_eval")
    answer = min(args.response_tokens, evaluation["max_new_tokens"])
    estimate = Estimator(
        config,
        shape,
        gpu,
        use,
        prompt=args.prompt_tokens,
        response=response,
        longest=config["prompts"]["max_tokens"] or args.longest_prompt,
        gpus=args.gpus,
    )
    rows = []
    for t in range(config["iterations"] + 1):
        if t:
            rows.append(
                estimate.generation(
                    t,
                    "generate",
                    prompts,
                    samples,
                    response,
                    responses["max_new_tokens"],
                    estimate.sharded,
                )
            )
            rows += estimate.comparison(
                t, "annotate", ranker, prompts, samples, response, estimate.sharded
            )
            rows += estimate.training(t, pairs)
        answers = instructions
        if t == 0 and evaluation["reference"] == "base":
            answers = 2 * instructions
        rows.append(
            estimate.generation(t, "answer", answers, 1, answer, evaluation["max_new_tokens"])
        )
        if local_kind(evaluation["judge"]):
            judge = settings_for(evaluation["judge"])
            rows += estimate.comparison(t, "judge", judge, instructions, 2, answer)
            if t and "against_previous" in shown:
                rows += estimate.comparison(t, "against_previous", judge, instructions, 2, answer)
        if "ranker_estimate" in shown:
            rows += estimate.comparison(t, "ranker_estimate", ranker, instructions, 2, answer)
        if "ifeval" in shown and not ifeval.uses_alpaca_eval_answers(config):
            longest = config["ifeval"]["max_new_tokens"]
            length = min(args.response_tokens, longest)
            prompts_of_ifeval = instructions_of(config, "ifeval")
            rows.append(
                estimate.generation(t, "answer_ifeval", prompts_of_ifeval, 1, length, longest)
            )
        if "arena_hard" in shown:
            longest = config["arena_hard"]["max_new_tokens"]
            length = min(args.response_tokens, longest)
            questions = instructions_of(config, "arena_hard")
            against_base = t == 0 and config["arena_hard"]["reference"] == "base"
            asked = 2 * questions if against_base else questions
            rows.append(estimate.generation(t, "answer_arena_hard", asked, 1, length, longest))
            if local_kind(config["arena_hard"]["judge"]):
                judge = settings_for(config["arena_hard"]["judge"])
                rows += estimate.comparison(t, "judge_arena_hard", judge, questions, 2, length)
    return rows


def as_table(rows: list[Row], gpu: Gpu, start_up: float) -> str:
    """The table in Markdown. Stages that need more memory than the GPU has are marked."""
    by_gpus = [row for row in rows if row.flops or not row.requests]
    lines = [
        "| t | stage | samples | tokens | PFLOP | GPU-hours | GPUs | minutes | peak GB |",
        "|--:|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in by_gpus:
        hours = short(row.seconds / 3600) if row.seconds is not None else "does not fit"
        minutes = row.minutes(start_up)
        time = "does not fit" if minutes is None else short(minutes)
        mark = " (too much)" if row.memory > gpu.memory else ""
        lines.append(
            f"| {row.iteration} | {row.stage} | {row.samples:,.0f} | {row.tokens:,.0f} "
            f"| {short(row.flops / 1e15)} | {hours} | {row.gpus} | {time} "
            f"| {row.memory / GB:.1f}{mark} |"
        )
    return "\n".join(lines)


def short(value: float) -> str:
    """The number with three digits if it is below 100, and without decimals otherwise."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def summary(rows: list[Row], config: dict[str, Any], shape: Shape, args: argparse.Namespace) -> str:
    """Totals: hours, disk, tokens that the judge reads, and dollars if prices are given."""
    iterations = config["iterations"]
    hours = sum(row.seconds or 0 for row in rows) / 3600
    tokens = sum(row.tokens for row in rows if row.stage in GENERATED)
    bytes_per_weight = 2 + 4 * iterations + (8 if iterations else 0)
    disk = bytes_per_weight * shape.weights + STORED_BYTES * tokens
    dollars = "no price given (--price)"
    if args.price is not None:
        dollars = f"${hours * args.price:,.0f} at ${args.price:g} an hour"
    last = [row for row in rows if row.iteration == iterations]
    trained, all_stages = (
        sum(row.minutes(args.start_up) or 0 for row in last if row.stage in TRAINS or not only)
        for only in (True, False)
    )
    lines = [
        f"GPU-hours: {hours:,.1f}, while a GPU is in use; {dollars}",
        f"Iteration {iterations}, one stage after another: {trained:,.0f} minutes until its policy "
        f"is trained, {all_stages:,.0f} with its evaluations"
        + (", without the time of servers" if any(row.requests for row in rows) else ""),
        f"Disk: {disk / GB:,.1f} GB: the base, {iterations} policies in float32, one training's "
        "checkpoint, texts",
    ]
    for stage, model in dict.fromkeys((row.stage, row.model) for row in rows if row.requests):
        own = [row for row in rows if (row.stage, row.model) == (stage, model)]
        requests = sum(row.requests for row in own)
        tokens = sum(row.tokens for row in own)
        lines.append(server_cost(stage, model, requests, tokens, args.judge_price))
    return "\n".join([*lines, *judges_of_packages(config, args)])


def judges_of_packages(config: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """A line for each judge behind an API that is no preference model of this repository."""
    policies = config["iterations"] + 1

    def length(evaluation: dict[str, Any]) -> int:
        return min(args.response_tokens, evaluation["max_new_tokens"])

    lines = []
    evaluation = config["alpaca_eval"]
    if not local_kind(evaluation["judge"]):
        comparisons = policies
        if "against_previous" in config["summary"]["evaluations"]:
            comparisons += config["iterations"]
        repeats = evaluation["judge_passes"] * (2 if evaluation["both_orders"] else 1)
        requests = instructions_of(config, "alpaca_eval") * comparisons * repeats
        tokens = requests * (JUDGE_PROMPT + args.prompt_tokens + 2 * length(evaluation))
        lines.append(
            server_cost("AlpacaEval", judge_name(evaluation), requests, tokens, args.judge_price)
        )
    evaluation = config["mt_bench"]
    if not local_kind(evaluation["judge"]):
        requests = MT_BENCH * policies
        tokens = requests * (JUDGE_PROMPT + 2 * args.prompt_tokens + 2 * length(evaluation))
        name = "MT-Bench, if it is made,"
        lines.append(server_cost(name, judge_name(evaluation), requests, tokens, args.judge_price))
    evaluation = config["arena_hard"]
    if not local_kind(evaluation["judge"]):
        requests = 2 * instructions_of(config, "arena_hard") * policies  # in both orders
        tokens = requests * (JUDGE_PROMPT + args.prompt_tokens + 2 * length(evaluation))
        shown = "arena_hard" in config["summary"]["evaluations"]
        name = "Arena-Hard" if shown else "Arena-Hard, if it is made,"
        lines.append(server_cost(name, judge_name(evaluation), requests, tokens, args.judge_price))
    return lines


def judge_name(evaluation: dict[str, Any]) -> str:
    return evaluation["judge_model"] or evaluation["judge"]


def server_cost(
    what: str, model: str, requests: float, tokens: float, dollars_per_million: float | None
) -> str:
    """A line about the cost of a model behind a server."""
    millions = tokens / 1e6
    price = "no price given (--judge-price)"
    if dollars_per_million is not None:
        price = f"${millions * dollars_per_million:,.0f} at ${dollars_per_million:g} a million"
    return (
        f"{what} asks {model} {requests:,.0f} times, {millions:,.1f} million tokens read: {price}"
    )


if __name__ == "__main__":
    run(main)
