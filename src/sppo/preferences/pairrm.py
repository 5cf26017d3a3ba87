"""PairRM (LLM-Blender, 2306.02561) as a preference model.

Two kinds read the same published files: our own code on plain transformers
(`pairrm_network.py`), and the package llm-blender (`llm_blender.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sppo.core.errors import UserError
from sppo.policies.folders import fetch
from sppo.policies.shapes import PAIRRM, forward_flops
from sppo.preferences.base import (
    ComparisonCost,
    Group,
    PreferenceModel,
    Settings,
    existing,
    register,
)
from sppo.preferences.pairrm_files import LIMITS, check_pairrm, is_pairrm

if TYPE_CHECKING:
    import numpy as np


class PairRMFiles(PreferenceModel):
    """What both kinds of PairRM share: the published files, which are put into results/ first."""

    form = "llm-blender/PairRM, llm-blender/PairRM-hf or a folder with the files of one"
    is_prepared = True
    reads_length = ("max_prompt_tokens", "max_response_tokens", "truncate_together")

    @classmethod
    def files(cls, model: str) -> list[Path]:
        return [Path(model)]

    @classmethod
    def check(cls, settings: Settings, key: str) -> None:
        folder = Path(settings["model"])
        if not folder.is_dir():
            return  # a hub id, which `prepare` fetches
        try:
            check_pairrm(folder, settings["backend"])
        except UserError as error:
            raise UserError(f"{key}: {error}") from None

    @classmethod
    def training_instructions(cls, model: str) -> list[Path]:
        """src/tools/finetune_pairrm.py writes it."""
        return existing(Path(model) / "training_instructions.txt")

    @classmethod
    def prepare(cls, settings: Settings) -> tuple[Path, dict[str, Any]]:
        folder, commit = fetch(settings["model"], settings["revision"], "preference.model")
        layout = check_pairrm(folder, settings["backend"])
        return folder, {"commit": commit, "layout": layout}

    @classmethod
    def cost(
        cls, settings: Settings, prompts: float, prompt: float, samples: int, response: float
    ) -> ComparisonCost:
        """All ordered pairs of responses, each read together with the prompt."""
        source = min(prompt, LIMITS["source_maxlength"])
        length = source + 2 * min(response, LIMITS["candidate_maxlength"])
        pairs = prompts * samples * (samples - 1)
        flops = forward_flops(PAIRRM, pairs * length, length, 0)
        return ComparisonCost(flops, pairs * (prompt + 2 * response), PAIRRM.weights)


@register
class PairRMModel(PairRMFiles):
    """PairRM by our own code on plain transformers."""

    kind = "pairrm"
    is_pairrm = True
    options = (*PairRMFiles.reads_length, "precision", "batch_tokens")

    @classmethod
    def recognises(cls, settings: Settings) -> bool:
        return is_pairrm(settings["model"]) and settings["backend"] == "transformers"

    def __init__(self, settings: Settings, base: Path | None, device: str) -> None:
        from sppo.preferences.pairrm_network import PairRM

        options = {key: settings[key] for key in self.options}
        self.network = PairRM(Path(settings["model"]), device, **options)
        self.name = self.network.name

    def all_pair_logits(self, groups: list[Group]) -> list[np.ndarray]:
        return self.network.all_pair_logits([(each.prompt, each.responses) for each in groups])
