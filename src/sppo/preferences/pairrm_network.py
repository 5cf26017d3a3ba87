"""PairRM on plain transformers: the published weights, without llm-blender.

LLM-Blender, Jiang et al. 2023, arXiv 2306.02561; weights llm-blender/PairRM and llm-blender/PairRM-hf. DeBERTa-v3 reads an
instruction with both answers,

    [CLS]<|source|>...[SEP] [CLS]<|candidate1|>...[SEP] [CLS]<|candidate2|>...[SEP]

each text cut at its own limit, and the logit that the first answer beats the second is h(source, candidate1) -
h(source, candidate2), where h is a small network on the last hidden states of the three marks. tests/parity holds this to
llm-blender 0.0.2, whose layout of inputs and weights is kept. Where we depart from it:

* What a prompt leaves of its limit is lent to its own answers. llm-blender lends what the longest prompt of a batch leaves,
  so that logits depend on the batch; `truncate_together` takes that many prompts to a batch as it does. At 1, which is how
  SPPO's rank.py called it and what PairRM-hf's card does, the two are the same.
* Pairs are padded to the longest of a batch of like length, not of whatever prompts came together. Changes rounding alone.
* Marks that a text spells out become spaces. llm-blender does so with [SEP]; the others make it read a wrong row, or fail.
* Answers that read the same, after truncation, are read once, and tie exactly.
* On a GPU the backbone computes in bfloat16 and the head in float32; llm-blender halves both to float16.
* The tokenizer is the checkpoint's own file. llm-blender converts that of microsoft/deberta-v3-large anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn
from transformers import DebertaV2Config, DebertaV2Model

from sppo.core.artifacts import read_json
from sppo.core.errors import UserError
from sppo.core.progress import progress
from sppo.policies.models import compute_dtype
from sppo.preferences.pairrm_files import LIMITS, check_pairrm

SOURCE, CANDIDATE, FIRST, SECOND = MARKS = (
    "<|source|>",
    "<|candidate|>",
    "<|candidate1|>",
    "<|candidate2|>",
)
SEPARATOR = "[SEP]"

# llm-blender's layout names its backbone and not its shape; this is the backbone of PairRM, so that none of it is fetched.
DEBERTA_V3_LARGE: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "max_position_embeddings": 512,
    "position_buckets": 256,
    "relative_attention": True,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "type_vocab_size": 0,
}


class PairRanker(nn.Module):
    """The network, its parameters named as in the published files."""

    def __init__(self, config: DebertaV2Config, tasks: int) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.pretrained_model = DebertaV2Model(config)
        self.head_layer = nn.Sequential(
            nn.Dropout(),
            nn.Linear(2 * hidden, hidden),
            nn.Tanh(),
            nn.Dropout(),
            nn.Linear(hidden, tasks),
        )

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, marks: torch.Tensor) -> torch.Tensor:
        """Logits (B,) that the first answer beats the second; ids and mask (B, length), places of the three marks (B, 3)."""
        states = self.pretrained_model(input_ids=ids, attention_mask=mask).last_hidden_state
        source, first, second = (
            states[torch.arange(len(ids), device=ids.device)[:, None], marks].float().unbind(1)
        )
        left, right = (
            self.head_layer(torch.cat([source, answer], dim=1)) for answer in (first, second)
        )
        return (left - right).mean(1)


class PairTokenizer:
    """Texts to token ids by the checkpoint's own tokenizer, uncut."""

    def __init__(self, folder: Path) -> None:
        try:
            self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the package raises nothing narrower
            raise UserError(
                f"{folder}/tokenizer.json is no tokenizer ({error}); copy the files of llm-blender/PairRM whole"
            ) from None
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.pad = self.tokenizer.token_to_id("[PAD]") or 0
        ids = {mark: self.tokenizer.token_to_id(mark) for mark in (*MARKS, SEPARATOR)}
        self.id = cast(dict[str, int], ids)  # None is refused below
        for mark in MARKS:
            wanted = [self.tokenizer.token_to_id("[CLS]"), self.id[mark], self.id[SEPARATOR]]
            if None in wanted or self.tokenizer.encode(mark).ids != wanted:
                raise UserError(
                    f"{folder}/tokenizer.json does not read {mark} as one token between [CLS] and [SEP], as PairRM's does; copy the files "
                    "of llm-blender/PairRM whole"
                )

    def read(self, mark: str, texts: list[str]) -> list[list[int]]:
        """Ids of each text behind its mark: [CLS] mark text [SEP]."""
        return [
            encoding.ids
            for encoding in self.tokenizer.encode_batch([mark + self.plain(text) for text in texts])
        ]

    def plain(self, text: str) -> str:
        for mark in self.id:
            text = text.replace(mark, " ")
        return text


def truncated(ids: list[int], limit: int) -> list[int]:
    """At most `limit` ids: the beginning of the text and its [SEP]."""
    return ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]]


def batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Places in `lengths`, the longest first, in batches whose padded size is within the budget; one alone always fits."""
    found: list[list[int]] = []
    for at in sorted(range(len(lengths)), key=lambda at: -lengths[at]):
        if found and (len(found[-1]) + 1) * lengths[found[-1][0]] <= budget:
            found[-1].append(at)
        else:
            found.append([at])
    return found


@dataclass
class Read:
    """One prompt and its different answers as ids, and which of them each candidate is."""

    source: list[int]
    answers: list[tuple[int, ...]]
    at: list[int]

    def pairs(self) -> list[tuple[int, int]]:
        """The ordered pairs to read: of different answers, and an answer with itself where candidates share it."""
        twice = {answer for answer in self.at if self.at.count(answer) > 1}
        return [
            (i, j)
            for i in range(len(self.answers))
            for j in range(len(self.answers))
            if i != j or i in twice
        ]


class PairRM:
    """The published preference model, ready to judge.

    folder: in one of the two published layouts. precision: auto is bfloat16 on a GPU that has it and float32 elsewhere. The
    limits, in tokens with the three that frame a text, are the checkpoint's if None. truncate_together: see the module's
    docstring. batch_tokens: at most so many tokens, padding included, in one forward pass.
    """

    def __init__(
        self,
        folder: Path,
        device: str = "cpu",
        precision: str = "auto",
        max_prompt_tokens: int | None = None,
        max_response_tokens: int | None = None,
        truncate_together: int = 1,
        batch_tokens: int = 8192,
    ) -> None:
        folder = Path(folder)
        layout, config = check_pairrm(folder), read_json(folder / "config.json")
        self.device, self.together, self.batch_tokens = device, truncate_together, batch_tokens
        limits = LIMITS | {key: config[key] for key in LIMITS if config.get(key)}
        self.max_source = max_prompt_tokens or limits["source_maxlength"]
        self.max_candidate = max_response_tokens or limits["candidate_maxlength"]
        self.text = PairTokenizer(folder)
        for key, mark in (
            ("source_prefix_id", SOURCE),
            ("cand1_prefix_id", FIRST),
            ("cand2_prefix_id", SECOND),
        ):
            if layout == "hf" and config.get(key) != self.text.id[mark]:
                raise UserError(
                    f"{folder}: config.json says {key} {config.get(key)}, and its tokenizer reads {mark} as {self.text.id[mark]}; "
                    "copy the files of llm-blender/PairRM-hf whole"
                )
        self.model = load_network(folder, config, layout).eval()
        if max(self.text.id.values()) >= self.model.pretrained_model.config.vocab_size:
            raise UserError(
                f"{folder}: its weights have no embeddings of PairRM's marks; copy the files of llm-blender/PairRM whole"
            )
        self.dtype = (
            torch.float32
            if precision == "auto" and device == "cpu"
            else compute_dtype(precision, device)
        )
        self.name = f"PairRM ({layout} layout, {str(self.dtype).removeprefix('torch.')})"
        # transformers' decorator hides `self`
        self.model.pretrained_model.to(self.dtype)  # type: ignore[arg-type]
        self.model.to(device)

    def pair_logits(self, prompt: str, candidates: list[str]) -> np.ndarray:
        """Logits that candidate i beats candidate j, read in the order (i, j): float64 (K, K), diagonal 0."""
        return self.all_pair_logits([(prompt, candidates)])[0]

    @torch.inference_mode()
    def all_pair_logits(self, groups: list[tuple[str, list[str]]]) -> list[np.ndarray]:
        """`pair_logits` of every prompt with its candidates; pairs of like length are read side by side."""
        read = self.read(groups)
        pairs = [(g, i, j) for g, group in enumerate(read) for i, j in group.pairs()]
        logits = [np.zeros((len(group.answers), len(group.answers))) for group in read]
        work = batches(
            [
                len(read[g].source) + len(read[g].answers[i]) + len(read[g].answers[j])
                for g, i, j in pairs
            ],
            self.batch_tokens,
        )
        for batch in progress(work, "compare") if len(groups) > 1 else work:
            found = self.forward(
                [
                    (read[g].source, read[g].answers[i], read[g].answers[j])
                    for g, i, j in (pairs[at] for at in batch)
                ]
            )
            for at, logit in zip(batch, found, strict=True):
                g, i, j = pairs[at]
                logits[g][i, j] = logit
        whole = [
            values[np.ix_(group.at, group.at)] for group, values in zip(read, logits, strict=True)
        ]
        for values in whole:
            np.fill_diagonal(values, 0.0)
        return whole

    def read(self, groups: list[tuple[str, list[str]]]) -> list[Read]:
        """Ids of all texts, cut; `together` prompts share what the longest of them leaves."""
        sources = [
            truncated(ids, self.max_source)
            for ids in self.text.read(SOURCE, [prompt for prompt, _ in groups])
        ]
        found = []
        for k, (source, (_, candidates)) in enumerate(zip(sources, groups, strict=True)):
            first = k - k % self.together
            lent = (self.max_source - max(map(len, sources[first : first + self.together]))) // 2
            ids = [
                tuple(truncated(answer, self.max_candidate + lent))
                for answer in self.text.read(CANDIDATE, candidates)
            ]
            answers = list(dict.fromkeys(ids))
            found.append(Read(source, answers, [answers.index(answer) for answer in ids]))
        return found

    def forward(self, triples: list[tuple[Any, Any, Any]]) -> list[float]:
        """Logits of (source, first answer, second answer), as ids, in one forward pass."""
        rows = [
            [
                *source,
                first[0],
                self.text.id[FIRST],
                *first[2:],
                second[0],
                self.text.id[SECOND],
                *second[2:],
            ]
            for source, first, second in triples
        ]
        width = max(map(len, rows))
        ids = torch.tensor(
            [row + [self.text.pad] * (width - len(row)) for row in rows], device=self.device
        )
        mask = torch.tensor(
            [[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self.device
        )
        marks = torch.tensor(
            [[1, len(source) + 1, len(source) + len(first) + 1] for source, first, _ in triples],
            device=self.device,
        )
        try:
            return self.model(ids, mask, marks).tolist()
        except torch.OutOfMemoryError:
            raise UserError(
                f"the GPU's memory is too small for {ids.numel()} tokens at once; lower preference.batch_tokens ({self.batch_tokens})"
            ) from None


def load_network(folder: Path, config: dict[str, Any], layout: str) -> PairRanker:
    """The network with the folder's weights, float32. Weights that do not fit it are a UserError."""
    weights = load_file(folder / "model.safetensors")
    weights.pop(
        "pretrained_model.embeddings.position_ids", None
    )  # a constant that old versions of transformers saved
    try:
        if layout == "hf":
            shape = DebertaV2Config.from_pretrained(folder)
        elif config.get("model_name") == "microsoft/deberta-v3-large":
            shape = DebertaV2Config(**DEBERTA_V3_LARGE)
        else:
            shape = DebertaV2Config.from_pretrained(str(config.get("model_name")))
        shape.vocab_size = len(
            weights["pretrained_model.embeddings.word_embeddings.weight"]
        )  # the marks were added to the backbone's
        network = PairRanker(shape, len(weights["head_layer.4.weight"]))
        network.load_state_dict(weights)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{folder} has another layout than PairRM: its weights do not fit its backbone {config.get('model_name', '')} "
            f"({str(error).splitlines()[-1].strip()}); give the files of llm-blender/PairRM or llm-blender/PairRM-hf"
        ) from None
    return network
