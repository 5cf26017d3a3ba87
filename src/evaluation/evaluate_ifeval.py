"""IFEval: the share of verifiable constraints that a policy's answers follow.

Reads   instructions with constraints in IFEval's form, a policy's answers to them in alpaca-eval's
        format
Writes  ifeval.json (per cent; by prompt and by constraint, strict and loose) and its record
Source  arXiv 2311.07911; the checkers and metrics are lm-eval's
Departs from lm-eval: this repository generates the answers, with the decoding of the configuration.
        IFEval's own decoding is greedy, with 1280 tokens.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from importlib import metadata
from pathlib import Path
from typing import Any

import _path  # noqa: F401
from sppo.core.artifacts import file_hash, recorded, write_json
from sppo.core.errors import UserError, run
from sppo.evaluation.alpaca_eval import read_outputs
from sppo.evaluation.ifeval import OFFICIAL
from sppo.preferences.constraints import (
    Instruction,
    check_known,
    follows,
    read_instructions_to_check,
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--instructions", type=Path, required=True)
    parser.add_argument("--answers", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="ifeval.json")
    args = parser.parse_args()

    instructions = read_instructions_to_check(args.instructions)
    check_known(instructions, args.instructions)
    known = {each.prompt: each for each in instructions}
    outputs = read_outputs(args.answers)
    for row in outputs:
        if row["instruction"] not in known:
            raise UserError(
                f"{args.answers} answers {row['instruction'][:60]!r}, which {args.instructions}"
                " lacks; give the file with the answered instructions"
            )
    with recorded("ifeval", args.output, [args.instructions, args.answers], vars(args)):
        pairs = [(known[row["instruction"]], row["output"]) for row in outputs]
        write_json(
            args.output,
            scores(pairs)
            | {
                "instructions": str(args.instructions),
                "official": file_hash(args.instructions) == OFFICIAL.sha256,
                "policy": outputs[0]["generator"],
                "versions": {name: metadata.version(name) for name in ("lm-eval", "nltk")},
            },
        )


def scores(answers: list[tuple[Instruction, str]]) -> dict[str, Any]:
    """IFEval's four rates in per cent, the 95% interval of the first, and the rates by constraint.

    answers: each instruction with its answer. The interval is Wilson's, over prompts.
    """
    from scipy.stats import binomtest

    by_kind: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    prompts: list[tuple[bool, bool]] = []
    for instruction, answer in answers:
        strict, loose = follows(instruction, answer)
        prompts.append((all(strict), all(loose)))
        for constraint, is_strict, is_loose in zip(
            instruction.constraints, strict, loose, strict=True
        ):
            by_kind[constraint.id].append((is_strict, is_loose))
    constraints = [row for rows in by_kind.values() for row in rows]
    n_strict = sum(strict for strict, _ in prompts)
    interval = binomtest(n_strict, len(prompts)).proportion_ci(method="wilson")
    return {
        "prompt_strict": _rate(prompts, 0),
        "prompt_strict_interval": [100 * float(interval.low), 100 * float(interval.high)],
        "prompt_loose": _rate(prompts, 1),
        "instruction_strict": _rate(constraints, 0),
        "instruction_loose": _rate(constraints, 1),
        "n_prompts": len(prompts),
        "n_instructions": len(constraints),
        "by_constraint": {
            kind: {"n": len(rows), "strict": _rate(rows, 0), "loose": _rate(rows, 1)}
            for kind, rows in sorted(by_kind.items())
        },
    }


def _rate(rows: list[tuple[bool, bool]], which: int) -> float:
    """Per cent of rows that are followed, strictly (0) or loosely (1)."""
    return 100 * sum(row[which] for row in rows) / len(rows)


if __name__ == "__main__":
    run(main)
