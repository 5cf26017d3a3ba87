"""Generation of K sampled responses to each prompt, with the engine transformers.

The random numbers of a response depend on the response, not on its batch. The engine vLLM in
vllm_engine.py has the same interface; engines.py chooses one of them.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import math
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from sppo.core.errors import UserError
from sppo.core.progress import progress
from sppo.policies.chats import THOUGHT, THOUGHT_END, load_tokenizer, stop_token_ids
from sppo.policies.devices import avoid_cudnn_attention, compute_dtype
from sppo.policies.models import load_policy
from sppo.policies.padding import padded
from sppo.policies.threads import Stopped, side_by_side

T = TypeVar("T")

TOKEN_BLOCK = 256  # size of the blocks of the vocabulary in `draw_tokens`
PREFILL_PROMPTS = 16  # prompts in one forward pass
# After so many tokens, the responses that have ended leave the batch, if at least this share has.
DECODED_AT_ONCE, WORTH_LEAVING = 16, 1 / 8
# Batches that a CPU generates at the same time, each with its share of the cores. Some operations
# use one core only, so this takes about 0.8 of the time of one batch after the other
# (docs/performance.md).
BATCHES_AT_ONCE = 2
# Rotary positions that a forward pass changes in the model, which threads would have in common.
CHANGING_POSITIONS = ("dynamic", "longrope")
# A warning appears if at least this many responses exist and at least this share of them was cut.
WARN_RESPONSES, WARN_SHARE_CUT = 20, 0.95
# Cache layers that can be repeated for K samples after one pass over the prompt. transformers does
# not repeat the states of linear attention and of state-space layers.
REPEATABLE_LAYERS = {DynamicLayer, DynamicSlidingWindowLayer}


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. `temperature` 0 is greedy decoding."""

    samples: int
    temperature: float
    top_p: float
    max_new_tokens: int


def sample_seed(data_seed: int, purpose: str, prompt_id: str, sample_id: int) -> int:
    """The seed of one response, 64 bits. It does not depend on the shard or the batch.

    `purpose` distinguishes iterations and evaluations, so that their seeds differ.
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
    """A row of the table `responses` from the generated tokens.

    Tokens after the first stop id are dropped. With thoughts = `strip`, the text does not contain
    <think>...</think>; token_ids do.
    """
    stop = next((i for i, token in enumerate(tokens) if token in stop_ids), None)
    if stop is None:
        token_ids = text_ids = tokens
    else:
        token_ids, text_ids = tokens[: stop + 1], tokens[:stop]
    text = tokenizer.decode(text_ids, skip_special_tokens=True)
    if thoughts == "strip":
        # Some chat templates write the <think> of the first thought into the prompt.
        prompt_end = tokenizer.decode(list(prompt["prompt_token_ids"])[-8:]).rstrip()
        if prompt_end.endswith(THOUGHT):
            text = THOUGHT + text
        text = without_thoughts(text)
    return {
        "prompt_id": prompt["prompt_id"],
        "sample_id": sample,
        "seed": seed,
        "prompt_token_ids": list(prompt["prompt_token_ids"]),
        "token_ids": token_ids,
        "text": text,
        "finish_reason": "length" if stop is None else "stop",
    }


def without_thoughts(text: str) -> str:
    """The text without <think>...</think>, and without anything after a <think> that has no end."""
    if THOUGHT not in text and THOUGHT_END not in text:
        return text
    kept = ""
    while True:
        before, _, rest = text.partition(THOUGHT)
        kept += before
        _, thought_end, text = rest.partition(THOUGHT_END)
        if not thought_end:
            # A text may have </think> without <think>; the thought is then all text before it.
            return kept.rpartition(THOUGHT_END)[2].strip()


def draw_tokens(
    logits: torch.Tensor, uniforms: torch.Tensor, temperature: float, top_p: float
) -> torch.Tensor:
    """Sample one token for each row by inverse transform sampling.

    logits (B, V); uniforms (B,) in [0, 1), one random number for each row; returns token ids (B,).
    The token of a row depends only on its logits and its number, not on the batch. top_p keeps the
    smallest set of most likely tokens whose total probability is at least top_p.
    """
    if temperature == 1.0:
        probabilities = torch.softmax(logits.float(), dim=-1)
    else:
        probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    if top_p < 1.0:
        probabilities = _nucleus(probabilities, top_p)
    # Tokens keep the order of the vocabulary. In an order by probability, rounding in the last bit
    # could exchange two tokens of almost equal probability.
    # The first step chooses a block of tokens, the second step a token of the block. Then only the
    # sums over blocks need double precision over the whole vocabulary.
    padding = -probabilities.shape[-1] % TOKEN_BLOCK
    blocks = nn.functional.pad(probabilities, (0, padding)).unflatten(-1, (-1, TOKEN_BLOCK))
    block, rest = _invert(blocks.sum(dim=-1), 1.0 - uniforms)
    rows = torch.arange(len(block), device=block.device)
    token, _ = _invert(blocks[rows, block], rest)
    # A row with NaN has no distribution, but its token id must be valid: see FiniteLogits.
    return (block * TOKEN_BLOCK + token).clamp(max=probabilities.shape[-1] - 1)


def _nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Probabilities (B, V) with 0 outside the nucleus of each row; see `draw_tokens`."""
    # Sorting the whole vocabulary would take longer than the model. The nucleus of most rows is
    # among the 64 most likely tokens, and nearly always among the 1024 most likely ones.
    smallest = torch.empty_like(probabilities[:, :1])
    rows = torch.arange(len(probabilities), device=probabilities.device)
    vocabulary = probabilities.shape[-1]
    for size in (64, 1024, vocabulary):
        ordered = probabilities[rows].topk(min(size, vocabulary), dim=-1).values
        inside = ordered.double().cumsum(dim=-1) - ordered < top_p
        smallest[rows] = ordered.masked_fill(~inside, torch.inf).amin(dim=-1, keepdim=True)
        rows = rows[ordered.sum(dim=-1) < top_p]
        if size >= vocabulary or not len(rows):
            break
    return probabilities.masked_fill(probabilities < smallest, 0.0)


def _invert(weights: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Invert the cumulative distribution of weights (B, N) at u (B,) in (0, 1].

    Returns the index (B,) whose interval contains u, and the relative position of u in this
    interval, (B,), again in (0, 1]. An index of weight 0 never occurs.
    """
    cumulative = weights.double().cumsum(dim=-1)
    target = u.to(cumulative) * cumulative[:, -1]
    index = torch.searchsorted(cumulative, target[:, None]).clamp(max=weights.shape[-1] - 1)
    weight = weights.gather(-1, index).double()
    position = (target[:, None] - cumulative.gather(-1, index) + weight) / weight
    smallest = torch.finfo(torch.float64).tiny
    return index.squeeze(1), position.squeeze(1).clamp(min=smallest, max=1.0)


class SeededSampling(LogitsProcessor):
    """Makes `generate(do_sample=False)` sample, each row with random numbers from its own seed.

    It draws the token itself and leaves only this token possible.
    """

    def __init__(self, seeds: list[int], sampling: Sampling, prompt_length: int) -> None:
        self.sampling = sampling
        self.prompt_length = prompt_length
        generators = [np.random.Generator(np.random.Philox(seed)) for seed in seeds]
        rows = [generator.random(sampling.max_new_tokens) for generator in generators]
        self.uniforms = torch.from_numpy(np.stack(rows))  # (rows, max_new_tokens)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        step = input_ids.shape[1] - self.prompt_length
        # Apple's GPUs have no float64, in which the tokens are drawn.
        place = "cpu" if scores.device.type == "mps" else scores.device
        tokens = draw_tokens(
            scores.to(place),
            self.uniforms[:, step].to(place),
            self.sampling.temperature,
            self.sampling.top_p,
        ).to(scores.device)
        scores.fill_(-torch.inf).scatter_(1, tokens[:, None], 0.0)
        return scores


class FiniteLogits(LogitsProcessor):
    """Refuses logits that are NaN or infinite, because the tokens drawn from them have no meaning.

    Every step updates a flag on the device. The host reads it only after the first token of a batch
    and at the end, because each read makes the CPU wait for the GPU. A logit of -inf forbids a
    token; it is an error only if all logits of a row are -inf.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.finite: torch.Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        finite = scores.amax(dim=-1).isfinite().all()  # a NaN makes its row's maximum NaN
        if self.finite is None:
            self.finite = finite
            self.check()
        self.finite &= finite
        return scores

    def check(self) -> None:
        """Raise a UserError if any logits seen so far were not finite."""
        if self.finite is not None and not self.finite:
            raise UserError(
                f"the policy {self.folder} gives logits that are NaN or infinite, because its "
                "weights are damaged or its training diverged; train it with a lower "
                "train.learning_rate, or use another model"
            )


class PreallocatedCacheLayer(DynamicLayer):
    """A cache layer with memory for the prompt and the whole response.

    The layer of transformers copies all keys and values for every new token, which takes a third of
    the time on a CPU.
    """

    def __init__(self, filled: DynamicLayer, room: int) -> None:
        """A copy of a filled layer with memory for `room` more tokens."""
        super().__init__()
        keys, values = filled.keys, filled.values
        assert keys is not None and values is not None  # the layer holds the prompts
        self.lazy_initialization(keys, values)
        batch, heads, length, width = keys.shape
        self.all_keys = keys.new_empty(batch, heads, length + room, width)
        self.all_values = values.new_empty(batch, heads, length + room, values.shape[-1])
        self.length = 0
        self.update(keys, values)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only these rows of the batch."""
        self.all_keys = self.all_keys[indices]
        self.all_values = self.all_values[indices]
        self.keys = self.all_keys[:, :, : self.length]
        self.values = self.all_values[:, :, : self.length]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the states of new tokens; returns keys and values of all tokens so far."""
        end = self.length + key_states.shape[-2]
        self.all_keys[:, :, self.length : end] = key_states
        self.all_values[:, :, self.length : end] = value_states
        self.length = end
        self.keys = self.all_keys[:, :, :end]
        self.values = self.all_values[:, :, :end]
        return self.keys, self.values


class TransformersEngine:
    """The engine transformers; it batches prompts of similar length."""

    def __init__(
        self,
        folder: Path,
        *,
        precision: str,
        device: str,
        attention: str | None,
        batch_size: int | None,
        thoughts: str = "keep",
        template: dict[str, Any] | None = None,
    ) -> None:
        """Load the policy of a folder; UserError if it is not valid.

        batch_size: the largest number of sequences in memory at once, in one batch or, on a CPU, in
        two; None for 64. template: `template_kwargs` and `template_date` of `load_tokenizer`.
        """
        self.tokenizer = load_tokenizer(folder, **(template or {}))
        self.thoughts = thoughts
        self.stop_ids = stop_token_ids(folder, self.tokenizer)
        self.dtype = compute_dtype(precision, device)
        self.model = load_policy(folder, self.dtype, device, attention)
        # The model's own generation config could change the logits.
        self.model.generation_config = GenerationConfig()
        self.folder, self.device, self.batch_size = folder, device, batch_size or 64
        # One pass over a prompt serves its K samples, if its cache can be repeated. Other models,
        # such as those with linear attention, read each prompt K times.
        layers = {type(layer) for layer in DynamicCache(config=self.model.config).layers}
        takes_cache = "past_key_values" in inspect.signature(self.model.forward).parameters
        self.reads_prompts_once = takes_cache and layers <= REPEATABLE_LAYERS
        kinds = {str(getattr(part, "rope_type", "")) for part in self.model.modules()}
        changing = any(name in kind for name in CHANGING_POSITIONS for kind in kinds)
        several = device == "cpu" and not changing
        self.at_once = min(BATCHES_AT_ONCE, torch.get_num_threads()) if several else 1
        # Generation must pad on the left, because the prompts of a batch have to end in the same
        # column.
        avoid_cudnn_attention()

    def generate(
        self, prompts: list[dict[str, Any]], sampling: Sampling, data_seed: int, purpose: str
    ) -> list[dict[str, Any]]:
        """K responses to each prompt.

        `prompts` are rows with prompt_id and prompt_token_ids. Returns rows of the table
        `responses`, in the order of the prompts and by sample_id. token_ids end with a stop id if
        and only if finish_reason is `stop`. data_seed, purpose: see `sample_seed`. UserError if the
        policy gives logits that are NaN or infinite.
        """
        # The longest first, so that threads end at about the same time.
        by_length = sorted(prompts, key=lambda row: len(row["prompt_token_ids"]), reverse=True)
        most_prompts = max(1, self.batch_size // self.at_once // sampling.samples)
        rounds = math.ceil(len(prompts) / most_prompts / self.at_once)
        batches = divided_evenly(by_length, min(rounds * self.at_once, len(prompts)))

        def work(batch: Sequence[dict[str, Any]], stopped: threading.Event) -> list[dict[str, Any]]:
            return list(self._generate_batch(batch, sampling, data_seed, purpose, stopped))

        rows: list[dict[str, Any]] = []
        with closing(side_by_side(work, batches, self.at_once)) as results:
            for _ in progress(batches, "generate"):
                rows += next(results)
        position = {row["prompt_id"]: i for i, row in enumerate(prompts)}
        return sorted(rows, key=lambda row: (position[row["prompt_id"]], row["sample_id"]))

    def _generate_batch(
        self,
        prompts: Sequence[dict[str, Any]],
        sampling: Sampling,
        data_seed: int,
        purpose: str,
        stopped: threading.Event,
    ) -> Iterator[dict[str, Any]]:
        """Rows of the table `responses` for one batch. Raises Stopped if `stopped` is set."""
        samples = sampling.samples
        requests = []  # prompt, sample_id, seed
        for row in prompts:
            for k in range(samples):
                requests.append((row, k, sample_seed(data_seed, purpose, row["prompt_id"], k)))
        pad = self.stop_ids[0]  # padding is masked, so any id works
        ids, mask = padded(
            [row["prompt_token_ids"] for row in prompts], pad, self.device, side="left"
        )
        cache: DynamicCache | None = None
        with torch.inference_mode():
            if self.reads_prompts_once and ids.shape[1] > 1:
                cache = self._prefill(ids, mask, sampling)
            decoded = self._decode(
                ids.repeat_interleave(samples, 0),
                mask.repeat_interleave(samples, 0),
                cache,
                sampling,
                [seed for _, _, seed in requests],
                stopped,
            )
        for (row, k, seed), tokens in zip(requests, decoded, strict=True):
            yield response(row, k, seed, tokens, self.stop_ids, self.tokenizer, self.thoughts)

    def _decode(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        cache: DynamicCache | None,
        sampling: Sampling,
        seeds: list[int],
        stopped: threading.Event,
    ) -> list[list[int]]:
        """The new tokens of each row, which may go on after the first stop id.

        ids, mask: prompts, padded on the left, (rows, width). cache: of the prompts without their
        last token. With a cache, rows that have ended leave the batch, so that the others do not
        wait for them.
        """
        width = ids.shape[1]
        model: Any = self.model  # the type PreTrainedModel has no `generate`; causal models do
        stop_ids = torch.tensor(self.stop_ids, device=ids.device)
        finite = FiniteLogits(self.folder)
        processors = LogitsProcessorList([finite])
        drawing = SeededSampling(seeds, sampling, width) if sampling.temperature > 0 else None
        if drawing:
            processors.append(drawing)
        decoded: list[list[int]] = [[] for _ in range(len(ids))]
        rows = torch.arange(len(ids))  # the place of each row of the batch in `decoded`
        at_once = sampling.max_new_tokens if cache is None else DECODED_AT_ONCE
        while True:
            if stopped.is_set():
                raise Stopped
            room = width + sampling.max_new_tokens - ids.shape[1]
            before = ids.shape[1]
            ids = model.generate(
                ids,
                do_sample=False,
                attention_mask=mask,
                max_new_tokens=min(at_once, room),
                eos_token_id=self.stop_ids,
                pad_token_id=self.stop_ids[0],
                logits_processor=processors,
                **({} if cache is None else {"past_key_values": cache}),
            )
            ended = torch.isin(ids[:, width:], stop_ids).any(dim=1).cpu()
            if ended.all() or ids.shape[1] == width + sampling.max_new_tokens:
                break
            mask = nn.functional.pad(mask, (0, ids.shape[1] - before), value=1)
            if cache is not None and ended.sum() >= WORTH_LEAVING * len(ended):
                for row, tokens in zip(rows[ended].tolist(), ids[ended.to(ids.device), width:]):
                    decoded[row] = tokens.tolist()
                kept = (~ended).nonzero().squeeze(1)
                cache.batch_select_indices(kept.to(ids.device))
                ids, mask = ids[kept.to(ids.device)], mask[kept.to(ids.device)]
                rows = rows[kept]
                if drawing:
                    drawing.uniforms = drawing.uniforms[kept]
        finite.check()
        for row, tokens in zip(rows.tolist(), ids[:, width:]):
            decoded[row] = tokens.tolist()
        return decoded

    def _prefill(self, ids: torch.Tensor, mask: torch.Tensor, sampling: Sampling) -> DynamicCache:
        """The cache of the prompts without their last token, each repeated for its K samples.

        The model reads each prompt once. Prompts of similar length share a forward pass, because
        padding costs as much as text; the prompts of a batch are ordered by length.
        """
        layers = DynamicCache(config=self.model.config).layers
        if any(type(layer) is not DynamicLayer for layer in layers):
            cache = self._read(ids, mask)  # layers with a sliding window are not preallocated
            cache.batch_repeat_interleave(sampling.samples)
            return cache
        parts = []
        for first in range(0, len(ids), PREFILL_PROMPTS):
            rows = slice(first, first + PREFILL_PROMPTS)
            longest = int(mask[rows].sum(1).max())
            # Skip columns that are padding in all these rows, but keep two tokens or more.
            start = min(ids.shape[1] - longest, ids.shape[1] - 2)
            parts.append(self._read(ids[rows, start:], mask[rows, start:]))
        cache = self._concatenate(parts, length=ids.shape[1] - 1)
        cache.batch_repeat_interleave(sampling.samples)
        room = sampling.max_new_tokens
        cache.layers = [
            PreallocatedCacheLayer(cast(DynamicLayer, layer), room) for layer in cache.layers
        ]
        return cache

    def _concatenate(self, parts: list[DynamicCache], length: int) -> DynamicCache:
        """The first cache, extended by the rows of the others, padded on the left to `length`."""
        cache = parts[0]
        for number, layer in enumerate(cache.layers):
            for name in ("keys", "values"):
                padded = []
                for part in parts:
                    states = getattr(part.layers[number], name)
                    padding = length - states.shape[2]
                    padded.append(nn.functional.pad(states, (0, 0, padding, 0)))
                setattr(layer, name, torch.cat(padded))
        return cache

    def _read(self, ids: torch.Tensor, mask: torch.Tensor) -> DynamicCache:
        """Keys and values of these rows without their last token."""
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


def divided_evenly(items: Sequence[T], parts: int) -> list[Sequence[T]]:
    """`parts` successive parts of `items`, whose sizes differ by 1 at most."""
    ends = [len(items) * part // parts for part in range(parts + 1)] if parts else []
    return [items[start:end] for start, end in itertools.pairwise(ends)]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Facts about responses for a record: number, tokens, mean length, how many were cut.

    The mean length is None without responses. Prints a warning if nearly all were cut.
    """
    tokens = [len(row["token_ids"]) for row in rows]
    cut = sum(row["finish_reason"] == "length" for row in rows)
    if len(rows) >= WARN_RESPONSES and cut >= WARN_SHARE_CUT * len(rows):
        print(
            f"warning: {cut} of {len(rows)} responses were cut by max_new_tokens before they "
            "ended; raise it, or, if the policy never ends its answer, set eos_token_id in its "
            "generation_config.json to the token that ends it",
            file=sys.stderr,
        )
    return {
        "responses": len(rows),
        "tokens": sum(tokens),
        "mean_tokens": round(float(np.mean(tokens)), 1) if rows else None,
        "cut_by_max_new_tokens": cut,
    }
