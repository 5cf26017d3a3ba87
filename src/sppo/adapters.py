"""Where the embedded preference models lie; light enough for the Snakefile."""

from __future__ import annotations

ADAPTER_FILES = ("adapter.safetensors", "ranker.json")


def adapter_folder(model: str) -> str:
    """Folder of an embedded preference model: `ranker` and `judge` are shipped in data/, else a path."""
    return f"data/{model}" if model in ("ranker", "judge") else model
