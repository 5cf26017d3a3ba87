"""From what a user wrote to complete runs: overrides, defaults, and checks of keys together."""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sppo.core.artifacts import shipped
from sppo.core.config import (
    Config,
    Validator,
    check_against_schema,
    check_sizes,
    completed,
    schema,
    shown,
    typed,
    without_nulls,
)
from sppo.core.config_files import extended_by, merged, read_files
from sppo.core.errors import UserError
from sppo.core.openai_api import check_address
from sppo.preferences.base import KINDS, find_kind
from sppo.training.losses import LOSSES, check_training
from sppo.training.requirements import WITHOUT_PREFERENCES

# Names of folders and files under results/, of the main run, and of the experiment without a name.
RESERVED = {
    "tables",
    "figures",
    "theory",
    "report",
    "models",
    "logs",
    "benchmarks",
    "summary.md",
    "report.html",
    "response_browser.html",
    "main",
    "all",
    "sppo",
}
# Keys that a run cannot override: they decide where artifacts are stored, or all runs share them.
SHARED = {"name", "extends", "runs", "policy", "device", "keep_policies", "push_to_hub"}
# All runs have one environment for generation, and one number of GPUs for it.
SHARED_OF_RESPONSES = ("engine", "tensor_parallel")
# Two runs must agree on these to share the first iteration's responses and preferences.
FIRST_ITERATION = ("prompts", "responses", "preference", "seeds")
# Keys of these sections that do not matter in the first iteration.
NOT_IN_FIRST_ITERATION = {"preference.implicit", "seeds.train"}


class Runs(Mapping[str, Config]):
    """Complete configurations by the name of the run; the main run's name is "".

    The main run is checked at once. Another run is checked when it is first asked for, so that a
    mistake in a run that nobody needs stops nobody: `runs["dpo"]` raises `UserError` if that run's
    configuration is wrong. A key takes, in this order: the run's override, what the configuration
    says, the column of `settings`, the schema's default. null undoes what an earlier file set: a
    key is not set, a run does not exist.
    """

    def __init__(self, written: Config) -> None:
        rules = schema()
        written = typed({key: value for key, value in written.items() if key != "extends"}, rules)
        check_sizes(written, "config: ")
        if isinstance(written.get("runs"), dict):
            runs = written["runs"].items()
            # `--config` hands over the text null.
            written["runs"] = {name: each for name, each in runs if each not in (None, "null")}
        written = without_nulls(written, rules)
        check_against_schema(written)
        name = written.get("name", "")
        self._overrides: Config = written.pop("runs", {})
        _check_name(name, "name")
        for run in self._overrides:
            _check_name(run, f"runs.{run}")
        if name in self._overrides:
            raise UserError(
                f"config: name is {name}, which is also the name of a run, and both would write to"
                f" results/{name}/; choose another"
            )
        self._main = written
        main = _paths_written_out(completed(written), rules, "")
        check_together(main)
        self._check_base(main)
        if main["extrapolation"] is not None:
            raise UserError(
                "config: extrapolation continues main's policies, so it belongs to a run, as in"
                " runs: {expo: {extrapolation: 0.3}}"
            )
        self._check_beside(main, "")
        self._complete: dict[str, Config] = {"": main | {"first_iteration_from": None}}

    def __iter__(self) -> Iterator[str]:
        return iter(["", *self._overrides])

    def __len__(self) -> int:
        return 1 + len(self._overrides)

    def __getitem__(self, name: str) -> Config:
        if name not in self._complete:
            try:
                self._complete[name] = self._run(name, self._overrides[name])
            except UserError as error:
                raise of_run(error, name) from None
        return self._complete[name]

    def _check_base(self, main: Config) -> None:
        """The base is no policy of this experiment, which would be trained again; else UserError.

        Before Snakemake makes a policy, it removes the old one, and the base with it.
        """
        model, root = main["policy"]["model"], Path("results") / main["name"]
        place = Path(os.path.realpath(model))
        folders = [Path(os.path.realpath(root / run)) for run in self]
        below = [place.relative_to(each) for each in folders if place.is_relative_to(each)]
        if any(re.match(r"iter\d+(/|$)", str(path)) for path in below):
            raise UserError(
                f"config: policy.model is {model}, which this experiment makes itself, as name is"
                f" {main['name'] or 'not set'}; to go on from it, set another name"
            )

    def usable(self) -> dict[str, Config]:
        """The runs whose configurations are right, by name; "" first."""
        found = {}
        for name in self:
            try:
                found[name] = self[name]
            except UserError:
                continue  # it is reported when somebody asks for this run
        return found

    def _run(self, name: str, overrides: Config) -> Config:
        """The complete configuration of a named run."""
        where, rules, main = f"runs.{name}", schema(), self[""]
        overrides = typed(overrides, rules)
        check_sizes(overrides, f"config: {where}.")
        first = overrides.pop("first_iteration_from", None)
        if first not in (None, "main"):
            raise UserError(
                f"config: {where}.first_iteration_from is {shown(first)}; it can only be main"
            )
        for key in SHARED & overrides.keys():
            raise UserError(
                f"config: {where} cannot override {key}; set it for all runs, or write a"
                " configuration with a name of its own"
            )
        check_against_schema(without_nulls(overrides, rules), where + ".")
        _paths_written_out(without_nulls(overrides, rules), rules, where + ".")
        run = completed(without_nulls(merged(self._main, overrides), rules))
        run = _paths_written_out(run, rules, "")
        check_together(run)
        self._check_beside(run, f"{where}.")
        if first:
            _check_first_iteration(where, run, main)
        for key in SHARED_OF_RESPONSES:
            if run["responses"][key] != main["responses"][key]:
                raise UserError(
                    f"config: {where} cannot override responses.{key}; set it for all runs, or"
                    " write a configuration with a name of its own"
                )
        return run | {"first_iteration_from": first}

    def _check_beside(self, config: Config, where: str) -> None:
        """The runs that a summary shows beside its own exist."""
        for name in config["summary"]["beside"]:
            if name not in self._overrides:
                raise UserError(
                    f"config: {where}summary.beside has {name}, but there is no such run; give"
                    f" one of {', '.join(self._overrides) or 'runs, of which none exist'}"
                )


def read_configuration(
    files: Sequence[str | os.PathLike[str]], overlay: Config | None = None
) -> Config:
    """What files and an overlay give together, as `resolve` takes it.

    The overlay comes from the command line, where it repeats what the files say, or from the
    workflow that uses this one as a module. Without files it can extend one itself. Raises
    `UserError` as `read_files` does.
    """
    overlay = dict(overlay or {})
    extended = overlay.pop("extends", None)
    if files and extended is not None and extended not in extended_by(files):
        raise UserError(
            f"config: extends is {shown(extended)}, but files are given too; write extends into one"
            " of them"
        )
    if not files and extended is not None:
        if not isinstance(extended, str):
            raise UserError(f"config: extends is {shown(extended)}; give the path of one file")
        files = [shipped(os.path.expanduser(extended))]
    return merged(read_files(files), overlay)


def resolve(written: Config) -> Runs:
    """The runs of a configuration as a user wrote it. Raises `UserError` for a wrong main run."""
    return Runs(written)


def of_run(error: UserError, name: str) -> UserError:
    """The error with the name of the run whose configuration has it."""
    where, reason = f"runs.{name}", str(error).removeprefix("config: ")
    return UserError("config: " + (reason if reason.startswith(where) else f"{where}: {reason}"))


def _check_name(name: str, where: str) -> None:
    """A folder's name must not be one that the workflow uses itself."""
    if name in RESERVED or name.startswith("iter"):
        raise UserError(f"config: {where} is the reserved name {name}; choose another")


def _check_first_iteration(where: str, run: Config, main: Config) -> None:
    """A run that shares main's first iteration must divide prompts and sample as main does."""
    divides = ["alpaca_eval.instructions"]  # they are not trained on
    if main["prompts"]["per_iteration"] is None and not main["prompts"]["repeat"]:
        divides.append("iterations")
    for key in divides:
        if _value(run, key) != _value(main, key):
            raise UserError(
                f"config: {where} shares the first iteration with main but changes {key}, which"
                " decides how the prompts are divided; remove the override or first_iteration_from"
            )
    for section in FIRST_ITERATION:
        for key, wanted in main[section].items():
            dotted = f"{section}.{key}"
            if dotted not in NOT_IN_FIRST_ITERATION and run[section][key] != wanted:
                raise UserError(
                    f"config: {where} shares the first iteration with main but changes {dotted};"
                    " remove the override or first_iteration_from"
                )


def _value(config: Config, dotted: str) -> Any:
    value: Any = config
    for name in dotted.split("."):
        value = value[name]
    return value


def without_effect(written: Config, name: str, runs: Runs) -> list[str]:
    """One line for each key that was written for a run and has no effect.

    The schema's `x-only-with` decides. written: what `resolve` took. name: of the run, "" is main.
    A key of main has an effect if another run takes it over and uses it.
    """
    own = written["runs"][name] if name else written
    heirs = [] if name else [other for other in runs.usable() if other]
    lines = []
    for key, needs in _conditional_keys(own, schema()):
        reason = _unmet(needs, runs[name])
        used = any(
            not _unmet(needs, runs[other]) and not _is_set(written["runs"][other], key)
            for other in heirs
        )
        if reason and not used:
            lines.append(f"config: {f'runs.{name}.' if name else ''}{key} has no effect {reason}")
    return lines + _unread_by_kind(own.get("preference") or {}, name, runs)


def _unread_by_kind(written: Config, name: str, runs: Runs) -> list[str]:
    """A line for each key of the section `preference` that only other kinds of models read."""
    kind = find_kind(runs[name]["preference"])
    if kind is None:
        return []
    unread = {key for other in KINDS.values() for key in other.options} - {*kind.options}
    if not kind.is_prepared:
        unread.add("revision")
    where = f"runs.{name}." if name else ""
    model = runs[name]["preference"]["model"]
    return [
        f"config: {where}preference.{key} has no effect where preference.model is {model}"
        for key, value in written.items()
        if key in unread and value is not None
    ]


def _unmet(needs: Config, run: Config) -> str:
    """Why a key has no effect in a run, by the first of its needs that is unmet; "" if none is."""
    for dotted, rule in needs.items():
        value = _value(run, dotted)
        if not Validator(rule).is_valid(value):
            return f"where {dotted} is {'null' if value is None else value}"
    return ""


def _is_set(written: Config, dotted: str) -> bool:
    section, key = dotted.split(".")
    return (written.get(section) or {}).get(key) is not None


def _conditional_keys(written: Config, rules: Config) -> list[tuple[str, Config]]:
    """Dotted name and needs of each written key that has `x-only-with`, or whose section has it."""
    found = []
    for section, keys in written.items():
        rule = rules["properties"].get(section, {})
        if not isinstance(keys, dict) or "properties" not in rule:
            continue
        for key, value in keys.items():
            needs = rule.get("x-only-with", {}) | rule["properties"][key].get("x-only-with", {})
            if needs and value is not None:
                found.append((f"{section}.{key}", needs))
    return found


def _paths_written_out(written: Config, rules: Config, where: str) -> Config:
    """`written` with every path as all programs understand it.

    ~ is written out as the home folder. A relative path begins at the working directory; if nothing
    is there but the repository has such a file, as where another workflow uses this one as a
    module, it is the repository's. Raises `UserError` for the ~ of a user whom this machine does
    not know, and for braces, which Snakemake would take for a wildcard.
    """
    result: Config = {}
    for key, value in written.items():
        rule = rules["properties"][key]
        if isinstance(value, dict) and "properties" in rule:
            value = _paths_written_out(value, rule, f"{where}{key}.")
        if isinstance(value, str) and rule.get("x-path"):
            value = os.path.expanduser(value)
            if value.startswith("~"):
                raise UserError(
                    f"config: {where}{key} is {shown(value)}, but this machine knows no such "
                    "user; write the path out"
                )
            value = _found_path(value)
        if isinstance(value, str):
            fixed = value.replace("{t}", "") if rule.get("x-iteration") else value
            if "{" in fixed or "}" in fixed:
                raise UserError(
                    f"config: {where}{key} is {shown(value)}, and Snakemake takes braces for a "
                    "wildcard; rename it without them"
                )
        result[key] = value
    return result


def _found_path(value: str) -> str:
    """The path, or the repository's, if only that exists; also of the file in `file.py:name`."""
    found = shipped(value)
    if found != Path(value):
        return str(found)
    file, colon, name = value.rpartition(":")
    if colon and shipped(file) != Path(file):
        return f"{shipped(file)}:{name}"
    return value


def check_together(config: Config) -> None:
    """Raise `UserError` for keys of one run that do not go together."""
    _check_values(config)
    _check_generation(config)
    _check_pairs(config)
    _check_trainer(config)
    name = config["train"]["loss"]
    unknown = LOSSES[name].unknown(config["train"])
    if unknown:
        raise UserError(
            f"config: train.loss {name} reads {unknown[0]}, which is neither a column of a batch"
            " nor a key of train; correct the arguments of its function"
        )
    for requirement in LOSSES[name].requires:
        requirement.check(name, config)


def _check_values(config: Config) -> None:
    """What the schema cannot say of one value."""
    for section in ("alpaca_eval", "mt_bench", "arena_hard", "grades"):
        if config[section]["judge_base_url"] is not None:
            check_address(config[section]["judge_base_url"], f"config: {section}.judge_base_url")
    date = config["policy"]["template_date"]
    try:
        datetime.date.fromisoformat(date)
    except ValueError:
        raise UserError(
            f"config: policy.template_date is {date}, which is no day of the calendar; give one"
            " such as 2024-07-26"
        ) from None


def _check_generation(config: Config) -> None:
    responses, prompts = config["responses"], config["prompts"]["per_iteration"]
    if prompts is not None and responses["shards"] > prompts:
        raise UserError(
            f"config: responses.shards is {responses['shards']}, but prompts.per_iteration is"
            f" {prompts}, and each shard needs a prompt; lower responses.shards"
        )
    if not responses["temperature"] and config["pairs"]["construction"] != "gold":
        raise UserError(
            "config: responses.temperature is 0, so all responses to a prompt are equal; raise it,"
            " or set pairs.construction: gold"
        )
    if config["prompts"]["repeat"] and "{t}" in config["prompts"]["source"]:
        raise UserError(
            "config: prompts.repeat uses the same prompts in each iteration, but prompts.source"
            " names other ones in each; set prompts.repeat: false"
        )
    if (responses["tensor_parallel"] or 1) > 1 and responses["engine"] != "vllm":
        raise UserError(
            f"config: responses.tensor_parallel is {responses['tensor_parallel']}, but only the"
            " engine vllm divides a model; set responses.engine: vllm, or remove it"
        )


def _check_pairs(config: Config) -> None:
    pairs, train, preference = config["pairs"], config["train"], config["preference"]
    construction = pairs["construction"]
    if preference["implicit"] and (
        train["reference_every"] != 1
        or train["lookahead"]
        or not LOSSES[train["loss"]].has_reference
    ):
        raise UserError(
            "config: preference.implicit compares by beta log(pi_t / pi_t-1), which is a reward"
            " only if training refers to the previous iterate; set train.reference_every: 1,"
            " train.lookahead: false, and a train.loss with a reference"
        )
    labels = pairs["labels"]
    for asked, key, remedy in (
        (pairs["target_reward"], "pairs.target_reward", "pairs.target_reward: false"),
        (preference["implicit"], "preference.implicit", "preference.implicit: false"),
        (labels != "annotated", f"pairs.labels {labels}", "pairs.labels: annotated"),
        (pairs["truncated"] == "leave_out", "pairs.truncated leave_out", "pairs.truncated: keep"),
    ):
        if asked and construction in WITHOUT_PREFERENCES:
            raise UserError(
                f"config: {key} needs preferences, which pairs.construction {construction} does"
                f" without; set {remedy}, or pairs.construction: best_vs_worst or all"
            )
    if pairs["even_lengths"] and (construction, pairs["winner_by"]) != ("best_vs_worst", "logit"):
        raise UserError(
            "config: pairs.even_lengths corrects the mean logit that picks the best and the worst"
            " response; set pairs.construction: best_vs_worst and pairs.winner_by: logit"
        )
    if construction == "graded":
        if config["grades"]["judge"] == "preference" and preference["backend"] != "transformers":
            raise UserError(
                f"config: grades.judge preference does not work with preference.backend"
                f" {preference['backend']}; set preference.backend: transformers, or grades.judge"
            )
    elif (construction == "gold") != (pairs["gold"] is not None):
        raise UserError(
            "config: pairs.construction gold and pairs.gold, a file of gold responses, go"
            " together; set both or neither (pairs.construction graded can have a file)"
        )


def _check_trainer(config: Config) -> None:
    train = config["train"]
    if train["stop_epoch"] > train["schedule_total_epochs"]:
        raise UserError(
            f"config: train.stop_epoch ({train['stop_epoch']}) is after train.schedule_total_epochs"
            f" ({train['schedule_total_epochs']}); lower the one or raise the other"
        )
    if train["backend"] == "trl" and train["reference_every"] != 1:
        raise UserError(
            "config: TRL's trainer here refers to the previous iterate; set"
            " train.reference_every: 1, or train.backend: transformers"
        )
    if train["lookahead"] and train["reference_every"] != 1:
        raise UserError(
            "config: with train.lookahead each training refers to the policy that it starts from;"
            " set train.reference_every: 1, or train.lookahead: false"
        )
    check_training(train)
    if train["parallel"] != "ddp" and config["device"] == "cpu":
        raise UserError(
            f"config: train.parallel {train['parallel']} needs GPUs, but device is cpu; set"
            " train.parallel: ddp"
        )
