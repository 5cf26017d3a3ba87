"""Where the embedded preference models lie; light enough for the Snakefile."""

from __future__ import annotations

from pathlib import Path

EMBEDDED = ("judge", "ranker")
ADAPTER_FILES = ("adapter.safetensors", "ranker.json")
PAIRRM = "llm-blender/PairRM"


def adapter_files(model: str) -> list[Path]:
    """The files of an embedded preference model; none for PairRM on the hub and for a judge behind an API."""
    folder = None if model == PAIRRM else adapter_folder(model)
    return [folder / name for name in ADAPTER_FILES] if folder else []


def adapter_folder(model: str) -> Path | None:
    """Folder of an embedded preference model: `ranker` and `judge` lie in data/, a path is itself.

    None if `model` names neither: a judge behind an API.
    """
    if model in EMBEDDED:
        return Path("data") / model
    return Path(model) if "/" in model or Path(model).is_dir() else None
