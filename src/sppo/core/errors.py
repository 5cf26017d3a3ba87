"""Errors that the user can fix, and the code that prints such an error as one line."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator

# The system's error numbers for a full disk, an exceeded quota and a file above the size limit.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# The same errors in the messages of libraries that raise their own types of exception. The last two
# are PyTorch's: its writer only reports that a file is shorter than it should be.
FULL_IN_WORDS = (
    *map(os.strerror, FULL),
    *(f"os error {number})" for number in FULL),
    "PytorchStreamWriter",
    "unexpected pos ",
)

# Parts of the messages with which PyTorch's allocator and, under `ulimit -v`, the loader of shared
# libraries report that there is no more memory.
OUT_OF_MEMORY_IN_WORDS = ("DefaultCPUAllocator", "failed to map segment")

NO_PERMISSION = (
    "cannot be read or written with your permissions; change its permissions, or those of its"
    " folder"
)

# The rest of the error line for a file, after its name: the problem and the remedy.
OF_FILES = {
    errno.ENOENT: "is missing; create it or correct the path",
    errno.EACCES: NO_PERMISSION,
    errno.EPERM: NO_PERMISSION,
    errno.EEXIST: "is a file, but a folder is expected; correct the path, or delete it",
    errno.EROFS: "is on a read-only file system; choose another location",
    errno.EISDIR: "is a folder, but a file is expected; correct the path",
    errno.ENOTDIR: "uses a file as if it were a folder; correct the path",
    errno.ENAMETOOLONG: "is longer than a path or a file name may be; shorten it",
    errno.EIO: "cannot be read or written by the system; check the disk or correct the path",
    errno.ELOOP: "is a link that leads back to itself; correct the link",
}


class UserError(Exception):
    """An error that the user can fix. Its text is one line: what is wrong, and the remedy."""


def run(main: Callable[[], None]) -> None:
    """Run a program's `main`. Print an error that the user can fix as one line on stderr.

    `explained` decides which errors these are; the process then exits with status 1. Any other
    exception is a bug in this project and keeps its traceback.
    """
    try:
        main()
    except Exception as error:
        line = explained(error)
        if line is None:
            raise
        fail(line)


def explained(error: BaseException) -> str | None:
    """The line for an error that the user can fix; None for an error that may be a bug.

    An operating-system error without a file name may be a bug.
    """
    if isinstance(error, UserError):
        return str(error)
    filename = getattr(error, "filename", None)
    if is_disk_full(error):
        return disk_full(filename or "temporary files")
    if is_out_of_memory(error):
        return (
            "there is not enough memory; close other programs, raise the limit (ulimit -v, or"
            " mem_mb on a cluster), or lower batch sizes"
        )
    if isinstance(error, OSError) and isinstance(filename, (str, bytes)):
        if error.errno in OF_FILES:
            name = os.fsdecode(filename)
            if len(name) > 200:
                name = name[:197] + "..."
            return f"{name} {OF_FILES[error.errno]}"
    return None


def fail(message: str) -> None:
    """Print `message` as one line on stderr and exit with status 1."""
    sys.stdout.flush()
    print("error: " + on_one_line(message), file=sys.stderr, flush=True)
    sys.exit(1)


def on_one_line(message: str) -> str:
    """The message as one line, with control characters escaped: a terminal would execute them."""
    line = " ".join(message.split())
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in line
    )


def first_line(error: Exception) -> str:
    """The first line of an error's text, at most 200 characters; its class if it has no text."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def is_disk_full(error: BaseException) -> bool:
    """Whether an error means that a full disk, a quota or the file size limit stopped a write.

    safetensors, arrow and PyTorch report this with their own types of exception.
    """
    if getattr(error, "errno", None) in FULL:
        return True
    return any(words in str(error) for words in FULL_IN_WORDS)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that there is no more memory on the CPU."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return any(words in str(error) for words in OUT_OF_MEMORY_IN_WORDS)


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn a full disk or a file size limit, while the block writes `path`, into a UserError."""
    try:
        yield
    except Exception as error:
        if is_disk_full(error):
            raise UserError(disk_full(path)) from error
        raise


def disk_full(path: str | os.PathLike[str]) -> str:
    """The error line for a full disk, a quota or a file size limit while `path` is written."""
    folder = os.path.dirname(path) or "."
    free = ""
    if os.path.isdir(folder):
        free = f" ({shutil.disk_usage(folder).free // 2**20} MiB free there)"
    limit = ""
    largest_file = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if largest_file != resource.RLIM_INFINITY:
        limit = f", or raise `ulimit -f` (now {largest_file} bytes per file),"
    return (
        f"no space left on device while writing {path}{free}; free some space{limit} and run "
        "again: finished artifacts are kept"
    )
