"""Errors that are the user's to mend, and the one place where a program turns them into a line."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable


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
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        fail(disk_full(error))
    except Exception as error:
        # safetensors, arrow and tokenizers wrap a full disk in errors of their own.
        if "No space left" not in str(error) and "os error 28" not in str(error):
            raise
        fail(disk_full(error))


def fail(message: str) -> None:
    """Print the one line and leave with status 1."""
    sys.stdout.flush()
    print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    sys.exit(1)


def disk_full(error: Exception) -> str:
    """The one line for a full disk. Only the folder we were writing to is known to be full."""
    where = getattr(error, "filename", None) or os.getcwd()
    folder = where if os.path.isdir(where) else os.path.dirname(where) or "."
    free = shutil.disk_usage(folder).free // 2**20 if os.path.isdir(folder) else 0
    return (f"no space left on device while writing {where} ({free} MiB free); free some space and run "
            "again: finished artifacts are kept")
