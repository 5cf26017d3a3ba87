"""Generation: K sampled responses to each prompt, with noise that belongs to the sample and not to the batch.

transformers is the engine here; vLLM, in vllm_engine.py, has the same method and contracts.
engines.py picks one.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from sppo.core.errors import UserError
from sppo.core.progress import progress
from sppo.policies.models import (
    THOUGHT,
    THOUGHT_END,
    compute_dtype,
    load_policy,
    load_tokenizer,
    stop_token_ids,
)

BLOCK = 256  # tokens that are summed first when drawing
READ_TOGETHER = 16  # prompts
FEW, NEARLY_ALL = 20, 0.95  # of fewer responses, or a smaller share that was cut, nothing is said
# Cache layers that can hold a prompt read once and repeated for K samples. Those of linear
# attention and of state-space layers cannot: transformers does not repeat their states.
REPEATABLE_LAYERS = {DynamicLayer, DynamicSlidingWindowLayer}


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. `temperature` 0 is greedy."""

    samples: int
    temperature: float
    top_p: float
    max_new_tokens: int


def sample_seed(data_seed: int, purpose: str, prompt_id: str, sample_id: int) -> int:
    """The seed of one response, 64 bits: the same whatever shard or batch it is generated in.

    `purpose` keeps iterations and evaluations apart.
    """
    text = f"{data_seed}/{purpose}/{prompt_id}/{sample_id}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def response(
    prompt: dict[str, Any],
    sample: int,
    seed: int,
    tokens: list[int],
    stop_ids: list[int],
    tokenizer: Any,
    thoughts: str = "keep",
) -> dict[str, Any]:
    """A row of the table `responses` from the tokens that an engine gave.

    What stands behind the first stop id is dropped.
    thoughts: `strip` leaves what stands in <think>...</think> out of the text; token_ids hold it.
    """
    stop = next((i for i, token in enumerate(tokens) if token in stop_ids), None)
    kept = tokens if stop is None else tokens[: stop + 1]
    spoken = kept if stop is None else kept[:-1]
    text = tokenizer.decode(spoken, skip_special_tokens=True)
    if thoughts == "strip":
        # Some templates open the first thought themselves.
        prompt_end = tokenizer.decode(list(prompt["prompt_token_ids"])[-8:]).rstrip()
        text = without_thoughts(THOUGHT + text if prompt_end.endswith(THOUGHT) else text)
    return {
        "prompt_id": prompt["prompt_id"],
        "sample_id": sample,
        "seed": seed,
        "prompt_token_ids": list(prompt["prompt_token_ids"]),
        "token_ids": kept,
        "text": text,
        "finish_reason": "length" if stop is None else "stop",
    }


def without_thoughts(text: str) -> str:
    """The text without what stands in <think>...</think>, or behind a <think> that nothing ends."""
    if THOUGHT not in text and THOUGHT_END not in text:
        return text
    kept = ""
    while True:
        said, _, rest = text.partition(THOUGHT)
        kept += said
        _, ended, text = rest.partition(THOUGHT_END)
        if not ended:
            # Only the end of a thought may be marked.
            return kept.rpartition(THOUGHT_END)[2].strip()


def draw_tokens(
    logits: torch.Tensor, uniforms: torch.Tensor, temperature: float, top_p: float
) -> torch.Tensor:
    """Sample one token a row by inverting the cumulative distribution at that row's own uniform number.

    logits (B, V), uniforms (B,) in [0, 1); returns token ids (B,). A row's token depends on that row alone.
    top_p keeps the smallest set of most likely tokens whose probability reaches it.
    """
    probabilities = torch.softmax(
        logits.float() if temperature == 1.0 else logits.float() / temperature, dim=-1
    )
    if top_p < 1.0:
        # Sorting the whole vocabulary costs more than the model; the nucleus nearly always lies in the top few.
        ordered = probabilities.topk(min(1024, probabilities.shape[-1]), dim=-1).values
        if (ordered.sum(dim=-1) < top_p).any():
            ordered = probabilities.sort(dim=-1, descending=True).values
        inside = ordered.double().cumsum(dim=-1) - ordered < top_p
        least = ordered.masked_fill(~inside, torch.inf).amin(dim=-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    # In the order of the vocabulary: an order by probability would turn with the last bit of two like ones.
    # First the block of 256 tokens, then the token in it: only sums over blocks need double precision everywhere.
    blocks = nn.functional.pad(probabilities, (0, -probabilities.shape[-1] % BLOCK)).unflatten(
        -1, (-1, BLOCK)
    )
    block, rest = _invert(blocks.sum(dim=-1), 1.0 - uniforms)
    token, _ = _invert(blocks[torch.arange(len(block), device=block.device), block], rest)
    # Rows of NaN have no distribution. Their token must exist all the same: see FiniteLogits.
    return (block * BLOCK + token).clamp(max=probabilities.shape[-1] - 1)


def _invert(weights: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where u in (0, 1] falls among weights (B, N): index (B,), and how far into that weight, again in (0, 1].

    An index of weight 0 is never met.
    """
    cumulative = weights.double().cumsum(dim=-1)
    target = u.to(cumulative) * cumulative[:, -1]
    index = torch.searchsorted(cumulative, target[:, None]).clamp(max=weights.shape[-1] - 1)
    weight = weights.gather(-1, index).double()
    rest = (target[:, None] - cumulative.gather(-1, index) + weight) / weight
    return index.squeeze(1), rest.squeeze(1).clamp(min=torch.finfo(torch.float64).tiny, max=1.0)


class OwnNoise(LogitsProcessor):
    """Makes `generate(do_sample=False)` sample: every row draws with the noise of its own seed."""

    def __init__(self, seeds: list[int], sampling: Sampling, prompt_length: int) -> None:
        self.sampling, self.prompt_length = sampling, prompt_length
        rows = [
            np.random.Generator(np.random.Philox(seed)).random(sampling.max_new_tokens)
            for seed in seeds
        ]
        self.uniforms = torch.from_numpy(np.stack(rows))

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        step = input_ids.shape[1] - self.prompt_length
        tokens = draw_tokens(
            scores,
            self.uniforms[:, step].to(scores.device),
            self.sampling.temperature,
            self.sampling.top_p,
        )
        scores.fill_(-torch.inf).scatter_(1, tokens[:, None], 0.0)
        return scores


class FiniteLogits(LogitsProcessor):
    """Refuses logits that are NaN or infinite, which would silently give meaningless tokens.

    They are noted at every token. The note is read after the first token of a batch and at its end:
    a look at every token would make the processor wait for the GPU. Logits of -inf forbid a token;
    they are accepted unless a row has no others.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.finite: torch.Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        finite = scores.amax(dim=-1).isfinite().all()  # the maximum of a row with a NaN is NaN
        if self.finite is None:
            self.finite = finite
            self.check()
        self.finite &= finite
        return scores

    def check(self) -> None:
        """Raise a UserError if any logits seen so far were not finite."""
        if self.finite is not None and not self.finite:
            raise UserError(
                f"the policy {self.folder} gives logits that are NaN or infinite; its weights are "
                "damaged or its training diverged: train it with a lower train.learning_rate, or "
                "take another model"
            )


class PreallocatedCacheLayer(DynamicLayer):
    """A cache layer that already has room for the response.

    transformers' own copies all keys and values for every new token: on a CPU a third of the time.
    """

    def __init__(self, filled: DynamicLayer, room: int) -> None:
        super().__init__()
        keys, values = filled.keys, filled.values
        assert keys is not None and values is not None  # the prompts were read into it
        self.lazy_initialization(keys, values)
        batch, heads, length, width = keys.shape
        self.all_keys = keys.new_empty(batch, heads, length + room, width)
        self.all_values = values.new_empty(batch, heads, length + room, values.shape[-1])
        self.length = 0
        self.update(keys, values)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        end = self.length + key_states.shape[-2]
        self.all_keys[:, :, self.length : end], self.all_values[:, :, self.length : end] = (
            key_states,
            value_states,
        )
        self.length, self.keys, self.values = (
            end,
            self.all_keys[:, :, :end],
            self.all_values[:, :, :end],
        )
        return self.keys, self.values


class TransformersEngine:
    """transformers' `generate`, in batches of prompts of like length."""

    def __init__(
        self,
        folder: Path,
        *,
        precision: str,
        device: str,
        attention: str | None,
        batch_size: int,
        thoughts: str = "keep",
        template: dict[str, Any] | None = None,
    ) -> None:
        self.tokenizer, self.thoughts = load_tokenizer(folder, **(template or {})), thoughts
        self.stop_ids = stop_token_ids(folder, self.tokenizer)
        self.dtype = compute_dtype(precision, device)
        self.model = load_policy(folder, self.dtype, device, attention)
        self.model.generation_config = (
            GenerationConfig()
        )  # the model's own must not warp the logits as well
        self.folder, self.device, self.batch_size = folder, device, batch_size
        # Other models, such as those with linear attention, read a prompt K times, into a cache
        # that transformers makes.
        layers = {type(layer) for layer in DynamicCache(config=self.model.config).layers}
        takes_cache = "past_key_values" in inspect.signature(self.model.forward).parameters
        self.reads_prompts_once = takes_cache and layers <= REPEATABLE_LAYERS
        if device == "cuda":
            # With torch 2.13, cuDNN's attention gives NaN on H100 where a row begins with masked
            # tokens (github.com/pytorch/pytorch/issues/196678). Generation must pad on the left,
            # because the prompts of a batch have to end in one column.
            torch.backends.cuda.enable_cudnn_sdp(False)

    def generate(
        self, prompts: list[dict[str, Any]], sampling: Sampling, data_seed: int, purpose: str
    ) -> list[dict[str, Any]]:
        """K responses to each prompt.

        `prompts` are rows with prompt_id and prompt_token_ids. Returns rows of the table `responses`, in the
        order of the prompts and by sample_id. token_ids end in a stop id if and only if finish_reason is `stop`.
        Raises UserError if the policy gives logits that are NaN or infinite.
        """
        by_length = sorted(prompts, key=lambda row: len(row["prompt_token_ids"]))
        width = max(1, self.batch_size // sampling.samples)
        batches = [by_length[i : i + width] for i in range(0, len(by_length), width)]
        rows = [
            row
            for batch in progress(batches, "generate")
            for row in self._batch(batch, sampling, data_seed, purpose)
        ]
        place = {row["prompt_id"]: i for i, row in enumerate(prompts)}
        return sorted(rows, key=lambda row: (place[row["prompt_id"]], row["sample_id"]))

    def _batch(
        self, prompts: list[dict[str, Any]], sampling: Sampling, data_seed: int, purpose: str
    ) -> Iterator[dict[str, Any]]:
        samples = sampling.samples
        wanted = [
            (row, k, sample_seed(data_seed, purpose, row["prompt_id"], k))
            for row in prompts
            for k in range(samples)
        ]
        width = max(len(row["prompt_token_ids"]) for row in prompts)
        pad = self.stop_ids[0]  # masked out, so any id will do
        padding = [width - len(row["prompt_token_ids"]) for row in prompts]
        ids = torch.tensor(
            [
                [pad] * n + list(row["prompt_token_ids"])
                for n, row in zip(padding, prompts, strict=True)
            ]
        ).to(self.device)
        mask = torch.tensor([[0] * n + [1] * (width - n) for n in padding]).to(self.device)
        finite = FiniteLogits(self.folder)
        processors = LogitsProcessorList([finite])
        if sampling.temperature > 0:
            processors.append(OwnNoise([seed for _, _, seed in wanted], sampling, width))
        with torch.inference_mode():
            model: Any = self.model  # PreTrainedModel declares no `generate`, causal models do
            more: dict[str, Any] = {}
            if self.reads_prompts_once and width > 1:
                more["past_key_values"] = self._read_once(ids, mask, sampling)
            output = model.generate(
                ids.repeat_interleave(samples, 0),
                do_sample=False,
                attention_mask=mask.repeat_interleave(samples, 0),
                max_new_tokens=sampling.max_new_tokens,
                eos_token_id=self.stop_ids,
                pad_token_id=pad,
                logits_processor=processors,
                **more,
            )
        finite.check()
        for (row, k, seed), tokens in zip(wanted, output[:, width:].tolist(), strict=True):
            yield response(row, k, seed, tokens, self.stop_ids, self.tokenizer, self.thoughts)

    def _read_once(self, ids: torch.Tensor, mask: torch.Tensor, sampling: Sampling) -> DynamicCache:
        """Keys and values of the prompts but for their last token, each read once and repeated for its K samples.

        Prompts of like length are read together, for padding costs as much as text; the batch comes in order of length.
        """
        if any(
            type(layer) is not DynamicLayer
            for layer in DynamicCache(config=self.model.config).layers
        ):
            cache = self._read(ids, mask)  # layers with a sliding window stay as they are
            cache.batch_repeat_interleave(sampling.samples)
            return cache
        parts = []
        for rows in range(0, len(ids), READ_TOGETHER):
            part = mask[rows : rows + READ_TOGETHER]
            padding = min(
                ids.shape[1] - int(part.sum(1).max()), ids.shape[1] - 2
            )  # in all of these rows
            parts.append(self._read(ids[rows : rows + READ_TOGETHER, padding:], part[:, padding:]))
        cache = parts[0]
        for number, layer in enumerate(cache.layers):
            for name in ("keys", "values"):
                read = [getattr(part.layers[number], name) for part in parts]
                padded = [
                    nn.functional.pad(states, (0, 0, ids.shape[1] - 1 - states.shape[2], 0))
                    for states in read
                ]
                setattr(layer, name, torch.cat(padded))
        cache.batch_repeat_interleave(sampling.samples)
        room = sampling.max_new_tokens
        cache.layers = [
            PreallocatedCacheLayer(cast(DynamicLayer, layer), room) for layer in cache.layers
        ]
        return cache

    def _read(self, ids: torch.Tensor, mask: torch.Tensor) -> DynamicCache:
        """Keys and values of these rows but for their last token."""
        cache = DynamicCache(config=self.model.config)
        self.model(
            ids[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=(mask[:, :-1].cumsum(1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return cache


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What a record says of responses: tokens, mean length (None without any), how many were cut.

    Where nearly all were cut it prints a warning.
    """
    tokens = [len(row["token_ids"]) for row in rows]
    cut = sum(row["finish_reason"] == "length" for row in rows)
    if len(rows) >= FEW and cut >= NEARLY_ALL * len(rows):
        print(
            f"warning: {cut} of {len(rows)} responses were cut by max_new_tokens before they "
            "ended; raise it, or, if the policy never ends its turn, name the token that ends it as "
            "eos_token_id in its generation_config.json",
            file=sys.stderr,
        )
    return {
        "responses": len(rows),
        "tokens": sum(tokens),
        "mean_tokens": round(float(np.mean(tokens)), 1) if rows else None,
        "cut_by_max_new_tokens": cut,
    }
