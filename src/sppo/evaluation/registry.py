"""The evaluations of a policy, and everything that the workflow and the tables ask about one.

To add an evaluation, write a program in src/evaluation/ that writes iter{t}/<name>.json, a file
rules/<name>.smk that runs it, and an entry of EVALUATIONS. The Snakefile, the profile for Slurm,
the checks before the first job, the target `everything`, and the tables go through the entries.
The Snakefile reads this module, so it imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sppo.core.errors import UserError
from sppo.core.stages import STAGES
from sppo.evaluation import alpaca_eval, arena_hard, ifeval, judges, mt_bench
from sppo.evaluation.judges import Judging
from sppo.evaluation.results import decimals, rate

Contents = dict[str, Any]  # of an evaluation's JSON file
Config = dict[str, Any]  # the complete configuration of a run
OPEN_LLM_TASKS = (
    "arc_challenge",
    "truthfulqa_mc2",
    "winogrande",
    "gsm8k",
    "hellaswag",
    "mmlu",
    "average",
)


@dataclass(frozen=True)
class Column:
    """A column of the table of all evaluations: its head, and a cell from a JSON file's contents.

    A policy that was not evaluated has a dash. in_summary: whether the table of one run has the
    column too.
    """

    head: str
    cell: Callable[[Contents], str]
    in_summary: bool = True


def number(key: str, places: int = 1) -> Callable[[Contents], str]:
    """A cell with the number that the JSON file has under `key`."""
    return lambda found: decimals(found.get(key), places)


def nothing_held_out(config: Config, where: str) -> set[str]:
    """For an evaluation without inputs of its own."""
    return set()


def nothing_published(found: Contents) -> list[str]:
    """For an evaluation of which no published table has figures."""
    return []


@dataclass(frozen=True)
class Evaluation:
    """An evaluation. Its results are in iter{t}/<name>.json: one JSON object.

    columns: of the table of all evaluations. stage: of core/stages.py, to which the results belong.
    note: a sentence below that table; {keys} are the JSON file's. rules: the file of rules/ that
    makes it. settings: schema of the configuration section that is called like the evaluation, by
    key; empty if config/schema.yaml has the section, or if there is none. judging: which judges the
    section can name, and judged_by the rule (or value of the wildcard `verdict`) whose jobs ask the
    judge. answered_by: rules that run the generation engine. scored_by: other rules that run a
    model. first_iteration: 1 if the base cannot be evaluated. check: raises UserError for bad
    inputs before the first job, and returns prompts, normalised, that must not be trained on; if
    there are any, the rule file names their files in HELD_OUT. differences: why a result cannot be
    compared with published figures.

    Raises `UserError` if a part has another form.
    """

    name: str
    columns: tuple[Column, ...]
    stage: str = "judge"
    note: str = ""
    rules: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    judging: Judging | None = None
    judged_by: str = ""
    answered_by: tuple[str, ...] = ()
    scored_by: tuple[str, ...] = ()
    first_iteration: int = 0
    check: Callable[[Config, str], set[str]] = nothing_held_out
    differences: Callable[[Contents], list[str]] = nothing_published

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise UserError(
                f"evaluation {self.name}: no stage {self.stage} in core/stages.py; add it"
            )
        if not all(isinstance(column, Column) for column in self.columns):
            raise UserError(f"evaluation {self.name}: columns is no tuple of Column; correct it")
        for key, rule in self.settings.items():
            missing = {"type", "description", "default"} - rule.keys()
            if missing:
                raise UserError(
                    f"evaluation {self.name}: setting {key} has no {min(missing)}; add one"
                )

    @property
    def artifact(self) -> str:
        """File name of the results, in iter{t}/."""
        return f"{self.name}.json"

    @property
    def rule_file(self) -> str:
        return self.rules or self.name

    @property
    def gpu_rules(self) -> tuple[str, ...]:
        """Rules whose jobs run a model. The profile for Slurm requests a GPU for each job."""
        return self.answered_by + self.scored_by


def check_open_llm(config: Config, where: str) -> set[str]:
    """The folder of tasks exists, if the data sets are not the hub's; else UserError."""
    data = config["open_llm"]["data"]
    problem = "there is no such folder"
    if data != "hub" and Path(data).is_dir():
        problem = "" if any(Path(data).iterdir()) else "this folder is empty"
    if data != "hub" and problem:
        raise UserError(
            f"config: {where}open_llm.data is {data}, but {problem}; give `hub`, or a folder with"
            " all six tasks"
        )
    return set()


def won_against_base(found: Contents) -> str:
    """MT-Bench's win rate against the base, which only a local judge gives."""
    return decimals((found.get("against_base") or {}).get("win_rate"))


EVALUATIONS: tuple[Evaluation, ...] = (
    Evaluation(
        "alpaca_eval",
        columns=(
            Column("win rate [95%]", lambda found: rate(found, "win_rate")),
            Column("LC win rate [95%]", lambda found: rate(found, "length_controlled_winrate")),
            Column("length", lambda found: str(found.get("avg_length", "-"))),
        ),
        note="AlpacaEval: {n_total} instructions, judged by {judge} against {reference}.",
        judging=judges.ALPACA_EVAL,
        judged_by="alpaca_eval",
        answered_by=("answer_instructions", "answer_instructions_n_times"),
        scored_by=("judge_outputs", "judge_best_of_n"),
        check=alpaca_eval.check_inputs,
        differences=alpaca_eval.differences,
    ),
    Evaluation(
        "against_previous",  # AlpacaEval against the policy of the iteration before
        columns=(Column("against the previous", lambda found: rate(found, "win_rate")),),
        rules="alpaca_eval",
        judging=judges.ALPACA_EVAL,
        judged_by="against_previous",
        first_iteration=1,
    ),
    Evaluation(
        "ranker_estimate",  # AlpacaEval by the preference model that annotated
        columns=(
            Column(
                "by the preference model", lambda found: rate(found, "win_rate", interval=False)
            ),
        ),
        rules="alpaca_eval",
        differences=alpaca_eval.differences,
    ),
    Evaluation(
        "ifeval",
        stage="ifeval",
        columns=(
            Column("IFEval strict [95%]", lambda found: rate(found, "prompt_strict")),
            Column("IFEval loose", number("prompt_loose"), in_summary=False),
            Column("constraints strict", number("instruction_strict"), in_summary=False),
            Column("constraints loose", number("instruction_loose"), in_summary=False),
        ),
        note="IFEval: {n_prompts} prompts of {instructions} with {n_instructions} constraints.",
        answered_by=("answer_ifeval",),
        check=ifeval.check_inputs,
        differences=ifeval.differences,
    ),
    Evaluation(
        "mt_bench",
        stage="mt_bench",
        columns=(
            Column("MT-Bench", number("average", 2)),
            Column("turn 1", number("first_turn", 2)),
            Column("turn 2", number("second_turn", 2)),
            Column("MT-Bench won against the base", won_against_base),
        ),
        note="MT-Bench: {questions} questions of {data}, judged by {judge}.",
        judging=judges.MT_BENCH,
        judged_by="evaluate_mt_bench",
        answered_by=("answer_mt_bench",),
        scored_by=("evaluate_mt_bench",),
        check=mt_bench.check_inputs,
        differences=mt_bench.differences,
    ),
    Evaluation(
        "arena_hard",
        stage="arena_hard",
        columns=(
            Column("Arena-Hard [95%]", lambda found: rate(found, "score")),
            Column("at equal style [95%]", lambda found: rate(found, "style_controlled")),
        ),
        note="Arena-Hard: {n} questions of {instructions}, judged by {judge} against {reference}.",
        judging=judges.ARENA_HARD,
        judged_by="evaluate_arena_hard",
        answered_by=("answer_arena_hard",),
        scored_by=("evaluate_arena_hard",),
        check=arena_hard.check_inputs,
        differences=arena_hard.differences,
    ),
    Evaluation(
        "open_llm",
        stage="open_llm",
        columns=tuple(Column(f"Open LLM: {task}", number(task)) for task in OPEN_LLM_TASKS),
        note="Open LLM: items of {data}, shots {shots}.",
        answered_by=("evaluate_open_llm",),
        check=check_open_llm,
        differences=lambda found: [] if found.get("official_tasks") else ["other items"],
    ),
)


def by_artifact(path: str) -> Evaluation | None:
    """The evaluation that a path such as best_of_16/alpaca_eval.json belongs to."""
    return next((each for each in EVALUATIONS if Path(path).name == each.artifact), None)
