"""Summed log-probabilities of responses, in float32, without logits of prompts or padding.

Scoring and training use the same two forms of a batch.

Separate sequences: each row is a prompt and one response, padded on the right, without an attention
mask. In a causal model no token attends to later tokens, so padding does not change the result.
Without a mask, the attention kernels use their causal implementation, and no row of a mask is empty
(cuDNN's backward pass gives NaN for such rows).

Shared prompts: each row is a prompt, its chosen and its rejected response, so the prompt is
computed once. A mask hides the chosen response from the rejected one, whose positions follow the
prompt. It is used where `let_share_prompts` and `sharing_pays` allow it. The result is the same up
to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from sppo.core.errors import UserError
from sppo.core.progress import progress
from sppo.training import attention
from sppo.training.micro_batches import divided

# Models whose layers all take a mask (B, 1, L, L) and `position_ids`. Tests compare each of them
# with separate sequences.
SHARING_MODELS = frozenset({"llama", "mistral", "qwen2", "qwen3"})

# Sharing pays if at most this share of the tokens is left. Attention with a mask takes longer than
# causal attention. On two cores, a step of the demo takes 0.7 to 0.8 of the time, one with prompts
# of 600 and responses of 512 tokens the same time, though it has 0.73 of the tokens
# (benchmarks/shared_prompts.py).
SHARING_PAYS = 0.8


def collate(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """Batch token ids: each row is a prompt and its response, padded on the right.

    Returns `input_ids` (B, L) and `response_places` (N,): the positions of the N response tokens of
    all rows in the flattened ids. The positions are computed from lengths. Comparing ids with the
    id of the padding would be wrong, because many models use EOS as padding.
    """
    sequences = [[*p, *r] for p, r in zip(prompts, responses, strict=True)]
    length = max(len(sequence) for sequence in sequences)
    ids = torch.zeros(len(sequences), length, dtype=torch.long)
    places = []
    for row, (prompt, sequence) in enumerate(zip(prompts, sequences, strict=True)):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        places.append(torch.arange(len(prompt), len(sequence)) + row * length)
    return {"input_ids": ids, "response_places": torch.cat(places)}


def collate_shared(
    prompts: Sequence[Sequence[int]],
    chosen: Sequence[Sequence[int]],
    rejected: Sequence[Sequence[int]],
) -> dict[str, Tensor]:
    """Batch token ids: each row is a prompt and its two responses, padded on the right.

    Returns `input_ids` (B, L) and `response_places` (N,), as `collate` does, and
        read_places: (N,), the positions that predict the response tokens, in the flattened ids.
        position_ids: (B, L), of each token in its own sequence.
        owners: (B, L), 1 for tokens of chosen responses, 2 for those of rejected ones, else 0.
    """
    rows = list(zip(prompts, chosen, rejected, strict=True))
    length = max(len(prompt) + len(first) + len(second) for prompt, first, second in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    positions = torch.zeros_like(ids)
    owners = torch.zeros_like(ids)
    places, reads = [], []
    for row, (prompt, *responses) in enumerate(rows):
        ids[row, : len(prompt)] = torch.tensor(prompt)
        positions[row, : len(prompt)] = torch.arange(len(prompt))
        begin = len(prompt)
        for owner, response in enumerate(responses, 1):
            end = begin + len(response)
            ids[row, begin:end] = torch.tensor(response)
            positions[row, begin:end] = torch.arange(len(response)) + len(prompt)
            owners[row, begin:end] = owner
            own = torch.arange(begin, end)
            before = own - 1
            before[:1] = len(prompt) - 1  # The prompt's end predicts the first token of both.
            places.append(own + row * length)
            reads.append(before + row * length)
            begin = end
    return {
        "input_ids": ids,
        "response_places": torch.cat(places),
        "read_places": torch.cat(reads),
        "position_ids": positions,
        "owners": owners,
    }


def visible(owners: Tensor) -> Tensor:
    """Which tokens (last axis) each token attends to: (B, 1, L, L), bool, from (B, L).

    Earlier tokens of the prompt and of the same response. Padding attends to the prompt, so no row
    is empty.
    """
    own = owners[:, None, :] == owners[:, :, None]
    of_prompt = owners[:, None, :] == 0
    return (own | of_prompt).tril()[:, None]


def let_share_prompts(model: nn.Module, device: str) -> bool:
    """Prepare the model for rows with two responses, if it computes them as separate sequences.

    Returns whether it does. Only on a CPU: a GPU's fastest attention kernels take no mask, and
    nobody has measured there what is gained.
    """
    if device != "cpu" or not isinstance(model, PreTrainedModel):
        return False
    config: Any = model.config
    can_share = (
        config.model_type in SHARING_MODELS
        and config._attn_implementation in ("sdpa", attention.NAME)  # Others take other masks.
        and getattr(config, "sliding_window", None) is None
    )
    if can_share:
        attention.use_products(model)
    return can_share


def sharing_pays(pairs: Sequence[dict[str, Any]]) -> bool:
    """Whether these pairs have enough fewer tokens, with padding, if they share prompts."""
    return _row_if_shared(pairs) <= SHARING_PAYS * 2 * _row_if_separate(pairs)


def computed_tokens(pairs: Sequence[dict[str, Any]], may_share: bool) -> int:
    """The tokens that a pass over these pairs computes, with padding, see `pair_batch`."""
    if may_share and sharing_pays(pairs):
        return len(pairs) * _row_if_shared(pairs)
    return 2 * len(pairs) * _row_if_separate(pairs)


def needed_tokens(pair: dict[str, Any]) -> int:
    """The tokens of a pair, with its prompt once."""
    return sum(len(pair[f"{part}_token_ids"]) for part in ("prompt", "chosen", "rejected"))


def _row_if_shared(pairs: Sequence[dict[str, Any]]) -> int:
    return max(needed_tokens(pair) for pair in pairs)


def _row_if_separate(pairs: Sequence[dict[str, Any]]) -> int:
    return max(pair_length(pair) for pair in pairs)


def response_logps(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """log pi(y|x) of each response of a batch, nats.

    The sum over the response's tokens, in float32. (B,) for a batch from `collate`; (2B,) for one
    from `collate_shared`: all chosen, then all rejected responses.
    """
    logps = token_logps(model, batch)
    if "owners" not in batch:
        return logps.sum(1)
    return torch.cat([(logps * (batch["owners"] == owner)).sum(1) for owner in (1, 2)])


def token_logps(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """log pi of each response token, (B, L), nats, float32; 0 at tokens of prompts and padding."""
    ids, places = batch["input_ids"], batch["response_places"]
    reads = places - 1  # The position before a token predicts it.
    more = {}
    if "owners" in batch:
        reads = batch["read_places"]
        more = {
            "position_ids": batch["position_ids"],
            "attention_mask": visible(batch["owners"]),
        }
    with head_reads(model, reads):
        logits = model(input_ids=ids, use_cache=False, **more).logits  # (N, V)
    targets = ids.flatten()[places]
    logps = -functional.cross_entropy(logits.float(), targets, reduction="none")
    flat = torch.zeros(ids.numel(), dtype=torch.float32, device=ids.device)
    return flat.index_copy(0, places, logps).view_as(ids)


@contextmanager
def head_reads(model: nn.Module, places: Tensor) -> Iterator[None]:
    """Make the model compute logits only at N positions of the flattened batch: float32 (N, V).

    The model itself still calls its output layer, whose `forward` is replaced. Thus everything else
    that the model does with its logits, such as Gemma-2's soft cap, remains. The logits are
    float32, because bfloat16 rounds logits of 16 and above to multiples of 1/8. Log-probabilities
    would have that error, and a different one in each batch.
    """
    inner: Any = getattr(model, "module", model)  # the model without its distributed wrapper
    head = inner.get_output_embeddings()

    def forward(states: Tensor) -> Tensor:
        chosen = states.flatten(0, 1)[places]
        if torch.is_autocast_enabled(states.device.type) or chosen.dtype == torch.bfloat16:
            logits = Float32Product.apply(chosen.bfloat16(), head.weight.bfloat16())
        else:
            logits = chosen @ head.weight.T
        bias = getattr(head, "bias", None)
        return logits if bias is None else logits + bias

    head.forward = forward
    try:
        yield
    finally:
        del head.forward


class Float32Product(torch.autograd.Function):
    """x W^T in float32 (N, V), of bfloat16 x (N, H) and W (V, H).

    The factors are bfloat16, but the product is not rounded to bfloat16. The gradient is, as in
    autocast.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        with torch.autocast(x.device.type, enabled=False):  # Autocast would round the product.
            if x.is_cuda:
                return torch.mm(x, weight.T, out_dtype=torch.float32)
            with bfloat16_products():
                return x.float() @ weight.float().T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        gradient = gradient.bfloat16()
        # With LoRA the output layer is not trained.
        return gradient @ weight, gradient.T @ x if ctx.needs_input_grad[1] else None


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Let float32 matrix products use a CPU's bfloat16 units; exact if the factors are bfloat16."""
    # torch replaces this module with an object, so type checkers do not find `matmul`.
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def pair_batch(pairs: list[dict[str, Any]], may_share: bool = False) -> dict[str, Tensor]:
    """B rows of the table `pairs` as a batch, for which `response_logps` gives (2B,).

    All chosen, then all rejected responses. They share the prompts if they may and if it pays.
    """
    prompts = [pair["prompt_token_ids"] for pair in pairs]
    chosen = [pair["chosen_token_ids"] for pair in pairs]
    rejected = [pair["rejected_token_ids"] for pair in pairs]
    if may_share and sharing_pays(pairs):
        return collate_shared(prompts, chosen, rejected)
    return collate(prompts + prompts, chosen + rejected)


def pair_length(pair: dict[str, Any]) -> int:
    """The number of tokens of the longer sequence of a pair, with the prompt."""
    longer = max(len(pair["chosen_token_ids"]), len(pair["rejected_token_ids"]))
    return len(pair["prompt_token_ids"]) + longer


def _batches(lengths: list[int], size: int) -> list[list[int]]:
    """Indices of sequences in batches of `size`, in ascending order of their lengths."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [order[i : i + size] for i in range(0, len(order), size)]


def forward_precision(device: str, dtype: torch.dtype) -> torch.autocast:
    """Autocast for float32 weights that are computed with in `dtype`: the same casts in every pass.

    Autocast's cache is off, because it would keep a bfloat16 copy of all weights, 2 bytes each,
    until the end of the block.
    """
    enabled = dtype == torch.bfloat16
    return torch.autocast(device, torch.bfloat16, enabled=enabled, cache_enabled=False)


def frozen_logps(
    model: nn.Module,
    pairs: list[dict[str, Any]],
    dtype: torch.dtype,
    device: str,
    micro_batch_size: int,
    micro_batch_tokens: int | None = None,
) -> list[dict[str, Any]]:
    """Rows of the table `logps` for `pairs` under a frozen model, in the order of `pairs`.

    Pairs of similar lengths are computed together, as many as in training. A log-probability that
    is not finite is a UserError that names its pair.
    """
    rows: dict[Any, dict[str, Any]] = {}
    may_share = let_share_prompts(model, device)
    by_length = sorted(pairs, key=pair_length, reverse=True)
    batches = divided(
        [by_length],
        processes=1,
        most_pairs=micro_batch_size,
        most_tokens=micro_batch_tokens,
        tokens=lambda group: computed_tokens(group, may_share),
    )[0]
    with torch.inference_mode(), forward_precision(device, dtype):
        for batch in progress(batches, "reference log-probabilities"):
            inputs = _on_device(pair_batch(batch, may_share), device)
            logps = response_logps(model, inputs).cpu()
            names = [f"pair {pair['pair_id']}" for pair in batch]
            check_finite(logps, names + names, "log-probability under the frozen policy")
            for pair, chosen, rejected in zip(batch, *logps.view(2, -1).tolist(), strict=True):
                rows[pair["pair_id"]] = {
                    "pair_id": pair["pair_id"],
                    "chosen_logp": chosen,
                    "rejected_logp": rejected,
                }
    return [rows[pair["pair_id"]] for pair in pairs]


def frozen_response_logps(
    model: nn.Module,
    responses: list[dict[str, Any]],
    dtype: torch.dtype,
    device: str,
    batch_size: int,
) -> list[float]:
    """log pi(y|x), nats, of rows of the table `responses` under a frozen model, in their order.

    Responses of similar lengths are computed together. A log-probability that is not finite is a
    UserError that names the prompt and the sample.
    """
    logps = [0.0] * len(responses)
    lengths = [len(row["prompt_token_ids"]) + len(row["token_ids"]) for row in responses]
    with torch.inference_mode(), forward_precision(device, dtype):
        for batch in progress(_batches(lengths, batch_size), "log-probabilities of responses"):
            rows = [responses[index] for index in batch]
            prompts = [row["prompt_token_ids"] for row in rows]
            inputs = _on_device(collate(prompts, [row["token_ids"] for row in rows]), device)
            batch_logps = response_logps(model, inputs).cpu()
            names = [f"sample {row['sample_id']} of prompt {row['prompt_id']}" for row in rows]
            check_finite(batch_logps, names, "log-probability under the policy")
            for index, logp in zip(batch, batch_logps.tolist(), strict=True):
                logps[index] = logp
    return logps


def _on_device(batch: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    return {name: values.to(device) for name, values in batch.items()}


def check_finite(values: Tensor, names: list[str], what: str) -> None:
    """Raise a UserError that names the first of `values` (B,) that is NaN or infinite."""
    finite = values.isfinite().tolist()
    if not all(finite):
        first = finite.index(False)
        raise UserError(
            f"the {what} of {names[first]} is {values[first].item()}; the policy's weights are "
            "damaged or overflow: check the policy, or set precision: float32"
        )
