"""Model cards: the README.md of a policy folder.

The same inputs give the same text, because the folder's hash covers it. A card is written when a
training is done and must never fail it: what cannot be read of another card or record is left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from sppo.core.artifacts import read_record
from sppo.core.errors import UserError

CONSTRUCTIONS = {
    "best_vs_worst": "the best and the worst response of each prompt",
    "all": "every two responses of each prompt",
    "gold": "a gold response against the policy's",
    "graded": "every two far enough apart by grade",
}
LICENCE_KEYS = ("license", "license_name", "license_link")


def header(folder: Path) -> dict[str, Any]:
    """The YAML header of a folder's README.md; empty if it has none that can be read."""
    card = Path(folder) / "README.md"
    try:
        text = card.read_text(encoding="utf-8-sig", errors="replace") if card.is_file() else ""
        parts = text.split("---\n", 2)
        if len(parts) < 3 or parts[0].strip():
            return {}
        found = yaml.safe_load(parts[1])
    # Besides its own errors yaml raises those of dates, keys and depth as Python does.
    except (OSError, yaml.YAMLError, ValueError, TypeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def model_card(start: Path, title: str, sections: dict[str, str], tag: str) -> str:
    """A card for what was trained from the policy in `start`: header, title, what it comes from, the sections, the licence of the base."""
    before, record = header(start), _record(start)
    first = (
        record.get("stage") == "policy_source"
    )  # else the policy is one of ours, whose card names its base
    source = str((record.get("arguments") or {}).get("model"))
    base = _name(source) if first else before.get("base_model", "a model without a record")
    metadata = {
        "base_model": base,
        "library_name": "transformers",
        "tags": ["preference-optimization", tag],
        **{key: before[key] for key in LICENCE_KEYS if key in before},
    }
    named = metadata.get("license_name") or metadata.get("license") or "its card names none"
    commit = f" at {record['commit']}" if record.get("commit") else ""
    sections = sections | {
        "Licence": f"That of the base, {base}{commit}: {named}. Prompts and preference model have licences of their own."
    }
    text = "".join(f"\n## {heading}\n\n{body.strip()}\n" for heading, body in sections.items())
    card = f"---\n{yaml.safe_dump(metadata, sort_keys=True)}---\n# {title}\n{text}"
    # By an escape a header can hold half a character, which no file can.
    return card.encode("utf-8", errors="replace").decode()


def data_of(pairs: Path) -> str:
    """Where the pairs come from, as far as their records and those of their inputs say."""
    try:
        lines = _lines_of(pairs)
    except (KeyError, TypeError, AttributeError):  # a record of older code, or an edited one
        lines = []
    return "\n".join(lines) or "No record of the pairs was found."


def _lines_of(pairs: Path) -> list[str]:
    chosen = _record(pairs)
    made = {
        record.get("stage"): record
        for record in (_record(path) for path in chosen.get("inputs", {}))
    }
    lines = []
    if "sample" in made:
        record = made["sample"]
        source = record["arguments"]["source"].replace("{t}", str(record["arguments"]["iteration"]))
        commit = f" at {record['commit']}" if record.get("commit") else ""
        lines.append(f"* {record['prompts']} prompts of {_name(source)}{commit}")
    if "generate" in made:
        drawn = made["generate"]["arguments"]
        lines.append(
            f"* {drawn['samples']} responses to each of the policy it was trained from, at temperature {drawn['temperature']}, "
            f"top-p {drawn['top_p']}, at most {drawn['max_new_tokens']} tokens"
        )
    if "grade" in made:
        judge = made["grade"]["arguments"]["judge"]
        lines.append(f"* graded by {'the preference model' if judge == 'preference' else judge}")
    if "annotate" in made:
        model = made["annotate"]["arguments"].get("model")
        if model:
            model = (
                _record(model).get("arguments", {}).get("model", model)
            )  # one that was put in its place has a record of where it came from
            lines.append(f"* compared by the preference model {_name(model)}")
        else:
            lines.append(
                f"* compared by the policy's own reward, {made['annotate']['arguments']['beta']:g} log(pi_t / pi_t-1)"
            )
    if "arguments" in chosen:
        options = chosen["arguments"]
        lines.append(
            f"* in pairs: {CONSTRUCTIONS[options['construction']]}"
            + ", less a penalty for length" * options["even_lengths"]
            + ", both ways round with the grade asked for" * options["target_reward"]
            + f"; {chosen['replayed']} pairs of an earlier iteration again"
            * (chosen["replayed"] > 0)
        )
    return lines


def table(facts: dict[str, Any]) -> str:
    """A Markdown table of two columns."""
    return "| | |\n|---|---|\n" + "".join(
        f"| {name} | {value:.6g} |\n" if isinstance(value, float) else f"| {name} | {value} |\n"
        for name, value in facts.items()
    )


def _record(artifact: str | Path) -> dict[str, Any]:
    try:
        record = read_record(Path(artifact)) or {}
    except (UserError, OSError):
        return {}
    return {} if record.get("rebuilt") else record  # one that was rebuilt says nothing


def _name(source: str) -> str:
    """A hub id as it is; of a path the last part alone, for where a machine keeps its files is nobody's business."""
    return source if source.count("/") == 1 and not Path(source).exists() else Path(source).name
