"""Compare the K responses to each prompt of one shard, every pair in both orders.

Reads   prompts.parquet, responses/{shard}.parquet, the preference model (src/sppo/preferences/)
Writes  preferences/{shard}.parquet (K x K logits for each prompt) and its record, which also says
        how often the preferences are cyclic, and how often the models of a population agree
Paper   2405.00675, Algorithm 1 line 5
Departs from the official code: it keeps the logits, not one score per response. The preference
        model reads the user's words instead of the chat template (`--source`). The logits of a
        prompt do not depend on other prompts, unless `--truncate-together` says so. For PairRM see
        src/sppo/preferences/pairrm_network.py.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

from sppo.core.artifacts import recorded
from sppo.core.config import DEVICES, OF_CHATS
from sppo.core.errors import run
from sppo.core.flags import add_section
from sppo.core.tables import read_responses, write_table
from sppo.preferences.base import compare, load_preference_model, model_files
from sppo.preferences.estimates import (
    condorcet_winner,
    cyclic_prompts,
    cyclic_triples,
    win_probabilities,
)
from sppo.preferences.population import agreement
from sppo.preferences.prompt_reader import PromptReader


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
    parser.add_argument("--device", choices=DEVICES, default="auto")
    add_section(parser, "preference", skip=("revision", "implicit"))
    add_section(parser, "policy", only=OF_CHATS)
    args = parser.parse_args()

    answers, prompts = read_responses(args.responses, args.prompts)
    responses = defaultdict(list)
    for row in answers:
        responses[row["prompt_id"]].append(row)
    files = model_files(args.model, args.ranker_base, backend=args.backend)
    template = [args.prompt_template] if args.prompt_template else []
    inputs = [args.prompts, args.responses, *files, *template]
    with recorded("annotate", args.output, inputs, vars(args)) as facts:
        model = load_preference_model(vars(args), args.ranker_base, args.device)
        reader = PromptReader(
            args.source, args.policy, args.chat_template_kwargs, args.template_date
        )
        groups = {
            prompt_id: reader.group(
                prompts[prompt_id]["messages"], [row["text"] for row in candidates]
            )
            for prompt_id, candidates in responses.items()
        }
        logits = compare(model, groups)
        rows = [
            {
                "prompt_id": prompt_id,
                "sample_ids": [row["sample_id"] for row in candidates],
                "logits": logits[prompt_id].tolist(),
            }
            for prompt_id, candidates in responses.items()
        ]
        if model.members:
            for place, row in enumerate(rows):
                row["members"] = [
                    {"model": name, "P": found[place].tolist()}
                    for name, found in model.members.items()
                ]
            facts["agreement"] = agreement(model.members)
        write_table(args.output, rows, "preferences")
        P = [win_probabilities(values) for values in logits.values()]
        facts |= {
            "prompts": len(rows),
            "preference_model": model.name,
            "cyclic_triples": cyclic_triples(P),
            "cyclic_prompts": cyclic_prompts(P),
            "condorcet_winner": condorcet_winner(P),
        }


if __name__ == "__main__":
    run(main)
