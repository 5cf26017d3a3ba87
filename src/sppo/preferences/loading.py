"""The preference model that a configuration describes, and what it reads as the prompt."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sppo.preferences.embedded import EmbeddedRanker
    from sppo.preferences.llm_blender import LlmBlender
    from sppo.preferences.pairrm import PairRM


def prompt_text(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase | None) -> str:
    """What the preference model reads as the prompt: the user's last words, or with a tokenizer the rendered chat template."""
    from sppo.policies.models import render_chat

    return messages[-1]["content"] if tokenizer is None else render_chat(tokenizer, messages)


def chat_tokenizer(args: argparse.Namespace) -> PreTrainedTokenizerBase | None:
    """The policy's tokenizer, if the preference model reads the rendered chat template."""
    from sppo.policies.models import load_tokenizer

    if args.source != "chat_template":
        return None
    return load_tokenizer(args.policy, args.chat_template_kwargs, args.template_date)


def load_model(args: argparse.Namespace) -> EmbeddedRanker | PairRM | LlmBlender:
    """The preference model that the flags describe, with `all_pair_logits`."""
    from sppo.policies.models import pick_device

    device = pick_device(args.device)
    reading = {
        "max_prompt_tokens": args.max_prompt_tokens,
        "max_response_tokens": args.max_response_tokens,
        "truncate_together": args.truncate_together,
    }
    if args.backend == "llm_blender":
        from sppo.preferences.llm_blender import LlmBlender

        return LlmBlender(Path(args.model), device, **reading)
    from sppo.preferences.embedded import load_preference_model

    return load_preference_model(
        args.model,
        args.ranker_base,
        device,
        precision=args.precision,
        batch_tokens=args.batch_tokens,
        **reading,
    )
