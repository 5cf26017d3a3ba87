"""PairRM on plain transformers: the published weights, without llm-blender.

Source: LLM-Blender, Jiang et al. 2023, arXiv 2306.02561; weights llm-blender/PairRM and
llm-blender/PairRM-hf. DeBERTa-v3 reads an instruction with two answers,

    [CLS]<|source|>...[SEP] [CLS]<|candidate1|>...[SEP] [CLS]<|candidate2|>...[SEP]

where each text is truncated to its own limit. The logit that the first answer beats the second is
h(source, candidate1) - h(source, candidate2), where h is a small network on the last hidden states
of the three marks. The layout of inputs and weights is llm-blender's. tests/parity compares the
logits with llm-blender 0.0.2. Departures from llm-blender:

* If a prompt is shorter than its limit, half of the rest is added to the limit of each of its
  answers. llm-blender uses the rest that the longest prompt of a batch leaves, so its logits depend
  on the batch. `truncate_together` sets the number of prompts in such a batch. At 1 the two agree;
  SPPO's rank.py and the model card of PairRM-hf use 1.
* A batch contains pairs of similar length, from any prompts, and is padded to its longest pair.
  This changes only rounding.
* Marks that a text spells out become spaces. llm-blender does so only with [SEP]; the other marks
  make it read a wrong row, or fail.
* Answers that are equal after truncation are read once, and tie exactly.
* In bfloat16 the backbone computes in it and the head in float32. On a GPU llm-blender computes
  both in float16, on a CPU in float32.
* The tokenizer is the checkpoint's own file. llm-blender converts the one of
  microsoft/deberta-v3-large.
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
from sppo.policies.devices import compute_dtype
from sppo.policies.padding import padded
from sppo.preferences.deberta_attention import attend_by_distance
from sppo.preferences.length_batches import batches
from sppo.preferences.pairrm_files import LIMITS, check_pairrm

SOURCE = "<|source|>"
CANDIDATE = "<|candidate|>"  # replaced by FIRST or SECOND when a pair is read
FIRST = "<|candidate1|>"
SECOND = "<|candidate2|>"
MARKS = (SOURCE, CANDIDATE, FIRST, SECOND)
SEPARATOR = "[SEP]"

# llm-blender's layout gives the name of the backbone, but not its shape. This is the shape of
# PairRM's backbone, so that nothing is downloaded.
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
    """The network. Its parameters have the names of the published files."""

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
        """Logits (B,) that the first answer beats the second.

        ids, mask: (B, length). marks: (B, 3), the positions of the three marks in each row.
        """
        states = self.pretrained_model(input_ids=ids, attention_mask=mask).last_hidden_state
        rows = torch.arange(len(ids), device=ids.device)[:, None]
        source, first, second = states[rows, marks].float().unbind(1)
        score_of_first = self.head_layer(torch.cat([source, first], dim=1))
        score_of_second = self.head_layer(torch.cat([source, second], dim=1))
        return (score_of_first - score_of_second).mean(1)


class PairTokenizer:
    """Turns texts into token ids with the checkpoint's own tokenizer, without truncation.

    UserError if the tokenizer is broken or does not have PairRM's marks.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the package raises no narrower type
            raise UserError(
                f"{folder}/tokenizer.json is not a tokenizer ({error}); copy all files of "
                "llm-blender/PairRM again"
            ) from None
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.pad = self.tokenizer.token_to_id("[PAD]") or 0
        ids = {mark: self.tokenizer.token_to_id(mark) for mark in (*MARKS, SEPARATOR)}
        self.id = cast(dict[str, int], ids)  # the loop refuses None
        for mark in MARKS:
            wanted = [self.tokenizer.token_to_id("[CLS]"), self.id[mark], self.id[SEPARATOR]]
            if None in wanted or self.tokenizer.encode(mark).ids != wanted:
                raise UserError(
                    f"{folder}/tokenizer.json does not read {mark} as one token between [CLS] and "
                    "[SEP], as PairRM's does; copy all files of llm-blender/PairRM again"
                )

    def read(self, mark: str, texts: list[str]) -> list[list[int]]:
        """Ids of each text after its mark: [CLS] mark text [SEP]."""
        encodings = self.tokenizer.encode_batch([mark + self.plain(text) for text in texts])
        return [encoding.ids for encoding in encodings]

    def plain(self, text: str) -> str:
        """The text with a space for each mark that it spells out."""
        for mark in self.id:
            text = text.replace(mark, " ")
        return text


def truncated(ids: list[int], limit: int) -> list[int]:
    """At most `limit` ids: the beginning of the text and its [SEP]."""
    return ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]]


@dataclass
class TokenizedPrompt:
    """The ids of a prompt and of its different answers.

    answer_of: the index into `answers` of each candidate.
    """

    source: list[int]
    answers: list[tuple[int, ...]]
    answer_of: list[int]

    def pairs(self) -> list[tuple[int, int]]:
        """The ordered pairs of answers to read.

        An answer is paired with every other answer, and with itself if several candidates share it.
        """
        shared = {answer for answer in self.answer_of if self.answer_of.count(answer) > 1}
        return [
            (i, j)
            for i in range(len(self.answers))
            for j in range(len(self.answers))
            if i != j or i in shared
        ]


class PairRM:
    """The published preference model, ready to judge.

    folder: the model in one of the two published layouts. precision: auto is bfloat16 where the
    hardware supports it and float32 otherwise. The limits are in tokens and include [CLS], the mark
    and [SEP]; None means the checkpoint's limit. truncate_together: see the module's docstring.
    batch_tokens: the maximum number of tokens in one forward pass, padding included. UserError if
    the folder is not a PairRM.
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
        layout = check_pairrm(folder)
        config = read_json(folder / "config.json")
        self.device = device
        self.together = truncate_together
        self.batch_tokens = batch_tokens
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
                    f"{folder}: config.json has {key} {config.get(key)}, but the tokenizer reads "
                    f"{mark} as {self.text.id[mark]}; copy all files of llm-blender/PairRM-hf again"
                )
        self.model = load_network(folder, config, layout).eval()
        if max(self.text.id.values()) >= self.model.pretrained_model.config.vocab_size:
            raise UserError(
                f"{folder}: its weights have no embeddings of PairRM's marks; copy all files of "
                "llm-blender/PairRM again"
            )
        self.dtype = compute_dtype(precision, device)
        self.name = f"PairRM ({layout} layout, {str(self.dtype).removeprefix('torch.')})"
        # The decorator of transformers hides `self`.
        self.model.pretrained_model.to(self.dtype)  # type: ignore[arg-type]
        self.model.to(device)
        if self.dtype == torch.bfloat16:
            attend_by_distance(self.model.pretrained_model)

    @torch.inference_mode()
    def all_pair_logits(self, groups: list[tuple[str, list[str]]]) -> list[np.ndarray]:
        """Logits that candidate i beats candidate j, read in the order (i, j), of every prompt.

        Each is float64 (K, K) with diagonal 0. A batch contains pairs of similar length, from any
        prompts.
        """
        prompts = self.read(groups)
        # Each pair: the index of its prompt, and the indices of its two answers.
        pairs = [(p, i, j) for p, prompt in enumerate(prompts) for i, j in prompt.pairs()]
        triples = [
            (prompts[p].source, prompts[p].answers[i], prompts[p].answers[j]) for p, i, j in pairs
        ]
        lengths = [sum(len(text) for text in triple) for triple in triples]
        logits = [np.zeros((len(prompt.answers), len(prompt.answers))) for prompt in prompts]
        work = batches(lengths, self.batch_tokens)
        for batch in progress(work, "compare") if len(groups) > 1 else work:
            found = self.forward([triples[index] for index in batch])
            for index, logit in zip(batch, found, strict=True):
                p, i, j = pairs[index]
                logits[p][i, j] = logit
        # From different answers to candidates: candidates with the same answer share its logits.
        of_candidates = [
            values[np.ix_(prompt.answer_of, prompt.answer_of)]
            for prompt, values in zip(prompts, logits, strict=True)
        ]
        for values in of_candidates:
            np.fill_diagonal(values, 0.0)
        return of_candidates

    def read(self, groups: list[tuple[str, list[str]]]) -> list[TokenizedPrompt]:
        """The truncated ids of all texts.

        In each batch of `together` prompts, half of what the longest prompt leaves of its limit is
        added to the limit of each answer.
        """
        sources = [
            truncated(ids, self.max_source)
            for ids in self.text.read(SOURCE, [prompt for prompt, _ in groups])
        ]
        found = []
        for k, (source, (_, candidates)) in enumerate(zip(sources, groups, strict=True)):
            start = k - k % self.together
            longest = max(map(len, sources[start : start + self.together]))
            limit = self.max_candidate + (self.max_source - longest) // 2
            ids = [
                tuple(truncated(answer, limit)) for answer in self.text.read(CANDIDATE, candidates)
            ]
            answers = list(dict.fromkeys(ids))
            answer_of = [answers.index(answer) for answer in ids]
            found.append(TokenizedPrompt(source, answers, answer_of))
        return found

    def inputs(
        self, triples: list[tuple[Any, Any, Any]]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The network's arguments for triples (source, first answer, second answer) of ids."""
        # The first two ids of an answer are [CLS] and CANDIDATE.
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
        ids, mask = padded(rows, self.text.pad, self.device)
        marks = torch.tensor(
            [[1, len(source) + 1, len(source) + len(first) + 1] for source, first, _ in triples],
            device=self.device,
        )
        return ids, mask, marks

    def forward(self, triples: list[tuple[Any, Any, Any]]) -> list[float]:
        """Logits of triples in one forward pass. UserError if the GPU's memory is too small."""
        inputs = self.inputs(triples)
        try:
            return self.model(*inputs).tolist()
        except torch.OutOfMemoryError:
            raise UserError(
                f"the GPU's memory is too small for {inputs[0].numel()} tokens at once; lower "
                f"preference.batch_tokens ({self.batch_tokens})"
            ) from None


def load_network(folder: Path, config: dict[str, Any], layout: str) -> PairRanker:
    """The network with the folder's weights, float32. UserError if the weights do not fit."""
    weights = load_file(folder / "model.safetensors")
    # Old versions of transformers saved this constant.
    weights.pop("pretrained_model.embeddings.position_ids", None)
    try:
        if layout == "hf":
            shape = DebertaV2Config.from_pretrained(folder)
        elif config.get("model_name") == "microsoft/deberta-v3-large":
            shape = DebertaV2Config(**DEBERTA_V3_LARGE)
        else:
            shape = DebertaV2Config.from_pretrained(str(config.get("model_name")))
        # The marks were added to the backbone's vocabulary.
        shape.vocab_size = len(weights["pretrained_model.embeddings.word_embeddings.weight"])
        network = PairRanker(shape, len(weights["head_layer.4.weight"]))
        network.load_state_dict(weights)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(
            f"{folder} has another layout than PairRM: its weights do not fit its backbone "
            f"{config.get('model_name', '')} ({reason}); give the files of llm-blender/PairRM or "
            "llm-blender/PairRM-hf"
        ) from None
    return network
