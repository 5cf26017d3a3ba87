"""The engine vLLM, for GPUs: the interface of generation.TransformersEngine, other random numbers.

This module is imported only if `responses.engine` is vllm. vLLM receives and returns token ids and
never sees text. The K responses to a prompt are one request.

Batches and shards change nothing except rounding. vLLM 0.32 gives sample k of a request the seed
`seed + k` (v1/engine/parallel_sampling.py) and derives the random numbers of a sample only from its
seed and the position of the token: on a GPU by a hash of both (v1/worker/gpu/sample/gumbel.py), on
a CPU by one random generator for each sample.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from sppo.core.config import GPU_MEMORY
from sppo.core.errors import UserError
from sppo.core.progress import watched
from sppo.policies.chats import load_tokenizer, stop_token_ids
from sppo.policies.devices import compute_dtype
from sppo.policies.folders import check_policy
from sppo.policies.generation import Sampling, response, sample_seed
from sppo.policies.lora_update import ADAPTER, check_merged, read_factors, write_apart

if TYPE_CHECKING:
    import torch

SETTINGS = {
    # A single process ends as a whole after an error, and its schedule is always the same.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # For tensor parallelism. PyTorch has already initialised CUDA, which a fork does not survive.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
CPU_SETTINGS = {
    # OMP_NUM_THREADS sets the number of cores.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # GiB; without it, vLLM takes nearly all memory.
    "VLLM_CPU_KVCACHE_SPACE": "2",
}


# The ranks that vLLM can reserve memory for (vllm/config/lora.py).
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def request_seed(data_seed: int, purpose: str, prompt_id: str) -> int:
    """The seed of the request for one prompt; its sample k has this seed plus k.

    It has 62 bits, because vLLM stores seeds as signed 64-bit integers.
    """
    return sample_seed(data_seed, purpose, prompt_id, 0) >> 2


@contextlib.contextmanager
def temporary_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder`, removed at the end, also if the job is ended by SIGTERM.

    Its name is the same in every job on these GPUs, because vLLM's cache of compiled code depends
    on it. What a killed job left is removed first. Slurm can give the GPUs of two jobs on a node
    the same number, so there the job's number is in the name too.
    """
    names = [platform.node(), *map(os.environ.get, ("SLURM_JOB_ID", "CUDA_VISIBLE_DEVICES"))]
    where = re.sub(r"[^\w.-]+", "-", "-".join(filter(None, names)))
    temporary = folder.parent / f".{folder.name}.vllm-{where}"
    shutil.rmtree(temporary, ignore_errors=True)
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        temporary.mkdir()
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        signal.signal(signal.SIGTERM, before)


def prepare_environment(device: str) -> None:
    """Set what vLLM reads from the environment when it is imported."""
    settings = SETTINGS | CPU_SETTINGS if device == "cpu" else SETTINGS
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def served_weights(
    folder: Path, dtype: torch.dtype, files: contextlib.ExitStack
) -> tuple[Path, int]:
    """The folder of the weights for vLLM, and the LoRA rank to reserve memory for, or 0.

    For a LoRA policy in bfloat16 the folder is temporary, with the update as an adapter beside the
    weights. It is removed when `files` is closed.
    """
    factors = read_factors(folder) if str(dtype) == "torch.bfloat16" else {}
    if not factors:
        return folder, 0
    own = max(len(a) for a, _ in factors.values())
    rank = next((rank for rank in LORA_RANKS if own <= rank), None)
    if rank is None:
        check_merged(folder, f"vLLM takes LoRA updates up to rank {LORA_RANKS[-1]}, so it")
        return folder, 0
    weights = files.enter_context(temporary_folder(folder))
    write_apart(folder, factors, weights)
    return weights, rank


class VllmEngine:
    """vLLM's offline engine, on a CPU or on `tensor_parallel` GPUs."""

    def __init__(
        self,
        folder: Path,
        *,
        precision: str,
        device: str,
        batch_size: int | None,
        tensor_parallel: int,
        prefix_caching: bool = True,
        gpu_memory: float = GPU_MEMORY,
        thoughts: str = "keep",
        template: dict[str, Any] | None = None,
    ) -> None:
        """Load the policy of a folder.

        UserError if the policy is not valid, the GPUs are too few, or vLLM cannot be imported or
        cannot serve the policy. batch_size: the largest number of sequences at once; None for what
        vLLM chooses for the GPU. gpu_memory: the share of the GPU's memory that it takes. template:
        `template_kwargs` and `template_date` of `load_tokenizer`.
        """
        import torch

        check_policy(folder)
        if device == "cpu" and tensor_parallel > 1:
            raise UserError(
                f"responses.tensor_parallel is {tensor_parallel}, but there is no GPU here; remove "
                "it, or run on a machine with GPUs"
            )
        if device == "cuda" and torch.cuda.device_count() < tensor_parallel:
            raise UserError(
                f"responses.tensor_parallel is {tensor_parallel}, but PyTorch sees "
                f"{torch.cuda.device_count()} GPU here; lower it, or give the job more GPUs"
            )
        prepare_environment(device)
        self.tokenizer = load_tokenizer(folder, **(template or {}))
        self.thoughts = thoughts
        self.stop_ids = stop_token_ids(folder, self.tokenizer)
        self.dtype = compute_dtype(precision, device)
        try:
            import vllm
        except ImportError as error:
            raise UserError(
                f"responses.engine is vllm, but vLLM cannot be imported here ({error}); run "
                "Snakemake with --use-conda, or set responses.engine: transformers"
            ) from error
        with contextlib.ExitStack() as files:
            weights, rank = served_weights(folder, self.dtype, files)
            try:
                self.llm = vllm.LLM(
                    model=str(weights),
                    dtype=str(self.dtype).removeprefix("torch."),
                    tensor_parallel_size=tensor_parallel,
                    enable_prefix_caching=prefix_caching,
                    max_num_seqs=batch_size,
                    gpu_memory_utilization=gpu_memory,
                    use_tqdm_on_load=False,
                    # After a part of a chunked prompt, vLLM must reset the random generator. It
                    # cannot do this on a CPU (gpu_model_runner.py: get_offset).
                    enable_chunked_prefill=False if device == "cpu" else None,
                    # The model's context length, or the largest length for which memory suffices.
                    max_model_len=-1,
                    # The model's own generation config could change the logits.
                    generation_config="vllm",
                    # On a CPU, compilation takes longer than it saves.
                    enforce_eager=device == "cpu",
                    **(
                        {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1} if rank else {}
                    ),
                )
                self.lora_request = None
                if rank:
                    from vllm.lora.request import LoRARequest

                    self.lora_request = LoRARequest("update", 1, str(weights / ADAPTER))
                    self.llm.llm_engine.add_lora(self.lora_request)
            # vLLM does not support the model, memory does not suffice, or the number of heads is
            # not divisible by tensor_parallel.
            except ValueError as error:
                reason = (
                    str(error).strip().replace("GPU memory utilization", "responses.gpu_memory")
                )
                raise UserError(f"vLLM cannot serve {folder}: {reason}") from error
        self.context = self.llm.model_config.max_model_len

    def generate(
        self, prompts: list[dict[str, Any]], sampling: Sampling, data_seed: int, purpose: str
    ) -> list[dict[str, Any]]:
        """K responses to each prompt; see TransformersEngine.generate.

        UserError if a prompt and a response do not fit into the context.
        """
        from vllm import SamplingParams

        if not prompts:
            return []
        longest = max(len(row["prompt_token_ids"]) for row in prompts)
        if longest + sampling.max_new_tokens > self.context:
            raise UserError(
                f"a prompt of {longest} tokens and max_new_tokens = {sampling.max_new_tokens} do "
                f"not fit the {self.context} tokens for which vLLM has memory here; lower "
                "max_new_tokens, or raise responses.tensor_parallel"
            )
        greedy = sampling.temperature == 0
        seeds = [request_seed(data_seed, purpose, row["prompt_id"]) for row in prompts]
        sampling_params = [
            SamplingParams(
                n=1 if greedy else sampling.samples,
                seed=seed,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_new_tokens,
                stop_token_ids=self.stop_ids,
                ignore_eos=True,
                detokenize=False,
            )
            for seed in seeds
        ]
        bar = functools.partial(tqdm, file=sys.stderr, mininterval=0.1 if watched() else 60)
        answers = self.llm.generate(
            [{"prompt_token_ids": list(row["prompt_token_ids"])} for row in prompts],
            sampling_params,
            use_tqdm=bar,
            lora_request=self.lora_request,
        )
        rows = []
        for prompt, seed, answer in zip(prompts, seeds, answers, strict=True):
            for k in range(sampling.samples):
                # Greedy decoding generates one response, which is repeated.
                tokens = list(answer.outputs[0 if greedy else k].token_ids)
                rows.append(
                    response(
                        prompt, k, seed + k, tokens, self.stop_ids, self.tokenizer, self.thoughts
                    )
                )
        return rows
