"""Where the preference models lie and what kind they are; light enough for the Snakefile."""

from __future__ import annotations

import re
from pathlib import Path

from sppo.core.artifacts import read_json
from sppo.core.errors import UserError
from sppo.policies.models import safetensors_header

EMBEDDED = ("judge", "ranker")
ADAPTER_FILES = ("adapter.safetensors", "ranker.json")
PAIRRM_ON_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*pairrm[\w.-]*", re.IGNORECASE)
PAIRRM_TENSORS = (
    "pretrained_model.embeddings.word_embeddings.weight",
    "head_layer.1.weight",
    "head_layer.4.weight",
)


def adapter_files(model: str, base: Path | None = None) -> list[Path]:
    """What a local preference model lies in: an adapter's files and its base, or PairRM's folder; nothing for a judge behind an API."""
    folder = adapter_folder(model)
    if folder is None:
        return []
    return (
        [folder]
        if is_pairrm(folder)
        else [*(folder / name for name in ADAPTER_FILES), *([base] if base else [])]
    )


def adapter_folder(model: str) -> Path | None:
    """Folder of a local preference model: `ranker` and `judge` lie in data/, a path is itself.

    None if `model` names neither: a judge behind an API.
    """
    if model in EMBEDDED:
        return Path("data") / model
    return Path(model) if "/" in model or Path(model).is_dir() else None


def is_pairrm(model: str | Path) -> bool:
    """Whether this is PairRM: a folder with a model's config and no adapter, or a hub id that says so."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return (folder / "config.json").is_file() and not (folder / "ranker.json").is_file()
    return bool(PAIRRM_ON_HUB.fullmatch(str(model)))


def check_pairrm(folder: Path, backend: str = "transformers") -> str:
    """The layout of a PairRM folder, `llm-blender` or `hf`, as the two published repositories have them.

    Files of another layout are a UserError, and so is one that the backend does not read. Reads config.json and the header of
    the weights, nothing large.
    """
    folder = Path(folder).expanduser()
    config = read_json(folder / "config.json")
    config = config if isinstance(config, dict) else {}
    if config.get("ranker_type") == "pairranker" and str(config.get("model_type")).startswith(
        "deberta"
    ):
        layout = "llm-blender"
    elif "DebertaV2PairRM" in (config.get("architectures") or ()):
        layout = "hf"
    else:
        raise UserError(
            f"{folder} has another layout than PairRM: its config.json says neither ranker_type pairranker, as in "
            "llm-blender/PairRM, nor architecture DebertaV2PairRM, as in llm-blender/PairRM-hf; give one of these"
        )
    if backend == "llm_blender" and layout != "llm-blender":
        raise UserError(
            f"preference.backend is llm_blender, which does not read the layout of {folder}; give llm-blender/PairRM as preference.model, "
            "or set preference.backend: transformers"
        )
    for name in ("model.safetensors", "tokenizer.json"):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder} has another layout than PairRM: it has no {name}; copy the files of llm-blender/PairRM whole"
            )
    header = safetensors_header(folder / "model.safetensors")
    if header is None:
        raise UserError(
            f"{folder}/model.safetensors is cut off or is not a safetensors file; copy it again"
        )
    missing = [name for name in PAIRRM_TENSORS if name not in header]
    if missing:
        raise UserError(
            f"{folder} has another layout than PairRM: its model.safetensors has no {missing[0]}; give the weights of llm-blender/PairRM"
        )
    return layout
