"""A progress bar when a person watches, a line a minute when not."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def watched() -> bool:
    """Whether a person watches; the Snakefile sets SPPO_WATCHED where tee stands before the terminal."""
    return sys.stderr.isatty() or bool(os.environ.get("SPPO_WATCHED"))


def progress(items: Sequence[T], what: str) -> Iterator[T]:
    """Iterate over `items` and tell on stderr how far it is."""
    if watched():
        yield from tqdm(items, desc=what)
        return
    began = told = time.monotonic()
    for done, item in enumerate(items):
        yield item
        now = time.monotonic()
        if now - told >= 60 or done + 1 == len(items):
            print(
                f"{what}: {done + 1} of {len(items)} after {now - began:.0f} s",
                file=sys.stderr,
                flush=True,
            )
            told = now
