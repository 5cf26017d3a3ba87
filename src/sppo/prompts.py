"""Reading prompts and evaluation instructions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sppo.artifacts import read_json
from sppo.errors import UserError
from sppo.hub import hub_failure, hub_token
from sppo.models import HUB_ID

Prompt = dict[str, Any]  # id, category, messages
BEST_GRADE = 10  # what a reward-conditioned policy is asked for when it is sampled or evaluated


def read_prompts(source: str, revision: str | None, split: str, field: str) -> tuple[list[Prompt], str | None]:
    """Prompts of a JSONL file or of a hub data set, and the hub commit (None for a file).

    Raises `UserError` for a missing source, a broken line (naming it), a missing field, or, in a file, a repeated id.
    """
    path = Path(source).expanduser()
    commit = None
    if path.is_file():
        rows = _jsonl(path)
    elif HUB_ID.fullmatch(source) and path.suffix not in (".jsonl", ".json"):
        rows, commit = _hub(source, revision, split)
    else:
        raise UserError(f"prompts.source {source} is neither a file nor a hub data set such as org/name; correct the path")
    prompts, seen = [], set()
    for number, row in enumerate(rows, 1):
        prompt = _prompt(row, field, f"{source} line {number}")
        if prompt["id"] in seen and commit:
            prompt["id"] = f"{prompt['id']}#{number}"  # nobody here can mend a data set of the hub
        if prompt["id"] in seen:
            raise UserError(f"{source} line {number}: id {prompt['id']} is there twice; ids must differ")
        seen.add(prompt["id"])
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"{source} has no prompts; give a file with one JSON object a line")
    return prompts, commit


def with_goal(messages: list[dict[str, str]], grade: float) -> list[dict[str, str]]:
    """The chat with its first message asking for an answer of this grade, 1 to 10 (RA-DPO, 2410.08067; the wording is ours)."""
    first, *rest = messages
    wish = f"Write an answer whose overall quality is {grade:g} on a scale from 1 (worst) to 10 (best).\n\n"
    return [first | {"content": wish + first["content"]}, *rest]


def read_gold(path: Path) -> dict[str, str]:
    """Gold responses by prompt id, of a JSONL file with id and response. UserError names a broken line or a repeated id."""
    if not path.is_file():
        raise UserError(f"{path} is missing; pairs.gold names a JSONL file of gold responses, with id and response")
    found: dict[str, str] = {}
    for number, row in enumerate(_jsonl(path), 1):
        if not isinstance(row, dict) or not isinstance(row.get("response"), str) or "id" not in row or not row["response"].strip():
            raise UserError(f"{path} line {number} is not an object with id and response; mend it")
        if str(row["id"]) in found:
            raise UserError(f"{path} line {number}: id {row['id']} is there twice; ids must differ")
        found[str(row["id"])] = row["response"]
    return found


def _jsonl(path: Path) -> list[Any]:
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path} line {number} is not JSON ({error}); mend or remove that line") from None
    return rows


def _hub(source: str, revision: str | None, split: str) -> tuple[list[Any], str]:
    from datasets import load_dataset
    from huggingface_hub import snapshot_download
    try:
        folder = Path(snapshot_download(source, repo_type="dataset", revision=revision, token=hub_token()))
        rows = load_dataset(str(folder), split=split).to_list()
    except Exception as error:  # the hub client and datasets raise many types; each is a matter of name, network or access
        at = f" at revision {revision}" if revision else ""
        raise UserError(
            f"cannot get data set {source}{at}, split {split}, from the hub {hub_failure(error)}, "
            f"or give a JSONL file; there is no file {source} here either"
        ) from error
    return rows, folder.name


def _prompt(row: Any, field: str, where: str) -> Prompt:
    if not isinstance(row, dict):
        raise UserError(f"{where} is not a JSON object; give one object a line")
    content = row.get("messages", row.get(field))
    if content is None:
        raise UserError(f"{where} has neither {field} nor messages; set prompts.field to the field that holds the prompt")
    messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
    if not isinstance(messages, list) or not all(isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages):
        raise UserError(f"{where}: {field} is neither a text nor a list of messages with role and content")
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]  # data sets of conversations end in the answer
    if not messages or not messages[-1]["content"].strip():
        raise UserError(f"{where} has an empty prompt; remove that line")
    identity = row.get("id", row.get("prompt_id", where.rsplit(" ", 1)[1]))
    return {"id": str(identity), "category": str(row.get("category", "")),
            "messages": [{"role": m["role"], "content": m["content"]} for m in messages]}


def read_instructions(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Evaluation instructions in alpaca-eval's form: objects with `instruction`, all different.

    Raises `UserError` for a missing or foreign file, a repeated instruction, or a limit beyond the end.
    """
    rows = read_json(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) and isinstance(row.get("instruction"), str) for row in rows):
        raise UserError(f"{path} is not a list of objects with `instruction`; give a file in alpaca-eval's form")
    if not rows:
        raise UserError(f"{path} has no instructions; give a file in alpaca-eval's form")
    seen: set[str] = set()
    for number, row in enumerate(rows, 1):
        if not row["instruction"].strip():
            raise UserError(f"{path}: instruction {number} is blank; remove it")
        if any("\ud800" <= character <= "\udfff" for character in row["instruction"]):
            raise UserError(
                f"{path}: instruction {number} has half of a surrogate pair, which is no "
                "character; correct it"
            )
        if row["instruction"] in seen:
            raise UserError(f"{path} has an instruction twice: {row['instruction'][:60]!r}; remove one")
        seen.add(row["instruction"])
    ids = [str(row["prompt_id"]) for row in rows if "prompt_id" in row]
    if len(set(ids)) < len(ids) or 0 < len(ids) < len(rows):
        raise UserError(f"{path}: prompt_id must differ between all instructions, or be absent; mend it")
    if limit and limit > len(rows):
        raise UserError(f"alpaca_eval.limit is {limit}, but {path} has {len(rows)} instructions; lower it")
    return rows[:limit]
