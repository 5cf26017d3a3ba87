"""The whole workflow as a user runs it.

It is killed, resumed, partly deleted, divided into another number of shards, and run with the other
runs of the configuration.
"""

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
from typing import Any

import numpy as np
import pytest
from listener import listening, online

from sppo.core.artifacts import record_path
from sppo.core.tables import read_table
from sppo.preferences.estimates import mean_logits, win_probabilities, winner_and_loser

REPOSITORY = Path(__file__).resolve().parents[2]
# The programs use all cores, as in a user's run, and may ask the network: see `network`.
ENVIRONMENT = {
    key: value for key, value in online(dict(os.environ)).items() if key != "OMP_NUM_THREADS"
}
CONFIG = "tests/workflow/config.yaml"
RESULT = "results/tiny/iter2/alpaca_eval.json"


@pytest.fixture(scope="module", autouse=True)
def network():
    """A server in the place of the hub and of every other address, for all runs of this file."""
    with listening() as server:
        proxies = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), server.url)
        ENVIRONMENT.update(proxies, HF_ENDPOINT=server.url)
        yield server


@pytest.fixture(scope="module")
def clone(tmp_path_factory, tiny_policy, copy_repository):
    """A copy of the repository's files known to git, without results.

    A shell splits its path at the space unless the path is quoted.
    """
    return make_clone(copy_repository, tmp_path_factory.mktemp("clone") / "my café", tiny_policy)


def make_clone(copy_repository, folder: Path, tiny_policy: Path) -> tuple[Path, Path]:
    """The folder of the copy, and the policy that its runs start from."""
    folder = copy_repository(folder)
    embedded = REPOSITORY / "results/models"
    if embedded.is_dir():  # Without it, the first test makes the embedded model.
        shutil.copytree(embedded, folder / "results/models")
    return folder, tiny_policy


def command(clone, *targets: str, file: str = CONFIG, **settings: str) -> list[str]:
    """The command that runs Snakemake for these targets.

    file: the configuration. settings: keys that replace the file's.
    """
    _, policy = clone
    config = [f"policy={{model: {policy}}}"]
    config += [f"{key}={value}" for key, value in settings.items()]
    return [
        sys.executable,
        "-m",
        "snakemake",
        "--cores",
        "2",
        "--configfile",
        file,
        "--config",
        *config,
        "--",
        *targets,
    ]


def snakemake(clone, *targets: str, **settings: str) -> str:
    """Run Snakemake, which must succeed, and return its output."""
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
    """Artifacts that were made, or made again, between two calls of `times`."""
    return {name for name in after if after[name] != before.get(name)}


def read_json(file: Path) -> Any:
    return json.loads(file.read_text())


def test_killed_workflow_is_resumed_and_finished(clone):
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
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = times(clone)
    subprocess.run(
        [*command(clone, RESULT)[:-2], "--unlock"], cwd=clone[0], check=True, capture_output=True
    )

    snakemake(clone, RESULT)

    # Artifacts of finished jobs are not made again. The responses of a shard are finished if its
    # preferences are.
    kept = {"iter0/policy", "iter1/prompts.parquet"}
    for name in finished:
        if name.startswith("iter1/preferences/"):
            kept.add(name.replace("preferences", "responses"))
    assert not kept & redone(finished, times(clone))
    result = read_json(clone[0] / RESULT)
    assert 0 <= result["win_rate"] <= 100
    assert result["n_total"] == 6
    low, high = result["win_rate_interval"]
    assert low <= result["win_rate"] <= high
    assert not list((clone[0] / "results/tiny").rglob("*.tmp"))
    assert not list((clone[0] / "results/tiny").rglob(".*.work"))
    assert "Nothing to be done" in snakemake(clone, RESULT)


def test_rebuilt_record_causes_no_rerun(clone):
    def verify(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "src/tools/verify_results.py", *words],
            cwd=clone[0],
            capture_output=True,
            text=True,
        )

    whole = verify()
    assert whole.returncode == 0, whole.stdout
    root = clone[0] / "results/tiny"
    (root / "iter1/policy.record.json").write_text("{")
    (root / "iter1/pairs.parquet.record.json").unlink()
    broken = verify()
    assert broken.returncode == 1
    assert "iter1/policy: results/tiny/iter1/policy.record.json is broken" in broken.stdout
    assert verify("--fix").returncode == 0
    assert verify().returncode == 0
    assert "Nothing to be done" in snakemake(clone, RESULT)


def test_settings_that_cannot_change_results_cause_no_rerun(clone):
    """Also after results exist: more iterations keep the first ones, if these have fixed sizes."""
    harmless = {"train": "{checkpoint_steps: 7}", "preference": "{timeout: 7, concurrency: 2}"}
    assert "Nothing to be done" in snakemake(clone, RESULT, **harmless)
    words = command(clone, "results/tiny/iter3/prompts.parquet", iterations="3")
    planned = subprocess.run(
        [*words[: words.index("--")], "--dry-run", *words[words.index("--") :]],
        cwd=clone[0],
        capture_output=True,
        env=ENVIRONMENT,
        text=True,
    )
    text = planned.stdout + planned.stderr
    assert text.count("/sample_prompts") + text.count("Drawing the prompts") == 1, text


def test_deleted_policy_is_rebuilt_with_its_dependents(clone):
    before = times(clone)
    shutil.rmtree(clone[0] / "results/tiny/iter1/policy")

    snakemake(clone, RESULT)

    follows = {
        "iter1/policy",
        "iter2/responses/0.parquet",
        "iter2/policy",
        "iter2/alpaca_eval.json",
    }
    kept = {
        "iter0/policy",
        "iter1/prompts.parquet",
        "iter1/responses/0.parquet",
        "iter1/pairs.parquet",
        "iter1/logps/current/0.parquet",
        "iter2/prompts.parquet",
        "iter0/reference_outputs.json",
    }
    again = redone(before, times(clone))
    assert follows <= again
    assert not kept & again


def test_run_shares_the_first_iteration(clone):
    before = times(clone)

    snakemake(clone, "results/tiny/hard/iter1/alpaca_eval.json")

    made = (
        "pairs.parquet",
        "logps/current/0.parquet",
        "logps/current/1.parquet",
        "policy",
        "train_log.jsonl",
        "alpaca_eval_outputs.json",
        "alpaca_eval.json",
        "alpaca_eval_annotations.json",
    )
    assert redone(before, times(clone)) == {f"hard/iter1/{name}" for name in made}
    log = (clone[0] / "results/tiny/hard/iter1/train_log.jsonl").read_text().splitlines()
    eta = 1000  # At log-ratio 0, the loss of each pair is 2 (eta/2)^2.
    assert json.loads(log[0])["loss"] == pytest.approx(2 * (eta / 2) ** 2, rel=1e-4)


def test_stale_artifacts_are_listed_and_not_rebuilt(clone):
    program = clone[0] / "src/build_pairs.py"
    program.write_text(program.read_text() + "\n# a cosmetic edit\n")

    listed = subprocess.run(
        [sys.executable, "src/tools/list_stale.py"],
        cwd=clone[0],
        check=True,
        capture_output=True,
        text=True,
    ).stdout

    assert "iter1/pairs.parquet: other program" in listed
    assert "iter1/prompts.parquet:" not in listed
    assert "Nothing to be done" in snakemake(clone, "results/tiny/iter2/pairs.parquet")


def test_run_summary_is_written(clone):
    snakemake(clone, "results/tiny/summary.md")

    lines = (clone[0] / "results/tiny/summary.md").read_text().splitlines()
    _head, _rule, *rows = [line for line in lines if line.startswith("|")]
    assert [row.split("|")[1].strip() for row in rows] == ["0", "1", "2"]
    assert (clone[0] / "results/tiny/figures/win_rate.png").read_bytes().startswith(b"\x89PNG")


def test_demo_has_exact_preferences_and_a_control(clone):
    root = clone[0] / "results/tiny_demo"
    snakemake(clone, "results/tiny_demo/summary.md", file="tests/workflow/demo.yaml")

    record = read_json(root / "iter1/preferences/0.parquet.record.json")
    assert record["preference_model"] == "verifiable"
    assert 0 <= record["cyclic_triples"] <= 1
    main = {pair["prompt_id"]: pair for pair in read_table(root / "iter1/pairs.parquet", "pairs")}
    control = read_table(root / "permuted/iter1/pairs.parquet", "pairs")
    assert main.keys() == {pair["prompt_id"] for pair in control}
    assert any(pair["chosen"] != main[pair["prompt_id"]]["chosen"] for pair in control)
    for t in ("iter0", "iter1", "permuted/iter1"):
        assert read_json(root / t / "ifeval.json")["n_prompts"] == 6
        assert not (root / t / "ifeval_outputs.json").exists()
    lines = (root / "summary.md").read_text().splitlines()
    head, _rule, *rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")
    ]
    assert [row[0] for row in rows] == ["0", "1", "1, permuted"]
    for column in ("against the previous", "IFEval strict [95%]", "log-ratio, winner"):
        assert rows[1][head.index(column)] != "-"
        assert rows[2][head.index(column)] != "-"


def test_best_of_n_takes_the_choice_of_the_ranker(clone):
    root = clone[0] / "results/tiny/iter1"
    snakemake(clone, "results/tiny/iter1/best_of_n.png")

    answers = read_json(root / "best_of_n_answers.json")
    assert [row["sample_id"] for row in answers] == [0, 1, 2] * 6
    drawn = {(row["prompt_id"], row["sample_id"], row["output"]) for row in answers}
    for n in (1, 2, 3):
        chosen = read_json(root / f"best_of_{n}/alpaca_eval_outputs.json")
        assert len(chosen) == 6
        assert {(row["prompt_id"], row["sample_id"], row["output"]) for row in chosen} <= drawn
        assert all(row["sample_id"] < n for row in chosen)
    lines = (root / "best_of_n.csv").read_text().splitlines()
    both = [(str(n), choice) for choice in ("best", "nash") for n in (1, 2, 3)]
    assert [tuple(line.split(",")[:2]) for line in lines] == [("n", "choice"), *both]
    # Two answers have an equilibrium without mixing, if they differ in preference.
    best, nash = (
        read_json(root / f"{one}_of_2/alpaca_eval_outputs.json") for one in ("best", "nash")
    )
    assert [row["output"] for row in best] == [row["output"] for row in nash]
    assert read_json(root / "best_of_3/alpaca_eval.json")["policy"] == "tiny/iter1-best-of-3"


def test_mt_bench_runs_offline(clone):
    snakemake(clone, "results/tiny/iter0/mt_bench.json", "results/tiny/iter1/mt_bench.json")

    for t in (0, 1):
        result = read_json(clone[0] / f"results/tiny/iter{t}/mt_bench.json")
        assert (result["n"], result["failures"], result["questions"]) == (64, 0, 32)
        assert not result["comparable_with_published"]
        assert result["average"] == pytest.approx(1 + 0.09 * result["against_base"]["win_rate"])
        assert result["policy"] == f"tiny/iter{t}"


def test_arena_hard_runs_offline(clone):
    snakemake(clone, "results/tiny/iter0/arena_hard.json", "results/tiny/iter1/arena_hard.json")

    for t in (0, 1):
        result = read_json(clone[0] / f"results/tiny/iter{t}/arena_hard.json")
        assert result["n"] == 5
        assert not result["comparable_with_published"]
        assert result["policy"] == f"tiny/iter{t}"
        assert result["reference"] == "tiny/iter0-reference"
        low, high = result["score_interval"]
        assert low <= result["score"] <= high


def test_all_policies_are_compared_pairwise(clone):
    snakemake(
        clone, "results/tiny/figures/pairwise_judge.png", "results/tiny/figures/pairwise_ranker.png"
    )

    policies = ["tiny/iter0", "tiny/iter1", "tiny/iter2", "tiny/hard/iter1"]
    for model in ("judge", "ranker"):
        with (clone[0] / f"results/tiny/figures/pairwise_{model}.csv").open(newline="") as stream:
            head, *rows = csv.reader(stream)
        assert head[1:] == policies
        assert [row[0] for row in rows] == policies
        wins = np.array([row[1:] for row in rows], dtype=float)
        np.testing.assert_allclose(wins + wins.T, 100, atol=1e-3)


def test_open_llm_tasks_run_offline(clone):
    snakemake(clone, "results/tiny/iter1/open_llm.json")

    result = read_json(clone[0] / "results/tiny/iter1/open_llm.json")
    tasks = ("arc_challenge", "truthfulqa_mc2", "winogrande", "gsm8k", "hellaswag", "mmlu")
    assert result["average"] == pytest.approx(sum(result[task] for task in tasks) / 6)
    assert all(0 <= result[task] <= 100 for task in tasks)
    assert not result["official_tasks"]
    assert result["n"] == dict.fromkeys(tasks, 2) | {"mmlu": 12}
    assert result["shots"]["arc_challenge"] == 1
    assert result["shots"]["truthfulqa_mc2"] == 0


def test_nothing_asks_the_network(clone, network, tmp_path):
    """All stages and evaluations ran, or run now, with the server in the place of the network.

    So does a training by TRL. The last lines show that a request would have been seen.
    """
    names = ("alpaca_eval", "ifeval", "mt_bench", "arena_hard", "open_llm")
    evaluations = [f"results/tiny/iter1/{name}.json" for name in names]
    snakemake(clone, RESULT, "results/tiny/by_trl/iter1/policy", *evaluations)
    assert network.asked == []
    fetch = ["src/tools/fetch_alpaca_eval.py", "reference", "--output", str(tmp_path / "x.json")]
    environment = ENVIRONMENT | {"HF_HOME": str(tmp_path), "PIP_NO_INDEX": "1"}
    done = subprocess.run([sys.executable, *fetch], cwd=clone[0], env=environment)
    assert done.returncode == 1
    assert any("tatsu-lab/alpaca_eval" in path for path in network.asked)
    network.asked.clear()


def test_records_name_the_inputs_that_the_rules_declare(clone):
    """Otherwise an artifact would depend on a file that Snakemake does not watch."""
    names = ("alpaca_eval", "against_previous", "ifeval", "mt_bench", "arena_hard", "measurements")
    targets = [f"results/tiny/iter2/{name}.json" for name in names]
    words = command(clone, "results/tiny/summary.md", *targets)
    words.insert(words.index("snakemake") + 1, "--detailed-summary")
    done = subprocess.run(words, cwd=clone[0], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # The record of a policy has its source instead. Preference models read the policy's chat
    # template alone. Questions are declared with all files of their folder.
    partly_recorded = {"base_policy", "annotate_preferences", "answer_mt_bench"}
    compared = set()
    for row in csv.DictReader(done.stdout.splitlines(), delimiter="\t"):
        file = record_path(clone[0] / row["output_file"])
        if not file.is_file() or row["rule"] == "embedded_policy":  # reads a Python package
            continue
        record = read_json(file)
        if record.get("rebuilt"):  # by a test before this one
            continue
        declared = set(row["input-file(s)"].split(","))
        read = set(record["inputs"])
        assert read <= declared, row["output_file"]
        if row["rule"] not in partly_recorded:
            not_read = {name for name in declared - read if not name.endswith(".record.json")}
            assert not not_read, row["output_file"]
        compared.add(row["rule"])
    assert {"sample_prompts", "generate_responses", "build_pairs", "train_policy"} <= compared


def test_paper_tables_show_the_measured_values(clone):
    snakemake(clone, "paper_tables")

    with (clone[0] / "results/tiny/tables/sppo_open_llm.csv").open(newline="") as stream:
        rows = {(row["row"], row["metric"]): row for row in csv.DictReader(stream)}
    ours = [row for row in rows.values() if row["ours"] != "-"]
    assert len(ours) == 7
    assert {row["comparable"] for row in ours} == {"other base model, other items"}


def test_report_is_one_file_with_all_results(clone):
    targets = [
        "results/tiny/summary.md",
        "results/tiny/figures/training.svg",
        "results/tiny/response_browser.html",
        "results/tiny/tables/all.html",
    ]
    snakemake(clone, *targets)

    page = (clone[0] / "results/tiny/response_browser.html").read_text()
    data = json.loads(
        re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.S)[1]
    )
    assert len(data["training"]) == 12
    assert len(data["evaluation"]) == 6
    words = command(clone, *targets)
    first_target = words.index("--")
    report_flags = ["--report", "results/tiny/report.html"]
    done = subprocess.run(
        [*words[:first_target], *report_flags, *words[first_target:]],
        cwd=clone[0],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = (clone[0] / "results/tiny/report.html").read_text()
    for name in ("win_rate.svg", "length.svg", "training.svg", "response_browser.html", "all.html"):
        assert name in report


def test_shard_count_changes_no_token_and_no_preference(clone):
    root = clone[0] / "results/tiny/iter1"

    def tables(shards: int):
        """The tokens of all responses, and the logits of all prompts."""
        tokens = {}
        logits = {}
        for shard in range(shards):
            for row in read_table(root / f"responses/{shard}.parquet", "responses"):
                tokens[row["prompt_id"], row["sample_id"]] = row["token_ids"]
            for row in read_table(root / f"preferences/{shard}.parquet", "preferences"):
                logits[row["prompt_id"]] = np.array(row["logits"])
        return tokens, logits

    tokens, logits = tables(2)

    snakemake(
        clone,
        "results/tiny/iter1/pairs.parquet",
        responses="{samples: 3, max_new_tokens: 12, batch_size: 18, shards: 1, precision: float32}",
    )

    other_tokens, other_logits = tables(1)
    assert other_tokens == tokens
    for prompt_id, other in other_logits.items():
        ours = logits[prompt_id]
        assert np.abs(win_probabilities(other) - win_probabilities(ours)).max() < 1e-4
        assert winner_and_loser(mean_logits(other)) == winner_and_loser(mean_logits(ours))


@pytest.mark.slow
def test_runs_with_their_own_data_are_trained(clone):
    """DICE, RA-DPO and SELM of config/config.yaml with small numbers: two iterations."""
    runs = ("dice", "ra_dpo", "selm")
    snakemake(clone, *(f"results/tiny/{run}/iter2/alpaca_eval.json" for run in runs))

    root = clone[0] / "results/tiny"
    pairs = {run: read_table(root / run / "iter2/pairs.parquet", "pairs") for run in runs}

    def chosen_by_prompt(pairs: list[dict]) -> list[str]:
        return [pair["chosen"] for pair in sorted(pairs, key=lambda pair: pair["prompt_id"])]

    # DICE adds the pairs of iteration 1 at the end of those of iteration 2.
    first = read_table(root / "dice/iter1/pairs.parquet", "pairs")
    assert chosen_by_prompt(pairs["dice"][-len(first) :]) == chosen_by_prompt(first)
    rewards = read_json(root / "dice/iter2/preferences/0.parquet.record.json")
    assert rewards["preference_model"].endswith(
        "log results/tiny/dice/iter1/policy/results/tiny/iter0/policy"
    )
    # RA-DPO trains on each pair and on its reverse.
    assert len(pairs["ra_dpo"]) % 2 == 0
    for pair, reverse in zip(pairs["ra_dpo"][::2], pairs["ra_dpo"][1::2]):
        assert pair["chosen"] == reverse["rejected"]
    # RA-DPO's prompts name a goal, so they have more tokens.
    ra_dpo = read_table(root / "ra_dpo/iter2/prompts.parquet", "prompts")
    selm = read_table(root / "selm/iter2/prompts.parquet", "prompts")
    assert [row["messages"] for row in ra_dpo] == [row["messages"] for row in selm]
    for row, plain in zip(ra_dpo, selm):
        assert len(row["prompt_token_ids"]) > len(plain["prompt_token_ids"])


@pytest.mark.slow
def test_runs_with_other_policies_are_trained(clone):
    """ONPO's auxiliary policy, TD-MNPO's earlier opponent and SPIN's prompts: two iterations."""
    runs = ("onpo", "mnpo", "spin")
    snakemake(clone, *(f"results/tiny/{run}/iter2/policy" for run in runs))

    root = clone[0] / "results/tiny"
    # The auxiliary policy goes on from the one before, and the policy from the auxiliary one.
    for made, start in (
        ("iter1/lookahead", root / "iter0/policy"),
        ("iter1/policy", root / "onpo/iter1/lookahead"),
        ("iter2/lookahead", root / "onpo/iter1/lookahead"),
        ("iter2/policy", root / "onpo/iter2/lookahead"),
    ):
        record = read_json(record_path(root / "onpo" / made))
        assert Path(record["arguments"]["policy"]) == start.relative_to(clone[0])
        assert record["step_0"]["log_ratio_per_token"] < 1e-3
    # The earlier opponent of iteration 2 is the base, which is the reference too.
    for shard in (0, 1):
        folder = root / "mnpo/iter2/logps"
        earlier = read_table(folder / f"earlier1/{shard}.parquet", "logps")
        assert earlier == read_table(folder / f"reference/{shard}.parquet", "logps")
        assert earlier != read_table(folder / f"current/{shard}.parquet", "logps")
    assert read_json(record_path(root / "mnpo/iter1/policy"))["arguments"]["history"] == [1]
    assert read_json(record_path(root / "mnpo/iter2/policy"))["arguments"]["history"] == [1, 1]
    first, second = (read_table(root / f"spin/iter{t}/prompts.parquet", "prompts") for t in (1, 2))
    assert first == second
