"""A population of annotators, each of whom cares about one thing that code can check.

The prompts are instructions with constraints in the form of IFEval (`constraints.py`). Of two
responses, an annotator prefers the one that does better by its criterion, and has no preference if
they are equal. P(y beats y') is the share of annotators that prefer y; no preference counts as half
a vote for each. So P is exact, and it can be cyclic, because a majority of annotators can prefer a
to b, another majority b to c, and a third c to a.

For each constraint of the prompt there are three annotators:

* strict: the response follows the constraint, as IFEval's strict metric decides;
* loose: the same by IFEval's loose metric;
* graded: how far the response is from what is asked, for constraints on a number.

One more annotator, general, adds up signs of a degenerate response (`constraints.flaws`). Without
it, a policy could learn to write anything that has the form asked for.

A model is a YAML file that names the files of instructions and the weight of each annotator. The
name `verifiable` means data/instructions/verifiable.yaml.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sppo.core.artifacts import shipped
from sppo.core.errors import UserError
from sppo.preferences.base import ComparisonError, Group, PreferenceModel, Settings, register
from sppo.preferences.constraints import (
    Instruction,
    check_known,
    distance,
    flaws,
    follows,
    read_instructions_to_check,
)

if TYPE_CHECKING:
    import numpy as np

SHIPPED = "data/instructions/verifiable.yaml"
ANNOTATORS = ("strict", "loose", "graded", "general")


@register
class VerifiableModel(PreferenceModel):
    """A population of annotators that check the constraints of the prompt."""

    kind = "verifiable"
    form = "`verifiable`, a .yaml file of annotators"
    uses_torch = False
    environment = "eval"

    @classmethod
    def recognises(cls, settings: Settings) -> bool:
        model = settings["model"]
        return model == "verifiable" or model.endswith((".yaml", ".yml"))

    @classmethod
    def files(cls, model: str) -> list[Path]:
        """The YAML file, and the files of instructions that it names."""
        file = _file(model)
        return [file, *read_population(file)[0]] if file.is_file() else [file]

    @classmethod
    def check(cls, settings: Settings, key: str) -> None:
        """The files exist and have the right form."""
        model = settings["model"]
        if settings["source"] != "instruction":
            raise UserError(
                f"{key} is {model}, which knows prompts by the user's words, but"
                f" preference.source is {settings['source']}; set instruction"
            )
        file = _file(model)
        if not file.is_file():
            raise UserError(f"{key} is {model}, but {file} is missing; correct it")
        for instructions in read_population(file)[0]:
            read_instructions_to_check(instructions)

    @classmethod
    def unknown_prompts(cls, model: str, prompts: list[str]) -> list[str]:
        """The prompts that are in none of the model's files of instructions."""
        files, _ = read_population(_file(model))
        known = {one.prompt.strip() for file in files for one in read_instructions_to_check(file)}
        return [prompt for prompt in prompts if prompt.strip() not in known]

    def __init__(self, settings: Settings, base: Path | None, device: str) -> None:
        self.check(settings, "preference.model")
        self.name = settings["model"]
        files, self.weights = read_population(_file(settings["model"]))
        self.instructions: dict[str, Instruction] = {}
        for file in files:
            found = read_instructions_to_check(file)
            check_known(found, file)
            for number, instruction in enumerate(found, 1):
                known = self.instructions.setdefault(instruction.prompt.strip(), instruction)
                if known.constraints != instruction.constraints:
                    raise UserError(
                        f"{file} line {number}: the same prompt has other constraints elsewhere;"
                        " remove one"
                    )

    def all_pair_logits(self, groups: list[Group]) -> list[np.ndarray]:
        from sppo.preferences.estimates import logits_of

        found = []
        for index, (prompt, responses, _) in enumerate(groups):
            instruction = self.instructions.get(prompt.strip())
            if instruction is None:
                raise ComparisonError(
                    index,
                    f"no constraints are known for the prompt {prompt[:60]!r}; set another"
                    " preference.model, or add the file that has it to the model's instructions",
                )
            found.append(logits_of(self.probabilities(instruction, responses)))
        return found

    def probabilities(self, instruction: Instruction, responses: list[str]) -> np.ndarray:
        """P[i, j], the weighted share of annotators that prefer response i to j: (K, K)."""
        import numpy as np

        votes = np.zeros((len(responses), len(responses)))
        total = 0.0
        for name, _, grades in self.grades(instruction, responses):
            weight = self.weights[name]
            votes += weight * (0.5 + 0.5 * np.sign(grades[:, None] - grades[None, :]))
            total += weight
        return votes / total

    def grades(
        self, instruction: Instruction, responses: list[str]
    ) -> list[tuple[str, str | None, np.ndarray]]:
        """Every annotator: its name in `ANNOTATORS`, the id of its constraint, its grades, (K,).

        `general` has no constraint. Only the order of the grades has a meaning; a higher one is
        better.
        """
        import numpy as np

        followed = [follows(instruction, response) for response in responses]
        general = np.array([-flaws(instruction, text) for text in responses])
        annotators: list[tuple[str, str | None, np.ndarray]] = [("general", None, general)]
        for number, constraint in enumerate(instruction.constraints):
            for which, name in enumerate(("strict", "loose")):
                grades = [float(each[which][number]) for each in followed]
                annotators.append((name, constraint.id, np.array(grades)))
            distances = [distance(constraint, text) for text in responses]
            if None not in distances:
                graded = -np.array(distances, dtype=float)
                annotators.append(("graded", constraint.id, graded))
        return annotators


def _file(model: str) -> Path:
    return shipped(SHIPPED) if model == "verifiable" else Path(model)


def read_population(file: Path) -> tuple[list[Path], dict[str, float]]:
    """The files of instructions, relative to the YAML file, and the weight of each annotator.

    Raises `UserError` if the file has another form.
    """
    import yaml

    form = "give instructions: [files], and weights: {" + ": 1, ".join(ANNOTATORS) + ": 1}"
    try:
        content: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not YAML ({' '.join(str(error).split())}); {form}") from None
    if not isinstance(content, dict) or content.keys() != {"instructions", "weights"}:
        raise UserError(f"{file} is no population of annotators; {form}")
    names, weights = content["instructions"], content["weights"]
    if not isinstance(names, list) or not names or not all(isinstance(one, str) for one in names):
        raise UserError(f"{file}: instructions is no list of files; {form}")
    if not isinstance(weights, dict) or weights.keys() != set(ANNOTATORS):
        raise UserError(f"{file}: weights must have {', '.join(ANNOTATORS)}; {form}")
    for name, weight in weights.items():
        if type(weight) not in (int, float) or not 0 <= weight < float("inf"):
            raise UserError(f"{file}: weight {name} is no number of at least 0; correct it")
    if not weights["general"] and not weights["strict"] and not weights["loose"]:
        raise UserError(f"{file}: general, strict and loose weigh 0; give one of them a weight")
    paths = [file.parent / Path(name).expanduser() for name in names]
    return paths, {name: float(weight) for name, weight in weights.items()}
