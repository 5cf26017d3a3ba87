"""The update of a policy that was trained with LoRA, kept apart from its rounded weights.

Such a policy's folder has the merged weights W + B A in float32. Updates are small, so a program
that reads these weights in bfloat16 would round away a part of every update: bfloat16 resolves
1/256 of a weight. Therefore the folder also has the factors of the update. In bfloat16 a policy is
y = W x + B (A x), where W are the weights without the update. vLLM gets both as a model and an
adapter. Other programs, such as lm-eval, read the merged weights.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from sppo.core.artifacts import read_record
from sppo.core.errors import UserError
from sppo.policies.hub import LORA_FACTORS

ADAPTER = "lora_update"  # the folder of the adapter, for programs that read adapters
Factors = dict[str, tuple[Tensor, Tensor]]  # A (rank, in) and B (out, rank) by a layer's name


class UpdatedLinear(nn.Linear):
    """A linear layer y = W x + B (A x) (+ bias)."""

    update_a: Tensor
    update_b: Tensor

    @classmethod
    def of(cls, layer: nn.Linear, a: Tensor, b: Tensor) -> UpdatedLinear:
        """The layer, which shares the weights of `layer`, with these factors."""
        updated = cls(layer.in_features, layer.out_features, bias=False, device="meta")
        updated.weight, updated.bias = layer.weight, layer.bias
        updated.register_buffer("update_a", a)
        updated.register_buffer("update_b", b)
        return updated

    def forward(self, states: Tensor) -> Tensor:
        update = functional.linear(functional.linear(states, self.update_a), self.update_b)
        return super().forward(states) + update


def read_factors(folder: Path) -> Factors:
    """The factors of a policy's update, float32; empty if it has none."""
    file = Path(folder) / LORA_FACTORS
    if not file.is_file():
        return {}
    try:
        tensors = load_file(file)
    except Exception as error:  # safetensors has an exception class of its own
        raise UserError(
            f"{file} is damaged ({error}); delete the folder and make it again"
        ) from None
    names = {name.removesuffix(".a") for name in tensors if name.endswith(".a")}
    return {name: (tensors[f"{name}.a"], tensors[f"{name}.b"]) for name in sorted(names)}


def write_factors(folder: Path, factors: Factors) -> None:
    """Write the factors into a policy's folder."""
    tensors = {}
    for name, (a, b) in factors.items():
        tensors[f"{name}.a"] = a.detach().float().contiguous()
        tensors[f"{name}.b"] = b.detach().float().contiguous()
    save_file(tensors, folder / LORA_FACTORS)


def split_update(model: Any, factors: Factors, dtype: torch.dtype) -> None:
    """Take the update out of a model's merged weights, and convert both to `dtype`.

    The weights are float32. Where W was a bfloat16 number, W + B A - B A rounds to the same number.
    """
    with torch.no_grad():
        for name, (a, b) in factors.items():
            layer = model.get_submodule(name)
            layer.weight -= b @ a
            parent, _, last = name.rpartition(".")
            updated = UpdatedLinear.of(layer, a.to(dtype), b.to(dtype))
            setattr(model.get_submodule(parent), last, updated)
        # Not model.to(dtype), which would also round buffers such as the frequencies of positions.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)


def write_apart(folder: Path, factors: Factors, target: Path) -> None:
    """Write a policy's weights without its update in bfloat16, and the update as an adapter.

    Args:
        folder: the policy's folder.
        factors: those that it holds.
        target: an empty folder, which becomes a model folder. Its subfolder `ADAPTER` has the
            update in the form of PEFT.

    Needs memory for one file of weights. UserError if a layer of the update has no
    weights in the folder.
    """
    left = set(factors)
    for file in folder.iterdir():
        if file.suffix == ".safetensors":
            tensors = load_file(file)
            for key, weight in tensors.items():
                name = key.removesuffix(".weight")
                if name in left and key != name:
                    a, b = factors[name]
                    weight = weight.float() - b @ a
                    left.remove(name)
                tensors[key] = weight.bfloat16() if weight.is_floating_point() else weight
            save_file(tensors, target / file.name, {"format": "pt"})
        elif file.is_file() and file.name != LORA_FACTORS:
            shutil.copy(file, target)
    if left:
        raise UserError(
            f"{folder} has no weights of {min(left)}, which its LoRA update changes; set"
            " responses.engine: transformers"
        )
    rank = max(len(a) for a, _ in factors.values())
    adapter = target / ADAPTER
    adapter.mkdir()
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(target),
        "r": rank,
        "lora_alpha": rank,  # The factors are scaled already.
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in factors}),
    }
    (adapter / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    tensors = {}
    for name, (a, b) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.bfloat16().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.bfloat16().contiguous()
    save_file(tensors, adapter / "adapter_model.safetensors")


def fold_update(model: Any) -> None:
    """Add kept updates to the weights; the layers become linear layers again."""
    updated = [item for item in model.named_modules() if isinstance(item[1], UpdatedLinear)]
    with torch.no_grad():
        for name, module in updated:
            layer = cast(UpdatedLinear, module)
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            plain.weight, plain.bias = layer.weight, layer.bias
            plain.weight += layer.update_b @ layer.update_a
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, plain)


def check_merged(folder: Path, reader: str) -> None:
    """UserError if merged weights in bfloat16 keep less than half of the policy's last update.

    Its training has measured the share. reader: the program that reads merged weights, the subject
    of a sentence.
    """
    kept = (read_record(folder) or {}).get("lora_update_left_in_bfloat16")
    if kept is not None and kept < 0.5:
        raise UserError(
            f"{reader} reads the merged weights of {folder} in bfloat16, which keep only "
            f"{kept:.0%} of its LoRA update; set responses.engine: transformers, raise "
            "train.learning_rate, or train all weights with train.lora_rank: 0"
        )


def trained_factors(model: Any, before: Factors) -> Factors:
    """The factors of the whole update of a model with adapters of peft: kept and newly trained.

    before: the factors of the policy that training started from, for a model that was read in
    float32, in which they are merged.
    """
    factors: Factors = {}
    for full_name, module in model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        name = full_name.removeprefix("base_model.model.")
        a = module.lora_A["default"].weight.detach().float().cpu()
        b = module.lora_B["default"].weight.detach().float().cpu() * module.scaling["default"]
        layer = module.get_base_layer()
        if isinstance(layer, UpdatedLinear):
            kept = (layer.update_a.float().cpu(), layer.update_b.float().cpu())
        else:
            kept = before.get(name, (a[:0], b[:, :0]))
        factors[name] = (torch.cat([kept[0], a]), torch.cat([kept[1], b], dim=1))
    return factors
