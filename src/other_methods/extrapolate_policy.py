"""ExPO: a policy beyond the aligned one, on the line from the base through it, without training.

Reads   the base policy, an aligned policy of the same shape
Writes  policy/ (a Hugging Face folder, float32), a record beside it
Paper   2404.16792: theta = theta_aligned + alpha (theta_aligned - theta_base), for every weight
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import _path  # noqa: F401
from sppo.core.artifacts import read_json, recorded, written_whole
from sppo.core.errors import UserError, run
from sppo.policies.models import check_policy
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
        "--alpha", type=float, required=True, help="how far beyond: 0 is the aligned policy itself"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the new policy")
    args = parser.parse_args()

    import torch

    from sppo.policies.models import load_policy, load_tokenizer, start_torch

    start_torch(gpus=0)
    with recorded("train", args.output, [args.base, args.aligned], vars(args)):
        model = load_policy(args.aligned, torch.float32, "cpu")
        carry_on(model, args.base, args.aligned, args.alpha)
        with written_whole(args.output) as temporary:
            model.save_pretrained(temporary)
            load_tokenizer(args.aligned).save_pretrained(temporary)
            text = f"theta_aligned + {args.alpha:g} (theta_aligned - theta_base) for every weight, without training: https://arxiv.org/abs/2404.16792"
            (temporary / "README.md").write_text(
                model_card(args.aligned, "A policy of ExPO", {"Method": text}, tag="expo"),
                encoding="utf-8",
            )


def carry_on(model: PreTrainedModel, base: Path, aligned: Path, alpha: float) -> None:
    """Move each weight of `model`, the aligned policy in float32, beyond the base's, in place.

    The base is read from its files tensor by tensor, so that one policy lies in memory. A base of
    another shape is a UserError, before any weight is moved.
    """
    import torch
    from safetensors import safe_open

    check_policy(base)
    index = base / "model.safetensors.index.json"
    files = read_json(index)["weight_map"].values() if index.is_file() else ["model.safetensors"]
    with contextlib.ExitStack() as opened:
        of_base = {}  # the file of each tensor
        for file in sorted(set(files)):
            reader = opened.enter_context(safe_open(base / file, "pt"))
            of_base |= dict.fromkeys(reader.keys(), reader)
        weights = model.state_dict()
        names: dict[int, list[str]] = {}  # of each weight; tied ones have two, files one of them
        for name, weight in weights.items():
            names.setdefault(weight.data_ptr(), []).append(name)
        pairs = [
            (weights[own[0]], next((name for name in own if name in of_base), None))
            for own in names.values()
        ]
        same = all(
            name and of_base[name].get_slice(name).get_shape() == list(weight.shape)
            for weight, name in pairs
        )
        # Old checkpoints hold the frequencies of rotary embeddings, which are computed.
        more = [name for name in of_base if name not in weights and not name.endswith("inv_freq")]
        if more or not same:
            raise UserError(
                f"{base} and {aligned} are models of different shapes; give a base and "
                "what was trained from it"
            )
        for weight, name in pairs:
            weight.add_(alpha * (weight - of_base[name].get_tensor(name).to(torch.float32)))


if __name__ == "__main__":
    run(main)
