"""Compare the K responses to each prompt of one shard, every pair in both orders.

Reads   prompts.parquet, responses/{shard}.parquet, the preference model: an adapter and its base, or PairRM, which our own
        code runs or llm-blender
Writes  preferences/{shard}.parquet (K x K logits a prompt) and its record
Paper   2405.00675, Algorithm 1 line 5
Departs from the official code: the logits themselves are kept, not a collapsed score; the preference model reads
        the user's words and not the chat template (`--source`); no prompt's logits depend on another's, if not asked for
        (`--truncate-together`). For PairRM see src/sppo/preferences/pairrm.py.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

from sppo.core.artifacts import recorded
from sppo.core.config import OF_CHATS, SELECTION, add_section
from sppo.core.errors import UserError, run
from sppo.core.tables import read_table, write_table
from sppo.preferences.adapters import adapter_files
from sppo.preferences.loading import chat_tokenizer, load_model, prompt_text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--responses", type=Path, required=True)
    parser.add_argument(
        "--policy", type=Path, help="its chat template is used by --source chat_template"
    )
    parser.add_argument(
        "--ranker-base", type=Path, nargs="?", help="model folder that an adapter sits on"
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", choices=["auto", "cpu", "gpu"], default="auto")
    add_section(parser, "preference", skip=("revision", *SELECTION))
    add_section(parser, "policy", only=OF_CHATS)
    args = parser.parse_args()

    prompts = {row["prompt_id"]: row for row in read_table(args.prompts, "prompts")}
    responses = defaultdict(list)
    for row in read_table(args.responses, "responses"):
        if row["prompt_id"] not in prompts:
            raise UserError(
                f"{args.responses} answers prompt {row['prompt_id']}, which {args.prompts} lacks; "
                "delete it and run again"
            )
        responses[row["prompt_id"]].append(row)
    from sppo.policies.models import start_torch

    start_torch()
    with recorded(
        "annotate",
        args.output,
        [args.prompts, args.responses, *adapter_files(args.model, args.ranker_base)],
        vars(args),
    ) as facts:
        model = load_model(args)
        tokenizer = chat_tokenizer(args)
        groups = []
        for prompt_id, candidates in responses.items():
            groups.append(
                (
                    prompt_text(prompts[prompt_id]["messages"], tokenizer),
                    [row["text"] for row in candidates],
                )
            )
        rows = [
            {
                "prompt_id": prompt_id,
                "sample_ids": [row["sample_id"] for row in candidates],
                "logits": logits.tolist(),
            }
            for (prompt_id, candidates), logits in zip(
                responses.items(), model.all_pair_logits(groups), strict=True
            )
        ]
        write_table(args.output, rows, "preferences")
        facts |= {"prompts": len(rows), "preference_model": model.name}


if __name__ == "__main__":
    run(main)
