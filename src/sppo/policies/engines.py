"""The choice of the engine that generates responses: transformers or vLLM."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from sppo.core.config import GPU_MEMORY
from sppo.core.errors import UserError
from sppo.policies.devices import pick_device
from sppo.policies.generation import Sampling, TransformersEngine


class Engine(Protocol):
    """An engine that generates responses to prompts; see TransformersEngine.generate."""

    tokenizer: Any
    dtype: torch.dtype

    def generate(
        self,
        prompts: list[dict[str, Any]],
        sampling: Sampling,
        data_seed: int,
        purpose: str,
    ) -> list[dict[str, Any]]: ...


@dataclass(frozen=True)
class EngineOptions:
    """How an engine runs a policy.

    The names are `device` and keys of the sections `responses` and `policy` of the configuration.
    """

    engine: str  # transformers or vllm
    device: str  # auto, cpu, gpu or mps
    precision: str
    batch_size: int | None
    prefix_caching: bool | None
    gpu_memory: float | None
    tensor_parallel: int | None
    attention: str | None
    thoughts: str
    chat_template_kwargs: dict[str, Any]
    template_date: str

    @classmethod
    def of(cls, options: dict[str, Any]) -> EngineOptions:
        """The options from a dict that may hold other keys, such as a program's arguments."""
        return cls(**{name: options[name] for name in cls.__dataclass_fields__})


def open_engine(policy: Path, options: EngineOptions) -> Engine:
    """The engine for the policy in this folder. UserError if it cannot run the policy."""
    shared: dict[str, Any] = {
        "precision": options.precision,
        "device": pick_device(options.device),
        "batch_size": options.batch_size,
        "thoughts": options.thoughts,
        "template": {
            "template_kwargs": options.chat_template_kwargs,
            "template_date": options.template_date,
        },
    }
    if options.engine == "vllm":
        # Imported here because vLLM is installed only in its own environment.
        from sppo.policies.vllm_engine import VllmEngine

        return VllmEngine(
            policy,
            tensor_parallel=options.tensor_parallel or 1,
            prefix_caching=options.prefix_caching is not False,
            gpu_memory=options.gpu_memory or GPU_MEMORY,
            **shared,
        )
    return TransformersEngine(policy, attention=options.attention, **shared)


def generated(
    policy: Path,
    options: EngineOptions,
    prompts: list[dict[str, Any]],
    sampling: Sampling,
    data_seed: int,
    purpose: str,
) -> list[dict[str, Any]]:
    """Responses by an engine that leaves the GPU's memory free; see TransformersEngine.generate.

    vLLM keeps its memory until its process ends, so it gets a process of its own.
    """
    work = (policy, options, prompts, sampling, data_seed, purpose)
    if options.engine != "vllm":
        return _generate(*work)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as processes:
        try:
            return processes.submit(_generate, *work).result()
        except BrokenProcessPool as error:
            raise UserError(
                "the process of vLLM was killed, most often because memory ran out; give the job"
                " more memory, or lower responses.gpu_memory"
            ) from error


def _generate(
    policy: Path, options: EngineOptions, prompts: list[dict[str, Any]], *how: Any
) -> list[dict[str, Any]]:
    return open_engine(policy, options).generate(prompts, *how)
