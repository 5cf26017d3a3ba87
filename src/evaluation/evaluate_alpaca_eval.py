"""Win rate and length-controlled win rate of a policy against a reference, by alpaca-eval's own code.

Reads   the policy's outputs and the reference's, in alpaca-eval's form; the judge
Writes  alpaca_eval.json (all rates in per cent), the annotations in alpaca-eval's form, their records
Metric  alpaca-eval 0.6.6, LC: arXiv 2404.04475
Departs from the paper, which judges with GPT-4 turbo on the 805 instructions of AlpacaEval: by default the
embedded judge compares on held-out instructions of ours. `--judge weighted_alpaca_eval_gpt4_turbo` with the
805 and `--difficulty df_gamed.csv` is the paper's evaluation. Intervals by bootstrap are ours.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import _path  # noqa: F401
from sppo.core.artifacts import file_hash, recorded, write_json
from sppo.core.errors import UserError, run
from sppo.core.flags import at_least
from sppo.evaluation.alpaca_eval import (
    OFFICIAL_DIFFICULTY,
    Judge,
    check_order,
    evaluate,
    length_controlled_warning,
    length_model,
    metrics,
    paired,
    read_outputs,
)
from sppo.evaluation.judges import ALPACA_EVAL
from sppo.policies.models import pick_device
from sppo.preferences.base import local_kind, model_files
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


def main() -> None:
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
    parser.add_argument("--annotations", type=Path, required=True, help="where the judgments go")
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
        choices=["auto", "cpu", "gpu"],
        default="auto",
        help="where the embedded judge runs",
    )
    parser.add_argument("--judge-model", help="model name for openai")
    parser.add_argument(
        "--judge-base-url",
        help="address of the server for openai, such as http://localhost:8000/v1",
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
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--threads", type=int, default=1, help="processes that refit LC")
    parser.add_argument(
        "--policy", help="what the policy is, for the result; its generator name if not given"
    )
    parser.add_argument(
        "--decoding",
        type=_json_object,
        default={},
        help="JSON object with the decoding settings, for the result",
    )
    args = parser.parse_args()

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
    kind = local_kind(args.judge)
    inputs = [
        path
        for path in (
            args.outputs,
            args.reference,
            *model_files(args.judge, args.judge_base),
            difficulty,
        )
        if path
    ]
    cache = args.output.parent / ".judgments"
    with (
        recorded("judge", args.output, inputs, vars(args)),
        length_model(len(reference), difficulty) as (formula, file),
    ):
        judge = Judge(
            args.judge,
            args.judge_model,
            args.judge_base_url,
            args.judge_base,
            pick_device(args.device) if kind else "cpu",
        )
        seen = (
            instructions_of_training(kind.training_instructions(args.judge), reference)
            if kind
            else 0
        )
        if seen:
            print(
                f"warning: {args.judge} was trained on {seen} of these {len(reference)} instructions",
                file=sys.stderr,
            )
        row, annotations, details = evaluate(outputs, reference, formula, file, cache, judge)
        rates = (float(row[key]) for key in ("win_rate", "length_controlled_winrate"))
        warning = length_controlled_warning(*rates)
        if warning:
            print(
                f"warning: do not rely on the length-controlled win rate: {warning}",
                file=sys.stderr,
            )
        empty = sum(not line["output"].strip() for line in outputs)
        if empty:
            print(
                f"warning: {empty} of {len(outputs)} answers in {args.outputs} are empty",
                file=sys.stderr,
            )
        intervals = bootstrap(
            annotations,
            formula,
            file,
            args.bootstrap,
            args.length_controlled_bootstrap,
            args.seed,
            args.threads,
        )
        with recorded(
            "judge", args.annotations, inputs, vars(args)
        ):  # the time is in the other record
            write_json(
                args.annotations,
                [{key: _plain(value) for key, value in line.items()} for line in annotations],
            )
        write_json(
            args.output,
            {
                **{
                    key: _plain(row[key])
                    for key in ("win_rate", "standard_error", "length_controlled_winrate")
                },
                **intervals,
                **{
                    key: int(row[key])
                    for key in ("n_total", "n_wins", "n_draws", "n_wins_base", "avg_length")
                },
                "n_empty": empty,
                "length_controlled_warning": warning,
                "reference_avg_length": int(
                    sum(len(line["output"]) for line in reference) / len(reference)
                ),
                "length_controlled_model": formula,
                "difficulty": difficulty
                and {
                    "path": str(difficulty),
                    "official": file_hash(difficulty) == OFFICIAL_DIFFICULTY,
                },
                "judge": args.judge,
                "judge_details": details
                | ({"instructions_seen_in_training": seen} if kind else {}),
                "policy": args.policy or outputs[0]["generator"],
                "reference": reference[0]["generator"],
                "decoding": args.decoding,
                "versions": {name: metadata.version(name) for name in VERSIONS},
                "annotations": str(args.annotations),
            },
        )


def instructions_of_training(shipped: Path | None, reference: list[dict[str, Any]]) -> int:
    """How many of the instructions the judge was trained on, by the hashes that it is shipped with."""
    if shipped is None or not shipped.is_file():
        return 0
    hashes = set(shipped.read_text(encoding="utf-8").split())
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
    """95% percentile intervals (per cent) of the win rate from `draws` resamples, of LC from the first `fits`.

    Instructions are drawn with replacement, each with its pair of outputs, and the package's LC model is
    fitted anew: some 60 ms for 100 instructions, hence fewer of them. `fits=0` leaves LC's interval None.
    That model has an L1 penalty chosen by cross-validation, and where it finds no effect it answers exactly
    50: the interval often ends there. The share of such resamples is reported.
    """
    import numpy as np
    import pandas as pd
    from joblib import Parallel, delayed

    # The frame keeps its index through resampling: instruction difficulties go by it.
    frame = pd.DataFrame(annotations)
    wins = (
        frame["preference"].astype(float).replace(0.0, 1.5).to_numpy() - 1
    )  # 0 is an old form of a draw
    chosen = np.random.default_rng(seed).integers(len(wins), size=(draws, len(wins)))
    refits = Parallel(n_jobs=threads)(
        delayed(metrics)(frame.iloc[rows], formula, difficulty) for rows in chosen[:fits]
    )
    controlled = [float(refit["length_controlled_winrate"]) for refit in refits]

    def interval(values: Any) -> list[float] | None:
        return [float(end) for end in np.percentile(values, [2.5, 97.5])] if len(values) else None

    return {
        "win_rate_interval": interval(100 * wins[chosen].mean(axis=1)),
        "length_controlled_winrate_interval": interval(controlled),
        "bootstrap": {
            "resamples": draws,
            "length_controlled_resamples": len(controlled),
            "seed": seed,
            "length_controlled_share_at_50": float(np.mean(np.equal(controlled, 50.0)))
            if controlled
            else None,
        },
    }


def _plain(value: Any) -> Any:
    """A JSON value: numpy scalars unpacked, NaN (the package's missing value) as null."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and math.isnan(value) else value


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"--decoding is not JSON ({error}); give an object such as '{{\"temperature\": 0.7}}'"
        ) from None
    if not isinstance(value, dict):
        raise UserError(
            "--decoding is not a JSON object; give one such as '{\"temperature\": 0.7}'"
        )
    return value


if __name__ == "__main__":
    run(main)
