"""Several preference models at once: the weighted mean, what is kept, and wrong files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import annotate_preferences
from sppo.core.artifacts import read_json, record_path
from sppo.core.errors import UserError
from sppo.core.tables import read_table, write_table
from sppo.preferences.base import find_kind, kind_of, load_preference_model, settings_for
from sppo.preferences.estimates import condorcet_winner, cyclic_triples, win_probabilities
from sppo.preferences.population import Population, agreement

FUNCTIONS = """
import numpy as np

ORDERS = {"one": "abc", "two": "bca", "three": "cab"}

def by_order(order):
    def prefer(prompt, responses):
        places = np.array([order.index(text) for text in responses])
        return np.where(
            places[:, None] == places, 0.5, np.where(places[:, None] < places, 0.9, 0.1)
        )
    return prefer

one, two, three = (by_order(order) for order in ORDERS.values())
"""


@pytest.fixture
def population(tmp_path, tiny_policy):
    """Write a population's file, and load it; a function of its entries."""
    (tmp_path / "mine.py").write_text(FUNCTIONS)

    def load(*entries: str) -> Population:
        lines = [f"  - {{{entry.format(file=tmp_path / 'mine.py')}}}\n" for entry in entries]
        (tmp_path / "several.yaml").write_text("models:\n" + "".join(lines))
        return load_preference_model(settings_for(str(tmp_path / "several.yaml")), tiny_policy)

    return load


def test_p_is_the_weighted_mean(population):
    model = population('model: "{file}:one", weight: 3', 'model: "{file}:two"')
    P = win_probabilities(model.pair_logits("Hi", ["a", "b", "c"]))
    one = np.array([[0.5, 0.9, 0.9], [0.1, 0.5, 0.9], [0.1, 0.1, 0.5]])
    two = np.array([[0.5, 0.1, 0.1], [0.9, 0.5, 0.9], [0.9, 0.1, 0.5]])
    np.testing.assert_allclose(P, 0.75 * one + 0.25 * two, atol=1e-9)
    for expected, found in zip((one, two), model.members.values(), strict=True):
        np.testing.assert_allclose(found[0], expected, atol=1e-9)


def test_three_annotators_make_a_cycle(population):
    """Condorcet's paradox: each one's preferences are transitive, those of the mean are not."""
    model = population(*(f'model: "{{file}}:{name}"' for name in ("one", "two", "three")))
    P = [win_probabilities(model.pair_logits("Hi", ["a", "b", "c"]))]
    assert cyclic_triples(P) == 1
    assert condorcet_winner(P) == 0
    for found in model.members.values():
        assert condorcet_winner(found) == 1


def test_agreement_leaves_ties_out():
    P = [np.array([[0.5, 0.9, 0.5], [0.1, 0.5, 0.8], [0.5, 0.2, 0.5]])]
    Q = [np.array([[0.5, 0.6, 0.6], [0.4, 0.5, 0.3], [0.4, 0.7, 0.5]])]
    assert agreement({"a": P, "b": Q}) == {"a / b": 1 / 2}
    assert agreement({"a": [np.full((2, 2), 0.5)], "b": [np.eye(2)]}) == {"a / b": None}


def test_matrices_and_agreement_are_kept(population, program, tmp_path, tiny_policy):
    population('model: "{file}:one"', 'model: "{file}:two"')
    prompts = [
        {
            "prompt_id": "p",
            "category": "",
            "messages": [{"role": "user", "content": "Hi"}],
            "prompt_token_ids": [1],
            "source": "test",
        }
    ]
    responses = [
        {
            "prompt_id": "p",
            "sample_id": k,
            "seed": k,
            "prompt_token_ids": [1],
            "token_ids": [2],
            "text": text,
            "finish_reason": "stop",
        }
        for k, text in enumerate("abc")
    ]
    write_table(tmp_path / "prompts.parquet", prompts, "prompts")
    write_table(tmp_path / "responses.parquet", responses, "responses")
    output = tmp_path / "preferences.parquet"
    program(
        annotate_preferences,
        "--prompts",
        tmp_path / "prompts.parquet",
        "--responses",
        tmp_path / "responses.parquet",
        "--ranker-base",
        tiny_policy,
        "--model",
        tmp_path / "several.yaml",
        "--output",
        output,
    )
    assert read_table(output, "preferences")[0].keys() == {"prompt_id", "sample_ids", "logits"}
    (members,) = pq.read_table(output).column("members").to_pylist()
    assert [each["model"] for each in members] == [
        f"1 {tmp_path / 'mine.py'}:one",
        f"2 {tmp_path / 'mine.py'}:two",
    ]
    np.testing.assert_allclose(members[0]["P"][0], [0.5, 0.9, 0.9], atol=1e-9)
    record = read_json(record_path(output))
    assert list(record["agreement"].values()) == [pytest.approx(1 / 3)]
    assert str(tmp_path / "mine.py") in record["inputs"]


def test_a_population_is_told_from_other_yaml_files(tmp_path):
    (tmp_path / "several.yaml").write_text("models:\n  - {model: ranker}\n")
    (tmp_path / "annotators.yaml").write_text("instructions: [a.jsonl]\n")
    assert find_kind(settings_for(str(tmp_path / "several.yaml"))) is Population
    assert find_kind(settings_for(str(tmp_path / "annotators.yaml"))) is not Population


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models: []", "is no list of preference models; give `models:`"),
        ("models: ranker", "is no list of preference models"),
        ("models:\n- {model: ranker}\nweights: [1]", "is no list of preference models"),
        ("models:\n- ranker", "entry 1: give `models:`"),
        ("models:\n- {model: ranker, wieght: 2}", "entry 1: unknown key wieght"),
        ("models:\n- {model: ranker, weight: 0}", "entry 1: weight is 0; give a number above 0"),
        ("models:\n- {model: ranker, weight: .inf}", "entry 1: weight is inf; give a number"),
        ("models:\n- {model: ranker, implicit: true}", "entry 1: unknown key implicit"),
        ("models:\n- {model: ranker, kind: foo}", "entry 1: preference.kind"),
        ("models:\n- {model: 'openai:x', base_url: 5}", "entry 1: preference.base_url is 5"),
        ("models:\n- {model: ranker, concurrency: 0}", "entry 1: preference.concurrency is 0"),
        ("models:\n- {model: ranker, timeout: abc}", "entry 1: preference.timeout is 'abc'"),
        ("models:\n- {model: nowhere.py:f}", "entry 1: model: nowhere.py is missing"),
        ("models:\n- {model: nothing}", "entry 1: model is nothing; give"),
        (
            "models:\n- {model: Skywork/Skywork-Reward-V2-Qwen3-8B}",
            "entry 1: model is Skywork/Skywork-Reward-V2-Qwen3-8B, which is not fetched",
        ),
        ("models:\n- {model: several.yaml}", "entry 1: model is a population itself"),
        ("models:\n- {model: [", "cannot be read"),
    ],
)
def test_wrong_files_are_one_line(text, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("several.yaml").write_text(text)
    settings = settings_for("several.yaml")
    with pytest.raises(UserError) as caught:
        kind_of(settings).check(settings, "config: preference.model")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
