"""A preference model that a user writes as one Python function.

`preference: {model: path/to/file.py:name}` calls `name(prompt, responses)`, where prompt is a text
and responses are K texts. It returns one of

* a (K, K) matrix: P[i, j] is the probability that response i is preferred to response j, in [0, 1];
* a (K,) vector of scores s, in any unit; then P[i, j] = sigma(s_i - s_j) (Bradley-Terry).

A matrix need not satisfy P[i, j] + P[j, i] = 1: the mean of P[i, j] and 1 - P[j, i] is used, and a
warning says how far off it was. With `pairs.probability: pairwise` and `pairs.logit_scale: 0.5`,
the defaults, the probabilities that train are the function's own, but never closer to 0 or 1 than
1e-9.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sppo.core.errors import UserError
from sppo.core.progress import progress
from sppo.preferences.base import ComparisonError, Group, PreferenceModel, Settings, register

if TYPE_CHECKING:
    import numpy as np

PLACE = re.compile(r"(?P<file>.+\.py):(?P<name>[A-Za-z_]\w*)")
SMALLEST = 1e-9  # logits must be finite, so probabilities stay this far from 0 and 1
SYMMETRIC = 1e-6  # P + P^T may differ from 1 by so much without a warning


@register
class FunctionModel(PreferenceModel):
    """A user's Python function."""

    kind = "function"
    form = "path/to/file.py:name of a Python function (prompt, responses)"

    @classmethod
    def recognises(cls, settings: Settings) -> bool:
        return PLACE.fullmatch(settings["model"]) is not None

    @classmethod
    def files(cls, model: str) -> list[Path]:
        return [_place(model)[0]]

    @classmethod
    def check(cls, settings: Settings, key: str) -> None:
        """The file exists, is Python and defines the name. It is not run."""
        file, name = _place(settings["model"])
        if not file.is_file():
            raise UserError(f"{key}: {file} is missing; correct the path")
        try:
            body = ast.parse(file.read_bytes(), str(file)).body
        except (SyntaxError, ValueError) as error:
            raise UserError(f"{key}: {file} is not Python ({error}); correct it") from None
        if name not in _defined(body):
            raise UserError(f"{key}: {file} defines no {name}; correct the name")

    def __init__(self, settings: Settings, base: Path | None, device: str) -> None:
        self.check(settings, "preference.model")
        file, name = _place(settings["model"])
        self.name = settings["model"]
        self.function = _load(file, name)

    def all_pair_logits(self, groups: list[Group]) -> list[np.ndarray]:
        import numpy as np

        found, deviations = [], []
        for index, (prompt, responses) in enumerate(progress(groups, "compare")):
            P = self._probabilities(index, prompt, responses)
            deviations.append(float(np.abs(P + P.T - 1.0).max(initial=0.0)))
            P = np.clip((P + 1.0 - P.T) / 2, SMALLEST, 1.0 - SMALLEST)
            found.append(np.log(P) - np.log1p(-P))
        off = [deviation for deviation in deviations if deviation > SYMMETRIC]
        if off:
            print(
                f"warning: {self.name} is not symmetric for {len(off)} of {len(groups)} prompts:"
                f" P(i, j) + P(j, i) differs from 1 by up to {max(off):.3g}; the mean of P(i, j)"
                " and 1 - P(j, i) is used",
                file=sys.stderr,
                flush=True,
            )
        return found

    def _probabilities(self, index: int, prompt: str, responses: list[str]) -> np.ndarray:
        """What the function returns for one prompt, as a (K, K) matrix with diagonal 1/2."""
        import numpy as np

        try:
            returned = self.function(prompt, list(responses))
        except Exception as error:  # a user's function can raise anything
            place = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{type(error).__name__}: {error} ({place.filename}, line {place.lineno})"
            raise ComparisonError(index, f"the function raised {reason}; correct it") from error
        try:
            values = np.asarray(returned, dtype=np.float64)
        except (TypeError, ValueError):
            reason = f"returned {type(returned).__name__}, which is no array of numbers"
            raise ComparisonError(index, f"the function {reason}; correct it") from None
        k = len(responses)
        if values.shape not in ((k,), (k, k)):
            raise ComparisonError(
                index,
                f"the function returned shape {values.shape}; return ({k}, {k}) probabilities or"
                f" ({k},) scores",
            )
        if not np.isfinite(values).all():
            raise ComparisonError(index, "the function returned NaN or infinity; correct it")
        if values.ndim == 1:
            gaps = values[:, None] - values[None, :]
            return 0.5 * (1.0 + np.tanh(0.5 * gaps))  # sigma, without overflow
        values = values.copy()
        np.fill_diagonal(values, 0.5)
        if values.min() < 0.0 or values.max() > 1.0:
            raise ComparisonError(
                index,
                f"the function returned {values.min():.3g} to {values.max():.3g}, which are no"
                f" probabilities; return values in [0, 1], or ({k},) scores",
            )
        return values


def _place(model: str) -> tuple[Path, str]:
    """File and name of the function."""
    match = PLACE.fullmatch(model)
    assert match is not None  # `recognises` said so
    return Path(match["file"]).expanduser(), match["name"]


def _defined(body: list[ast.stmt]) -> set[str]:
    """The names that a module's statements define at its top level."""
    names = set()
    for statement in body:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            names.add(statement.name)
        elif isinstance(statement, ast.Assign):
            names |= {target.id for target in statement.targets if isinstance(target, ast.Name)}
        elif isinstance(statement, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name for alias in statement.names}
    return names


def _load(file: Path, name: str) -> Callable[[str, list[str]], Any]:
    """The function, from its file. Modules that stand beside the file can be imported by it."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None  # for a name that ends in .py there is one
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a user's module can raise anything
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"preference.model: {file} cannot be imported ({reason})") from error
    finally:
        sys.path.remove(str(file.parent))
    function = getattr(module, name)
    if not callable(function):
        raise UserError(f"preference.model: {name} of {file} is no function; correct the name")
    return function
