"""Pairs of answers with a label that says which one is better, as TRL's data sets have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from sppo.core.artifacts import json_lines, read_json
from sppo.core.errors import UserError
from sppo.policies.folders import HUB_ID
from sppo.policies.prompts import check_messages, hub_rows

LABELS = ("chosen", "rejected")
# Reasons for which a row is left out. Each row counts once, for the first reason that applies.
REASONS = ("missing_text", "different_prompts", "identical_outputs")


class Unusable(Exception):
    """A row has no pair of answers; its argument is one of `REASONS`."""


def read_labelled_pairs(
    source: str, revision: str | None = None, split: str = "train"
) -> tuple[pd.DataFrame, dict[str, int]]:
    """The usable rows of a preference data set, and the number of rows left out by reason.

    source: a file (.jsonl, .json, .parquet), a folder of parquet files, or a hub data set. Its rows
    have chosen and rejected: texts, or lists of messages whose last one is the answer. The chat
    before the answer is in prompt, a text or a list of messages, or at the beginning of both lists
    (TRL's forms with explicit and implicit prompts).

    The table has instruction (the user's last words), messages (the chat), output_1 (chosen),
    output_2 (rejected), preference (1, output_1 is better), model, and subset (of the data set's
    column; "all" without one). UserError if the source does not exist, has another form, or no row
    is usable.
    """
    rows = []
    excluded = dict.fromkeys(REASONS, 0)
    for number, row in enumerate(_rows(source, revision, split), 1):
        try:
            rows.append(_pair(row, f"{source} line {number}"))
        except Unusable as reason:
            excluded[str(reason)] += 1
    if not rows:
        raise UserError(f"{source} has no usable pair ({excluded}); give another data set")
    return pd.DataFrame(rows), excluded


def _rows(source: str, revision: str | None, split: str) -> list[Any]:
    path = Path(source).expanduser()
    if path.is_dir() or path.suffix == ".parquet" and path.is_file():
        files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
        if not files:
            raise UserError(f"{path} has no parquet files; give a preference data set")
        try:
            return [row for file in files for row in pd.read_parquet(file).to_dict("records")]
        except Exception as error:  # pyarrow raises several unrelated types for a broken file
            raise UserError(f"{path} is not readable as parquet: {error}") from None
    if path.is_file():
        rows = json_lines(path) if path.suffix == ".jsonl" else read_json(path)
        if not isinstance(rows, list):
            raise UserError(f"{path} is not a list of rows; give a preference data set")
        return rows
    if HUB_ID.fullmatch(source) and path.suffix not in (".jsonl", ".json"):
        return hub_rows(source, revision, split)[0]
    raise UserError(f"{source} is neither a file nor a folder nor a hub data set; correct the path")


def _pair(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict) or not all(label in row for label in LABELS):
        raise UserError(
            f"{where} has no chosen and rejected; give rows with prompt, chosen and rejected"
        )
    (chat, chosen), (other_chat, rejected) = (_answer(row[label], where) for label in LABELS)
    if chat != other_chat:
        raise Unusable("different_prompts")
    chat = chat or check_messages(_listed(row.get("prompt")), f"{where}: prompt")
    if not chat:
        raise UserError(
            f"{where} has no prompt; give it as prompt, or as the first messages of chosen and"
            " rejected"
        )
    if not chosen.strip() and not rejected.strip():
        raise Unusable("missing_text")
    if chosen == rejected:
        raise Unusable("identical_outputs")
    return {
        "instruction": chat[-1]["content"],
        "messages": [{"role": one["role"], "content": one["content"]} for one in chat],
        "output_1": chosen,
        "output_2": rejected,
        "preference": 1.0,
        "model": "",
        "subset": str(row.get("subset", "all")),
    }


def _answer(content: Any, where: str) -> tuple[list[dict[str, Any]], str]:
    """The chat before an answer, as far as the answer's column has it, and the answer."""
    if content is None:
        raise Unusable("missing_text")
    if isinstance(content, str):
        return [], content
    messages = check_messages(_listed(content), where)
    if not messages or messages[-1]["role"] != "assistant":
        raise Unusable("missing_text")
    return messages[:-1], messages[-1]["content"]


def _listed(content: Any) -> Any:
    """The messages as a list: pandas reads lists of a parquet file as arrays."""
    return content.tolist() if hasattr(content, "tolist") else content
