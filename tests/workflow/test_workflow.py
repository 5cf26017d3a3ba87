"""The whole workflow as a user runs it: killed, resumed, partly deleted, sharded otherwise, run beside the main one."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sppo.core.tables import read_table
from sppo.preferences.estimates import mean_logits, win_probabilities, winner_and_loser

REPOSITORY = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"
}  # all cores, as a user has
RESULT = "results/tiny/iter2/alpaca_eval.json"


@pytest.fixture(scope="module")
def clone(tmp_path_factory, tiny_policy, copy_repository):
    """A copy of the repository as git sees it, with nothing made yet. A shell divides its path."""
    return make_clone(copy_repository, tmp_path_factory.mktemp("clone") / "my café", tiny_policy)


def make_clone(copy_repository, folder: Path, tiny_policy: Path) -> tuple[Path, Path]:
    """The copy, and the policy that its runs start from."""
    folder = copy_repository(folder)
    embedded = REPOSITORY / "results/models"
    if embedded.is_dir():  # made already; in a fresh clone the first test makes it
        shutil.copytree(embedded, folder / "results/models")
    return folder, tiny_policy


def command(clone, *targets: str, **settings: str) -> list[str]:
    folder, policy = clone
    config = [f"policy={{model: {policy}}}", *(f"{key}={value}" for key, value in settings.items())]
    return [
        sys.executable,
        "-m",
        "snakemake",
        "--cores",
        "2",
        "--configfile",
        "tests/workflow/config.yaml",
        "--config",
        *config,
        "--",
        *targets,
    ]


def snakemake(clone, *targets: str, **settings: str) -> str:
    """Run to the end; returns what was printed."""
    done = subprocess.run(
        command(clone, *targets, **settings),
        cwd=clone[0],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=ENVIRONMENT,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


def times(clone) -> dict[str, float]:
    """When each artifact's record was written."""
    root = clone[0] / "results/tiny"
    return {
        str(path.relative_to(root)).removesuffix(".record.json"): path.stat().st_mtime
        for path in root.rglob("*.record.json")
    }


def redone(before: dict[str, float], after: dict[str, float]) -> set[str]:
    """Artifacts that were made, or made again."""
    return {name for name in after if after[name] != before.get(name)}


def test_killed_resumed_and_finished(clone):
    process = subprocess.Popen(
        command(clone, RESULT),
        cwd=clone[0],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=ENVIRONMENT,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while not list((clone[0] / "results/tiny/iter1/preferences").glob("*.record.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = times(clone)
    subprocess.run(
        [*command(clone, RESULT)[:-2], "--unlock"], cwd=clone[0], check=True, capture_output=True
    )

    snakemake(clone, RESULT)

    # What the killed jobs had in hand is made again, what earlier jobs had finished is not.
    compared = {
        name.replace("preferences", "responses")
        for name in finished
        if name.startswith("iter1/preferences/")
    }
    assert not {"iter0/policy", "iter1/prompts.parquet", *compared} & redone(finished, times(clone))
    result = json.loads((clone[0] / RESULT).read_text())
    assert 0 <= result["win_rate"] <= 100 and result["n_total"] == 6
    low, high = result["win_rate_interval"]
    assert low <= result["win_rate"] <= high
    assert not list((clone[0] / "results/tiny").rglob("*.tmp")) and not list(
        (clone[0] / "results/tiny").rglob(".*.work")
    )
    assert "Nothing to be done" in snakemake(clone, RESULT)


def test_results_are_verified_and_a_rebuilt_record_makes_nothing_again(clone):
    def verify(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "src/tools/verify_results.py", *words],
            cwd=clone[0],
            capture_output=True,
            text=True,
        )

    assert (whole := verify()).returncode == 0, whole.stdout
    root = clone[0] / "results/tiny"
    (root / "iter1/policy.record.json").write_text("{")
    (root / "iter1/pairs.parquet.record.json").unlink()
    assert (
        (broken := verify()).returncode == 1
        and "iter1/policy: results/tiny/iter1/policy.record.json is broken" in broken.stdout
    )
    assert verify("--fix").returncode == verify().returncode == 0
    assert "Nothing to be done" in snakemake(clone, RESULT)


def test_a_deleted_policy_is_made_again_with_what_follows_and_nothing_before(clone):
    before = times(clone)
    shutil.rmtree(clone[0] / "results/tiny/iter1/policy")

    snakemake(clone, RESULT)

    again = redone(before, times(clone))
    assert {
        "iter1/policy",
        "iter2/responses/0.parquet",
        "iter2/policy",
        "iter2/alpaca_eval.json",
    } <= again
    assert (
        not {
            "iter0/policy",
            "iter1/prompts.parquet",
            "iter1/responses/0.parquet",
            "iter1/pairs.parquet",
            "iter1/logps/current.parquet",
            "iter2/prompts.parquet",
            "iter0/reference_outputs.json",
        }
        & again
    )


def test_a_run_shares_the_first_iteration(clone):
    before = times(clone)

    snakemake(clone, "results/tiny/hard/iter1/alpaca_eval.json")

    assert redone(before, times(clone)) == {
        f"hard/iter1/{name}"
        for name in (
            "pairs.parquet",
            "logps/current.parquet",
            "policy",
            "train_log.jsonl",
            "alpaca_eval_outputs.json",
            "alpaca_eval.json",
            "alpaca_eval_annotations.json",
        )
    }
    log = (clone[0] / "results/tiny/hard/iter1/train_log.jsonl").read_text().splitlines()
    assert json.loads(log[0])["loss"] == pytest.approx(
        500_000, rel=1e-4
    )  # (eta/2)^2 twice, at log-ratio 0


def test_stale_artifacts_are_listed_not_rerun(clone):
    program = clone[0] / "src/build_pairs.py"
    program.write_text(program.read_text() + "\n# a cosmetic edit\n")

    listed = subprocess.run(
        [sys.executable, "src/tools/list_stale.py"],
        cwd=clone[0],
        check=True,
        capture_output=True,
        text=True,
    ).stdout

    assert "iter1/pairs.parquet: other program" in listed and "iter1/prompts.parquet:" not in listed
    assert "Nothing to be done" in snakemake(clone, "results/tiny/iter2/pairs.parquet")


def test_a_run_is_summed_up(clone):
    snakemake(clone, "results/tiny/summary.md")

    rows = [
        line
        for line in (clone[0] / "results/tiny/summary.md").read_text().splitlines()
        if line.startswith("|")
    ][2:]
    assert [row.split("|")[1].strip() for row in rows] == ["0", "1", "2"]
    assert (clone[0] / "results/tiny/figures/win_rate.png").read_bytes().startswith(b"\x89PNG")


def test_best_of_n_takes_the_ranker_s_choice_of_the_same_samples(clone):
    root = clone[0] / "results/tiny/iter1"
    snakemake(clone, "results/tiny/iter1/best_of_n.png")

    answers = json.loads((root / "best_of_n_answers.json").read_text())
    assert [row["sample_id"] for row in answers] == [0, 1, 2] * 6
    chosen = {
        n: [
            (row["prompt_id"], row["sample_id"], row["output"])
            for row in json.loads((root / f"best_of_{n}/alpaca_eval_outputs.json").read_text())
        ]
        for n in (1, 2, 3)
    }
    drawn = {(row["prompt_id"], row["sample_id"], row["output"]) for row in answers}
    for n, rows in chosen.items():
        assert len(rows) == 6 and set(rows) <= drawn and all(sample < n for _, sample, _ in rows)
    lines = (root / "best_of_n.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["n", "1", "2", "3"]
    assert (
        json.loads((root / "best_of_3/alpaca_eval.json").read_text())["policy"]
        == "tiny/iter1-best-of-3"
    )


def test_mt_bench_offline(clone):
    snakemake(clone, "results/tiny/iter0/mt_bench.json", "results/tiny/iter1/mt_bench.json")

    for t in (0, 1):
        result = json.loads((clone[0] / f"results/tiny/iter{t}/mt_bench.json").read_text())
        assert (result["n"], result["failures"], result["questions"]) == (64, 0, 32) and not result[
            "comparable_with_published"
        ]
        assert result["average"] == pytest.approx(1 + 0.09 * result["against_base"]["win_rate"])
        assert result["policy"] == f"tiny/iter{t}"


def test_all_policies_are_compared_with_each_other(clone):
    snakemake(
        clone, "results/tiny/figures/pairwise_judge.png", "results/tiny/figures/pairwise_ranker.png"
    )

    for model in ("judge", "ranker"):
        names, *rows = [
            line.split(",")
            for line in (clone[0] / f"results/tiny/figures/pairwise_{model}.csv")
            .read_text()
            .splitlines()
        ]
        assert (
            names[1:]
            == [row[0] for row in rows]
            == ["tiny/iter0", "tiny/iter1", "tiny/iter2", "tiny/hard/iter1"]
        )
        wins = np.array([row[1:] for row in rows], dtype=float)
        np.testing.assert_allclose(wins + wins.T, 100, atol=1e-3)


def test_open_llm_tasks_run_offline(clone):
    snakemake(clone, "results/tiny/iter1/open_llm.json")

    result = json.loads((clone[0] / "results/tiny/iter1/open_llm.json").read_text())
    tasks = ("arc_challenge", "truthfulqa_mc2", "winogrande", "gsm8k", "hellaswag", "mmlu")
    assert result["average"] == pytest.approx(sum(result[task] for task in tasks) / 6)
    assert all(0 <= result[task] <= 100 for task in tasks) and not result["official_tasks"]
    assert result["n"] == {task: 12 if task == "mmlu" else 2 for task in tasks}
    assert result["shots"]["arc_challenge"] == 1 and result["shots"]["truthfulqa_mc2"] == 0


def test_papers_tables_show_what_was_measured(clone):
    snakemake(clone, "paper_tables")

    with (clone[0] / "results/tiny/tables/sppo_open_llm.csv").open(newline="") as stream:
        rows = {(row["row"], row["metric"]): row for row in csv.DictReader(stream)}
    ours = [row for row in rows.values() if row["ours"] != "-"]
    assert len(ours) == 7 and {row["comparable"] for row in ours} == {
        "other base model, other items"
    }


def test_the_report_is_one_file_with_figures_tables_and_responses(clone):
    targets = [
        f"results/tiny/{name}"
        for name in (
            "summary.md",
            "figures/training.svg",
            "response_browser.html",
            "tables/all.html",
        )
    ]
    snakemake(clone, *targets)

    page = (clone[0] / "results/tiny/response_browser.html").read_text()
    data = json.loads(
        re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.S)[1]
    )
    assert len(data["training"]) == 12 and len(data["evaluation"]) == 6
    words = command(clone, *targets)
    words[words.index("--") : words.index("--")] = ["--report", "results/tiny/report.html"]
    done = subprocess.run(
        words, cwd=clone[0], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = (clone[0] / "results/tiny/report.html").read_text()
    for name in ("win_rate.svg", "length.svg", "training.svg", "response_browser.html", "all.html"):
        assert name in report


def test_another_shard_count_gives_the_same_tokens_and_preferences(clone):
    root = clone[0] / "results/tiny/iter1"

    def tables(shards: int):
        responses = {
            (row["prompt_id"], row["sample_id"]): row["token_ids"]
            for shard in range(shards)
            for row in read_table(root / f"responses/{shard}.parquet", "responses")
        }
        logits = {
            row["prompt_id"]: np.array(row["logits"])
            for shard in range(shards)
            for row in read_table(root / f"preferences/{shard}.parquet", "preferences")
        }
        return responses, logits

    responses, logits = tables(2)

    snakemake(
        clone,
        "results/tiny/iter1/pairs.parquet",
        responses="{samples: 3, max_new_tokens: 12, batch_size: 18, shards: 1, precision: float32}",
    )

    assert dict(tables(1)[0].items()) == responses
    for prompt_id, other in tables(1)[1].items():
        assert np.abs(win_probabilities(other) - win_probabilities(logits[prompt_id])).max() < 1e-4
        assert winner_and_loser(mean_logits(other)) == winner_and_loser(
            mean_logits(logits[prompt_id])
        )


@pytest.mark.slow
def test_runs_with_data_of_their_own_are_trained_and_evaluated(clone):
    """DICE, RA-DPO and SELM of the shipped configuration, in small: two iterations and their answers."""
    runs = ("dice", "ra_dpo", "selm")
    snakemake(clone, *(f"results/tiny/{run}/iter2/alpaca_eval.json" for run in runs))

    root = clone[0] / "results/tiny"
    pairs = {run: read_table(root / run / "iter2/pairs.parquet", "pairs") for run in runs}
    first = read_table(root / "dice/iter1/pairs.parquet", "pairs")
    assert [
        pair["chosen"]
        for pair in sorted(pairs["dice"][-len(first) :], key=lambda pair: pair["prompt_id"])
    ] == [pair["chosen"] for pair in sorted(first, key=lambda pair: pair["prompt_id"])]
    rewards = json.loads((root / "dice/iter2/preferences/0.parquet.record.json").read_text())
    assert rewards["preference_model"].endswith(
        "log results/tiny/dice/iter1/policy/results/tiny/iter0/policy"
    )
    assert len(pairs["ra_dpo"]) % 2 == 0 and all(
        a["chosen"] == b["rejected"] for a, b in zip(pairs["ra_dpo"][::2], pairs["ra_dpo"][1::2])
    )
    asked, answered = (
        read_table(root / f"{run}/iter2/prompts.parquet", "prompts") for run in ("ra_dpo", "selm")
    )
    assert [row["messages"] for row in asked] == [row["messages"] for row in answered]
    assert all(
        len(a["prompt_token_ids"]) > len(b["prompt_token_ids"]) for a, b in zip(asked, answered)
    )
