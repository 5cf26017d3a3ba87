"""llm-blender 0.0.2 itself as the preference model: the official code, for comparison with ours (sppo/preferences/pairrm.py).

It needs transformers 4, so it runs in an environment of its own (envs/llm_blender.yaml), and it fetches the backbone that its
checkpoint names from the hub. Every pair is read in both orders by its `_full_predict`, before its `rank` collapses the
logits to scores.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from sppo.core.errors import UserError
from sppo.core.progress import progress
from sppo.preferences.adapters import check_pairrm


class LlmBlender:
    """The same interface as `PairRM`. truncate_together is its batch size: prompts, each with all its candidates."""

    def __init__(
        self,
        folder: Path,
        device: str = "cpu",
        max_prompt_tokens: int | None = None,
        max_response_tokens: int | None = None,
        truncate_together: int = 1,
    ) -> None:
        check_pairrm(folder, "llm_blender")
        try:
            import llm_blender
        except ImportError as error:
            raise UserError(
                f"preference.backend is llm_blender, which cannot be imported here ({error}); run Snakemake with --use-conda, or set "
                "preference.backend: transformers"
            ) from None
        self.name, self.device, self.together = "PairRM (llm-blender)", device, truncate_together
        blender = llm_blender.Blender(llm_blender.BlenderConfig(device=device, use_tqdm=False))
        blender.loadranker(str(Path(folder).resolve()), device=device)
        self.ranker, self.collate = blender.ranker, blender.ranker_collator
        self.collate.source_maxlength = max_prompt_tokens or blender.ranker_config.source_maxlength
        self.collate.candidate_maxlength = (
            max_response_tokens or blender.ranker_config.candidate_maxlength
        )

    @torch.inference_mode()
    def all_pair_logits(self, groups: list[tuple[str, list[str]]]) -> list[np.ndarray]:
        """Logits (K, K) of every prompt with its candidates; all must have equally many."""
        found: list[np.ndarray] = []
        for first in progress(range(0, len(groups), self.together), "compare"):
            batch = self.collate(
                [
                    {"source": prompt, "candidates": candidates}
                    for prompt, candidates in groups[first : first + self.together]
                ]
            )
            logits = self.ranker._full_predict(
                **{key: value.to(self.device) for key, value in batch.items() if value is not None}
            )["logits"]
            found += list(logits.double().cpu().numpy())
        return found
