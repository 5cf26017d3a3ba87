"""Language models that name the better of two responses, such as RLHFlow's pair preference model.

`preference: {model: RLHFlow/pair-preference-model-LLaMA3-8B}`, or a folder with
`kind: pairwise_lm`. The model reads a chat with two responses, A and B, as one message of a user:

    [CONTEXT] chat [RESPONSE A] first [RESPONSE B] second

and the logit that the first response wins is the logit of the next token "A" minus that of "B"
(RLHF Workflow, 2405.07863). Every pair is read in both orders, because such models have a
position bias. The chat's form and the missing BOS follow the model's card. The prompt ends with the
template's assistant header.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sppo.core.errors import UserError
from sppo.preferences.base import Group, Settings, register
from sppo.preferences.language_model import LanguageModel, architectures

if TYPE_CHECKING:
    import numpy as np
    import torch


def context_text(chat: list[dict[str, str]]) -> str:
    """A chat in the form that RLHFlow's models were trained on.

    The template on the model's card has more line breaks. transformers leaves out those that follow
    a block, and the last one.
    """
    turns = [
        f"\n<turn> {'assistant' if number % 2 else 'user'}\n {message['content']}"
        for number, message in enumerate(chat)
    ]
    return "\n" + "".join(turns) + "\n"


@register
class PairwiseModel(LanguageModel):
    """A causal language model that answers A or B."""

    kind = "pairwise_lm"
    form = "RLHFlow/pair-preference-model-LLaMA3-8B"
    families = ("RLHFlow/pair-preference-model-",)

    @classmethod
    def recognises(cls, settings: Settings) -> bool:
        return settings["model"].startswith(cls.families)

    @classmethod
    def check_folder(cls, folder: Path, key: str) -> None:
        names = architectures(folder)
        if not any("ForCausalLM" in name for name in names):
            found = ", ".join(names) or "of no named architecture"
            raise UserError(
                f"{key}: the model in {folder} is {found}; give a causal language model"
            )

    @classmethod
    def sequences(cls, samples: int) -> int:
        """Each ordered pair of responses."""
        return samples * (samples - 1)

    @classmethod
    def responses_of_sequence(cls) -> int:
        return 2

    def load(self, folder: Path, dtype: torch.dtype) -> None:
        from sppo.policies.models import load_policy

        model: Any = load_policy(folder, dtype, self.device)
        self.backbone = model.base_model
        letters = [self._letter(folder, letter) for letter in "AB"]
        self.rows = model.get_output_embeddings().weight[letters].detach().float().cpu()

    def _letter(self, folder: Path, letter: str) -> int:
        """The id of a letter, which must be one token."""
        ids = self.reader.tokenizer(letter, add_special_tokens=False).input_ids
        if len(ids) != 1:
            raise UserError(
                f"the tokenizer of {folder} writes {letter} as {len(ids)} tokens, but the kind"
                " pairwise_lm reads the logit of one; give another model"
            )
        return ids[0]

    def all_pair_logits(self, groups: list[Group]) -> list[np.ndarray]:
        import numpy as np

        from sppo.preferences.chat_reading import states_at

        sequences: dict[tuple[int, str, str], list[int]] = {}
        for index, group in enumerate(groups):
            texts = list(dict.fromkeys(group.responses))
            for first in texts:
                for second in texts:
                    if first != second:
                        sequences[index, first, second] = self._ids(index, group, first, second)
        ids = list(sequences.values())
        ends = [[len(each) - 1] for each in ids]
        states = states_at(self.backbone, ids, ends, self.batch_tokens, self.device)
        logits = {
            key: float(state[0] @ (self.rows[0] - self.rows[1]))
            for key, state in zip(sequences, states, strict=True)
        }
        return [
            np.array(
                [[logits.get((index, a, b), 0.0) for b in group.responses] for a in group.responses]
            ).reshape(len(group.responses), len(group.responses))
            for index, group in enumerate(groups)
        ]

    def _ids(self, index: int, group: Group, first: str, second: str) -> list[int]:
        """The token ids of the question which of two responses is better."""
        answers = [{"role": "assistant", "content": text} for text in (first, second)]
        *chat, a, b = self.reader.safe([*group.chat, *answers])
        question = (
            f"[CONTEXT] {context_text(chat)} [RESPONSE A] {a['content']}"
            f" [RESPONSE B] {b['content']} \n"
        )
        text = self.reader.rendered(index, [{"role": "user", "content": question}], True)
        if self.reader.tokenizer.bos_token:
            text = text.replace(str(self.reader.tokenizer.bos_token), "")
        return self.reader.ids(index, text)
