"""The published files of PairRM: how a model is recognised as one, and checks of its folder."""

from __future__ import annotations

import re
from pathlib import Path

from sppo.core.artifacts import read_json
from sppo.core.errors import UserError
from sppo.policies.folders import safetensors_header

PAIRRM_ON_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*pairrm[\w.-]*", re.IGNORECASE)
PAIRRM_TENSORS = (
    "pretrained_model.embeddings.word_embeddings.weight",
    "head_layer.1.weight",
    "head_layer.4.weight",
)
# The HF layout names no limits. These are llm-blender's own, in blender_utils.tokenize_pair and in
# PairRM's config.json.
LIMITS = {"source_maxlength": 1224, "candidate_maxlength": 412}


def is_pairrm(model: str | Path) -> bool:
    """Whether this is PairRM: such a hub id, or a folder with a model's config.

    Folders of adapters, of reward models and of language models are other kinds.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return bool(PAIRRM_ON_HUB.fullmatch(str(model)))
    if not (folder / "config.json").is_file() or (folder / "ranker.json").is_file():
        return False
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or "ranker_type" in config:
        return True
    others = ("ForSequenceClassification", "ForCausalLM", "CustomRewardModel")
    return not any(n.endswith(others) for n in config.get("architectures") or ())


def check_pairrm(folder: Path, backend: str = "transformers") -> str:
    """The layout of a PairRM folder: `llm-blender` or `hf`, as in the two published repositories.

    Reads config.json and the header of the weights. Raises `UserError` for another layout, and for
    one that the backend does not read.
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
            f"{folder} has another layout than PairRM: its config.json says neither ranker_type"
            " pairranker, as in llm-blender/PairRM, nor architecture DebertaV2PairRM, as in"
            " llm-blender/PairRM-hf; give one of these"
        )
    if backend == "llm_blender" and layout != "llm-blender":
        raise UserError(
            f"preference.backend is llm_blender, which does not read the layout of {folder}; give"
            " llm-blender/PairRM as preference.model, or set preference.backend: transformers"
        )
    for name in ("model.safetensors", "tokenizer.json"):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder} has another layout than PairRM: it has no {name}; copy all files of"
                " llm-blender/PairRM"
            )
    header = safetensors_header(folder / "model.safetensors")
    if header is None:
        raise UserError(
            f"{folder}/model.safetensors is cut off or is not a safetensors file; copy it again"
        )
    missing = [name for name in PAIRRM_TENSORS if name not in header]
    if missing:
        raise UserError(
            f"{folder} has another layout than PairRM: its model.safetensors has no {missing[0]};"
            " give the weights of llm-blender/PairRM"
        )
    return layout
