"""Reading prompts and evaluation instructions."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

from sppo.core.artifacts import has_lone_surrogate, json_lines, read_json
from sppo.core.errors import UserError
from sppo.policies.folders import HUB_ID
from sppo.policies.hub import hub_failure, hub_token

Prompt = dict[str, Any]  # id, category, messages
ROLES = ("system", "user", "assistant", "tool")
PROMPT_FIELDS = ("messages", "instruction", "prompt")  # `prompt`: as in IFEval's file
ID_FIELDS = ("id", "key", "uid")  # ours, IFEval's, Arena-Hard's


def read_prompts(
    source: str, revision: str | None, split: str, field: str | None
) -> tuple[list[Prompt], str | None, int]:
    """Prompts of a JSONL file or a hub data set, its hub commit, and the number of empty prompts.

    The commit is None for a file. `field` is the field with the prompt; None means the first of
    `messages`, `instruction` and `prompt` that a row has. Empty prompts of a hub data set are left
    out and counted, and repeated ids get the line number as a suffix, because users cannot correct
    a data set on the hub. UserError if the source does not exist, a line is invalid (it is named),
    a field is missing, or a file has an empty prompt or a repeated id.
    """
    path = Path(source).expanduser()
    commit = None
    if path.is_file():
        rows = json_lines(path)
    elif HUB_ID.fullmatch(source) and path.suffix not in (".jsonl", ".json"):
        rows, commit = hub_rows(source, revision, split)
    else:
        raise UserError(
            f"prompts.source {source} is neither a file nor a hub data set such as org/name; "
            "correct the path"
        )
    prompts: list[Prompt] = []
    seen: set[str] = set()
    empty = 0
    for number, row in enumerate(rows, 1):
        prompt = _prompt(row, field, f"{source} line {number}")
        if prompt is None:
            if not commit:
                raise UserError(f"{source} line {number} has an empty prompt; remove that line")
            empty += 1
            continue
        if prompt["id"] in seen and commit:
            prompt["id"] = f"{prompt['id']}#{number}"
        if prompt["id"] in seen:
            raise UserError(
                f"{source} line {number}: id {prompt['id']} occurs twice; give each line its own id"
            )
        seen.add(prompt["id"])
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"{source} has no prompts; give a file with one JSON object per line")
    return prompts, commit, empty


def chat_text(messages: list[dict[str, str]]) -> str:
    """A chat as plain text. If it has several messages, each is written with its role."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{each['role']}: {each['content']}" for each in messages)


def read_gold(path: Path) -> dict[str, str]:
    """Gold responses by prompt id, from a JSONL file with id and response.

    UserError if the file does not exist, a line is invalid, or an id is repeated.
    """
    if not path.is_file():
        raise UserError(
            f"{path} is missing; set pairs.gold to a JSONL file of gold responses, with id and "
            "response"
        )
    gold: dict[str, str] = {}
    for number, row in enumerate(json_lines(path), 1):
        is_valid = (
            isinstance(row, dict)
            and "id" in row
            and isinstance(row.get("response"), str)
            and row["response"].strip()
        )
        if not is_valid:
            raise UserError(
                f"{path} line {number} is not an object with id and response; correct it"
            )
        if str(row["id"]) in gold:
            raise UserError(
                f"{path} line {number}: id {row['id']} occurs twice; give each line its own id"
            )
        gold[str(row["id"])] = row["response"]
    return gold


def hub_rows(source: str, revision: str | None, split: str) -> tuple[list[Any], str]:
    """The rows of a split of a hub data set, and the commit."""
    from datasets import load_dataset
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(source, repo_type="dataset", revision=revision, token=hub_token())
        )
        rows = load_dataset(str(folder), split=split).to_list()
    # The hub client and the package datasets raise many types. The cause of each is a name, the
    # network or access rights.
    except Exception as error:
        at = f" at revision {revision}" if revision else ""
        raise UserError(
            f"cannot get data set {source}{at}, split {split}, from the hub {hub_failure(error)}, "
            f"or give a JSONL file; the file {source} does not exist here either"
        ) from error
    return rows, folder.name


def _prompt(row: Any, field: str | None, where: str) -> Prompt | None:
    """The prompt of a row; None if it is empty."""
    if not isinstance(row, dict):
        raise UserError(f"{where} is not a JSON object; give one object per line")
    if field is None:
        field = next((name for name in PROMPT_FIELDS if row.get(name) is not None), None)
        field = field or next((name for name in PROMPT_FIELDS if name in row), None)
        if field is None:
            raise UserError(
                f"{where} has neither messages nor instruction nor prompt; set prompts.field to "
                "the field that holds the prompt"
            )
    if field not in row:
        raise UserError(
            f"{where} has no {field}; set prompts.field to the field that holds the prompt"
        )
    messages = check_messages(row[field], f"{where}: {field}")
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]  # in data sets of conversations, the answer is the last message
    if not messages:
        return None
    if messages[-1]["role"] != "user":
        raise UserError(
            f"{where}: the last message of {field} has the role {messages[-1]['role']}, so there "
            "is nothing to answer; end it with a message of the user"
        )
    if not messages[-1]["content"].strip():
        return None
    line_number = where.rsplit(" ", 1)[1]
    return {
        "id": str(row.get("id", row.get("prompt_id", line_number))),
        "category": str(row.get("category", "")),
        "messages": [{"role": m["role"], "content": m["content"]} for m in messages],
    }


def check_messages(content: Any, where: str) -> list[dict[str, Any]]:
    """The messages in a field: a text is one message of the user, null is none."""
    if content is None:
        return []
    if isinstance(content, str):
        return [{"role": "user", "content": content}]
    if not isinstance(content, list) or not all(_is_message(one) for one in content):
        raise UserError(
            f"{where} is neither a text nor a list of messages with role and content; convert it"
        )
    for message in content:
        role = message["role"]
        if role not in ROLES:
            known = {"human": "user", "gpt": "assistant"}.get(role)
            raise UserError(
                f"{where} has the role {role!r}, and the roles are {', '.join(ROLES)}; convert it"
                + (f" to {known}" if known else "")
            )
    return content


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("role"), str)
        and isinstance(value.get("content"), str)
    )


def normalised(text: str) -> str:
    """A question in a form in which equal questions compare equal.

    It ignores case, white space, compatible forms of a character (NFKC) and closing punctuation.
    """
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    end = len(plain)
    while end and unicodedata.category(plain[end - 1])[0] in "PZ":
        end -= 1
    return plain[:end] or plain


def is_held_out(prompt: Prompt, held_out: set[str]) -> bool:
    """Whether a user message of the prompt is one of the `normalised` questions in `held_out`."""
    return any(
        message["role"] == "user" and normalised(message["content"]) in held_out
        for message in prompt["messages"]
    )


def _from_ifeval(path: Path) -> list[Any]:
    """The rows of a JSONL file in IFEval's form, in alpaca-eval's format."""
    rows = []
    for number, row in enumerate(json_lines(path), 1):
        prompt = row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(prompt, str):
            raise UserError(
                f"{path} line {number} has no text in prompt; give a JSONL file in IFEval's form,"
                " or a JSON file in alpaca-eval's format"
            )
        rows.append(
            {
                "dataset": str(row.get("category", "ifeval")),
                "instruction": prompt,
                "prompt_id": str(next((row[name] for name in ID_FIELDS if name in row), number)),
            }
        )
    return rows


def read_instructions(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """The first `limit` evaluation instructions of a file in alpaca-eval's format.

    The format is a JSON list of objects with `instruction`. A JSONL file in IFEval's form, with
    `prompt` and `key`, also works. UserError if the file does not exist or has another format, an
    instruction is repeated, or `limit` exceeds their number.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; give a file in alpaca-eval's format")
    rows = _from_ifeval(path) if path.suffix == ".jsonl" else read_json(path)
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and isinstance(row.get("instruction"), str) for row in rows
    ):
        raise UserError(
            f"{path} is not a list of objects with `instruction`; give a file in alpaca-eval's "
            "format"
        )
    if not rows:
        raise UserError(f"{path} has no instructions; give a file in alpaca-eval's format")
    seen: set[str] = set()
    for number, row in enumerate(rows, 1):
        if not row["instruction"].strip():
            raise UserError(f"{path}: instruction {number} is blank; remove it")
        if has_lone_surrogate(row):
            raise UserError(
                f"{path}: instruction {number} has half a character (a lone surrogate such as "
                "\\ud83d), which is not valid text; correct or remove it"
            )
        if row["instruction"] in seen:
            raise UserError(
                f"{path} has the instruction {row['instruction'][:60]!r} twice; remove one"
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
