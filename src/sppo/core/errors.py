"""Errors that are the user's to fix, and the one place where a program turns them into a line."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_IN_WORDS = (
    *map(os.strerror, FULL),
    *(f"os error {number})" for number in FULL),
    "PytorchStreamWriter",
    "unexpected pos ",
)


class UserError(Exception):
    """A mistake of the user's or of the machine's: one line that names the thing and the remedy."""


def run(main: Callable[[], None]) -> None:
    """Run a program's `main` and end the process.

    A `UserError`, and what `explained` knows of files and of the machine, become one line on stderr
    and exit status 1; everything else is a bug of ours and keeps its traceback.
    """
    try:
        main()
    except Exception as error:
        line = explained(error)
        if line is None:
            raise
        fail(line)


# What the system says of a file, and what to do. Without the file's name it may be a bug of ours.
NO_PERMISSION = "may not be read or written by you; change its permissions, or those of its folder"
OF_FILES = {
    errno.ENOENT: "is missing; make it or correct the path",
    errno.EACCES: NO_PERMISSION,
    errno.EPERM: NO_PERMISSION,
    errno.EROFS: "lies on a file system that is read-only; choose another place",
    errno.EISDIR: "is a folder where a file is wanted; correct the path",
    errno.ENOTDIR: "goes through a file as if it were a folder; correct the path",
    errno.ENAMETOOLONG: "is longer than a path or a name may be; correct it",
    errno.ELOOP: "is a link that leads back to itself; correct the link",
}


def explained(error: BaseException) -> str | None:
    """The line for an error of the user's or the machine's; None for what may be a bug of ours."""
    number, named = getattr(error, "errno", None), getattr(error, "filename", None)
    if isinstance(error, UserError):
        return str(error)
    if is_disk_full(error):
        return disk_full(named or "temporary files")
    if is_out_of_memory(error):
        return (
            "there is not enough memory; close other programs, raise the limit (ulimit -v, or"
            " mem_mb on a cluster), or lower batch sizes"
        )
    if isinstance(error, OSError) and number in OF_FILES and isinstance(named, (str, bytes)):
        name = os.fsdecode(named)
        return f"{name if len(name) <= 200 else name[:197] + '...'} {OF_FILES[number]}"
    return None


def fail(message: str) -> None:
    """Print the one line and leave with status 1."""
    sys.stdout.flush()
    print("error: " + on_one_line(message), file=sys.stderr, flush=True)
    sys.exit(1)


def on_one_line(message: str) -> str:
    """The message as one line: control characters, which a terminal would obey, are written out."""
    line = " ".join(message.split())
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in line
    )


def is_disk_full(error: BaseException) -> bool:
    """Whether the error says that no more can be written: by disk, quota, or largest file allowed.

    safetensors and arrow wrap it in types of their own. Of PyTorch's writer nothing else is left
    than that a file is shorter than it should be.
    """
    return getattr(error, "errno", None) in FULL or any(
        words in str(error) for words in FULL_IN_WORDS
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that there is no more memory; PyTorch has words of its own.

    So has the loader of libraries, under `ulimit -v`.
    """
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return any(words in str(error) for words in ("DefaultCPUAllocator", "failed to map segment"))


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn a full disk or a limit on sizes, met while the block writes `path`, into a UserError."""
    try:
        yield
    except Exception as error:
        if is_disk_full(error):
            raise UserError(disk_full(path)) from error
        raise


def disk_full(path: str | os.PathLike[str]) -> str:
    """The one line for a full disk met while writing `path`."""
    folder = os.path.dirname(path) or "."
    free = (
        f" ({shutil.disk_usage(folder).free // 2**20} MiB free there)"
        if os.path.isdir(folder)
        else ""
    )
    largest = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    limit = ""
    if largest != resource.RLIM_INFINITY:
        limit = f", or raise `ulimit -f`, {largest} bytes a file,"
    return (
        f"no space left on device while writing {path}{free}; free some{limit} and run again: "
        "finished artifacts are kept"
    )
