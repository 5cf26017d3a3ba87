"""No telemetry: a server that replaces the hub gets no request from a training with TRL."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from listener import listening, online

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = sorted(
    file
    for file in (ROOT / "src").rglob("*.py")
    if '"__main__"' in file.read_text(encoding="utf-8")
)
# Like src/train_policy.py: it imports the package first and then makes a trainer of TRL. A thread
# of huggingface_hub sends the reports, so the last lines wait for it.
TRAINER = """
import sys
import sppo.core.errors
from pathlib import Path
import torch
from sppo.policies.chats import load_tokenizer
from sppo.policies.devices import start_torch
from sppo.policies.models import load_policy
from sppo.training.trainer import make_trl_trainer
start_torch()
policy, work = Path(sys.argv[1]), Path(sys.argv[2])
options = {"loss": "dpo", "beta": 0.1, "precision": "float32", "learning_rate": 1e-4,
           "optimizer": "sgd", "max_grad_norm": 0.0, "warmup_ratio": 0.0, "lr_schedule": "constant",
           "schedule_total_epochs": 1, "stop_epoch": 1, "batch_size": 1, "micro_batch_size": 1,
           "processes": 1, "machines": 1, "parallel": "ddp", "checkpoint_steps": 9,
           "report_to": "none", "lora_rank": 0, "gradient_checkpointing": False,
           "checkpointed_layers": 1,
           "loss_scale": "none"}
pairs = [{"prompt_token_ids": [1, 5], "chosen_token_ids": [7, 2], "rejected_token_ids": [9, 2]}]
model = load_policy(policy, torch.float32, "cpu", None)
make_trl_trainer(model, load_tokenizer(policy), pairs, options, torch.float32, "cpu", work, 0)
from huggingface_hub.utils import _telemetry
_telemetry._TELEMETRY_QUEUE.join()
print("made")
"""


@pytest.fixture
def hub():
    """A server that replaces huggingface.co; `asked` is the list of requested paths."""
    with listening() as server:
        yield server


def make_trainer(hub, policy: Path, folder: Path, **variables: str) -> None:
    """Make a trainer of TRL in a separate process without any variable that means offline."""
    environment = online(dict(os.environ))
    environment |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "hub"),
        **variables,
    }
    done = subprocess.run(
        [sys.executable, "-c", TRAINER, policy, folder / "work"],
        capture_output=True,
        text=True,
        cwd=ROOT / "src",
        env=environment,
    )
    assert done.stdout.endswith("made\n"), done.stderr


def test_a_training_by_trl_reports_nothing(hub, tiny_policy, tmp_path):
    make_trainer(hub, tiny_policy, tmp_path)
    assert hub.asked == []


def test_trl_reports_if_telemetry_is_switched_on(hub, tiny_policy, tmp_path):
    """So the test above can fail."""
    make_trainer(hub, tiny_policy, tmp_path, HF_HUB_DISABLE_TELEMETRY="0", DO_NOT_TRACK="0")
    assert any(path.startswith("/api/telemetry/trl/") for path in hub.asked)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.name)
def test_every_program_imports_sppo_before_reporting_packages(program):
    """Packages read the variables that switch telemetry off when they are imported."""
    reporting = {
        "accelerate",
        "alpaca_eval",
        "datasets",
        "evaluate",
        "huggingface_hub",
        "lm_eval",
        "peft",
        "transformers",
        "trl",
        "vllm",
    }
    modules = []
    for node in ast.parse(program.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            modules.append(node.module)
        elif isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
    packages = [module.split(".")[0] for module in modules]
    assert "sppo" in packages
    assert not reporting & set(packages[: packages.index("sppo")])
