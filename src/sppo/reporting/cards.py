"""Model cards: the README.md of a policy folder.

The same inputs give the same text, because the hash of the folder covers the card. The card is
written at the end of a training and must never make the training fail. Therefore the card leaves
out everything that cannot be read from another card or from a record.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from sppo.core.artifacts import read_record
from sppo.core.errors import UserError

CONSTRUCTIONS = {
    "best_vs_worst": "the best and the worst response of each prompt",
    "best_vs_second": "the best and the second best response of each prompt",
    "best_vs_random": "the best and a random other response of each prompt",
    "all": "every two responses of each prompt",
    "gold": "a gold response against the policy's",
    "graded": "every two responses whose grades differ enough",
}
LICENCE_KEYS = ("license", "license_name", "license_link")


def header(folder: Path) -> dict[str, Any]:
    """The YAML header of a folder's README.md; empty if there is no readable header."""
    card = Path(folder) / "README.md"
    try:
        text = card.read_text(encoding="utf-8-sig", errors="replace") if card.is_file() else ""
        parts = text.split("---\n", 2)
        if len(parts) < 3 or parts[0].strip():
            return {}
        found = yaml.safe_load(parts[1])
    # Apart from its own errors, yaml raises Python's errors for bad dates, keys and deep nesting.
    except (OSError, yaml.YAMLError, ValueError, TypeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def model_card(start: Path, title: str, sections: dict[str, str], tag: str) -> str:
    """The model card of a policy that was trained from the policy in `start`.

    The card has a YAML header, the title, the sections (text by heading) and the base model's
    licence. `tag` is added to the tags of the header.
    """
    start_header, record = header(start), _record(start)
    if record.get("stage") == "policy_source":
        source = str((record.get("arguments") or {}).get("model"))
        base = _name(source)
    else:  # `start` was trained by this project, and its card names the base model
        base = start_header.get("base_model", "a model without a record")
    metadata = {
        "base_model": base,
        "library_name": "transformers",
        "tags": ["preference-optimization", tag],
        **{key: start_header[key] for key in LICENCE_KEYS if key in start_header},
    }
    sections = sections | {"Licence": _licence(metadata, record)}
    text = "".join(f"\n## {heading}\n\n{body.strip()}\n" for heading, body in sections.items())
    card = f"---\n{yaml.safe_dump(metadata, sort_keys=True)}---\n# {title}\n{text}"
    # An escape in a header can give half of a surrogate pair, which UTF-8 cannot encode.
    return card.encode("utf-8", errors="replace").decode()


def _licence(metadata: dict[str, Any], record: dict[str, Any]) -> str:
    """The licence section for the header of the card and the record of the policy in `start`."""
    licence = metadata.get("license_name") or metadata.get("license") or "its card names none"
    return (
        f"The licence of the base model, {metadata['base_model']}{_at_commit(record)}: {licence}. "
        "The prompts and the preference model have their own licences."
    )


def data_of(pairs: Path) -> str:
    """A list of the pairs' sources, as far as the records of the pairs and their inputs say."""
    try:
        lines = _lines_of(pairs)
    except (KeyError, TypeError, AttributeError):  # older code wrote the record, or it was edited
        lines = []
    return "\n".join(lines) or "No record of the pairs was found."


def _lines_of(pairs: Path) -> list[str]:
    """One line for each stage that the pairs went through and whose record can be read."""
    selected = _record(pairs)
    input_records = [_record(path) for path in selected.get("inputs", {})]
    by_stage = {record.get("stage"): record for record in input_records}
    lines = []
    if "sample" in by_stage:
        lines.append(_prompts_line(by_stage["sample"]))
    if "generate" in by_stage:
        options = by_stage["generate"]["arguments"]
        lines.append(
            f"* {options['samples']} responses per prompt from the policy before this training, "
            f"at temperature {options['temperature']}, "
            f"top-p {options['top_p']}, at most {options['max_new_tokens']} tokens"
        )
    if "grade" in by_stage:
        judge = by_stage["grade"]["arguments"]["judge"]
        lines.append(f"* graded by {'the preference model' if judge == 'preference' else judge}")
    if "annotate" in by_stage:
        lines.append(_annotation_line(by_stage["annotate"]["arguments"]))
    if "arguments" in selected:
        lines.append(_pairs_line(selected))
    return lines


def _prompts_line(record: dict[str, Any]) -> str:
    options = record["arguments"]
    source = options["source"].replace("{t}", str(options["iteration"]))
    return f"* {record['prompts']} prompts of {_name(source)}{_at_commit(record)}"


def _annotation_line(options: dict[str, Any]) -> str:
    model = options.get("model")
    if not model:
        return f"* compared by the policy's own reward, {options['beta']:g} log(pi_t / pi_t-1)"
    # A preference model that a stage prepared has a record, which names the original source.
    source = _record(model).get("arguments", {}).get("model", model)
    return f"* compared by the preference model {_name(source)}"


def _pairs_line(record: dict[str, Any]) -> str:
    options = record["arguments"]
    line = f"* in pairs: {CONSTRUCTIONS[options['construction']]}"
    labels = options.get("labels", "annotated")  # records of older code do not have the key
    if labels != "annotated":
        line += f", with {labels} labels (a control)"
    if options["even_lengths"]:
        line += ", with a penalty for length"
    if options["target_reward"]:
        line += ", each also swapped, with the reward in the prompt"
    if record["replayed"] > 0:
        line += f"; {record['replayed']} pairs of an earlier iteration are used again"
    return line


def table(facts: dict[str, Any]) -> str:
    """A Markdown table of two columns: each fact's name and value, floats with 6 digits."""
    lines = ["| | |", "|---|---|"]
    for name, value in facts.items():
        shown = f"{value:.6g}" if isinstance(value, float) else value
        lines.append(f"| {name} | {shown} |")
    return "\n".join(lines) + "\n"


def _record(artifact: str | Path) -> dict[str, Any]:
    """The record of an artifact; empty if it is missing, unreadable or rebuilt.

    A rebuilt record does not say what the artifact was made from.
    """
    try:
        record = read_record(Path(artifact)) or {}
    except (UserError, OSError):
        return {}
    return {} if record.get("rebuilt") else record


def _at_commit(record: dict[str, Any]) -> str:
    """The hub commit of a record as part of a sentence; empty if the record has no commit."""
    return f" at {record['commit']}" if record.get("commit") else ""


def _name(source: str) -> str:
    """A hub id unchanged, or the last part of a path: a card must not publish local folders."""
    is_hub_id = source.count("/") == 1 and ".py:" not in source and not Path(source).exists()
    return source if is_hub_id else Path(source).name
