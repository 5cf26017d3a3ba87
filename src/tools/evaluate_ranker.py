"""Measure how well a preference model agrees with labels. Prints one JSON object.

    python src/tools/evaluate_ranker.py --ranker judge --annotations annotations.parquet

Each row of the annotations (see src/sppo/preferences/embedded_data.py) is a pair of output_1 and
output_2. Some rows are left out and counted: unusable rows; rows on instructions that the model was
trained on (by hash); and random rows of the side that wins more often, until both sides win equally
often. Standard errors treat the pairs on one instruction as one cluster. The JSON object contains:

agreement             share of pairs where the model prefers the answer that the label prefers; a
                      tie counts half
length_agreement      the same share for the rule that the answer with more characters wins
matched_agreement     agreement on pairs whose lengths differ by less than 20% of the longer one
cross_model_agreement agreement on pairs of two models' outputs whose preferences against the same
                      reference differ by more than 0.5
ece                   expected calibration error of P(first beats second) in 10 bins; the order of
                      the answers is drawn at random
asymmetry             mean |P(a beats b) + P(b beats a) - 1| of the raw probabilities
corrupted             share of answers that are preferred to their corrupted copies. One answer of
                      at least 12 words is taken for each instruction. The copies are: cut in the
                      middle, words shuffled, sentences shuffled, replaced by an answer to another
                      instruction, and the opening repeated in a loop
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

CHUNK = 24  # rows of one instruction that are judged in one call


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranker", required=True, choices=EMBEDDED)
    parser.add_argument("--annotations", required=True, type=Path)
    parser.add_argument("--base", type=Path, default=Path("results/models/SmolLM2-135M-Instruct"))
    parser.add_argument("--limit", type=int, help="judge at most this many pairs, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="write a reliability diagram (PNG)")
    return parser.parse_args()


def select_pairs(
    args: argparse.Namespace, training: set[str]
) -> tuple[pd.DataFrame, dict[str, int], bool]:
    """The pairs to judge, the excluded rows by reason, and whether the pairs are balanced.

    Balanced pairs have as many wins of the first side as of the second. `training` has the hashes
    of the model's training instructions.
    """
    frame, excluded = load_annotations(args.annotations)
    hashes = {text: instruction_hash(text) for text in frame["instruction"].unique()}
    trained_on = frame["instruction"].map(hashes).isin(training)
    excluded["training_instruction"] = int(trained_on.sum())
    if trained_on.all():
        raise UserError(
            f"the {args.ranker} was trained on the instructions of all usable rows of "
            f"{args.annotations}; give annotations of other instructions"
        )
    frame = frame[~trained_on]
    even = balance(frame, args.seed)
    balanced = len(even) > 0  # empty if one side wins every pair
    chosen = even if balanced else frame
    excluded["balancing"] = len(frame) - len(chosen)
    limit = len(chosen) if args.limit is None else args.limit
    if limit < 1:
        raise UserError("--limit must be at least 1")
    excluded["limit"] = max(0, len(chosen) - limit)
    return chosen.sample(min(limit, len(chosen)), random_state=args.seed), excluded, balanced


def corrupted_copies(text: str, off_topic: list[str], rng: random.Random) -> dict[str, str]:
    """Corrupted copies of an answer by kind; `off_topic` has answers to another instruction."""
    copies = {kind: corrupt(text, rng) for kind, corrupt in CORRUPTIONS.items()}
    if off_topic:
        copies["off_topic"] = rng.choice(off_topic)
    return copies


class Logits:
    """The logits of all pairs of some answers to one instruction."""

    def __init__(self, ranker: EmbeddedRanker, instruction: str, texts: set[str]) -> None:
        candidates = sorted(texts)
        self.position = {text: number for number, text in enumerate(candidates)}
        self.values = ranker.pair_logits(instruction, candidates)

    def __call__(self, first: str, second: str) -> float:
        """The logit that `first` beats `second`."""
        return self.values[self.position[first], self.position[second]]

    def margin(self, first: str, second: str) -> float:
        """The difference of the logits of both orders; positive if `first` is preferred."""
        return self(first, second) - self(second, first)


def judge(ranker: EmbeddedRanker, frame: pd.DataFrame, seed: int) -> tuple[pd.DataFrame, ...]:
    """Judge the pairs, the cross-model pairs and the corrupted answers.

    Returns a table for each of the three, with one row for each comparison.
    """
    rng = random.Random(seed)
    direct, cross, corrupted = [], [], []
    by_instruction = list(frame.groupby("instruction", sort=True))
    last_message = time.monotonic()
    for done, (instruction, all_rows) in enumerate(by_instruction):
        for start in range(0, len(all_rows), CHUNK):
            rows = all_rows[start : start + CHUNK].to_dict("records")
            texts = [text for row in rows for text in (row["output_1"], row["output_2"])]
            long_texts = [text for text in texts if len(text.split()) >= MIN_WORDS]
            original = ""
            copies: dict[str, str] = {}
            if start == 0 and long_texts:
                original = rng.choice(long_texts)
                other_instruction, other_rows = rng.choice(by_instruction)
                is_other = other_instruction != instruction
                off_topic = list(other_rows["output_2"]) if is_other else []
                copies = corrupted_copies(original, off_topic, rng)
            logits = Logits(ranker, instruction, {*texts, *copies.values()})
            direct += [(instruction, *direct_comparison(row, logits, rng)) for row in rows]
            cross += [(instruction, *scores) for scores in cross_model_comparisons(rows, logits)]
            for kind, copy in copies.items():
                if copy != original:
                    right = score(logits.margin(original, copy), True)
                    corrupted.append((instruction, kind, right))
        if time.monotonic() - last_message >= 60:
            print(
                f"judged {done + 1} of {len(by_instruction)} instructions",
                file=sys.stderr,
                flush=True,
            )
            last_message = time.monotonic()
    return (
        pd.DataFrame(
            direct,
            columns=["instruction", "logit", "forward", "backward", "first_wins", "len_1", "len_2"],
        ),
        pd.DataFrame(cross, columns=["instruction", "right", "length_right"]),
        pd.DataFrame(corrupted, columns=["instruction", "kind", "right"]),
    )


def direct_comparison(
    row: dict, logits: Logits, rng: random.Random
) -> tuple[float, float, float, bool, int, int]:
    """The comparison of a row's two outputs, with the order drawn at random.

    Returns the symmetric logit, the logits of both orders, whether the label prefers the first
    output, and the lengths of both outputs in characters.
    """
    first, second = row["output_1"], row["output_2"]
    first_wins = row["preference"] < 1.5
    if rng.random() < 0.5:
        first, second, first_wins = second, first, not first_wins
    forward, backward = logits(first, second), logits(second, first)
    return (forward - backward) / 2, forward, backward, first_wins, len(first), len(second)


def cross_model_comparisons(rows: list[dict], logits: Logits) -> list[tuple[float, float]]:
    """The scores of the model and of length on pairs of two models' outputs.

    A pair counts if both outputs were compared with the same reference and their preferences differ
    by more than 0.5.
    """
    found = []
    for i, a in enumerate(rows):
        for b in rows[:i]:
            gap = a["preference"] - b["preference"]
            same_reference = a["output_1"] == b["output_1"]
            if abs(gap) > 0.5 and same_reference and a["output_2"] != b["output_2"]:
                margin = logits.margin(a["output_2"], b["output_2"])
                longer = len(a["output_2"]) - len(b["output_2"])
                found.append((score(margin, gap > 0), score(longer, gap > 0)))
    return found


def score(margin: float, wins: bool) -> float:
    """1 if the sign of the margin agrees with the label, 0 if it does not, 1/2 if it is 0."""
    return 0.5 if margin == 0 else float((margin > 0) == wins)


def mean_and_error(values: pd.Series, clusters: pd.Series) -> tuple[float | None, float | None]:
    """Mean and its standard error, with residuals summed in each cluster; None for no values."""
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
    """Draw the reliability diagram of the table of `reliability`, with n beside each point."""
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
            f"{training} is missing, so training instructions cannot be left out; "
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
    calibration_error = table["n"] * (table["predicted"] - table["observed"]).abs()
    result |= {
        "matched_n": len(matched),
        "cross_model_n": len(cross),
        "ece": round(float(calibration_error.sum() / len(direct)), 4),
        "asymmetry": float((chance["forward"] + chance["backward"] - 1).abs().mean()),
    }
    corrupted_rates, corrupted_errors, corrupted_n = {}, {}, {}
    for kind, rows in corrupted.groupby("kind"):
        rate, error = mean_and_error(rows["right"], rows["instruction"])
        corrupted_rates[kind], corrupted_errors[kind] = rate, error
        corrupted_n[kind] = len(rows)
    result["corrupted"] = corrupted_rates
    result["corrupted_n"] = corrupted_n
    result["standard_errors"] = errors | {"corrupted": corrupted_errors}
    if args.plot:
        plot(table, f"{args.ranker}, {args.annotations.stem[:30]}", args.plot)
    print(json.dumps(result, indent=2, allow_nan=False))


if __name__ == "__main__":
    run(main)
