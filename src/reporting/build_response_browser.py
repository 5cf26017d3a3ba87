"""The response browser: one HTML page in which to read what a run was trained on and how its answers changed.

Reads   prompts.parquet, responses/, preferences/ and pairs.parquet of the iterations trained; alpaca_eval_outputs.json and
        alpaca_eval_annotations.json of all iterations, the base's (iter0) among them; the evaluation instructions
Writes  a self-contained .html that needs neither server nor network, and its record
The iteration is read from the paths (.../iter{t}/...). P, winner and loser are build_pairs.py's own: the flags of [preference] and [pairs]
must be those of the run, and pairs.parquet is checked against them.
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
from sppo.preferences.estimates import p_hat, win_probabilities
from sppo.preferences.pairs import Dropped, Pair, Rules, winner_against_loser

TEMPLATE = ROOT / "src" / "sppo" / "reporting" / "response_browser.html"
PLACEHOLDER = "@DATA@"
Record = dict[str, Any]


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
        help="all shards of all these iterations",
    )
    parser.add_argument(
        "--preferences",
        type=Path,
        nargs="+",
        required=True,
        help="all shards of all these iterations",
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
    add_section(parser, "pairs")
    add_section(parser, "replay", skip=("iteration",), prefix="replay_")
    args = parser.parse_args()
    if (
        args.construction != "best_vs_worst"
        or args.even_lengths
        or args.target_reward
        or args.replay_share
    ):
        raise UserError(
            "the response browser shows runs that are trained on the best and the worst response of each prompt, and nothing else; this run has "
            "pairs.construction, even_lengths or target_reward, or replay.share, set"
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
        write_text(
            args.output,
            page(
                {
                    "probability": args.probability,
                    "logit_scale": args.logit_scale,
                    "training": training,
                    "evaluation": evaluation,
                }
            ),
        )
        facts |= {
            "prompts": len(training),
            "instructions": len(evaluation),
            "template_sha256": file_hash(TEMPLATE),
        }
    print(
        f"{args.output}: {len(training)} prompts, {len(evaluation)} instructions; open it in a browser"
    )


def training_items(args: argparse.Namespace) -> list[Record]:
    """Every prompt of every iteration: its responses, P, P-hat, winner and loser (indices) or why it has none."""
    tables = {
        name: read_iterations(getattr(args, name), name)
        for name in ("prompts", "responses", "preferences", "pairs")
    }
    same_iterations({name: getattr(args, name) for name in tables})
    rules = Rules.of(vars(args))
    items = []
    for number in sorted(tables["prompts"]):
        rows = {name: table[number] for name, table in tables.items()}
        given = {
            name: ", ".join(str(path) for path in getattr(args, name) if iteration(path) == number)
            for name in tables
        }
        responses: dict[str, dict[int, Record]] = {}
        for (prompt_id, sample_id), row in rows["responses"].items():
            responses.setdefault(prompt_id, {})[sample_id] = row
        asked = {prompt_id for prompt_id, _ in rows["prompts"]}
        for name in ("responses", "preferences", "pairs"):
            strange = {prompt_id for prompt_id, _ in rows[name]} - asked
            if strange:
                raise UserError(
                    f"{given[name]} has prompt {min(strange)}, which {given['prompts']} lacks; give files of one run"
                )
        for (prompt_id, _), prompt in rows["prompts"].items():
            preference, candidates = (
                rows["preferences"].get((prompt_id, None)),
                responses.get(prompt_id, {}),
            )
            if preference is None or preference["sample_ids"] != sorted(candidates):
                raise UserError(
                    f"prompt {prompt_id} of {given['prompts']} lacks responses or preferences; give all shards"
                )
            pair = winner_against_loser(preference, candidates, rules)
            if not agree(pair, rows["pairs"].get((prompt_id, None))):
                raise UserError(
                    f"{given['pairs']} holds another pair for prompt {prompt_id} than responses, preferences and flags give; "
                    "give files of one run and the flags that build_pairs.py had"
                )
            items.append(
                {
                    "iteration": number,
                    "id": prompt_id,
                    "category": prompt["category"],
                    "messages": prompt["messages"],
                    **estimates(preference, candidates, pair, rules),
                }
            )
    return items


def estimates(
    preference: Record, candidates: dict[int, Record], pair: Pair | Dropped, rules: Rules
) -> Record:
    """What the preference model made of one prompt's responses, as build_pairs.py reads it."""
    probabilities = win_probabilities(
        np.array(preference["logits"]), rules.probability, rules.logit_scale
    )
    item: Record = {
        "responses": [
            {
                "sample": row["sample_id"],
                "text": row["text"],
                "tokens": len(row["token_ids"]),
                "finish": row["finish_reason"],
            }
            for row in (candidates[sample_id] for sample_id in preference["sample_ids"])
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
    """Whether the pair computed here is the row of pairs.parquet; None is no row."""
    if isinstance(pair, Dropped) or kept is None:
        return isinstance(pair, Dropped) and kept is None
    columns = pair.columns()
    same = all(
        columns[name] == kept[name]
        for name in ("chosen", "rejected", "chosen_sample_id", "rejected_sample_id")
    )
    # Not to the last bit: pairs may come from another machine.
    return same and all(
        abs(columns[name] - kept[name]) < 1e-9
        for name in ("p_hat_chosen", "p_hat_rejected", "p_chosen_beats_rejected")
    )


def evaluation_items(args: argparse.Namespace) -> list[Record]:
    """Every instruction that was answered: the answers of all iterations, the judge's verdicts, the reference's answer."""
    same_iterations({"answers": args.answers, "annotations": args.annotations})
    answers, judged = one_an_iteration(args.answers), one_an_iteration(args.annotations)
    if 0 not in answers:
        raise UserError(
            f"{args.answers[0]} has no file of iteration 0 beside it; give iter0/alpaca_eval_outputs.json too"
        )
    rows = {
        number: {row["instruction"]: row for row in read_outputs(path)}
        for number, path in answers.items()
    }
    verdicts = {number: read_annotations(path) for number, path in judged.items()}
    instructions = {
        row["instruction"]: (str(row.get("prompt_id", position)), str(row.get("dataset", "")))
        for position, row in enumerate(read_instructions(args.instructions))
    }
    for number, path in answers.items():
        if rows[number].keys() != rows[0].keys():
            raise UserError(
                f"{path} and {answers[0]} answer different instructions; answer the same"
            )
        if {text: row["output"] for text, row in rows[number].items()} != {
            text: row["output_2"] for text, row in verdicts[number].items()
        }:
            raise UserError(
                f"{judged[number]} judges other answers than those in {path}; delete it and judge again"
            )
        if any(
            verdicts[number][text]["output_1"] != verdicts[0][text]["output_1"] for text in rows[0]
        ):
            raise UserError(
                f"{judged[number]} and {judged[0]} compare with different references; judge with the same"
            )
    strange = [text for text in rows[0] if text not in instructions]
    if strange:
        raise UserError(
            f"{args.instructions} lacks the instruction {strange[0][:60]!r} of {answers[0]}; give the file that was answered"
        )
    items = []
    for text, (identity, category) in instructions.items():
        if text not in rows[0]:
            continue  # alpaca_eval.limit answers only the first
        wins = {number: wins_of(verdicts[number][text]) for number in answers}
        items.append(
            {
                "id": identity,
                "category": category,
                "instruction": text,
                "reference": verdicts[0][text]["output_1"],
                "reference_name": verdicts[0][text]["generator_1"],
                "answers": [
                    {
                        "iteration": number,
                        "name": rows[number][text]["generator"],
                        "text": rows[number][text]["output"],
                        "finish": rows[number][text].get("finish_reason"),
                        "wins": wins[number],
                    }
                    for number in answers
                ],
                "margin": wins[max(answers)] - wins[0],
            }
        )
    return items


def read_annotations(path: Path) -> dict[str, Record]:
    """Judgments in alpaca-eval's form by instruction. UserError on a missing field or a judgment that failed."""
    rows = read_json(path)
    needed = ("instruction", "output_1", "output_2", "generator_1")
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and isinstance(row.get(key), str) for row in rows for key in needed
    ):
        raise UserError(
            f"{path} is not a list of objects with {', '.join(needed)}; make it with evaluate_alpaca_eval.py"
        )
    for row in rows:
        if not isinstance(row.get("preference"), (int, float)) or not 0 <= wins_of(row) <= 1:
            raise UserError(
                f"{path} has no preference between 1 and 2 for {row['instruction'][:60]!r}; judge again"
            )
    return {row["instruction"]: row for row in rows}


def wins_of(annotation: Record) -> float:
    """P(the policy's answer beats the reference's); a preference of 0 is an old form of a draw."""
    return (annotation["preference"] or 1.5) - 1


def read_iterations(
    paths: Iterable[Path], name: str
) -> dict[int, dict[tuple[str, int | None], Record]]:
    """Rows of the table `name` by iteration, then by prompt and sample (None where it has no samples)."""
    found: dict[int, dict[tuple[str, int | None], Record]] = {}
    for path in paths:
        rows = found.setdefault(iteration(path), {})
        for row in read_table(path, name):
            key = (row["prompt_id"], row.get("sample_id"))
            if key in rows:
                raise UserError(
                    f"{path} has {name} of prompt {key[0]} that another file has too; give files of one run, each once"
                )
            rows[key] = row
    return found


def one_an_iteration(paths: Iterable[Path]) -> dict[int, Path]:
    """Paths by iteration, in order. UserError on a second one for an iteration."""
    found: dict[int, Path] = {}
    for path in paths:
        if iteration(path) in found:
            raise UserError(
                f"{path} is a second file of iteration {iteration(path)} beside {found[iteration(path)]}; give one"
            )
        found[iteration(path)] = path
    return dict(sorted(found.items()))


def same_iterations(files: dict[str, list[Path]]) -> None:
    """UserError unless the files of every flag are of the same iterations."""
    (first, paths), *others = files.items()
    wanted = {iteration(path) for path in paths}
    for name, more in others:
        differing = wanted ^ {iteration(path) for path in more}
        if differing:
            raise UserError(
                f"--{name} ({more[0]}, ...) and --{first} differ in iteration {min(differing)}; give files of the same"
            )


def page(data: Record) -> str:
    """The template with the data in it. Neither `</script>` nor `<!--` in a text may end or hide the script that holds it."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return TEMPLATE.read_text(encoding="utf-8").replace(
        PLACEHOLDER, text.replace("</", "<\\/").replace("<!--", "\\u003c!--"), 1
    )


if __name__ == "__main__":
    run(main)
