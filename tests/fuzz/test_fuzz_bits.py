"""Single flipped bits and truncations in the files of a finished run.

A program that reads a damaged file must refuse it with one error line, or make the same artifact as
from the undamaged file. FUZZ=5 runs five seeds instead of one.
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
from sppo.core.artifacts import TIMESTAMP, file_hash, record_path, remove
from sppo.core.errors import explained, on_one_line

FUZZ = int(os.environ.get("FUZZ", "1"))
# The number of damaged files of each kind per seed.
ARTIFACTS = 50
RECORDS = 20
DATA = 10
# The flags of the programs that name outputs.
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
    """A call of a program: its module, its arguments, the artifacts that it reads and writes."""

    module: Any
    words: list[str]
    reads: list[Path]
    writes: list[Path]


def commands_of(printed: str) -> list[Command]:
    """The commands in Snakemake's output."""
    commands = []
    for line in sorted(set(re.findall(r"(src/[\w/]+\.py .*?) 2>&1 \| tee", printed))):
        program, *words = shlex.split(line)
        module = importlib.import_module(Path(program).stem)
        writes = [Path(word) for flag, word in zip(words, words[1:]) if flag in WRITES]
        reads = [Path(word) for word in words if Path(word).exists() and Path(word) not in writes]
        commands.append(Command(module, words, reads, writes))
    return commands


@pytest.fixture(scope="module")
def run(finished):
    """The finished run's folder and its commands.

    `kept/` is a copy of the files, from which they are restored at the end.
    """
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
    """Undo all changes to the run's files."""
    for name in ("results/tiny", "data"):
        shutil.rmtree(name)
        shutil.copytree(f"kept/{name}", name, symlinks=True)


def damage(draw: random.Random, file: Path) -> str:
    """Flip a bit of a file or truncate it, and return what was done.

    A link is replaced by a damaged file.
    """
    content = bytearray(file.read_bytes())
    file.unlink()
    if draw.random() < 0.7:
        place, bit = draw.randrange(len(content)), draw.randrange(8)
        content[place] ^= 1 << bit
        how = f"bit {bit} of byte {place} flipped"
    else:
        del content[draw.randrange(len(content)) :]
        how = f"truncated to {len(content)} bytes"
    file.write_bytes(content)
    return f"{file}: {how}"


def comparable(artifact: Path) -> Any:
    """What must be equal if an artifact is made again: its hash, or a log without its speeds."""
    if artifact.name != "train_log.jsonl":
        return file_hash(artifact)
    lines = [json.loads(line) for line in artifact.read_text().splitlines()]
    for line in lines:
        line.pop("tokens_per_second", None)
    return lines


def outcome(command: Command, program) -> str | None:
    """Run a program and return its error line, None if it succeeded.

    Its outputs are deleted first, as Snakemake does.
    """
    for path in command.writes:
        remove(path)
        remove(record_path(path))
    try:
        program(command.module, *command.words)
    except Exception as error:
        line = explained(error)
        if line is None:
            raise
        return on_one_line(line)
    return None


def files_of(path: Path) -> list[Path]:
    """The files of an artifact, without Snakemake's time stamp."""
    if not path.is_dir():
        return [path]
    files = [file for file in path.rglob("*") if file.is_file()]
    return sorted(file for file in files if file.name != TIMESTAMP)


def check(command: Command, what: str, program, same: bool) -> None:
    """Run a command on damaged files and check its outcome.

    An error line must be short and name an existing file, and no record may be written. If `same`,
    a command that succeeds must make its artifacts as before. `what` is the damage.
    """
    try:
        line = outcome(command, program)
    except BaseException as error:
        raise AssertionError(f"{command.module.__name__} with {what}") from error
    case = f"{command.module.__name__} with {what}: {line}"
    if line is not None:
        assert len(line) < 1000, case
        assert any(Path(word.strip(",;:()'")).exists() for word in line.split()), case
        assert not [path for path in command.writes if record_path(path).exists()], case
    elif same:
        for path in command.writes:
            assert comparable(path) == comparable("kept" / path), f"{case}: another {path}"
    assert not [path for path in half_written(Path.cwd()) if path.name != ".policy.work"], case


@pytest.mark.parametrize("seed", range(FUZZ))
def test_damaged_artifact_is_refused_or_does_not_matter(seed, run, program, capsys):
    _, commands = run
    draw = random.Random(seed)
    for _ in range(ARTIFACTS):
        command = draw.choice(commands)
        artifacts = [path for path in command.reads if path.is_relative_to("results/tiny")]
        if not artifacts:
            continue
        artifact = draw.choice(artifacts)
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
    readers = []
    for command in commands:
        for path in command.reads:
            if record_path(path).is_file():
                readers.append((command, record_path(path)))
    for _ in range(RECORDS):
        command, record = draw.choice(readers)
        what = damage(draw, record)
        check(command, what, program, same=True)
        restore()


@pytest.mark.parametrize("seed", range(FUZZ))
def test_damaged_user_data_is_one_line_or_accepted(seed, run, program):
    """Data files have no records, so a program may accept a damaged one."""
    _, commands = run
    draw = random.Random(f"data {seed}")
    for _ in range(DATA):
        file = Path(draw.choice(DATA_FILES))
        readers = []
        for command in commands:
            reads_file = file in command.reads or file.parent in command.reads
            if reads_file or file.parent.name in command.words:
                readers.append(command)
        assert readers, file
        what = damage(draw, file)
        check(draw.choice(readers), what, program, same=False)
        restore()


def test_undamaged_files_give_what_they_gave(run, program):
    """This process makes the same artifacts as the workflow; the tests above depend on it."""
    _, commands = run
    for command in commands:
        if any(path.is_relative_to("results/tiny") for path in command.writes):
            check(command, "nothing", program, same=True)
            restore()
