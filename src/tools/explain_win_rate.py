"""Where a win rate by annotators of constraints comes from, beside answers that no model wrote.

    .venv/bin/python src/tools/explain_win_rate.py    # after make demo

Reads   iter{t}/alpaca_eval_outputs.json of a finished experiment and of its runs, and the base's
        answers, iter0/reference_outputs.json
Prints  a table in Markdown. Each line is a policy, or a rule that makes an answer from the
        constraints or from the base's answer.

A constraint's column has the percentage points of the win rate above 50 that its annotators give.
The columns add up to the win rate. "All followed" is the per cent of answers that follow all
constraints of their instruction, by IFEval's strict metric.

The rules show what the annotators cannot see. They check constraints and signs of degenerate text,
so an answer without sense can win.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

import _path  # noqa: F401
from sppo.core.errors import UserError, run
from sppo.evaluation.alpaca_eval import read_outputs
from sppo.preferences.base import settings_for
from sppo.preferences.constraints import Instruction, follows
from sppo.preferences.verifiable import VerifiableModel
from sppo.reporting.table_formats import markdown_table

GENERAL = "general"  # the column of the annotator without a constraint


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument(
        "--annotators", default="verifiable", help="verifiable (default) or a .yaml of annotators"
    )
    args = parser.parse_args()

    base_file = args.results / "iter0/reference_outputs.json"
    if not base_file.is_file():
        raise UserError(f"{base_file} is missing; run make demo, or give --results")
    base = {row["instruction"]: row["output"] for row in read_outputs(base_file)}
    model = VerifiableModel(settings_for(args.annotators), None, "cpu")
    if unknown := [prompt for prompt in base if prompt.strip() not in model.instructions]:
        raise UserError(
            f"{args.annotators} knows no constraints of {unknown[0][:60]!r}; give the --annotators"
            " of this experiment"
        )
    policies = {}
    for name, file in outputs_of(args.results):
        answers = {row["instruction"]: row["output"] for row in read_outputs(file)}
        if answers.keys() == base.keys():  # others belong to another experiment
            policies[name] = answers
    instructions = [model.instructions[prompt.strip()] for prompt in base]
    for name, rule in RULES.items():
        policies[name] = dict(zip(base, map(rule, instructions, base.values()), strict=True))
    lines = [(name, *explained(model, base, answers)) for name, answers in policies.items()]
    kinds = sorted({kind for _, points, _ in lines for kind in points})
    print(
        markdown_table(
            ["answers", "win rate", *kinds, "all followed"],
            [
                [
                    name,
                    f"{50 + sum(points.values()):.1f}",
                    *(f"{points[kind]:+.1f}" for kind in kinds),
                    f"{followed:.0f}",
                ]
                for name, points, followed in lines
            ],
        )
    )


def outputs_of(results: Path) -> Iterator[tuple[str, Path]]:
    """The outputs of the main run and of the other runs, by the name of the policy's folder."""
    for pattern in ("iter*", "*/iter*"):
        for folder in sorted(results.glob(pattern)):
            file = folder / "alpaca_eval_outputs.json"
            if file.is_file():
                yield str(folder.relative_to(results)), file


def explained(
    model: VerifiableModel, base: dict[str, str], answers: dict[str, str]
) -> tuple[dict[str, float], float]:
    """The points of the win rate above 50 by kind of constraint, and the per cent that follow all.

    base, answers: by instruction.
    """
    points: dict[str, float] = defaultdict(float)
    followed = 0
    for prompt, against in base.items():
        instruction = model.instructions[prompt.strip()]
        annotators = model.grades(instruction, [answers[prompt], against])
        total = sum(model.weights[name] for name, *_ in annotators)
        for name, constraint, grades in annotators:
            vote = 0.5 * float(np.sign(grades[0] - grades[1]))
            share = model.weights[name] / total / len(base)
            points[constraint or GENERAL] += 100 * share * vote
        followed += all(follows(instruction, answers[prompt])[0])
    return points, 100 * followed / len(base)


def shortened(instruction: Instruction, answer: str) -> str:
    """The base's answer without commas, cut where the limit of words is, and with a full stop."""
    limits = [
        each.arguments["num_words"] - 1
        for each in instruction.constraints
        if each.id == "length_constraints:number_words"
        and each.arguments.get("relation") == "less than"
    ]
    words = answer.replace(",", "").split()[: min(limits, default=None)]
    return " ".join(words).rstrip(".") + "."


def required_words(instruction: Instruction) -> str:
    """The words that the answer has to contain."""
    return " ".join(
        word
        for each in instruction.constraints
        if each.id == "keywords:existence"
        for word in each.arguments["keywords"]
    )


# Each makes an answer from the instruction and the base's answer.
RULES: dict[str, Callable[[Instruction, str], str]] = {
    'always "Some of it may be true."': lambda instruction, answer: "Some of it may be true.",
    "the base's answer, shortened, without commas": shortened,
    "only the required words": lambda instruction, answer: f"{required_words(instruction)}.",
    '"It was only once very nice here", required words': lambda instruction, answer: (
        f"It was only once very nice here {required_words(instruction)}."
    ),
}

if __name__ == "__main__":
    run(main)
