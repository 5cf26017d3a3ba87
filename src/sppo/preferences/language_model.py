"""Code shared by the preference models that are transformers language models."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sppo.core.artifacts import read_json
from sppo.core.errors import UserError
from sppo.policies.folders import HUB_ID, fetch
from sppo.policies.shapes import forward_flops, shape_of
from sppo.preferences.base import ComparisonCost, PreferenceModel, Settings

if TYPE_CHECKING:
    import torch


class LanguageModel(PreferenceModel):
    """A model in a folder or on the hub, whose chats `chat_reading.py` reads."""

    options = ("precision", "batch_tokens")
    is_prepared = True
    families: ClassVar[tuple[str, ...]]  # beginnings of the names of such models on the hub

    @classmethod
    @abstractmethod
    def check_folder(cls, folder: Path, key: str) -> None:
        """Raise UserError unless the folder has the files of such a model; be quick."""

    @abstractmethod
    def load(self, folder: Path, dtype: torch.dtype) -> None:
        """Load the weights, to compute in `dtype` on `self.device`."""

    def __init__(self, settings: Settings, base: Path | None, device: str) -> None:
        from sppo.policies.devices import compute_dtype
        from sppo.preferences.chat_reading import ChatReader

        folder = Path(settings["model"]).expanduser()
        self.check_folder(folder, "preference.model")
        self.name = str(settings["model"])
        self.device = device
        self.batch_tokens = settings["batch_tokens"]
        self.reader = ChatReader(folder)
        self.load(folder, compute_dtype(settings["precision"], device))

    @classmethod
    def sequences(cls, samples: int) -> int:
        """The number of sequences that are read for one prompt: one for each response."""
        return samples

    @classmethod
    def responses_of_sequence(cls) -> int:
        """The number of responses in a sequence."""
        return 1

    @classmethod
    def files(cls, model: str) -> list[Path]:
        return [Path(model)]

    @classmethod
    def check(cls, settings: Settings, key: str) -> None:
        model = settings["model"]
        folder = Path(model).expanduser()
        if folder.is_dir():
            cls.check_folder(folder, key)
        elif not HUB_ID.fullmatch(model):  # `prepare` fetches a hub id, and checks it then
            raise UserError(f"{key} is {model}, which is neither a folder nor a hub id; correct it")

    @classmethod
    def prepare(cls, settings: Settings) -> tuple[Path, dict[str, Any]]:
        folder, commit = fetch(settings["model"], settings["revision"], "preference.model")
        cls.check_folder(folder, "preference.model")
        return folder, {"commit": commit}

    @classmethod
    def cost(
        cls, settings: Settings, prompts: float, prompt: float, samples: int, response: float
    ) -> ComparisonCost | None:
        config = config_of(Path(settings["model"]))
        if "num_hidden_layers" not in config:
            return None  # a hub id that has not been fetched
        shape = shape_of(config)
        length = prompt + cls.responses_of_sequence() * response
        tokens = prompts * cls.sequences(samples) * length
        return ComparisonCost(forward_flops(shape, tokens, length / 2, 0), tokens, shape.weights)


def config_of(folder: Path) -> dict[str, Any]:
    """The config.json in a model's folder; empty if there is none, and for PairRM's."""
    file = folder.expanduser() / "config.json"
    config = read_json(file) if file.is_file() else {}
    return config if isinstance(config, dict) and "ranker_type" not in config else {}


def architectures(folder: Path) -> list[str]:
    """The names of the classes that config.json says the weights belong to."""
    return config_of(folder).get("architectures") or []
