"""Reading prompts and evaluation instructions."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

from sppo.core.artifacts import has_lone_surrogate, json_lines, read_json
from sppo.core.errors import UserError
from sppo.policies.hub import hub_failure, hub_token
from sppo.policies.models import HUB_ID

Prompt = dict[str, Any]  # id, category, messages
ROLES = ("system", "user", "assistant", "tool")
BEST_GRADE = 10  # what a reward-conditioned policy is asked for when it is sampled or evaluated


def read_prompts(
    source: str, revision: str | None, split: str, field: str | None
) -> tuple[list[Prompt], str | None, int]:
    """Prompts of a JSONL file or a hub data set, the hub commit (None for a file), and empty ones.

    field: the one that holds the prompt; None takes `messages`, else `instruction`. Empty prompts
    of the hub are left out and only counted: nobody here can correct a data set of the hub.
    Raises `UserError` for a missing source, a broken line (naming it), a missing field, or, in a
    file, an empty prompt or a repeated id.
    """
    path = Path(source).expanduser()
    commit = None
    if path.is_file():
        rows = json_lines(path)
    elif HUB_ID.fullmatch(source) and path.suffix not in (".jsonl", ".json"):
        rows, commit = _hub(source, revision, split)
    else:
        raise UserError(
            f"prompts.source {source} is neither a file nor a hub data set such as org/name; correct the path"
        )
    prompts, seen, empty = [], set(), 0
    for number, row in enumerate(rows, 1):
        prompt = _prompt(row, field, f"{source} line {number}")
        if prompt is None and commit:
            empty += 1
            continue
        if prompt is None:
            raise UserError(f"{source} line {number} has an empty prompt; remove that line")
        if prompt["id"] in seen and commit:
            prompt["id"] = f"{prompt['id']}#{number}"
        if prompt["id"] in seen:
            raise UserError(
                f"{source} line {number}: id {prompt['id']} is there twice; ids must differ"
            )
        seen.add(prompt["id"])
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"{source} has no prompts; give a file with one JSON object a line")
    return prompts, commit, empty


def with_goal(messages: list[dict[str, str]], grade: float) -> list[dict[str, str]]:
    """The chat with its first message asking for an answer of this grade, 1 to 10 (RA-DPO, 2410.08067; the wording is ours)."""
    first, *rest = messages
    wish = f"Write an answer whose overall quality is {grade:g} on a scale from 1 (worst) to 10 (best).\n\n"
    return [first | {"content": wish + first["content"]}, *rest]


def read_gold(path: Path) -> dict[str, str]:
    """Gold responses by prompt id, of a JSONL file with id and response. UserError names a broken line or a repeated id."""
    if not path.is_file():
        raise UserError(
            f"{path} is missing; pairs.gold names a JSONL file of gold responses, with id and response"
        )
    found: dict[str, str] = {}
    for number, row in enumerate(json_lines(path), 1):
        if (
            not isinstance(row, dict)
            or not isinstance(row.get("response"), str)
            or "id" not in row
            or not row["response"].strip()
        ):
            raise UserError(
                f"{path} line {number} is not an object with id and response; correct it"
            )
        if str(row["id"]) in found:
            raise UserError(f"{path} line {number}: id {row['id']} is there twice; ids must differ")
        found[str(row["id"])] = row["response"]
    return found


def _hub(source: str, revision: str | None, split: str) -> tuple[list[Any], str]:
    from datasets import load_dataset
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(source, repo_type="dataset", revision=revision, token=hub_token())
        )
        rows = load_dataset(str(folder), split=split).to_list()
    except Exception as error:  # the hub client and datasets raise many types; each is a matter of name, network or access
        at = f" at revision {revision}" if revision else ""
        raise UserError(
            f"cannot get data set {source}{at}, split {split}, from the hub {hub_failure(error)}, "
            f"or give a JSONL file; there is no file {source} here either"
        ) from error
    return rows, folder.name


def _prompt(row: Any, field: str | None, where: str) -> Prompt | None:
    """The prompt of a row; None if it is empty."""
    if not isinstance(row, dict):
        raise UserError(f"{where} is not a JSON object; give one object a line")
    if field is None:
        chat = row.get("messages") is not None or "instruction" not in row
        field = "messages" if chat else "instruction"
        if field not in row:
            raise UserError(
                f"{where} has neither messages nor instruction; set prompts.field to "
                "the field that holds the prompt"
            )
    if field not in row:
        raise UserError(
            f"{where} has no {field}; set prompts.field to the field that holds the prompt"
        )
    content = row[field]
    if content is None:
        return None
    messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    ):
        raise UserError(
            f"{where}: {field} is neither a text nor a list of messages with role and "
            "content; convert it"
        )
    if foreign := next((m["role"] for m in messages if m["role"] not in ROLES), None):
        known = {"human": "user", "gpt": "assistant"}.get(foreign)
        raise UserError(
            f"{where}: {field} has the role {foreign!r}, and roles are "
            f"{', '.join(ROLES)}; convert it" + (f" to {known}" if known else "")
        )
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]  # data sets of conversations end in the answer
    if not messages:
        return None
    if messages[-1]["role"] != "user":
        raise UserError(
            f"{where}: the last message of {field} is the {messages[-1]['role']}'s, so "
            "that there is nothing to answer; end it in the user's"
        )
    if not messages[-1]["content"].strip():
        return None
    identity = row.get("id", row.get("prompt_id", where.rsplit(" ", 1)[1]))
    return {
        "id": str(identity),
        "category": str(row.get("category", "")),
        "messages": [{"role": m["role"], "content": m["content"]} for m in messages],
    }


def normalised(text: str) -> str:
    """A question without what makes no other one of it.

    That is case, white space, compatible forms of a character, and closing marks.
    """
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    end = len(plain)
    while end and unicodedata.category(plain[end - 1])[0] in "PZ":
        end -= 1
    return plain[:end] or plain


def is_held_out(prompt: Prompt, held_out: set[str]) -> bool:
    """Whether a user's message of the prompt is one of these questions, which are `normalised`."""
    return any(
        message["role"] == "user" and normalised(message["content"]) in held_out
        for message in prompt["messages"]
    )


def read_instructions(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Evaluation instructions in alpaca-eval's form: objects with `instruction`, all different.

    Raises `UserError` for a missing or foreign file, a repeated instruction, or a limit beyond the end.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; give a file in alpaca-eval's form")
    rows = read_json(path)
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and isinstance(row.get("instruction"), str) for row in rows
    ):
        raise UserError(
            f"{path} is not a list of objects with `instruction`; give a file in alpaca-eval's form"
        )
    if not rows:
        raise UserError(f"{path} has no instructions; give a file in alpaca-eval's form")
    seen: set[str] = set()
    for number, row in enumerate(rows, 1):
        if not row["instruction"].strip():
            raise UserError(f"{path}: instruction {number} is blank; remove it")
        if has_lone_surrogate(row):
            raise UserError(
                f"{path}: instruction {number} spells half a character (a lone surrogate "
                "such as \\ud83d), which no text can hold; correct or remove it"
            )
        if row["instruction"] in seen:
            raise UserError(
                f"{path} has an instruction twice: {row['instruction'][:60]!r}; remove one"
            )
        seen.add(row["instruction"])
    ids = [str(row["prompt_id"]) for row in rows if "prompt_id" in row]
    if len(set(ids)) < len(ids) or 0 < len(ids) < len(rows):
        raise UserError(
            f"{path}: prompt_id must differ between all instructions, or be absent; correct it"
        )
    if limit and limit > len(rows):
        raise UserError(
            f"alpaca_eval.limit is {limit}, but {path} has {len(rows)} instructions; lower it"
        )
    return rows[:limit]
