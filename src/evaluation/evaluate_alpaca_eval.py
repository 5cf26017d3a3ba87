"""Win rate and length-controlled (LC) win rate of a policy against a reference.

Reads   the policy's outputs and the reference's, in alpaca-eval's format; the judge
Writes  alpaca_eval.json (all rates in per cent), the annotations in alpaca-eval's format, their
        records
Metric  alpaca-eval's own code, version 0.6.6; LC: arXiv 2404.04475
Departs from the paper, which judges with GPT-4 turbo on the 805 instructions of AlpacaEval: by
default the embedded judge compares answers to this repository's held-out instructions. The paper's
evaluation is `--judge weighted_alpaca_eval_gpt4_turbo` with the 805 instructions and
`--difficulty df_gamed.csv`. The bootstrap intervals are an addition.
"""

from __future__ import annotations

import argparse
import math
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import _path  # noqa: F401
from sppo.core.artifacts import file_hash, recorded, write_json
from sppo.core.config import DEVICES
from sppo.core.errors import UserError, run
from sppo.core.flags import add_section, at_least, boolean, json_object
from sppo.evaluation.alpaca_eval import (
    OFFICIAL_DIFFICULTY,
    Judge,
    check_order,
    evaluate,
    length_controlled_warning,
    length_model,
    metrics,
    paired,
    pinned_warning,
    read_outputs,
)
from sppo.evaluation.judges import ALPACA_EVAL
from sppo.preferences.base import local_kind, model_files, option_keys, options_of
from sppo.preferences.embedded_data import instruction_hash

VERSIONS = (
    "alpaca-eval",
    "scikit-learn",
    "numpy",
    "pandas",
    "scipy",
    "patsy",
    "torch",
    "transformers",
    "openai",
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--outputs", type=Path, required=True, help="the policy's outputs")
    parser.add_argument(
        "--reference",
        type=Path,
        required=True,
        help="the reference's outputs on the same instructions",
    )
    parser.add_argument("--output", type=Path, required=True, help="alpaca_eval.json")
    parser.add_argument("--annotations", type=Path, required=True, help="file for the judgments")
    parser.add_argument(
        "--judge",
        required=True,
        help="judge, ranker, an adapter folder, openai, or an annotators_config of alpaca-eval",
    )
    parser.add_argument(
        "--judge-base", type=Path, help="Hugging Face folder of the embedded judge's base"
    )
    parser.add_argument(
        "--device",
        choices=DEVICES,
        default="auto",
        help="where the embedded judge runs",
    )
    parser.add_argument("--judge-model", help="model name for openai")
    # How a judge that is a preference model computes; --judge-base-url is for openai too.
    add_section(parser, "preference", only=option_keys(), prefix="judge_")
    parser.add_argument(
        "--both-orders",
        type=boolean,
        default=False,
        help="true: a judge behind an API reads each pair in both orders",
    )
    parser.add_argument(
        "--judge-passes",
        type=at_least(1),
        default=1,
        help="how often a judge behind an API is asked the same",
    )
    parser.add_argument(
        "--difficulty", default="none", help="df_gamed.csv for the 805 instructions, or none"
    )
    parser.add_argument(
        "--bootstrap",
        type=at_least(0),
        default=10000,
        help="resamples for the win rate's interval; 0 for none",
    )
    parser.add_argument(
        "--length-controlled-bootstrap",
        type=at_least(0),
        default=300,
        help="refits for LC's interval; 0 for none",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap")
    parser.add_argument("--threads", type=int, default=1, help="number of processes that refit LC")
    parser.add_argument(
        "--policy", help="name of the policy in the result; default: its generator name"
    )
    parser.add_argument(
        "--decoding",
        type=json_object,
        default={},
        help="JSON object with the decoding settings, for the result",
    )
    return parser.parse_args()


def main() -> None:
    args = arguments()
    ALPACA_EVAL.check(vars(args))
    difficulty = None if args.difficulty == "none" else Path(args.difficulty)
    reference = read_outputs(args.reference)
    outputs = paired(read_outputs(args.outputs), reference)
    if args.policy and outputs[0]["generator"] != args.policy:
        raise UserError(
            f"{args.outputs} holds the outputs of {outputs[0]['generator']}, not of "
            f"{args.policy}; delete it and run again"
        )
    if difficulty:
        check_order(reference, difficulty)
    inputs = [args.outputs, args.reference, *model_files(args.judge, args.judge_base)]
    if difficulty:
        inputs.append(difficulty)
    with (
        recorded("judge", args.output, inputs, vars(args)),
        length_model(len(reference), difficulty) as (formula, file),
    ):
        seen = seen_in_training(args.judge, reference)
        cache = args.output.parent / ".judgments"
        row, annotations, details = evaluate(
            outputs, reference, formula, file, cache, judge_of(args)
        )
        if seen is not None:
            details = details | {"instructions_seen_in_training": seen}
        empty = sum(not line["output"].strip() for line in outputs)
        if empty:
            warn(f"{empty} of {len(outputs)} answers in {args.outputs} are empty")
        intervals = bootstrap(
            annotations,
            formula,
            file,
            args.bootstrap,
            args.length_controlled_bootstrap,
            args.seed,
            args.threads,
        )
        warning = doubt_about_length_control(row, intervals)
        if warning:
            warn(f"do not rely on the length-controlled win rate: {warning}")
        # The seconds of the evaluation are in the record of args.output.
        with recorded("judge", args.annotations, inputs, vars(args)):
            write_json(
                args.annotations,
                [{key: _plain(value) for key, value in line.items()} for line in annotations],
            )
        lengths = [len(line["output"]) for line in reference]
        write_json(
            args.output,
            rates(row)
            | intervals
            | {
                "n_empty": empty,
                "length_controlled_warning": warning,
                "reference_avg_length": int(sum(lengths) / len(lengths)),
                "length_controlled_model": formula,
                "difficulty": difficulty
                and {
                    "path": str(difficulty),
                    "official": file_hash(difficulty) == OFFICIAL_DIFFICULTY,
                },
                "judge": args.judge,
                "judge_details": details,
                "policy": args.policy or outputs[0]["generator"],
                "reference": reference[0]["generator"],
                "decoding": args.decoding,
                "versions": {name: metadata.version(name) for name in VERSIONS},
                "annotations": str(args.annotations),
            },
        )


def judge_of(args: argparse.Namespace) -> Judge:
    """The judge that the arguments describe."""
    return Judge(
        args.judge,
        args.judge_model,
        args.judge_base_url,
        args.judge_base,
        args.device,
        args.both_orders,
        args.judge_passes,
        options_of(vars(args), prefix="judge_"),
    )


def seen_in_training(judge: str, reference: list[dict[str, Any]]) -> int | None:
    """How many instructions a local judge was trained on, with a warning; None for other judges."""
    kind = local_kind(judge)
    if kind is None:
        return None
    seen = instructions_of_training(kind.training_instructions(judge), reference)
    if seen:
        warn(f"{judge} was trained on {seen} of these {len(reference)} instructions")
    return seen


def doubt_about_length_control(row: dict[str, Any], intervals: dict[str, Any]) -> str | None:
    """Why the length-controlled win rate cannot be relied on; None if nothing speaks against it.

    row: the package's line of the leaderboard.
    """
    win_rate, controlled = float(row["win_rate"]), float(row["length_controlled_winrate"])
    warning = length_controlled_warning(win_rate, controlled)
    # If all answers are equal, 50 is right: there is nothing to measure.
    if warning is None and row["n_draws"] < row["n_total"]:
        warning = pinned_warning(
            intervals["length_controlled_winrate_interval"], intervals["length_controlled_at_50"]
        )
    return warning


def rates(row: dict[str, Any]) -> dict[str, Any]:
    """Rates and counts of the package's line of the leaderboard, as JSON values."""
    shares = ("win_rate", "standard_error", "length_controlled_winrate")
    counts = ("n_total", "n_wins", "n_draws", "n_wins_base", "avg_length")
    return {key: _plain(row[key]) for key in shares} | {key: int(row[key]) for key in counts}


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def instructions_of_training(hash_files: list[Path], reference: list[dict[str, Any]]) -> int:
    """The number of instructions that the judge was trained on.

    hash_files: hashes of the judge's training instructions.
    """
    hashes = {each for file in hash_files for each in file.read_text(encoding="utf-8").split()}
    return sum(instruction_hash(row["instruction"]) in hashes for row in reference)


def bootstrap(
    annotations: list[dict[str, Any]],
    formula: str,
    difficulty: Path,
    draws: int,
    fits: int,
    seed: int,
    threads: int,
) -> dict[str, Any]:
    """95% percentile intervals of the win rate and the LC win rate, in per cent.

    The win rate uses `draws` resamples, LC the first `fits` of them. Instructions are drawn with
    replacement, each with its pair of outputs. The package's LC model is refitted on each resample,
    which takes about 60 ms for 100 instructions, so LC uses fewer resamples. The LC model has an L1
    penalty chosen by cross-validation, and it returns exactly 50 if it finds no effect.
    `length_controlled_at_50` is the per cent of refits that do. `fits=0` leaves LC's interval and
    this share None.
    """
    import numpy as np
    import pandas as pd
    from joblib import Parallel, delayed

    # Resampling keeps the frame's index, by which the package looks up instruction difficulties.
    frame = pd.DataFrame(annotations)
    # The package once wrote a draw as 0.
    preference = frame["preference"].astype(float).replace(0.0, 1.5)
    wins = preference.to_numpy() - 1
    chosen = np.random.default_rng(seed).integers(len(wins), size=(draws, len(wins)))
    # Forked processes, where the system has them, need not import everything again.
    refits = Parallel(n_jobs=threads, backend="multiprocessing")(
        delayed(metrics)(frame.iloc[rows], formula, difficulty) for rows in chosen[:fits]
    )
    controlled = [float(refit["length_controlled_winrate"]) for refit in refits]

    at_50 = 100 * float(np.mean(np.equal(controlled, 50.0))) if controlled else None

    def interval(values: Any) -> list[float] | None:
        if not len(values):
            return None
        return [float(end) for end in np.percentile(values, [2.5, 97.5])]

    return {
        "win_rate_interval": interval(100 * wins[chosen].mean(axis=1)),
        "length_controlled_winrate_interval": interval(controlled),
        "length_controlled_at_50": at_50,
        "bootstrap": {
            "resamples": draws,
            "length_controlled_resamples": len(controlled),
            "seed": seed,
        },
    }


def _plain(value: Any) -> Any:
    """A JSON value: a numpy scalar becomes a Python number, NaN (a missing value) becomes null."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and math.isnan(value) else value


if __name__ == "__main__":
    run(main)
