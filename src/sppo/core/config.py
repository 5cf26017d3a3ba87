"""The configuration's schema, and checks of what a user wrote against it.

`config/schema.yaml` holds every key. `sppo.workflow.configuration` makes complete runs from what a
user wrote, and `sppo.core.flags` gives programs their flags, both by the same schema.
"""

from __future__ import annotations

import copy
import datetime
import difflib
import functools
import importlib
import math
from typing import Any

import jsonschema
import yaml

from sppo.core.artifacts import ROOT
from sppo.core.errors import UserError

Config = dict[str, Any]

SCHEMA_FILE = ROOT / "config" / "schema.yaml"
# The section `policy`: where the model comes from, and how its chats are written.
MODEL_SOURCE, OF_CHATS = ("model", "revision"), ("chat_template_kwargs", "template_date")
DEVICES = ("auto", "cpu", "gpu", "mps")
# How an evaluation's questions are answered.
ANSWER_KEYS = ("limit", "temperature", "top_p", "max_new_tokens")
# How a policy is run to answer, whatever it answers.
ENGINE_KEYS = (
    "engine",
    "tensor_parallel",
    "batch_size",
    "prefix_caching",
    "gpu_memory",
    "precision",
)
GPU_MEMORY = 0.92  # the share that vLLM 0.32 takes by default
# Keys of earlier versions, and what replaced them.
RENAMED = {
    "preference.probability": "pairs.probability",
    "preference.logit_scale": "pairs.logit_scale",
    "preference.winner_by": "pairs.winner_by",
    "preference.truncated": "pairs.truncated",
    "pairs.implicit": "preference.implicit",
    "pairs.goals": "pairs.target_reward",
    "pairs.replay": "replay.share",
    "pairs.replay_older": "replay.older_share",
    "pairs.replay_from": "replay.iteration",
    "grades.positive": "pairs.winner_grade",
    "grades.gold_margin": "pairs.gold_grade_margin",
    "grades.own_margin": "pairs.own_grade_margin",
    "train.machines": "train.nodes",
}
RENAMED_VALUES = {("pairs.construction", "extremes"): "best_vs_worst"}


@functools.cache
def schema() -> Config:
    """The JSON schema of the configuration. It is shared: do not change it.

    What registries decide is filled in here: sections of evaluations with settings of their own,
    the choices of a key with `x-choices`, the items of a list with `x-items`, and for a key with
    `x-loss-parameter` the losses that read it (or its `x-parameter`), as `x-only-with`.
    """
    rules: Config = yaml.safe_load(SCHEMA_FILE.read_text(encoding="utf-8"))
    for evaluation in _registry(rules["x-evaluations"]):
        if evaluation.settings:
            if evaluation.name in rules["properties"]:
                raise UserError(
                    f"the evaluation {evaluation.name} has the name of a configuration section;"
                    " rename it"
                )
            section = {"type": "object", "additionalProperties": False}
            rules["properties"][evaluation.name] = section | {"properties": evaluation.settings}
    for section in rules["properties"].values():
        for key, rule in section.get("properties", {}).items():
            if "x-choices" in rule:
                nothing = [None] if "null" in rule["type"] else []
                rule["enum"] = [*_registry(rule["x-choices"]), *nothing]
            if "x-items" in rule:
                rule["items"] = {"enum": [each.name for each in _registry(rule["x-items"])]}
            if "x-loss-parameter" in rule:
                losses = _registry(rule["x-loss-parameter"])
                parameter = rule.get("x-parameter", key)
                readers = [name for name, loss in losses.items() if parameter in loss.reads]
                rule["x-only-with"] = {"train.loss": {"enum": readers}}
    return rules


def _registry(place: str) -> Any:
    """The registry at `package.module:NAME`."""
    module, name = place.split(":")
    return getattr(importlib.import_module(module), name)


def running_keys(section: str) -> tuple[str, ...]:
    """The keys of a section that say how jobs run and cannot change a result (`x-running`)."""
    rules = schema()["properties"][section]["properties"]
    return tuple(key for key, rule in rules.items() if rule.get("x-running"))


def default_of(rule: Config, settings: str) -> Any:
    """The value that a key takes when nobody sets it. rule: the key's part of the schema."""
    return rule["x-settings"][settings] if "x-settings" in rule else copy.deepcopy(rule["default"])


def completed(written: Config) -> Config:
    """`written` with `settings` and defaults filled in for every key but `runs`."""
    rules = schema()["properties"]
    settings = written.get("settings", rules["settings"]["default"])
    complete: Config = {}
    for key, rule in rules.items():
        if key in ("runs", "extends"):
            continue
        if rule["type"] == "object":
            section = written.get(key, {})
            complete[key] = {
                name: section.get(name, default_of(inner, settings))
                for name, inner in rule["properties"].items()
            }
        else:
            complete[key] = written.get(key, default_of(rule, settings))
    return complete


def typed(written: Config, rules: Config) -> Config:
    """`written` with text turned into the number or boolean of the schema, if it spells one.

    `snakemake --config section={key: 1}` hands over text alone, and YAML takes 1e-6 for text.
    """
    result: Config = {}
    free = rules.get("additionalProperties") is True  # any key, of which no type is known
    for key, value in written.items():
        if not isinstance(key, str):
            raise UserError(f"config: key {shown(key)} is not text; put it in quotes or remove it")
        rule = rules.get("properties", {}).get(key, {})
        if isinstance(value, dict):
            result[key] = typed(value, rule)
        elif isinstance(value, datetime.date) and rule:
            result[key] = value.isoformat()  # YAML reads a date without quotes as one
        elif value == "null" and "null" in rule.get("type", ()):
            result[key] = None
        elif free and isinstance(value, str):
            # Only these, because a file can mean a text such as "none" or "007".
            result[key] = {"true": True, "false": False}.get(value, value)
        elif isinstance(value, str) and rule and "string" not in rule["type"]:
            result[key] = _spelled(value)
        elif isinstance(value, list) and "array" in rule.get("type", ()):
            result[key] = [_spelled(item) if isinstance(item, str) else item for item in value]
        else:
            result[key] = value
    return result


def check_sizes(value: Any, where: str) -> None:
    """No whole number in `value` needs more than 64 bits, else UserError: no program computes
    with it, and Python writes out none of thousands of digits."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise UserError(
            f"{where[:200].rstrip('.')} is {shown(value)}, a number of more than "
            "64 bits; correct it"
        )
    if isinstance(value, dict):
        for key, inner in value.items():
            check_sizes(inner, f"{where}{key}.")
    elif isinstance(value, list):
        for inner in value:
            check_sizes(inner, where)


def without_nulls(written: Config, rules: Config) -> Config:
    """`written` without the keys that are null, except those of which null is a value."""
    result: Config = {}
    for key, value in written.items():
        rule = rules.get("properties", {}).get(key, {"type": "null"})
        if (
            value is not None
            or "null" in rule["type"]
            or (rule["type"] == "object" and rule.get("additionalProperties") is not True)
        ):
            result[key] = without_nulls(value, rule) if isinstance(value, dict) else value
    return result


def _spelled(text: str) -> Any:
    """The number, boolean or null that a text spells, else the text."""
    words = {"true": True, "false": False, "null": None, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


# Stricter than JSON: 5.0 is no count, and neither NaN nor infinity is a number to compute with.
_TYPES = jsonschema.Draft202012Validator.TYPE_CHECKER.redefine_many(
    {
        "integer": lambda _, value: isinstance(value, int) and not isinstance(value, bool),
        "number": lambda _, value: (
            isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        ),
    }
)
Validator = jsonschema.validators.extend(jsonschema.Draft202012Validator, type_checker=_TYPES)


def check_against_schema(written: Config, where: str = "") -> None:
    """Raise UserError for the first key that the schema does not allow.

    where: what stands before a key's name in the error line, such as "runs.dpo.".
    """
    errors = Validator(schema()).iter_errors(written)
    first = min(errors, key=lambda error: list(map(str, error.absolute_path)), default=None)
    if first is not None:
        raise UserError("config: " + _explain(first, where))


def _explain(error: jsonschema.ValidationError, where: str) -> str:
    """One line for one schema error."""
    key = ".".join(map(str, error.absolute_path))
    path = where + key
    value = error.instance
    limits = {"minimum": "at least", "exclusiveMinimum": "greater than", "maximum": "at most"}
    if error.validator == "additionalProperties":
        return _explain_unknown_key(error, key, where)
    if path.endswith("responses.samples") and isinstance(value, int):
        return f"{path} is K, and K = {value} leaves nothing to compare; set it to 2 or more"
    if "propertyNames" in error.absolute_schema_path:
        path = f"the name of a run in {path}"
    if error.validator == "type":
        wanted = error.validator_value
        if not isinstance(wanted, str):
            wanted = " or ".join(wanted)
        return f"{path} is {shown(value)}, not {wanted}; see docs/configuration.md"
    if error.validator == "enum":
        if isinstance(value, str) and (key, value) in RENAMED_VALUES:
            return f"{path}: {value} is now called {RENAMED_VALUES[key, value]}; write that"
        choices = ", ".join("null" if one is None else str(one) for one in error.validator_value)
        return f"{path} is {shown(value)}; it can be {choices}"
    if error.validator == "contains":
        return f"{path} lacks {error.validator_value['const']}; add it"
    if error.validator in ("pattern", "maxLength") and "description" in error.schema:
        form = error.schema["description"]
        return f"{path} is {shown(value)}, which does not have the required form: {form}"
    if error.validator in limits:
        limit = f"{limits[error.validator]} {error.validator_value}"
        return f"{path} is {shown(value)}; it must be {limit}"
    return f"{path or 'the configuration'}: {error.message}; see docs/configuration.md"


def _explain_unknown_key(error: jsonschema.ValidationError, section: str, where: str) -> str:
    known = list(error.schema["properties"])
    unknown = next(key for key in error.instance if key not in known)
    key = f"{section}.{unknown}" if section else unknown
    if key in RENAMED:
        return f"{where}{key} is now called {RENAMED[key]}; rename it"
    path = where + key
    path = path if len(path) <= 200 else f"{path[:197]}..."
    near = difflib.get_close_matches(unknown, known, 1)
    if not near and section.rpartition(".")[0] in ("", "runs"):
        sections = schema()["properties"]
        near = [
            f"{name}.{unknown}"
            for name in known
            if unknown in sections.get(name, {}).get("properties", {})
        ]
    advice = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"
    return f"unknown key {path}; {advice}"


def shown(value: Any) -> str:
    """A value as an error line shows it: quoted if it is text, and cut where it is long."""
    if value is None:
        return "null"
    try:
        text = repr(value)
    except ValueError:  # of thousands of digits, which Python does not write out
        return "a number of thousands of digits"
    return text if len(text) <= 100 else f"{text[:97]}..."
