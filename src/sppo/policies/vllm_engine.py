"""vLLM as the engine of a policy, for GPUs: the contracts of generation.TransformersEngine, another noise.

Imported only when `responses.engine` is vllm. Prompts go in and answers come out as token ids; vLLM never sees text.
K answers are one request. vLLM 0.32 gives sample k of a request the seed `seed + k` (v1/engine/parallel_sampling.py) and
makes a sample's noise from its seed and the token's place alone: on a GPU by a hash of both (v1/worker/gpu/sample/gumbel.py),
on a CPU by a generator of the sample's own. So batches and shards change nothing but rounding.
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sppo.core.errors import UserError
from sppo.core.progress import watched
from sppo.policies.generation import Sampling, response, sample_seed
from sppo.policies.models import check_policy, compute_dtype, load_tokenizer, stop_token_ids

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, that dies whole and schedules alike every time
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # of tensor parallel: PyTorch has looked at the GPU by then, which forks do not survive
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
CPU_SETTINGS = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # OMP_NUM_THREADS says how many cores
    "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB; else nearly all memory
}


def request_seed(data_seed: int, purpose: str, prompt_id: str) -> int:
    """The seed of one prompt's request; its sample k has this + k. 62 bits, since vLLM keeps seeds in signed 64."""
    return sample_seed(data_seed, purpose, prompt_id, 0) >> 2


class VllmEngine:
    """vLLM's offline engine, on one GPU or on `tensor_parallel` of them."""

    def __init__(
        self,
        folder: Path,
        *,
        precision: str,
        device: str,
        batch_size: int,
        tensor_parallel: int,
        thoughts: str = "keep",
        template: dict[str, Any] | None = None,
    ) -> None:
        import torch

        check_policy(folder)
        if device == "cpu" and tensor_parallel > 1:
            raise UserError(
                f"responses.tensor_parallel is {tensor_parallel}, but there is no GPU here; remove it, or run on a machine with GPUs"
            )
        if device == "cuda" and torch.cuda.device_count() < tensor_parallel:
            raise UserError(
                f"responses.tensor_parallel is {tensor_parallel}, but PyTorch sees {torch.cuda.device_count()} GPU here; lower it, "
                "or give the job more GPUs"
            )
        for name, value in (SETTINGS | (CPU_SETTINGS if device == "cpu" else {})).items():
            os.environ.setdefault(name, value)
        try:
            import vllm
        except ImportError as error:
            raise UserError(
                f"responses.engine is vllm, but vLLM cannot be imported here ({error}); run Snakemake with --use-conda, or set "
                "responses.engine: transformers"
            ) from error
        self.tokenizer, self.thoughts = load_tokenizer(folder, **(template or {})), thoughts
        self.stop_ids = stop_token_ids(folder, self.tokenizer)
        self.dtype = compute_dtype(precision, device)
        try:
            self.llm = vllm.LLM(
                model=str(folder),
                dtype=str(self.dtype).removeprefix("torch."),
                tensor_parallel_size=tensor_parallel,
                enable_prefix_caching=True,
                enable_lora=False,
                max_num_seqs=batch_size,
                use_tqdm_on_load=False,
                # The noise of a prompt read in parts is taken back, which vLLM cannot do on a CPU (gpu_model_runner.py: get_offset).
                enable_chunked_prefill=False if device == "cpu" else None,
                max_model_len=-1,  # what the model takes, or as much of it as fits the GPU
                generation_config="vllm",  # the model's own must not warp the logits as well
                enforce_eager=device == "cpu",
            )  # compiling takes longer there than it saves
        except ValueError as error:  # a model that vLLM does not know, memory that is not there, heads that do not divide
            raise UserError(f"vLLM cannot serve {folder}: {str(error).strip()}") from error
        self.context = self.llm.model_config.max_model_len

    def generate(
        self, prompts: list[dict[str, Any]], sampling: Sampling, data_seed: int, purpose: str
    ) -> list[dict[str, Any]]:
        """K responses to each prompt, as TransformersEngine.generate."""
        from vllm import SamplingParams

        if not prompts:
            return []
        longest = max(len(row["prompt_token_ids"]) for row in prompts)
        if longest + sampling.max_new_tokens > self.context:
            raise UserError(
                f"a prompt of {longest} tokens and max_new_tokens = {sampling.max_new_tokens} do not fit the {self.context} tokens that vLLM "
                "has room for here; lower max_new_tokens, or raise responses.tensor_parallel"
            )
        greedy = sampling.temperature == 0
        seeds = [request_seed(data_seed, purpose, row["prompt_id"]) for row in prompts]
        requests = [
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
            requests,
            use_tqdm=bar,
        )
        return [
            response(
                row,
                k,
                seed + k,
                list(answer.outputs[0 if greedy else k].token_ids),
                self.stop_ids,
                self.tokenizer,
                self.thoughts,
            )
            for row, seed, answer in zip(prompts, seeds, answers, strict=True)
            for k in range(sampling.samples)
        ]
