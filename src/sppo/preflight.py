"""What is checked before any work starts, and what was deleted since the last run. Imports nothing heavy."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from sppo import alpaca, mt_bench
from sppo.adapters import ADAPTER_FILES, adapter_folder
from sppo.errors import UserError
from sppo.prompts import read_gold, read_instructions, read_prompts


def check_inputs(runs: dict[str, dict[str, Any]]) -> None:
    """Every file that the configuration names is there and readable, and there are prompts enough.

    Raises `UserError` naming the first that is not.
    """
    for name, run in runs.items():
        where = f"runs.{name}." if name else ""
        model = run["policy"]["model"]
        if model != "embedded" and "/" in model and model[0] in "./~" and not Path(model).expanduser().is_dir():
            raise UserError(f"config: policy.model is {model}, but there is no such folder; correct the path")
        for key in ("preference.model", "alpaca_eval.judge", "mt_bench.judge"):
            section, setting = key.split(".")
            model = run[section][setting]
            folder = adapter_folder(model)
            if folder is None and key == "preference.model":
                raise UserError(f"config: {where}{key} is {model}; give `ranker`, or a folder that src/train_ranker.py wrote")
            for file in ADAPTER_FILES if folder else ():
                if not (folder / file).is_file():
                    raise UserError(f"config: {where}{key} is {model}, but {folder} has no {file}; give `ranker`, `judge` or a "
                                    "folder that src/train_ranker.py wrote")
        for section, check in (("alpaca_eval", alpaca.check_judge), ("mt_bench", mt_bench.check_judge)):
            check(*(run[section][key] for key in ("judge", "judge_model", "judge_base_url")))
        if run["mt_bench"]["data"] != "fastchat":
            mt_bench.read_questions(Path(run["mt_bench"]["data"]))
        if run["pairs"]["gold"]:
            read_gold(Path(run["pairs"]["gold"]))
        if run["open_llm"]["data"] != "hub" and not Path(run["open_llm"]["data"]).is_dir():
            raise UserError(f"config: {where}open_llm.data is {run['open_llm']['data']}, but there is no such folder; give `hub`, or a folder "
                            "with all six tasks")
        evaluation = run["alpaca_eval"]
        instructions = read_instructions(Path(evaluation["instructions"]))
        asked = read_instructions(Path(evaluation["instructions"]), evaluation["limit"])
        for key in ("reference", "difficulty"):
            if evaluation[key] not in (None, "base") and not Path(evaluation[key]).is_file():
                raise UserError(f"config: {where}alpaca_eval.{key} is {evaluation[key]}, but there is no such file; correct the path")
        if evaluation["reference"] != "base":
            alpaca.paired([row | {"generator": "policy"} for row in asked], alpaca.read_outputs(Path(evaluation["reference"])))
        if evaluation["difficulty"]:
            alpaca.check_order(asked, Path(evaluation["difficulty"]))
        tracker = run["train"]["report_to"]
        here = importlib.util.find_spec("torch")  # not so with conda, where programs run in environments of their own
        if here and tracker != "none" and not importlib.util.find_spec(tracker):
            raise UserError(f"config: {where}train.report_to is {tracker}, which is not installed; run .venv/bin/pip install {tracker}, or set none")
        if run["iterations"]:
            check_prompts(run, {row["instruction"].strip() for row in instructions})


def check_prompts(run: dict[str, Any], held_out: set[str]) -> None:
    """A JSONL source is whole and holds enough prompts for all iterations; a hub source is left to its rule."""
    prompts = run["prompts"]
    source = prompts["source"]
    if "{t}" in source or not (Path(source).is_file() or source.endswith(".jsonl")):
        return
    rows, _ = read_prompts(source, None, prompts["split"], prompts["field"])
    free = sum(row["messages"][-1]["content"].strip() not in held_out for row in rows)
    wanted = (prompts["per_iteration"] or 1) * run["iterations"]
    if wanted > free:
        raise UserError(f"config: prompts.per_iteration asks for {prompts['per_iteration'] or 1} prompts in each of {run['iterations']} "
                        f"iterations, {wanted} in all, but {source} has {free} outside the evaluation set; lower it or give more prompts")


def deleted_artifacts(root: Path, keep_policies: bool) -> list[str]:
    """Artifacts under `root` that a record names as made or used there, and that are gone.

    Policies do not count if the workflow itself drops them.
    """
    named: set[str] = set()
    for path in root.rglob("*.record.json"):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            named |= {record["artifact"], *record["inputs"]}
        except (OSError, ValueError, KeyError):
            continue  # broken records are for the stage that reads them to report
    own = (name for name in named if Path(name).is_relative_to(root) and (keep_policies or Path(name).name != "policy"))
    return sorted(name for name in own if not Path(name).exists())
