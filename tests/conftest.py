"""Fixtures of all tests: a tiny random policy with the real tokenizer; no network, one core."""

from __future__ import annotations

import os
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

from convert_embedded_policy import CONTEXT, GGUF, package_folder

ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--auto-precision",
        choices=["bfloat16", "float32"],
        help="value of `precision: auto` in all tests, on every processor",
    )


def pytest_configure(config: pytest.Config) -> None:
    if chosen := config.getoption("--auto-precision"):
        # An environment variable, because programs that tests start inherit it.
        os.environ["SPPO_AUTO_PRECISION"] = chosen


@pytest.fixture
def pip_downloads(monkeypatch) -> Callable[..., None]:
    """Replace pip: its download is a wheel with these files, broken, or an error."""

    def replace(files: dict[str, bytes] | None, error: str = "", broken: bool = False) -> None:
        def pip(command: list[str], **_: object) -> subprocess.CompletedProcess:
            assert command[1:4] == ["-m", "pip", "download"]
            wheel = Path(command[command.index("--dest") + 1]) / "a.whl"
            wheel.parent.mkdir(parents=True)
            if broken:
                wheel.write_bytes(b"no archive")
            elif files is not None:
                with zipfile.ZipFile(wheel, "w") as archive:
                    for name, content in files.items():
                        archive.writestr(name, content)
            return subprocess.CompletedProcess(command, int(bool(error)), "", error)

        stand_in = SimpleNamespace(run=pip)
        monkeypatch.setattr("sppo.core.index_packages.subprocess", stand_in)

    return replace


@pytest.fixture(scope="session")
def copy_repository() -> Callable[[Path], Path]:
    """Copy the files that git knows or would add, without any build output, into a folder."""

    def copy(folder: Path) -> Path:
        files = subprocess.run(
            ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split("\0")
        for name in filter(None, files):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        return folder

    return copy


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    """The tokenizer of SmolLM2-135M-Instruct.

    It comes from the workflow's converted model if that exists, otherwise from the package, which
    takes some seconds.
    """
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    converted = ROOT / "results" / "models" / "SmolLM2-135M-Instruct"
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    if all((converted / name).is_file() for name in names):
        for name in names:
            shutil.copy(converted / name, folder)
    else:
        tokenizer = AutoTokenizer.from_pretrained(package_folder(), gguf_file=GGUF)
        tokenizer.model_max_length = CONTEXT
        tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_policy(tokenizer_folder, tmp_path_factory) -> Path:
    """A Llama with random float32 weights, 2 layers of width 64 and the real vocabulary.

    It has 512 positions.
    All tests share the folder, so no test may change it.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    # The weights are larger than usual, so that the distributions are far from uniform.
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49152,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
            tie_word_embeddings=True,
            initializer_range=0.2,
        )
    )
    folder = tmp_path_factory.mktemp("tiny") / "policy"
    model.save_pretrained(folder)
    shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture
def program(monkeypatch):
    """Run a program's main() in this process like `python src/NAME.py WORDS`, without the exit."""

    def call(module, *words: object) -> None:
        monkeypatch.setattr("sys.argv", [module.__file__, *map(str, words)])
        module.main()

    return call
