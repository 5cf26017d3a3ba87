"""Errors that are the user's to mend, and the one place where a program turns them into a line."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_IN_WORDS = (*map(os.strerror, FULL), *(f"os error {number})" for number in FULL),
                 "PytorchStreamWriter", "unexpected pos ")


class UserError(Exception):
    """A mistake of the user's or of the machine's: one line that names the thing and the remedy."""


def run(main: Callable[[], None]) -> None:
    """Run a program's `main` and end the process.

    A `UserError`, and a full disk, become one line on stderr and exit status 1; everything else is a
    bug of ours and keeps its traceback.
    """
    try:
        main()
    except UserError as error:
        fail(str(error))
    except Exception as error:
        if not is_disk_full(error):
            raise
        fail(disk_full(getattr(error, "filename", None) or "temporary files"))


def fail(message: str) -> None:
    """Print the one line and leave with status 1."""
    sys.stdout.flush()
    print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    sys.exit(1)


def is_disk_full(error: BaseException) -> bool:
    """Whether the error says that no more can be written: by disk, quota, or largest file allowed.

    safetensors and arrow wrap it in types of their own. Of PyTorch's writer nothing else is left
    than that a file is shorter than it should be.
    """
    return (getattr(error, "errno", None) in FULL or
            any(words in str(error) for words in FULL_IN_WORDS))


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Turn a full disk, met while the block writes to `path`, into a UserError that names it."""
    try:
        yield
    except Exception as error:
        if is_disk_full(error):
            raise UserError(disk_full(path)) from error
        raise


def disk_full(path: str | os.PathLike) -> str:
    """The one line for a full disk met while writing `path`."""
    folder = os.path.dirname(path) or "."
    free = f" ({shutil.disk_usage(folder).free // 2**20} MiB free there)" if os.path.isdir(folder) else ""
    largest = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    limit = ""
    if largest != resource.RLIM_INFINITY:
        limit = f", or raise `ulimit -f`, {largest} bytes a file,"
    return (f"no space left on device while writing {path}{free}; free some{limit} and run again: "
            "finished artifacts are kept")
