"""How well does a preference model agree with labels? Prints one JSON object.

    python src/tools/evaluate_ranker.py --ranker judge --annotations annotations.parquet

Each row of the annotations (see src/sppo/preferences/embedded_data.py) is a pair of output_1 and output_2. Left out, and
counted: unusable rows, the model's own training instructions (by hash), and at random as many rows of the
side that wins more often as it takes for both to win equally often. Reported, with standard errors that
take pairs on the same instruction together:

agreement             share of pairs where the model prefers what the label prefers (a tie counts half)
length_agreement      the same for "the longer one, in characters, wins"
matched_agreement     agreement where lengths differ by less than 20% of the longer
ece                   expected calibration error of P(first beats second), order drawn at random, 10 bins
asymmetry             mean |P(a beats b) + P(b beats a) - 1| of the raw probabilities
cross_model_agreement on pairs of two models' outputs whose preferences against the same reference differ
                      by more than 0.5
corrupted             share of answers of 12 words or more preferred to their corrupted copies: cut in the
                      middle, words shuffled, sentences shuffled, replaced by an answer to another
                      instruction, or its opening repeated in a loop (one answer an instruction)
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

import _path  # noqa: F401
import sppo  # noqa: F401  (sets OMP_WAIT_POLICY before torch is imported)
import numpy as np
import pandas as pd

from sppo.core.errors import UserError, run
from sppo.preferences.embedded import EMBEDDED, adapter_folder
from sppo.preferences.embedded_network import EmbeddedRanker
from sppo.preferences.embedded_data import (
    CORRUPTIONS,
    MIN_WORDS,
    balance,
    instruction_hash,
    load_annotations,
)
from sppo.reporting.figures import pyplot, save

CHUNK = 24  # rows of one instruction judged in one call


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranker", required=True, choices=EMBEDDED)
    parser.add_argument("--annotations", required=True, type=Path)
    parser.add_argument("--base", type=Path, default=Path("results/models/SmolLM2-135M-Instruct"))
    parser.add_argument("--limit", type=int, help="judge at most so many pairs, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="write a reliability diagram (PNG)")
    return parser.parse_args()


def select_pairs(
    args: argparse.Namespace, training: set[str]
) -> tuple[pd.DataFrame, dict[str, int], bool]:
    """The pairs to judge, what was left out by reason, and whether both sides win equally often."""
    frame, excluded = load_annotations(args.annotations)
    hashes = {text: instruction_hash(text) for text in frame["instruction"].unique()}
    mine = frame["instruction"].map(hashes).isin(training)
    excluded["training_instruction"] = int(mine.sum())
    if mine.all():
        raise UserError(
            f"every usable row of {args.annotations} is about an instruction that the "
            f"{args.ranker} was trained on; nothing is left to evaluate it with"
        )
    frame = frame[~mine]
    even = balance(frame, args.seed)
    balanced = len(even) > 0  # where one side never wins there is nothing to balance with
    chosen = even if balanced else frame
    excluded["balancing"] = len(frame) - len(chosen)
    limit = len(chosen) if args.limit is None else args.limit
    if limit < 1:
        raise UserError("--limit must be at least 1")
    excluded["limit"] = max(0, len(chosen) - limit)
    return chosen.sample(min(limit, len(chosen)), random_state=args.seed), excluded, balanced


def corrupted_copies(text: str, away: list[str], rng: random.Random) -> dict[str, str]:
    copies = {kind: corrupt(text, rng) for kind, corrupt in CORRUPTIONS.items()}
    return copies | ({"off_topic": rng.choice(away)} if away else {})


def judge(ranker: EmbeddedRanker, frame: pd.DataFrame, seed: int) -> tuple[pd.DataFrame, ...]:
    """Judge everything: the direct pairs, the cross-model pairs and the corrupted answers, one row each."""
    rng = random.Random(seed)
    direct, cross, corrupted = [], [], []
    by_instruction = list(frame.groupby("instruction", sort=True))
    told = time.monotonic()
    for done, (instruction, all_rows) in enumerate(by_instruction):
        for start in range(0, len(all_rows), CHUNK):
            rows = all_rows[start : start + CHUNK].to_dict("records")
            texts = [text for row in rows for text in (row["output_1"], row["output_2"])]
            copies: dict[str, str] = {}
            originals = [text for text in texts if len(text.split()) >= MIN_WORDS]
            if start == 0 and originals:
                original = rng.choice(originals)
                away = rng.choice(by_instruction)
                copies = corrupted_copies(
                    original, list(away[1]["output_2"]) * (away[0] != instruction), rng
                )
            candidates = sorted({*texts, *copies.values()})
            at = {text: number for number, text in enumerate(candidates)}
            L = ranker.pair_logits(instruction, candidates)
            for row in rows:
                first, second, sign = row["output_1"], row["output_2"], 1
                if rng.random() < 0.5:
                    first, second, sign = second, first, -1
                forward, backward = L[at[first], at[second]], L[at[second], at[first]]
                direct.append(
                    (
                        instruction,
                        (forward - backward) / 2,
                        forward,
                        backward,
                        (row["preference"] < 1.5) == (sign == 1),
                        len(first),
                        len(second),
                    )
                )
            for i, a in enumerate(rows):
                for b in rows[:i]:
                    gap = a["preference"] - b["preference"]
                    if (
                        abs(gap) > 0.5
                        and a["output_1"] == b["output_1"]
                        and a["output_2"] != b["output_2"]
                    ):
                        logit = (
                            L[at[a["output_2"]], at[b["output_2"]]]
                            - L[at[b["output_2"]], at[a["output_2"]]]
                        )
                        cross.append(
                            (
                                instruction,
                                score(logit, gap > 0),
                                score(len(a["output_2"]) - len(b["output_2"]), gap > 0),
                            )
                        )
            corrupted += [
                (
                    instruction,
                    kind,
                    score(L[at[original], at[copy]] - L[at[copy], at[original]], True),
                )
                for kind, copy in copies.items()
                if copy != original
            ]
        if time.monotonic() - told >= 60:
            print(
                f"judged {done + 1} of {len(by_instruction)} instructions",
                file=sys.stderr,
                flush=True,
            )
            told = time.monotonic()
    return (
        pd.DataFrame(
            direct,
            columns=["instruction", "logit", "forward", "backward", "first_wins", "len_1", "len_2"],
        ),
        pd.DataFrame(cross, columns=["instruction", "right", "length_right"]),
        pd.DataFrame(corrupted, columns=["instruction", "kind", "right"]),
    )


def score(margin: float, wins: bool) -> float:
    """1 where the sign of the margin says what the label says, 0 where not, 1/2 where it is 0."""
    return 0.5 if margin == 0 else float((margin > 0) == wins)


def mean_and_error(values: pd.Series, clusters: pd.Series) -> tuple[float | None, float | None]:
    """Mean and its standard error, residuals summed within clusters; None where there is nothing."""
    if not len(values):
        return None, None
    sums = (values - values.mean()).groupby(clusters.to_numpy()).sum()
    return round(float(values.mean()), 4), round(float(np.sqrt((sums**2).sum()) / len(values)), 4)


def reliability(probability: np.ndarray, happened: np.ndarray, bins: int = 10) -> pd.DataFrame:
    """Per bin of the predicted probability: n, mean prediction, observed frequency."""
    frame = pd.DataFrame({"predicted": probability, "observed": happened.astype(float)})
    number = np.minimum((probability * bins).astype(int), bins - 1)
    return frame.groupby(number).agg(
        n=("observed", "size"), predicted=("predicted", "mean"), observed=("observed", "mean")
    )


def plot(table: pd.DataFrame, title: str, path: Path) -> None:
    figure, axes = pyplot().subplots(figsize=(4, 4), layout="constrained")
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    axes.plot(table["predicted"], table["observed"], marker="o")
    for _, row in table.iterrows():
        axes.annotate(
            int(row["n"]),
            (row["predicted"], row["observed"]),
            xytext=(4, -10),
            textcoords="offset points",
            fontsize=7,
        )
    axes.set(
        xlabel="P(first beats second)",
        ylabel="GPT-4 prefers the first",
        title=title,
        xlim=(0, 1),
        ylim=(0, 1),
    )
    save(figure, [path])


def main() -> None:
    args = arguments()
    folder = adapter_folder(args.ranker)
    training = folder / "training_instructions.txt"
    if not training.is_file():
        raise UserError(
            f"{training} is missing: without it training instructions cannot be left out; "
            "run from the top of the repository"
        )
    frame, excluded, balanced = select_pairs(args, set(training.read_text().split()))
    direct, cross, corrupted = judge(EmbeddedRanker(folder, args.base), frame, args.seed)
    chance = 1 / (1 + np.exp(-direct[["logit", "forward", "backward"]]))
    longer = direct["len_1"] - direct["len_2"]
    direct["right"] = [score(m, w) for m, w in zip(direct["logit"], direct["first_wins"])]
    direct["length_right"] = [score(m, w) for m, w in zip(longer, direct["first_wins"])]
    matched = direct[longer.abs() < 0.2 * direct[["len_1", "len_2"]].max(axis=1)]
    table = reliability(chance["logit"].to_numpy(), direct["first_wins"].to_numpy())
    result = {
        "ranker": args.ranker,
        "annotations": args.annotations.name,
        "n": len(direct),
        "instructions": int(direct["instruction"].nunique()),
        "balanced": balanced,
        "excluded": excluded,
    }
    errors = {}
    figures = {
        "agreement": (direct, "right"),
        "length_agreement": (direct, "length_right"),
        "matched_agreement": (matched, "right"),
        "cross_model_agreement": (cross, "right"),
        "cross_model_length_agreement": (cross, "length_right"),
    }
    for name, (rows, column) in figures.items():
        result[name], errors[name] = mean_and_error(rows[column], rows["instruction"])
    result |= {
        "matched_n": len(matched),
        "cross_model_n": len(cross),
        "ece": round(
            float(
                (table["n"] * (table["predicted"] - table["observed"]).abs()).sum() / len(direct)
            ),
            4,
        ),
        "asymmetry": float((chance["forward"] + chance["backward"] - 1).abs().mean()),
    }
    kinds = dict(iter(corrupted.groupby("kind")))
    rates = {
        kind: mean_and_error(rows["right"], rows["instruction"]) for kind, rows in kinds.items()
    }
    result["corrupted"] = {kind: rate for kind, (rate, _) in rates.items()}
    result["corrupted_n"] = {kind: len(rows) for kind, rows in kinds.items()}
    result["standard_errors"] = errors | {
        "corrupted": {kind: error for kind, (_, error) in rates.items()}
    }
    if args.plot:
        plot(table, f"{args.ranker}, {args.annotations.stem[:30]}", args.plot)
    print(json.dumps(result, indent=2, allow_nan=False))


if __name__ == "__main__":
    run(main)
