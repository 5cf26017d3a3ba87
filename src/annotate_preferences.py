"""Compare the K responses to each prompt of one shard, every pair in both orders.

Reads   prompts.parquet, responses/{shard}.parquet, the preference model: an adapter and its base, or PairRM, which our own
        code runs or llm-blender
Writes  preferences/{shard}.parquet (K x K logits a prompt) and its record
Paper   2405.00675, Algorithm 1 line 5
Departs from the official code: the logits themselves are kept, not a collapsed score; the preference model reads
        the user's words and not the chat template (`--source`); no prompt's logits depend on another's, if not asked for
        (`--truncate-together`). For PairRM see src/sppo/pairrm.py.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

from sppo.adapters import adapter_files
from sppo.artifacts import recorded
from sppo.config import OF_CHATS, SELECTION, add_section
from sppo.errors import UserError, run
from sppo.tables import read_table, write_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--responses", type=Path, required=True)
    parser.add_argument("--policy", type=Path, help="its chat template is used by --source chat_template")
    parser.add_argument("--ranker-base", type=Path, nargs="?", help="model folder that an adapter sits on")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", choices=["auto", "cpu", "gpu"], default="auto")
    add_section(parser, "preference", skip=("revision", *SELECTION))
    add_section(parser, "policy", only=OF_CHATS)
    args = parser.parse_args()

    prompts = {row["prompt_id"]: row for row in read_table(args.prompts, "prompts")}
    responses = defaultdict(list)
    for row in read_table(args.responses, "responses"):
        if row["prompt_id"] not in prompts:
            raise UserError(f"{args.responses} answers prompt {row['prompt_id']}, which {args.prompts} lacks; delete it and run again")
        responses[row["prompt_id"]].append(row)
    from sppo.models import start_torch

    start_torch()
    with recorded("annotate", args.output, [args.prompts, args.responses, *adapter_files(args.model, args.ranker_base)], vars(args)) as facts:
        model = load_model(args)
        tokenizer = chat_tokenizer(args)
        groups = []
        for prompt_id, candidates in responses.items():
            groups.append((prompt_text(prompts[prompt_id]["messages"], tokenizer), [row["text"] for row in candidates]))
        rows = [{"prompt_id": prompt_id, "sample_ids": [row["sample_id"] for row in candidates], "logits": logits.tolist()}
                for (prompt_id, candidates), logits in zip(responses.items(), model.all_pair_logits(groups), strict=True)]
        write_table(args.output, rows, "preferences")
        facts |= {"prompts": len(rows), "preference_model": model.name}


def prompt_text(messages: list[dict[str, str]], tokenizer) -> str:
    """What the preference model reads as the prompt: the user's last words, or with a tokenizer the rendered chat template."""
    from sppo.models import render_chat

    return messages[-1]["content"] if tokenizer is None else render_chat(tokenizer, messages)


def chat_tokenizer(args: argparse.Namespace):
    """The policy's tokenizer, if the preference model reads the rendered chat template."""
    from sppo.models import load_tokenizer

    if args.source != "chat_template":
        return None
    return load_tokenizer(args.policy, args.chat_template_kwargs, args.template_date)


def load_model(args: argparse.Namespace):
    """The preference model that the flags describe, with `all_pair_logits`."""
    from sppo.models import pick_device

    device = pick_device(args.device)
    reading = {"max_prompt_tokens": args.max_prompt_tokens, "max_response_tokens": args.max_response_tokens, "truncate_together": args.truncate_together}
    if args.backend == "llm_blender":
        from sppo.blender import LlmBlender

        return LlmBlender(Path(args.model), device, **reading)
    from sppo.rankers import load_preference_model

    return load_preference_model(args.model, args.ranker_base, device, precision=args.precision, batch_tokens=args.batch_tokens, **reading)


if __name__ == "__main__":
    run(main)
