"""What an iteration costs: tokens, FLOPs, seconds and memory from a model's shape and the configuration. Pure formulas.

Checked in two ways: weights against transformers' own count, and FLOPs against the seconds that records of real runs
hold (`src/tools/estimate_cost.py --records`). Norms and biases are left out: less than a thousandth.
"""

from __future__ import annotations

from dataclasses import dataclass

from sppo.policies.shapes import Shape, forward_flops

GB = 1e9


@dataclass(frozen=True)
class Gpu:
    """What a vendor's data sheet says: bfloat16 without sparsity, FLOP/s; bytes; bytes a second."""

    flops: float
    memory: float
    bandwidth: float


GPUS = {
    "H100": Gpu(989e12, 80 * GB, 3.35e12),
    "H200": Gpu(989e12, 141 * GB, 4.8e12),
    "A100": Gpu(312e12, 80 * GB, 2.04e12),
    "RTX4090": Gpu(165e12, 24 * GB, 1.01e12),
}


@dataclass(frozen=True)
class Use:
    """Shares of a GPU's peak that programs reach, and how many sequences are generated side by side at most."""

    training: float
    forward: float
    bandwidth: float
    concurrent: int


def generate_flops(
    shape: Shape, prompts: float, prompt: float, samples: int, response: float
) -> float:
    """`samples` responses to each prompt, which is read once."""
    drawn = prompts * samples * response
    return forward_flops(shape, prompts * prompt, prompt / 2, 0) + forward_flops(
        shape, drawn, prompt + response / 2, drawn
    )


def score_flops(shape: Shape, pairs: float, prompt: float, response: float) -> float:
    """Both responses of each pair, each behind its prompt; logits of the responses alone."""
    return forward_flops(
        shape, 2 * pairs * (prompt + response), (prompt + response) / 2, 2 * pairs * response
    )


def train_factor(lora: bool, checkpointing: bool) -> int:
    """Training in forward passes: the backward pass is two, one where weights are frozen; checkpointing adds one."""
    return 1 + (1 if lora else 2) + (1 if checkpointing else 0)


def concurrent_sequences(shape: Shape, gpu: Gpu, context: float, use: Use) -> int:
    """Sequences that fit beside the weights in 16 bits, in nine tenths of the memory as vLLM takes them. 0: not even the weights."""
    return max(
        0,
        min(
            use.concurrent, int((0.9 * gpu.memory - 2 * shape.weights) / (shape.kv_bytes * context))
        ),
    )


def decode_seconds(shape: Shape, gpu: Gpu, use: Use, tokens: float, context: float) -> float | None:
    """Seconds to draw `tokens` tokens: each step reads all weights, and keys and values of every sequence. None if it does not fit."""
    together = concurrent_sequences(shape, gpu, context, use)
    if not together:
        return None
    read = (2 * shape.weights + together * context * shape.kv_bytes) / (
        gpu.bandwidth * use.bandwidth
    )
    computed = forward_flops(shape, together, context, together) / (gpu.flops * use.forward)
    return tokens / together * (read + computed)


def lora_weights(shape: Shape, rank: int) -> int:
    """Of adapters on every linear layer but the head."""
    each_way = (
        shape.hidden * 4
        + shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads)
        + shape.mlp_matrices * (shape.hidden + shape.intermediate)
    )
    return shape.layers * rank * each_way


# Bytes that PyTorch holds under autocast to bfloat16, read off tests/unit/test_memory_model.py.
# Embeddings are not autocast, so the residual stream is float32; with LoRA it is bfloat16, as the
# weights are.
WEIGHT, CAST = 4, 2  # of a float32 weight, of its copy in bfloat16
MASTER = 12  # of a weight with its gradient and RMSProp's mean of squares
LOGIT = 12  # of an entry of the logits: itself, its log-softmax, its gradient
SOFT_CAP = 4  # more, where Gemma-2 bounds the logits by a tanh
SCORED_LOGIT = 8  # the same without a backward pass
# A layer in its backward pass: of a token, times the widths of hidden state, queries and MLP.
LAYER, LAYER_LORA = (26, 8, 13), (28, 6, 14)
KEPT = (27, 8, 8)  # what it keeps for that without checkpointing
SCORED_LAYER = (12, 0, 8)  # the most that a forward pass needs of it
HEAD = 10  # states around the output layer, times the width of the hidden state
SANDWICH = 12  # more, times the hidden state, for Gemma-2's norms behind attention and MLP
# Eager attention writes out the square of the length for each head: in its backward pass, kept for
# it, in scoring; and beside it of a token, times the hidden state.
EAGER, KEPT_EAGER, SCORED_EAGER, BESIDE_EAGER = 14, 8, 8, 19
# FSDP2 gathers two layers, and their gradients are whole until they are exchanged.
GATHERED_LAYERS = 4


def of_layer(shape: Shape, bytes_of: tuple[int, int, int]) -> int:
    """Bytes of one token in one layer."""
    hidden, queries, mlp = bytes_of
    return hidden * shape.hidden + queries * shape.heads * shape.head_dim + mlp * shape.intermediate


def squares(shape: Shape, sequences: int, length: int) -> int:
    """Entries of one layer's attention matrices, which eager attention writes out."""
    return sequences * shape.heads * length**2


def train_bytes(
    shape: Shape,
    gpus: int,
    micro_batch: int,
    prompt: int,
    response: int,
    lora_rank: int,
    checkpointing: bool,
    width: int = 2,
    eager: bool = False,
) -> float:
    """Peak of one GPU in training on sequences of `prompt` + `response` tokens.

    That is what it holds throughout and the largest of its phases. Weights, gradients and RMSProp's
    squares are float32, divided over the GPUs; with LoRA frozen weights have `width` bytes. In
    float32 (`width` 4) there are no casts, and what is computed is twice as wide. `eager`:
    attention as matrix products.
    """
    sequences, length = 2 * micro_batch, prompt + response
    tokens, entries, wide = sequences * length, sequences * response * shape.vocabulary, width // 2
    layer, root = shape.body // shape.layers, shape.head * (1 if shape.tied else 2)
    divided, full = gpus > 1, not lora_rank
    held = MASTER * shape.weights / gpus
    if lora_rank:
        held = width * shape.weights + MASTER * lora_weights(shape, lora_rank)
    stream = (4 if full else width) * shape.hidden * tokens
    cast = CAST if full and width == 2 else 0
    kept, in_layer = shape.layers * (tokens * of_layer(shape, KEPT) * wide + cast * layer), 0
    if checkpointing:
        kept = shape.layers * stream
        in_layer = tokens * of_layer(shape, LAYER if full else LAYER_LORA) * wide
    if shape.softcap:
        in_layer += SANDWICH * shape.hidden * tokens
    if eager:
        square = wide * squares(shape, sequences, length)
        in_layer = max(
            in_layer + KEPT_EAGER * square, EAGER * square + BESIDE_EAGER * shape.hidden * tokens
        )
        kept += 0 if checkpointing else (shape.layers - 1) * KEPT_EAGER * square
    gathered = WEIGHT * root if divided else 0
    of_head = HEAD * shape.hidden * tokens + (LOGIT + (SOFT_CAP if shape.softcap else 0)) * entries
    phases = [
        # The logits: the output layer is not gathered again before its backward pass.
        kept + of_head + cast * shape.head + (WEIGHT * layer if divided else 0),
        # A layer; the output layer's gradient waits for that of the embeddings if these are tied or
        # gathered.
        kept
        + in_layer
        + (gathered + GATHERED_LAYERS * WEIGHT * layer if divided else cast * layer)
        + (WEIGHT * shape.head if full and (shape.tied or divided) else 0),
    ]
    if full:
        # Gradients of the embeddings and the output layer: tied ones are added up in a third.
        gradients = (3 if shape.tied else 2) * WEIGHT * shape.head
        phases.append(
            gathered
            + gradients
            + (2 * WEIGHT * layer if divided else 0)
            + (0 if checkpointing else kept)
        )
        if not divided:  # PyTorch's RMSProp on a GPU takes the roots of all squares at once
            phases.append(WEIGHT * shape.weights)
    return held + max(phases)


def score_bytes(
    shape: Shape,
    micro_batch: int,
    prompt: int,
    response: int,
    lora: bool,
    width: int = 2,
    eager: bool = False,
) -> float:
    """Peak of the forward pass over pairs: the weights, and one layer's states or the logits.

    Weights are float32, with LoRA they have `width` bytes.
    """
    sequences, length, wide = 2 * micro_batch, prompt + response, width // 2
    tokens = sequences * length
    in_layer = tokens * of_layer(shape, SCORED_LAYER) * wide
    if eager:
        in_layer += SCORED_EAGER * wide * squares(shape, sequences, length)
    logits = SCORED_LOGIT * sequences * response * shape.vocabulary + 4 * shape.hidden * tokens
    return (width if lora else WEIGHT) * shape.weights + max(in_layer, logits)
