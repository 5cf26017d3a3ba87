"""Configuration: one schema, checked at once, resolved for every run.

`config/schema.yaml` holds every key. `resolve` turns what the user wrote into one complete dictionary
for the main run and one for each named run; programs take their flags from the same schema.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import difflib
import json
import math
import os
from collections.abc import Callable
from typing import Any

import jsonschema
import yaml

from sppo.core.artifacts import ROOT
from sppo.core.errors import UserError
from sppo.core.openai_api import check_address

SCHEMA_FILE = ROOT / "config" / "schema.yaml"
# Names of folders and files under results/, of the main run, and of the experiment without a name.
RESERVED = {
    "tables",
    "figures",
    "theory",
    "report",
    "models",
    "logs",
    "benchmarks",
    "summary.md",
    "report.html",
    "response_browser.html",
    "main",
    "all",
    "sppo",
}
# What a run may not override: these decide where things lie, or are shared by all runs.
SHARED = {"name", "runs", "policy", "device", "keep_policies", "push_to_hub"}
# What two runs must agree on to share the first iteration's responses and preferences.
FIRST_ITERATION = ("prompts", "responses", "preference", "seeds")
# The section `preference` serves two stages: these keys say how responses are compared, the others how pairs are selected.
COMPARISON = (
    "model",
    "revision",
    "source",
    "backend",
    "precision",
    "max_prompt_tokens",
    "max_response_tokens",
    "truncate_together",
    "batch_tokens",
)
SELECTION = ("probability", "logit_scale", "winner_by", "truncated")
# The section `grades` too: these keys say who grades, the others which pairs grades make.
GRADING, THRESHOLDS = (
    ("judge", "judge_model", "judge_base_url"),
    ("positive", "gold_margin", "own_margin"),
)
# Losses that learn from P-hat or P(winner beats loser), which pairs of gold responses and of grades have none of.
OF_P_HAT = ("sppo", "sppo_single", "dno", "mmpo", "nash_md", "mpo")
# TRL's names of the losses that it has; its IPO is the one per token with target 1/(2 beta).
TRL_LOSSES = {"sppo_hard": "sppo_hard", "dpo": "sigmoid", "hinge": "hinge", "ipo": "ipo"}
# These of the section `pairs` say how rules are chained.
CHAINING = ("implicit", "replay_from")
# The section `policy`: where the model comes from, and how its chats are written.
MODEL_SOURCE, OF_CHATS = ("model", "revision"), ("chat_template_kwargs", "template_date")

# How a policy is run to answer, whatever it answers.
ENGINE_KEYS = ("engine", "tensor_parallel", "batch_size", "precision")

Config = dict[str, Any]


def schema() -> Config:
    """The JSON schema of the configuration."""
    return yaml.safe_load(SCHEMA_FILE.read_text(encoding="utf-8"))


def resolve(written: Config) -> dict[str, Config]:
    """Complete configurations by run name; the main run's name is "".

    Raises `UserError` naming the first wrong key. A key takes, in this order: the run's override, what the
    configuration says, the column of `settings`, the schema's default. So that an overlay can hand back what the file
    below it sets, null undoes it: a key is not set, a run is not there.
    """
    rules = schema()
    written = _typed(written, rules)
    _check_sizes(written, "config: ")
    if isinstance(written.get("runs"), dict):
        written["runs"] = {
            name: overrides for name, overrides in written["runs"].items() if overrides is not None
        }
    written = _set(written, rules)
    _check(written, rules, "")
    _check_name(written.get("name", ""), "name")
    if written.get("name", "") in written.get("runs", {}):
        raise UserError(
            f"config: name is {written['name']}, the name of a run, and both would write to results/{written['name']}/; choose another"
        )
    of_main = {key: value for key, value in written.items() if key != "runs"}
    main = _paths_written_out(of_main, rules, "")
    runs = {"": _complete(main, rules) | {"first_iteration_from": None}}
    if runs[""]["extrapolation"] is not None:
        raise UserError(
            "config: extrapolation carries main's policies on, so it belongs to a run, as runs: {expo: {extrapolation: 0.3}}"
        )
    for name, overrides in written.get("runs", {}).items():
        where = f"runs.{name}"
        _check_name(name, where)
        overrides = _typed(overrides, rules)
        _check_sizes(overrides, f"config: {where}.")
        first = overrides.pop("first_iteration_from", None)
        if first not in (None, "main"):
            raise UserError(
                f"config: {where}.first_iteration_from is {_shown(first)}; it can only be main"
            )
        for key in SHARED & overrides.keys():
            raise UserError(
                f"config: {where} cannot override {key}; set it for all runs, or write a preset with a name of its own"
            )
        _check(_set(overrides, rules), rules, where + ".")
        overrides = _paths_written_out(overrides, rules, where + ".")
        try:
            run = _complete(_set(_merged(main, overrides), rules), rules) | {
                "first_iteration_from": first
            }
        except (
            UserError
        ) as error:  # of keys that go together: the run's own, or main's, which it takes over
            raise of_run(error, name) from None
        if first:
            if own_split := _other_split(runs[""], run):
                raise UserError(
                    f"config: {where} shares the first iteration with main but sets {own_split} otherwise, so that its prompts "
                    "are divided otherwise; remove the override or first_iteration_from"
                )
            for section in FIRST_ITERATION:
                wanted, own = dict(runs[""][section]), dict(run[section])
                if section == "seeds":
                    wanted, own = {"data": wanted["data"]}, {"data": own["data"]}
                for key in wanted:
                    if wanted[key] != own[key]:
                        raise UserError(
                            f"config: {where} shares the first iteration with main but sets {section}.{key} "
                            "otherwise; remove the override or first_iteration_from"
                        )
        for key in (
            "engine",
            "tensor_parallel",
        ):  # a rule has one environment and one number of GPUs for all runs
            if run["responses"][key] != runs[""]["responses"][key]:
                raise UserError(
                    f"config: {where} cannot override responses.{key}; set it for all runs, or write a preset with a name of its own"
                )
        runs[name] = run
    return runs


def of_run(error: UserError, name: str) -> UserError:
    """The error with the run that it is about, which may be one that nobody asked for."""
    where, reason = f"runs.{name}", str(error).removeprefix("config: ")
    named = reason if reason.startswith(where) else f"{where}: {reason}"
    return UserError(
        f"config: {named}; or do without this run of the configuration: {{runs: {{{name}: null}}}}"
    )


def without_effect(written: Config, runs: dict[str, Config]) -> list[str]:
    """One line for each key that was written and has no effect, by the schema's `x-only-with`.

    written: what `resolve` took; runs: what it returned. A key is looked at only in the run in
    which it was written; of a key of main the line names the runs that take it over and use it.
    """
    rules, lines = schema(), []
    for name, run in runs.items():
        own = written["runs"][name] if name else written
        for key, needs in _conditional_keys(own, rules):
            reason = _unmet(needs, run)
            if not reason:
                continue
            lines.append(f"config: {f'runs.{name}.' if name else ''}{key} has no effect {reason}")
            if name:
                continue
            users = [
                other
                for other, overrides in written.get("runs", {}).items()
                if other in runs and not _is_set(overrides, key) and not _unmet(needs, runs[other])
            ]
            if users:
                lines[-1] += f"; runs that use it: {', '.join(users)}"
    return lines


def _conditional_keys(written: Config, rules: Config) -> list[tuple[str, Config]]:
    """Dotted name and needs of each written key that has `x-only-with`, or whose section has it."""
    found = []
    for section, keys in written.items():
        rule = rules["properties"].get(section, {})
        if not isinstance(keys, dict) or "properties" not in rule:
            continue
        for key, value in keys.items():
            needs = rule.get("x-only-with", {}) | rule["properties"][key].get("x-only-with", {})
            if needs and value is not None:
                found.append((f"{section}.{key}", needs))
    return found


def _is_set(written: Config, dotted: str) -> bool:
    section, key = dotted.split(".")
    return (written.get(section) or {}).get(key) is not None


def _unmet(needs: Config, run: Config) -> str:
    """Why a key has no effect in a run, by the first of its needs that is unmet; "" if none is."""
    for dotted, rule in needs.items():
        value: Any = run
        for name in dotted.split("."):
            value = value[name]
        if not _Validator(rule).is_valid(value):
            return f"where {dotted} is {'null' if value is None else value}"
    return ""


def _paths_written_out(written: Config, rules: Config, where: str) -> Config:
    """`written` with the home folder in place of ~ in every path, so that all see the same file.

    Raises `UserError` for the ~ of a user whom this machine does not know, and for braces, which
    Snakemake would take for a wildcard.
    """
    result: Config = {}
    for key, value in written.items():
        rule = rules["properties"][key]
        if isinstance(value, dict) and "properties" in rule:
            value = _paths_written_out(value, rule, f"{where}{key}.")
        if isinstance(value, str) and rule.get("x-path"):
            value = os.path.expanduser(value)
            if value.startswith("~"):
                raise UserError(
                    f"config: {where}{key} is {_shown(value)}, but this machine knows no such "
                    "user; write the path out"
                )
        if isinstance(value, str):
            fixed = value.replace("{t}", "") if rule.get("x-iteration") else value
            if "{" in fixed or "}" in fixed:
                raise UserError(
                    f"config: {where}{key} is {_shown(value)}, and Snakemake takes braces for a "
                    "wildcard; rename it without them"
                )
        result[key] = value
    return result


def _other_split(main: Config, run: Config) -> str | None:
    """The key, if any, by which the run divides the prompts otherwise than main."""
    if run["alpaca_eval"]["instructions"] != main["alpaca_eval"]["instructions"]:
        return "alpaca_eval.instructions"
    return (
        "iterations"
        if run["iterations"] != main["iterations"] and main["prompts"]["per_iteration"] is None
        else None
    )


def _complete(written: Config, rules: Config) -> Config:
    """Fill in settings and defaults, then check what one key alone cannot tell."""
    settings = written.get("settings", rules["properties"]["settings"]["default"])
    complete: Config = {}
    for key, rule in rules["properties"].items():
        if key == "runs":
            continue
        if rule["type"] == "object":
            section = written.get(key, {})
            complete[key] = {
                name: section.get(name, default_of(inner, settings))
                for name, inner in rule["properties"].items()
            }
        else:
            complete[key] = written.get(key, default_of(rule, settings))
    _check_together(complete)
    return complete


def default_of(rule: Config, settings: str) -> Any:
    """The value that a key takes when nobody sets it."""
    return rule["x-settings"][settings] if "x-settings" in rule else copy.deepcopy(rule["default"])


def _check_together(config: Config) -> None:
    train = config["train"]
    shards, prompts = config["responses"]["shards"], config["prompts"]["per_iteration"]
    if prompts is not None and shards > prompts:
        raise UserError(
            f"config: responses.shards is {shards}, but prompts.per_iteration is {prompts}, and "
            "each shard needs a prompt; lower responses.shards"
        )
    for section in ("alpaca_eval", "mt_bench", "grades"):
        if config[section]["judge_base_url"] is not None:
            check_address(config[section]["judge_base_url"], f"config: {section}.judge_base_url")
    try:
        datetime.date.fromisoformat(config["policy"]["template_date"])
    except ValueError:
        raise UserError(
            f"config: policy.template_date is {config['policy']['template_date']}, "
            "which is no day of the calendar; give one such as 2024-07-26"
        ) from None
    if config["responses"]["temperature"] == 0:
        raise UserError(
            "config: responses.temperature is 0, which gives K times the same response; set it above 0"
        )
    if (config["responses"]["tensor_parallel"] or 1) > 1 and config["responses"][
        "engine"
    ] != "vllm":
        raise UserError(
            f"config: responses.tensor_parallel is {config['responses']['tensor_parallel']}, but only the engine vllm divides a model; "
            "set responses.engine: vllm, or remove it"
        )
    if train["stop_epoch"] > train["schedule_total_epochs"]:
        raise UserError(
            f"config: train.stop_epoch ({train['stop_epoch']}) is after train.schedule_total_epochs "
            f"({train['schedule_total_epochs']}); lower the one or raise the other"
        )
    if train["backend"] == "trl" and (
        train["reference_every"] != 1
        or train["sft_weight"]
        or train["optimism"]
        or train["label_smoothing"]
    ):
        raise UserError(
            "config: TRL's trainer here refers to the previous iterate, adds no term and smooths no labels; set train.reference_every: 1, "
            "train.sft_weight, optimism and label_smoothing: 0, or use train.backend: transformers"
        )
    if (
        train["backend"] == "trl"
        and train["loss"] == "ipo"
        and not (train["per_token"] and train["ipo_target"] == 0.5)
    ):
        raise UserError(
            "config: TRL's IPO is per token with target 1/(2 beta); set train.per_token: true and train.ipo_target: 0.5"
        )
    least = min(train["beta"]) if isinstance(train["beta"], list) else train["beta"]
    if train["loss"] in ("inpo", "nash_md") and train["tau"] > least:
        raise UserError(
            f"config: train.tau ({train['tau']}) is above train.beta ({least}), which gives pi_t a negative weight; lower it"
        )
    if train["loss"] == "nash_md" and (
        config["pairs"]["construction"] != "all"
        or config["pairs"]["replay"]
        or config["pairs"]["margin"]
    ):
        raise UserError(
            "config: train.loss nash_md weighs all responses to a prompt against each other; set pairs.construction: all, pairs.replay: 0 and "
            "pairs.margin: 0"
        )
    if train["loss"] in ("inpo", "nash_md") and (
        train["tau"] == 0 or train["reference_every"] == 1
    ):
        raise UserError(
            f"config: train.loss {train['loss']} is held near a policy other than pi_t, which needs train.tau above 0 and train.reference_every: "
            "null (the base), or above 1"
        )
    if config["pairs"]["implicit"] and (train["reference_every"] != 1 or train["loss"] == "simpo"):
        raise UserError(
            "config: pairs.implicit compares by beta log(pi_t / pi_t-1), which training has made a reward only against the previous iterate; set "
            "train.reference_every: 1 and another train.loss than simpo"
        )
    for key in ("goals", "implicit"):
        if config["pairs"][key] and config["pairs"]["construction"] not in ("extremes", "all"):
            raise UserError(
                f"config: pairs.{key} is made of preferences, which pairs.construction {config['pairs']['construction']} does without; set "
                f"pairs.{key}: false, or pairs.construction: extremes or all"
            )
    if config["pairs"]["goals"] and train["loss"] not in (
        "dpo",
        "hinge",
        "ipo",
        "kto_pair",
        "simpo",
    ):
        raise UserError(
            f"config: pairs.goals turns pairs round, which train.loss {train['loss']} does not know; set train.loss: dpo, hinge, ipo, kto_pair or simpo"
        )
    if config["pairs"]["even_lengths"] and (
        config["pairs"]["construction"],
        config["preference"]["winner_by"],
    ) != ("extremes", "logit"):
        raise UserError(
            "config: pairs.even_lengths evens out the ends of the mean logit; set pairs.construction: extremes and preference.winner_by: logit"
        )
    if config["pairs"]["construction"] in ("gold", "graded") and train["loss"] in OF_P_HAT:
        raise UserError(
            f"config: train.loss {train['loss']} learns from P-hat, which pairs.construction {config['pairs']['construction']} does not give; set "
            "train.loss: dpo, or another pairs.construction"
        )
    if config["pairs"]["construction"] == "graded":
        if (
            config["grades"]["judge"] == "preference"
            and (backend := config["preference"]["backend"]) != "transformers"
        ):
            raise UserError(
                f"config: grades.judge preference does not go with preference.backend {backend}; set preference.backend: transformers, or "
                "grades.judge"
            )
    elif (config["pairs"]["construction"] == "gold") != (config["pairs"]["gold"] is not None):
        raise UserError(
            "config: pairs.construction gold and pairs.gold, a file of gold responses, go together; set both or neither (graded can have one)"
        )
    if train["backend"] == "trl" and train["loss_scale"] != "none":
        raise UserError(
            "config: TRL does not scale losses; use train.loss_scale: none or train.backend: transformers"
        )
    check_training(train)
    if train["parallel"] != "ddp" and config["device"] == "cpu":
        raise UserError(
            f"config: train.parallel {train['parallel']} needs GPUs, but device is cpu; set train.parallel: ddp"
        )


def check_training(train: Config) -> None:
    """This trainer has the loss, and it can be trained by so many processes, else UserError."""
    if train["backend"] == "trl" and train["loss"] not in TRL_LOSSES:
        raise UserError(
            f"config: TRL has no loss {train['loss']}; use train.loss: sppo_hard or train.backend: transformers"
        )
    micro_batches(train)
    if train["loss"] == "kto_pair" and (
        train["micro_batch_size"] < train["batch_size"] or train["processes"] > 1
    ):
        raise UserError(
            "config: train.loss kto_pair takes means over a step; set train.micro_batch_size to train.batch_size and train.processes: 1"
        )
    if train["processes"] % train["machines"]:
        raise UserError(
            f"config: train.processes ({train['processes']}) is not a multiple of train.machines ({train['machines']}); change one of them"
        )
    if train["backend"] == "trl" and train["processes"] > 1:
        raise UserError(
            "config: TRL's trainer is here to compare with, on one device; set train.processes: 1, or use train.backend: transformers"
        )
    if train["parallel"] == "ddp":
        return
    if train["processes"] == 1:
        raise UserError(
            f"config: train.parallel {train['parallel']} divides a policy over processes, but train.processes is 1; raise it, or set "
            "train.parallel: ddp"
        )
    if train["lora_rank"]:
        raise UserError(
            f"config: train.parallel {train['parallel']} does not go with train.lora_rank, which trains few weights; set train.parallel: ddp"
        )


def micro_batches(train: Config) -> tuple[int, int]:
    """Pairs in a micro-batch of one process, and its micro-batches in a step: over all processes they make batch_size, else UserError."""
    share, left = divmod(train["batch_size"], train["processes"])
    micro = min(train["micro_batch_size"], share)
    if left or share % micro:
        times = f" x train.processes ({train['processes']})" if train["processes"] > 1 else ""
        raise UserError(
            f"config: train.batch_size ({train['batch_size']}) is not a multiple of train.micro_batch_size "
            f"({train['micro_batch_size']}){times}; change one of them"
        )
    return micro, share // micro


def _check_name(name: str, where: str) -> None:
    """A folder's name must not be one that the workflow uses itself."""
    if name in RESERVED or name.startswith("iter"):
        raise UserError(f"config: {where} is the reserved name {name}; choose another")


def _typed(written: Config, rules: Config) -> Config:
    """`written` with text turned into the number or boolean that the schema wants, where it spells one.

    `snakemake --config section={key: 1}` hands over text alone, and YAML takes 1e-6 for text.
    """
    result: Config = {}
    free = rules.get("additionalProperties") is True  # any key, of which no type is known
    for key, value in written.items():
        if not isinstance(key, str):
            raise UserError(f"config: key {_shown(key)} is not text; put it in quotes or remove it")
        rule = rules.get("properties", {}).get(key, {})
        if isinstance(value, dict):
            result[key] = _typed(value, rule)
        elif isinstance(value, datetime.date) and rule:
            result[key] = value.isoformat()  # YAML reads a date without quotes as one
        elif isinstance(value, str) and (free or rule and "string" not in rule["type"]):
            result[key] = _spelled(value)
        elif isinstance(value, list) and "array" in rule.get("type", ()):
            result[key] = [_spelled(item) if isinstance(item, str) else item for item in value]
        else:
            result[key] = value
    return result


def _check_sizes(value: Any, where: str) -> None:
    """No whole number in `value` needs more than 64 bits, else UserError: no program computes
    with it, and Python writes out none of thousands of digits."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise UserError(
            f"{where[:200].rstrip('.')} is {_shown(value)}, a number of more than "
            "64 bits; correct it"
        )
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_sizes(inner, f"{where}{key}.")
    elif isinstance(value, list):
        for inner in value:
            _check_sizes(inner, where)


def _set(written: Config, rules: Config) -> Config:
    """What is set in `written`: without the keys that are null, but for those of which null is a value."""
    result: Config = {}
    for key, value in written.items():
        rule = rules.get("properties", {}).get(key, {"type": "null"})
        if (
            value is not None
            or "null" in rule["type"]
            or (rule["type"] == "object" and rule.get("additionalProperties") is not True)
        ):
            result[key] = _set(value, rule) if isinstance(value, dict) else value
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


def _merged(base: Config, overrides: Config) -> Config:
    """A copy of `base` with nested overrides."""
    result = copy.deepcopy(base)
    for key, value in overrides.items():
        result[key] = _merged(result.get(key, {}), value) if isinstance(value, dict) else value
    return result


# Stricter than JSON: 5.0 is no count, and neither NaN nor infinity is a number to compute with.
_TYPES = jsonschema.Draft202012Validator.TYPE_CHECKER.redefine_many(
    {
        "integer": lambda _, value: isinstance(value, int) and not isinstance(value, bool),
        "number": lambda _, value: (
            isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        ),
    }
)
_Validator = jsonschema.validators.extend(jsonschema.Draft202012Validator, type_checker=_TYPES)


def _check(written: Config, rules: Config, where: str) -> None:
    errors = sorted(
        _Validator(rules).iter_errors(written), key=lambda e: list(map(str, e.absolute_path))
    )
    if errors:
        raise UserError("config: " + _explain(errors[0], rules, where))


def _explain(error: jsonschema.ValidationError, rules: Config, where: str) -> str:
    """One line for one schema error."""
    path = where + ".".join(map(str, error.absolute_path))
    value = error.instance
    if error.validator == "additionalProperties":
        known = list(error.schema["properties"])
        unknown = next(key for key in value if key not in known)
        at = f"{path}.{unknown}" if error.absolute_path else where + unknown
        near = difflib.get_close_matches(unknown, known, 1)
        at = at if len(at) <= 200 else f"{at[:197]}..."
        return f"unknown key {at}; " + (
            f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
        )
    if path.endswith("responses.samples") and isinstance(value, int):
        return f"{path} is K, and K = {value} leaves nothing to compare; set it to 2 or more"
    if "propertyNames" in error.absolute_schema_path:
        path = f"the name of a run in {path}"
    if error.validator == "type":
        wanted = (
            error.validator_value
            if isinstance(error.validator_value, str)
            else " or ".join(error.validator_value)
        )
        return f"{path} is {_shown(value)}, not {wanted}; see config/schema.yaml"
    if error.validator == "enum":
        choices = ", ".join("null" if one is None else str(one) for one in error.validator_value)
        return f"{path} is {_shown(value)}; it can be {choices}"
    if error.validator in ("pattern", "maxLength") and "description" in error.schema:
        form = error.schema["description"]
        return f"{path} is {_shown(value)}, which is not of the form that it must have: {form}"
    limits = {"minimum": "at least", "exclusiveMinimum": "greater than", "maximum": "at most"}
    if error.validator in limits:
        return f"{path} is {_shown(value)}; it must be {limits[error.validator]} {error.validator_value}"
    return f"{path or 'the configuration'}: {error.message}; see config/schema.yaml"


def _shown(value: Any) -> str:
    """A value as an error line shows it: quoted if it is text, and cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # of thousands of digits, which Python does not write out
        return "a number of thousands of digits"
    return text if len(text) <= 100 else f"{text[:97]}..."


def add_section(
    parser: argparse.ArgumentParser,
    section: str,
    skip: tuple[str, ...] = (),
    only: tuple[str, ...] | None = None,
) -> None:
    """Give a program one flag for each key of a section, or for `only` these.

    `max_new_tokens` is `--max-new-tokens`. A flag that is not given has the value of
    `settings: paper`. One of type object takes JSON.
    """
    for key, rule in schema()["properties"][section]["properties"].items():
        if key in skip or (only is not None and key not in only):
            continue
        types = (
            [rule["type"]]
            if isinstance(rule["type"], str)
            else [t for t in rule["type"] if t != "null"]
        )
        kinds: dict[str, Callable[[str], Any]] = {
            "integer": int,
            "number": float,
            "boolean": _boolean,
            "string": str,
            "object": _object,
        }
        choices = [value for value in rule["enum"] if value is not None] if "enum" in rule else None
        parser.add_argument(
            f"--{key.replace('_', '-')}",
            type=kinds[types[0]],
            choices=choices,
            default=default_of(rule, "paper"),
            help=rule["description"].replace("%", "%%") + " (default: %(default)s)",
        )


def add_engine(parser: argparse.ArgumentParser) -> None:
    """The flags of how a policy is run to answer: ENGINE_KEYS, seed, device, writing of chats."""
    others = schema()["properties"]["responses"]["properties"].keys() - set(ENGINE_KEYS)
    add_section(parser, "responses", skip=tuple(others))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["auto", "cpu", "gpu"], default="auto")
    add_section(parser, "policy", skip=MODEL_SOURCE)


def at_least(least: int) -> Callable[[str], int]:
    """A flag's type: a whole number that is not smaller."""

    def count(text: str) -> int:
        if not text.lstrip("-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of {least} or more")
        return int(text)

    return count


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def _object(text: str) -> Config:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def of_iteration(section: Config, t: int) -> Config:
    """The section as iteration t (1, 2, ...) has it: of lists their t-th value, the last one for all after."""
    return {
        key: value[min(t, len(value)) - 1] if isinstance(value, list) else value
        for key, value in section.items()
    }


def flags(section: Config, skip: tuple[str, ...] = ()) -> list[str]:
    """The flags that hand a resolved section to a program; keys that are null are left out."""
    words = []
    for key, value in section.items():
        if key not in skip and value is not None:
            flag = f"--{key.replace('_', '-')}"
            text = json.dumps(value) if isinstance(value, (bool, dict)) else str(value)
            # In one word where the value would be taken for a flag itself.
            words += [f"{flag}={text}"] if text.startswith("-") else [flag, text]
    return words
