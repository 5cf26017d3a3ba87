"""General preference models (2410.02197): responses are vectors, preferences are skew-symmetric.

`preference: {model: general-preference/GPM-Llama-3.1-8B}`, or a folder with such a model. One pass
gives a unit vector v, from the state of the last token, and block weights lambda, from the state at
the end of the prompt. A block is two neighbouring entries of v:

    logit(i beats j) = sum over blocks of lambda (v_i[1] v_j[2] - v_i[2] v_j[1]) / tau

So K responses are K sequences, P need not be Bradley-Terry, and preferences can be cyclic. lambda
is a softmax over the blocks, or 1 for a model without a head for it. tau is 0.1.

The computation is that of gpm_example_usage.py in the authors' repository; tests compare the two.
As there, a sequence can begin with two BOS, the template's and the tokenizer's, and the last token
of the chat is replaced by EOS. Departures: weights of the heads and vectors are float32, and a
conversation's prompt is the whole chat before the response, not its first message.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sppo.core.artifacts import read_json
from sppo.core.errors import UserError
from sppo.policies.folders import WEIGHTS_INDEX, safetensors_header
from sppo.preferences.base import Group, Settings, register
from sppo.preferences.language_model import LanguageModel

if TYPE_CHECKING:
    import numpy as np
    import torch

HEADS = ("value_head.weight", "prompt_head.weight")
TAU = 0.1


def head_files(folder: Path) -> dict[str, Path]:
    """The file of each head's weights in a folder; empty for a model without them."""
    if (folder / WEIGHTS_INDEX).is_file():
        named = read_json(folder / WEIGHTS_INDEX).get("weight_map", {})
        return {name: folder / named[name] for name in HEADS if name in named}
    file = folder / "model.safetensors"
    header = safetensors_header(file) if file.is_file() else None
    return {name: file for name in HEADS if name in (header or {})}


@register
class GeneralPreferenceModel(LanguageModel):
    """A published general preference model."""

    kind = "gpm"
    form = "general-preference/GPM-Llama-3.1-8B or a folder with the files of such a model"
    families = ("general-preference/GPM-",)

    @classmethod
    def recognises(cls, settings: Settings) -> bool:
        model = settings["model"]
        folder = Path(model).expanduser()
        return model.startswith(cls.families) or (folder.is_dir() and bool(head_files(folder)))

    @classmethod
    def check_folder(cls, folder: Path, key: str) -> None:
        if HEADS[0] not in head_files(folder):
            raise UserError(
                f"{key}: {folder} has no weights {HEADS[0]} in model.safetensors, so it is no"
                " general preference model; give general-preference/GPM-Llama-3.1-8B or a folder"
                " with its files"
            )

    def load(self, folder: Path, dtype: torch.dtype) -> None:
        from safetensors import safe_open
        from transformers import AutoModel

        from sppo.policies.models import load_config, load_whole

        self.backbone = load_whole(
            AutoModel,
            folder,
            head=False,
            others=("value_head.", "prompt_head."),
            what="a general preference model",
            config=load_config(folder),
            dtype=dtype,
        )
        self.backbone.to(self.device)  # type: ignore[arg-type]  # transformers' decorator hides `self`
        self.backbone.eval()
        self.heads = {}
        for name, file in head_files(folder).items():
            with safe_open(file, "pt") as opened:
                self.heads[name] = opened.get_tensor(name).float()
        entries = len(self.heads["value_head.weight"])
        blocks = self.heads.get("prompt_head.weight")
        if entries % 2 or (blocks is not None and len(blocks) != entries // 2):
            raise UserError(
                f"the heads of {folder} do not fit: value_head has {entries} rows, which must be"
                " even and twice those of prompt_head; give the files of a general preference model"
            )

    def all_pair_logits(self, groups: list[Group]) -> list[np.ndarray]:
        from sppo.preferences.chat_reading import states_at

        read = {
            (index, text): self._ids(index, group, text)
            for index, group in enumerate(groups)
            for text in dict.fromkeys(group.responses)
        }
        sequences = [ids for ids, _ in read.values()]
        places = [[end, len(ids) - 1] for ids, end in read.values()]
        found = states_at(self.backbone, sequences, places, self.batch_tokens, self.device)
        states = dict(zip(read, found, strict=True))
        return [
            self._logits([states[index, text] for text in group.responses])
            for index, group in enumerate(groups)
        ]

    def _ids(self, index: int, group: Group, text: str) -> tuple[list[int], int]:
        """The token ids of the chat with this response, and the place of the prompt's end."""
        *chat, answer = self.reader.safe([*group.chat, {"role": "assistant", "content": text}])
        prompt = self.reader.rendered(index, chat, answer_next=False)
        whole = self.reader.rendered(index, [*chat, answer], answer_next=False)
        before = self.reader.ids(index, prompt, add_special_tokens=True)
        ids = self.reader.ids(index, whole, add_special_tokens=True)
        end_of_text = self.reader.tokenizer.eos_token_id
        last = end_of_text if isinstance(end_of_text, int) else ids[-1]
        return [*ids[:-1], last], len(before) - 1

    def _logits(self, states: list[torch.Tensor]) -> np.ndarray:
        """Logits (K, K) from the states (2, H) of K responses: prompt's end, response's end."""
        import numpy as np
        import torch
        from torch.nn import functional

        if not states:
            return np.zeros((0, 0))
        ends = torch.stack([state[1] for state in states])
        vectors = functional.normalize(ends @ self.heads["value_head.weight"].T, dim=-1).double()
        weights = self.heads.get("prompt_head.weight")
        blocks = vectors.shape[1] // 2
        scale = torch.ones(blocks, dtype=torch.double)
        if weights is not None:
            scale = (weights @ states[0][0]).double().softmax(-1)
        first, second = vectors[:, 0::2] * scale, vectors[:, 1::2]
        return ((first @ second.T - (first @ second.T).T) / TAU).numpy()
