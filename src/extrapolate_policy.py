"""ExPO: a policy beyond the aligned one, on the line from the base through it, without training.

Reads   the base policy, an aligned policy of the same shape
Writes  policy/ (a Hugging Face folder, float32), a record beside it
Paper   2404.16792: theta = theta_aligned + alpha (theta_aligned - theta_base), for every weight
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sppo.artifacts import recorded, written_whole
from sppo.cards import model_card
from sppo.errors import UserError, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--aligned", type=Path, required=True)
    parser.add_argument("--alpha", type=float, required=True, help="how far beyond: 0 is the aligned policy itself")
    parser.add_argument("--output", type=Path, required=True, help="folder of the new policy")
    args = parser.parse_args()

    from sppo.models import load_policy, load_tokenizer, start_torch
    import torch

    start_torch()
    with recorded("train", args.output, [args.base, args.aligned], vars(args)):
        base, aligned = (load_policy(folder, torch.float32, "cpu").state_dict() for folder in (args.base, args.aligned))
        if {name: w.shape for name, w in base.items()} != {name: w.shape for name, w in aligned.items()}:
            raise UserError(f"{args.base} and {args.aligned} are models of different shapes; give a base and what was trained from it")
        model = load_policy(args.aligned, torch.float32, "cpu")
        model.load_state_dict({name: weight + args.alpha * (weight - base[name]) for name, weight in aligned.items()})
        with written_whole(args.output) as temporary:
            model.save_pretrained(temporary)
            load_tokenizer(args.aligned).save_pretrained(temporary)
            text = f"theta_aligned + {args.alpha:g} (theta_aligned - theta_base) for every weight, without training: https://arxiv.org/abs/2404.16792"
            (temporary / "README.md").write_text(model_card(args.aligned, "A policy of ExPO", {"Method": text}, tag="expo"), encoding="utf-8")


if __name__ == "__main__":
    run(main)
