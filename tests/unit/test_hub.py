"""The hub: what its errors say, the token, AlpacaEval's own files, pushing. Never the network."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import errors

import fetch_alpaca_eval
import push_policy
from sppo.core.artifacts import file_hash, read_json, record_path, write_json
from sppo.core.errors import UserError
from sppo.evaluation.alpaca_eval import DATASET_REVISION, DIFFICULTY, OFFICIAL_REFERENCE
from sppo.policies.models import fetch

# --- errors and the token ---


def http_error(kind: type) -> Exception:
    return kind(
        "401 Client Error",
        response=SimpleNamespace(
            headers={}, status_code=401, request=None, url="u", text="", json=dict
        ),
    )


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
    ids=["gated", "missing", "revision", "not cached", "offline", "silent", "else"],
)
def test_an_error_of_the_hub_says_what_to_do(error, words, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *args, **kwargs: (_ for _ in ()).throw(error)
    )
    with pytest.raises(UserError) as caught:
        fetch("org/model", None)
    assert (
        words in str(caught.value)
        and "org/model" in str(caught.value)
        and "give a local folder" in str(caught.value)
    )


def test_the_token_is_the_environment_s_and_none_that_lies_on_disk(monkeypatch):
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


# --- AlpacaEval's own files, from a local repository in the hub cache's layout ---


@pytest.fixture
def cached_alpaca_eval(tmp_path, monkeypatch) -> Path:
    """The folder of the pinned snapshot: 805 instructions and a file of difficulties that are taken for the published ones."""
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
    program(
        fetch_alpaca_eval,
        "--reference",
        folder / "reference.json",
        "--difficulty",
        folder / "df_gamed.csv",
    )


def test_alpaca_eval_s_files_come_from_the_local_cache_offline(
    program, cached_alpaca_eval, tmp_path
):
    fetch_both(program, tmp_path)
    assert len(read_json(tmp_path / "reference.json")) == 805
    for name in ("reference.json", "df_gamed.csv"):
        assert read_json(record_path(tmp_path / name))["commit"] == DATASET_REVISION


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / DIFFICULTY).write_text("other\n"), "another sha256"),
        (
            lambda folder: (folder / DIFFICULTY).unlink(),
            "cannot get df_gamed.csv of tatsu-lab/alpaca_eval",
        ),
        (
            lambda folder: (folder / OFFICIAL_REFERENCE).write_text(
                json.dumps(read_json(folder / OFFICIAL_REFERENCE)[::-1])
            ),
            "in their order",
        ),
        (
            lambda folder: (folder / OFFICIAL_REFERENCE).write_text(
                (folder / OFFICIAL_REFERENCE).read_text().replace("gpt4_1106_preview", "gpt5")
            ),
            "is by gpt5",
        ),
    ],
    ids=["other difficulties", "not cached", "other order", "other generator"],
)
def test_other_files_than_the_published_ones_are_one_line_and_nothing_is_written(
    damage, words, program, cached_alpaca_eval, tmp_path
):
    damage(cached_alpaca_eval)
    with pytest.raises(UserError) as caught:
        fetch_both(program, tmp_path)
    assert (
        words in str(caught.value)
        and not list(tmp_path.glob("*.json"))
        and not list(tmp_path.glob("*.csv"))
    )


# --- pushing ---


class Api:
    """What push_policy asks of huggingface_hub.HfApi, kept instead of sent."""

    calls: list[tuple] = []

    def __init__(self, token):
        self.calls.append(("token", token))

    def create_repo(self, repo_id, private, exist_ok):
        self.calls.append(("create", repo_id, private))

    def upload_folder(self, repo_id, folder_path, ignore_patterns, commit_message):
        self.calls.append(
            (
                "folder",
                repo_id,
                sorted(
                    path.name
                    for path in Path(folder_path).iterdir()
                    if path.name not in ignore_patterns
                ),
            )
        )

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
    write_json(tmp_path / "alpaca_eval.json", EVALUATION)
    return lambda: program(
        push_policy,
        "--policy",
        tmp_path / "policy",
        "--evaluation",
        tmp_path / "alpaca_eval.json",
        "--repository",
        "me/sppo-1",
        "--output",
        tmp_path / "pushed.json",
    )


def test_a_policy_is_pushed_with_its_card_and_figures_to_a_private_repository(push, tmp_path):
    push()
    token, created, folder, file = Api.calls
    assert (token, created, folder) == (
        ("token", "hf_secret"),
        ("create", "me/sppo-1", True),
        ("folder", "me/sppo-1", ["model.safetensors"]),
    )
    assert (
        file[2] == "README.md"
        and file[3].startswith("---\nlicense: gemma\n---\n# A policy")
        and "| length_controlled_winrate | 28.53 |" in file[3]
    )
    assert read_json(tmp_path / "pushed.json")["commit"] == "abc123"
    assert not any(
        "hf_secret" in path.read_text() for path in tmp_path.rglob("*") if path.is_file()
    )


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [("HF_TOKEN", "", "export HF_TOKEN"), ("HF_HUB_OFFLINE", "1", "HF_HUB_OFFLINE")],
)
def test_pushing_without_a_token_or_offline_is_one_line(
    variable, value, words, push, monkeypatch, tmp_path
):
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=words):
        push()
    assert Api.calls == [] and not (tmp_path / "pushed.json").exists()


def test_a_hub_that_refuses_is_one_line(push, monkeypatch, tmp_path):
    monkeypatch.setattr(
        Api,
        "create_repo",
        lambda *args, **kwargs: (_ for _ in ()).throw(ConnectionError("refused")),
    )
    with pytest.raises(UserError, match="cannot push .* to me/sppo-1 .*does not answer"):
        push()
    assert not (tmp_path / "pushed.json").exists()
