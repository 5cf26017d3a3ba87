"""No file beside the base policy makes writing a card, and so training, fail."""

from __future__ import annotations

import pytest
import yaml

from sppo.core.artifacts import record_path, write_json
from sppo.reporting.cards import CONSTRUCTIONS, data_of, header, model_card


def card(folder):
    """Header of the card that this base folder gives, after a check of the card's text."""
    text = model_card(folder, "A title", {"Method": "words"}, tag="t")
    text.encode("utf-8")
    assert text.startswith("---\n")
    assert "# A title" in text
    assert "words" in text
    return yaml.safe_load(text.split("---\n")[1])


def test_a_valid_header_passes_its_licence_on(tmp_path):
    (tmp_path / "README.md").write_bytes(
        b"\xef\xbb\xbf---\nlicense: mit\nbase_model: org/base\n---\n# Base\n"
    )
    assert card(tmp_path)["license"] == "mit"
    assert card(tmp_path)["base_model"] == "org/base"


def test_a_card_that_is_not_utf_8_is_read_as_far_as_possible(tmp_path):
    text = "---\nlicense: mit\nlicense_name: Lizenz f\u00fcr alle\n---\n# Gr\u00fc\u00dfe\n"
    (tmp_path / "README.md").write_bytes(text.encode("latin-1"))
    assert card(tmp_path)["license"] == "mit"


@pytest.mark.parametrize(
    "text",
    [
        b"---\nlicense: [mit\n---\n",
        b"---\nlicense: @mit\n---\n",
        b"---\n- a list\n---\n",
        b"---\njust words\n---\n",
        b"---\n\t: x\n---\n",
        b"---\n",
        b"",
        b"---\ndate: 2024-99-99\n---\n",
        b"---\n? [a]\n: b\n---\n",
        b"---\n? {a: b}\n: c\n---\n",
        b"---\nx: !!python/object:os.system {}\n---\n",
        b"\xff\xfe\x00\x00",
        b"---\nlicense: " + b"[" * 5000 + b"\n---\n",
    ],
)
def test_a_broken_header_counts_as_no_header(tmp_path, text):
    (tmp_path / "README.md").write_bytes(text)
    assert header(tmp_path) == {}
    assert card(tmp_path)["base_model"] == "a model without a record"


@pytest.mark.parametrize("value", ['"\\ud800"', "[a, b]", "&a [*a]", "2024-01-01", "null", "1"])
def test_odd_header_values_are_no_error(tmp_path, value):
    (tmp_path / "README.md").write_text(f"---\nlicense: {value}\nbase_model: {value}\n---\n")
    card(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"stage": "policy_source"}',
        '{"inputs": ["x"], "arguments": {}}',
        '{"inputs": 3}',
        '{"stage": "policy_source", "arguments": null}',
    ],
)
def test_a_broken_record_is_no_error(tmp_path, content):
    for name in ("policy", "pairs.parquet"):
        record_path(tmp_path / name).write_text(content)
    (tmp_path / "policy").mkdir()
    card(tmp_path / "policy")
    assert data_of(tmp_path / "pairs.parquet") == "No record of the pairs was found."


def test_the_record_of_the_base_model_gives_its_name(tmp_path):
    (tmp_path / "policy").mkdir()
    write_json(
        record_path(tmp_path / "policy"),
        {"sha256": "0", "stage": "policy_source", "arguments": {"model": "org/base"}},
    )
    assert card(tmp_path / "policy")["base_model"] == "org/base"


@pytest.mark.parametrize(
    ("more", "shown"),
    [
        ({}, ""),  # a record of code without this key
        ({"labels": "annotated"}, ""),
        ({"labels": "permuted"}, ", with permuted labels (a control)"),
    ],
)
def test_card_says_that_labels_are_a_control(more, shown, tmp_path):
    options = {"construction": "all", "even_lengths": False, "target_reward": False} | more
    pairs = tmp_path / "pairs.parquet"
    record = {"stage": "select", "sha256": "", "inputs": {}, "replayed": 0, "arguments": options}
    write_json(record_path(pairs), record)
    assert data_of(pairs) == f"* in pairs: {CONSTRUCTIONS['all']}{shown}"


@pytest.mark.parametrize(
    ("model", "shown"),
    [
        ("llm-blender/PairRM", "llm-blender/PairRM"),
        ("secret/prefer.py:short", "prefer.py:short"),
        ("/home/me/prefer.py:short", "prefer.py:short"),
    ],
)
def test_card_names_the_preference_model_without_its_folder(model, shown, tmp_path):
    compared = tmp_path / "preferences.parquet"
    write_json(
        record_path(compared), {"stage": "annotate", "sha256": "", "arguments": {"model": model}}
    )
    pairs = tmp_path / "pairs.parquet"
    inputs = {str(compared): ""}
    write_json(record_path(pairs), {"stage": "select", "sha256": "", "inputs": inputs})
    assert data_of(pairs) == f"* compared by the preference model {shown}"
