"""Checkpoints that can be trusted, and one training of an output at a time."""

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


def seal(checkpoint: Path) -> None:
    """Write the manifest of a checkpoint whose files are all written: their sizes and sha256.

    Files, then manifest, are on the disk when this returns. A checkpoint counts only with it.
    """
    checkpoint = Path(checkpoint)
    contents = _contents(checkpoint)
    for name in contents:
        _to_disk(checkpoint / name)
    with written_whole(checkpoint / MANIFEST) as temporary:
        temporary.write_text(json.dumps(contents, indent=2), encoding="utf-8")
        _to_disk(temporary)
    _to_disk(checkpoint)


def _contents(checkpoint: Path) -> dict[str, dict[str, Any]]:
    hashes = file_hashes(checkpoint)
    return {
        name: {"bytes": (checkpoint / name).stat().st_size, "sha256": found}
        for name, found in hashes.items()
        if name != MANIFEST
    }


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, None if it is as it was sealed."""
    try:
        wanted = parse_json((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "it was not written to its end"
    except (OSError, ValueError):
        wanted = None
    if not isinstance(wanted, dict):
        return f"{MANIFEST} is damaged"
    try:
        found = _contents(checkpoint)
    except UserError as error:
        return str(error)
    differ = [name for name in wanted if wanted[name] != found.get(name)]
    if differ:
        return f"{differ[0]} {'has changed' if differ[0] in found else 'is missing'}"
    return None


def remove_damaged(work: Path) -> None:
    """Remove the newest checkpoints down to one that is whole; a line on stderr for each."""
    for checkpoint in _newest_first(work):
        if (why := fault(checkpoint)) is None:
            return
        print(
            f"checkpoint {checkpoint} is of no use: {why}; it is removed, and training goes on "
            "from the one before, or begins anew",
            file=sys.stderr,
            flush=True,
        )
        remove(checkpoint)


def last_checkpoint(work: Path) -> Path | None:
    """The newest checkpoint that was sealed, None if there is none."""
    return next((folder for folder in _newest_first(work) if (folder / MANIFEST).is_file()), None)


def _newest_first(work: Path) -> list[Path]:
    """Checkpoint folders as transformers names them, by step."""
    found = {
        int(number): folder
        for folder in Path(work).glob("checkpoint-*")
        if (number := folder.name.removeprefix("checkpoint-")).isdecimal()
    }
    return [found[step] for step in sorted(found, reverse=True)]


@contextlib.contextmanager
def alone(output: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock `.<output>.lock`, so that no other process trains `output` meanwhile.

    Yields whether another one held it before: then this process has waited, and said so once.
    Without `wait` that is a UserError. A file system without locks is passed over.
    """
    output = Path(output)
    path = output.with_name(f".{output.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as opened:
        waited = False
        while True:
            file = opened.enter_context(path.open("a+", encoding="utf-8"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                said = f"{file.read().strip() or 'another process'} is training {output} already"
                if not wait:
                    raise UserError(f"{said}; wait for its end, or end it, and run again") from None
                if not waited:
                    print(
                        f"{said}; waiting for its end (end it to train here)",
                        file=sys.stderr,
                        flush=True,
                    )
                waited = True
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:
                yield False
                return
            # The one before removes the file when it ends: then this is the lock of nobody.
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
