"""The embedded preference model: a skew-symmetric preference embedding on a small language model.

General Preference Model, Zhang et al. 2024, arXiv 2410.02197, section 3. Each (instruction, answer) is
read once and becomes an embedding e in R^d, d even. The logit that answer i beats answer j is

    s(i, j) = e_i^T R e_j,   R = blockdiag([[0, -1], [1, 0]], ...)                     (eq. 3 and 4)

and P(i beats j) = sigma(s). R is skew-symmetric, so P(i, j) + P(j, i) = 1 by construction, K answers
need K forward passes instead of K(K - 1), and cyclic preferences can be represented: with d = 2 and
e = (1, r) it is Bradley-Terry with reward r, with more it is not.

Where we depart from the paper: the backbone is the lower layers of the language model alone (its middle
layers predict GPT-4's preferences better than its last, as a linear probe showed, and cost half); it is
read out by the mean over the answer's tokens beside the last token, and by the answer's relevance, how
alike the states of instruction and answer are (without it, an answer to another question is hardly
noticed); and there is no eigenvalue gate on R.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from sppo.core.artifacts import read_json
from sppo.core.errors import UserError
from sppo.core.progress import progress
from sppo.policies.models import compute_dtype, load_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What ranker.json must say.
SPEC = (
    "name",
    "base",
    "base_shape",
    "layers",
    "lora_from",
    "lora_rank",
    "dimensions",
    "max_prompt_tokens",
    "max_answer_tokens",
    "logit_scale",
    "length_weight",
)
OMISSION = " [...] "  # stands where the middle of a long text was left out
PLACEHOLDER = "\x00"  # marks the instruction's place in the chat template
ENOUGH = (
    0.2  # relevance above it counts no more: most answers have that much, and echoing must not pay
)


class LoraLinear(nn.Module):
    """A frozen linear layer plus a trainable low-rank update (2106.09685, eq. 3).

    The update is kept in float32 and computed in the frozen layer's type. B starts at zero.
    """

    def __init__(self, base: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        noise = torch.randn(rank, base.in_features, generator=generator)
        self.A = nn.Parameter(noise / base.in_features**0.5)
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + (x @ self.A.to(x.dtype).T) @ self.B.to(x.dtype).T


class PreferenceEmbedder(nn.Module):
    """(instruction, answers) -> embeddings (K, d). See the module's docstring.

    backbone: a Llama-like transformers model without its language head; its upper layers are dropped.
    spec: `layers` kept, `lora_from` (the first layer with an update), `lora_rank`, `dimensions` d, and the
    limits of `PairText`.
    """

    # Set by register_buffer, whose names type checkers do not see.
    instruction_center: torch.Tensor
    instruction_scale: torch.Tensor
    mean_center: torch.Tensor
    mean_scale: torch.Tensor
    last_center: torch.Tensor
    last_scale: torch.Tensor

    def __init__(
        self,
        backbone: Any,
        tokenizer: PreTrainedTokenizerBase,
        spec: dict[str, Any],
        seed: int = 0,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        backbone.layers = backbone.layers[: spec["layers"]]
        backbone.config.num_hidden_layers = spec["layers"]
        backbone.norm = nn.Identity()  # the final norm belongs to the last layer, which is gone
        self.backbone = backbone.requires_grad_(False)
        self.text = PairText(tokenizer, spec["max_prompt_tokens"], spec["max_answer_tokens"])
        for layer in backbone.layers[spec["lora_from"] :]:
            for block in (layer.self_attn, layer.mlp):
                for name, child in list(block.named_children()):
                    if isinstance(child, nn.Linear):
                        setattr(block, name, LoraLinear(child, spec["lora_rank"], generator))
        # States are standardised by constants, taken from training data before the first step: the
        # hidden states of a language model have a few dimensions a hundred times larger than the rest.
        for part in ("instruction", "mean", "last"):
            self.register_buffer(f"{part}_center", torch.zeros(backbone.config.hidden_size))
            self.register_buffer(f"{part}_scale", torch.ones(backbone.config.hidden_size))
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(2 * backbone.config.hidden_size, spec["dimensions"])
        self.relevance = nn.Parameter(
            torch.tensor(1.0)
        )  # weight of relevance, in tenths, in e's second entry
        with torch.no_grad():  # start near e = (1, r, 0, 0, ...): close to a reward difference
            self.head.weight.copy_(0.01 * torch.randn(self.head.weight.shape, generator=generator))
            self.head.bias.zero_()
            self.head.bias[0] = 1.0

    def states(self, instruction: str, answers: list[str]) -> dict[str, torch.Tensor]:
        """Hidden states, float32: means over tokens of the instruction (hidden,) and of each answer (K, hidden),
        and each answer's last (K, hidden).

        All stand in one row, the prompt once and the answers behind it; each answer sees the prompt and itself, in the
        positions that it would have alone. Nothing is padded and nothing depends on other prompts.
        """
        device = self.mean_center.device
        prompt, texts = (
            self.text.prompt(instruction),
            [self.text.answer(answer) for answer in answers],
        )
        parts = [prompt, *texts]
        ids = torch.tensor([token for part in parts for token in part], device=device)
        part = torch.repeat_interleave(
            torch.arange(len(parts)), torch.tensor([len(ids) for ids in parts])
        ).to(device)
        place = torch.cat(
            [
                torch.arange(len(prompt)),
                *(torch.arange(len(prompt), len(prompt) + len(ids)) for ids in texts),
            ]
        ).to(device)
        sees = ((part[:, None] == part) | (part == 0)) & (place[:, None] >= place)
        states = (
            self.backbone(
                input_ids=ids[None],
                attention_mask=sees[None, None],
                position_ids=place[None],
                use_cache=False,
            )
            .last_hidden_state[0]
            .float()
        )
        each = states[len(prompt) :].split([len(ids) for ids in texts])
        return {
            "instruction": states[self.text.instruction(prompt)].mean(0),
            "mean": torch.stack([one.mean(0) for one in each]),
            "last": torch.stack([one[-1] for one in each]),
        }

    def forward(self, instruction: str, answers: list[str]) -> torch.Tensor:
        """Embeddings, float32 (K, d), of K answers to one instruction."""
        z = {
            part: (state - getattr(self, f"{part}_center")) / getattr(self, f"{part}_scale")
            for part, state in self.states(instruction, answers).items()
        }
        relevance = nn.functional.cosine_similarity(z["mean"], z["instruction"], dim=1).clamp(
            max=ENOUGH
        )
        e = self.head(self.dropout(torch.cat([z["mean"], z["last"]], dim=1)))
        return e + self.relevance * nn.functional.pad(10 * relevance[:, None], (1, e.shape[1] - 2))

    @torch.no_grad()
    def standardise(self, groups: list[tuple[str, list[str]]]) -> None:
        """Set the constants from instructions and their answers."""
        seen = [self.states(instruction, answers) for instruction, answers in groups]
        for part in ("instruction", "mean", "last"):
            rows = torch.cat([states[part].reshape(-1, states[part].shape[-1]) for states in seen])
            getattr(self, f"{part}_center").copy_(rows.mean(0))
            getattr(self, f"{part}_scale").copy_(rows.std(0) + 1e-3)

    def adapter(self) -> dict[str, torch.Tensor]:
        """What was trained, and the feature constants: all that differs from the base model."""
        own = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        own |= {name for name, _ in self.named_buffers(recurse=False)}
        return {
            name: tensor.detach().cpu() for name, tensor in self.state_dict().items() if name in own
        }

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the low-rank updates into the weights, so that inference costs what the base costs."""
        for module in list(self.backbone.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, LoraLinear):
                    child.base.weight += (child.B @ child.A).to(child.base.weight)
                    setattr(module, name, child.base)


def skew_logits(e: torch.Tensor) -> torch.Tensor:
    """s(i, j) = e_i^T R e_j for embeddings e (K, d), d even: (K, K), exactly skew-symmetric.

    GPM (2410.02197) eq. 3 with R = blockdiag([[0, -1], [1, 0]]); each block adds
    e_i[1] e_j[0] - e_i[0] e_j[1].
    """
    products = e[:, 1::2] @ e[:, 0::2].T
    return products - products.T


def length_gaps(texts: list[str]) -> np.ndarray:
    """log(1 + characters) of text i minus that of text j: (K, K), skew-symmetric."""
    logs = np.log1p([len(text.strip()) for text in texts])
    return logs[:, None] - logs[None, :]


class PairText:
    """Turns an instruction and its answers into token ids, always in the same way.

    The instruction stands in the model's own chat template as a user turn; the answer follows as the
    assistant's, closed by the end-of-turn token. Control tokens spelled out inside either text are read
    as plain characters. A text longer than its limit keeps its first three quarters and its last quarter
    with ` [...] ` between: how an answer ends tells whether it was broken off.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int, max_answer_tokens: int
    ) -> None:
        self.tokenizer = tokenizer
        self.max_prompt, self.max_answer = max_prompt_tokens, max_answer_tokens
        if not tokenizer.chat_template:
            raise UserError(
                "the preference model's base has no chat template; use an instruction-tuned base"
            )
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": PLACEHOLDER}], tokenize=False, add_generation_prompt=True
        )
        before, after = cast(str, text).split(PLACEHOLDER)  # of one chat, not made into tokens
        self.before = tokenizer(before, add_special_tokens=False).input_ids
        self.after = tokenizer(after, add_special_tokens=False).input_ids
        self.omission = self.plain(OMISSION)

    def plain(self, text: str) -> list[int]:
        """Ids of user text: never a control token, whatever the text spells."""
        if not text:
            return []
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def shorten(self, ids: list[int], limit: int) -> list[int]:
        """At most `limit` ids of the text: head, omission mark, tail (3 : 1)."""
        if len(ids) <= limit:
            return ids
        room = limit - len(self.omission)
        tail = room // 4
        return ids[: room - tail] + self.omission + ids[len(ids) - tail :]

    def prompt(self, instruction: str) -> list[int]:
        """Ids of the chat up to where the assistant answers."""
        return (
            self.before
            + self.shorten(self.plain(instruction.strip()), self.max_prompt)
            + self.after
        )

    def instruction(self, prompt_ids: list[int]) -> slice:
        """Where the instruction stands in what `prompt` gave; all of it if the instruction is empty."""
        end = len(prompt_ids) - len(self.after)
        return slice(len(self.before), end) if end > len(self.before) else slice(None)

    def answer(self, text: str) -> list[int]:
        """Ids of an answer and the end of its turn. An empty answer is the end of the turn alone."""
        return self.shorten(self.plain(text.strip()), self.max_answer) + [
            self.tokenizer.eos_token_id
        ]


def load_base(
    base_dir: Path, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The backbone and the tokenizer of a Hugging Face folder. Raises UserError where it is unusable."""
    from transformers import AutoModel, AutoTokenizer

    base_dir = Path(base_dir)
    if not (base_dir / "config.json").is_file():
        raise UserError(
            f"no model folder {base_dir}: make it with `.venv/bin/snakemake --cores all "
            "results/models/SmolLM2-135M-Instruct`, or name another with --base"
        )
    model = load_whole(AutoModel, base_dir, head=False, dtype=dtype, local_files_only=True)
    try:
        return model.eval(), AutoTokenizer.from_pretrained(base_dir, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the tokenizer of {base_dir}: {error}") from None


class EmbeddedRanker:
    """A trained preference model, ready to judge: `data/ranker` or `data/judge` on its base model.

    adapter_dir: a folder that `train_ranker.py` wrote. base_dir: the base model's Hugging Face folder.
    dtype: "auto" (see `models.compute_dtype`), "float32" or "bfloat16". Raises UserError where a file is absent,
    broken, or made for another base.
    """

    def __init__(
        self, adapter_dir: Path, base_dir: Path, dtype: str = "auto", device: str = "cpu"
    ) -> None:
        adapter_dir = Path(adapter_dir)
        for name in ("ranker.json", "adapter.safetensors"):
            if not (adapter_dir / name).is_file():
                raise UserError(f"{adapter_dir} is no preference model: it has no {name}")
        try:
            self.spec = read_json(adapter_dir / "ranker.json")
            weights = load_file(adapter_dir / "adapter.safetensors")
        except (ValueError, SafetensorError) as error:
            raise UserError(f"{adapter_dir} is broken: {error}") from None
        lacking = [key for key in SPEC if not isinstance(self.spec, dict) or key not in self.spec]
        if lacking:
            raise UserError(f"{adapter_dir}/ranker.json is broken: it has no {lacking[0]}")
        self.name = self.spec["name"]
        compute = compute_dtype(dtype, device)
        backbone, tokenizer = load_base(base_dir, torch.float32)
        ours = (
            backbone.config.hidden_size,
            backbone.config.num_hidden_layers,
            backbone.config.vocab_size,
        )
        if list(ours) != self.spec["base_shape"]:
            raise UserError(
                f"{adapter_dir} was trained on {self.spec['base']} (hidden size, layers, vocabulary "
                f"{self.spec['base_shape']}), and {base_dir} has {list(ours)}"
            )
        self.model = PreferenceEmbedder(backbone, tokenizer, self.spec).eval()
        differ = sorted(self.model.adapter().keys() ^ weights.keys())
        if differ:
            raise UserError(
                f"{adapter_dir} is broken: its adapter.safetensors and the model that "
                f"ranker.json describes differ in {len(differ)} tensors, {differ[0]} "
                "first; train it again with src/tools/train_ranker.py"
            )
        try:
            floats = {name: tensor.float() for name, tensor in weights.items()}
            self.model.load_state_dict(floats, strict=False)
        except RuntimeError as error:
            raise UserError(f"{adapter_dir} is broken: {error}") from None
        self.model.merge()
        self.model.to(device)
        self.model.backbone.to(compute)

    def all_pair_logits(self, groups: list[tuple[str, list[str]]]) -> list[np.ndarray]:
        """`pair_logits` of every prompt with its candidates."""
        return [
            self.pair_logits(prompt, candidates)
            for prompt, candidates in progress(groups, "compare")
        ]

    @torch.inference_mode()
    def pair_logits(self, prompt: str, candidates: list[str]) -> np.ndarray:
        """Logits that candidate i beats candidate j: float64 (K, K), skew-symmetric, diagonal 0.

        prompt: the raw instruction (of a conversation, the last user message). P = sigma(L) is
        calibrated: L already contains the scale fitted on held-out training instructions.
        """
        if not candidates:
            return np.zeros((0, 0))
        # Each text is read once, in sorted order: identical candidates tie exactly, and the order in
        # which candidates come does not even change the rounding.
        unique = sorted(set(candidates))
        embeddings = self.model(prompt, unique)
        logits = self.spec["logit_scale"] * skew_logits(embeddings.double()).cpu().numpy()
        logits += self.spec["length_weight"] * length_gaps(unique)
        at = [unique.index(text) for text in candidates]
        return logits[np.ix_(at, at)]
