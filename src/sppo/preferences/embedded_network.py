"""The embedded preference model: a skew-symmetric preference embedding on a small language model.

The model is a General Preference Model (GPM, Zhang et al. 2024, arXiv 2410.02197, section 3). It
reads each (instruction, answer) once and maps it to an embedding e in R^d, d even. The logit that
answer i beats answer j is

    s(i, j) = e_i^T R e_j,   R = blockdiag([[0, -1], [1, 0]], ...)                 (eq. 3 and 4)

and P(i beats j) = sigma(s). R is skew-symmetric, so P(i, j) + P(j, i) = 1 by construction. K
answers need K forward passes instead of K(K - 1). The model can represent cyclic preferences: with
d = 2 and e = (1, r) it is the Bradley-Terry model with reward r; a larger d is more general.

Departures from the paper:
* The backbone is only the lower layers of the language model. A linear probe showed that the middle
  layers predict GPT-4's preferences better than the last layer, and they cost half as much.
* The embedding uses the mean of the states over the answer's tokens as well as the last state.
* The embedding uses the answer's relevance: the similarity of the states of instruction and answer.
  Without it, the model hardly notices an answer to another question.
* There is no eigenvalue gate on R.
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
from sppo.policies.devices import compute_dtype
from sppo.policies.models import load_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The keys that ranker.json must have.
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
OMISSION = " [...] "  # replaces the omitted middle of a long text
PLACEHOLDER = "\x00"  # marks the instruction's place in the chat template
# A higher relevance than this has no further effect. Most answers reach it, and an answer must gain
# nothing by repeating the instruction.
RELEVANCE_CAP = 0.2
HEAD_RATE = 1e-3  # learning rate of the head
RELEVANCE_RATE = 1e-2  # learning rate of a single weight, which is of order 1
# The states that the embedding is computed from; see `PreferenceEmbedder.states`.
STATES = ("instruction", "mean", "last")


class LoraLinear(nn.Module):
    """A frozen linear layer plus a trainable low-rank update (LoRA, 2106.09685, eq. 3).

    The update is stored in float32 and computed in the type of the input. B starts at zero.
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

    backbone: a Llama-like transformers model without its language head; its upper layers are
    removed. spec: `layers` (the number of layers that are kept), `lora_from` (the first layer with
    an update), `lora_rank`, `dimensions` (d), and the limits of `PairText`. seed: of the initial
    weights.
    """

    # register_buffer sets these attributes, which type checkers do not see.
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
        self.text = PairText(tokenizer, spec["max_prompt_tokens"], spec["max_answer_tokens"])
        self.backbone = keep_lower_layers(backbone, spec["layers"]).requires_grad_(False)
        add_lora(self.backbone.layers[spec["lora_from"] :], spec["lora_rank"], generator)
        hidden = self.backbone.config.hidden_size
        # States are standardised by constants that are computed from training data before the first
        # step, because a few dimensions of a language model's hidden states are a hundred times
        # larger than the others.
        for name in STATES:
            self.register_buffer(f"{name}_center", torch.zeros(hidden))
            self.register_buffer(f"{name}_scale", torch.ones(hidden))
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(2 * hidden, spec["dimensions"])
        # `forward` adds 10 * relevance, multiplied by this weight, to the second entry of e.
        self.relevance = nn.Parameter(torch.tensor(1.0))
        self._start_near_a_reward(generator)

    @torch.no_grad()
    def _start_near_a_reward(self, generator: torch.Generator) -> None:
        """Initialise the head so that e is near (1, r, 0, 0, ...): logits near r_i - r_j."""
        self.head.weight.copy_(0.01 * torch.randn(self.head.weight.shape, generator=generator))
        self.head.bias.zero_()
        self.head.bias[0] = 1.0

    def states(self, instruction: str, answers: list[str]) -> dict[str, torch.Tensor]:
        """Hidden states of an instruction and its K answers, float32.

        `instruction`: the mean over the instruction's tokens, (hidden,). `mean`: the mean over the
        tokens of each answer, (K, hidden). `last`: the last state of each answer, (K, hidden).

        One sequence contains the prompt once, followed by all answers. Each answer attends only to
        the prompt and itself, at the positions that it would have alone. There is no padding, and
        the result does not depend on other prompts.
        """
        device = self.mean_center.device
        prompt = self.text.prompt(instruction)
        texts = [self.text.answer(answer) for answer in answers]
        parts = [prompt, *texts]
        lengths = [len(ids) for ids in texts]
        ids = torch.tensor([token for part in parts for token in part], device=device)
        # The part that each token belongs to: 0 is the prompt, k the k-th answer.
        part_of = torch.repeat_interleave(
            torch.arange(len(parts)), torch.tensor([len(prompt), *lengths])
        ).to(device)
        # Each answer's positions start after the prompt.
        positions = [torch.arange(len(prompt))]
        for length in lengths:
            positions.append(torch.arange(len(prompt), len(prompt) + length))
        position = torch.cat(positions).to(device)
        same_part_or_prompt = (part_of[:, None] == part_of) | (part_of == 0)
        attends = same_part_or_prompt & (position[:, None] >= position)
        output = self.backbone(
            input_ids=ids[None],
            attention_mask=attends[None, None],
            position_ids=position[None],
            use_cache=False,
        )
        states = output.last_hidden_state[0].float()
        of_answers = states[len(prompt) :].split(lengths)
        return {
            "instruction": states[self.text.instruction(prompt)].mean(0),
            "mean": torch.stack([answer.mean(0) for answer in of_answers]),
            "last": torch.stack([answer[-1] for answer in of_answers]),
        }

    def forward(self, instruction: str, answers: list[str]) -> torch.Tensor:
        """Embeddings, float32 (K, d), of K answers to one instruction."""
        z = {
            name: (state - getattr(self, f"{name}_center")) / getattr(self, f"{name}_scale")
            for name, state in self.states(instruction, answers).items()
        }
        similarity = nn.functional.cosine_similarity(z["mean"], z["instruction"], dim=1)
        relevance = similarity.clamp(max=RELEVANCE_CAP)
        e = self.head(self.dropout(torch.cat([z["mean"], z["last"]], dim=1)))
        # (K, d) with 10 * relevance in the second column and 0 elsewhere.
        in_second_entry = nn.functional.pad(10 * relevance[:, None], (1, e.shape[1] - 2))
        return e + self.relevance * in_second_entry

    @torch.no_grad()
    def standardise(self, groups: list[tuple[str, list[str]]]) -> None:
        """Set the constants that standardise states, from instructions and their answers."""
        seen = [self.states(instruction, answers) for instruction, answers in groups]
        for name in STATES:
            rows = torch.cat([states[name].reshape(-1, states[name].shape[-1]) for states in seen])
            getattr(self, f"{name}_center").copy_(rows.mean(0))
            getattr(self, f"{name}_scale").copy_(rows.std(0) + 1e-3)

    def adapter(self) -> dict[str, torch.Tensor]:
        """All tensors that differ from the base model: what was trained, and the constants."""
        own = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        own |= {name for name, _ in self.named_buffers(recurse=False)}
        return {
            name: tensor.detach().cpu() for name, tensor in self.state_dict().items() if name in own
        }

    @torch.no_grad()
    def merge(self) -> None:
        """Add the low-rank updates to the weights, so that inference costs as much as the base."""
        for module in list(self.backbone.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, LoraLinear):
                    child.base.weight += (child.B @ child.A).to(child.base.weight)
                    setattr(module, name, child.base)


def optimizer_of(
    model: PreferenceEmbedder, learning_rate: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW and its schedule: warm-up, then linear decay to zero at `steps`.

    learning_rate: of the low-rank updates. The head and the weight of the relevance have their own.
    """
    lora = [
        weight
        for name, weight in model.named_parameters()
        if weight.requires_grad and name.startswith("backbone")
    ]
    optimizer = torch.optim.AdamW(
        [
            {"params": lora, "lr": learning_rate, "weight_decay": 0.0},
            {"params": list(model.head.parameters()), "lr": HEAD_RATE, "weight_decay": 0.1},
            {"params": [model.relevance], "lr": RELEVANCE_RATE, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
    )
    warm_up = max(1, steps // 15)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up)),
    )
    return optimizer, schedule


def clip_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Scale the gradients of all weights down to a norm of at most 1."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    nn.utils.clip_grad_norm_(weights, 1.0)


def keep_lower_layers(backbone: Any, layers: int) -> Any:
    """Remove all but the first `layers` layers from a Llama-like model; return the model."""
    backbone.layers = backbone.layers[:layers]
    backbone.config.num_hidden_layers = layers
    backbone.norm = nn.Identity()  # the final norm belongs to the last layer, which is removed
    return backbone


def add_lora(layers: Any, rank: int, generator: torch.Generator) -> None:
    """Replace each linear layer of attention and MLP with a `LoraLinear`, in place."""
    for layer in layers:
        for block in (layer.self_attn, layer.mlp):
            for name, child in list(block.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(block, name, LoraLinear(child, rank, generator))


def skew_logits(e: torch.Tensor) -> torch.Tensor:
    """s(i, j) = e_i^T R e_j for embeddings e (K, d), d even: (K, K), exactly skew-symmetric.

    GPM (2410.02197), eq. 3, with R = blockdiag([[0, -1], [1, 0]], ...). Each block adds
    e_i[1] e_j[0] - e_i[0] e_j[1].
    """
    products = e[:, 1::2] @ e[:, 0::2].T
    return products - products.T


def length_gaps(texts: list[str]) -> np.ndarray:
    """log(1 + characters of text i) - log(1 + characters of text j): (K, K), skew-symmetric."""
    logs = np.log1p([len(text.strip()) for text in texts])
    return logs[:, None] - logs[None, :]


class PairText:
    """Turns an instruction and its answers into token ids, always in the same way.

    The instruction is the user's turn in the model's own chat template. The answer is the
    assistant's turn and ends with the end-of-turn token. Control tokens that a text spells out are
    read as plain characters. A text longer than its limit is shortened: three quarters of the limit
    are its beginning, one quarter is its end, with ` [...] ` between. The end is kept because it
    shows whether an answer was broken off.
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
        # The result is a str because there is one chat and tokenize is False.
        before, after = cast(str, text).split(PLACEHOLDER)
        self.before = tokenizer(before, add_special_tokens=False).input_ids
        self.after = tokenizer(after, add_special_tokens=False).input_ids
        self.omission = self.plain(OMISSION)

    def plain(self, text: str) -> list[int]:
        """Ids of a text, without control tokens, even if the text spells one out."""
        if not text:
            return []
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def shorten(self, ids: list[int], limit: int) -> list[int]:
        """At most `limit` ids: beginning, omission mark and end (beginning to end is 3 : 1)."""
        if len(ids) <= limit:
            return ids
        room = limit - len(self.omission)
        tail = room // 4
        return ids[: room - tail] + self.omission + ids[len(ids) - tail :]

    def prompt(self, instruction: str) -> list[int]:
        """Ids of the chat up to the assistant's answer."""
        ids = self.shorten(self.plain(instruction.strip()), self.max_prompt)
        return self.before + ids + self.after

    def instruction(self, prompt_ids: list[int]) -> slice:
        """The instruction's place in the ids of `prompt`; all ids if the instruction is empty."""
        start = len(self.before)
        end = len(prompt_ids) - len(self.after)
        return slice(start, end) if end > start else slice(None)

    def answer(self, text: str) -> list[int]:
        """Ids of an answer and the end-of-turn token, which is the only id of an empty answer."""
        ids = self.shorten(self.plain(text.strip()), self.max_answer)
        return ids + [self.tokenizer.eos_token_id]


def load_base(
    base_dir: Path, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The backbone and the tokenizer of a Hugging Face folder. UserError if it is unusable."""
    from transformers import AutoModel, AutoTokenizer

    base_dir = Path(base_dir)
    if not (base_dir / "config.json").is_file():
        raise UserError(
            f"no model folder {base_dir}: make it with `.venv/bin/snakemake --cores all "
            "results/models/SmolLM2-135M-Instruct`, or give another with --base"
        )
    model = load_whole(AutoModel, base_dir, head=False, dtype=dtype, local_files_only=True)
    try:
        return model.eval(), AutoTokenizer.from_pretrained(base_dir, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the tokenizer of {base_dir}: {error}") from None


class EmbeddedRanker:
    """A trained preference model, ready to judge: `data/ranker` or `data/judge` on its base model.

    adapter_dir: a folder that `train_ranker.py` wrote. base_dir: the base model's Hugging Face
    folder. dtype: "auto" (see `models.compute_dtype`), "float32" or "bfloat16". UserError if a file
    does not exist, is broken, or was made for another base.
    """

    def __init__(self, adapter_dir: Path, base_dir: Path, device: str = "cpu") -> None:
        adapter_dir = Path(adapter_dir)
        for name in ("ranker.json", "adapter.safetensors"):
            if not (adapter_dir / name).is_file():
                raise UserError(f"{adapter_dir} is not a preference model: it has no {name}")
        try:
            self.spec = read_json(adapter_dir / "ranker.json")
            weights = load_file(adapter_dir / "adapter.safetensors")
        except (ValueError, SafetensorError) as error:
            raise UserError(f"{adapter_dir} is broken: {error}") from None
        lacking = [key for key in SPEC if not isinstance(self.spec, dict) or key not in self.spec]
        if lacking:
            raise UserError(f"{adapter_dir}/ranker.json is broken: it has no {lacking[0]}")
        self.name = self.spec["name"]
        compute = compute_dtype("auto", device)
        backbone, tokenizer = load_base(base_dir, torch.float32)
        shape = [
            backbone.config.hidden_size,
            backbone.config.num_hidden_layers,
            backbone.config.vocab_size,
        ]
        if shape != self.spec["base_shape"]:
            raise UserError(
                f"{adapter_dir} was trained on {self.spec['base']} (hidden size, layers, "
                f"vocabulary {self.spec['base_shape']}), but {base_dir} has {shape}"
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
        # Each text is read once, in sorted order. So identical candidates tie exactly, and the
        # order of the candidates does not change the result, not even by rounding.
        unique = sorted(set(candidates))
        embeddings = self.model(prompt, unique)
        logits = self.spec["logit_scale"] * skew_logits(embeddings.double()).cpu().numpy()
        logits += self.spec["length_weight"] * length_gaps(unique)
        at = [unique.index(text) for text in candidates]
        return logits[np.ix_(at, at)]
