"""Write the pairs of an iteration as a preference data set that other trainers read.

Reads   pairs.parquet, and prompts.parquet of the iterations that its pairs come from
Writes  a folder with train.parquet and a card, README.md, in the layout of the Hugging Face hub

The columns prompt, chosen and rejected are lists of messages (role and content): TRL's
conversational preference form, with an explicit prompt. The estimates of SPPO (2405.00675) stand
beside them: p_hat_chosen, p_hat_rejected and p_chosen_beats_rejected.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

import _path  # noqa: F401
from sppo.core.artifacts import read_record, recorded, written_whole
from sppo.core.errors import UserError, run
from sppo.core.tables import read_table
from sppo.reporting.cards import data_of, table

ESTIMATES = ("p_hat_chosen", "p_hat_rejected", "p_chosen_beats_rejected")
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
COLUMNS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("prompt", MESSAGES),
        ("chosen", MESSAGES),
        ("rejected", MESSAGES),
        *((name, pa.float64()) for name in ESTIMATES),
    ]
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, nargs="+", required=True)
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    args = parser.parse_args()

    record = read_record(args.pairs) or {}
    if record.get("arguments", {}).get("target_reward"):
        raise UserError(
            f"{args.pairs} was made with pairs.target_reward, whose prompts name a reward; such"
            " pairs are not exported: set pairs.target_reward: false"
        )
    chats = {
        row["prompt_id"]: row["messages"]
        for file in args.prompts
        for row in read_table(file, "prompts")
    }
    rows = [as_row(pair, chats, args.pairs) for pair in read_table(args.pairs, "pairs")]
    with recorded("export", args.output, [args.pairs, *args.prompts], vars(args)) as facts:
        with written_whole(args.output) as temporary:
            temporary.mkdir()
            pq.write_table(pa.Table.from_pylist(rows, COLUMNS), temporary / "train.parquet")
            (temporary / "README.md").write_text(card(args.pairs, len(rows)), encoding="utf-8")
        facts |= {"pairs": len(rows)}


def as_row(pair: dict[str, Any], chats: dict[str, Any], source: Path) -> dict[str, Any]:
    """A pair as a row of the data set. UserError if its prompt is unknown."""
    if pair["prompt_id"] not in chats:
        raise UserError(
            f"{source} has a pair of prompt {pair['prompt_id']}, which the prompts lack; give the"
            " prompts.parquet of its iteration too"
        )
    ends = {end: [{"role": "assistant", "content": pair[end]}] for end in ("chosen", "rejected")}
    estimates = {name: pair[name] for name in ESTIMATES}
    row = {"prompt_id": pair["prompt_id"], "prompt": chats[pair["prompt_id"]]}
    return row | ends | estimates


def card(pairs: Path, number: int) -> str:
    """The data set's card."""
    header = {
        "task_categories": ["text-generation"],
        "tags": ["preference-optimization", "sppo"],
        "configs": [
            {"config_name": "default", "data_files": [{"split": "train", "path": "train.parquet"}]}
        ],
    }
    columns = {
        "prompt, chosen, rejected": "lists of messages (role, content)",
        "p_hat_chosen, p_hat_rejected": "P-hat(y beats pi_t), estimated from K responses",
        "p_chosen_beats_rejected": "P(chosen beats rejected) of the preference model",
    }
    return (
        f"---\n{yaml.safe_dump(header, sort_keys=True)}---\n# Preference pairs of SPPO\n\n"
        "Pairs of self-play preference optimisation, https://arxiv.org/abs/2405.00675:"
        f" {number} pairs of a policy's own responses.\n\n## Columns\n\n{table(columns)}"
        f"\n## Source\n\n{data_of(pairs)}\n\n## Licence\n\n"
        "The prompts, the policy and the preference model have their own licences.\n"
    )


if __name__ == "__main__":
    run(main)
