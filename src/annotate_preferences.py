"""Compare the K responses to each prompt of one shard, every pair in both orders.

Reads   prompts.parquet, responses/{shard}.parquet, the preference model
Writes  preferences/{shard}.parquet (K x K logits a prompt) and its record
Paper   2405.00675, Algorithm 1 line 5
Departs from the official code: the logits themselves are kept, not a collapsed score; the preference model reads
        the user's words and not the chat template (`--source`); no prompt's logits depend on another's.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

from sppo.adapters import adapter_files, adapter_folder
from sppo.artifacts import recorded
from sppo.config import add_section
from sppo.errors import UserError, run
from sppo.tables import read_table, write_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--responses", type=Path, required=True)
    parser.add_argument("--policy", type=Path, help="its chat template is used by --source chat_template")
    parser.add_argument("--ranker-base", type=Path, required=True, help="model folder that the embedded ranker's adapter sits on")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", choices=["auto", "cpu", "gpu"], default="auto")
    add_section(parser, "preference", skip=("probability", "logit_scale", "winner_by", "truncated"))
    args = parser.parse_args()

    prompts = {row["prompt_id"]: row for row in read_table(args.prompts, "prompts")}
    responses = defaultdict(list)
    for row in read_table(args.responses, "responses"):
        if row["prompt_id"] not in prompts:
            raise UserError(f"{args.responses} answers prompt {row['prompt_id']}, which {args.prompts} lacks; delete it and run again")
        responses[row["prompt_id"]].append(row)
    from sppo.models import load_tokenizer, pick_device, start_torch
    from sppo.progress import progress
    from sppo.rankers import EmbeddedRanker

    start_torch()
    inputs = [args.prompts, args.responses, args.ranker_base, *adapter_files(args.model)]
    with recorded("annotate", args.output, inputs, vars(args)) as facts:
        model = EmbeddedRanker(adapter_folder(args.model), args.ranker_base, device=pick_device(args.device))
        tokenizer = load_tokenizer(args.policy) if args.source == "chat_template" else None
        rows = []
        for prompt_id, candidates in progress(list(responses.items()), "compare"):
            messages = prompts[prompt_id]["messages"]
            text = messages[-1]["content"] if tokenizer is None else tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True)
            logits = model.pair_logits(text, [row["text"] for row in candidates])
            rows.append({"prompt_id": prompt_id, "sample_ids": [row["sample_id"] for row in candidates], "logits": logits.tolist()})
        write_table(args.output, rows, "preferences")
        facts |= {"prompts": len(rows), "preference_model": model.name}


if __name__ == "__main__":
    run(main)
