"""The kind `function`: a user's Python function as the preference model."""

from __future__ import annotations

import numpy as np
import pytest

import annotate_preferences
from sppo.core.artifacts import file_hash, read_json, record_path
from sppo.core.errors import UserError
from sppo.core.tables import read_table, write_table
from sppo.preferences.base import (
    Group,
    find_kind,
    kind_of,
    load_preference_model,
    settings_for,
)
from sppo.preferences.estimates import p_hat, win_probabilities
from sppo.preferences.function import FunctionModel
from sppo.workflow.configuration import resolve
from sppo.workflow.preflight import check_inputs

GROUPS = [Group("Say hi.", ["hi", "hello there", "hi"]), Group("Count.", ["one", "one, two"])]
LONGER = """
import numpy as np

def prefer(prompt, responses):
    lengths = np.array([len(response) for response in responses])
    return 0.5 + 0.4 * np.sign(lengths[:, None] - lengths[None, :])

def score(prompt, responses):
    return [len(response) / 10 for response in responses]
"""


@pytest.fixture
def model(tmp_path):
    """Write a module and load one of its functions."""

    def load(text: str, name: str = "prefer") -> FunctionModel:
        (tmp_path / "mine.py").write_text(text, encoding="utf-8")
        return load_preference_model(settings_for(f"{tmp_path}/mine.py:{name}"))

    return load


def test_another_model_of_a_forced_kind_is_one_line():
    with pytest.raises(
        UserError, match=r"preference.kind is function, but .* is ranker; give path"
    ):
        load_preference_model(settings_for("ranker", kind="function"))


def test_logits_give_the_probabilities_back(model):
    logits = model(LONGER).all_pair_logits(GROUPS)
    first, second = (win_probabilities(values) for values in logits)
    assert first == pytest.approx(np.array([[0.5, 0.1, 0.5], [0.9, 0.5, 0.9], [0.5, 0.1, 0.5]]))
    assert second == pytest.approx(np.array([[0.5, 0.1], [0.9, 0.5]]))
    assert p_hat(first) == pytest.approx([1.1 / 3, 2.3 / 3, 1.1 / 3])


def test_scores_give_bradley_terry_logits(model):
    (logits,) = model(LONGER, "score").all_pair_logits(GROUPS[1:])
    assert logits == pytest.approx(np.array([[0.0, -0.5], [0.5, 0.0]]))


def test_certain_preferences_stay_finite(model):
    text = "def prefer(prompt, responses):\n    return [[0.5, 1], [0, 0.5]]\n"
    (logits,) = model(text).all_pair_logits(GROUPS[1:])
    assert win_probabilities(logits)[0, 1] == pytest.approx(1, abs=1e-8)
    extreme = "def prefer(prompt, responses):\n    return [0, 1e6]\n"
    (logits,) = model(extreme).all_pair_logits(GROUPS[1:])
    assert np.isfinite(logits).all()


def test_asymmetric_probabilities_are_averaged_with_a_warning(model, capsys):
    text = "def prefer(prompt, responses):\n    return [[0.9, 0.8], [0.4, 0.1]]\n"
    (logits,) = model(text).all_pair_logits(GROUPS[1:])
    assert win_probabilities(logits)[0, 1] == pytest.approx(0.7)
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("warning: ")
    assert "1 of 1 prompts" in line
    assert "by up to 0.2" in line
    assert "warning" not in capsys.readouterr().err


def test_symmetric_probabilities_give_no_warning(model, capsys):
    model(LONGER).all_pair_logits(GROUPS)
    assert "warning" not in capsys.readouterr().err


def test_function_may_import_a_neighbouring_module(model, tmp_path):
    (tmp_path / "neighbour.py").write_text("WEIGHT = 2\n", encoding="utf-8")
    text = (
        "from neighbour import WEIGHT\n"
        "def prefer(prompt, responses):\n"
        "    return [WEIGHT * len(response) for response in responses]\n"
    )
    (logits,) = model(text).all_pair_logits([Group("p", ["a", "bbb"])])
    assert logits[1, 0] == pytest.approx(4)


def test_function_may_change_its_list_of_responses(model):
    text = (
        "def prefer(prompt, responses):\n"
        "    responses.reverse()\n"
        "    return [2 * len(response) for response in responses]\n"
    )
    groups = [Group("p", ["a", "bbb"])]
    (logits,) = model(text).all_pair_logits(groups)
    assert groups == [Group("p", ["a", "bbb"])]
    assert logits[0, 1] == pytest.approx(4)


BAD = {
    "exception": ("raise KeyError('x')", "p2: the function raised KeyError: 'x' .*mine.py, line 4"),
    "wrong shape": ("return [[0.5]]", r"p2: .* returned shape \(1, 1\); return \(2, 2\)"),
    "too few scores": ("return [1.0]", r"p2: .* returned shape \(1,\)"),
    "NaN": ("return [float('nan'), 0.0]", "p2: the function returned NaN or infinity"),
    "above 1": ("return [[0.5, 1.5], [0.5, 0.5]]", r"p2: .* returned 0.5 to 1.5"),
    "below 0": ("return [[0.5, -1], [1, 0.5]]", r"p2: .* returned -1 to 1"),
    "None": ("return None", r"p2: .* returned shape \(\)|p2: .* NaN|p2: .*no array"),
    "text": ("return 'first'", "p2: .* returned str, which is no array of numbers"),
}


@pytest.mark.parametrize(("body", "said"), BAD.values(), ids=BAD)
def test_wrong_result_is_a_one_line_error_with_the_prompt(body, said, tmp_path, program):
    text = (
        "def prefer(prompt, responses):\n"
        "    if prompt == 'First':\n"
        "        return [0, 1]\n"
        f"    {body}\n"
    )
    (tmp_path / "mine.py").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=said) as caught:
        annotate(tmp_path, program)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "preferences.parquet").exists()


def annotate(folder, program) -> None:
    """Run the program on two prompts with two responses each."""
    prompts, responses = [], []
    for name, text in (("p1", "First"), ("p2", "Second")):
        messages = [{"role": "user", "content": text}]
        prompts.append(
            {
                "prompt_id": name,
                "source": "test",
                "category": "c",
                "messages": messages,
                "prompt_token_ids": [1, 2],
            }
        )
        responses += [
            {
                "prompt_id": name,
                "sample_id": k,
                "seed": k,
                "prompt_token_ids": [1, 2],
                "token_ids": [3],
                "text": "x" * (k + 1),
                "finish_reason": "stop",
            }
            for k in range(2)
        ]
    write_table(folder / "prompts.parquet", prompts, "prompts")
    write_table(folder / "responses.parquet", responses, "responses")
    words = ("--prompts", folder / "prompts.parquet", "--responses", folder / "responses.parquet")
    out = folder / "preferences.parquet"
    program(annotate_preferences, *words, "--model", f"{folder}/mine.py:prefer", "--output", out)


def test_program_records_the_function_file_as_an_input(tmp_path, program):
    (tmp_path / "mine.py").write_text(LONGER, encoding="utf-8")
    annotate(tmp_path, program)
    record = read_json(record_path(tmp_path / "preferences.parquet"))
    assert record["inputs"][f"{tmp_path}/mine.py"] == file_hash(tmp_path / "mine.py")
    assert record["preference_model"] == f"{tmp_path}/mine.py:prefer"
    rows = read_table(tmp_path / "preferences.parquet", "preferences")
    assert win_probabilities(np.array(rows[0]["logits"]))[1, 0] == pytest.approx(0.9)


CONFIGURED = {
    "missing file": ("nowhere.py:prefer", "nowhere.py is missing"),
    "no such name": ("mine.py:refer", "mine.py defines no refer"),
    "not Python": ("broken.py:prefer", "broken.py is not Python"),
    "one argument": ("mine.py:alone", "alone of .*mine.py does not take two arguments"),
}


@pytest.mark.parametrize(("model", "said"), CONFIGURED.values(), ids=CONFIGURED)
def test_configuration_check_finds_mistakes(model, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        LONGER + "\ndef alone(responses):\n    return []\n", encoding="utf-8"
    )
    (tmp_path / "broken.py").write_text("def prefer(", encoding="utf-8")
    run = resolve({"preference": {"model": model}})[""]
    with pytest.raises(UserError, match=f"config: preference.model.*{said}"):
        check_inputs("", run)


def test_failing_import_is_a_one_line_error(model):
    with pytest.raises(UserError, match="mine.py cannot be imported .ZeroDivisionError"):
        model("1 / 0\ndef prefer(prompt, responses):\n    return []\n")


def test_file_and_name_select_a_function():
    for name in ("a.py:f", "a folder/b.py:g_1"):
        assert find_kind(settings_for(name)) is FunctionModel
    for name in ("a.py", "a.py:", "a:f", "a.py:1f", "ranker", "org/model"):
        assert find_kind(settings_for(name)) is not FunctionModel


GOOD = {
    "tensor with a gradient": "import torch\nW = torch.ones(1, requires_grad=True)\n"
    "def prefer(p, r):\n    return torch.tensor([0.0, 1.0]) * W\n",
    "bfloat16 tensor": "import torch\n"
    "def prefer(p, r):\n    return torch.tensor([0, 1], dtype=torch.bfloat16)\n",
    "dataclass": "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    "@dataclass\nclass Scale:\n    by: float = 1.0\n"
    "def prefer(p, r):\n    return [0.0, Scale().by]\n",
    "late import": "def prefer(p, r):\n    from late_neighbour import ONE\n    return [0, ONE]\n",
    "name in a condition": "if True:\n    def prefer(p, r):\n        return [0, 1]\n",
    "name in a tuple": "prefer, other = (lambda p, r: [0, 1]), None\n",
    "name with a type": "prefer: object = lambda p, r: [0, 1]\n",
    "star import": "from late_neighbour import *\n",
    "NaN on the diagonal": "from math import nan\n"
    "def prefer(p, r):\n    return [[nan, 0.26894142], [0.73105858, nan]]\n",
}


@pytest.mark.parametrize("text", GOOD.values(), ids=GOOD)
def test_usual_python_is_accepted(text, model, tmp_path):
    neighbour = "ONE = 1\ndef prefer(p, r):\n    return [0, ONE]\n"
    (tmp_path / "late_neighbour.py").write_text(neighbour, encoding="utf-8")
    (logits,) = model(text).all_pair_logits(GROUPS[1:])
    assert logits[1, 0] == pytest.approx(1.0, abs=1e-6)


def test_modules_beside_the_file_are_inputs_too(tmp_path):
    (tmp_path / "a.py").write_text("import b, numpy\n", encoding="utf-8")
    (tmp_path / "b.py").write_text("from c.d import x\n", encoding="utf-8")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "d.py").write_text("from a import y\n", encoding="utf-8")
    files = FunctionModel.files(f"{tmp_path}/a.py:f")
    assert files == [tmp_path / "a.py", tmp_path / "b.py", tmp_path / "c" / "d.py"]


@pytest.mark.parametrize("text", ["async def prefer(p, r): ...", "class prefer: ...", "prefer = 3"])
def test_what_is_no_function_is_found_with_the_configuration(text, tmp_path):
    (tmp_path / "mine.py").write_text(text + "\n", encoding="utf-8")
    settings = settings_for(f"{tmp_path}/mine.py:prefer")
    with pytest.raises(UserError, match="prefer of .*mine.py is no function; define it with def"):
        FunctionModel.check(settings, "preference.model")


def test_function_that_exits_is_one_line(model):
    with pytest.raises(UserError, match="the function raised SystemExit: 0"):
        model("import sys\ndef prefer(p, r):\n    sys.exit(0)\n").all_pair_logits(GROUPS)
    with pytest.raises(UserError, match="mine.py cannot be imported .SystemExit"):
        model("import sys\nsys.exit(0)\ndef prefer(p, r): ...\n")


@pytest.mark.parametrize(
    "model", ["mine.py:prefer", "ranker", "verifiable", "http://localhost:8000", "openai:m"]
)
def test_only_pairrm_runs_with_llm_blender(model):
    settings = settings_for(model, backend="llm_blender")
    with pytest.raises(UserError, match="preference.backend is llm_blender, which runs PairRM"):
        kind_of(settings)
    kind_of(settings | {"model": "llm-blender/PairRM"})
