"""The embedded preference models: an adapter on the embedded policy (`embedded_network.py`).

`data/ranker` annotates and `data/judge` judges; src/tools/train_ranker.py writes folders like them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sppo.core.artifacts import read_json, shipped
from sppo.core.errors import UserError
from sppo.policies.shapes import SHAPES, forward_flops
from sppo.preferences.base import (
    ComparisonCost,
    Group,
    PreferenceModel,
    Settings,
    existing,
    register,
)

if TYPE_CHECKING:
    import numpy as np

EMBEDDED = ("judge", "ranker")
ADAPTER_FILES = ("adapter.safetensors", "ranker.json")


def adapter_folder(model: str) -> Path | None:
    """Folder of an adapter: `ranker` and `judge` are in data/, a path is itself.

    None if `model` is neither, such as the name of a judge behind an API.
    """
    if model in EMBEDDED:
        return shipped(f"data/{model}")
    return Path(model) if "/" in model or Path(model).is_dir() else None


@register
class EmbeddedModel(PreferenceModel):
    """A skew-symmetric preference embedding on the embedded policy."""

    kind = "embedded"
    form = "`ranker`, a folder that src/tools/train_ranker.py wrote"
    needs_base = True

    @classmethod
    def recognises(cls, settings: Settings) -> bool:
        model = settings["model"]
        return model in EMBEDDED or any(file.is_file() for file in cls.files(model))

    @classmethod
    def files(cls, model: str) -> list[Path]:
        folder = adapter_folder(model)
        return [folder / name for name in ADAPTER_FILES] if folder else []

    @classmethod
    def check(cls, settings: Settings, key: str) -> None:
        check_adapter(settings["model"], key)

    @classmethod
    def training_instructions(cls, model: str) -> list[Path]:
        folder = adapter_folder(model)
        return existing(folder / "training_instructions.txt") if folder else []

    @classmethod
    def cost(
        cls, settings: Settings, prompts: float, prompt: float, samples: int, response: float
    ) -> ComparisonCost:
        """The lower layers of the base read the prompt once and each response after it."""
        spec = read_json(cls.files(settings["model"])[ADAPTER_FILES.index("ranker.json")])
        shape = SHAPES["embedded"]
        asked = min(prompt, spec["max_prompt_tokens"])
        answered = min(response, spec["max_answer_tokens"])
        read = prompts * (asked + samples * answered)
        layers = replace(shape, layers=spec["layers"])
        flops = forward_flops(layers, read, asked + answered / 2, 0)
        return ComparisonCost(flops, prompts * (prompt + samples * response), shape.weights)

    def __init__(self, settings: Settings, base: Path | None, device: str) -> None:
        from sppo.preferences.embedded_network import EmbeddedRanker

        folder = adapter_folder(settings["model"])
        assert folder is not None and base is not None  # `load_preference_model` has checked it
        self.network = EmbeddedRanker(folder, base, device=device)
        self.name = self.network.name

    def all_pair_logits(self, groups: list[Group]) -> list[np.ndarray]:
        return self.network.all_pair_logits([(each.prompt, each.responses) for each in groups])


def check_adapter(model: str, key: str) -> None:
    """Raise `UserError` if an adapter's folder lacks a file. key: names it in the error line."""
    folder = adapter_folder(model)
    for file in ADAPTER_FILES:
        if folder and not (folder / file).is_file():
            raise UserError(
                f"{key} is {model}, but {folder} has no {file}; give `ranker`, `judge` or a folder"
                " that src/tools/train_ranker.py wrote"
            )
