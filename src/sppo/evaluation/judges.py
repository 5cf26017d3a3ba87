"""Judges and graders: which ones a configuration can name.

A local judge is a preference model (`sppo.preferences`). Others answer through OpenAI's interface
(`sppo.core.chat_client`).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sppo.core.errors import UserError
from sppo.core.openai_api import OPENAI_MODELS, check_address
from sppo.preferences.base import Group, PreferenceModel, compare, local_kind, settings_for
from sppo.preferences.embedded import EMBEDDED


def is_openai_model(judge: str) -> bool:
    """Whether the name is one of OpenAI's models."""
    return judge.startswith(OPENAI_MODELS)


def is_annotators_config(judge: str) -> bool:
    """Whether alpaca-eval has an annotators_config of this name; True where the package is absent.

    The package is looked up, not imported: it takes seconds, and the Snakefile's environment may
    lack it.
    """
    package = importlib.util.find_spec("alpaca_eval")
    if package is None or package.origin is None:
        return True
    configs = Path(package.origin).parent / "evaluators_configs"
    return (configs / judge / "configs.yaml").exists()


def second_wins(
    model: PreferenceModel, comparisons: Sequence[tuple[str, str, str]], what: str
) -> list[float]:
    """P(the second answer beats the first) by a preference model, of each comparison.

    comparisons: a prompt and two answers. P is sigma of the mean logit of both orders, as for
    training preferences (arXiv 2405.00675, section 5.1); it is 1/2 if the answers are equal. what:
    what a comparison is about, for an error line.
    """
    from sppo.preferences.estimates import win_probabilities

    groups = {
        str(number): Group(prompt, [first, second])
        for number, (prompt, first, second) in enumerate(comparisons, 1)
        if first != second
    }
    logits = compare(model, groups, what) if groups else {}
    return [
        float(win_probabilities(logits[str(number)])[1, 0]) if str(number) in logits else 0.5
        for number in range(1, len(comparisons) + 1)
    ]


@dataclass(frozen=True)
class Judging:
    """What the keys judge, judge_model and judge_base_url of a configuration section can name.

    local: whether a preference model can judge. words: names with a meaning of their own.
    is_known: whether a name is one of the judges behind an API. known: what these are, for the
    user.
    """

    section: str
    is_known: Callable[[str], bool]
    known: str
    local: bool = True
    words: tuple[str, ...] = ()

    def check(self, settings: Mapping[str, Any], key: bool = True) -> None:
        """Raise UserError if the judge cannot work. No server is asked; be quick.

        settings: the section, or a program's arguments. key: whether a missing key of the API is an
        error; before the jobs are known it is not.
        """
        judge, address = settings["judge"], settings["judge_base_url"]
        if address is not None:  # also where no server is asked, because records keep it
            check_address(address, f"{self.section}.judge_base_url")
        if judge in self.words:
            return
        kind = local_kind(judge) if self.local else None
        if kind is not None:
            kind.check(settings_for(judge, base_url=address), f"{self.section}.judge")
            for file in kind.files(judge):
                if not file.exists():
                    remedy = "give a folder with its files as" if kind.is_prepared else "correct"
                    raise UserError(
                        f"judge {judge}: {file} is missing; {remedy} {self.section}.judge"
                    )
            return
        if self.local and "/" in judge:
            raise UserError(
                f"judge {judge} is missing, or no preference model; correct {self.section}.judge"
            )
        if judge == "openai":
            for name in ("judge_model", "judge_base_url"):
                if not settings[name]:
                    raise UserError(f"judge openai needs {self.section}.{name}; set it")
            return
        if not self.is_known(judge):
            ours = list(self.words)
            if self.local:
                ours += [*EMBEDDED, "a folder of such an adapter", "a function as file.py:name"]
            raise UserError(
                f"unknown judge {judge}; give {', '.join([*ours, 'openai'])}, or {self.known} as"
                f" {self.section}.judge"
            )
        if key and not os.environ.get("OPENAI_API_KEY"):
            raise UserError(
                f"judge {judge} needs a key; export OPENAI_API_KEY, or choose another"
                f" {self.section}.judge"
            )


ALPACA_EVAL = Judging(
    "alpaca_eval",
    is_annotators_config,
    "an annotators_config of alpaca-eval such as weighted_alpaca_eval_gpt4_turbo",
)
MT_BENCH = Judging("mt_bench", is_openai_model, "a model of OpenAI's such as gpt-6-luna")
ARENA_HARD = Judging("arena_hard", is_openai_model, "a model of OpenAI's such as gpt-4.1")
GRADES = Judging(
    "grades",
    is_openai_model,
    "a model of OpenAI's such as gpt-6-luna",
    local=False,
    words=("preference",),  # the run's preference model
)
