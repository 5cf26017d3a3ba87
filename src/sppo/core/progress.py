"""Progress on stderr: a bar if a person watches the terminal, otherwise one line per minute."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def watched() -> bool:
    """Whether a person watches the terminal.

    The Snakefile sets SPPO_WATCHED if its own output is a terminal, because its jobs write to a
    pipe to `tee`.
    """
    return sys.stderr.isatty() or bool(os.environ.get("SPPO_WATCHED"))


def progress(items: Sequence[T], what: str) -> Iterator[T]:
    """Iterate over `items` and report the progress of `what` on stderr."""
    if watched():
        yield from tqdm(items, desc=what)
        return
    began = last_report = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last_report >= 60 or done == len(items):
            print(
                f"{what}: {done} of {len(items)} after {now - began:.0f} s",
                file=sys.stderr,
                flush=True,
            )
            last_report = now
