"""Best of n, or best of Nash: keep the answer that the preference model prefers among the first n.

Reads   several answers to each evaluation instruction (answer_instructions.py --samples), the
        preference model
Writes  outputs in alpaca-eval's format, one for each instruction, and a record
Paper   2405.00675, section 5.2 (best-of-16 by PairRM); the best answer has the highest mean logit,
        as the winner has in training

`--choice nash` draws the answer from the equilibrium of the game whose payoffs are the preferences
among the n answers. If an answer beats each other one, it is always chosen. If preferences are
cyclic, no answer is best, and several are drawn with the probabilities of the equilibrium.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import _path  # noqa: F401
from sppo.core.artifacts import known_hash, read_json, recorded, write_json
from sppo.core.config import DEVICES
from sppo.core.errors import UserError, run
from sppo.core.flags import add_section
from sppo.preferences.base import (
    Group,
    compare,
    load_preference_model,
    model_files,
    option_keys,
    options_of,
    settings_for,
)
from sppo.preferences.estimates import (
    condorcet_winner,
    cyclic_prompts,
    cyclic_triples,
    mean_logits,
    win_probabilities,
)
from sppo.theory.games import nash

Array = NDArray[np.float64]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--answers", type=Path, required=True)
    parser.add_argument("--n", type=int, required=True)
    parser.add_argument(
        "--choice",
        choices=("best", "nash"),
        default="best",
        help="the highest mean logit, or a draw from the equilibrium",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws of --choice nash")
    add_section(parser, "preference", only=("model", *option_keys()))
    parser.add_argument(
        "--ranker-base", type=Path, nargs="?", help="folder of the adapter's base model"
    )
    parser.add_argument(
        "--generator", required=True, help="name of the reranked policy in the outputs"
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", choices=DEVICES, default="auto")
    args = parser.parse_args()

    answers = defaultdict(list)
    if args.answers.is_file():
        known_hash(args.answers)
    for row in read_json(args.answers):
        answers[row["instruction"]].append(row)
    fewest = min((len(rows) for rows in answers.values()), default=0)
    if not 1 <= args.n <= fewest:
        raise UserError(
            f"best of {args.n} needs {args.n} answers to every instruction, and {args.answers} has "
            f"{fewest}; raise best_of_n.samples"
        )
    settings = settings_for(args.model, **options_of(vars(args)))
    inputs = [args.answers, *model_files(args.model, args.ranker_base)]
    with recorded("answer", args.output, inputs, vars(args)) as facts:
        model = load_preference_model(settings, args.ranker_base, args.device)
        groups = {
            str(number): Group(instruction, [row["output"] for row in rows[: args.n]])
            for number, (instruction, rows) in enumerate(answers.items(), start=1)
        }
        compared = list(compare(model, groups, "instruction").values())
        P = [win_probabilities(logits) for logits in compared]
        if args.choice == "nash":
            mixtures = [nash(matrix) for matrix in P]
            chosen = [
                drawn(mixture, f"{args.seed}/{instruction}")
                for mixture, instruction in zip(mixtures, answers, strict=True)
            ]
            facts["mean_support"] = float(np.mean([(each > 1e-6).sum() for each in mixtures]))
        else:
            chosen = [int(mean_logits(logits).argmax()) for logits in compared]
        picked = [
            rows[index] | {"generator": args.generator}
            for rows, index in zip(answers.values(), chosen, strict=True)
        ]
        write_json(args.output, picked)
        facts |= {
            "preference_model": model.name,
            "instructions": len(picked),
            "cyclic_triples": cyclic_triples(P),
            "cyclic_prompts": cyclic_prompts(P),
            "condorcet_winner": condorcet_winner(P),
        }


def drawn(mixture: Array, seed: str) -> int:
    """An index, drawn with the probabilities `mixture`, (n,)."""
    indices = range(len(mixture))
    return random.Random(f"nash/{seed}").choices(indices, weights=mixture.tolist())[0]


if __name__ == "__main__":
    run(main)
