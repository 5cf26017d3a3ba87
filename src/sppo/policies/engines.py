"""Which engine answers prompts: transformers or vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from sppo.policies.generation import Sampling, TransformersEngine
from sppo.policies.models import pick_device


class Engine(Protocol):
    """What answers prompts; see TransformersEngine.generate."""

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
    """How a policy is run: keys of the sections `responses` and `policy`, and `device`."""

    engine: str  # transformers or vllm
    device: str  # auto, cpu or gpu
    precision: str
    batch_size: int
    tensor_parallel: int | None
    attention: str | None
    thoughts: str
    chat_template_kwargs: dict[str, Any]
    template_date: str

    @classmethod
    def of(cls, options: dict[str, Any]) -> EngineOptions:
        """The options among more, such as those of a program."""
        return cls(**{name: options[name] for name in cls.__dataclass_fields__})


def open_engine(policy: Path, options: EngineOptions) -> Engine:
    """The engine that runs the policy in this folder."""
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
        from sppo.policies.vllm_engine import VllmEngine  # it needs an environment of its own

        return VllmEngine(policy, tensor_parallel=options.tensor_parallel or 1, **shared)
    return TransformersEngine(policy, attention=options.attention, **shared)
