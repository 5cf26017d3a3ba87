"""Training in two processes gives the same result as training in one process.

The tests compare weights, logs and step 0, kill and resume trainings, and check that an error is
one line. They use gloo and need no GPU.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_runs import TrainingFolder, distance, make_pairs, option_words
from transformers import AutoModelForCausalLM

import score_reference
from sppo.core.artifacts import read_json, record_path
from sppo.core.tables import write_table
from sppo.policies.chats import load_tokenizer
from sppo.policies.folders import check_policy
from sppo.policies.models import load_policy

pytestmark = pytest.mark.slow
HERE = Path(__file__).resolve().parent
PROGRAM = HERE / "train_policy_on_cpu.py"

# The values of --parallel that divide the weights over processes.
DIVIDED = [
    "fsdp2",
    pytest.param(
        "zero3",
        marks=pytest.mark.skipif(not find_spec("deepspeed"), reason="DeepSpeed is not installed"),
    ),
]

# Options of a training whose result two processes can reproduce up to rounding.
PLAIN = {
    "precision": "float32",
    "device": "cpu",
    "learning_rate": 1e-4,
    "beta": 0.01,
    "optimizer": "sgd",
    "max_grad_norm": 0.0,
    "warmup_ratio": 0.0,
    "lr_schedule": "constant",
    "schedule_total_epochs": 1,
    "stop_epoch": 1,
    "batch_size": 8,
    "micro_batch_size": 8,
}


class Place(TrainingFolder):
    """A folder with 11 pairs, in which the program is run.

    With steps of 8 pairs, the last step has only 3.
    """

    def __init__(self, folder: Path, policy: Path) -> None:
        super().__init__(folder, policy)
        write_table(folder / "pairs.parquet", make_pairs(11), "pairs")
        for precision in ("float32", "bfloat16"):
            self.score(policy, precision)

    def score(
        self,
        policy: Path,
        precision: str,
        name: str | None = None,
        rounded: bool = False,
        micro_batch_size: int = 3,
    ) -> None:
        """Write the log-probabilities under `policy` to `<name>.parquet`."""
        subprocess.run(
            [
                sys.executable,
                score_reference.__file__,
                "--pairs",
                self.folder / "pairs.parquet",
                "--policy",
                policy,
                "--precision",
                precision,
                "--device",
                "cpu",
                "--micro-batch-size",
                str(micro_batch_size),
                *(["--rounded"] if rounded else []),
                "--output",
                self.folder / f"{name or precision}.parquet",
            ],
            check=True,
        )

    def command(self, name: str, reference: str | None = None, **options: object) -> list[str]:
        """The command that trains the policy `name` with `PLAIN` and these options."""
        options = PLAIN | options
        current = self.folder / f"{reference or options['precision']}.parquet"
        return [
            sys.executable,
            str(PROGRAM),
            "--pairs",
            str(self.folder / "pairs.parquet"),
            "--current",
            str(current),
            "--policy",
            str(self.policy),
            "--output",
            str(self.folder / name),
            "--log",
            str(self.folder / f"{name}.jsonl"),
            *option_words(options),
        ]

    def run(
        self,
        name: str,
        environment: dict[str, str] | None = None,
        reference: str | None = None,
        **options: object,
    ) -> subprocess.CompletedProcess:
        """Run the program, with additional environment variables."""
        return subprocess.run(
            self.command(name, reference, **options),
            env=os.environ | (environment or {}),
            capture_output=True,
            text=True,
            timeout=300,
        )

    def train(self, name: str, **options: object) -> dict[str, torch.Tensor]:
        """Train a policy and return its weights. Check its files and that nothing else is left."""
        done = self.run(name, **options)
        assert done.returncode == 0, done.stdout + done.stderr
        check_policy(self.folder / name)
        assert read_json(record_path(self.folder / name))["steps"] == len(self.log(name))
        assert not [path for path in self.folder.iterdir() if path.name.startswith(f".{name}.")]
        return load_file(self.folder / name / "model.safetensors")

    def farthest_at_step_0(self, name: str) -> float:
        """The largest log-ratio per token before the first update."""
        return read_json(record_path(self.folder / name))["step_0"]["log_ratio_per_token"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_policy) -> Place:
    return Place(tmp_path_factory.mktemp("place"), tiny_policy)


@pytest.fixture(scope="module")
def alone(place) -> dict[str, torch.Tensor]:
    """Weights trained by one process: a step of 8 pairs and a step of 3, each in one pass."""
    return place.train("alone")


def assert_same(
    place: Place, alone: dict[str, torch.Tensor], name: str, weights: dict[str, torch.Tensor]
) -> None:
    """`weights` and the log of `name` equal those of `alone` up to rounding, all in float32."""
    moved = distance(place.start(), alone)
    assert moved > 1e-3
    assert distance(alone, weights) < 1e-4 * moved
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    columns = ("loss", "log_ratio_chosen", "log_ratio_rejected", "grad_norm", "learning_rate")
    for ours, theirs in zip(place.log(name), place.log("alone"), strict=True):
        for column in columns:
            assert ours[column] == pytest.approx(theirs[column], rel=1e-4, abs=1e-3), column


@pytest.mark.parametrize(
    ("processes", "micro_batch_size", "accumulation"), [(2, 4, 1), (2, 2, 2), (2, 1, 4), (4, 1, 2)]
)
def test_processes_train_what_one_does(processes, micro_batch_size, accumulation, place, alone):
    name = f"{processes}_{accumulation}"
    weights = place.train(name, processes=processes, micro_batch_size=micro_batch_size)
    assert_same(place, alone, name, weights)
    step_0 = read_json(record_path(place.folder / name))["step_0"]
    assert step_0["log_ratio_per_token"] < 1e-3
    assert step_0["loss"] == pytest.approx(step_0["closed_form"], rel=1e-3)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_micro_batches_by_tokens_train_the_same(parallel, place, alone):
    """The micro-batches of the two processes have different numbers of pairs."""
    name = f"tokens_{parallel}"
    weights = place.train(name, parallel=parallel, processes=2, micro_batch_tokens=100)
    assert_same(place, alone, name, weights)


@pytest.mark.parametrize("every", [None, 1, 2])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_packed_batches_train_the_same(parallel, every, place, alone, monkeypatch):
    """With no layer, every one, or every second one checkpointed."""
    monkeypatch.setenv("PACK", "1")
    name = f"packed_{parallel}_{every}"
    weights = place.train(
        name,
        parallel=parallel,
        processes=2,
        micro_batch_tokens=100,
        gradient_checkpointing=every is not None,
        checkpointed_layers=every or 1,
    )
    assert_same(place, alone, name, weights)


@pytest.mark.parametrize(("micro_batch_size", "accumulation"), [(4, 1), (1, 4)])
@pytest.mark.parametrize("parallel", DIVIDED)
def test_a_divided_policy_is_trained_as_one_process_does(
    parallel, micro_batch_size, accumulation, place, alone
):
    name = f"{parallel}_{accumulation}"
    weights = place.train(name, parallel=parallel, processes=2, micro_batch_size=micro_batch_size)
    assert_same(place, alone, name, weights)
    policy = load_policy(place.folder / name, torch.float32, "cpu")
    assert type(policy).__name__ == "LlamaForCausalLM"
    config = read_json(place.folder / name / "config.json")
    assert config | {"use_cache": True} == read_json(place.folder / "alone" / "config.json")


@pytest.mark.parametrize("parallel", ["ddp", *DIVIDED])
def test_an_output_layer_of_its_own(parallel, tmp_path, tiny_policy):
    """An output layer with its own weights, as in Mistral and Llama-3.

    In the embedded policy, the output layer and the embeddings share their weights.
    """
    policy = load_policy(tiny_policy, torch.float32, "cpu")
    policy.config.tie_word_embeddings = False
    policy.lm_head.weight = torch.nn.Parameter(policy.lm_head.weight.detach().flip(1).clone())
    policy.save_pretrained(tmp_path / "start")
    load_tokenizer(tiny_policy).save_pretrained(tmp_path / "start")
    place = Place(tmp_path, tmp_path / "start")

    alone = place.train("alone")

    assert {"lm_head.weight", "model.embed_tokens.weight"} <= alone.keys()
    assert distance(alone, place.start()) > 0
    weights = place.train(parallel, parallel=parallel, processes=2, micro_batch_size=4)
    assert_same(place, alone, parallel, weights)


@pytest.mark.parametrize("parallel", ["ddp", *DIVIDED])
def test_float32_masters_keep_updates_below_bfloat16(parallel, place):
    """bfloat16 with gradient checkpointing: log-ratios are 0 at step 0 up to rounding.

    Updates far below 2^-8 of a weight arrive in the weights.
    """
    options = {
        "precision": "bfloat16",
        "optimizer": "rmsprop",
        "learning_rate": 1e-6,
        "gradient_checkpointing": "true",
    }
    place.train(f"bf16_{parallel}", processes=2, parallel=parallel, micro_batch_size=2, **options)
    trained = load_file(place.folder / f"bf16_{parallel}" / "model.safetensors")
    step_0 = read_json(record_path(place.folder / f"bf16_{parallel}"))["step_0"]
    assert step_0["log_ratio_per_token"] < 5e-2
    assert step_0["mean_log_ratio_per_token"] < 1e-2
    name = "model.layers.0.mlp.up_proj.weight"
    update = (trained[name] - place.start()[name]).abs()
    assert trained[name].dtype == torch.float32
    assert (update > 0).float().mean() > 0.9
    assert update.max() < 1e-4


def test_fsdp2_trains_in_bfloat16_what_ddp_does(place):
    """FSDP2 rounds all weights, also those of embeddings and norms, and so does the reference.

    The tiny policy's float32 weights are no bfloat16 numbers. Each pass has one pair here, as in
    the reference, so that nothing else can differ in the first step.
    """
    trained = {}
    for parallel in ("ddp", "fsdp2"):
        place.score(place.policy, "bfloat16", parallel, parallel == "fsdp2", micro_batch_size=1)
        trained[parallel] = place.train(
            f"bf16_from_{parallel}",
            reference=parallel,
            precision="bfloat16",
            processes=2,
            parallel=parallel,
            micro_batch_size=1,
        )
        assert place.farthest_at_step_0(f"bf16_from_{parallel}") < 1e-5
    moved = distance(place.start(), trained["ddp"])
    assert distance(trained["ddp"], trained["fsdp2"]) < 0.05 * moved
    # The check sees a reference that did not round them.
    options = {"precision": "bfloat16", "parallel": "fsdp2", "micro_batch_size": 1}
    place.train("bf16_unrounded", reference="ddp", processes=2, **options)
    assert place.farthest_at_step_0("bf16_unrounded") > 1e-3


def small_config(family: str) -> Any:
    """A family whose norms or embeddings compute in the type of their weights."""
    if family == "qwen3":
        from transformers import Qwen3Config as Config
    else:
        from transformers import Gemma2Config as Config
    return Config(
        vocab_size=49152,
        hidden_size=64,
        head_dim=16,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=family == "gemma2",
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_fsdp2_begins_at_log_ratios_of_0_in_other_families(family, place, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(family))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    model.save_pretrained(tmp_path / "policy")
    load_tokenizer(place.policy).save_pretrained(tmp_path / "policy")
    (tmp_path / "run").mkdir()
    other = Place(tmp_path / "run", tmp_path / "policy")
    other.score(other.policy, "bfloat16", "rounded", True, micro_batch_size=1)
    options = {"precision": "bfloat16", "parallel": "fsdp2", "micro_batch_size": 1}
    other.train("trained", reference="rounded", processes=2, **options)
    assert other.farthest_at_step_0("trained") < 1e-5


@pytest.mark.parametrize("parallel", ["ddp", *DIVIDED])
def test_killed_training_resumes_to_the_same_weights(parallel, place):
    """Process 1 is killed before the fourth of six steps.

    With RMSProp, the result depends on the optimiser's state.
    """
    options = {
        "processes": 2,
        "parallel": parallel,
        "batch_size": 2,
        "micro_batch_size": 1,
        "checkpoint_steps": 1,
        "optimizer": "rmsprop",
        "learning_rate": 1e-4,
        "lr_schedule": "linear",
        "warmup_ratio": 0.3,
        "schedule_total_epochs": 2,
    }
    whole = place.train(f"whole_{parallel}", **options)
    name = f"resumed_{parallel}"
    killed = place.run(name, {"KILL_STEP": "3"}, **options)
    errors = [line for line in killed.stderr.splitlines() if line.startswith("error: ")]
    assert killed.returncode == 1, killed.stderr
    assert len(errors) == 1, killed.stderr
    assert "process 1 of the training was ended by SIGKILL" in errors[0]
    assert not (place.folder / name).exists()
    assert not record_path(place.folder / name).exists()
    done = place.run(name, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("step ")]
    assert steps == ["4", "5", "6"], "the training started again, or skipped steps"
    # RMSProp makes updates of full size also from gradients that are only rounding errors. FSDP2
    # does not reproduce these, so the signs of updates may differ in single weights. The mean
    # difference must be small.
    resumed = load_file(place.folder / name / "model.safetensors")
    assert whole.keys() == resumed.keys()
    differences = torch.cat([(whole[key] - resumed[key]).abs().flatten() for key in whole])
    assert differences.mean().item() < 1e-5 * distance(place.start(), whole)
    for ours, theirs in zip(place.log(name), place.log(f"whole_{parallel}"), strict=True):
        for column in ("step", "epoch", "learning_rate", "loss", "grad_norm"):
            assert ours[column] == pytest.approx(theirs[column], rel=1e-5), column


@pytest.mark.parametrize(("parallel", "processes"), [("ddp", 2), ("fsdp2", 4), ("hsdp", 4)])
def test_two_nodes_train_the_same(parallel, processes, place, alone):
    name = f"nodes_{parallel}"
    output = run_on_two_nodes(
        place.command(name, parallel=parallel, processes=processes, nodes=2, micro_batch_size=1)
    )
    if parallel == "hsdp":
        assert "mesh {'dp_replicate': 2, 'dp_shard_cp': 2}" in output
    weights = load_file(place.folder / name / "model.safetensors")
    assert_same(place, alone, name, weights)


def test_hsdp_rounds_weights_in_bfloat16_as_fsdp2_does(place):
    place.score(place.policy, "bfloat16", "for_hsdp", rounded=True, micro_batch_size=1)
    options = {"precision": "bfloat16", "parallel": "hsdp", "micro_batch_size": 1}
    run_on_two_nodes(
        place.command("hsdp_bf16", reference="for_hsdp", processes=4, nodes=2, **options)
    )
    assert place.farthest_at_step_0("hsdp_bf16") < 1e-5


def run_on_two_nodes(command: list[str]) -> str:
    """Run a training on two nodes, both of which are this machine; the output of the first."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    running = [
        subprocess.Popen(
            command,
            env=os.environ | {"NODE_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in "01"
    ]
    outputs = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    return outputs[0]


def test_error_of_all_processes_is_one_line_and_nothing_is_kept(place, tmp_path):
    """The references belong to another policy, and both processes detect it."""
    other = load_policy(place.policy, torch.float32, "cpu")
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    other.save_pretrained(tmp_path)
    for file in place.policy.iterdir():  # The tokenizer's files.
        if not (tmp_path / file.name).exists():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    place.score(tmp_path, "float32", "other")
    done = place.run("refused", reference="other", processes=2, micro_batch_size=2)
    lines = done.stderr.splitlines()
    assert done.returncode == 1
    assert [line for line in lines if line.startswith("error: ")] == [lines[-1]], done.stderr
    assert "step-0 identity" in lines[-1]
    assert "Traceback" not in done.stderr
    assert not (place.folder / "refused").exists()
    assert not record_path(place.folder / "refused").exists()
