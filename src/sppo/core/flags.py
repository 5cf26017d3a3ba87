"""Command-line flags of the programs: one for each key of the configuration, by its schema."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from typing import Any

from sppo.core.config import DEVICES, ENGINE_KEYS, MODEL_SOURCE, Config, default_of, schema


def add_section(
    parser: argparse.ArgumentParser,
    section: str,
    skip: tuple[str, ...] = (),
    only: tuple[str, ...] | None = None,
    prefix: str = "",
) -> None:
    """Give a program one flag for each key of a section, or for `only` these.

    `max_new_tokens` is `--max-new-tokens`. A flag that is not given has the value of
    `settings: paper`. A flag of type object takes JSON, one of type array several words.
    """
    kinds: dict[str, Callable[[str], Any]] = {
        "integer": int,
        "number": float,
        "boolean": boolean,
        "string": str,
        "object": json_object,
    }
    for key, rule in schema()["properties"][section]["properties"].items():
        if key in skip or (only is not None and key not in only):
            continue
        is_list = rule["type"] == "array"
        item = rule["items"] if is_list else rule
        types = [item["type"]] if isinstance(item["type"], str) else item["type"]
        first = next(name for name in types if name != "null")
        choices = [value for value in rule["enum"] if value is not None] if "enum" in rule else None
        parser.add_argument(
            _flag(prefix + key),
            type=kinds[first],
            nargs="+" if is_list else None,
            choices=choices,
            default=default_of(rule, "paper"),
            help=rule["description"].replace("%", "%%") + " (default: %(default)s)",
        )


def add_engine(parser: argparse.ArgumentParser) -> None:
    """The flags of a program that generates: ENGINE_KEYS, seed, device, keys of chats."""
    others = schema()["properties"]["responses"]["properties"].keys() - set(ENGINE_KEYS)
    add_section(parser, "responses", skip=tuple(others))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=DEVICES, default="auto")
    add_section(parser, "policy", skip=MODEL_SOURCE)


def at_least(least: int) -> Callable[[str], int]:
    """The type of a flag that takes whole numbers of `least` or more."""

    def count(text: str) -> int:
        if not text.lstrip("-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of {least} or more")
        return int(text)

    return count


def positive(text: str) -> float:
    """The type of a flag that takes numbers above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def json_object(text: str) -> Config:
    """The type of a flag that takes a JSON object."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def of_iteration(train: Config, t: int) -> Config:
    """The section `train` in iteration t (1, 2, ...).

    Where a key can be one value or a list with one for each iteration, this is the t-th value, or
    the last one if the list is shorter.
    """
    rules = schema()["properties"]["train"]["properties"]
    return {
        key: value[min(t, len(value)) - 1]
        if isinstance(value, list) and rules[key]["type"] != "array"
        else value
        for key, value in train.items()
    }


def flags(section: Config, skip: tuple[str, ...] = (), prefix: str = "") -> list[str]:
    """The flags that hand a resolved section to a program. Keys that are null are left out.

    A list is the words of one flag.
    """
    words = []
    for key, value in section.items():
        if key in skip or value is None:
            continue
        flag = _flag(prefix + key)
        if isinstance(value, list):
            words += [flag, *map(str, value)]
            continue
        text = json.dumps(value) if isinstance(value, (bool, dict)) else str(value)
        # A value that begins with a dash would be read as another flag, unless it is in one word.
        words += [f"{flag}={text}"] if text.startswith("-") else [flag, text]
    return words


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"
