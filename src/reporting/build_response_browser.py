"""The response browser: an HTML page that shows a run's training data and its answers.

Reads   prompts.parquet, responses/, preferences/ and pairs.parquet of each trained iteration;
        alpaca_eval_outputs.json and alpaca_eval_annotations.json of each iteration and of the
        base policy (iter0); the evaluation instructions
Writes  a self-contained .html, which needs no server and no network, and its record

If the instructions have constraints in IFEval's form, each answer shows which ones it follows. The
page opens on an example: of the instructions whose constraints the base misses and the last policy
follows, the one with the largest gain. Without constraints it is the one with the largest gain.

The iteration is read from the paths (.../iter{t}/...). P, winner and loser are computed by the code
that build_pairs.py uses. The flags of [preference] and [pairs] must therefore be the flags of the
run. The result is checked against pairs.parquet.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

import _path  # noqa: F401
from sppo.core.artifacts import ROOT, file_hash, iteration, read_json, recorded, write_text
from sppo.core.errors import UserError, run
from sppo.core.flags import add_section
from sppo.core.tables import read_table
from sppo.evaluation.alpaca_eval import read_outputs
from sppo.policies.prompts import read_instructions
from sppo.preferences.constraints import Instruction, follows, read_instructions_to_check
from sppo.preferences.estimates import p_hat, win_probabilities
from sppo.preferences.labels import relabelled
from sppo.preferences.pairs import (
    Dropped,
    Pair,
    Rules,
    winner_against_loser,
    without_truncated,
)
from sppo.training.requirements import trains_on_one_pair

TEMPLATE = ROOT / "src" / "sppo" / "reporting" / "response_browser.html"
PLACEHOLDER = "@DATA@"
Record = dict[str, Any]
RowsByKey = dict[tuple[str, int | None], Record]  # rows of a table by prompt and sample


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--prompts", type=Path, nargs="+", required=True, help="prompts.parquet, one per iteration"
    )
    parser.add_argument(
        "--responses",
        type=Path,
        nargs="+",
        required=True,
        help="all shards of the same iterations",
    )
    parser.add_argument(
        "--preferences",
        type=Path,
        nargs="+",
        required=True,
        help="all shards of the same iterations",
    )
    parser.add_argument(
        "--pairs", type=Path, nargs="+", required=True, help="pairs.parquet, one per iteration"
    )
    parser.add_argument(
        "--answers",
        type=Path,
        nargs="+",
        required=True,
        help="alpaca_eval_outputs.json, one per iteration from 0 on",
    )
    parser.add_argument(
        "--annotations",
        type=Path,
        nargs="+",
        required=True,
        help="alpaca_eval_annotations.json of the same iterations",
    )
    parser.add_argument(
        "--instructions",
        type=Path,
        required=True,
        help="evaluation instructions with their categories",
    )
    parser.add_argument("--output", type=Path, required=True, help="the page, .html")
    parser.add_argument("--label-seed", type=int, default=0, help="seed of --labels permuted")
    parser.add_argument("--loser-seed", type=int, default=0, help="seed of best_vs_random")
    add_section(parser, "pairs")
    add_section(parser, "replay", skip=("iteration",), prefix="replay_")
    args = parser.parse_args()
    if not trains_on_one_pair(vars(args), args.replay_share):
        raise UserError(
            "the response browser shows only runs that train on one pair of responses to each"
            " prompt; remove pairs.construction, even_lengths and target_reward and"
            " replay.share from the configuration, or do not build the browser"
        )

    inputs = [
        *args.prompts,
        *args.responses,
        *args.preferences,
        *args.pairs,
        *args.answers,
        *args.annotations,
        args.instructions,
    ]
    with recorded("tabulate", args.output, inputs, vars(args)) as facts:
        training, evaluation = training_items(args), evaluation_items(args)
        data = {
            "probability": args.probability,
            "logit_scale": args.logit_scale,
            "training": training,
            "evaluation": evaluation,
            "example": example(evaluation),
        }
        write_text(args.output, page(data))
        facts |= {
            "prompts": len(training),
            "instructions": len(evaluation),
            "template_sha256": file_hash(TEMPLATE),
        }
    print(
        f"{args.output}: {len(training)} prompts, {len(evaluation)} instructions; "
        "open it in a browser"
    )


def training_items(args: argparse.Namespace) -> list[Record]:
    """One item for each prompt of each iteration.

    An item holds the prompt, its responses, P, P-hat, and the indices of winner and loser or the
    reason why the prompt has no pair. Files that do not belong together are a UserError.
    """
    names = ("prompts", "responses", "preferences", "pairs")
    same_iterations({name: getattr(args, name) for name in names})
    tables = {name: read_iterations(getattr(args, name), name) for name in names}
    for rows_of_iteration in tables["preferences"].values():
        for (prompt_id, _), row in rows_of_iteration.items():
            logits = np.array(row["logits"])
            row["logits"] = relabelled(logits, args.labels, prompt_id, args.label_seed)
    rules = Rules.of(vars(args))
    items: list[Record] = []
    for number in sorted(tables["prompts"]):
        files = {
            name: ", ".join(str(path) for path in getattr(args, name) if iteration(path) == number)
            for name in names
        }
        rows = {name: tables[name][number] for name in names}
        items += items_of_iteration(number, rows, files, rules)
    return items


def items_of_iteration(
    number: int, rows: dict[str, RowsByKey], files: dict[str, str], rules: Rules
) -> list[Record]:
    """The training items of one iteration, from the rows of its tables.

    `files` has the paths of each table as text for error messages.
    """
    prompt_ids = {prompt_id for prompt_id, _ in rows["prompts"]}
    for name in ("responses", "preferences", "pairs"):
        unknown = {prompt_id for prompt_id, _ in rows[name]} - prompt_ids
        if unknown:
            raise UserError(
                f"{files[name]} has prompt {min(unknown)}, but {files['prompts']} does not; "
                "give files of one run"
            )
    responses: dict[str, dict[int, Record]] = {}
    for (prompt_id, sample_id), row in rows["responses"].items():
        assert sample_id is not None  # only tables with one row for a prompt have none
        responses.setdefault(prompt_id, {})[sample_id] = row
    items = []
    for (prompt_id, _), prompt in rows["prompts"].items():
        preference = rows["preferences"].get((prompt_id, None))
        candidates = responses.get(prompt_id, {})
        if preference is None or preference["sample_ids"] != sorted(candidates):
            raise UserError(
                f"prompt {prompt_id} of {files['prompts']} lacks responses or preferences; "
                "give all shards"
            )
        pair: Pair | Dropped = Dropped("truncated")
        compared: Record | None = preference
        if rules.truncated == "leave_out":
            compared = without_truncated(preference, candidates)
        if compared is not None:
            pair = winner_against_loser(compared, candidates, rules)
        if not agree(pair, rows["pairs"].get((prompt_id, None))):
            raise UserError(
                f"{files['pairs']} holds another pair for prompt {prompt_id} than the responses, "
                "preferences and flags give; give files of one run and the flags of its "
                "build_pairs.py"
            )
        items.append(
            {
                "iteration": number,
                "id": prompt_id,
                "category": prompt["category"],
                "messages": prompt["messages"],
                **estimates(compared or preference, candidates, pair, rules),
            }
        )
    return items


def estimates(
    preference: Record, candidates: dict[int, Record], pair: Pair | Dropped, rules: Rules
) -> Record:
    """The responses to one prompt, P, P-hat, and the pair that build_pairs.py makes of them."""
    probabilities = win_probabilities(
        np.array(preference["logits"]), rules.probability, rules.logit_scale
    )
    ordered = [candidates[sample_id] for sample_id in preference["sample_ids"]]
    item: Record = {
        "responses": [
            {
                "sample": row["sample_id"],
                "text": row["text"],
                "tokens": len(row["token_ids"]),
                "finish": row["finish_reason"],
            }
            for row in ordered
        ],
        "p": probabilities.tolist(),
        "p_hat": p_hat(probabilities).tolist(),
    }
    if isinstance(pair, Dropped):
        return item | {"winner": None, "loser": None, "outcome": pair.reason, "margin": None}
    return item | {
        "winner": preference["sample_ids"].index(pair.chosen["sample_id"]),
        "loser": preference["sample_ids"].index(pair.rejected["sample_id"]),
        "outcome": "pair",
        "margin": float(pair.p_hat_chosen - pair.p_hat_rejected),
    }


def agree(pair: Pair | Dropped, kept: Record | None) -> bool:
    """Whether the pair computed here is `kept`, the row of pairs.parquet (None: no row)."""
    if isinstance(pair, Dropped):
        return kept is None
    if kept is None:
        return False
    columns = pair.columns()
    same = all(
        columns[name] == kept[name]
        for name in ("chosen", "rejected", "chosen_sample_id", "rejected_sample_id")
    )
    # The last bits may differ, because another machine may have built the pairs.
    return same and all(
        abs(columns[name] - kept[name]) < 1e-9
        for name in ("p_hat_chosen", "p_hat_rejected", "p_chosen_beats_rejected")
    )


def evaluation_items(args: argparse.Namespace) -> list[Record]:
    """One item for each answered instruction.

    An item holds the answers of all iterations, the judge's verdicts and the reference's answer.
    Files that do not belong together are a UserError.
    """
    same_iterations({"answers": args.answers, "annotations": args.annotations})
    answer_files = one_per_iteration(args.answers)
    verdict_files = one_per_iteration(args.annotations)
    if 0 not in answer_files:
        raise UserError(
            f"{args.answers[0]} is given without the file of iteration 0; "
            "give iter0/alpaca_eval_outputs.json too"
        )
    answers = {
        number: {row["instruction"]: row for row in read_outputs(path)}
        for number, path in answer_files.items()
    }
    verdicts = {number: read_annotations(path) for number, path in verdict_files.items()}
    check_evaluation(answers, verdicts, answer_files, verdict_files)
    instructions = read_instructions(args.instructions)
    known = {row["instruction"] for row in instructions}
    unknown = [text for text in answers[0] if text not in known]
    if unknown:
        raise UserError(
            f"{args.instructions} lacks the instruction {unknown[0][:60]!r} of {answer_files[0]}; "
            "give the file with the answered instructions"
        )
    identities = {
        row["instruction"]: (str(row.get("prompt_id", position)), str(row.get("dataset", "")))
        for position, row in enumerate(instructions)
    }
    constrained = constraints_of(args.instructions)
    return [
        evaluation_item(text, identity, category, answers, verdicts, constrained.get(text))
        for text, (identity, category) in identities.items()
        if text in answers[0]  # with alpaca_eval.limit only the first instructions have answers
    ]


def constraints_of(path: Path) -> dict[str, Instruction]:
    """The constraints of each instruction; empty if the file has another form than IFEval's."""
    if path.suffix != ".jsonl":
        return {}
    return {one.prompt: one for one in read_instructions_to_check(path)}


def example(items: list[Record]) -> str | None:
    """The id of the instruction on which the page opens; None without instructions."""

    def follows_all(answer: Record) -> bool:
        return all(one["followed"] for one in answer["constraints"])

    learned = [
        item
        for item in items
        if item["answers"][0]["constraints"]
        and not follows_all(item["answers"][0])
        and follows_all(item["answers"][-1])
    ]
    chosen = max(learned or items, key=lambda item: item["margin"], default=None)
    return chosen["id"] if chosen else None


def check_evaluation(
    answers: dict[int, dict[str, Record]],
    verdicts: dict[int, dict[str, Record]],
    answer_files: dict[int, Path],
    verdict_files: dict[int, Path],
) -> None:
    """UserError unless all iterations answer the same instructions and are judged on them.

    Rows are by iteration and instruction.
    """
    for number, path in answer_files.items():
        if answers[number].keys() != answers[0].keys():
            raise UserError(
                f"{path} and {answer_files[0]} answer different instructions; "
                "give answers to the same instructions"
            )
        given = {text: row["output"] for text, row in answers[number].items()}
        judged = {text: row["output_2"] for text, row in verdicts[number].items()}
        if given != judged:
            raise UserError(
                f"{verdict_files[number]} judges other answers than the ones in {path}; "
                "delete it and judge again"
            )
        if any(
            verdicts[number][text]["output_1"] != verdicts[0][text]["output_1"]
            for text in answers[0]
        ):
            raise UserError(
                f"{verdict_files[number]} and {verdict_files[0]} compare with different "
                "references; judge with the same reference"
            )


def evaluation_item(
    instruction: str,
    identity: str,
    category: str,
    answers: dict[int, dict[str, Record]],
    verdicts: dict[int, dict[str, Record]],
    constrained: Instruction | None,
) -> Record:
    """The item of one instruction; rows are by iteration and instruction."""
    wins = {number: wins_of(verdicts[number][instruction]) for number in answers}
    reference = verdicts[0][instruction]
    return {
        "id": identity,
        "category": category,
        "instruction": instruction,
        "reference": reference["output_1"],
        "reference_name": reference["generator_1"],
        "answers": [
            {
                "iteration": number,
                "name": rows[instruction]["generator"],
                "text": rows[instruction]["output"],
                "finish": rows[instruction].get("finish_reason"),
                "wins": wins[number],
                "constraints": constraints_followed(constrained, rows[instruction]["output"]),
            }
            for number, rows in answers.items()
        ],
        "margin": wins[max(answers)] - wins[0],
    }


def constraints_followed(instruction: Instruction | None, answer: str) -> list[Record]:
    """The id of each constraint, and whether the answer follows it by IFEval's strict metric."""
    if instruction is None:
        return []
    strict, _ = follows(instruction, answer)
    return [
        {"id": constraint.id, "followed": followed}
        for constraint, followed in zip(instruction.constraints, strict, strict=True)
    ]


def read_annotations(path: Path) -> dict[str, Record]:
    """Judgments in alpaca-eval's format by instruction.

    A missing field and a failed judgment are a UserError.
    """
    rows = read_json(path)
    needed = ("instruction", "output_1", "output_2", "generator_1")
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and isinstance(row.get(key), str) for row in rows for key in needed
    ):
        raise UserError(
            f"{path} is not a list of objects with {', '.join(needed)}; "
            "make it with evaluate_alpaca_eval.py"
        )
    for row in rows:
        if not isinstance(row.get("preference"), (int, float)) or not 0 <= wins_of(row) <= 1:
            raise UserError(
                f"{path} has no preference between 1 and 2 for {row['instruction'][:60]!r}; "
                "judge again"
            )
    return {row["instruction"]: row for row in rows}


def wins_of(annotation: Record) -> float:
    """P(the policy's answer beats the reference's answer).

    alpaca-eval's preference is 1 plus this probability. Older versions write 0 for a draw.
    """
    return (annotation["preference"] or 1.5) - 1


def read_iterations(paths: Iterable[Path], name: str) -> dict[int, RowsByKey]:
    """The rows of the table `name` by iteration, and then by prompt and sample.

    The sample is None for a table that has no samples.
    """
    found: dict[int, RowsByKey] = {}
    for path in paths:
        rows = found.setdefault(iteration(path), {})
        for row in read_table(path, name):
            key = (row["prompt_id"], row.get("sample_id"))
            if key in rows:
                raise UserError(
                    f"{path} has {name} of prompt {key[0]} that another file has too; "
                    "give files of one run, and each file once"
                )
            rows[key] = row
    return found


def one_per_iteration(paths: Iterable[Path]) -> dict[int, Path]:
    """Paths by iteration, in order. Two paths of one iteration are a UserError."""
    found: dict[int, Path] = {}
    for path in paths:
        number = iteration(path)
        if number in found:
            raise UserError(
                f"{path} is a second file of iteration {number} beside {found[number]}; give one"
            )
        found[number] = path
    return dict(sorted(found.items()))


def same_iterations(files: dict[str, list[Path]]) -> None:
    """UserError unless the files of all flags are of the same iterations."""
    (first, paths), *others = files.items()
    wanted = {iteration(path) for path in paths}
    for name, more in others:
        differing = wanted ^ {iteration(path) for path in more}
        if differing:
            raise UserError(
                f"--{name} ({more[0]}, ...) and --{first} differ in iteration {min(differing)}; "
                "give files of the same iterations"
            )


def page(data: Record) -> str:
    """The template with the data in it.

    `</` and `<!--` are escaped, because a text of the data must not end or comment out the script
    element that holds the data.
    """
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    escaped = text.replace("</", "<\\/").replace("<!--", "\\u003c!--")
    return TEMPLATE.read_text(encoding="utf-8").replace(PLACEHOLDER, escaped, 1)


if __name__ == "__main__":
    run(main)
