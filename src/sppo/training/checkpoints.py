"""Checkpoints whose manifests detect damage, and a lock: one process trains an output at a time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sppo.core.artifacts import file_hashes, parse_json, remove, written_whole
from sppo.core.errors import UserError

MANIFEST = "manifest.json"


def write_manifest(checkpoint: Path) -> None:
    """Write the manifest of a complete checkpoint: the size and the sha256 of each file.

    All files are flushed to the disk before the manifest, and the manifest before this returns. A
    checkpoint without a manifest is incomplete.
    """
    checkpoint = Path(checkpoint)
    contents = _contents(checkpoint)
    for name in contents:
        _flush_to_disk(checkpoint / name)
    with written_whole(checkpoint / MANIFEST) as temporary:
        temporary.write_text(json.dumps(contents, indent=2), encoding="utf-8")
        _flush_to_disk(temporary)
    _flush_to_disk(checkpoint)


def _contents(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """What a manifest stores: the size in bytes and the sha256 of each other file, by name."""
    return {
        name: {"bytes": (checkpoint / name).stat().st_size, "sha256": sha256}
        for name, sha256 in file_hashes(checkpoint).items()
        if name != MANIFEST
    }


def _flush_to_disk(path: Path) -> None:
    """Wait until the system has written a file, or a folder's list of files, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None if its files are as the manifest describes them."""
    try:
        expected = parse_json((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "it was not written completely"
    except (OSError, ValueError):
        expected = None
    if not isinstance(expected, dict):
        return f"{MANIFEST} is damaged"
    try:
        found = _contents(checkpoint)
    except UserError as error:
        return str(error)
    for name in expected:
        if name not in found:
            return f"{name} is missing"
        if expected[name] != found[name]:
            return f"{name} has changed"
    return None


def remove_damaged(work: Path) -> None:
    """Remove damaged checkpoints, newest first, up to the first that is not damaged.

    Prints one line on stderr for each. A damaged checkpoint that is older than an intact one stays.
    """
    for checkpoint in _newest_first(work):
        problem = fault(checkpoint)
        if problem is None:
            return
        print(
            f"checkpoint {checkpoint} cannot be used: {problem}; it is removed, and training "
            "resumes from the previous checkpoint, or starts again if there is none",
            file=sys.stderr,
            flush=True,
        )
        remove(checkpoint)


def last_checkpoint(work: Path) -> Path | None:
    """The newest checkpoint that has a manifest, None if there is none."""
    for checkpoint in _newest_first(work):
        if (checkpoint / MANIFEST).is_file():
            return checkpoint
    return None


def _newest_first(work: Path) -> list[Path]:
    """The folders checkpoint-<step>, as transformers names them, in descending order of steps."""
    by_step = {}
    for folder in Path(work).glob("checkpoint-*"):
        step = folder.name.removeprefix("checkpoint-")
        if step.isdecimal():
            by_step[int(step)] = folder
    return [by_step[step] for step in sorted(by_step, reverse=True)]


@contextlib.contextmanager
def exclusive_lock(output: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock `.<output>.lock`, so that no other process trains `output` during the block.

    Args:
        output: the policy to train.
        wait: whether to wait for a process that holds the lock. If False, such a process is a
            UserError.

    Yields:
        Whether this process had to wait. It then has printed one line on stderr. On a file system
        without locks, the block runs without a lock.
    """
    output = Path(output)
    path = output.with_name(f".{output.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as open_files:
        waited = False
        while True:
            file = open_files.enter_context(path.open("a+", encoding="utf-8"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "another process"
                busy = f"{holder} is training {output} already"
                if not wait:
                    raise UserError(
                        f"{busy}; wait until it has ended, or end it, and run again"
                    ) from None
                if not waited:
                    print(
                        f"{busy}; waiting for its end (end it to train here)",
                        file=sys.stderr,
                        flush=True,
                    )
                waited = True
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:
                yield False
                return
            # The previous holder removes the lock file when it ends. If the locked file is no
            # longer the one at `path`, other processes do not see this lock: try again.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    break
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield waited
        finally:
            path.unlink(missing_ok=True)
