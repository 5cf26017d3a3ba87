"""A preference model of the embedded form that learns from another one's comparisons."""

from __future__ import annotations

import json

import numpy as np
import pytest

import distil_ranker
from sppo.core.artifacts import read_json
from sppo.core.errors import UserError
from sppo.core.tables import write_table
from sppo.preferences.base import load_preference_model, settings_for
from sppo.preferences.embedded_data import instruction_hash
from sppo.preferences.estimates import logits_of

GOOD, BAD, MIDDLE = "This is fine!", "nothing nothing", "This is so."


@pytest.fixture
def distil(tmp_path, tiny_policy, program):
    """Train on 40 prompts whose teacher prefers GOOD to MIDDLE to BAD."""

    def call(*words: object, prompts: int = 40) -> dict:
        names = [f"p{i}" for i in range(prompts)]
        P = np.array([[0.5, 1.0, 1.0], [0.0, 0.5, 0.0], [0.0, 1.0, 0.5]])
        tables = {"prompts": [], "responses": [], "preferences": []}
        for name in names:
            tables["prompts"].append(
                {
                    "prompt_id": name,
                    "category": "",
                    "messages": [{"role": "user", "content": f"Say {name}"}],
                    "prompt_token_ids": [5],
                    "source": "s",
                }
            )
            for sample, text in enumerate((GOOD, BAD, MIDDLE)):
                tables["responses"].append(
                    {
                        "prompt_id": name,
                        "sample_id": sample,
                        "seed": 0,
                        "prompt_token_ids": [5],
                        "token_ids": [6],
                        "text": text,
                        "finish_reason": "stop",
                    }
                )
            logits = logits_of(P).tolist()
            tables["preferences"].append(
                {"prompt_id": name, "sample_ids": [0, 1, 2], "logits": logits}
            )
        for name, rows in tables.items():
            write_table(tmp_path / f"{name}.parquet", rows, name)
            words += (f"--{name}", tmp_path / f"{name}.parquet")
        program(distil_ranker, *words, "--base", tiny_policy, "--output", tmp_path / "adapter")
        return read_json(tmp_path / "adapter/ranker.json")

    return call


def test_student_learns_its_teachers_order(distil, tmp_path, tiny_policy):
    spec = distil("--epochs", 6)
    tested = [i for i in range(40) if int(instruction_hash(f"Say p{i}"), 16) % 5 == 0]
    assert spec["held_out"]["prompts"] == len(tested)
    assert spec["comparisons"] == 3 * (40 - len(tested))
    assert spec["held_out"]["agreement"] == spec["held_out"]["best"] == 1
    assert spec["held_out"]["prompts_without_condorcet_winner"] == 0
    model = load_preference_model(settings_for(str(tmp_path / "adapter")), tiny_policy, "cpu")
    logits = model.pair_logits("Say p3", [BAD, GOOD])
    assert logits[1, 0] > 0 > logits[0, 1]
    learned = (tmp_path / "adapter/training_instructions.txt").read_text().split()
    assert learned == sorted(instruction_hash(f"Say p{i}") for i in range(40) if i not in tested)


def test_number_of_comparisons_can_be_limited(distil):
    assert distil("--comparisons", 30, "--epochs", 1)["comparisons"] == 30
    with pytest.raises(UserError, match="lower --comparisons"):
        distil("--comparisons", 3000)


def test_the_same_seed_gives_the_same_adapter(distil, tmp_path):
    distil("--epochs", 1)
    first = (tmp_path / "adapter/adapter.safetensors").read_bytes()
    distil("--epochs", 1)
    assert (tmp_path / "adapter/adapter.safetensors").read_bytes() == first
    distil("--epochs", 1, "--seed", 2)
    assert (tmp_path / "adapter/adapter.safetensors").read_bytes() != first


def test_too_few_prompts_are_refused(distil):
    with pytest.raises(UserError, match="too few prompts"):
        distil(prompts=1)


def test_last_line_is_json_with_the_agreement(distil, capsys):
    spec = distil("--epochs", 1)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["best"] == spec["held_out"]["best"]
