"""Several preference models at once: P is the weighted mean of theirs.

`preference: {model: several.yaml}`, a YAML file with

    models:
      - {model: verifiable, weight: 2}
      - {model: prefer.py:short}            # weight 1
      - {model: models/my-reward, precision: float32}

An entry has the keys of the configuration's section `preference`, and `weight`. This is a
population of annotators: P(y beats y') is the share of them, by weight, that prefers y. It can be
cyclic even if no model of it is (Condorcet's paradox). The matrix of each model is kept beside the
mean.
"""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from sppo.core.config import check_against_schema, schema
from sppo.core.errors import UserError
from sppo.preferences.base import (
    ComparisonCost,
    Group,
    PreferenceModel,
    Settings,
    kind_of,
    load_preference_model,
    register,
    settings_for,
)

if TYPE_CHECKING:
    import numpy as np

FORM = "give `models:`, a list of {model: name, weight: number}"


class Member(NamedTuple):
    """A model of a population: its section `preference`, and its weight."""

    settings: dict[str, Any]
    weight: float


def members_of(file: Path) -> list[Member]:
    """The models that a population's file names. UserError for another form."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file} cannot be read ({reason}); {FORM}") from None
    entries = content.get("models") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries or set(content) != {"models"}:
        raise UserError(f"{file} is no list of preference models; {FORM}")
    keys = {*schema()["properties"]["preference"]["properties"], "weight"} - {"implicit"}
    members = []
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or not isinstance(entry.get("model"), str):
            raise UserError(f"{file} entry {number}: {FORM}")
        if unknown := entry.keys() - keys:
            raise UserError(f"{file} entry {number}: unknown key {min(unknown)}; {FORM}")
        weight = entry.get("weight", 1)
        is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not is_number or not 0 < weight < math.inf:
            raise UserError(f"{file} entry {number}: weight is {weight}; give a number above 0")
        others = {key: value for key, value in entry.items() if key not in ("model", "weight")}
        check_against_schema({"preference": others}, f"{file} entry {number}: ")
        members.append(Member(settings_for(entry["model"], **others), float(weight)))
    return members


@register
class Population(PreferenceModel):
    """The weighted mean of several preference models."""

    kind = "population"
    form = "a .yaml file with a list of preference models"
    needs_base = True  # A model of it can be `ranker`.
    environment = "eval"

    @classmethod
    def recognises(cls, settings: Settings) -> bool:
        file = Path(settings["model"]).expanduser()
        if file.suffix not in (".yaml", ".yml") or not file.is_file():
            return False
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        return any(line.startswith("models:") for line in lines)

    @classmethod
    def files(cls, model: str) -> list[Path]:
        """The population's file, and those of its models."""
        file = Path(model).expanduser()
        found = [file]
        for member in members_of(file) if file.is_file() else []:
            found += kind_of(member.settings, f"{file}: model").files(member.settings["model"])
        return found

    @classmethod
    def check(cls, settings: Settings, key: str) -> None:
        file = Path(settings["model"]).expanduser()
        for number, member in enumerate(members_of(file), 1):
            where = f"{file} entry {number}: model"
            kind = kind_of(member.settings, where)
            if kind is cls:
                raise UserError(f"{where} is a population itself; list its models here")
            if kind.is_prepared and not Path(member.settings["model"]).expanduser().is_dir():
                raise UserError(
                    f"{where} is {member.settings['model']}, which is not fetched for a population;"
                    " give the folder of a model that you downloaded"
                )
            kind.check(member.settings, where)

    @classmethod
    def unknown_prompts(cls, model: str, prompts: list[str]) -> list[str]:
        """The prompts that one of the models does not know."""
        unknown: set[str] = set()
        for member in members_of(Path(model).expanduser()):
            kind = kind_of(member.settings)
            unknown |= set(kind.unknown_prompts(member.settings["model"], prompts))
        return [prompt for prompt in prompts if prompt in unknown]

    @classmethod
    def training_instructions(cls, model: str) -> list[Path]:
        """Those of all models."""
        return [
            file
            for member in members_of(Path(model).expanduser())
            for file in kind_of(member.settings).training_instructions(member.settings["model"])
        ]

    @classmethod
    def cost(
        cls, settings: Settings, prompts: float, prompt: float, samples: int, response: float
    ) -> ComparisonCost | None:
        """The sum over its models, which are all in memory at once."""
        sizes = (prompts, prompt, samples, response)
        costs = [
            kind_of(member.settings).cost(member.settings, *sizes)
            for member in members_of(Path(settings["model"]).expanduser())
        ]
        known = [cost for cost in costs if cost is not None]
        if len(known) < len(costs):
            return None
        return ComparisonCost(
            flops=sum(cost.flops for cost in known),
            tokens=sum(cost.tokens for cost in known),
            weights=sum(cost.weights for cost in known),
            requests=sum(cost.requests for cost in known),
        )

    def __init__(self, settings: Settings, base: Path | None, device: str) -> None:
        self.check(settings, "preference.model")
        self.name = settings["model"]
        members = members_of(Path(self.name).expanduser())
        self.models = [load_preference_model(each.settings, base, device) for each in members]
        total = sum(each.weight for each in members)
        self.weights = [each.weight / total for each in members]

    def all_pair_logits(self, groups: list[Group]) -> list[np.ndarray]:
        from sppo.preferences.estimates import logits_of, win_probabilities

        self.members = {
            f"{number} {model.name}": [
                win_probabilities(logits) for logits in model.all_pair_logits(groups)
            ]
            for number, model in enumerate(self.models, 1)
        }
        by_group = zip(*self.members.values(), strict=True)
        return [
            logits_of(sum(w * P for w, P in zip(self.weights, of_group, strict=True)))
            for of_group in by_group
        ]


def agreement(members: dict[str, list[np.ndarray]]) -> dict[str, float | None]:
    """The share of pairs of responses on which two models name the same winner, by their names.

    members: P (K, K) of each prompt, by model. Pairs that tie in one of the models are left out.
    None if no pair is left.
    """
    import numpy as np

    found: dict[str, float | None] = {}
    for first, second in combinations(members, 2):
        same = counted = 0
        for P, Q in zip(members[first], members[second], strict=True):
            pairs = np.triu_indices(len(P), 1)
            signs = np.sign(np.round(P[pairs] - 0.5, 9)) * np.sign(np.round(Q[pairs] - 0.5, 9))
            same += int((signs > 0).sum())
            counted += int((signs != 0).sum())
        found[f"{first} / {second}"] = same / counted if counted else None
    return found
