"""Loading policies and other models from Hugging Face model folders."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sppo.core.artifacts import read_json
from sppo.core.errors import UserError, first_line
from sppo.policies.devices import weights_dtype
from sppo.policies.folders import check_policy

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def load_policy(
    folder: Path, dtype: torch.dtype, device: str | None, attention: str | None = None
) -> PreTrainedModel:
    """The policy in evaluation mode.

    In bfloat16 the update of a LoRA policy is kept apart, see `lora_update.py`.

    Every dropout rate is 0, so that the policy is the same function in training. Without a device
    the model stays where it was loaded, for callers that distribute it over processes. UserError if
    the folder is not a valid policy.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from sppo.policies.lora_update import read_factors, split_update

    check_policy(folder)
    factors = read_factors(folder) if dtype == torch.bfloat16 else {}
    config = load_config(folder)
    for name in vars(config):
        is_dropout = "dropout" in name or name.endswith("_pdrop")
        if is_dropout and isinstance(getattr(config, name), float):
            setattr(config, name, 0.0)
    more: dict[str, Any] = {"attn_implementation": attention} if attention else {}
    stored = torch.float32 if factors else dtype
    model = load_whole(AutoModelForCausalLM, folder, config=config, dtype=stored, **more)
    if factors:
        split_update(model, factors, dtype)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if device:
        model.to(device)  # type: ignore[arg-type]  # transformers' decorator hides `self`
    return model.eval()


def load_frozen_policy(
    folder: Path,
    lora_rank: int,
    dtype: torch.dtype,
    device: str,
    attention: str | None = None,
    rounded: bool = False,
) -> PreTrainedModel:
    """The policy for programs that only compute its log-probabilities.

    The numbers are those of the policy in training (`load_policy` with `weights_dtype`), bit for
    bit. `rounded`: those of a policy that FSDP2 divides, see `round_weights`.
    """
    model = load_policy(folder, weights_dtype(lora_rank, dtype), None, attention)
    if rounded:
        round_weights(model, dtype)
    else:
        cast_linear_weights(model, dtype)
    model.to(device)  # type: ignore[arg-type]  # transformers' decorator hides `self`
    return model


def round_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Round all weights to `dtype`, as FSDP2 does when it gathers them.

    The embeddings still give float32 states, see `float32_states`.
    """
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    float32_states(model)


def float32_states(model: PreTrainedModel) -> None:
    """Make the residual stream float32, as with float32 embeddings, whatever type they have."""

    def in_float32(module: Any, inputs: Any, states: torch.Tensor) -> torch.Tensor:
        return states.float()

    model.get_input_embeddings().register_forward_hook(in_float32)


def cast_linear_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Round the weights of linear layers to `dtype`, which autocast would do in every pass.

    This changes no log-probability, halves the memory, and saves the casts. The embeddings are not
    rounded, because autocast does not round them. Often they are the output layer's weights too.
    """
    import torch

    embeddings = model.get_input_embeddings().weight
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.weight is not embeddings:
            module.weight.data = module.weight.data.to(dtype)


def load_config(folder: Path) -> Any:
    """The transformers configuration of a model's folder; UserError if it cannot be loaded."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of many types; the cause of each is the file's content
        if "auto_map" in read_json(Path(folder) / "config.json"):
            raise UserError(
                f"the model in {folder} needs its own code (auto_map in its config.json), which "
                "is not executed here; give a model that transformers supports"
            ) from error
        raise UserError(
            f"cannot use {folder}/config.json ({first_line(error)}); correct it, or "
            "give a model that transformers supports"
        ) from error


def load_whole(
    kind: Any,
    folder: Path,
    head: bool = True,
    others: tuple[str, ...] = (),
    what: str = "a causal language model",
    **options: Any,
) -> PreTrainedModel:
    """The model in a folder, loaded by `kind`, a transformers Auto class, with these options.

    UserError if the model cannot be loaded, if names or shapes of weights differ between the file
    and the model, or if a weight is not finite. (transformers itself initialises missing weights at
    random.) In a job of several processes only the first one checks the weights, because the others
    may hold none.

    `head`: whether a language head in the file must be part of the model. `others`: beginnings of
    names of weights that the caller reads itself. `what`: the form of the model, for an error.
    """
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # the UserErrors below replace its long report
    try:
        model, report = kind.from_pretrained(
            folder,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    except (RuntimeError, MemoryError):
        raise
    except Exception as error:  # of many types; the cause of each is the content of the files
        raise UserError(
            f"cannot load the model in {folder} ({first_line(error)}); give {what} "
            "that transformers supports, saved with save_pretrained"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    if int(os.environ.get("RANK", 0)) == 0:
        _check_names_of_weights(report, folder, head, others)
        _check_finite(model, folder)
    return model


def _check_names_of_weights(
    report: dict[str, Any], folder: Path, head: bool, others: tuple[str, ...]
) -> None:
    """UserError if transformers' loading report names differences between file and model."""
    ignored = re.compile(r"rotary_emb\.inv_freq$" + ("" if head else r"|^lm_head\."))
    unexpected = [
        name
        for name in report["unexpected_keys"]
        if not ignored.search(name) and not name.startswith(others)
    ]
    differences = {
        "lack": report["missing_keys"],
        "also have": unexpected,
        "have in another shape": [name for name, *_ in report["mismatched_keys"]],
    }
    found = [f"{kind} {_first_names(names)}" for kind, names in differences.items() if names]
    if found:
        raise UserError(
            f"the weights of {folder} do not belong to the model in its config.json: they "
            f"{', and '.join(found)}; save the model again with save_pretrained"
        )


def _check_finite(model: PreTrainedModel, folder: Path) -> None:
    """UserError if a weight is NaN or infinite."""
    import torch

    for name, weight in model.state_dict().items():
        # aminmax reads the weight once and makes no copy. This takes 0.15 s for the demo's policy,
        # half the time of computing its hash.
        if weight.is_floating_point() and weight.numel() and not weight.is_meta:
            if not all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(weight)):
                raise UserError(
                    f"the weights of {folder} are not all finite: {name} has NaN or "
                    "infinity; make or save the model again"
                )


def _first_names(names: Any) -> str:
    """The first three names, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
