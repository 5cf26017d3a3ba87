"""Model cards: the README.md of a policy folder. The same inputs give the same text, for the folder's hash covers it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from sppo.artifacts import read_record

CONSTRUCTIONS = {"extremes": "the best and the worst response of each prompt", "all": "every two responses of each prompt",
                 "gold": "a gold response against the policy's", "graded": "every two far enough apart by grade"}
LICENCE_KEYS = ("license", "license_name", "license_link")


def header(folder: Path) -> dict[str, Any]:
    """The YAML header of a folder's README.md; empty if it has none."""
    card = Path(folder) / "README.md"
    parts = card.read_text(encoding="utf-8").split("---\n", 2) if card.is_file() else []
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        found = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def model_card(start: Path, title: str, sections: dict[str, str], tag: str) -> str:
    """A card for what was trained from the policy in `start`: header, title, what it comes from, the sections, the licence of the base."""
    before, record = header(start), _record(start)
    first = record.get("stage") == "policy_source"  # else the policy is one of ours, whose card names its base
    base = _name(record["arguments"]["model"]) if first else before.get("base_model", "a model without a record")
    metadata = {"base_model": base, "library_name": "transformers", "tags": ["preference-optimization", tag],
                **{key: before[key] for key in LICENCE_KEYS if key in before}}
    named = metadata.get("license_name") or metadata.get("license") or "its card names none"
    commit = f" at {record['commit']}" if record.get("commit") else ""
    sections = sections | {"Licence": f"That of the base, {base}{commit}: {named}. Prompts and preference model have licences of their own."}
    text = "".join(f"\n## {heading}\n\n{body.strip()}\n" for heading, body in sections.items())
    return f"---\n{yaml.safe_dump(metadata, sort_keys=True)}---\n# {title}\n{text}"


def data_of(pairs: Path) -> str:
    """Where the pairs come from, as far as their records and those of their inputs say."""
    chosen = _record(pairs)
    made = {record.get("stage"): record for record in (_record(path) for path in chosen.get("inputs", {}))}
    lines = []
    if "sample" in made:
        record = made["sample"]
        source = record["arguments"]["source"].replace("{t}", str(record["arguments"]["iteration"]))
        commit = f" at {record['commit']}" if record.get("commit") else ""
        lines.append(f"* {record['prompts']} prompts of {_name(source)}{commit}")
    if "generate" in made:
        drawn = made["generate"]["arguments"]
        lines.append(f"* {drawn['samples']} responses to each of the policy it was trained from, at temperature {drawn['temperature']}, "
                     f"top-p {drawn['top_p']}, at most {drawn['max_new_tokens']} tokens")
    if "grade" in made:
        judge = made["grade"]["arguments"]["judge"]
        lines.append(f"* graded by {'the preference model' if judge == 'preference' else judge}")
    if "annotate" in made:
        model = made["annotate"]["arguments"].get("model")
        if model:
            model = _record(model).get("arguments", {}).get("model", model)  # one that was put in its place has a record of where it came from
            lines.append(f"* compared by the preference model {_name(model)}")
        else:
            lines.append(f"* compared by the policy's own reward, {made['annotate']['arguments']['beta']:g} log(pi_t / pi_t-1)")
    if "arguments" in chosen:
        options = chosen["arguments"]
        lines.append(f"* in pairs: {CONSTRUCTIONS[options['construction']]}" + ", less a penalty for length" * options["even_lengths"]
                     + ", both ways round with the grade asked for" * options["goals"]
                     + f"; {chosen['replayed']} pairs of an earlier iteration again" * (chosen["replayed"] > 0))
    return "\n".join(lines) or "No record of the pairs was found."


def table(facts: dict[str, Any]) -> str:
    """A Markdown table of two columns."""
    return "| | |\n|---|---|\n" + "".join(f"| {name} | {value:.6g} |\n" if isinstance(value, float) else f"| {name} | {value} |\n"
                                          for name, value in facts.items())


def _record(artifact: str | Path) -> dict[str, Any]:
    record = read_record(Path(artifact)) or {}
    return {} if record.get("rebuilt") else record  # one that was rebuilt says nothing


def _name(source: str) -> str:
    """A hub id as it is; of a path the last part alone, for where a machine keeps its files is nobody's business."""
    return source if source.count("/") == 1 and not Path(source).exists() else Path(source).name
