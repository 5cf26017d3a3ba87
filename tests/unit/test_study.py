"""The study: its plan, its rows, its page, and the measurements of each policy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from training_runs import make_pairs

import measure_policy
import plot_overoptimisation
import run_study
import tabulate_study
from sppo.core.artifacts import json_lines, read_json, read_record
from sppo.core.config_files import read_files
from sppo.core.errors import UserError
from sppo.core.tables import write_table
from sppo.policies.models import load_policy
from sppo.workflow.configuration import resolve
from sppo.workflow.study_plan import Training, read_plan

ROOT = Path(__file__).resolve().parents[2]
PLANS = [ROOT / "config/study.yaml", ROOT / "config/overoptimisation.yaml"]


# --- the plan ---


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.stem)
def test_shipped_plan_names_runs_that_exist(plan, monkeypatch):
    monkeypatch.chdir(ROOT)
    planned = read_plan(plan)
    assert len({training.key for training in planned}) == len(planned)
    runs = {config: resolve(read_files([config])) for config in {one.config for one in planned}}
    for training in planned:
        settings = runs[training.config]["" if training.run == "main" else training.run]
        assert settings["iterations"] >= training.iterations


def test_study_has_five_seeds_of_main_and_its_controls(monkeypatch):
    monkeypatch.chdir(ROOT)
    planned = read_plan(PLANS[0])
    seeds = {(one.run, one.seed) for one in planned if "few_steps" in one.config}
    for control in ("main", "permuted", "flipped", "sft"):
        assert {seed for name, seed in seeds if name == control} == {1, 2, 3, 4, 5}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[", "cannot be read"),
        ("a: 1", "entry 1: give a list of"),
        ("- {config: c.yaml, runs: main, seeds: 1, iterations: 1}", "entry 1: give a list of"),
        ("- {config: c.yaml, runs: [main], seeds: x, iterations: 1}", "entry 1: give a list of"),
        ("- {config: 5, runs: [main], seeds: 1, iterations: 1}", "entry 1: give a list of"),
        ("- {config: nowhere.yaml, runs: [main], seeds: 1, iterations: 1}", "nowhere.yaml is miss"),
    ],
)
def test_a_wrong_plan_is_one_line(text, reason, tmp_path):
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(UserError, match=reason):
        read_plan(tmp_path / "plan.yaml")


# --- running it ---


def finished(training: Training, rate: float) -> None:
    """Write what Snakemake makes for a run of the study."""
    folders = [training.folder / f"iter{t}" for t in range(1, training.iterations + 1)]
    if training.run == "main":
        folders.append(training.folder / "iter0")
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        won = rate + folder.name.count("3")
        contents = {
            "alpaca_eval.json": {
                "win_rate": won,
                "length_controlled_winrate": won - 1,
                "avg_length": 80,
            },
            "against_previous.json": {"win_rate": 51.0},
            "ranker_estimate.json": {"win_rate": 61.0},
            "ifeval.json": {"prompt_strict": 40.0, "instruction_strict": 60.0},
            "alpaca_eval_annotations.json": [{"preference": 1.25}, {"preference": 2.0}],
            "measurements.json": {
                **dict.fromkeys(("log_ratio_chosen", "winners_raised", "order_right"), 0.5),
                **dict.fromkeys(("log_ratio_rejected", "slope", "eta", "r_squared", "kl"), 0.25),
            },
        }
        for name, content in contents.items():
            (folder / name).write_text(json.dumps(content))
        step = {"log_ratio_chosen": -1.0, "log_ratio_rejected": -2.0}
        (folder / "train_log.jsonl").write_text(json.dumps(step) + "\n")
        (folder / "policy").mkdir(exist_ok=True)


@pytest.fixture
def study(tmp_path, monkeypatch, program):
    """Run the study on a small plan, with Snakemake replaced; returns the runs that were made."""
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text("{}")
    Path("plan.yaml").write_text(
        "- {config: small.yaml, runs: [main, dpo], seeds: 2, iterations: 3}\n"
        "- {config: small.yaml, runs: [ipo], seeds: 1, iterations: 1}\n"
    )
    made: list[tuple] = []
    fails: set[str] = set()

    def make(training: Training) -> None:
        if training.run in fails:
            raise UserError(f"{training.run} failed")
        made.append(training.key)
        finished(training, 60.0 + len(made))

    monkeypatch.setattr(run_study, "make", make)
    monkeypatch.setattr(run_study, "round_robin", lambda folders, judge: [[50.0]] * len(folders))

    def call(*words: object) -> list[tuple]:
        made.clear()
        program(run_study, "--plan", "plan.yaml", "--rows", "rows.jsonl", *words)
        return list(made)

    call.fails = fails
    return call


def test_each_run_is_made_once_and_has_a_row(study):
    keys = [("small", name, seed) for seed in (1, 2) for name in ("main", "dpo")]
    assert study() == [*keys, ("small", "ipo", 1)]
    rows = json_lines(Path("rows.jsonl"))
    assert [run_study.key_of(row) for row in rows] == [*keys, ("small", "ipo", 1)]
    assert [len(row["iterations"]) for row in rows] == [3, 3, 3, 3, 1]
    assert rows[0]["base"]["preferences"] == [0.25, 1.0]
    assert rows[0]["iterations"][0]["log_ratios"] == [[-1.0, -2.0]]
    assert rows[0]["iterations"][0]["by_annotator"] == 61.0
    assert all(row["processor"] and row["cores"] for row in rows)
    assert not list(Path("results").iterdir())
    assert study("--output", "copy.jsonl") == []
    assert Path("copy.jsonl").read_bytes() == Path("rows.jsonl").read_bytes()
    assert read_record(Path("copy.jsonl"))


def test_a_failed_run_keeps_the_rows_before_it(study):
    study.fails.add("ipo")
    with pytest.raises(UserError, match="ipo failed"):
        study("--keep")
    assert len(json_lines(Path("rows.jsonl"))) == 4
    assert Path("results/study-small-1/iter3/alpaca_eval.json").exists()
    study.fails.clear()
    assert study() == [("small", "ipo", 1)]


def test_policies_are_deleted_as_soon_as_they_have_a_row(study):
    study.fails.add("ipo")
    with pytest.raises(UserError):
        study()
    folder = Path("results/study-small-1")  # ipo, which has no row, is of this seed
    assert not list(folder.glob("**/iter3/policy"))
    assert (folder / "iter0/policy").exists() and (folder / "iter3/alpaca_eval.json").exists()
    assert not Path("results/study-small-2").exists()


def test_no_run_starts_after_the_given_hours(study):
    assert study("--hours", "0", "--output", "copy.jsonl") == []
    assert not Path("copy.jsonl").exists()


def test_what_an_entry_needs_is_made_before_its_runs(monkeypatch):
    called = []
    monkeypatch.setattr(run_study, "forked", lambda where, words: called.append(words))
    needs = {"config": "gold.yaml", "targets": ["results/gold/rankers/200"]}
    training = Training("config/study/proxy_200.yaml", "dpo", 2, 1, needs)
    run_study.make(training)
    assert called[0] == ["--configfile", "gold.yaml", "--", "results/gold/rankers/200"]
    assert "name=study-proxy_200-2" in called[1]
    assert "results/study-proxy_200-2/dpo/iter1/measurements.json" in called[1]


def test_round_robin_compares_all_iterates_exactly(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    prompt = json_lines(ROOT / "data/instructions/sentence_held_out.jsonl")[0]["prompt"]
    folders = [tmp_path / f"iter{t}" for t in range(2)]
    for folder, output in zip(folders, ("", "Karaoke nights bring friends and songs together.")):
        folder.mkdir()
        answers = [{"instruction": prompt, "output": output, "generator": folder.name}]
        (folder / "alpaca_eval_outputs.json").write_text(json.dumps(answers))
    judge = run_study.judge_of("config/study/few_steps.yaml")
    assert judge["model"] == "verifiable"
    wins = run_study.round_robin(folders, judge)
    assert wins[1][0] > 80 and wins[0][1] == pytest.approx(100 - wins[1][0])
    assert wins[0][0] == wins[1][1] == 50


def test_judge_that_is_no_preference_model_is_refused(tmp_path, study):
    settings = "{judge: openai, judge_model: m, judge_base_url: 'http://localhost/v1'}"
    Path("small.yaml").write_text(f"alpaca_eval: {settings}")
    with pytest.raises(UserError, match="small.yaml: alpaca_eval.judge is openai, but the study"):
        study()
    Path("small.yaml").write_text(f"alpaca_eval: {settings.replace('openai', 'openai:m', 1)}")
    assert run_study.judge_of("small.yaml")["base_url"] == "http://localhost/v1"


def test_run_that_equals_main_does_not_disturb_the_others():
    """No test is possible for it."""
    rates = {"main": (60, 61, 62), "same": (60, 61, 62), "worse": (50, 51.1, 51.9)}
    rows = [row(run, seed, [rate]) for run in rates for seed, rate in enumerate(rates[run])]
    lines = tabulate_study.comparison_table(rows, planned=40).splitlines()[2:]
    cells = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in lines}
    assert cells["same"][-3:] == ["+0.0 [+0.0, +0.0]", "+0.0 to +0.0", "1"]
    assert cells["worse"][-3].startswith("-10.0 [")
    alone = tabulate_study.comparison_table(rows, planned=1).splitlines()[3]
    assert float(cells["worse"][-1]) == pytest.approx(
        20 * float(alone.strip("| ").split()[-1]), 0.1
    )


def test_rows_with_other_numbers_of_instructions_are_refused():
    found = [{"win_rate": 50.0, "preferences": [0.5] * n} for n in (3, 4)]
    with pytest.raises(UserError, match="different numbers of judged instructions"):
        tabulate_study.rates(found)


def test_reason_of_a_failed_job_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "wrong.yaml").write_text("iteration: 3\n")
    monkeypatch.chdir(ROOT)
    training = Training(str(tmp_path / "wrong.yaml"), "main", 1, 1)
    with pytest.raises(UserError, match="^wrong main 1: .*iteration") as error:
        run_study.make(training)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("target", ["study", "overoptimisation"])
def test_studies_are_targets_of_the_workflow(target):
    words = [sys.executable, "-m", "snakemake", "--cores", "1", "-n", target]
    shown = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "make_study_rows" in shown.stdout + shown.stderr


# --- the page ---


def row(name: str, seed: int, rates: list[float], regime: str = "few_steps") -> dict:
    noise = np.random.default_rng(seed).normal(0, 0.05, 200)
    noise -= noise.mean()

    def judged(rate: float) -> dict:
        return {
            "win_rate": rate,
            "prompt_strict": 40.0,
            "length": 80,
            "preferences": (rate / 100 + noise).tolist(),
        }

    measured = {"log_ratio_chosen": -1.0, "log_ratio_rejected": -4.0, "winners_raised": 0.25}
    measured |= {"order_right": 0.75, "slope": 0.5, "eta": 20.0, "r_squared": 0.3, "kl": 2.0}
    return {
        "regime": regime,
        "run": name,
        "seed": seed,
        "iterations": [
            {
                "iteration": t,
                **judged(rate),
                "against_previous": 55.0,
                "measurements": measured,
                "log_ratios": [[-1.0, -2.0], [-1.5, -3.0]],
            }
            for t, rate in enumerate(rates, 1)
        ],
        "base": judged(50.0),
        "processor": "a processor",
        "computed_in": "torch.bfloat16",
        "commit": "0123456789",
    }


@pytest.fixture
def page(tmp_path, program):
    def write(rows: list[dict]) -> str:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
        output = tmp_path / "study.md"
        program(tabulate_study, "--rows", tmp_path / "rows.jsonl", "--output", output)
        for figure in ("win_rates", "log_ratios"):
            assert (tmp_path / f"study_{figure}.svg").read_text().startswith("<?xml")
        return output.read_text()

    return write


def test_page_has_means_tests_and_measurements(page):
    rows = [row("main", seed, [60.0 + seed, 64.0 + seed, 66.0 + seed]) for seed in (1, 2, 3)]
    rows[0]["round_robin"] = [[50, 40, 30], [60, 50, 51], [70, 49, 50]]
    rows += [row("permuted", seed, [50.0 - seed, 50, 50 + seed / 10]) for seed in (1, 2, 3)]
    rows += [row("dpo", seed, [60.0 + 1.5 * seed]) for seed in (1, 2)]
    rows += [row("ipo", 1, [55.0], "bound")]
    text = page(rows)
    assert "| main | 1 | 3 | 62.0 [" in text and "61.0 to 63.0" in text
    assert "| base | 0 | 8 | 50.0 [" in text
    assert "The win rate rises in every iteration in 3 of 3 seeds." in text
    assert "p = 7.2e-05; 7.2e-05 is the smallest" in text  # 1 / (4!)^3
    # Without noise in the steps, only the seeds can make an interval.
    assert "| 1 to 2 | 3 | +4.0 [+4.0, +4.0] | +4.0 to +4.0 |" in text
    # main - permuted after iteration 3: 67 - 50.1 = 16.9, and so on.
    assert "1 does best against the last one, and beats it in 51.0%." in text
    assert "| permuted | 3 | 3 | -17.8 [" in text
    assert "| dpo | 1 | 2 | +0.8 [" in text and "+0.5 to +1.0 |" in text
    assert "| main | 3 | 3 | -1.0 | -4.0 | 25 | 75 | 10.0 | 0.30 | 2.0 |" in text
    assert "No other run has two seeds yet." in text


def two_way(spread: float, seeds: int, draw: np.random.Generator) -> np.ndarray:
    """Preferences of mean 0.6 with effects of seeds (`spread`) and of 60 instructions."""
    effects = draw.normal(0, spread, (seeds, 1)) + draw.normal(0, 0.1, (1, 60))
    return 0.6 + effects + draw.normal(0, 0.15, (seeds, 60))


def test_error_is_that_of_a_two_way_analysis_of_variance():
    """Computed here from sums of squares. The expected value is the sum of three variances."""
    values = two_way(0.1, 4, np.random.default_rng(0))
    found = tabulate_study.estimated(values)
    total = (values**2).sum()
    correction = values.sum() ** 2 / 240
    seeds = (values.sum(axis=1) ** 2).sum() / 60 - correction
    instructions = (values.sum(axis=0) ** 2).sum() / 4 - correction
    residual = (total - correction - seeds - instructions) / (3 * 59)
    variance = (seeds / 3 + instructions / 59 - residual) / 240
    assert found.error == pytest.approx(100 * variance**0.5)
    assert found.mean == pytest.approx(100 * values.mean())
    assert 3 < found.freedom < 10  # nearly all of the error is from four seeds


@pytest.mark.parametrize("spread", [0, 0.02, 0.06])
def test_interval_has_the_true_mean_in_95_of_100_cases(spread):
    draw = np.random.default_rng(1)
    intervals = [tabulate_study.estimated(two_way(spread, 5, draw)).interval() for _ in range(400)]
    assert 0.92 < np.mean([low < 60 < high for low, high in intervals]) < 0.98


def test_one_seed_has_the_error_of_its_instructions():
    values = np.random.default_rng(0).normal(0.6, 0.1, (1, 300))
    found = tabulate_study.estimated(values)
    assert found.interval() == pytest.approx(
        (100 * values.mean() - 1.14, 100 * values.mean() + 1.14), abs=0.1
    )


def test_holm_corrects_as_worked_out_by_hand():
    p_values = [0.01, 0.04, 0.03, 0.6]
    assert tabulate_study.holm(p_values, 4) == pytest.approx([0.04, 0.09, 0.09, 0.6])
    # Two more runs of the plan are not made yet.
    assert tabulate_study.holm(p_values, 6) == pytest.approx([0.06, 0.16, 0.15, 1.0])
    assert tabulate_study.holm([], 3) == []


def test_plan_fixes_the_number_of_comparisons(monkeypatch):
    monkeypatch.chdir(ROOT)
    planned = tabulate_study.planned_runs(PLANS[0])
    assert planned["bound"] == 16 and planned["laptop"] == 1
    assert planned["few_steps_float32"] == 0


def test_a_page_without_rows_is_refused(tmp_path, program):
    with pytest.raises(UserError, match="has no rows"):
        program(tabulate_study, "--rows", tmp_path / "none.jsonl", "--output", tmp_path / "a.md")


def test_overoptimisation_has_gold_and_proxy_rates(tmp_path, program):
    rows = [row("main", 1, [60.0, 62.0], regime) for regime in ("proxy_200", "few_steps")]
    rows.append(row("dpo", 1, [59.0, 58.0], "proxy_200"))
    for each in rows:
        for iteration in each["iterations"]:
            iteration |= {"by_annotator": 75.0}
            iteration["measurements"] = {"kl": 4.0, "kl_standard_error": 0.5}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    output = tmp_path / "page.md"
    program(plot_overoptimisation, "--rows", tmp_path / "rows.jsonl", "--output", output)
    text = output.read_text()
    assert "| proxy of 200 comparisons | sppo | 1 | 2 | 62.0 | 75.0 | 4.0 ± 0.5 |" in text
    assert "| gold annotators | sppo | 1 | 1 | 60.0 |" in text
    assert (tmp_path / "page.svg").read_text().startswith("<?xml")


# --- the measurements ---


def test_exact_targets_have_slope_1_and_no_intercept():
    pairs = [
        {"p_hat_chosen": 0.8, "p_hat_rejected": 0.3},
        {"p_hat_chosen": 0.7, "p_hat_rejected": 0.1},
    ]
    ratios = [
        {end: 20 * (pair[f"p_hat_{end}"] - 0.5) for end in ("chosen", "rejected")} for pair in pairs
    ]
    found = measure_policy.realised(pairs, ratios, 20)
    assert (found["slope"], found["r_squared"]) == pytest.approx((1, 1))
    assert found["intercept"] == pytest.approx(0, abs=1e-12)
    assert (found["winners_raised"], found["order_right"]) == (1, 1)
    half = [{end: value / 2 - 1 for end, value in each.items()} for each in ratios]
    found = measure_policy.realised(pairs, half, 20)
    assert (found["slope"], found["intercept"]) == pytest.approx((0.5, -1))


def test_kl_is_the_mean_log_ratio_with_its_standard_error():
    found = measure_policy.distance(np.array([1.0, 2.0, 3.0]))
    assert found == pytest.approx({"kl": 2.0, "kl_standard_error": 3**-0.5})


@pytest.fixture
def measure(tmp_path, tiny_policy, program):
    def call(policy: Path) -> dict:
        pairs = make_pairs(5)
        model = load_policy(tiny_policy, torch.float64, "cpu")

        def logp(pair: dict, end: str) -> float:
            ids = torch.tensor([pair["prompt_token_ids"] + pair[f"{end}_token_ids"]])
            with torch.inference_mode():
                logps = model(ids).logits[0].log_softmax(-1)
            start = len(pair["prompt_token_ids"])
            tokens = pair[f"{end}_token_ids"]
            return sum(logps[start + i - 1, token].item() for i, token in enumerate(tokens))

        logps = [
            {"pair_id": pair["pair_id"]}
            | {f"{end}_logp": logp(pair, end) for end in ("chosen", "rejected")}
            for pair in pairs
        ]
        prompts = [
            {
                "prompt_id": f"p{i}",
                "category": "",
                "messages": [{"role": "user", "content": "a"}],
                "prompt_token_ids": [5, 6, 7],
                "source": "s",
            }
            for i in range(4)
        ]
        for name, rows in (("pairs", pairs), ("logps", logps), ("prompts", prompts)):
            write_table(tmp_path / f"{name}.parquet", rows, name)
        words = ("--pairs", tmp_path / "pairs.parquet", "--current", tmp_path / "logps.parquet")
        words += ("--policy", policy, "--prompts", tmp_path / "prompts.parquet")
        words += ("--base", tiny_policy, "--output", tmp_path / "out.json", "--iteration", 1)
        words += ("--max-new-tokens", 6, "--batch-size", 4, "--micro-batch-size", 2)
        program(measure_policy, *words, "--device", "cpu", "--precision", "float32")
        return read_json(tmp_path / "out.json")

    return call


def test_a_policy_that_is_the_base_has_moved_nothing(measure, tiny_policy):
    found = measure(tiny_policy)
    assert found["pairs"] == 5
    for key in ("log_ratio_chosen", "log_ratio_rejected", "intercept", "kl"):
        assert found[key] == pytest.approx(0, abs=1e-3), key


def test_another_policy_has_a_positive_distance(measure, tiny_policy, tmp_path):
    import shutil

    shutil.copytree(tiny_policy, tmp_path / "policy")
    model = load_policy(tmp_path / "policy", torch.float32, "cpu")
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    model.save_pretrained(tmp_path / "policy")
    found = measure(tmp_path / "policy")
    assert found["kl"] > 0.1
    assert abs(found["log_ratio_chosen"]) > 0.1
