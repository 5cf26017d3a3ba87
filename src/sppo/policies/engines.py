"""Which engine answers prompts: transformers or vLLM."""

from __future__ import annotations

import argparse
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


def open_engine(args: argparse.Namespace) -> Engine:
    """The engine with the policy that a program was told to run."""
    device = pick_device(args.device)
    chats = {
        "thoughts": args.thoughts,
        "template": {
            "template_kwargs": args.chat_template_kwargs,
            "template_date": args.template_date,
        },
    }
    if args.engine == "vllm":
        from sppo.policies.vllm_engine import VllmEngine  # it needs an environment of its own

        return VllmEngine(
            args.policy,
            precision=args.precision,
            device=device,
            batch_size=args.batch_size,
            tensor_parallel=args.tensor_parallel or 1,
            **chats,
        )
    return TransformersEngine(
        args.policy,
        precision=args.precision,
        device=device,
        attention=args.attention,
        batch_size=args.batch_size,
        **chats,
    )
