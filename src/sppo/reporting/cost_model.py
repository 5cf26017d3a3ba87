"""The cost of an iteration: FLOPs, seconds and memory, from a model's shape and the configuration.

All functions are pure formulas. They are checked in two ways: the number of weights against
transformers' own count, and FLOPs against the seconds in the records of real runs
(`src/tools/check_estimate.py`). Norms and biases are left out, because they are less than 0.1%.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from sppo.core.config import GPU_MEMORY
from sppo.policies.shapes import Shape, forward_flops
from sppo.training.lengths import Layout, Pair, computed_tokens, pair_length, sequence_tokens
from sppo.training.micro_batches import divided, efficiency

GB = 1e9


@dataclass(frozen=True)
class Gpu:
    """The numbers of a vendor's data sheet.

    flops: FLOP/s in bfloat16 without sparsity. memory: bytes. bandwidth: bytes per second.
    """

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
    """The shares of a GPU's peak that programs reach.

    concurrent: the maximum number of sequences that are generated at the same time. memory: the
    share of a GPU's memory that the generation engine takes.
    """

    training: float
    forward: float
    bandwidth: float
    concurrent: int
    memory: float = GPU_MEMORY


def generate_flops(
    shape: Shape, prompts: float, prompt: float, samples: int, response: float
) -> float:
    """FLOPs to sample `samples` responses to each prompt; each prompt is read once.

    prompt, response: mean lengths in tokens.
    """
    sampled = prompts * samples * response
    reading = forward_flops(shape, prompts * prompt, prompt / 2, 0)
    writing = forward_flops(shape, sampled, prompt + response / 2, sampled)
    return reading + writing


def score_flops(shape: Shape, pairs: float, prompt: float, response: float) -> float:
    """FLOPs of a forward pass over both responses of each pair, with their prompt.

    Logits are computed only for the responses. prompt, response: mean lengths in tokens.
    """
    length = prompt + response
    return forward_flops(shape, 2 * pairs * length, length / 2, 2 * pairs * response)


def checkpointed_every(train: dict[str, Any]) -> int:
    """n if every n-th layer computes its activations twice, 0 if none does.

    train: the section `train`, or the arguments in the record of a training.
    """
    every = train.get("checkpointed_layers", 1)  # records of older code do not have it
    return every if train.get("gradient_checkpointing") else 0


def checkpointed_layers(shape: Shape, every: int) -> int:
    """The number of layers that compute their activations twice; every: `checkpointed_every`."""
    return len(range(0, shape.layers, every)) if every else 0


def train_factor(shape: Shape, lora: bool, every: int) -> float:
    """The cost of a training step in forward passes; every: `checkpointed_every`.

    A backward pass costs two forward passes, or one if the weights are frozen (LoRA). Checkpointing
    all layers adds one forward pass.
    """
    forward = 1
    backward = 1 if lora else 2
    return forward + backward + checkpointed_layers(shape, every) / shape.layers


# The spread of lengths in chats: the standard deviation of their logarithm. It is assumed.
SPREAD = 0.8
SIMULATED_STEPS = 20


def load_balance(
    train: dict[str, Any],
    gpus: int,
    layout: Layout,
    prompt: float,
    response: float,
    longest_prompt: int,
    longest_response: int,
) -> float:
    """The mean `balanced_share` of training steps, see `efficiency`, 0 to 1.

    The rest is padding, and waiting for the GPU with most tokens. Simulated: pairs with random
    lengths are divided into the passes of `SIMULATED_STEPS` steps as in training.

    Args:
        train: the section `train`.
        gpus: the number of GPUs that train.
        layout: that of the passes, see `sppo.training.batches`.
        prompt, response: mean numbers of tokens.
        longest_prompt, longest_response: the largest numbers of tokens.
    """
    draw = random.Random(0)

    def length(mean: float, longest: int) -> int:
        drawn = mean * draw.lognormvariate(-(SPREAD**2) / 2, SPREAD)  # its mean is `mean`
        return max(1, min(longest, round(drawn)))

    steps = []
    for _ in range(SIMULATED_STEPS):
        pairs = [
            {
                "prompt_token_ids": range(length(prompt, longest_prompt)),
                "chosen_token_ids": range(length(response, longest_response)),
                "rejected_token_ids": range(length(response, longest_response)),
            }
            for _ in range(train["batch_size"])
        ]
        steps.append(sorted(pairs, key=pair_length, reverse=True))

    def tokens(group: list[Pair]) -> int:
        return computed_tokens(group, layout)

    most_pairs = min(train["micro_batch_size"], max(1, train["batch_size"] // gpus))
    divisions = divided(steps, gpus, most_pairs, train["micro_batch_tokens"], tokens)
    shares = [efficiency(groups, gpus, tokens, sequence_tokens) for groups in divisions]
    return sum(share["balanced_share"] for share in shares) / len(shares)


def concurrent_sequences(shape: Shape, gpu: Gpu, context: float, use: Use) -> int:
    """Number of sequences of `context` tokens that fit in memory together with the weights.

    Weights, keys and values have 16 bits. They use a share of the memory, as in vLLM. 0 means that
    not even the weights fit.
    """
    free = use.memory * gpu.memory - 2 * shape.weights
    fitting = int(free / (shape.kv_bytes * context))
    return max(0, min(use.concurrent, fitting))


def decode_seconds(shape: Shape, gpu: Gpu, use: Use, tokens: float, context: float) -> float | None:
    """Seconds to generate `tokens` tokens; None if the model does not fit in memory.

    Each step reads all weights, and the keys and values of every sequence.
    """
    together = concurrent_sequences(shape, gpu, context, use)
    if not together:
        return None
    read = (2 * shape.weights + together * context * shape.kv_bytes) / (
        gpu.bandwidth * use.bandwidth
    )
    computed = forward_flops(shape, together, context, together) / (gpu.flops * use.forward)
    return tokens / together * (read + computed)


def lora_weights(shape: Shape, rank: int) -> int:
    """Number of weights of LoRA adapters on every linear layer except the head."""
    each_way = (
        shape.hidden * 4
        + shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads)
        + shape.mlp_matrices * (shape.hidden + shape.intermediate)
    )
    return shape.layers * rank * each_way


# Bytes that PyTorch allocates under autocast to bfloat16, measured with
# tests/unit/test_memory_model.py. Embeddings are not autocast, so the residual stream is float32.
# With LoRA it is bfloat16, like the weights.
WEIGHT = 4  # a float32 weight
CAST = 2  # the bfloat16 copy of a weight
MASTER = 12  # a weight, its gradient, and RMSProp's mean of squares
LOGIT = 12  # an entry of the logits, its log-softmax, and its gradient
SOFT_CAP = 4  # added to LOGIT if Gemma-2 bounds the logits by a tanh
SCORED_LOGIT = 8  # an entry of the logits without a backward pass
# Bytes per token in one layer: factors of the widths of hidden state, queries and MLP.
LAYER = (26, 8, 13)  # in the backward pass
LAYER_LORA = (28, 6, 14)  # in the backward pass with LoRA
KEPT = (27, 8, 8)  # kept for the backward pass without checkpointing
SCORED_LAYER = (12, 0, 8)  # the maximum in a forward pass
# Bytes per token, as factors of the width of the hidden state.
HEAD = 10  # states around the output layer
SANDWICH = 12  # added for Gemma-2's norms after attention and MLP
BESIDE_EAGER = 19  # other states of a layer in the backward pass of eager attention
# Eager attention stores matrices of length x length for each head. Bytes per entry:
EAGER = 14  # in the backward pass
KEPT_EAGER = 8  # kept for the backward pass
SCORED_EAGER = 8  # in a forward pass
# FSDP2 gathers the weights of two layers and has the gradients of one, in the type of the
# computation. This many entries per weight of a layer, and one float32 that is exchanged:
GATHERED_LAYER = 3


def of_layer(shape: Shape, bytes_of: tuple[int, int, int]) -> int:
    """Bytes of one token in one layer. bytes_of: factors such as `LAYER`."""
    hidden, queries, mlp = bytes_of
    return hidden * shape.hidden + queries * shape.heads * shape.head_dim + mlp * shape.intermediate


def squares(shape: Shape, sequences: int, length: int) -> int:
    """Number of entries of one layer's attention matrices, which eager attention stores."""
    return sequences * shape.heads * length**2


def train_bytes(
    shape: Shape,
    gpus: int,
    micro_batch: int,
    prompt: int,
    response: int,
    lora_rank: int,
    every: int,
    width: int = 2,
    eager: bool = False,
) -> float:
    """Peak memory of one GPU in bytes, in training on sequences of `prompt` + `response` tokens.

    The peak is the memory that is allocated all the time plus that of the largest phase. Weights,
    gradients and RMSProp's mean of squares are float32 and divided over the GPUs. With LoRA
    (`lora_rank` > 0), frozen weights have `width` bytes and are not divided. In float32 (`width` 4)
    there are no casts, and activations are twice as wide. Several GPUs divide as FSDP2 does.
    every: `checkpointed_every`. eager: attention as matrix products.
    """
    sequences = 2 * micro_batch
    length = prompt + response
    tokens = sequences * length
    logits = sequences * response * shape.vocabulary
    widening = width // 2  # of activations, compared with bfloat16
    layer_weights = shape.body // shape.layers
    full = not lora_rank  # all weights are trained
    divided = full and gpus > 1

    permanent = MASTER * shape.weights / gpus
    if lora_rank:
        permanent = width * shape.weights + MASTER * lora_weights(shape, lora_rank)

    # Activations that are kept for the backward pass, and those of one layer during it. FSDP2
    # gathers bfloat16 weights, so it has no casts.
    cast = CAST if full and width == 2 and not divided else 0
    residual_stream = (4 if full else width) * shape.hidden * tokens
    of_whole_layer = tokens * of_layer(shape, KEPT) * widening + cast * layer_weights
    checkpointed = checkpointed_layers(shape, every)
    whole = shape.layers - checkpointed
    kept = checkpointed * residual_stream + whole * of_whole_layer
    in_layer = 0
    if checkpointed:
        in_layer = tokens * of_layer(shape, LAYER if full else LAYER_LORA) * widening
        # The backward pass has freed the layers after the last checkpointed one.
        in_layer -= (shape.layers - 1) % every * of_whole_layer
    if shape.softcap:
        in_layer += SANDWICH * shape.hidden * tokens
    if eager:
        square = widening * squares(shape, sequences, length)
        in_layer = max(
            in_layer + KEPT_EAGER * square, EAGER * square + BESIDE_EAGER * shape.hidden * tokens
        )
        # in_layer has those of one layer: of the last whole one, unless a checkpointed one is last.
        last_is_checkpointed = bool(every) and (shape.layers - 1) % every == 0
        kept += (whole if last_is_checkpointed else whole - 1) * KEPT_EAGER * square

    # Phase 1: the logits. FSDP2 has gathered the output layer and the last layer.
    logit_bytes = LOGIT + SOFT_CAP if shape.softcap else LOGIT
    in_logits = kept + HEAD * shape.hidden * tokens + logit_bytes * logits + cast * shape.head
    if divided:
        in_logits += width * (shape.head + layer_weights)
    phases = [in_logits]

    # Phase 2: the backward pass of one layer. If embeddings and output layer are tied, the latter's
    # gradient is kept until that of the former is computed.
    in_backward = kept + max(0, in_layer)
    if divided:
        in_backward += (GATHERED_LAYER * width + WEIGHT) * layer_weights
        if shape.tied:
            in_backward += 2 * width * shape.head
    else:
        in_backward += cast * layer_weights
        if full and shape.tied:
            in_backward += WEIGHT * shape.head
    phases.append(in_backward)

    if full:
        # Phase 3: the gradients of embeddings and output layer. If they are tied, their sum needs a
        # third tensor.
        if not divided:
            in_gradients = (3 if shape.tied else 2) * WEIGHT * shape.head
        elif shape.tied:
            in_gradients = 4 * width * shape.head + WEIGHT * layer_weights
        else:
            in_gradients = (2 * width + WEIGHT) * shape.head
        in_gradients += whole * of_whole_layer
        phases.append(in_gradients)
        if not divided:
            # Phase 4: PyTorch's RMSProp on a GPU computes the roots of all squares at once.
            phases.append(WEIGHT * shape.weights)
    return permanent + max(phases)


def largest_passes(train: dict[str, Any], prompt: int, response: int) -> list[tuple[int, int, int]]:
    """The forward passes that can need most memory: pairs, tokens of a prompt and of a response.

    train: the section `train`. prompt, response: the largest numbers of tokens. With a limit of
    tokens, a pass over long responses to short prompts has the most logits.
    """
    tokens = train["micro_batch_tokens"]
    if tokens is None:
        return [(min(train["micro_batch_size"], train["batch_size"]), prompt, response)]
    return [
        (max(1, tokens // (2 * (length + response))), length, response) for length in (prompt, 1)
    ]


def score_bytes(
    shape: Shape,
    micro_batch: int,
    prompt: int,
    response: int,
    rounded: bool,
    width: int = 2,
    eager: bool = False,
) -> float:
    """Peak memory in bytes of the forward pass over pairs.

    It is the memory of the weights, and of either one layer's states or the logits. Weights have
    `width` bytes, except for the embeddings, which are float32 unless all weights are `rounded`, as
    with LoRA and FSDP2. eager: attention as matrix products.
    """
    sequences = 2 * micro_batch
    length = prompt + response
    tokens = sequences * length
    widening = width // 2  # of activations, compared with bfloat16
    in_layer = tokens * of_layer(shape, SCORED_LAYER) * widening
    if eager:
        in_layer += SCORED_EAGER * widening * squares(shape, sequences, length)
    logits = SCORED_LOGIT * sequences * response * shape.vocabulary + 4 * shape.hidden * tokens
    embeddings = 0 if rounded else (WEIGHT - width) * shape.head
    return width * shape.weights + embeddings + max(in_layer, logits)
