"""Artifacts: written whole or not at all, checked on write and on read, a record beside each.

The schemas of all tables stand here and nowhere else.
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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sppo.errors import UserError, writing
from sppo.stages import STAGES

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "tokenizers", "vllm", "llm-blender",
            "alpaca-eval", "numpy", "pyarrow", "snakemake")


@dataclass(frozen=True)
class Table:
    """Columns with their types, and the columns that together name a row."""

    columns: pa.Schema
    key: tuple[str, ...]


def _columns(**types: pa.DataType) -> pa.Schema:
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in types.items()])


_ids = pa.list_(pa.int32())
_message = pa.struct([("role", pa.string()), ("content", pa.string())])

TABLES = {
    "prompts": Table(_columns(prompt_id=pa.string(), category=pa.string(), messages=pa.list_(_message),
                              prompt_token_ids=_ids, source=pa.string()), ("prompt_id",)),
    "responses": Table(_columns(prompt_id=pa.string(), sample_id=pa.int32(), seed=pa.uint64(),
                                prompt_token_ids=_ids, token_ids=_ids, text=pa.string(),
                                finish_reason=pa.string()), ("prompt_id", "sample_id")),
    # logits[i][j] is the logit that response i beats response j, read in the order (i, j).
    "preferences": Table(_columns(prompt_id=pa.string(), sample_ids=_ids,
                                  logits=pa.list_(pa.list_(pa.float64()))), ("prompt_id",)),
    "pairs": Table(_columns(pair_id=pa.int64(), prompt_id=pa.string(), prompt_token_ids=_ids,
                            chosen=pa.string(), chosen_token_ids=_ids, chosen_sample_id=pa.int32(),
                            rejected=pa.string(), rejected_token_ids=_ids, rejected_sample_id=pa.int32(),
                            p_hat_chosen=pa.float64(), p_hat_rejected=pa.float64(),
                            p_chosen_beats_rejected=pa.float64()), ("pair_id",)),
    # Summed log-probabilities (nats) of the response tokens under a frozen model.
    "logps": Table(_columns(pair_id=pa.int64(), chosen_logp=pa.float64(), rejected_logp=pa.float64()),
                   ("pair_id",)),
}


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` at the end, remove it on any error.

    The temporary path may be made a file or a folder.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            yield temporary
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON whole. NaN is a ValueError: it is not JSON."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON. A missing or broken file is a UserError that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; make it or correct the path") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); delete it and make it again") from None


def write_table(path: Path, rows: list[dict[str, Any]], name: str) -> None:
    """Write rows as the table `name`. Rows that break its schema are a ValueError: a bug of ours."""
    schema = TABLES[name].columns
    table = pa.Table.from_pylist(rows, schema=schema)
    _check(table, name)
    with written_whole(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_table(path: Path, name: str) -> list[dict[str, Any]]:
    """Rows of the table `name`. A missing, truncated or foreign file is a UserError that names it."""
    try:
        table = pq.read_table(path, partitioning=None)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; make it or correct the path") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is not a whole parquet file ({error}); delete it and run again") from None
    wanted = TABLES[name].columns
    missing = [column for column in wanted.names if column not in table.column_names]
    if missing:
        raise UserError(f"{path} is not a table of {name}: it lacks {', '.join(missing)}; delete it and run again")
    try:
        table = table.select(wanted.names).cast(wanted)
        _check(table, name)
    except (pa.ArrowException, ValueError) as error:
        raise UserError(f"{path} breaks the schema of {name} ({error}); delete it and run again") from None
    return table.to_pylist()


def _check(table: pa.Table, name: str) -> None:
    for column in table.column_names:
        values = table.column(column)
        while pa.types.is_list(values.type):
            if values.null_count:
                break
            values = pc.list_flatten(values)
        if values.null_count:
            raise ValueError(f"column {column} has nulls")
    key = list(TABLES[name].key)
    if table.group_by(key).aggregate([]).num_rows != table.num_rows:
        raise ValueError(f"{' and '.join(key)} do not name one row each")


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
