"""Random configurations: each is accepted or refused with one line, in seconds.

The keys are drawn from config/schema.yaml. FUZZ=5 runs five seeds instead of one.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from snakemake.common.configfile import load_configfile

from sppo.core.config import schema
from sppo.core.config_files import all_files, check_files, files_hint
from sppo.core.errors import UserError, explained, on_one_line
from sppo.workflow.configuration import read_configuration, resolve, without_effect
from sppo.workflow.preflight import check_inputs

FUZZ = int(os.environ.get("FUZZ", "1"))
IN_PROCESS, THROUGH_SNAKEMAKE = 600, 15
SECONDS, LONGEST_LINE = 20, 600
RULES = schema()["properties"]
LEAVES = [(section, key) for section, rule in RULES.items() for key in rule.get("properties", {})]
EXTENDED = ["config/config.yaml", "config/methods.yaml", "config/presets/laptop.yaml"]
TOP = [key for key, rule in RULES.items() if rule["type"] != "object"]

TEXTS = [
    "",
    " ",
    "\n",
    "a\nb",
    "\t",
    "\x00",
    "\x07\x1b[31m",
    "\x7f\x85",
    "\u2028",
    "\ufeff",
    "\ud800",
    "a\udfffb",
    "{",
    "}",
    "{x}",
    "{t}",
    "{{t}}",
    "~",
    "~/x",
    "~nouser/x",
    "-x",
    "--x=1",
    "x" * 5000,
    "x/" * 2500,
    "é",
    "名/前",
    "🙂",
    "a b",
    "'",
    '"',
    "$(true)",
    "`true`",
    ";true",
    "%s",
    "../..",
    "/",
    ".",
    "..",
    "/dev/null",
    "/proc/self/mem",
    "data",
    "Snakefile",
    "data/prompts.jsonl",
    "data/evaluation.json",
    "fifo",
    "loop",
    "hub/name",
    "hub/name/more",
    "https://x.y/z",
    "http://[::1",
    "http://a b/v1",
    "http://u:p@h/v1",
    "http://h:99999/v1",
    "main",
    "null",
    "none",
    "true",
    "1",
    "1.0",
    "1e400",
    "nan",
    "-inf",
    "0x10",
    "1_000",
    "١٢",
    "9" * 5000,
    "iter1",
    "official",
    "openai",
    "judge",
    "ranker",
    "embedded",
    "2024-02-30",
    "2024-07-26\n",
]
NUMBERS = [
    0,
    -1,
    1,
    2,
    3,
    7,
    64,
    255,
    257,
    -0.0,
    0.5,
    1.0,
    1e-320,
    1e-9,
    1.7e308,
    float("nan"),
    float("inf"),
    -float("inf"),
    10**9,
    2**31,
    2**63,
    2**64,
    10**30,
    10**400,
    -(10**400),
    16**5000,
]
CONTAINERS: list[Any] = [
    [],
    {},
    [None],
    [[]],
    [1, "a"],
    [0.1, -1],
    [1e-6, "5e-7"],
    ["nan"],
    {"a": {"b": []}},
    {"x": 1},
    {"": ""},
    [{}] * 3,
    [1] * 2000,
    {"enable_thinking": False},
    {"tools": []},
    {1: 2},
    [float("nan")],
]
OTHERS: list[Any] = [
    None,
    True,
    False,
    *(
        yaml.safe_load(text)
        for text in ("2024-07-26", "2024-07-26 10:00:00", "!!binary aGk=", "!!set {a}")
    ),
]
SNIPPETS = [
    "train:\n",
    "train: {}\ntrain: {}\n",
    "- a\n- b\n",
    "a\n",
    "",
    "---\n",
    "a: 1\n---\nb: 2\n",
    "train: &a\n  beta: *a\n",
    "train: *nowhere\n",
    "train: [\n",
    "\t",
    "%YAML 9.9\n---\n{}\n",
    "train: !!python/object:os.system {}\n",
    "? [1, 2]\n: 3\n",
    "? {a: 1}\n: 3\n",
    "<<: {iterations: 1}\n",
    "<<: 1\n",
    "train: {<<: [1]}\n",
    "yes: 1\n",
    "1: 1\n",
    "null: 1\n",
    "~: 1\n",
    "{",
    '{"train": {"beta": NaN}}',
    '{"a": 1, "a": 2}',
    "iterations: 0o17\n",
    "iterations: 1:30\n",
    "iterations: " + "9" * 5000 + "\n",
    "iterations: 0x" + "f" * 5000 + "\n",
    "name: 2024-13-45\n",
    "seeds: {data: !!int x}\n",
    "train: {beta: !!float x}\n",
    "name: !!timestamp x\n",
    "[" * 3000 + "]" * 3000,
    "name: \x07\n",
    "runs: [a]\n",
    "runs: {a: 1}\n",
    "runs: {a: null}\n",
    "runs: {a: {}}\n",
    "runs: {a: {runs: {}}}\n",
    "runs: {main: {}}\n",
    "runs: {a: {train: null}}\n",
    "runs: {a: {first_iteration_from: [1]}}\n",
    "__use_yte__: {}\n",
    "train: {beta: 1}\n" * 2,
    "name: x\nruns: {x: {}}\n",
]


@pytest.fixture(scope="module")
def copy(tmp_path_factory, copy_repository) -> Path:
    """A copy of the repository with a pipe and with a link to itself."""
    folder = copy_repository(tmp_path_factory.mktemp("fuzz") / "sppo")
    os.mkfifo(folder / "fifo")
    (folder / "loop").symlink_to("loop")
    return folder


def likely(draw: random.Random, rule: dict[str, Any]) -> Any:
    """A value that the schema accepts, or that is nearly valid."""
    if "enum" in rule:
        return draw.choice(rule["enum"])
    kinds = [rule["type"]] if isinstance(rule["type"], str) else rule["type"]
    kind = draw.choice(kinds)
    least = rule.get("minimum", rule.get("exclusiveMinimum", 0))
    most = rule.get("maximum", 1e3)
    if kind == "integer":
        return draw.randint(int(least), int(min(most, least + draw.choice([1, 8, 100]))))
    if kind == "number":
        return draw.choice(
            [least, most, draw.uniform(least, most), draw.randint(int(least), int(most))]
        )
    if kind == "boolean":
        return draw.random() < 0.5
    if kind == "object":
        return draw.choice(CONTAINERS)
    if kind == "array":
        return [draw.choice([1e-6, 0.1, 1]) for _ in range(draw.randint(0, 4))]
    if kind == "string":
        return draw.choice([rule.get("default", "x"), *TEXTS])
    assert kind == "null"
    return None


def random_text(draw: random.Random) -> str:
    """1 to 12 characters, of ASCII and of all of Unicode."""
    text = ""
    for _ in range(draw.randint(1, 12)):
        text += chr(draw.choice([draw.randrange(128), draw.randrange(0x110000)]))
    return text


def odd(draw: random.Random) -> Any:
    """Any value, mostly invalid."""
    values = draw.choice([TEXTS, NUMBERS, CONTAINERS, OTHERS, None])
    return random_text(draw) if values is None else draw.choice(values)


def keys(draw: random.Random) -> dict[str, Any]:
    """One to four keys of the schema. Some are misspelt, and some sections have a wrong type."""
    found: dict[str, Any] = {}
    for _ in range(draw.randint(1, 4)):
        if draw.random() < 0.15:
            key = draw.choice(TOP)
            found[key] = likely(draw, RULES[key]) if draw.random() < 0.5 else odd(draw)
        elif draw.random() < 0.06:
            value = odd(draw)
            section = draw.choice(list(RULES))
            unknown = draw.choice(TEXTS) if draw.random() < 0.5 else "iteratoins"
            found[draw.choice([section, unknown])] = value
        else:
            section, key = draw.choice(LEAVES)
            rule = RULES[section]["properties"][key]
            if draw.random() < 0.05:
                key += draw.choice(["x", " ", "\n", "_"])
            if isinstance(found.setdefault(section, {}), dict):
                found[section][key] = likely(draw, rule) if draw.random() < 0.55 else odd(draw)
    return found


def overlay(draw: random.Random) -> bytes:
    """The bytes of a random configuration file."""
    if draw.random() < 0.06:
        return bytes(draw.randrange(256) for _ in range(draw.randint(1, 40)))
    if draw.random() < 0.12:
        return draw.choice(SNIPPETS).encode()
    content = keys(draw)
    if draw.random() < 0.3:
        runs = {}
        for _ in range(draw.randint(1, 2)):
            name = draw.choice(["a", "dpo", "k2", "expo", "spin", draw.choice(TEXTS)])
            runs[name] = keys(draw) if draw.random() < 0.9 else odd(draw)
        for run in runs.values():
            if isinstance(run, dict) and draw.random() < 0.3:
                run["first_iteration_from"] = draw.choice(["main", "main", odd(draw)])
        content["runs"] = runs
    if draw.random() < 0.5:
        content["extends"] = draw.choice(EXTENDED)
    with limits_off():
        text = yaml.safe_dump(content, allow_unicode=False, sort_keys=False)
    lines = text.splitlines(keepends=True)
    if draw.random() < 0.05 and lines:
        lines += draw.choice(lines)
    content_bytes = "".join(lines).encode()
    if draw.random() < 0.05:
        at = draw.randrange(len(content_bytes))
        content_bytes = content_bytes[:at] + bytes([draw.randrange(256)]) + content_bytes[at + 1 :]
    return content_bytes


@contextlib.contextmanager
def limits_off() -> Iterator[None]:
    """Allow integers of more than 4,300 digits, which Python refuses to write by default."""
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        yield
    finally:
        sys.set_int_max_str_digits(before)


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raise AssertionError if the block takes longer, also if it waits for a file."""

    def late(*_: object) -> None:
        raise AssertionError(f"longer than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refusal(file: Path) -> str | None:
    """The line with which rules/common.smk refuses a file; None if it accepts the file.

    Every run is requested.
    """
    try:
        check_files([file])
        written = read_configuration([file], load_configfile(file))
    except Exception as error:
        if explained(error) is None:
            raise
        return on_one_line(explained(error))
    try:
        runs = resolve(written)
    except UserError as error:
        return on_one_line(str(error) + files_hint(all_files([file])))
    for name in runs:
        try:
            check_inputs(name, runs[name])
        except Exception as error:
            if explained(error) is None:
                raise
            return on_one_line(explained(error))
        for line in without_effect(written, name, runs):
            check_line(on_one_line(line), file)
    return None


def shortened(content: bytes) -> bytes:
    """The content without long numbers and repetitions, in at most 1,500 bytes."""
    content = re.sub(rb"\d{90,}", b"and so on", content)
    content = re.sub(rb"(.{1,3}?)\1{30,}", rb"\1 and so on", content)
    return content[:1500]


def check_line(line: str, file: Path) -> None:
    """Check that a line is printable, is not too long, and names a key or a file."""
    assert line.isprintable(), (len(line), line)
    assert len(line) < LONGEST_LINE, (len(line), line)
    line.encode()
    names = {file.name, "runs", "key", *RULES, *(f"{section}.{key}" for section, key in LEAVES)}
    if not any(name in line for name in names):
        assert any(Path(word.rstrip(",;")).exists() for word in line.split()), line


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(FUZZ))
def test_random_overlay_is_accepted_or_a_one_line_error(seed, copy, monkeypatch, tmp_path):
    monkeypatch.chdir(copy)
    draw = random.Random(seed)
    accepted, faults = 0, []
    for number in range(IN_PROCESS):
        file = tmp_path / f"{number}.yaml"
        file.write_bytes(overlay(draw))
        try:
            with at_most(SECONDS):
                line = refusal(file)
            if line is None:
                accepted += 1
            else:
                check_line(line, file)
        except Exception as error:
            faults.append(
                f"{shortened(file.read_bytes())!r}\n    {type(error).__name__}: {str(error)[:500]}"
            )
    assert not faults, f"{len(faults)} of {IN_PROCESS}:\n" + "\n".join(faults[:40])
    assert IN_PROCESS / 50 < accepted < IN_PROCESS * 0.9


def is_loaded(file: Path) -> bool:
    """Whether Snakemake can read the file.

    It reads --configfile before the Snakefile. If that fails, the error line is not ours.
    """
    try:
        load_configfile(file)
    except Exception:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(FUZZ))
def test_snakemake_plans_a_random_overlay_or_prints_one_line(seed, copy, monkeypatch):
    monkeypatch.chdir(copy)
    draw = random.Random(f"snakemake {seed}")
    for number in range(THROUGH_SNAKEMAKE):
        file = copy / f"overlay{number}.yaml"
        file.write_bytes(overlay(draw))
        while not is_loaded(file):
            file.write_bytes(overlay(draw))
        began = time.monotonic()
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "snakemake",
                "--cores",
                "2",
                "-n",
                "--quiet",
                "--configfile",
                file.name,
            ],
            cwd=copy,
            capture_output=True,
            text=True,
            errors="backslashreplace",
            timeout=6 * SECONDS,
        )
        said = done.stdout + done.stderr
        shown = f"{shortened(file.read_bytes())!r}\n{said[-3000:]}"
        # Other processes may use the same cores, so this limit is generous.
        assert time.monotonic() - began < 3 * SECONDS, shown
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in said, shown
        assert len(errors) == (done.returncode != 0), shown
        for line in errors:
            check_line(line, file)
