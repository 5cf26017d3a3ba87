"""Data for the embedded preference models: AlpacaEval annotations in, groups of labelled pairs out.

Everything here is pure and seeded: no model, no network. An annotation file has one row per
(instruction, model): `output_1` is the reference's answer, `output_2` the model's, `preference` runs
from 1 (output_1 better) to 2 (output_2 better). Two things make the raw files misleading, and both are
mended here: `output_1` is always the same model, so that its style predicts the label wherever wins and
losses are not equally many (`balance`), and the longer answer usually wins (`shorter_weight`).
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
PARTS = ("ranker", "judge", "test")
MAX_LOG_ODDS = (
    16.0  # GPT-4-turbo's weighted preferences go down to 1e-7; 1.0 and 2.0 exactly mean "beyond"
)
MIN_GAP = 1.0  # pairs closer than this in log-odds are not labelled
MAX_TARGET = 0.95  # GPT-4 is not always right, however sure it is
MIN_WORDS = 12  # shorter answers are not corrupted: a cut "Yes." is still "Yes."


# ---------------------------------------------------------------- instructions and their parts


def instruction_hash(instruction: str) -> str:
    """The SHA-256 of the stripped instruction, in hex: what `training_instructions.txt` lists."""
    return hashlib.sha256(instruction.strip().encode("utf-8")).hexdigest()


def part_of(instruction: str) -> str:
    """`ranker` (40%), `judge` (40%) or `test` (20%), by the hash alone: the same in every file."""
    share = int(instruction_hash(instruction)[:8], 16) / 2**32
    return PARTS[0] if share < 0.4 else PARTS[1] if share < 0.8 else PARTS[2]


def for_calibration(instruction: str) -> bool:
    """One training instruction in ten is kept from the gradient, to fit the logits' scale on."""
    return int(instruction_hash(instruction)[8:16], 16) / 2**32 < 0.1


# ---------------------------------------------------------------- reading and cleaning


def load_annotations(path: Path) -> tuple[pd.DataFrame, dict[str, int]]:
    """Read an annotation file; return its usable rows and how many were left out, by reason.

    Left out: rows without a preference, draws (0 or 1.5), preferences outside 1..2, rows without
    texts, and rows whose two outputs are the same text. The result has `COLUMNS` and `model`.
    Raises UserError for an absent or unreadable file, a missing column, or no usable row.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no annotation file {path}")
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
    keep, excluded = pd.Series(True, index=frame.index), {}
    for reason, bad in reasons:  # each row is counted once, under its first reason
        excluded[reason] = int((keep & bad).sum())
        keep &= ~bad
    if not keep.any():
        raise UserError(f"{path} has {len(frame)} rows and none that can be used ({excluded})")
    return frame[keep].reset_index(drop=True), excluded


def balance(frame: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Equally many wins of output_1 and of output_2: the more frequent side is sampled down."""
    second = frame["preference"] > 1.5
    size = min(int(second.sum()), int((~second).sum()))
    sides = [side.sample(size, random_state=seed) for side in (frame[~second], frame[second])]
    return pd.concat(sides).sort_index()


def log_odds(preference: np.ndarray) -> np.ndarray:
    """log P(output_2 wins) - log P(output_1 wins) of preferences in 1..2, within +-MAX_LOG_ODDS."""
    wins = np.asarray(preference, dtype=np.float64) - 1.0
    with np.errstate(divide="ignore"):
        return np.clip(np.log(wins) - np.log1p(-wins), -MAX_LOG_ODDS, MAX_LOG_ODDS)


# ---------------------------------------------------------------- corrupted answers


def cut(text: str, rng: random.Random) -> str:
    """Break off in the middle of a sentence, at 30 to 60% of the (first 120) words."""
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
    sentences = [
        part.strip() for line in text.split("\n") for part in line.split(". ") if part.strip()
    ]
    rng.shuffle(sentences)
    return ". ".join(sentences)


def repeat(text: str, rng: random.Random) -> str:
    """A loop: the opening, 8 to 30 words, again and again to about the length of the answer."""
    words = text.split(" ")
    opening = words[: min(rng.randint(8, 30), max(1, len(words) // 2))]
    times = max(3, min(len(words), 200) // len(opening))
    return " ".join(opening * times)


CORRUPTIONS = {
    "cut": cut,
    "shuffled": shuffle_words,
    "shuffled_sentences": shuffle_sentences,
    "repeated": repeat,
}  # and "off_topic": an answer to another instruction


# ---------------------------------------------------------------- groups of labelled pairs


@dataclass
class Group:
    """Answers to one instruction and the labelled pairs among them.

    pairs: (better, worse, target): indices into texts and the probability to learn, above 1/2.
    corrupted: the same, where `worse` is a corrupted answer.
    """

    instruction: str
    texts: list[str]
    pairs: list[tuple[int, int, float]] = field(default_factory=list)
    corrupted: list[tuple[int, int, float]] = field(default_factory=list)


def make_group(rows: pd.DataFrame, others: list[str], size: int, seed: str) -> Group:
    """One group from the rows of one instruction (all against the same reference).

    The reference meets equally many answers that beat it and that lost to it; further answers, where
    one side is short, meet only each other. Two models' answers are compared by their log-odds against
    the reference: target = sigma(3/4 * gap). (Checked on the 11,840 answers that both AlpacaEval files
    judge: where the 2.0 log-odds of two answers differ by more than 1.5, their order is that of the 1.0
    labels in 95% of pairs.) Three corrupted answers are added, two of them off-topic: what is relevant is
    harder to learn than what is broken. Each loses to its original and to all that beat the original.
    `others` are answers to other instructions, for the off-topic ones.
    """
    rng = random.Random(seed)
    reference, odds = rows["output_1"].iloc[0], log_odds(rows["preference"].to_numpy())
    rows = rows.assign(odds=odds)[(rows["output_1"] == reference).to_numpy()]
    rows = rows.drop_duplicates("output_2").sample(frac=1, random_state=rng.randrange(2**31))
    won, lost = rows[rows["odds"] > 0], rows[rows["odds"] < 0]
    each = min(len(won), len(lost), size // 2)
    fair = pd.concat([won[:each], lost[:each]])
    spare = pd.concat([won[each:], lost[each:]]).sample(frac=1, random_state=rng.randrange(2**31))
    chosen = pd.concat([fair, spare[: size - len(fair)]])
    group = Group(rows["instruction"].iloc[0], [reference, *chosen["output_2"]])
    scores = [0.0, *chosen["odds"]]
    for i, high in enumerate(scores):
        for j, low in enumerate(scores):
            unfair = (i == 0 and j > len(fair)) or (j == 0 and i > len(fair))
            if high - low >= MIN_GAP and not unfair:
                group.pairs.append((i, j, min(MAX_TARGET, 1 / (1 + np.exp(-0.75 * (high - low))))))
    add_corrupted(group, scores, others, rng)
    return group


def add_corrupted(group: Group, scores: list[float], others: list[str], rng: random.Random) -> None:
    """Append one broken answer and two off-topic ones to the group, and the pairs that they lose."""
    for kind in (rng.choice(list(CORRUPTIONS)), "off_topic", "off_topic"):
        long = [i for i in range(len(scores)) if len(group.texts[i].split()) >= MIN_WORDS]
        if kind != "off_topic" and not long:
            continue
        original = rng.choice(long if kind != "off_topic" else range(len(scores)))
        worse = (
            rng.choice(others)
            if kind == "off_topic"
            else CORRUPTIONS[kind](group.texts[original], rng)
        )
        group.texts.append(worse)
        # Every answer that belongs beats one that does not, however short it is.
        better = [
            i
            for i, score in enumerate(scores)
            if kind == "off_topic" or i == original or score - scores[original] >= MIN_GAP
        ]
        group.corrupted += [(i, len(group.texts) - 1, 0.97) for i in better]


def make_groups(
    files: list[pd.DataFrame], size: int, seed: int, calibration: bool, part: str
) -> list[Group]:
    """One group for each instruction of the part and file, in a random order that the seed fixes."""
    groups = []
    for number, frame in enumerate(files):
        keep = {
            text: part_of(text) == part and for_calibration(text) == calibration
            for text in frame["instruction"].unique()
        }
        frame = frame[frame["instruction"].map(keep)]
        for instruction, rows in frame.groupby("instruction", sort=True):
            key = f"{seed}/{number}/{instruction_hash(instruction)}"
            away = frame["output_2"][(frame["instruction"] != instruction).to_numpy()]
            others = list(away.sample(3, random_state=random.Random(key).randrange(2**31)))
            groups.append(make_group(rows, others, size, key))
    random.Random(seed).shuffle(groups)
    return [group for group in groups if group.pairs]


def shorter_weight(groups: list[Group], longer_wins: float) -> float:
    """The weight of pairs that the shorter answer wins, so that the longer wins that share of the total.

    Without it the model learns length first, for that is the easiest half of what GPT-4 prefers.
    """
    longer = [
        len(group.texts[i]) > len(group.texts[j]) for group in groups for i, j, _ in group.pairs
    ]
    share = float(np.mean(longer))
    return share / (1 - share) * (1 - longer_wins) / longer_wins
