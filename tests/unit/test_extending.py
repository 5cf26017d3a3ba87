"""Every example of docs/extending.md, added to a copy of the repository and run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sppo.core.errors import UserError
from sppo.preferences.base import Group, PreferenceModel, compare, register

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\w+ (file|register)=(\S+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
PARTS = ("Snakefile", "rules", "src", "config", "data", "envs", "profiles")


@pytest.fixture(scope="module")
def extended(tmp_path_factory) -> Path:
    """The repository with all examples. Registrations are appended to their files."""
    folder = tmp_path_factory.mktemp("extended")
    for name in PARTS:
        source, target = ROOT / name, folder / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    for kind, name, text in BLOCKS:
        file = folder / name
        if kind == "file":
            assert not file.exists(), name
            file.write_text(text, encoding="utf-8")
        else:
            with file.open("a", encoding="utf-8") as stream:
                stream.write("\n" + text)
    (folder / "words.txt").write_text("tea\nleaves\n", encoding="utf-8")
    return folder


def run(folder: Path, *words: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(folder / "src")}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def planned(folder: Path, *words: str) -> str:
    return run(folder, "-m", "snakemake", "-n", "--cores", "2", "--printshellcmds", *words)


def test_page_has_the_three_examples_and_the_function():
    files = {name for kind, name, _ in BLOCKS if kind == "file"}
    registered = {name for kind, name, _ in BLOCKS if kind == "register"}
    assert len(files) == 6
    assert registered == {
        "src/sppo/preferences/__init__.py",
        "src/sppo/training/losses.py",
        "src/sppo/evaluation/registry.py",
    }


def test_function_of_the_page_compares(extended):
    code = (
        "from sppo.preferences.base import *\n"
        "model = load_preference_model(settings_for('prefer.py:short'))\n"
        "print(model.pair_logits('Hi', ['short', 'a much longer response'])[0, 1] > 0)"
    )
    assert run(extended, "-c", code).startswith("True\n")
    words = ("--configfile", "mine.yaml", "--", "results/mine/iter1/alpaca_eval.json")
    assert "--model prefer.py:short" in planned(extended, *words)


def test_kind_of_the_page_is_planned_and_compares(extended):
    words = ("--config", "preference={model: words.txt}", "name=kw")
    text = planned(extended, *words, "--", "results/kw/iter1/policy")
    assert "--model words.txt" in text
    code = (
        "from sppo.preferences.base import *\n"
        "model = load_preference_model(settings_for('words.txt'))\n"
        "print(model.pair_logits('Hi', ['tea leaves', 'tea', 'coffee']).tolist())"
    )
    assert json.loads(run(extended, "-c", code)) == [[0, 1, 2], [-1, 0, 1], [-2, -1, 0]]


def test_empty_list_of_words_is_one_line(extended):
    (extended / "none.txt").write_text("\n", encoding="utf-8")
    words = ("-n", "--cores", "1", "--config", "preference={model: none.txt}")
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", *words], cwd=extended, capture_output=True, text=True
    )
    line = "error: config: preference.model is none.txt, which has no words; add some"
    assert done.returncode == 1 and line in done.stderr.splitlines()


def test_loss_of_the_page_is_a_choice_and_is_computed(extended):
    words = ("--config", "train={loss: exponential, beta: 0.1}", "name=e")
    assert "--loss exponential" in planned(extended, *words, "--", "results/e/iter1/policy")
    code = (
        "import torch\n"
        "from sppo.core.config import default_of, schema\n"
        "from sppo.training.losses import pair_loss\n"
        "rules = schema()['properties']['train']['properties']\n"
        "options = {key: default_of(rule, 'paper') for key, rule in rules.items()}\n"
        "names = ('logp', 'reference', 'current', 'opponents', 'tokens', 'p_hat')\n"
        "pair = {f'{n}_{s}': torch.zeros(1) for n in names for s in ('chosen', 'rejected')}\n"
        "pair |= {'p_chosen_beats_rejected': torch.zeros(1), 'logp_chosen': torch.ones(1)}\n"
        "print(pair_loss('exponential', pair, options | {'beta': 1.0}).item())"
    )
    assert float(run(extended, "-c", code)) == pytest.approx(0.36788, abs=1e-5)


def test_evaluation_of_the_page_is_planned_with_its_settings(extended):
    words = ("--config", "diversity={words: 500}", "name=d")
    text = planned(extended, *words, "--", "results/d/iter1/diversity.json")
    assert "evaluate_diversity.py" in text and "--words 500" in text
    assert "results/iter3/diversity.json" in planned(extended, "everything")
    columns = "import tabulate_evaluations as t; print(t.HEAD[-1])"
    code = f"import sys; sys.path.insert(0, 'src/reporting'); {columns}"
    assert run(extended, "-c", code) == "different words\n"


def test_program_of_the_page_writes_its_result(extended):
    rows = [
        {"instruction": str(n), "output": text, "generator": "g"}
        for n, text in enumerate(("Tea, tea.", "tea leaves", "Leaves"))
    ]
    (extended / "outputs.json").write_text(json.dumps(rows), encoding="utf-8")
    words = ("--outputs", "outputs.json", "--output", "diversity.json")
    run(extended, "src/evaluation/evaluate_diversity.py", *words)
    found = json.loads((extended / "diversity.json").read_text(encoding="utf-8"))
    assert found == {"different": 80.0, "words": 5}


# --- a newcomer's mistakes ---


def refused(folder: Path, *words: str) -> str:
    """What a dry run prints that ends in an error."""
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "-n", "--cores", "1", *words],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def entry(extended):
    """Replaces a part of the registry's entry for the time of a test."""
    file = extended / "src/sppo/evaluation/registry.py"
    text = file.read_text(encoding="utf-8")

    def replace(old: str, new: str) -> None:
        head, mark, tail = text.rpartition(old)
        assert mark
        file.write_text(head + new + tail, encoding="utf-8")

    yield replace
    file.write_text(text, encoding="utf-8")


MISTAKES = {
    "no file of rules": ('"diversity",', '"variety",', "no file of rules, rules/variety.smk"),
    "unknown stage": ('"diversity",', '"diversity", stage="count",', "no stage count"),
    "setting without description": ('"description": "Number', '"note": "Number', "no description"),
    "column that is text": (
        'columns=(Column("different words", number("different")),),',
        'columns=("words",),',
        "columns is no tuple of Column",
    ),
    "questions that are trained on": (
        '"diversity",',
        '"diversity", check=lambda config, where: {"hello"},',
        'add HELD_OUT["diversity"]',
    ),
}


@pytest.mark.parametrize(("old", "new", "said"), MISTAKES.values(), ids=MISTAKES)
def test_mistake_in_an_evaluation_is_one_line(old, new, said, extended, entry):
    entry(old, new)
    assert said in refused(extended, "--config", "name=m", "--", "results/m/iter1/pairs.parquet")


def test_results_of_an_own_evaluation_are_verified(extended):
    (extended / "results/iter1").mkdir(parents=True)
    (extended / "results/iter1/diversity.json").write_text("{}")
    done = subprocess.run(
        [sys.executable, "src/tools/verify_results.py"],
        cwd=extended,
        capture_output=True,
        text=True,
    )
    assert "results/iter1/diversity.json: it has no record" in done.stdout
    shutil.rmtree(extended / "results")


class Fixed(PreferenceModel):
    """Returns what a test gives it."""

    kind, form, name = "fixed", "fixed", "fixed"

    @classmethod
    def recognises(cls, settings):
        return False

    def __init__(self, found):
        self.found = found

    def all_pair_logits(self, groups):
        return self.found


WRONG_LOGITS = {
    "list of lists of another shape": ([[[0.0]]], r"fixed, prompt p: .* shape \(1, 1\)"),
    "probabilities": ([[[0.5, 0.7], [0.3, 0.5]]], "these are probabilities; return their logits"),
    "NaN": ([[[0.0, float("nan")], [0.0, 0.0]]], "NaN or infinite"),
    "a group too few": ([], "compared 0 of 1 groups"),
}


@pytest.mark.parametrize(("found", "said"), WRONG_LOGITS.values(), ids=WRONG_LOGITS)
def test_wrong_logits_of_a_kind_are_one_line(found, said):
    with pytest.raises(UserError, match=said) as error:
        compare(Fixed(found), {"p": Group("Hi", ["a", "b"])})
    assert "\n" not in str(error.value)


def test_a_list_of_lists_is_taken():
    logits = compare(Fixed([[[0, 1], [-1, 0]]]), {"p": Group("Hi", ["a", "b"])})["p"]
    assert logits.dtype == float and logits.tolist() == [[0, 1], [-1, 0]]


def test_incomplete_or_repeated_kind_is_refused():
    with pytest.raises(UserError, match="there already is a preference model of kind function"):
        register(type("Mine", (Fixed,), {"kind": "function"}))
    with pytest.raises(UserError, match="Mine lacks kind, form, __init__, all_pair_logits, recog"):
        register(type("Mine", (PreferenceModel,), {}))
