"""The memory model compared with what PyTorch allocates.

The tensors are fake: they have shapes, but no data.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig

from sppo.policies.models import cast_linear_weights, round_weights
from sppo.policies.shapes import SHAPES, Shape
from sppo.reporting import cost_model
from sppo.training.batches import pair_batch
from sppo.training.logps import forward_precision, response_logps
from sppo.training.trainer import gather_in_bfloat16, with_lora

MISTRAL = "mistralai/Mistral-7B-Instruct-v0.2"
LLAMA = "meta-llama/Meta-Llama-3-8B-Instruct"
GEMMA = "google/gemma-2-9b-it"
# A small shape for the tests with real tensors.
SMALL = Shape(2, 256, 896, 4, 1, 64, 4000, False)


class Peak(TorchDispatchMode):
    """Largest number of bytes of storages that exist at the same time.

    FSDP frees a storage by resizing it to 0 bytes.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.bytes = 0
        self.live = {}
        for parameter in model.parameters():
            self.hold(parameter)

    def hold(self, tensor: torch.Tensor) -> None:
        storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
        self.live[storage._cdata] = weakref.ref(storage)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.hold(tensor)
        found = {key: storage() for key, storage in self.live.items()}
        self.live = {key: self.live[key] for key, storage in found.items() if storage is not None}
        now = sum(storage.nbytes() for storage in found.values() if storage is not None)
        self.bytes = max(self.bytes, now)
        return out


@pytest.fixture
def mesh():
    """A group of eight processes; this process is the first, and the others do not exist."""
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    yield init_device_mesh("cpu", (8,))
    dist.destroy_process_group()


def make_model(shape: Shape, dtype: torch.dtype, eager: bool) -> torch.nn.Module:
    if shape.softcap:
        config_class = Gemma2Config
    elif shape.vocabulary > 1e5:
        config_class = LlamaConfig
    else:
        config_class = MistralConfig
    config = config_class(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied,
        use_cache=False,
    )
    return AutoModelForCausalLM.from_config(
        config, attn_implementation="eager" if eager else "sdpa", dtype=dtype
    )


def batch_of(micro: int, prompt: int, response: int) -> dict[str, torch.Tensor]:
    one = {
        "prompt_token_ids": [5] * prompt,
        "chosen_token_ids": [5] * response,
        "rejected_token_ids": [5] * response,
    }
    return pair_batch([one] * micro, "padded")


def training_peak(
    shape: Shape,
    micro: int,
    prompt: int,
    response: int,
    *,
    lora: int = 0,
    every: int = 1,
    eager: bool = False,
    mesh: DeviceMesh | None = None,
    width: int = 2,
) -> int:
    """Peak bytes of two steps of two micro-batches with the RMSProp of PyTorch, as on a GPU.

    every: every n-th layer is checkpointed; 0: none.
    """
    dtype = torch.bfloat16 if width == 2 else torch.float32
    batch = batch_of(micro, prompt, response)
    # PEFT does not support fake tensors, so the tensors of LoRA are real and small.
    with contextlib.nullcontext() if lora else FakeTensorMode(allow_non_fake_inputs=True):
        inner = make_model(shape, dtype if lora else torch.float32, eager)
        model = with_lora(inner, {"lora_rank": lora, "lora_alpha": 32}, seed=0)
        if every:
            inner.activation_checkpointing_enable(every_n_layers=every)
        if mesh:
            divide(inner, mesh)
        model.train()
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = torch.optim.RMSprop(trained, foreach=mesh is None)
        with Peak(model) as peak:
            for _ in range(2):
                for _ in range(2):
                    with forward_precision("cpu", dtype):
                        loss = response_logps(model, batch).mean()
                    loss.backward()
                    del loss
                optimizer.step()
                optimizer.zero_grad()
    return peak.bytes


def divide(model: torch.nn.Module, mesh: DeviceMesh) -> None:
    """Divide a model as accelerate and `gather_in_bfloat16` do."""
    plugin = SimpleNamespace()
    gather_in_bfloat16(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)), model)
    shard = functools.partial(fully_shard, mesh=mesh, mp_policy=plugin.mixed_precision_policy)
    layers = model.model.layers
    for i in range(len(layers)):
        shard(layers[i])
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embeddings.weight is not head.weight:
        shard(embeddings)
        last = [model.model.norm, head]
    else:
        last = [model.model.norm, embeddings, head]
    shard(last, reshard_after_forward=False)
    shard(model)


def deep(name: str, layers: int) -> Shape:
    return replace(SHAPES[name], layers=layers)


@pytest.mark.parametrize(
    ("shape", "micro", "prompt", "response"),
    [
        (deep(MISTRAL, 4), 1, 512, 512),
        (deep(MISTRAL, 2), 4, 2048, 64),
        (deep(MISTRAL, 2), 4, 16, 2048),
        (deep(GEMMA, 2), 1, 2048, 16),
        (deep(GEMMA, 4), 1, 4096, 16),
        (deep(GEMMA, 2), 1, 16, 2048),
    ],
)
def test_training_memory_of_one_gpu(shape, micro, prompt, response):
    found = training_peak(shape, micro, prompt, response, eager=shape.softcap)
    formula = cost_model.train_bytes(shape, 1, micro, prompt, response, 0, 1, eager=shape.softcap)
    assert formula == pytest.approx(found, rel=0.15)


@pytest.mark.parametrize(
    ("shape", "micro", "prompt", "response"),
    [
        (deep(MISTRAL, 4), 4, 4096, 2048),
        (deep(LLAMA, 4), 2, 6144, 2048),
        (deep(GEMMA, 4), 1, 2048, 2048),
        (deep(GEMMA, 2), 1, 64, 64),
        (deep(MISTRAL, 4), 1, 16, 16),
        (deep(LLAMA, 2), 1, 16, 16),
        (replace(deep(MISTRAL, 4), tied=True), 1, 16, 16),
    ],
)
def test_training_memory_of_one_of_eight_gpus(shape, micro, prompt, response, mesh):
    """FSDP2 gathers the weights of two layers, the embeddings and the output layer."""
    found = training_peak(shape, micro, prompt, response, eager=shape.softcap, mesh=mesh)
    formula = cost_model.train_bytes(shape, 8, micro, prompt, response, 0, 1, eager=shape.softcap)
    assert formula == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize(("layers", "width"), [(2, 4), (4, 2)])
def test_training_memory_without_checkpointing(layers, width):
    shape = deep(MISTRAL, layers)
    found = training_peak(shape, 2, 1024, 256, every=0, width=width)
    formula = cost_model.train_bytes(shape, 1, 2, 1024, 256, 0, 0, width)
    assert formula == pytest.approx(found, rel=0.15)


@pytest.mark.parametrize("every", [2, 4])
@pytest.mark.parametrize("gpus", [1, 8])
def test_training_memory_with_every_nth_layer_checkpointed(gpus, every, mesh):
    shape = deep(MISTRAL, 4)
    found = training_peak(shape, 2, 2048, 512, every=every, mesh=mesh if gpus > 1 else None)
    formula = cost_model.train_bytes(shape, gpus, 2, 2048, 512, 0, every)
    assert formula == pytest.approx(found, rel=0.15)


@pytest.mark.parametrize(
    ("shape", "prompt", "response"),
    [
        (replace(SMALL, layers=4), 1024, 16),
        (SMALL, 16, 512),
        (replace(SMALL, intermediate=448), 1024, 64),
    ],
)
def test_training_memory_of_lora(shape, prompt, response):
    found = training_peak(shape, 1, prompt, response, lora=8)
    formula = cost_model.train_bytes(shape, 1, 1, prompt, response, 8, 1)
    assert formula == pytest.approx(found, rel=0.15)


@pytest.mark.parametrize(
    ("shape", "micro", "prompt", "response"),
    [
        (deep(MISTRAL, 2), 4, 2048, 16),
        (deep(MISTRAL, 2), 1, 16, 2048),
        (deep(GEMMA, 2), 1, 4096, 16),
    ],
)
@pytest.mark.parametrize("rounded", [False, True])
def test_memory_of_scoring(shape, micro, prompt, response, rounded):
    batch = batch_of(micro, prompt, response)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = make_model(shape, torch.float32, shape.softcap)
        (round_weights if rounded else cast_linear_weights)(model, torch.bfloat16)
        with Peak(model) as peak, forward_precision("cpu", torch.bfloat16):
            response_logps(model, batch)
    formula = cost_model.score_bytes(shape, micro, prompt, response, rounded, eager=shape.softcap)
    assert formula == pytest.approx(peak.bytes, rel=0.15)
