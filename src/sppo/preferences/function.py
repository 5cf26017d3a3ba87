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
        """The function's file, and the modules beside it that it imports."""
        return _with_imports(_place(model)[0])

    @classmethod
    def check(cls, settings: Settings, key: str) -> None:
        """The file exists, is Python and can define the name. It is not run."""
        file, name = _place(settings["model"])
        if not file.is_file():
            problem = "is not a file" if file.exists() else "is missing"
            raise UserError(f"{key}: {file} {problem}; correct the path")
        try:
            tree = ast.parse(file.read_bytes(), str(file))
        except (SyntaxError, ValueError) as error:
            raise UserError(f"{key}: {file} is not Python ({error}); correct it") from None
        kind = _defined(tree.body).get(name)
        if kind is None and not _imports_everything(tree):
            raise UserError(f"{key}: {file} defines no {name}; correct the name")
        if kind in (ast.AsyncFunctionDef, ast.ClassDef, ast.Constant):
            raise UserError(
                f"{key}: {name} of {file} is no function; define it with def {name}(prompt,"
                " responses)"
            )
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name == name and not _takes_two(node):
                raise UserError(
                    f"{key}: {name} of {file} does not take two arguments; define it with def"
                    f" {name}(prompt, responses)"
                )

    def __init__(self, settings: Settings, base: Path | None, device: str) -> None:
        self.check(settings, "preference.model")
        file, name = _place(settings["model"])
        self.name = settings["model"]
        self.function = _load(file, name)
        self.warning = SymmetryWarning(self.name)

    def all_pair_logits(self, groups: list[Group]) -> list[np.ndarray]:
        from sppo.preferences.estimates import logits_of

        shown = progress(groups, "compare") if len(groups) > 1 else groups
        found = [
            self._probabilities(index, prompt, responses)
            for index, (prompt, responses, _) in enumerate(shown)
        ]
        self.warning.check(found)
        return [logits_of((P + 1.0 - P.T) / 2) for P in found]

    def _probabilities(self, index: int, prompt: str, responses: list[str]) -> np.ndarray:
        """What the function returns for one prompt, as a (K, K) matrix with diagonal 1/2."""
        try:
            returned = self.function(prompt, list(responses))
        except (Exception, SystemExit) as error:  # a user's function can raise anything
            place = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{_described(error)} ({place.filename}, line {place.lineno})"
            raise ComparisonError(index, f"the function raised {reason}; correct it") from error
        k = len(responses)
        try:
            return probabilities_of(returned, (k, k), (k,))
        except ValueError as error:
            raise ComparisonError(index, f"the function returned {error}") from None


def probabilities_of(returned: Any, *shapes: tuple[int, ...]) -> np.ndarray:
    """P (K, K) with diagonal 1/2, of what a user's code returned.

    Args:
        returned: probabilities (K, K), or scores (K,).
        shapes: those that are allowed, in the order in which an error names them.

    Raises ValueError with what is wrong and the remedy, after "returned".
    """
    import numpy as np

    try:
        if hasattr(returned, "detach"):  # a torch tensor, which can be on a GPU or in bfloat16
            returned = returned.detach().cpu().double().numpy()
        values = np.asarray(returned)
        if values.dtype.kind not in "biufO":
            raise TypeError(f"it has dtype {values.dtype}")
        values = values.astype(np.float64)
    except Exception as error:  # an object's own conversion can raise anything
        raise ValueError(
            f"{type(returned).__name__}, which is no array of numbers ({_described(error)});"
            " correct it"
        ) from None
    if values.shape not in shapes:
        names = ["probabilities" if len(shape) == 2 else "scores" for shape in shapes]
        wanted = " or ".join(f"{s} {name}" for s, name in zip(shapes, names, strict=True))
        raise ValueError(f"shape {values.shape}; return {wanted}")
    if values.ndim == 2:
        np.fill_diagonal(values, 0.5)
    if not np.isfinite(values).all():
        raise ValueError("NaN or infinity; correct it")
    if values.ndim == 1:
        gaps = values[:, None] - values[None, :]
        return 0.5 * (1.0 + np.tanh(0.5 * gaps))  # sigma, without overflow
    if values.size and not 0.0 <= values.min() <= values.max() <= 1.0:
        raise ValueError(
            f"{values.min():.3g} to {values.max():.3g}, which are no probabilities; return values"
            f" in [0, 1], or ({len(values)},) scores"
        )
    return values


class SymmetryWarning:
    """Warns once if P[i, j] + P[j, i] is not 1. name: of the preference model."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.was_given = False

    def check(self, found: list[np.ndarray]) -> None:
        """Look at the matrices (K, K) of all prompts."""
        import numpy as np

        deviations = [float(np.abs(P + P.T - 1.0).max(initial=0.0)) for P in found]
        off = [deviation for deviation in deviations if deviation > SYMMETRIC]
        if off and not self.was_given:
            self.was_given = True
            print(
                f"warning: {self.name} is not symmetric for {len(off)} of {len(found)} prompts:"
                f" P(i, j) + P(j, i) differs from 1 by up to {max(off):.3g}; the mean of P(i, j)"
                " and 1 - P(j, i) is used",
                file=sys.stderr,
                flush=True,
            )


def _takes_two(function: ast.FunctionDef) -> bool:
    """Whether a function can be called with two arguments by position."""
    of = function.args
    most = len(of.posonlyargs) + len(of.args)
    required = [default for default in of.kw_defaults if default is None]
    return most - len(of.defaults) <= 2 and (most >= 2 or of.vararg is not None) and not required


def _place(model: str) -> tuple[Path, str]:
    """File and name of the function."""
    match = PLACE.fullmatch(model)
    assert match is not None  # `recognises` said so
    return Path(match["file"]).expanduser(), match["name"]


def _described(error: BaseException) -> str:
    """Type and text of an error, whose own conversion to text can fail."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


def _defined(body: list[ast.stmt]) -> dict[str, type[ast.AST]]:
    """The names that statements define at the top level of a module, each with the kind of node."""
    names: dict[str, type[ast.AST]] = {}
    for statement in body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names[statement.name] = type(statement)
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            for target in targets:
                for node in ast.walk(target):
                    if isinstance(node, ast.Name):
                        names[node.id] = type(statement.value or statement)
        elif isinstance(statement, (ast.Import, ast.ImportFrom)):
            for alias in statement.names:
                names[alias.asname or alias.name] = ast.alias
        for part in ("body", "orelse", "finalbody", "handlers"):  # of if, try and with
            if not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                for inner in getattr(statement, part, []):
                    names |= _defined(inner.body if part == "handlers" else [inner])
    return names


def _imports_everything(tree: ast.Module) -> bool:
    """Whether `from x import *` can define any name."""
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return any(alias.name == "*" for node in imports for alias in node.names)


def _with_imports(file: Path) -> list[Path]:
    """The file and all modules that it imports, directly or not, from the folder that it is in."""
    found = [file]
    for each in found:  # it grows
        try:
            tree = ast.parse(each.read_bytes(), str(each))
        except (OSError, SyntaxError, ValueError):
            continue  # `check` reports it
        names: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module)
        for name in sorted(names):
            beside = file.parent / Path(*name.split("."))
            for candidate in (beside.with_suffix(".py"), beside / "__init__.py"):
                if candidate.is_file() and candidate not in found:
                    found.append(candidate)
    return found


def _load(file: Path, name: str) -> Callable[[str, list[str]], Any]:
    """The function, from its file. The file can import modules that are stored beside it."""
    # The name is unusual, so that a file called random.py hides no other module.
    module_name = f"preference_function_{file.stem}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None and spec.loader is not None  # for a name that ends in .py there is one
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickle look a module up here; late imports need its folder.
    sys.modules[module_name] = module
    sys.path.append(str(file.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a user's module can raise anything
        reason = _described(error)
        raise UserError(f"preference.model: {file} cannot be imported ({reason})") from error
    function = getattr(module, name, None)
    if not callable(function) or isinstance(function, type):
        raise UserError(f"preference.model: {name} of {file} is no function; correct the name")
    return function
