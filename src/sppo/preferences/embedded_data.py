"""Training data of the embedded preference models: from AlpacaEval annotations to labelled pairs.

All functions are pure and seeded; they use no model and no network. An annotation file has one row
per (instruction, model). `output_1` is the reference's answer, `output_2` the model's answer, and
`preference` is between 1 (output_1 is better) and 2 (output_2 is better). The raw files have two
biases, which are corrected here. `output_1` is always from the same model, so its style predicts
the label if the numbers of wins and losses differ (`balance`). The longer answer usually wins
(`shorter_weight`).
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from sppo.core.errors import UserError

COLUMNS = ("instruction", "output_1", "output_2", "preference")
# The bound of log-odds. GPT-4-turbo's weighted preferences have distances down to 1e-7 from 1 and
# 2; exactly 1 and 2 mean that the distance is smaller.
MAX_LOG_ODDS = 16.0
MIN_GAP = 1.0  # pairs with a smaller difference of log-odds are not labelled
MAX_TARGET = 0.95  # GPT-4 can be wrong even when its preference is certain
MIN_WORDS = 12  # shorter answers are not corrupted: a cut "Yes." is still "Yes."


# ---------------------------------------------------------------- instructions and their parts


def instruction_hash(instruction: str) -> str:
    """The SHA-256 of the stripped instruction, in hex, as `training_instructions.txt` lists it."""
    return hashlib.sha256(instruction.strip().encode("utf-8")).hexdigest()


def part_of(instruction: str) -> str:
    """`ranker` (40%), `judge` (40%) or `test` (20%).

    The part depends only on the instruction's hash, so it is the same in every file.
    """
    share = int(instruction_hash(instruction)[:8], 16) / 2**32
    if share < 0.4:
        return "ranker"
    return "judge" if share < 0.8 else "test"


def for_calibration(instruction: str) -> bool:
    """Whether a training instruction is one of the 10% that fit the scale of the logits.

    These instructions are not trained on.
    """
    return int(instruction_hash(instruction)[8:16], 16) / 2**32 < 0.1


# ---------------------------------------------------------------- reading and cleaning


def load_annotations(path: Path) -> tuple[pd.DataFrame, dict[str, int]]:
    """Read an annotation file; return its usable rows, and the number of excluded rows by reason.

    Excluded rows have no preference, a draw (0 or 1.5), a preference outside 1..2, an output that
    is not a text, or twice the same output. The table has `COLUMNS` and `model`. UserError if the
    file does not exist or is unreadable, a column is missing, or no row is usable.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no annotation file {path}; correct the path")
    try:
        frame = pd.read_parquet(path)
    except Exception as error:  # pyarrow raises several unrelated types for a broken file
        raise UserError(f"{path} is not a readable parquet file: {error}") from None
    missing = [column for column in COLUMNS if column not in frame]
    if missing:
        raise UserError(
            f"{path} lacks the column(s) {', '.join(missing)}; it has {', '.join(map(str, frame))}"
        )
    if "model" not in frame:
        frame["model"] = frame["generator_2"] if "generator_2" in frame else "model"
    frame = frame[[*COLUMNS, "model"]].reset_index(drop=True)
    frame["preference"] = pd.to_numeric(frame["preference"], errors="coerce")
    texts = frame[["instruction", "output_1", "output_2"]]
    is_text = texts.map(lambda value: isinstance(value, str)).all(axis=1)
    preference = frame["preference"]
    reasons = [
        ("missing_preference", preference.isna()),
        ("missing_text", ~is_text),
        ("draw", preference.isin([0.0, 1.5])),
        ("out_of_range", ~preference.between(1, 2)),
        ("identical_outputs", frame["output_1"] == frame["output_2"]),
    ]
    keep = pd.Series(True, index=frame.index)
    excluded = {}
    for reason, bad in reasons:  # each row counts once, for the first reason that applies
        excluded[reason] = int((keep & bad).sum())
        keep &= ~bad
    if not keep.any():
        raise UserError(f"{path} has {len(frame)} rows, but no usable one ({excluded})")
    return frame[keep].reset_index(drop=True), excluded


def balance(frame: pd.DataFrame, seed: int) -> pd.DataFrame:
    """A sample with as many wins of output_1 as of output_2; it keeps all wins of the rarer one."""
    second = frame["preference"] > 1.5
    size = min(int(second.sum()), int((~second).sum()))
    sides = [side.sample(size, random_state=seed) for side in (frame[~second], frame[second])]
    return pd.concat(sides).sort_index()


def log_odds(preference: np.ndarray) -> np.ndarray:
    """log P(output_2 wins) - log P(output_1 wins), clipped to +-MAX_LOG_ODDS.

    preference: values in 1..2.
    """
    wins = np.asarray(preference, dtype=np.float64) - 1.0
    with np.errstate(divide="ignore"):
        return np.clip(np.log(wins) - np.log1p(-wins), -MAX_LOG_ODDS, MAX_LOG_ODDS)


# ---------------------------------------------------------------- corrupted answers


def cut(text: str, rng: random.Random) -> str:
    """Break the text off after 30 to 60% of its first 120 words, in the middle of a sentence."""
    words = text.split(" ")
    end = max(1, int(min(len(words), 120) * rng.uniform(0.3, 0.6)))
    return " ".join(words[:end]).rstrip(" .!?:;,\n")


def shuffle_words(text: str, rng: random.Random) -> str:
    """All words in random order."""
    words = text.split()
    rng.shuffle(words)
    return " ".join(words)


def shuffle_sentences(text: str, rng: random.Random) -> str:
    """All sentences (or lines) in random order."""
    sentences = []
    for line in text.split("\n"):
        sentences += [part.strip() for part in line.split(". ") if part.strip()]
    rng.shuffle(sentences)
    return ". ".join(sentences)


def repeat(text: str, rng: random.Random) -> str:
    """A loop: the first 8 to 30 words, repeated to about the length of the answer."""
    words = text.split(" ")
    opening = words[: min(rng.randint(8, 30), max(1, len(words) // 2))]
    times = max(3, min(len(words), 200) // len(opening))
    return " ".join(opening * times)


# The corruptions of an answer's own text. "off_topic", an answer to another instruction, is added
# by `add_corrupted`.
CORRUPTIONS = {
    "cut": cut,
    "shuffled": shuffle_words,
    "shuffled_sentences": shuffle_sentences,
    "repeated": repeat,
}


# ---------------------------------------------------------------- groups of labelled pairs


@dataclass
class LabelledGroup:
    """Answers to one instruction and the labelled pairs among them.

    pairs: (better, worse, target): two indices into texts, and the win probability to learn, which
    is above 1/2. corrupted: the same, but `worse` is a corrupted answer.
    """

    instruction: str
    texts: list[str]
    pairs: list[tuple[int, int, float]] = field(default_factory=list)
    corrupted: list[tuple[int, int, float]] = field(default_factory=list)


def make_group(rows: pd.DataFrame, others: list[str], size: int, seed: str) -> LabelledGroup:
    """One group from the rows of one instruction.

    The rows are compared with the same reference. `size` is the number of answers besides the
    reference. `others` are answers to other instructions, for the off-topic corruptions.

    The reference is paired with as many answers that beat it as answers that lost to it. If the
    group has room for further answers, these are paired only with each other and with the other
    models' answers. The gap of two answers is the difference of their log-odds against the
    reference, and target = sigma(3/4 * gap). (This was checked on the 11,840 answers that both
    AlpacaEval files judge: if the 2.0 log-odds of two answers differ by more than 1.5, the 1.0
    labels give the same order in 95% of pairs.)

    Three corrupted answers are added. Two are off-topic, because relevance is harder to learn. Each
    loses to its original and to all answers that beat the original.
    """
    rng = random.Random(seed)
    reference = rows["output_1"].iloc[0]
    odds = log_odds(rows["preference"].to_numpy())
    rows = rows.assign(odds=odds)[(rows["output_1"] == reference).to_numpy()]
    rows = rows.drop_duplicates("output_2").sample(frac=1, random_state=rng.randrange(2**31))
    won = rows[rows["odds"] > 0]
    lost = rows[rows["odds"] < 0]
    each = min(len(won), len(lost), size // 2)
    balanced = pd.concat([won[:each], lost[:each]])
    further = pd.concat([won[each:], lost[each:]]).sample(frac=1, random_state=rng.randrange(2**31))
    chosen = pd.concat([balanced, further[: size - len(balanced)]])
    group = LabelledGroup(rows["instruction"].iloc[0], [reference, *chosen["output_2"]])
    scores = [0.0, *chosen["odds"]]  # by index into group.texts; 0 is the reference
    for i, high in enumerate(scores):
        for j, low in enumerate(scores):
            # The reference is paired only with the balanced answers.
            excluded = (i == 0 and j > len(balanced)) or (j == 0 and i > len(balanced))
            if high - low >= MIN_GAP and not excluded:
                target = min(MAX_TARGET, 1 / (1 + np.exp(-0.75 * (high - low))))
                group.pairs.append((i, j, target))
    add_corrupted(group, scores, others, rng)
    return group


def add_corrupted(
    group: LabelledGroup, scores: list[float], others: list[str], rng: random.Random
) -> None:
    """Append one corrupted answer and two off-topic ones to the group, and the pairs they lose.

    scores: log-odds of the group's texts against the reference.
    """
    for kind in (rng.choice(list(CORRUPTIONS)), "off_topic", "off_topic"):
        if kind == "off_topic":
            # The draw has no effect, but trained models depend on the state of `rng` after it.
            rng.choice(range(len(scores)))
            worse = rng.choice(others)
            # Every answer to the instruction beats an answer to another one, even if it is short.
            better = list(range(len(scores)))
        else:
            long = [i for i in range(len(scores)) if len(group.texts[i].split()) >= MIN_WORDS]
            if not long:
                continue
            original = rng.choice(long)
            worse = CORRUPTIONS[kind](group.texts[original], rng)
            better = [
                i
                for i, score in enumerate(scores)
                if i == original or score - scores[original] >= MIN_GAP
            ]
        group.texts.append(worse)
        group.corrupted += [(i, len(group.texts) - 1, 0.97) for i in better]


def make_groups(
    files: list[pd.DataFrame], size: int, seed: int, calibration: bool, part: str
) -> list[LabelledGroup]:
    """One group for each file and instruction of the part, in a random order that the seed fixes.

    calibration: whether to take the instructions `for_calibration` or the others. Groups without
    pairs are left out.
    """
    groups = []
    for number, frame in enumerate(files):
        keep = {
            text: part_of(text) == part and for_calibration(text) == calibration
            for text in frame["instruction"].unique()
        }
        frame = frame[frame["instruction"].map(keep)]
        for instruction, rows in frame.groupby("instruction", sort=True):
            key = f"{seed}/{number}/{instruction_hash(instruction)}"
            off_topic = frame["output_2"][(frame["instruction"] != instruction).to_numpy()]
            others = list(off_topic.sample(3, random_state=random.Random(key).randrange(2**31)))
            groups.append(make_group(rows, others, size, key))
    random.Random(seed).shuffle(groups)
    return [group for group in groups if group.pairs]


def shorter_weight(groups: list[LabelledGroup], longer_wins: float) -> float:
    """The weight of pairs that the shorter answer wins.

    With it, the pairs that the longer answer wins have the share `longer_wins` of the total weight.
    Without it the model learns length first, because length is the easiest part of GPT-4's
    preferences to learn.
    """
    longer = [
        len(group.texts[i]) > len(group.texts[j]) for group in groups for i, j, _ in group.pairs
    ]
    share = float(np.mean(longer))
    return share / (1 - share) * (1 - longer_wins) / longer_wins
