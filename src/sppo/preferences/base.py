"""The interface of preference models, and the registry of their kinds.

A preference model compares the K responses to a prompt. Everything that the workflow asks of a kind
of model is answered by its class: how a configuration names it, which files it reads, what must be
checked before the first job, which resources it needs, what it costs. To add a kind, write a class
in a new file of this package, decorate it with `register`, and import the file in `__init__.py`.

The Snakefile imports this package without torch, so a kind imports heavy packages only in
`__init__` and in its methods.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from sppo.core.config import default_of, schema
from sppo.core.errors import UserError

if TYPE_CHECKING:
    import numpy as np

Settings = Mapping[str, Any]  # the configuration section `preference`
Message = Mapping[str, str]  # role and content


class Group(NamedTuple):
    """A prompt and the responses to it.

    prompt: what a model reads that takes one text. messages: the whole chat before the responses,
    for models that take chats; None if the prompt is all there is.
    """

    prompt: str
    responses: list[str]
    messages: Sequence[Message] | None = None

    @property
    def chat(self) -> list[dict[str, str]]:
        """The chat before the responses."""
        messages = self.messages or [{"role": "user", "content": self.prompt}]
        return [dict(message) for message in messages]


@dataclass(frozen=True)
class ComparisonCost:
    """What comparing costs: FLOPs, tokens read, and weights of the model that reads them.

    requests: sent to a server, whose own FLOPs and weights are not counted.
    """

    flops: float
    tokens: float
    weights: float
    requests: float = 0


class ComparisonError(UserError):
    """One group cannot be compared; `index` is its place, so that its prompt can be named."""

    def __init__(self, index: int, message: str) -> None:
        super().__init__(message)
        self.index = index


class PreferenceModel(ABC):
    """A preference model, ready to compare; its class describes the kind."""

    kind: ClassVar[str]  # the name of the kind
    form: ClassVar[str]  # how `preference.model` names it, for documents and error lines
    options: ClassVar[tuple[str, ...]] = ()  # keys of the section `preference` that it reads
    needs_base: ClassVar[bool] = False  # whether it reads the embedded policy too
    # Whether it computes with PyTorch. Its jobs then get all cores, and a GPU where there is one.
    uses_torch: ClassVar[bool] = True
    # Whether its files are fetched or linked into results/ before they are used.
    is_prepared: ClassVar[bool] = False
    environment: ClassVar[str] = "core"  # its conda environment, a file of envs/
    is_pairrm: ClassVar[bool] = False  # whether `preference.backend` means something for it

    name: str  # of this model, for records and tables
    # P (K, K) of each group of the last `all_pair_logits`, by the name of a model, if this model
    # consists of several.
    members: dict[str, list[np.ndarray]] | None = None

    @classmethod
    @abstractmethod
    def recognises(cls, settings: Settings) -> bool:
        """Whether `preference.model` and `preference.backend` mean this kind."""

    @classmethod
    def files(cls, model: str) -> list[Path]:
        """The files that a model consists of. If one changes, responses are compared again."""
        return []

    @classmethod
    def check(cls, settings: Settings, key: str) -> None:
        """Raise `UserError` if this model cannot work. It is called before the first job; be quick.

        Here it checks that the model's files exist. key: what names the model, for an error line,
        such as "config: preference.model".
        """
        for file in cls.files(settings["model"]):
            if not file.exists():
                raise UserError(f"{key} is {settings['model']}, but {file} is missing; correct it")

    @classmethod
    def unknown_prompts(cls, model: str, prompts: list[str]) -> list[str]:
        """The prompts to which this model cannot compare responses.

        It is called before the first job, with the prompts of local files.
        """
        return []

    @classmethod
    def training_instructions(cls, model: str) -> list[Path]:
        """The existing files with hashes of the instructions that the model was trained on."""
        return []

    @classmethod
    def prepare(cls, settings: Settings) -> tuple[Path, dict[str, Any]]:
        """The folder of a kind that `is_prepared`, fetched if need be, and facts for its record."""
        raise NotImplementedError(f"{cls.kind} is not prepared")

    @classmethod
    def cost(
        cls, settings: Settings, prompts: float, prompt: float, samples: int, response: float
    ) -> ComparisonCost | None:
        """What it costs to compare `samples` responses to each prompt; None if nobody knows.

        prompt, response: their mean lengths in tokens.
        """
        return None

    @abstractmethod
    def __init__(self, settings: Settings, base: Path | None, device: str) -> None:
        """Load the model. base: folder of the embedded policy, for a kind that `needs_base`.

        device: cpu, cuda or mps. Raises `UserError` for files that are missing, broken or do not
        fit.
        """

    @abstractmethod
    def all_pair_logits(self, groups: list[Group]) -> list[np.ndarray]:
        """For each group the logits that response i beats response j: float64 (K, K), diagonal 0.

        Both orders of a pair are compared: L[i, j] and L[j, i] can have different sizes. Logits of
        one group do not depend on the other groups. Raises `ComparisonError` for a group that
        cannot be compared.
        """

    def pair_logits(self, prompt: str, responses: list[str]) -> np.ndarray:
        """`all_pair_logits` of one group."""
        return self.all_pair_logits([Group(prompt, responses)])[0]


def existing(file: Path) -> list[Path]:
    """The file in a list, which is empty if it does not exist."""
    return [file] if file.is_file() else []


KINDS: dict[str, type[PreferenceModel]] = {}
# In a prepared folder whose files do not tell the kind: its name.
KIND_FILE = "preference_kind.txt"


def register(kind: type[PreferenceModel]) -> type[PreferenceModel]:
    """Class decorator: make a kind known. The first kind that recognises a model is used.

    `UserError` if the class lacks something, or if its name is taken.
    """
    lacks = [name for name in ("kind", "form") if not hasattr(kind, name)]
    lacks += sorted(kind.__abstractmethods__)
    if lacks:
        raise UserError(f"the preference model {kind.__name__} lacks {', '.join(lacks)}; add it")
    if kind.kind in KINDS:
        raise UserError(f"there already is a preference model of kind {kind.kind}; rename yours")
    KINDS[kind.kind] = kind
    return kind


def find_kind(settings: Settings) -> type[PreferenceModel] | None:
    """The kind of the model that the settings name, None if no kind recognises it."""
    if settings.get("kind"):
        return KINDS[settings["kind"]]
    marker = Path(settings["model"]) / KIND_FILE
    if marker.is_file():
        return KINDS.get(marker.read_text(encoding="utf-8").strip())
    for kind in KINDS.values():
        if kind.recognises(settings):
            return kind
    return None


def kind_of(settings: Settings, key: str = "config: preference.model") -> type[PreferenceModel]:
    """The kind of the model that the settings name. Raises `UserError` if there is none."""
    kind = find_kind(settings)
    if kind is None:
        forms = ", ".join(dict.fromkeys(kind.form for kind in KINDS.values()))
        raise UserError(
            f"{key} is {settings['model']}; give {forms}. For another model on the hub, say with"
            " preference.kind what it is"
        )
    if settings.get("backend", "transformers") != "transformers" and not kind.is_pairrm:
        raise UserError(
            f"{key} is {settings['model']}, but preference.backend is {settings['backend']}, which"
            " runs PairRM; give llm-blender/PairRM, or set transformers"
        )
    if not (kind.is_prepared or kind.recognises(settings)):
        raise UserError(
            f"preference.kind is {kind.kind}, but {key} is {settings['model']}; give {kind.form} or"
            " remove preference.kind"
        )
    return kind


OWN_PROMPTS = (
    "for your own prompts set preference.model and alpaca_eval.judge, or extend"
    " config/presets/laptop.yaml, which has both"
)


def check_prompts(
    settings: Settings, prompts: list[str], key: str, remedy: str = OWN_PROMPTS
) -> None:
    """Raise `UserError` if the model cannot compare responses to one of the prompts.

    A name that no kind recognises, such as a judge behind an API, is not checked. key: what names
    the model, for the error line, which ends with the remedy.
    """
    kind = find_kind(settings)
    unknown = kind.unknown_prompts(settings["model"], prompts) if kind else []
    if unknown:
        raise UserError(
            f"{key} is {settings['model']}, which does not know {len(unknown)} of {len(prompts)}"
            f" prompts, such as {unknown[0][:60]!r}; {remedy}"
        )


def settings_for(model: str, **others: Any) -> dict[str, Any]:
    """The section `preference` for a model, with the defaults of all keys that are not given."""
    keys = schema()["properties"]["preference"]["properties"]
    defaults = {key: default_of(rule, "paper") for key, rule in keys.items()}
    return defaults | {"model": model} | others


def option_keys() -> tuple[str, ...]:
    """The keys of the section `preference` that some kind reads."""
    return tuple(dict.fromkeys(key for kind in KINDS.values() for key in kind.options))


def options_of(arguments: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of `option_keys` among a program's arguments, whose names begin with `prefix`."""
    return {key: arguments[prefix + key] for key in option_keys()}


def local_kind(model: str) -> type[PreferenceModel] | None:
    """The kind of a local model by its name alone; None for a name that is no local model."""
    return find_kind(settings_for(model))


def load_preference_model(
    settings: Settings, base: Path | None = None, device: str = "cpu"
) -> PreferenceModel:
    """The preference model that the settings name, loaded. Raises `UserError` if it cannot work.

    device: auto, cpu, gpu or mps. For a kind that uses PyTorch, this process is set up for it.
    """
    kind = kind_of(settings)
    if kind.needs_base and base is None:
        raise UserError(
            f"preference model {settings['model']} needs the base model that it was trained on;"
            " give its folder"
        )
    if not kind.uses_torch:
        return kind(settings, base, "cpu")
    from sppo.policies.devices import pick_device, start_torch

    start_torch()
    return kind(settings, base, pick_device(device))


def model_files(model: str, base: Path | None, **others: Any) -> list[Path]:
    """All files that a local model reads, its base included; none if it is no local model."""
    kind = find_kind(settings_for(model, **others))
    if kind is None:
        return []
    return [*kind.files(model), *([base] if base and kind.needs_base else [])]


def compare(
    model: PreferenceModel, groups: Mapping[str, Group], what: str = "prompt"
) -> dict[str, np.ndarray]:
    """Logits (K, K) of every prompt, by its id.

    groups: the prompt and its responses, by id. what: what an id is, for the error line. Raises
    `UserError` that names the prompt if a model fails on it, or returns anything but K x K finite
    numbers, or probabilities.
    """
    import numpy as np

    ids = list(groups)
    try:
        found = list(model.all_pair_logits(list(groups.values())))
    except ComparisonError as error:
        raise UserError(f"{model.name}, {what} {ids[error.index]}: {error}") from None
    if len(found) != len(ids):
        raise UserError(f"{model.name} compared {len(found)} of {len(ids)} groups; return them all")
    logits = {name: np.asarray(values, dtype=float) for name, values in zip(ids, found)}
    for name, values in logits.items():
        where = f"{model.name}, {what} {name}"
        k = len(groups[name].responses)
        if values.shape != (k, k):
            raise UserError(f"{where}: the logits have shape {values.shape}; return ({k}, {k})")
        if not np.isfinite(values).all():
            raise UserError(
                f"{where}: a logit is NaN or infinite; check the model and its precision"
            )
        if k and (np.diagonal(values) == 0.5).all() and 0 <= values.min() <= values.max() <= 1:
            raise UserError(f"{where}: these are probabilities; return their logits")
    return logits
