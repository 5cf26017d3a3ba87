"""ExPO: extrapolate from the base policy through the aligned policy, without training.

Reads   the base policy, an aligned policy of the same shape
Writes  policy/ (a Hugging Face folder, float32) and a record beside it
Paper   2404.16792: theta = theta_aligned + alpha (theta_aligned - theta_base), for each weight
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _path  # noqa: F401
from sppo.core.artifacts import read_json, recorded, written_whole
from sppo.core.errors import UserError, run
from sppo.policies.folders import WEIGHTS_INDEX, check_policy
from sppo.reporting.cards import model_card

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--aligned", type=Path, required=True)
    parser.add_argument(
        "--alpha",
        type=float,
        required=True,
        help="size of the extrapolation; 0 gives the aligned policy",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the new policy")
    args = parser.parse_args()

    import torch

    from sppo.policies.chats import load_tokenizer
    from sppo.policies.devices import start_torch
    from sppo.policies.models import load_policy

    start_torch(gpus=0)
    with recorded("train", args.output, [args.base, args.aligned], vars(args)):
        model = load_policy(args.aligned, torch.float32, "cpu")
        extrapolate(model, args.base, args.aligned, args.alpha)
        with written_whole(args.output) as temporary:
            model.save_pretrained(temporary)
            load_tokenizer(args.aligned).save_pretrained(temporary)
            text = (
                f"theta_aligned + {args.alpha:g} (theta_aligned - theta_base) for every weight, "
                "without training: https://arxiv.org/abs/2404.16792"
            )
            (temporary / "README.md").write_text(
                model_card(args.aligned, "A policy of ExPO", {"Method": text}, tag="expo"),
                encoding="utf-8",
            )


def extrapolate(model: PreTrainedModel, base: Path, aligned: Path, alpha: float) -> None:
    """Move each weight of `model`, the aligned policy in float32, away from the base, in place.

    The base is read from its files tensor by tensor, so that only one policy is in memory. A base
    of another shape is a UserError, raised before any weight is changed.
    """
    import torch
    from safetensors import safe_open

    check_policy(base)
    index = base / WEIGHTS_INDEX
    files = read_json(index)["weight_map"].values() if index.is_file() else ["model.safetensors"]
    with contextlib.ExitStack() as opened:
        base_readers: dict[str, Any] = {}  # the opened file of each tensor of the base
        for file in sorted(set(files)):
            reader = opened.enter_context(safe_open(base / file, "pt"))
            base_readers |= dict.fromkeys(reader.keys(), reader)
        weights = model.state_dict()
        # Tied weights have several names in the model, but the files contain only one of them.
        names_of_weight: dict[int, list[str]] = {}
        for name, weight in weights.items():
            names_of_weight.setdefault(weight.data_ptr(), []).append(name)
        pairs = []  # each weight, and its name in the files of the base, "" if absent
        for names in names_of_weight.values():
            base_name = next((name for name in names if name in base_readers), "")
            pairs.append((weights[names[0]], base_name))
        same_shapes = all(
            name and base_readers[name].get_slice(name).get_shape() == list(weight.shape)
            for weight, name in pairs
        )
        # Old checkpoints contain the frequencies of rotary embeddings, which are not weights.
        surplus = [
            name for name in base_readers if name not in weights and not name.endswith("inv_freq")
        ]
        if surplus or not same_shapes:
            raise UserError(
                f"{base} and {aligned} are models of different shapes; give a base and "
                "a policy that was trained from it"
            )
        for weight, name in pairs:
            weight.add_(alpha * (weight - base_readers[name].get_tensor(name).to(torch.float32)))


if __name__ == "__main__":
    run(main)
