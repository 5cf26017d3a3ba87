"""The scores of the Open LLM tasks from lm-eval's results, as worked out by hand."""

from __future__ import annotations

import pytest

import evaluate_open_llm


def lm_eval_results() -> dict:
    """Two subjects of MMLU with 10 and 90 items; the other tasks have 50 each."""
    found = {
        "mmlu_law": (0.5, 0.1, 10),
        "mmlu_art": (0.3, 0.05, 90),
        **{name: (0.4, 0.02, 50) for name in evaluate_open_llm.TASKS if name != "mmlu"},
    }
    results, sizes = {}, {}
    for task, (score, error, size) in found.items():
        name = "mmlu" if task.startswith("mmlu") else task
        metric = evaluate_open_llm.TASKS[name][1]
        results[task] = {metric: score, metric.replace(",", "_stderr,"): error}
        sizes[task] = {"effective": size}
    return {"results": results, "n-samples": sizes}


def test_mmlu_is_weighted_by_the_size_of_its_subjects():
    found = evaluate_open_llm.summary(lm_eval_results())
    assert found["mmlu"] == pytest.approx(100 * (0.5 * 10 + 0.3 * 90) / 100)
    assert found["mmlu_unweighted"] == pytest.approx(40)
    assert found["n"]["mmlu"] == 100
    error = ((0.1 * 10) ** 2 + (0.05 * 90) ** 2) ** 0.5  # of a sum over 100 items, in per cent
    assert found["stderr"]["mmlu"] == pytest.approx(error)
    assert found["average"] == pytest.approx((5 * 40 + 32) / 6)
    assert found["stderr"]["average"] == pytest.approx((5 * 2**2 + error**2) ** 0.5 / 6)


def test_a_missing_error_is_none():
    results = lm_eval_results()
    results["results"]["mmlu_law"]["acc_stderr,none"] = "N/A"
    errors = evaluate_open_llm.summary(results)["stderr"]
    assert errors["mmlu"] is None and errors["average"] is None
    assert errors["gsm8k"] == pytest.approx(2)
