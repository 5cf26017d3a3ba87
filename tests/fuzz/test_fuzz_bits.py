"""Single flipped bits and truncations in the files of a finished run: whoever reads one refuses it in one line.

A program that ends well has made what it made of the undamaged files. FUZZ=5 runs five seeds in
place of one.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.fuzz.tiny_run import half_written

import verify_results
from sppo.core.artifacts import file_hash
from sppo.core.errors import explained, on_one_line

FUZZ = int(os.environ.get("FUZZ", "1"))
ARTIFACTS, RECORDS, DATA = 50, 20, 10
WRITES = ("--output", "--log", "--annotations")
DATA_FILES = (
    "data/prompts.jsonl",
    "data/evaluation.json",
    "data/ranker/ranker.json",
    "data/ranker/adapter.safetensors",
    "data/judge/ranker.json",
)
pytestmark = pytest.mark.slow


@dataclass
class Command:
    """A call of a program of the workflow: its module, its words, the artifacts that it reads and writes."""

    module: Any
    words: list[str]
    reads: list[Path]
    writes: list[Path]


def commands_of(printed: str) -> list[Command]:
    """The commands that Snakemake printed."""
    found = []
    for line in sorted(set(re.findall(r"(src/[\w/]+\.py .*?) 2>&1 \| tee", printed))):
        program, *words = shlex.split(line)
        writes = [Path(word) for flag, word in zip(words, words[1:]) if flag in WRITES]
        reads = [Path(word) for word in words if Path(word).exists() and Path(word) not in writes]
        found.append(Command(importlib.import_module(Path(program).stem), words, reads, writes))
    return found


@pytest.fixture(scope="module")
def run(finished):
    """The finished run's folder and its commands, with a copy of what it made; ends as it began."""
    copy, printed = finished
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(copy)
        commands = commands_of(printed)
        assert {
            "sample_prompts",
            "generate_responses",
            "annotate_preferences",
            "build_pairs",
            "score_reference",
            "train_policy",
            "answer_instructions",
            "evaluate_alpaca_eval",
        } <= {command.module.__name__ for command in commands}
        for name in ("results/tiny", "data"):
            shutil.copytree(name, f"kept/{name}", symlinks=True)
        yield copy, commands
        restore()


def restore() -> None:
    for name in ("results/tiny", "data"):
        shutil.rmtree(name)
        shutil.copytree(f"kept/{name}", name, symlinks=True)


def damage(draw: random.Random, file: Path) -> str:
    """Flip a bit or cut the file off; a link becomes a damaged file."""
    content = bytearray(file.read_bytes())
    file.unlink()
    if draw.random() < 0.7:
        place, bit = draw.randrange(len(content)), draw.randrange(8)
        content[place] ^= 1 << bit
        how = f"bit {bit} of byte {place}"
    else:
        del content[draw.randrange(len(content)) :]
        how = f"cut to {len(content)}"
    file.write_bytes(content)
    return f"{file}: {how}"


def plain(artifact: Path) -> Any:
    """An artifact's hash, or its content without times and versions of itself."""
    if artifact.name == "train_log.jsonl":
        return [
            {key: value for key, value in json.loads(line).items() if key != "tokens_per_second"}
            for line in artifact.read_text().splitlines()
        ]
    return file_hash(artifact)


def outcome(command: Command, program) -> str | None:
    """Run a program as Snakemake would, which deletes its outputs first; its line, None if it ended well."""
    for path in command.writes:
        for each in (path, Path(f"{path}.record.json")):
            shutil.rmtree(each) if each.is_dir() and not each.is_symlink() else each.unlink(
                missing_ok=True
            )
    try:
        program(command.module, *command.words)
    except Exception as error:
        line = explained(error)
        if line is None:
            raise
        return on_one_line(line)
    return None


def files_of(path: Path) -> list[Path]:
    return (
        sorted(
            file
            for file in path.rglob("*")
            if file.is_file() and file.name != ".snakemake_timestamp"
        )
        if path.is_dir()
        else [path]
    )


def check(command: Command, what: str, program, same: bool) -> None:
    try:
        line = outcome(command, program)
    except BaseException as error:
        raise AssertionError(f"{command.module.__name__} with {what}") from error
    said = f"{command.module.__name__} with {what}: {line}"
    if line is not None:
        assert len(line) < 1000 and any(
            Path(word.strip(",;:()'")).exists() for word in line.split()
        ), said
        assert not [path for path in command.writes if Path(f"{path}.record.json").exists()], said
    elif same:
        for path in command.writes:
            assert plain(path) == plain("kept" / path), f"{said}: another {path}"
    assert not [path for path in half_written(Path.cwd()) if path.name != ".policy.work"], said


@pytest.mark.parametrize("seed", range(FUZZ))
def test_damaged_artifact_is_refused_or_does_not_matter(seed, run, program, capsys):
    _, commands = run
    draw = random.Random(seed)
    for _ in range(ARTIFACTS):
        command = draw.choice(commands)
        own = [path for path in command.reads if path.is_relative_to("results/tiny")]
        if not own:
            continue
        artifact = draw.choice(own)
        what = damage(draw, draw.choice(files_of(artifact)))
        verify_results.hash_of.cache_clear()
        with pytest.raises(SystemExit):
            program(verify_results, "results/tiny")
        assert f"{artifact}: " in capsys.readouterr().out, what
        check(command, what, program, same=True)
        restore()


@pytest.mark.parametrize("seed", range(FUZZ))
def test_damaged_record_is_refused_or_does_not_matter(seed, run, program):
    _, commands = run
    draw = random.Random(f"records {seed}")
    readers = [
        (command, record)
        for command in commands
        for path in command.reads
        if (record := Path(f"{path}.record.json")).is_file()
    ]
    for _ in range(RECORDS):
        command, record = draw.choice(readers)
        what = damage(draw, record)
        check(command, what, program, same=True)
        restore()


@pytest.mark.parametrize("seed", range(FUZZ))
def test_damaged_data_of_the_user_s_own_has_one_line_or_is_taken(seed, run, program):
    """Nothing says what they were: no record describes them."""
    _, commands = run
    draw = random.Random(f"data {seed}")
    for _ in range(DATA):
        name = draw.choice(DATA_FILES)
        readers = [
            command
            for command in commands
            if {Path(name), Path(name).parent} & set(command.reads)
            or Path(name).parent.name in command.words
        ]
        assert readers, name
        what = damage(draw, Path(name))
        check(draw.choice(readers), what, program, same=False)
        restore()


def test_undamaged_files_give_what_they_gave(run, program):
    """In this process as in the workflow's, so that the tests above compare what can be compared."""
    _, commands = run
    for command in commands:
        if any(path.is_relative_to("results/tiny") for path in command.writes):
            check(command, "nothing", program, same=True)
            restore()
