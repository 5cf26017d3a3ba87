"""Summed log-probabilities of responses, in float32, without logits of the prompt."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sppo.progress import progress


def collate(prompts: list[list[int]], responses: list[list[int]]) -> dict[str, Tensor]:
    """Batch token ids so that all responses begin in one column: prompts padded left, responses right.

    Returns input_ids, attention_mask, position_ids, each (B, P + C), and response_mask (B, C). Masks come from
    lengths, never from comparing ids with a pad id: the pad of many models is their EOS.
    """
    before, after = max(map(len, prompts)), max(map(len, responses))
    ids = torch.zeros(len(prompts), before + after, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        start, end = before - len(prompt), before + len(response)
        ids[row, start:end] = torch.tensor(list(prompt) + list(response))
        mask[row, start:end] = 1
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
            "response_mask": mask[:, before:].float()}


def response_logps(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """log pi(y|x) of each row, shape (B,), nats: summed over response tokens in float32."""
    response_mask = batch["response_mask"]
    length = response_mask.shape[1]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=batch["position_ids"],
                   logits_to_keep=length + 1, use_cache=False).logits[:, :-1].float()
    tokens = batch["input_ids"][:, -length:]
    chosen = logits.gather(-1, tokens[..., None]).squeeze(-1) - logits.logsumexp(-1)
    return (chosen * response_mask).sum(-1)


def pair_batch(pairs: list[dict]) -> dict[str, Tensor]:
    """Rows of the table `pairs` as one batch of 2B sequences: all chosen, then all rejected."""
    prompts = [pair["prompt_token_ids"] for pair in pairs]
    return collate(prompts + prompts, [p["chosen_token_ids"] for p in pairs] + [p["rejected_token_ids"] for p in pairs])


def pair_length(pair: dict) -> int:
    """Tokens that the longer sequence of a pair fills in a batch."""
    return len(pair["prompt_token_ids"]) + max(len(pair["chosen_token_ids"]), len(pair["rejected_token_ids"]))


def _batches(lengths: list[int], size: int) -> list[list[int]]:
    """Indices in batches of like lengths."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [order[i:i + size] for i in range(0, len(order), size)]


def forward_precision(device: str, dtype: torch.dtype) -> torch.autocast:
    """Float32 weights computed with in `dtype`, the same casts in every pass; uncached, for a cast of all weights takes 2 bytes each until it ends."""
    return torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16, cache_enabled=False)


def frozen_logps(model: nn.Module, pairs: list[dict], dtype: torch.dtype, device: str, micro_batch_size: int) -> list[dict]:
    """Rows of the table `logps` under a frozen model, batched by length, in the order of `pairs`."""
    rows: dict[int, dict] = {}
    with torch.inference_mode(), forward_precision(device, dtype):
        for batch in progress(_batches([pair_length(pair) for pair in pairs], micro_batch_size), "reference log-probabilities"):
            chosen = [pairs[i] for i in batch]
            logps = response_logps(model, {k: v.to(device) for k, v in pair_batch(chosen).items()}).tolist()
            for n, i in enumerate(batch):
                rows[i] = {"pair_id": pairs[i]["pair_id"], "chosen_logp": logps[n], "rejected_logp": logps[n + len(batch)]}
    return [rows[i] for i in range(len(pairs))]


def frozen_response_logps(model: nn.Module, responses: list[dict], dtype: torch.dtype, device: str, batch_size: int) -> list[float]:
    """log pi(y|x), nats, of rows of the table `responses` under a frozen model, batched by length, in their order."""
    logps = [0.0] * len(responses)
    lengths = [len(row["prompt_token_ids"]) + len(row["token_ids"]) for row in responses]
    with torch.inference_mode(), forward_precision(device, dtype):
        for batch in progress(_batches(lengths, batch_size), "log-probabilities of responses"):
            rows = collate([responses[i]["prompt_token_ids"] for i in batch], [responses[i]["token_ids"] for i in batch])
            for i, logp in zip(batch, response_logps(model, {k: v.to(device) for k, v in rows.items()}).tolist(), strict=True):
                logps[i] = logp
    return logps
