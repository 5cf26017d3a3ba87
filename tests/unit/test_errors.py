"""Errors: one line, exit status 1, no partial files, and no change of finished artifacts."""

from __future__ import annotations

import errno
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import safetensors.torch

import build_pairs
import generate_responses
import prepare_policy
from sppo.core.artifacts import record_path, write_json
from sppo.core.errors import UserError, run
from sppo.core.tables import write_table
from sppo.policies.models import load_policy

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = sorted(
    file
    for file in (ROOT / "src").rglob("*.py")
    if '"__main__"' in file.read_text(encoding="utf-8")
)
MESSAGES = [{"role": "user", "content": "Hi"}]


def line_of(capsys, main) -> str:
    """The one error line of a program whose `main` raises an exception."""
    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def raising(error: BaseException):
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize("file", PROGRAMS, ids=lambda file: file.stem)
def test_help_shows_the_docstring(file, tmp_path):
    done = subprocess.run(
        [sys.executable, str(file), "--help"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    docstring = file.read_text(encoding="utf-8").split('"""')[1]
    assert docstring.strip().splitlines()[0] in done.stdout
    assert "usage:" in done.stdout


# --- the line of an exception ---


def test_user_error_with_several_lines_is_printed_as_one(capsys):
    line = line_of(capsys, raising(UserError("no\n  such thing;\tcorrect it")))
    assert line == "error: no such thing; correct it"


def test_control_characters_in_an_error_are_escaped(capsys):
    line = line_of(capsys, raising(UserError("\x1b[31m\x00 é名 is \ud800; correct it")))
    assert line == "error: \\x1b[31m\\x00 é名 is \\ud800; correct it"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "/tmp/x.parquet"),
        OSError(errno.EDQUOT, "quota", "/tmp/x.parquet"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
    ids=["disk", "quota", "wrapped"],
)
def test_full_disk_is_a_one_line_error(error, capsys):
    line = line_of(capsys, raising(error))
    assert "no space left" in line
    assert "MiB free" in line
    assert isinstance(error, RuntimeError) or "/tmp/x.parquet" in line


LINES = {
    "limit on file sizes": (
        OSError(errno.EFBIG, "File too large", "/tmp/x.parquet"),
        ["/tmp/x.parquet", "no space left"],
    ),
    "wrapped limit on file sizes": (
        RuntimeError("I/O error: File too large (os error 27)"),
        ["no space left"],
    ),
    "memory": (MemoryError(), ["not enough memory", "ulimit -v"]),
    "out of memory in the system": (
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        ["not enough memory"],
    ),
    "out of memory in PyTorch": (
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        ["not enough memory"],
    ),
    "no permission to read": (
        PermissionError(errno.EACCES, "Permission denied", "/data/x.json"),
        ["/data/x.json", "permissions"],
    ),
    "folder": (IsADirectoryError(errno.EISDIR, "Is a directory", "/tmp"), ["/tmp is a folder"]),
    "missing file": (
        FileNotFoundError(errno.ENOENT, "No such file", b"/tmp/x"),
        ["/tmp/x is missing"],
    ),
    "file used as a folder": (
        NotADirectoryError(errno.ENOTDIR, "Not a directory", "/tmp/x/y"),
        ["/tmp/x/y", "as if it were a folder"],
    ),
    "long name": (
        OSError(errno.ENAMETOOLONG, "File name too long", "x" * 5000),
        ["xxx... is longer than"],
    ),
    "link to itself": (OSError(errno.ELOOP, "Too many levels", "/tmp/x"), ["/tmp/x is a link"]),
    "read-only disk": (
        OSError(errno.EROFS, "Read-only", "/mnt/x"),
        ["/mnt/x", "read-only"],
    ),
}


@pytest.mark.parametrize(("error", "words"), LINES.values(), ids=LINES)
def test_system_error_is_one_line(error, words, capsys):
    line = line_of(capsys, raising(error))
    assert all(word in line for word in words), line
    assert len(line) < 400, line


def test_file_size_limit_leaves_no_partial_file(tmp_path):
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "sys.path.insert(0, 'src')\n"
        "from sppo.core.artifacts import write_json\n"
        "from sppo.core.errors import run\n"
        "run(lambda: write_json(Path(sys.argv[1]) / 'x.json', 'x' * 10**6))\n"
    )
    done = subprocess.run(
        ["bash", "-c", 'ulimit -f 10; exec "$@"', "-", sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "ulimit -f" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [ValueError("bug"), OSError(errno.EACCES, "denied"), KeyError("x")],
    ids=["value", "access", "key"],
)
def test_programming_error_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        run(raising(error))


def test_success_does_not_exit():
    run(lambda: None)


# --- the disk is full while an artifact is written ---

ROWS = [{"pair_id": 0, "chosen_logp": -1.0, "rejected_logp": -2.0}]


@pytest.mark.parametrize(
    "write",
    [lambda path: write_table(path, ROWS, "logps"), lambda path: write_json(path, {"a": 1})],
    ids=["table", "json"],
)
def test_full_disk_keeps_the_old_file(write, tmp_path, monkeypatch, capsys):
    write(tmp_path / "artifact")
    old = (tmp_path / "artifact").read_bytes()

    def full(self_or_table, path_or_text, *args, **kwargs):
        target = self_or_table if isinstance(self_or_table, Path) else path_or_text
        with open(target, "wb") as stream:
            stream.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr(pq, "write_table", full)
    monkeypatch.setattr(Path, "write_text", full)
    line = line_of(capsys, lambda: write(tmp_path / "artifact"))
    assert str(tmp_path) in line
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]
    assert (tmp_path / "artifact").read_bytes() == old


def test_full_disk_leaves_no_artifact_and_no_record(tmp_path, monkeypatch, capsys, program):
    write_table(
        tmp_path / "prompts",
        [
            {
                "prompt_id": "p",
                "category": "",
                "messages": MESSAGES,
                "prompt_token_ids": [1],
                "source": "x",
            }
        ],
        "prompts",
    )
    write_table(
        tmp_path / "responses",
        [
            {
                "prompt_id": "p",
                "sample_id": k,
                "seed": k,
                "prompt_token_ids": [1],
                "token_ids": [k],
                "text": f"{k}",
                "finish_reason": "length",
            }
            for k in range(2)
        ],
        "responses",
    )
    write_table(
        tmp_path / "preferences",
        [{"prompt_id": "p", "sample_ids": [0, 1], "logits": [[0.0, 1.0], [0.0, 0.0]]}],
        "preferences",
    )
    words = (
        "--prompts",
        tmp_path / "prompts",
        "--responses",
        tmp_path / "responses",
        "--preferences",
        tmp_path / "preferences",
    )

    def full(table, where, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", str(where))

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", full)
        line_of(
            capsys,
            lambda: program(build_pairs, *words, "--output", tmp_path / "out" / "pairs.parquet"),
        )
    assert list((tmp_path / "out").iterdir()) == []
    program(build_pairs, *words, "--output", tmp_path / "out" / "pairs.parquet")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "pairs.parquet",
        "pairs.parquet.record.json",
    ]


# --- broken model folders ---


def without(name: str):
    return lambda folder: (folder / name).unlink()


def cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def cut_in_the_header(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])


def no_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    )


def no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def sharded_with_one_missing(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps(
            {
                "weight_map": {
                    "a": "model-00001-of-00002.safetensors",
                    "b": "model-00002-of-00002.safetensors",
                }
            }
        )
    )


def no_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "lla')


def broken_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ')


BROKEN = {
    "no config": (without("config.json"), "has no config.json"),
    "no weights": (without("model.safetensors"), "has no weights"),
    "truncated weights": (cut, "is cut off"),
    "weights truncated in the header": (cut_in_the_header, "is cut off"),
    "pointer of git-lfs": (no_safetensors, "is cut off or is not a safetensors file"),
    "no chat template": (no_template, "no chat template"),
    "missing shard": (sharded_with_one_missing, "model-00002-of-00002.safetensors is missing"),
    "no tokenizer": (no_tokenizer, "has no tokenizer"),
    "truncated config": (broken_config, "config.json"),
    "truncated index": (broken_index, "model.safetensors.index.json"),
}


@pytest.mark.parametrize(("damage", "words"), BROKEN.values(), ids=BROKEN)
def test_broken_model_folder_is_a_one_line_error(
    damage, words, tiny_policy, tmp_path, capsys, program
):
    folder = tmp_path / "model"
    shutil.copytree(tiny_policy, folder)
    damage(folder)
    line = line_of(
        capsys, lambda: program(prepare_policy, "--model", folder, "--output", tmp_path / "policy")
    )
    assert words in line, line
    assert str(folder) in line, line
    assert not (tmp_path / "policy").exists()
    assert not record_path(tmp_path / "policy").exists()


def test_missing_model_is_a_one_line_error(tmp_path, capsys, program):
    for model in ("./nowhere", "not a model", "a/b/c"):
        words = ("--model", model, "--output", tmp_path / "policy")
        assert model in line_of(capsys, lambda: program(prepare_policy, *words))


def test_dangling_link_to_weights_is_a_one_line_error(tiny_policy, tmp_path, capsys, program):
    """For example a link into a hub cache that was deleted later."""
    write_table(
        tmp_path / "prompts",
        [
            {
                "prompt_id": "p",
                "category": "",
                "messages": MESSAGES,
                "prompt_token_ids": [1],
                "source": "x",
            }
        ],
        "prompts",
    )
    folder = tmp_path / "model"
    shutil.copytree(tiny_policy, folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(tmp_path / "emptied" / "model.safetensors")
    line = line_of(
        capsys,
        lambda: program(
            generate_responses,
            "--prompts",
            tmp_path / "prompts",
            "--policy",
            folder,
            "--iteration",
            1,
            "--max-new-tokens",
            2,
            "--output",
            tmp_path / "out.parquet",
        ),
    )
    assert f"{folder}/model.safetensors is a link to {tmp_path}/emptied/model.safetensors" in line
    assert "which does not exist" in line
    assert not (tmp_path / "out.parquet").exists()


def test_full_disk_while_saving_a_policy_leaves_no_folder(
    tiny_policy, tmp_path, monkeypatch, capsys
):
    """safetensors wraps the system's error in its own exception."""
    import torch

    from sppo.core.artifacts import written_whole

    model = load_policy(tiny_policy, torch.float32, "cpu")

    def full(*args, **kwargs):
        raise safetensors.SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)

    def main() -> None:
        with written_whole(tmp_path / "policy") as temporary:
            model.save_pretrained(temporary)

    assert "no space left" in line_of(capsys, main)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["text", "table", "safetensors", "torch", "folder"])
def test_file_over_the_size_limit_is_a_one_line_error(kind, tmp_path):
    """Each library reports `ulimit -f` differently. A full disk fails in the same places."""
    import torch
    from safetensors.torch import save_file

    from sppo.core.artifacts import write_text, written_whole

    large, target = torch.rand(50_000), tmp_path / "x"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(
            UserError,
            match="no space left .*/x .* MiB free .*ulimit -f` .now 100000 bytes per file",
        ):
            if kind == "text":
                write_text(target, "x" * 200_000)
            elif kind == "table":
                rows = [
                    {"pair_id": i, "chosen_logp": x, "rejected_logp": x * x}
                    for i, x in enumerate(large.tolist())
                ]
                write_table(target, rows, "logps")
            else:
                with written_whole(target) as temporary:
                    if kind == "folder":
                        temporary.mkdir()
                        temporary /= "model.safetensors"
                    (torch.save if kind == "torch" else save_file)({"weight": large}, temporary)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_fail_prints_after_earlier_output():
    code = (
        "import sys\n"
        "sys.path.insert(0, 'src')\n"
        "from sppo.core.errors import fail\n"
        "print('said')\n"
        "fail('no')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )
    assert (done.stdout, done.returncode) == ("said\nerror: no\n", 1)
