"""llm-blender 0.0.2 itself as the preference model: the official code, to compare ours with.

It needs transformers 4, so it runs in an environment of its own (envs/llm_blender.yaml). It fetches
the backbone that its checkpoint names from the hub. Its `_full_predict` reads every pair in both
orders; `rank`, which would reduce the logits to scores, is not called.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sppo.core.errors import UserError
from sppo.core.progress import progress
from sppo.preferences.base import Group, Settings, register
from sppo.preferences.pairrm import PairRMFiles
from sppo.preferences.pairrm_files import check_pairrm, is_pairrm

if TYPE_CHECKING:
    import numpy as np


@register
class LlmBlenderModel(PairRMFiles):
    """PairRM by the package llm-blender. `truncate_together` is its batch size, in prompts."""

    kind = "llm_blender"
    is_pairrm = True
    options = PairRMFiles.reads_length
    environment = "llm_blender"

    @classmethod
    def recognises(cls, settings: Settings) -> bool:
        return is_pairrm(settings["model"]) and settings["backend"] == "llm_blender"

    def __init__(self, settings: Settings, base: Path | None, device: str) -> None:
        folder = Path(settings["model"])
        check_pairrm(folder, "llm_blender")
        try:
            import llm_blender
        except ImportError as error:
            raise UserError(
                f"preference.backend is llm_blender, which cannot be imported here ({error}); run"
                " Snakemake with --use-conda, or set preference.backend: transformers"
            ) from None
        self.name, self.device = "PairRM (llm-blender)", device
        self.together = settings["truncate_together"]
        blender = llm_blender.Blender(llm_blender.BlenderConfig(device=device, use_tqdm=False))
        blender.loadranker(str(folder.resolve()), device=device)
        limits = blender.ranker_config
        self.ranker, self.collate = blender.ranker, blender.ranker_collator
        self.collate.source_maxlength = settings["max_prompt_tokens"] or limits.source_maxlength
        self.collate.candidate_maxlength = (
            settings["max_response_tokens"] or limits.candidate_maxlength
        )

    def all_pair_logits(self, groups: list[Group]) -> list[np.ndarray]:
        """Logits (K, K) of every group. All groups must have equally many responses."""
        import torch

        found: list[np.ndarray] = []
        for first in progress(range(0, len(groups), self.together), "compare"):
            together = groups[first : first + self.together]
            batch = self.collate(
                [{"source": each.prompt, "candidates": each.responses} for each in together]
            )
            inputs = {key: value for key, value in batch.items() if value is not None}
            with torch.inference_mode():
                predicted = self.ranker._full_predict(
                    **{key: value.to(self.device) for key, value in inputs.items()}
                )
            found += list(predicted["logits"].double().cpu().numpy())
        return found
