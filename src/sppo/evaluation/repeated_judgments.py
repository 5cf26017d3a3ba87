"""AlpacaEval's judges behind an API, asked about each pair more than once.

alpaca-eval shows a judge the two answers in an order that it draws from the instruction. Judges
prefer a place, and answer differently when asked again. Here every pair can be shown in both orders
and several times; the preference is the mean. An interval over instructions contains the noise that
is left, because each instruction is drawn with its own judgments.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

Record = dict[str, Any]


class RepeatedAnnotator:
    """alpaca-eval's annotator interface over its own annotators.

    caches: the package's file of finished judgments for each pass. An annotation has `judgments`: a
    list of passes, each with the preferences in one or both orders.
    """

    def __init__(self, annotators_config: str, caches: list[str], both_orders: bool) -> None:
        self.config, self.caches, self.both_orders = annotators_config, caches, both_orders

    def annotate_head2head(
        self, outputs_1: pd.DataFrame, outputs_2: pd.DataFrame, **arguments: Any
    ) -> list[Record]:
        """Annotations in the package's format. Arguments are passed on to the package."""
        from alpaca_eval.annotators import PairwiseAnnotator

        passes = []
        for cache in self.caches:
            annotator = PairwiseAnnotator(annotators_config=self.config, caching_path=cache)
            orders = [annotator.annotate_head2head(outputs_1, outputs_2, **arguments)]
            if self.both_orders:
                # The package draws the order from the instruction alone, so it shows the second
                # answer where it showed the first.
                other = annotator.annotate_head2head(outputs_2, outputs_1, **arguments)
                orders.append([_exchanged(row) for row in other])
            passes.append([{row["instruction"]: row for row in rows} for rows in orders])
        return [_merged(row, passes) for row in passes[0][0].values()]


def _exchanged(row: Record) -> Record:
    """The annotation of the pair in the other order."""
    preference = row["preference"]
    return row | {"preference": None if preference is None else 3 - (preference or 1.5)}


def _merged(row: Record, passes: list[list[dict[str, Record]]]) -> Record:
    """One annotation with the mean preference; it is missing if one of the judgments is."""
    judgments = [[order[row["instruction"]]["preference"] for order in orders] for orders in passes]
    values = [each for orders in judgments for each in orders]
    failed = any(each is None or not 0 <= each <= 2 for each in values)  # NaN too
    # The package once wrote a draw as 0.
    mean = None if failed else sum(each or 1.5 for each in values) / len(values)
    return row | {"preference": mean, "judgments": judgments}


def flips(annotations: list[Record]) -> Record:
    """How often verdicts on the same pair contradict, in per cent of pairs without a draw.

    order_flips: of the two orders, in the first pass. pass_flips: of two passes in the same order;
    with more than two, the mean over all pairs of passes. None where it was not asked.
    """
    orders: list[tuple[float, float]] = []
    passes: list[tuple[float, float]] = []
    for row in annotations:
        judgments = row["judgments"]
        if len(judgments[0]) == 2:
            orders.append((judgments[0][0], judgments[0][1]))
        for first, second in combinations(judgments, 2):
            passes += zip(first, second, strict=True)
    return {"order_flips": _share(orders), "pass_flips": _share(passes)}


def _share(pairs: list[tuple[float, float]]) -> float | None:
    """Per cent of pairs of preferences on different sides of 1.5, among those without a draw."""
    decided = [(one - 1.5) * (two - 1.5) for one, two in pairs if 1.5 not in (one, two)]
    return 100 * sum(each < 0 for each in decided) / len(decided) if decided else None


def cache_files(file: Path, passes: int) -> Iterator[Path]:
    """The files of finished judgments of each pass. The first is that of a judge asked once."""
    yield file
    for number in range(2, passes + 1):
        yield file.with_stem(f"{file.stem}-pass{number}")
