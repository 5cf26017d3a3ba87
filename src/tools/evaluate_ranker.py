"""Measure how well a preference model agrees with labels. Prints one JSON object.

    python src/tools/evaluate_ranker.py --model judge --annotations annotations.parquet
    python src/tools/evaluate_ranker.py --model mine.py:score --pairs pairs.jsonl --table table.md

The model is anything that `preference.model` can name. The labels are one of:

--annotations  AlpacaEval's annotations (see src/sppo/preferences/embedded_data.py): each row is a
               pair of output_1 and output_2, with many rows for an instruction
--pairs        a preference data set in TRL's form: prompt, chosen, rejected, and subset if it has
               one, as RewardBench does. A file, a folder, or a data set on the hub

Some rows are left out and counted: unusable rows; rows on instructions that the model was trained
on, if it has a list of them (by hash); and, of annotations, random rows of the side that wins more
often, until both sides win equally often. Standard errors treat the pairs on one instruction as one
cluster. The JSON object contains:

agreement             share of pairs where the model prefers the answer that the label prefers; a
                      tie counts half
length_agreement      the same share for the rule that the answer with more characters wins
matched_agreement     agreement on pairs whose lengths differ by less than 20% of the longer one
cross_model_agreement agreement on pairs of two models' outputs whose preferences against the same
                      reference differ by more than 0.5
ece                   expected calibration error of P(first beats second) in 10 bins; the order of
                      the answers is drawn at random
asymmetry             mean |P(a beats b) + P(b beats a) - 1| of the raw probabilities
subsets               agreement by subset of --pairs, and its mean over subsets
corrupted             share of answers that are preferred to their corrupted copies, of annotations.
                      One answer of at least 12 words is taken for each instruction. The copies are:
                      cut in the middle, words shuffled, sentences shuffled, replaced by an answer
                      to another instruction, and the opening repeated in a loop
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _path  # noqa: F401
import sppo  # noqa: F401  (sets OMP_WAIT_POLICY before torch is imported)
import numpy as np
import pandas as pd

from sppo.core.artifacts import write_text
from sppo.core.config import DEVICES
from sppo.core.errors import UserError, run
from sppo.core.progress import progress
from sppo.preferences.base import (
    KINDS,
    Group,
    PreferenceModel,
    compare,
    kind_of,
    load_preference_model,
    settings_for,
)
from sppo.preferences.embedded_data import (
    CORRUPTIONS,
    MIN_WORDS,
    balance,
    instruction_hash,
    load_annotations,
)
from sppo.preferences.labelled_pairs import read_labelled_pairs
from sppo.reporting.figures import pyplot, save
from sppo.reporting.table_formats import markdown_table

CHUNK = 24  # rows of one instruction that are judged in one group
BATCH = 32  # groups that are judged in one call
BINS = 10  # of the predicted probability, in the calibration error and the reliability diagram
DIRECT_COLUMNS = [
    "instruction",
    "subset",
    "logit",
    "forward",
    "backward",
    "first_wins",
    "len_1",
    "len_2",
]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="as preference.model, such as `ranker`")
    parser.add_argument("--kind", choices=KINDS, help="as preference.kind")
    parser.add_argument("--base-url", help="as preference.base_url, for openai:<model>")
    labels = parser.add_mutually_exclusive_group(required=True)
    labels.add_argument("--annotations", type=Path)
    labels.add_argument("--pairs")
    parser.add_argument("--split", default="train", help="of a data set on the hub")
    parser.add_argument("--revision", help="of a data set on the hub")
    parser.add_argument(
        "--base",
        type=Path,
        default=Path("results/models/SmolLM2-135M-Instruct"),
        help="folder of the embedded policy, which `ranker` and `judge` read",
    )
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--limit", type=int, help="judge at most this many pairs, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="write a reliability diagram (PNG)")
    parser.add_argument("--table", type=Path, help="write agreement by subset (Markdown)")
    return parser.parse_args()


def select_pairs(
    args: argparse.Namespace, trained_on: set[str] | None
) -> tuple[pd.DataFrame, dict[str, int | None], bool]:
    """The pairs to judge, the excluded rows by reason, and whether the pairs are balanced.

    Balanced pairs have as many wins of the first side as of the second. trained_on: hashes of the
    model's training instructions; None if nobody knows them.
    """
    if args.annotations:
        frame, left_out = load_annotations(args.annotations)
        frame = frame.assign(messages=None, subset="all")
    else:
        frame, left_out = read_labelled_pairs(args.pairs, args.revision, args.split)
    excluded: dict[str, int | None] = {**left_out, "training_instruction": None}
    if trained_on is not None:
        hashes = {text: instruction_hash(text) for text in frame["instruction"].unique()}
        known = frame["instruction"].map(hashes).isin(trained_on)
        excluded["training_instruction"] = int(known.sum())
        if known.all():
            raise UserError(
                f"the {args.model} was trained on the instructions of all usable rows of "
                f"{args.annotations or args.pairs}; give labels of other instructions"
            )
        frame = frame[~known]
    even = balance(frame, args.seed)
    balanced = len(even) > 0  # empty if one side wins every pair, as chosen does
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

    def __init__(self, candidates: list[str], values: np.ndarray) -> None:
        self.position = {text: number for number, text in enumerate(candidates)}
        self.values = values

    def __call__(self, first: str, second: str) -> float:
        """The logit that `first` beats `second`."""
        return self.values[self.position[first], self.position[second]]

    def margin(self, first: str, second: str) -> float:
        """The difference of the logits of both orders; positive if `first` is preferred."""
        return self(first, second) - self(second, first)


@dataclass
class Question:
    """Rows of one instruction that are judged in one group, and corrupted copies of an answer.

    swapped: for each row, whether output_2 is named first.
    """

    instruction: str
    rows: list[dict[str, Any]]
    original: str = ""
    copies: dict[str, str] = field(default_factory=dict)
    swapped: list[bool] = field(default_factory=list)

    def draw_order(self, rng: random.Random) -> Question:
        self.swapped = [rng.random() < 0.5 for _ in self.rows]
        return self

    def group(self) -> Group:
        texts = {row[side] for row in self.rows for side in ("output_1", "output_2")}
        candidates = sorted({*texts, *self.copies.values()})
        return Group(self.instruction, candidates, self.rows[0]["messages"])


def questions_of_annotations(frame: pd.DataFrame, rng: random.Random) -> list[Question]:
    """Up to `CHUNK` rows of an instruction at once, because they have answers in common."""
    questions = []
    by_instruction = list(frame.groupby("instruction", sort=True))
    for instruction, all_rows in by_instruction:
        for start in range(0, len(all_rows), CHUNK):
            rows = all_rows[start : start + CHUNK].to_dict("records")
            question = Question(instruction, rows)
            texts = [text for row in rows for text in (row["output_1"], row["output_2"])]
            long_texts = [text for text in texts if len(text.split()) >= MIN_WORDS]
            if start == 0 and long_texts:
                question.original = rng.choice(long_texts)
                other_instruction, other_rows = rng.choice(by_instruction)
                is_other = other_instruction != instruction
                off_topic = list(other_rows["output_2"]) if is_other else []
                question.copies = corrupted_copies(question.original, off_topic, rng)
            questions.append(question.draw_order(rng))
    return questions


def questions_of_pairs(frame: pd.DataFrame, rng: random.Random) -> list[Question]:
    """Each row alone: other pairs of answers are not asked for, because a judge may cost money."""
    rows = frame.to_dict("records")
    return [Question(row["instruction"], [row]).draw_order(rng) for row in rows]


def judge(model: PreferenceModel, questions: list[Question]) -> tuple[pd.DataFrame, ...]:
    """Judge the pairs, the cross-model pairs and the corrupted answers.

    Returns a table for each of the three, with one row for each comparison.
    """
    direct, cross, corrupted = [], [], []
    batches = [questions[start : start + BATCH] for start in range(0, len(questions), BATCH)]
    for number, batch in enumerate(progress(batches, f"batches of {BATCH} instructions")):
        groups = {str(number * BATCH + place): each.group() for place, each in enumerate(batch)}
        found = compare(model, groups, "row")
        for question, name in zip(batch, groups):
            instruction = question.instruction
            logits = Logits(groups[name].responses, found[name])
            direct += [
                (instruction, row["subset"], *direct_comparison(row, swapped, logits))
                for row, swapped in zip(question.rows, question.swapped)
            ]
            cross += [
                (instruction, *scores) for scores in cross_model_comparisons(question.rows, logits)
            ]
            for kind, copy in question.copies.items():
                if copy != question.original:
                    right = score(logits.margin(question.original, copy), True)
                    corrupted.append((instruction, kind, right))
    return (
        pd.DataFrame(direct, columns=DIRECT_COLUMNS),
        pd.DataFrame(cross, columns=["instruction", "right", "length_right"]),
        pd.DataFrame(corrupted, columns=["instruction", "kind", "right"]),
    )


def direct_comparison(
    row: dict[str, Any], swapped: bool, logits: Logits
) -> tuple[float, float, float, bool, int, int]:
    """The comparison of a row's two outputs, with output_2 first if `swapped`.

    Returns the symmetric logit, the logits of both orders, whether the label prefers the first
    output, and the lengths of both outputs in characters.
    """
    first, second = row["output_1"], row["output_2"]
    first_wins = row["preference"] < 1.5
    if swapped:
        first, second, first_wins = second, first, not first_wins
    forward, backward = logits(first, second), logits(second, first)
    return (forward - backward) / 2, forward, backward, first_wins, len(first), len(second)


def cross_model_comparisons(
    rows: list[dict[str, Any]], logits: Logits
) -> list[tuple[float, float]]:
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


def reliability(probability: np.ndarray, happened: np.ndarray) -> pd.DataFrame:
    """Per bin of the predicted probability: n, mean prediction, observed frequency."""
    frame = pd.DataFrame({"predicted": probability, "observed": happened.astype(float)})
    number = np.minimum((probability * BINS).astype(int), BINS - 1)
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
        ylabel="the label prefers the first",
        title=title,
        xlim=(0, 1),
        ylim=(0, 1),
    )
    save(figure, [path])


def by_subset(direct: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Number of pairs, agreement and its standard error of each subset."""
    found = {}
    for subset, rows in direct.groupby("subset"):
        rate, error = mean_and_error(rows["right"], rows["instruction"])
        found[subset] = {"n": len(rows), "agreement": rate, "standard_error": error}
    return found


def subset_table(result: dict[str, Any]) -> str:
    """Agreement by subset as a Markdown table, in per cent, with standard errors."""

    def shown(rate: float, error: float) -> str:
        return f"{100 * rate:.1f} ± {100 * error:.1f}"

    rows = [
        [subset, str(found["n"]), shown(found["agreement"], found["standard_error"])]
        for subset, found in result["subsets"].items()
    ]
    total = shown(result["agreement"], result["standard_errors"]["agreement"])
    rows.append(["all pairs", str(result["n"]), total])
    mean = result["mean_over_subsets"]
    rows.append(["mean over subsets", str(len(result["subsets"])), f"{100 * mean:.1f}"])
    return markdown_table(["subset", "n", f"agreement of {result['model']}"], rows)


def main() -> None:
    args = arguments()
    settings = settings_for(args.model, kind=args.kind, base_url=args.base_url)
    kind = kind_of(settings, "--model")
    kind.check(settings, "--model")
    if kind.is_prepared and not Path(args.model).is_dir():
        raise UserError(
            f"--model {args.model} is no folder; fetch it with"
            " src/tools/prepare_preference_model.py, and give its folder"
        )
    files = kind.training_instructions(args.model)
    hashes = {each for file in files for each in file.read_text(encoding="utf-8").split()}
    trained_on = hashes if files else None
    frame, excluded, balanced = select_pairs(args, trained_on)
    model = load_preference_model(settings, args.base, args.device)
    rng = random.Random(args.seed)
    ask = questions_of_annotations if args.annotations else questions_of_pairs
    direct, cross, corrupted = judge(model, ask(frame, rng))
    chance = 1 / (1 + np.exp(-direct[["logit", "forward", "backward"]]))
    longer = direct["len_1"] - direct["len_2"]
    direct["right"] = [score(m, w) for m, w in zip(direct["logit"], direct["first_wins"])]
    direct["length_right"] = [score(m, w) for m, w in zip(longer, direct["first_wins"])]
    matched = direct[longer.abs() < 0.2 * direct[["len_1", "len_2"]].max(axis=1)]
    table = reliability(chance["logit"].to_numpy(), direct["first_wins"].to_numpy())
    source = args.annotations or Path(args.pairs)
    result = {
        "model": args.model,
        "kind": kind.kind,
        "labels": source.name,
        "n": len(direct),
        "instructions": int(direct["instruction"].nunique()),
        "balanced": balanced,
        "excluded": excluded,
    }
    errors: dict[str, Any] = {}
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
    subsets = by_subset(direct)
    result["subsets"] = subsets
    result["mean_over_subsets"] = float(np.mean([each["agreement"] for each in subsets.values()]))
    result["corrupted"] = corrupted_rates
    result["corrupted_n"] = corrupted_n
    result["standard_errors"] = errors | {"corrupted": corrupted_errors}
    if args.plot:
        plot(table, f"{Path(args.model).name[-30:]}, {source.stem[:30]}", args.plot)
    if args.table:
        write_text(args.table, subset_table(result))
    print(json.dumps(result, indent=2, allow_nan=False))


if __name__ == "__main__":
    run(main)
