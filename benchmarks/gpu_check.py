"""Check numbers, speed and memory on one GPU in ten minutes.

    python benchmarks/gpu_check.py --shape 7b                  # ten minutes, a GPU of 80 GB
    python benchmarks/gpu_check.py --shape tiny --device cpu   # the same on a processor

Each section runs in its own process with its own time limit, so that a failing section does not
stop the others:

1  sdpa         log-probabilities and gradients at widths 704 and 700 must be finite and equal:
                padded left with cuDNN on and off, and padded as the project pads
2  numerics     differences between bfloat16 and float32, between two batchings, and between packed
                and padded sequences; the tolerance of the step-0 identity must cover them
3  programs     score_reference.py and train_policy.py: train, kill, resume; LoRA
4  fsdp2        FSDP2 with one process: checkpoint, RMSProp, clipping, resume, gathering the weights
5  throughput   training tokens per second, for equal and ragged lengths, packed and padded; the
                project's trainer and TRL's DPOTrainer
6  memory       peaks of training compared with src/sppo/reporting/cost_model.py; LoRA at full depth
                within 24 GB
7  pairrm       PairRM's shape: pairs per second, and the error of P in bfloat16
8  generation   the transformers engine: equal seeds in different batches, tokens per second

The weights are random. The head is scaled until the entropy of a token is 1.5 nats, as in a real
model. Nothing is downloaded. The check needs torch, transformers, accelerate and peft. Without
jsonschema or pyarrow it uses replacements. It skips the parts for which TRL or a GPU is missing,
and reports them as skipped. On a processor the whole check takes about two minutes.

The report (--output) is a file of JSON lines. Each line is written at once and has: section, name,
status (ok, failed, measured, skipped), values, seconds, card, torch, cuda, transformers. The last
line, section `summary`, counts the others. The exit status is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import importlib.util
import inspect
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / "src")]

import sppo  # noqa: F401  (sets OMP_WAIT_POLICY before torch is imported)

if TYPE_CHECKING:
    from sppo.training.lengths import Layout

ENTROPY = 1.5  # nats of a token
ENVIRONMENT = "environment"
# Time limit of each section in seconds, ten minutes in total. On a machine that has just started,
# each program needs 15 seconds to import torch and transformers, and `programs` runs six programs.
LIMITS = {
    "sdpa": 40,
    "numerics": 40,
    "programs": 165,
    "fsdp2": 75,
    "throughput": 150,
    "memory": 35,
    "pairrm": 45,
    "generation": 45,
}
FSDP_CHILD = "fsdp2_child"
WIDE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}
# For programs that write policies and checkpoints to disk: heads of the same size, a quarter of the
# weights in each layer.
NARROW = WIDE | {
    "hidden_size": 2048,
    "intermediate_size": 7168,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
# What the sections need for each shape: the model, its layers, and the amount of work.
SHAPES: dict[str, dict[str, Any]] = {
    "7b": {
        "wide": WIDE,
        "narrow": NARROW,
        "shallow": 2,
        "layers": 8,
        "full": 32,
        "pairs": 32,
        "longest": 2048,
        "responses": (1, 8, 64, 512),
        "widths": (704, 700),
        "repeats": 2,
        "memory_layers": (2, 4, 8),
        "memory_tokens": 1024,
        "pairrm": {},
        "pairrm_words": (200, 400),
        "pairrm_prompts": 8,
        "prompts": 32,
        "new_tokens": 128,
    },
    "tiny": {
        "wide": TINY,
        "narrow": TINY,
        "shallow": 2,
        "layers": 2,
        "full": 3,
        "pairs": 8,
        "longest": 48,
        "responses": (1, 8, 16),
        "widths": (704, 700),
        "repeats": 1,
        "memory_layers": (2, 3),
        "memory_tokens": 32,
        "pairrm": {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
        },
        "pairrm_words": (20, 40),
        "pairrm_prompts": 4,
        "prompts": 4,
        "new_tokens": 8,
    },
}


class Report:
    """Appends lines to the report. Each line is on disk before the next check starts."""

    def __init__(self, path: Path, section: str, facts: dict[str, Any]) -> None:
        self.path, self.section, self.facts = path, section, facts
        self.began = time.perf_counter()

    def line(self, name: str, status: str, **values: Any) -> None:
        now = time.perf_counter()
        row = {
            "section": self.section,
            "name": name,
            "status": status,
            "values": plain(values),
            "seconds": round(now - self.began, 2),
            **self.facts,
        }
        self.began = now
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        print(f"{self.section:12} {status:8} {name}  {json.dumps(row['values'])}", flush=True)

    def check(self, name: str, holds: bool, **values: Any) -> None:
        self.line(name, "ok" if holds else "failed", **values)

    def measure(self, name: str, **values: Any) -> None:
        self.line(name, "measured", **values)

    def skip(self, name: str, why: str) -> None:
        self.line(name, "skipped", why=why)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Report an error inside the block as a failed line, so that the section continues."""
        try:
            yield
        except Exception as error:
            text = " ".join(str(error).split())
            self.line(name, "failed", error=f"{type(error).__name__}: {text[-600:]}")
            release()


def plain(value: Any) -> Any:
    """The value as JSON: floats have four digits; NaN, infinities and other types become text."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else str(value)
    return value if isinstance(value, (int, str, bool)) or value is None else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--device", choices=["auto", "cpu", "gpu"], default="auto")
    parser.add_argument(
        "--sections", default="1,2,3,4,5,6,7,8", help="numbers, such as 1,2,5 (default: all)"
    )
    parser.add_argument("--output", type=Path, default=Path("gpu_check.jsonl"))
    parser.add_argument("--section", help="used when this program calls itself")
    args = parser.parse_args()
    if args.section:
        stand_ins()
        run_section(args)
        return
    names = list(LIMITS)
    try:
        chosen = [names[int(number) - 1] for number in args.sections.split(",")]
    except (ValueError, IndexError):
        parser.error(
            f"--sections is {args.sections}; give numbers from 1 to {len(names)}, such as 1,2,5"
        )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text("", encoding="utf-8")
    for name in [ENVIRONMENT, *chosen]:
        supervise(name, args)
    rows = lines_of(args.output)
    counts = {
        status: sum(row["status"] == status for row in rows)
        for status in ("ok", "failed", "measured", "skipped")
    }
    failed = [f"{row['section']}: {row['name']}" for row in rows if row["status"] == "failed"]
    reported = {row["section"] for row in rows}
    silent = [name for name in chosen if name not in reported]
    Report(args.output, "summary", facts_of(args.output)).line(
        "summary",
        "failed" if failed or silent else "ok",
        **counts,
        what_failed=failed,
        without_a_line=silent,
    )
    sys.exit(1 if failed or silent else 0)


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def facts_of(path: Path) -> dict[str, Any]:
    """Card and versions from the first line of the report; None before there is one."""
    found = next((row for row in lines_of(path) if row["section"] == ENVIRONMENT), {})
    return {key: found.get(key) for key in ("card", "torch", "cuda", "transformers")}


def supervise(name: str, args: argparse.Namespace) -> None:
    """Run a section in its own process; a crash or a timeout is a failed line of the report."""
    factor = 4 if args.shape == "tiny" else 1  # a processor may be slow or shared
    limit = LIMITS.get(name, 60) * factor
    words = [
        "--section",
        name,
        "--shape",
        args.shape,
        "--device",
        args.device,
        "--output",
        str(args.output),
    ]
    child = subprocess.Popen([sys.executable, __file__, *words], start_new_session=True)
    try:
        status: int | None = child.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        status = None
    finally:
        # This also ends processes that the section has started and not ended.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    report = Report(args.output, name, facts_of(args.output))
    if status is None:
        report.line("time limit", "failed", limit_seconds=limit)
    elif status:
        report.line("crash", "failed", exit_status=status)


def stand_ins() -> None:
    """Let the project run without jsonschema and pyarrow, and train with older transformers.

    jsonschema checks the configuration of a user, which does not exist here. Tables are written as
    JSON lines instead, under the same names. `activation_checkpointing` was called
    `gradient_checkpointing` in older versions of transformers.
    """
    if not installed("jsonschema"):
        sys.modules["jsonschema"] = mock.MagicMock()
    if not installed("pyarrow"):
        tables = types.ModuleType("sppo.core.tables")
        vars(tables).update(read_table=read_lines, write_table=write_lines)
        sys.modules["sppo.core.tables"] = tables
    from transformers import TrainingArguments

    take_new_name(TrainingArguments)


def take_new_name(arguments: type) -> None:
    """Let an old class of training arguments accept `activation_checkpointing`."""
    if "activation_checkpointing" in inspect.signature(arguments).parameters:
        return
    begin = arguments.__init__

    def renamed(
        self: Any,
        *words: Any,
        activation_checkpointing: bool = False,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        **more: Any,
    ) -> None:
        begin(
            self,
            *words,
            gradient_checkpointing=activation_checkpointing or gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},  # all layers or none
            **more,
        )

    arguments.__init__ = renamed  # type: ignore[method-assign]


def installed(package: str) -> bool:
    """Whether the package is installed; a stand-in does not count."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # a stand-in in sys.modules has no spec
        return False


def read_lines(path: Path, name: str) -> list[dict[str, Any]]:
    """Replaces sppo.core.tables.read_table."""
    return lines_of(Path(path))


def write_lines(path: Path, rows: list[dict[str, Any]], name: str) -> None:
    """Replaces sppo.core.tables.write_table."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run_section(args: argparse.Namespace) -> None:
    """Run one section in this process and append its lines to the report."""
    import torch
    import transformers

    from sppo.policies.devices import pick_device, start_torch

    start_torch()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = pick_device(args.device)
    facts = {
        "card": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
    }
    report = Report(args.output, args.section.removesuffix("_child"), facts)
    shape = SHAPES[args.shape]
    with tempfile.TemporaryDirectory(prefix="gpu_check.") as folder, report.step("section"):
        SECTIONS[args.section](report, shape, device, Path(folder))


# --- shared by the sections ---


def release() -> None:
    """Free the memory of deleted objects and reset the peak, before the next measurement."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def synchronise(device: str) -> None:
    """Wait until the GPU has finished, so that a time that is read next is correct."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def make_model(
    sizes: dict[str, Any], layers: int, device: str, dtype: str = "float32", **more: Any
) -> Any:
    """A Mistral with random weights in training mode.

    Its head is scaled so that the entropy of a token is `ENTROPY` nats.
    """
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        **sizes,
        num_hidden_layers=layers,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **{"sliding_window": None} | more,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            model = MistralForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    scale_head(model)
    return model.train()


def capped_model(sizes: dict[str, Any], layers: int, device: str) -> Any:
    """A Gemma-2 with random weights, whose soft cap and sliding window have an effect."""
    import torch
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        **sizes,
        num_hidden_layers=layers,
        head_dim=sizes["hidden_size"] // sizes["num_attention_heads"],
        sliding_window=16,
        attn_logit_softcapping=0.5,
        final_logit_softcapping=None,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.device(device):
        model = Gemma2ForCausalLM(config)
    for layer in model.model.layers:  # products of queries and keys above the cap
        layer.self_attn.k_proj.weight.data *= 100
    scale_head(model)
    return model.eval()


def scale_head(model: Any) -> None:
    """Scale the output layer so that the mean entropy of a token is `ENTROPY`."""
    import torch

    ids = torch.randint(
        3, model.config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        logits = model(ids.to(model.device), use_cache=False).logits.float()
        model.lm_head.weight.mul_(scale_for_entropy(logits))


def scale_for_entropy(logits: Any) -> float:
    """The factor of the logits that gives a mean entropy of `ENTROPY`, found by bisection."""
    low, high = 0.0, 64.0
    for _ in range(30):
        middle = (low + high) / 2
        logp = (middle * logits).log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1).mean().item()
        if entropy > ENTROPY:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def make_pairs(
    vocabulary: int, lengths: list[tuple[int, int, int]], seed: int = 0
) -> list[dict[str, Any]]:
    """Pairs of random token ids; `lengths` are of prompt, chosen and rejected response."""
    draw = random.Random(seed)

    def ids(length: int) -> list[int]:
        return [draw.randrange(3, vocabulary) for _ in range(length)]

    return [
        {
            "pair_id": i,
            "prompt_id": f"p{i}",
            "prompt_token_ids": ids(p),
            "chosen": "a",
            "chosen_sample_id": 0,
            "chosen_token_ids": ids(c),
            "rejected": "b",
            "rejected_sample_id": 1,
            "rejected_token_ids": ids(r),
            "p_hat_chosen": draw.uniform(0.5, 0.9),
            "p_hat_rejected": draw.uniform(0.1, 0.5),
            "p_chosen_beats_rejected": draw.uniform(0.5, 1.0),
        }
        for i, (p, c, r) in enumerate(lengths)
    ]


def ragged(count: int, longest: int, seed: int = 1) -> list[tuple[int, int, int]]:
    """Realistic lengths: log-normal, prompts shorter than responses, cut at `longest` // 2."""
    draw = random.Random(seed)

    def length(share: float) -> int:
        return max(2, min(longest // 2, round(longest * share * math.exp(draw.gauss(0.0, 0.8)))))

    return [(length(0.07), length(0.17), length(0.17)) for _ in range(count)]


def with_reference(pairs: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pairs with the log-probabilities of `rows`, both as current policy and as reference."""
    scored = []
    for pair, row in zip(pairs, rows, strict=True):
        logps = {
            f"{role}_{side}": row[f"{side}_logp"]
            for role in ("current", "reference", "opponents")
            for side in ("chosen", "rejected")
        }
        scored.append(pair | logps)
    return scored


def options_of_training(**more: Any) -> dict[str, Any]:
    """The configuration section `train` with the paper's values."""
    from sppo.core.config import default_of, schema

    rules = schema()["properties"]["train"]["properties"]
    return {key: default_of(rule, "paper") for key, rule in rules.items()} | more


def left_padded_logps(model: Any, pairs: list[dict[str, Any]], device: str) -> Any:
    """log pi(y|x) in nats, (2B,), chosen responses first, computed with left padding and a mask.

    Earlier versions of the project computed it in this way.
    """
    import torch

    prompts = [pair["prompt_token_ids"] for pair in pairs] * 2
    answers = [pair[f"{side}_token_ids"] for side in ("chosen", "rejected") for pair in pairs]
    before, after = max(map(len, prompts)), max(map(len, answers))
    ids = torch.zeros(len(prompts), before + after, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        where = slice(before - len(prompt), before + len(answer))
        ids[row, where] = torch.tensor(prompt + answer)
        mask[row, where] = 1
    ids, mask = ids.to(device), mask.to(device)
    logits = (
        model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            logits_to_keep=after + 1,
            use_cache=False,
        )
        .logits[:, :-1]
        .float()
    )
    chosen = logits.gather(-1, ids[:, before:, None]).squeeze(-1) - logits.logsumexp(-1)
    return (chosen * mask[:, before:]).sum(-1)


def project_logps(
    model: Any, pairs: list[dict[str, Any]], device: str, layout: Layout = "padded"
) -> Any:
    """log pi(y|x) in nats, (2B,), chosen responses first, with the project's functions."""
    import torch

    from sppo.training import attention
    from sppo.training.batches import CAPPED_MODELS, pair_batch
    from sppo.training.logps import response_logps

    if layout == "packed":
        attention.use(model, attention.PACKED)
    else:
        has_cap = model.config.model_type in CAPPED_MODELS
        model.set_attn_implementation("eager" if has_cap else "sdpa")
    batch = {
        key: value.to(device) if torch.is_tensor(value) else value
        for key, value in pair_batch(pairs, layout).items()
    }
    return response_logps(model, batch)


def finite_gradient(model: Any) -> tuple[bool, float]:
    """Whether every gradient is finite, and their norm."""
    import torch

    norms = [p.grad.float().norm() for p in model.parameters() if p.grad is not None]
    norm = torch.stack(norms).norm().item()
    return math.isfinite(norm), norm


def program(name: str, *words: object) -> list[str]:
    """The command that runs a program of src/ with the stand-ins of this module."""
    here = str(Path(__file__).parent)
    code = (
        f"import sys; sys.path.insert(0, {here!r})\n"
        "import gpu_check; gpu_check.stand_ins()\n"
        f"import {name}; from sppo.core.errors import run\n"
        f"sys.argv[0] = {name}.__file__; run({name}.main)"
    )
    return [sys.executable, "-c", code, *map(str, words)]


def save_policy(model: Any, folder: Path) -> None:
    """Save the model as a Hugging Face folder, with a tokenizer in which each word is a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model.save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {
        f"w{i}": i for i in range(3, model.config.vocab_size)
    }
    whole = Tokenizer(models.WordLevel(words, "<pad>"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=whole,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
    )
    fast.chat_template = (
        "{{ bos_token }}{% for m in messages %} w3 {{ m['content'] }}{% endfor %} w4"
    )
    fast.save_pretrained(folder)


# --- the sections ---


def environment(report: Report, shape: dict[str, Any], device: str, folder: Path) -> None:
    """Report the machine and the packages."""
    import torch

    from sppo.core.artifacts import package_versions
    from sppo.policies.devices import compute_dtype

    wanted = ("jsonschema", "pyarrow", "trl", "datasets", "flash_attn", "vllm")
    values: dict[str, Any] = {
        "python": sys.version.split()[0],
        "cores": os.cpu_count(),
        "packages": package_versions(),
        "missing": [name for name in wanted if not installed(name)],
    }
    if device == "cuda":
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip()
        of_card = torch.cuda.get_device_properties(0)
        values |= {
            "driver": driver,
            "memory_gb": of_card.total_memory / 1e9,
            "capability": f"{of_card.major}.{of_card.minor}",
        }
    report.check("precision auto", True, dtype=compute_dtype("auto", device), **values)


def sdpa(report: Report, shape: dict[str, Any], device: str, folder: Path) -> None:
    """Section 1: kernels of attention, and two ways to pad."""
    import torch

    from sppo.training.logps import forward_precision

    dtype = torch.bfloat16
    enable_cudnn = getattr(torch.backends.cuda, "enable_cudnn_sdp", lambda on: None)
    for width in shape["widths"]:
        for name in ("cudnn", "efficient", "math"):
            with report.step(f"kernel {name}, width {width}"):
                if device == "cpu" and name != "math":
                    report.skip(f"kernel {name}, width {width}", "no GPU")
                    continue
                try:
                    values = masked_kernel(name, width, device)
                except RuntimeError as error:  # the GPU or the build of torch lacks the kernel
                    values = {"error": str(error)[-300:]}
                report.measure(f"kernel {name}, width {width}", **values)
    model = make_model(shape["wide"], shape["shallow"], device)
    for width in shape["widths"]:
        lengths = [
            (width // 2 - short, width // 2, width // 2 - short // 2)
            for short in (0, 5, width // 4, width // 3)
        ]
        pairs = make_pairs(shape["wide"]["vocab_size"], lengths)
        found = {}
        ways: dict[str, tuple[bool, Callable]] = {
            "as the project pads": (True, project_logps),
            "padded left, cuDNN off": (False, left_padded_logps),
            "padded left, cuDNN on": (True, left_padded_logps),
        }
        for name, (cudnn, logps_of) in ways.items():
            with report.step(f"{name}, width {width}"):
                enable_cudnn(cudnn)
                model.zero_grad()
                with forward_precision(device, dtype):
                    logps = logps_of(model, pairs, device)
                logps.mean().backward()
                finite, norm = finite_gradient(model)
                found[name] = logps.detach().float()
                values = {
                    "logps_finite": bool(logps.isfinite().all()),
                    "gradient_finite": finite,
                    "gradient_norm": norm,
                }
                # This fails on some GPUs. It is only measured, because the project does not use it.
                if name == "padded left, cuDNN on":
                    report.measure(f"{name}, width {width}", **values)
                else:
                    report.check(
                        f"{name}, width {width}", values["logps_finite"] and finite, **values
                    )
        if {"as the project pads", "padded left, cuDNN off"} <= found.keys():
            ours, left = found["as the project pads"], found["padded left, cuDNN off"]
            tokens = torch.tensor(
                [len(p[f"{s}_token_ids"]) for s in ("chosen", "rejected") for p in pairs],
                device=device,
            )
            gap = ((ours - left).abs() / tokens).max().item()
            report.check(f"padding changes nothing, width {width}", gap < 5e-2, nats_a_token=gap)
        enable_cudnn(True)


def masked_kernel(name: str, width: int, device: str) -> dict[str, Any]:
    """Forward and backward pass of one attention kernel, with left padding.

    Every score is near -100, because cuDNN's backward pass gave NaN in this case.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kind = {
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }[name]
    torch.manual_seed(0)
    query = torch.ones(2, 4, width, 64, device=device, dtype=torch.bfloat16) + 0.1 * torch.randn(
        2, 4, width, 64, device=device, dtype=torch.bfloat16
    )
    key = (-12.5 * query).detach().requires_grad_()
    query.requires_grad_()
    value = torch.randn_like(query).requires_grad_()
    mask = (
        torch.ones(width, width, dtype=torch.bool, device=device)
        .tril()[None, None]
        .repeat(2, 1, 1, 1)
    )
    mask[1, :, :, : width // 4] = False
    with sdpa_kernel(kind):
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    seen = out[1, :, width // 4 :]
    (out[0].float().sum() + seen.float().sum()).backward()
    return {
        "output_finite": bool(seen.isfinite().all()),
        "padded_rows_finite": bool(out.isfinite().all()),
        "gradient_finite": all(bool(part.grad.isfinite().all()) for part in (query, key, value)),
    }


def numerics(report: Report, shape: dict[str, Any], device: str, folder: Path) -> None:
    """Section 2: rounding of log-probabilities."""
    import torch

    from sppo.training.logps import forward_precision, frozen_logps
    from sppo.training.trainer import IDENTITY_TOLERANCE, identity_fault

    model = make_model(shape["wide"], shape["layers"], device).eval()
    vocabulary = shape["wide"]["vocab_size"]

    def logps(pairs: list[dict[str, Any]], dtype: torch.dtype, micro: int) -> torch.Tensor:
        rows = frozen_logps(model, pairs, dtype, device, micro)
        return torch.tensor(
            [[row["chosen_logp"], row["rejected_logp"]] for row in rows], dtype=torch.float64
        ).flatten()

    def described(gap: torch.Tensor, tokens: torch.Tensor) -> dict[str, float]:
        return {
            "worst_nats_a_root_of_tokens": (gap.abs() / tokens.sqrt()).max().item(),
            "mean_nats_a_token": abs((gap.sum() / tokens.sum()).item()),
            "worst_nats": gap.abs().max().item(),
        }

    all_pairs: list[dict[str, Any]] = []
    for tokens in shape["responses"]:
        with report.step(f"responses of {tokens} tokens"):
            pairs = make_pairs(
                vocabulary, [(16 + 7 * i % 64, tokens, tokens) for i in range(8)], seed=tokens
            )
            all_pairs += pairs
            counted = torch.full((16,), tokens, dtype=torch.float64)
            exact = logps(pairs, torch.float32, 8)
            report.measure(
                f"bfloat16 against float32, {tokens} tokens",
                **described(logps(pairs, torch.bfloat16, 8) - exact, counted),
            )
    all_pairs = [pair | {"pair_id": i} for i, pair in enumerate(all_pairs)]
    counted = torch.tensor(
        [len(pair[f"{side}_token_ids"]) for pair in all_pairs for side in ("chosen", "rejected")],
        dtype=torch.float64,
    )
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        with report.step(f"two batchings, {name}"):
            current = logps(all_pairs, dtype, 1)
            gap = logps(all_pairs, dtype, 4) - current
            report.check(
                f"two batchings, {name}",
                identity_fault(gap, current, counted, dtype) is None,
                tolerance=IDENTITY_TOLERANCE[dtype],
                **described(gap, counted),
            )
    with (
        report.step("packed against padded"),
        torch.inference_mode(),
        forward_precision(device, torch.bfloat16),
    ):
        padded = project_logps(model, all_pairs, device).double().cpu()
        gap = project_logps(model, all_pairs, device, "packed").double().cpu() - padded
        # Another kernel rounds differently, so packed training needs a packed reference.
        report.measure(
            "packed against padded, bfloat16",
            within_step_0_tolerance=identity_fault(gap, padded, counted, torch.bfloat16) is None,
            **described(gap, counted),
        )
    del model
    release()
    for name, model in {
        "a window": make_model(shape["narrow"], shape["shallow"], device, sliding_window=16),
        "a window and a soft cap": capped_model(shape["narrow"], shape["shallow"], device),
    }.items():
        with report.step(f"packed with {name}"):
            with torch.no_grad():
                padded = project_logps(model, all_pairs, device).double().cpu()
                gap = project_logps(model, all_pairs, device, "packed").double().cpu() - padded
            report.check(
                f"packed with {name}, against padded, float32",
                identity_fault(gap, padded, counted, torch.float32) is None,
                tolerance=IDENTITY_TOLERANCE[torch.float32],
                **described(gap, counted),
            )
            with forward_precision(device, torch.bfloat16):
                logps = project_logps(model, all_pairs, device, "packed")
            logps.mean().backward()
            is_finite, norm = finite_gradient(model)
            gap = logps.detach().double().cpu() - padded
            report.check(
                f"packed with {name}, bfloat16",
                is_finite and gap.abs().max().item() < 0.01 * padded.abs().max().item(),
                gradient_norm=norm,
                **described(gap, counted),
            )


def programs(report: Report, shape: dict[str, Any], device: str, folder: Path) -> None:
    """Section 3: the programs that score and train."""
    from safetensors.torch import load_file

    from sppo.core.artifacts import read_json, record_path
    from sppo.core.tables import read_table, write_table

    start = folder / "start"
    chosen = "cpu" if device == "cpu" else "gpu"
    model = make_model(shape["narrow"], 2 * shape["shallow"], device)
    save_policy(model, start)
    del model
    release()
    pairs = make_pairs(shape["narrow"]["vocab_size"], ragged(32, shape["longest"] // 4))
    write_table(folder / "pairs.parquet", pairs, "pairs")
    shared = (
        "--pairs",
        folder / "pairs.parquet",
        "--policy",
        start,
        "--device",
        chosen,
        "--precision",
        "bfloat16",
        "--micro-batch-size",
        4,
    )

    def score(name: str, *words: object) -> None:
        done = subprocess.run(
            program("score_reference", *shared, "--output", folder / f"{name}.parquet", *words),
            capture_output=True,
            text=True,
            check=False,
        )
        rows = read_table(folder / f"{name}.parquet", "logps") if done.returncode == 0 else []
        finite = all(
            math.isfinite(row[key]) for row in rows for key in ("chosen_logp", "rejected_logp")
        )
        report.check(
            f"score_reference.py, {name}",
            done.returncode == 0 and len(rows) == 32 and finite,
            said=done.stderr[-600:] if done.returncode else "",
        )

    def command(name: str, reference: str, *words: object) -> list[str]:
        return program(
            "train_policy",
            *shared,
            "--current",
            folder / f"{reference}.parquet",
            "--output",
            folder / name,
            "--log",
            folder / f"{name}.jsonl",
            "--batch-size",
            8,
            "--schedule-total-epochs",
            1,
            "--checkpoint-steps",
            2,
            "--learning-rate",
            1e-5,
            "--gradient-checkpointing",
            "true",
            *words,
        )

    def trained(name: str, reference: str, *words: object) -> list[str]:
        """Train and report the result. Returns the output lines of the training."""
        done = subprocess.run(
            command(name, reference, *words), capture_output=True, text=True, check=False
        )
        values: dict[str, Any] = {"said": done.stderr[-600:]} if done.returncode else {}
        if not done.returncode:
            record = read_json(record_path(folder / name))
            values = {
                "step_0": record["step_0"],
                "seconds": record["seconds"],
                "final": record["final"]["loss"],
            }
        report.check(f"train_policy.py, {name}", done.returncode == 0, **values)
        return done.stdout.splitlines()

    score("current")
    trained("whole", "current")
    with report.step("train_policy.py, killed"):
        running = subprocess.Popen(
            command("resumed", "current"),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        seen = next((line for line in running.stdout or () if line.startswith("step 3 ")), "")
        running.kill()
        running.wait()
        report.check(
            "train_policy.py, killed after a checkpoint",
            bool(seen) and not (folder / "resumed").exists(),
            last_line=seen,
        )
        steps = [
            line.split()[1] for line in trained("resumed", "current") if line.startswith("step ")
        ]
        one, other, before = (
            load_file(folder / name / "model.safetensors") for name in ("whole", "resumed", "start")
        )
        moved = max((one[key] - before[key]).abs().max().item() for key in one)
        apart = max((one[key] - other[key]).abs().mean().item() for key in one)
        # Another order of summation can change the sign of a gradient near 0, and RMSProp makes a
        # full step of it. Therefore the weights need not be equal.
        report.check(
            "resumed where it stopped, to the same weights",
            steps == ["3", "4"] and apart < 1e-2 * moved,
            steps=steps,
            moved=moved,
            mean_difference=apart,
        )
        small = max(
            (one[key] - before[key]).ne(0).float().mean().item() for key in one if "up_proj" in key
        )
        report.check("the update arrives", small > 0.5, share_of_weights_moved=small)
    score("current_lora", "--lora-rank", 16)
    trained("lora", "current_lora", "--lora-rank", 16, "--lora-alpha", 32)


def fsdp2(report: Report, shape: dict[str, Any], device: str, folder: Path) -> None:
    """Section 4: start one process with accelerate's launcher, as the project starts several."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    from sppo.training.distributed import CONFIGS

    own = [
        "--section",
        FSDP_CHILD,
        "--output",
        str(report.path),
        "--device",
        "cpu" if device == "cpu" else "gpu",
        "--shape",
        next(name for name, sizes in SHAPES.items() if sizes is shape),
    ]
    words = [
        "--config_file",
        CONFIGS / "fsdp2.yaml",
        "--num_processes",
        1,
        "--num_machines",
        1,
        "--main_process_port",
        0,
        __file__,
        *own,
    ]
    if device == "cpu":
        os.environ["GPU_CHECK_DIVIDE_ON_CPU"] = "1"
    launch_command(launch_command_parser().parse_args([*map(str, words)]))


def fsdp2_child(report: Report, shape: dict[str, Any], device: str, folder: Path) -> None:
    """Section 4 in the launched process: FSDP2."""
    if os.environ.get("GPU_CHECK_DIVIDE_ON_CPU"):
        sys.path.insert(0, str(REPOSITORY / "tests" / "multi_process"))
        from train_policy_on_cpu import divide_on_cpu

        divide_on_cpu()
    import torch

    from sppo.policies.models import round_weights
    from sppo.training.logps import frozen_logps
    from sppo.training.trainer import make_trainer

    dtype = torch.bfloat16
    options = options_of_training(
        batch_size=8,
        micro_batch_size=4,
        checkpoint_steps=2,
        schedule_total_epochs=1,
        learning_rate=1e-5,
        gradient_checkpointing=True,
        parallel="fsdp2",
        max_grad_norm=1.0,
    )
    pairs = make_pairs(shape["narrow"]["vocab_size"], ragged(32, shape["longest"] // 4))
    model = make_model(shape["narrow"], shape["shallow"], device)
    before = {name: weight.detach().cpu().clone() for name, weight in model.state_dict().items()}
    frozen = copy.deepcopy(model).eval()
    round_weights(frozen, dtype)  # as src/score_reference.py does for FSDP2
    pairs = with_reference(pairs, frozen_logps(frozen, pairs, dtype, device, 4))
    del frozen
    work = folder / "policy" / "work"
    with report.step("train"):
        model.cpu()  # src/train_policy.py also gives the model to FSDP2 on the CPU
        trainer = make_trainer(model, pairs, options, dtype, device, work, 0)
        # The section resumes from an earlier checkpoint, so all checkpoints are kept.
        trainer.args.save_total_limit = None
        trainer.train()
        kinds = sorted(
            {
                type(part).__name__
                for state in trainer.optimizer.state.values()
                for part in state.values()
                if torch.is_tensor(part) and part.ndim > 0
            }
        )
        log = [line for line in trainer.state.log_history if "loss" in line]
        finite = all(
            math.isfinite(line["loss"]) and math.isfinite(float(line["grad_norm"])) for line in log
        )
        report.check(
            "train",
            finite and len(log) == 4 and kinds == ["DTensor"],
            step_0=trainer.step_0,
            optimizer_state=kinds,
            gradient_norms=[float(line["grad_norm"]) for line in log],
        )
        fsdp2_afterwards(report, shape, device, folder, trainer, before, pairs, options)


def fsdp2_afterwards(
    report: Report,
    shape: dict[str, Any],
    device: str,
    folder: Path,
    trainer: Any,
    before: dict[str, Any],
    pairs: list[dict[str, Any]],
    options: dict[str, Any],
) -> None:
    """Resume from a checkpoint of the trainer, then gather its weights and save them."""
    import torch

    from sppo.training.trainer import make_trainer
    from train_policy import whole_policy

    dtype, work = torch.bfloat16, folder / "policy" / "work"
    whole = {
        name: part.full_tensor().detach().cpu() for name, part in trainer.model.state_dict().items()
    }
    with report.step("resume"):
        half = work / "checkpoint-2"
        model = make_model(shape["narrow"], shape["shallow"], device).eval().cpu()
        again = make_trainer(model, pairs, options, dtype, device, work, 0)
        again.train(resume_from_checkpoint=str(half))
        found = {
            name: part.full_tensor().detach().cpu()
            for name, part in again.model.state_dict().items()
        }
        moved = max((whole[name] - before[name]).abs().max().item() for name in whole)
        apart = max((whole[name] - found[name]).abs().mean().item() for name in whole)
        report.check(
            "resume", apart < 1e-2 * moved, checkpoint=half.name, moved=moved, mean_difference=apart
        )
    with report.step("gather and save"):
        kept, weights = whole_policy(trainer, argparse.Namespace(parallel="fsdp2", lora_rank=0))
        kept.save_pretrained(folder / "saved", state_dict=weights)
        from safetensors.torch import load_file

        saved = load_file(folder / "saved" / "model.safetensors")
        same = saved.keys() == whole.keys() and all(
            torch.equal(saved[name], whole[name]) for name in whole
        )
        report.check("gather and save", same, tensors=len(saved))


def throughput(report: Report, shape: dict[str, Any], device: str, folder: Path) -> None:
    """Section 5: forward and backward passes with checkpointing, then complete trainers."""
    import torch

    from sppo.policies.models import cast_linear_weights
    from sppo.training.logps import forward_precision, frozen_logps
    from sppo.training.trainer import make_trainer, make_trl_trainer

    longest, vocabulary, micro = shape["longest"], shape["wide"]["vocab_size"], 4
    model = make_model(shape["wide"], shape["layers"], device)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    sets = {
        "equal": make_pairs(
            vocabulary, [(longest // 4, longest // 4, longest // 4)] * shape["pairs"]
        ),
        "ragged": make_pairs(vocabulary, ragged(shape["pairs"], longest)),
    }
    ways: dict[str, Callable] = {
        "packed": functools.partial(project_logps, layout="packed"),
        "padded right, without a mask": project_logps,
        "padded left, with a mask": left_padded_logps,
    }
    for kind in ("ragged", "equal"):
        batches = micro_batches_of(sets[kind], micro)
        for name, logps_of in ways.items():
            title = f"{kind}: {name}"
            with report.step(title):
                model.set_attn_implementation("sdpa")
                release()
                # The first repeat is a warm-up with one micro-batch.
                for repeat in range(shape["repeats"] + 1):
                    if repeat == 1:
                        synchronise(device)
                        began = time.perf_counter()
                    for batch in batches[: None if repeat else 1]:
                        with forward_precision(device, torch.bfloat16):
                            loss = logps_of(model, batch, device).mean()
                        loss.backward()
                synchronise(device)
                seconds = (time.perf_counter() - began) / shape["repeats"]
                report.measure(title, loss=loss.item(), **speed(sets[kind], shape, seconds, device))
            model.zero_grad()
    model.set_attn_implementation("sdpa")
    options = options_of_training(
        loss="sppo_hard",
        batch_size=len(sets["ragged"]),
        micro_batch_size=micro,
        micro_batch_tokens=4 * longest,
        checkpoint_steps=1000,
        gradient_checkpointing=True,
        schedule_total_epochs=3,
        stop_epoch=3,
    )
    with report.step("ragged: the project's trainer"):
        frozen = copy.deepcopy(model).eval()
        cast_linear_weights(frozen, torch.bfloat16)
        synchronise(device)
        began = time.perf_counter()
        pairs = with_reference(
            sets["ragged"],
            frozen_logps(frozen, sets["ragged"], torch.bfloat16, device, micro, 4 * longest),
        )
        synchronise(device)
        scored = time.perf_counter() - began
        del frozen
        trainer = make_trainer(model, pairs, options, torch.bfloat16, device, folder / "ours", 0)
        release()
        trainer.train()
        # The first step is a warm-up.
        speeds = [
            line["tokens_per_second"]
            for line in trainer.state.log_history
            if "tokens_per_second" in line
        ][1:]
        tokens = tokens_of(sets["ragged"])
        report.measure(
            "ragged: the project's trainer",
            reference_tokens_per_second=tokens / scored,
            step_0=trainer.step_0,
            **speed(sets["ragged"], shape, tokens / (sum(speeds) / len(speeds)), device),
        )
        del trainer
    if not (installed("trl") and installed("datasets")):
        report.skip("ragged: TRL's DPOTrainer", "no trl or no datasets")
        return
    with report.step("ragged: TRL's DPOTrainer"):
        from transformers import AutoTokenizer
        from trl import DPOConfig

        take_new_name(DPOConfig)
        small = make_model(TINY | {"vocab_size": vocabulary}, 1, "cpu")
        save_policy(small, folder / "tokenizer")
        release()
        trl = make_trl_trainer(
            model,
            AutoTokenizer.from_pretrained(folder / "tokenizer"),
            sets["ragged"],
            options,
            torch.bfloat16,
            device,
            folder / "trl",
            0,
        )
        began = time.perf_counter()
        trl.train()
        synchronise(device)
        report.measure(
            "ragged: TRL's DPOTrainer",
            **speed(sets["ragged"], shape, (time.perf_counter() - began) / 3, device),
        )


def micro_batches_of(pairs: list[dict[str, Any]], size: int) -> list[list[dict[str, Any]]]:
    """Micro-batches in training order: longest pairs first, so a batch has similar lengths."""
    from sppo.training.lengths import pair_length

    order = sorted(pairs, key=pair_length, reverse=True)
    return [order[i : i + size] for i in range(0, len(order), size)]


def tokens_of(pairs: list[dict[str, Any]]) -> int:
    """Tokens of both sequences of every pair, without padding."""
    return sum(
        2 * len(p["prompt_token_ids"]) + len(p["chosen_token_ids"]) + len(p["rejected_token_ids"])
        for p in pairs
    )


def speed(
    pairs: list[dict[str, Any]], shape: dict[str, Any], seconds: float, device: str
) -> dict[str, Any]:
    """The figures of one forward and backward pass over the pairs in this time.

    They are real tokens per second (without padding), TFLOP/s, and on a GPU also MFU by the data
    sheet and peak memory.
    """
    import torch

    from sppo.reporting.cost_model import GPUS, forward_flops

    size = shape_of_model(shape["wide"], shape["layers"])
    flops = 0.0
    for pair in pairs:
        for side in ("chosen", "rejected"):
            answer = len(pair[f"{side}_token_ids"])
            length = len(pair["prompt_token_ids"]) + answer
            flops += 3 * forward_flops(size, length, length / 2, answer)
    values = {
        "seconds": seconds,
        "real_tokens_per_second": tokens_of(pairs) / seconds,
        "tflops": flops / seconds / 1e12,
    }
    if device == "cuda":
        card = torch.cuda.get_device_name()
        peak = next(
            (gpu.flops for name, gpu in GPUS.items() if name in card.replace(" ", "")), None
        )
        values |= {
            "mfu": flops / seconds / peak if peak else None,
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        }
    return values


def shape_of_model(sizes: dict[str, Any], layers: int) -> Any:
    """The shape for the formulas of cost_model.py."""
    from sppo.policies.shapes import shape_of

    return shape_of(sizes | {"num_hidden_layers": layers, "model_type": "mistral"})


def memory(report: Report, shape: dict[str, Any], device: str, folder: Path) -> None:
    """Section 6: peak memory of training."""
    import torch

    from sppo.reporting.cost_model import train_bytes

    vocabulary, tokens = shape["wide"]["vocab_size"], shape["memory_tokens"]
    card = 0  # bytes of the GPU; 0 if its memory was not limited
    pairs = make_pairs(vocabulary, [(tokens, tokens, tokens)] * 4)
    pairs = with_reference(pairs, [{"chosen_logp": 0.0, "rejected_logp": 0.0}] * 4)
    for layers in shape["memory_layers"]:
        title = f"{layers} layers, 1 pair of {tokens} + {tokens} tokens"
        with report.step(title):
            release()
            model = make_model(shape["wide"], layers, device)
            peak = step_peak(model, pairs, device, folder / f"{layers}", 0)
            del model
            estimated = train_bytes(
                shape_of_model(shape["wide"], layers), 1, 1, tokens, tokens, 0, True
            )
            # On a processor the peak is that of the process, which the estimate does not cover.
            ratio = peak / estimated if device == "cuda" else None
            status = "measured"
            if ratio is not None:
                status = "ok" if 0.85 < ratio < 1.15 else "failed"
            report.line(
                title,
                status,
                peak_gb=peak / 1e9,
                estimated_gb=estimated / 1e9,
                peak_by_estimate=ratio,
            )
    title = f"LoRA, {shape['full']} layers, within 24 GB"
    with report.step(title):
        release()
        if device == "cuda":
            card = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, 23.5e9 / card))
        model = make_model(shape["wide"], shape["full"], device, "bfloat16")
        release()
        peak = step_peak(model, pairs, device, folder / "lora", 16)
        estimated = train_bytes(
            shape_of_model(shape["wide"], shape["full"]), 1, 1, tokens, tokens, 16, True
        )
        report.check(
            title,
            True,
            peak_gb=peak / 1e9,
            estimated_gb=estimated / 1e9,
            peak_by_estimate=peak / estimated,
        )
    if card:
        torch.cuda.set_per_process_memory_fraction(1.0)


def step_peak(model: Any, pairs: list[dict[str, Any]], device: str, work: Path, rank: int) -> float:
    """Peak bytes of two training steps with one pair in a pass.

    On a processor it is the peak of the whole process.
    """
    import resource

    import torch

    from sppo.training.trainer import make_trainer

    options = options_of_training(
        batch_size=2,
        micro_batch_size=1,
        checkpoint_steps=1000,
        schedule_total_epochs=1,
        gradient_checkpointing=True,
        lora_rank=rank,
        lora_alpha=32,
    )
    trainer = make_trainer(model, pairs, options, torch.bfloat16, device, work, 0)
    # The references are zeros here, so the check of the first step would fail.
    trainer._check_step_0 = lambda *_: None
    release()
    trainer.train()
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def pairrm(report: Report, shape: dict[str, Any], device: str, folder: Path) -> None:
    """Section 7: PairRM."""
    import numpy as np
    import torch
    from safetensors.torch import save_file
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
    from transformers import DebertaV2Config

    from sppo.preferences.estimates import win_probabilities
    from sppo.preferences.pairrm_network import (
        DEBERTA_V3_LARGE,
        MARKS,
        SEPARATOR,
        PairRanker,
        PairRM,
    )

    words, special = 2000, ["[PAD]", "[CLS]", SEPARATOR, "[UNK]"]
    whole = Tokenizer(
        models.WordLevel(
            {name: i for i, name in enumerate([*special, *(f"w{i}" for i in range(words))])},
            "[UNK]",
        )
    )
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    whole.add_special_tokens([AddedToken(mark, special=True) for mark in (*special, *MARKS)])
    whole.post_processor = processors.TemplateProcessing(
        single=f"[CLS] $A {SEPARATOR}", special_tokens=[("[CLS]", 1), (SEPARATOR, 2)]
    )
    folder.mkdir(exist_ok=True)
    whole.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    config = DebertaV2Config(
        **DEBERTA_V3_LARGE | shape["pairrm"],
        vocab_size=whole.get_vocab_size(),
        architectures=["DebertaV2PairRM"],
    )
    network = PairRanker(config, 1)
    save_file(
        {name: weight.contiguous() for name, weight in network.state_dict().items()},
        folder / "model.safetensors",
    )
    named = {
        key: whole.token_to_id(mark)
        for key, mark in zip(
            ("source_prefix_id", "cand1_prefix_id", "cand2_prefix_id"),
            (MARKS[0], *MARKS[2:]),
            strict=True,
        )
    }
    (folder / "config.json").write_text(json.dumps(config.to_dict() | named), encoding="utf-8")
    draw, (asked, answered) = random.Random(0), shape["pairrm_words"]

    def text(length: int) -> str:
        return " ".join(f"w{draw.randrange(words)}" for _ in range(length))

    groups = [
        (text(asked), [text(answered) for _ in range(5)]) for _ in range(shape["pairrm_prompts"])
    ]
    found = {}
    for precision in ("float32", "bfloat16"):
        with report.step(precision):
            model = PairRM(folder, device, precision)
            model.all_pair_logits(groups[:2])
            synchronise(device)
            began = time.perf_counter()
            logits = np.array(model.all_pair_logits(groups))
            seconds = time.perf_counter() - began
            found[precision] = logits
            report.check(
                precision,
                bool(np.isfinite(logits).all()),
                pairs_per_second=20 * len(groups) / seconds,
                tokens_of_a_pair=asked + 2 * answered,
            )
            del model
            release()
    # The logits of random weights differ little. Scaling them to the spread of a trained model
    # would scale the rounding too. Therefore the report gives both rounding and spread.
    gap, spread = found["bfloat16"] - found["float32"], float(found["float32"].std())
    P, rounded = [
        np.array([win_probabilities(logits) for logits in found[precision]])
        for precision in ("float32", "bfloat16")
    ]
    report.check(
        "P by bfloat16",
        np.abs(P - rounded).mean() < 0.01,
        spread_of_logits=spread,
        rounding=float(gap.std()),
        largest_difference_of_P=float(np.abs(P - rounded).max()),
        P_from=float(P.min()),
        P_to=float(P.max()),
    )


def generation(report: Report, shape: dict[str, Any], device: str, folder: Path) -> None:
    """Section 8: generation."""
    from sppo.policies.generation import Sampling, TransformersEngine

    save_policy(make_model(shape["narrow"], 2 * shape["shallow"], device), folder)
    release()
    sampling = Sampling(4, 1.0, 1.0, shape["new_tokens"])
    for precision in ("float32", "bfloat16"):
        with report.step(precision):
            found = []
            for batch_size in (4, 4 * shape["prompts"]):
                engine = TransformersEngine(
                    folder,
                    precision=precision,
                    device=device,
                    attention=None,
                    batch_size=batch_size,
                )
                prompts = random_prompts(shape["prompts"], engine.tokenizer)
                # One prompt in a batch is slow, so only four prompts are generated in that way.
                some = prompts if batch_size > 4 else prompts[:4]
                engine.generate(some[:1], sampling, 0, "warm-up")
                synchronise(device)
                began = time.perf_counter()
                found.append(engine.generate(some, sampling, 0, "check"))
                seconds = time.perf_counter() - began
            alone, together = found[0], found[1][: len(found[0])]
            rows = list(zip(alone, together, strict=True))
            same = sum(a["token_ids"] == b["token_ids"] for a, b in rows) / len(rows)
            first = sum(a["token_ids"][0] == b["token_ids"][0] for a, b in rows) / len(rows)
            drawn = sum(len(row["token_ids"]) for row in found[1])
            report.check(
                f"equal seeds in different batches, {precision}",
                first > 0.9 and (precision == "bfloat16" or same > 0.8),
                same_responses=same,
                same_first_tokens=first,
                tokens_per_second=drawn / seconds,
            )


def random_prompts(count: int, tokenizer: Any) -> list[dict[str, Any]]:
    """Prompts of 4 to 63 random words, the same at each call."""
    from sppo.policies.chats import prompt_token_ids

    draw = random.Random(0)
    prompts = []
    for i in range(count):
        words = [f"w{draw.randrange(5, 500)}" for _ in range(draw.randrange(4, 64))]
        messages = [{"role": "user", "content": " ".join(words)}]
        ids = prompt_token_ids(tokenizer, messages)
        prompts.append({"prompt_id": f"p{i}", "prompt_token_ids": ids})
    return prompts


SECTIONS: dict[str, Callable[[Report, dict[str, Any], str, Path], None]] = {
    ENVIRONMENT: environment,
    "sdpa": sdpa,
    "numerics": numerics,
    "programs": programs,
    "fsdp2": fsdp2,
    FSDP_CHILD: fsdp2_child,
    "throughput": throughput,
    "memory": memory,
    "pairrm": pairrm,
    "generation": generation,
}

if __name__ == "__main__":
    main()
