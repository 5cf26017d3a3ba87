"""Reward models: sequence classification with one output, such as Skywork-Reward-V2.

`preference: {model: folder or hub id}`. The model reads the chat with a response, in its own chat
template, and gives a reward r. The logit that response i beats response j is r_i - r_j
(Bradley-Terry); `pairs.logit_scale` scales it.

Departures from the example code on the models' cards:

* The output layer computes in float32. In bfloat16 a reward of 20 would be rounded to multiples of
  1/8.
* Responses are read in batches of similar length. The padding is a token that none of them
  contains, because transformers reads the reward at the last token that is not padding.
* Control tokens that a text spells out get a space, as everywhere in this repository.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sppo.core.errors import UserError
from sppo.core.progress import progress
from sppo.preferences.base import Group, Settings, register
from sppo.preferences.language_model import LanguageModel, architectures, config_of
from sppo.preferences.length_batches import batches

if TYPE_CHECKING:
    import numpy as np
    import torch


def outputs_of(folder: Path) -> int | None:
    """The number of outputs of a sequence classification model; None for another model."""
    if not any("ForSequenceClassification" in name for name in architectures(folder)):
        return None
    config = config_of(folder)
    return config.get("num_labels") or len(config.get("id2label") or {"0": "", "1": ""})


@register
class RewardModel(LanguageModel):
    """A reward model of transformers."""

    kind = "reward_model"
    form = "a folder or hub id of a reward model (sequence classification with one output)"
    families = ("Skywork/Skywork-Reward-", "NCSOFT/Llama-3-OffsetBias-RM-")

    @classmethod
    def recognises(cls, settings: Settings) -> bool:
        model = settings["model"]
        return model.startswith(cls.families) or outputs_of(Path(model)) is not None

    @classmethod
    def check_folder(cls, folder: Path, key: str) -> None:
        config = config_of(folder)
        if not config:
            raise UserError(
                f"{key} is {folder}, which has no config.json; give a Hugging Face model folder"
            )
        names = ", ".join(architectures(folder)) or "of no named architecture"
        if config.get("auto_map"):
            raise UserError(
                f"{key}: the model in {folder} ({names}) needs its own code (auto_map in its"
                " config.json), which is not executed here; give a reward model that transformers"
                " supports, or a Python function that calls it"
            )
        outputs = outputs_of(folder)
        if outputs != 1:
            number = f" with {outputs} outputs" if outputs else ""
            raise UserError(
                f"{key}: the model in {folder} is {names}{number}; a reward model is sequence"
                " classification with one output"
            )

    def load(self, folder: Path, dtype: torch.dtype) -> None:
        from torch import nn
        from transformers import AutoModelForSequenceClassification

        from sppo.policies.models import load_config, load_whole

        self.model = load_whole(
            AutoModelForSequenceClassification,
            folder,
            config=load_config(folder),
            dtype=dtype,
            what="a sequence classification model",
        )
        self.model.to(self.device)  # type: ignore[arg-type]  # transformers' decorator hides `self`
        self.model.eval()
        head = getattr(self.model, "score", None)
        if isinstance(head, nn.Linear):
            head.float()
            head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))

    def all_pair_logits(self, groups: list[Group]) -> list[np.ndarray]:
        import numpy as np

        sequences = {
            (index, text): self._ids(index, group, text)
            for index, group in enumerate(groups)
            for text in dict.fromkeys(group.responses)
        }
        rewards = dict(zip(sequences, self._rewards(list(sequences.values())), strict=True))
        found = []
        for index, group in enumerate(groups):
            own = np.array([rewards[index, text] for text in group.responses], dtype=float)
            found.append(own[:, None] - own[None, :])
        return found

    def _ids(self, index: int, group: Group, text: str) -> list[int]:
        """The token ids of the chat with this response."""
        chat = self.reader.safe([*group.chat, {"role": "assistant", "content": text}])
        return self.reader.ids(index, self.reader.rendered(index, chat, answer_next=False))

    def _rewards(self, sequences: list[list[int]]) -> list[float]:
        """The reward of each sequence."""
        import torch

        rewards = [0.0] * len(sequences)
        work = batches([len(ids) for ids in sequences], self.batch_tokens)
        with torch.inference_mode():
            for batch in progress(work, "compare") if len(work) > 1 else work:
                found = self._forward([sequences[index] for index in batch])
                for index, reward in zip(batch, found.double().tolist(), strict=True):
                    rewards[index] = reward
        return rewards

    def _forward(self, sequences: list[list[int]]) -> torch.Tensor:
        """The rewards (B,) of B sequences."""
        from sppo.policies.padding import padded

        used = {token for ids in sequences for token in ids}
        padding = next(token for token in range(len(used) + 1) if token not in used)
        self.model.config.get_text_config().pad_token_id = padding
        inputs, mask = padded(sequences, padding, self.device)
        return self.model(input_ids=inputs, attention_mask=mask).logits[:, 0]
