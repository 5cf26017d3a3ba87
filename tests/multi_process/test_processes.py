"""Training in two processes is training in one: weights, logs, step 0, kill and resume, one line for an error. Gloo, no GPU."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import TrainingFolder, distance, make_pairs, option_words

import score_reference
from sppo.core.artifacts import read_json, record_path
from sppo.core.tables import write_table
from sppo.policies.models import check_policy, load_policy, load_tokenizer

pytestmark = pytest.mark.slow
HERE = Path(__file__).resolve().parent
PROGRAM = HERE / "train_policy_on_cpu.py"
DIVIDED = [
    "fsdp2",
    pytest.param(
        "zero3",
        marks=pytest.mark.skipif(not find_spec("deepspeed"), reason="DeepSpeed is not installed"),
    ),
]
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
    """A folder with 11 pairs, so that steps of 8 end raggedly, with 3; and runs of the program in it."""

    def __init__(self, folder: Path, policy: Path) -> None:
        super().__init__(folder, policy)
        write_table(folder / "pairs.parquet", make_pairs(11), "pairs")
        for precision in ("float32", "bfloat16"):
            self.score(policy, precision)

    def score(self, policy: Path, precision: str, name: str | None = None) -> None:
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
                "3",
                "--output",
                self.folder / f"{name or precision}.parquet",
            ],
            check=True,
        )

    def command(self, name: str, reference: str | None = None, **options: object) -> list[str]:
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
        self, name: str, environment: dict[str, str] | None = None, **options: object
    ) -> subprocess.CompletedProcess:
        return subprocess.run(
            self.command(name, **options),
            env=os.environ | (environment or {}),
            capture_output=True,
            text=True,
            timeout=300,
        )

    def train(self, name: str, **options: object) -> dict[str, torch.Tensor]:
        """Weights of the policy that these options train, in files as Hugging Face writes them."""
        done = self.run(name, **options)
        assert done.returncode == 0, done.stdout + done.stderr
        check_policy(self.folder / name)
        assert read_json(record_path(self.folder / name))["steps"] == len(self.log(name))
        assert not [path for path in self.folder.iterdir() if path.name.startswith(f".{name}.")]
        return load_file(self.folder / name / "model.safetensors")


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_policy) -> Place:
    return Place(tmp_path_factory.mktemp("place"), tiny_policy)


@pytest.fixture(scope="module")
def alone(place) -> dict[str, torch.Tensor]:
    """Weights that one process trains, a step of 8 pairs in one pass, and one of the 3 that are left."""
    return place.train("alone")


def assert_same(
    place: Place, alone: dict[str, torch.Tensor], name: str, weights: dict[str, torch.Tensor]
) -> None:
    """The same weights but for rounding, all float32, and the same log."""
    moved = distance(place.start(), alone)
    assert moved > 1e-3 and distance(alone, weights) < 1e-4 * moved
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    for ours, theirs in zip(place.log(name), place.log("alone"), strict=True):
        for column in (
            "loss",
            "log_ratio_chosen",
            "log_ratio_rejected",
            "grad_norm",
            "learning_rate",
        ):
            assert ours[column] == pytest.approx(theirs[column], rel=1e-4, abs=1e-3), column


@pytest.mark.parametrize(("micro_batch_size", "accumulation"), [(4, 1), (2, 2), (1, 4)])
def test_two_processes_train_what_one_does(micro_batch_size, accumulation, place, alone):
    name = f"two_{accumulation}"
    weights = place.train(name, processes=2, micro_batch_size=micro_batch_size)
    assert_same(place, alone, name, weights)
    step_0 = read_json(record_path(place.folder / name))["step_0"]
    assert step_0["log_ratio_per_token"] < 1e-3 and step_0["loss"] == pytest.approx(
        step_0["closed_form"], rel=1e-3
    )


@pytest.mark.parametrize(("micro_batch_size", "accumulation"), [(4, 1), (1, 4)])
@pytest.mark.parametrize("parallel", DIVIDED)
def test_a_divided_policy_is_trained_as_one_process_does(
    parallel, micro_batch_size, accumulation, place, alone
):
    name = f"{parallel}_{accumulation}"
    weights = place.train(name, parallel=parallel, processes=2, micro_batch_size=micro_batch_size)
    assert_same(place, alone, name, weights)
    assert (
        type(load_policy(place.folder / name, torch.float32, "cpu")).__name__ == "LlamaForCausalLM"
    )
    assert read_json(place.folder / name / "config.json") | {"use_cache": True} == read_json(
        place.folder / "alone" / "config.json"
    )


@pytest.mark.parametrize("parallel", ["ddp", *DIVIDED])
def test_an_output_layer_of_its_own(parallel, tmp_path, tiny_policy):
    """As Mistral and Llama-3 have it, where the embedded policy has the embeddings' weights in both places."""
    policy = load_policy(tiny_policy, torch.float32, "cpu")
    policy.config.tie_word_embeddings = False
    policy.lm_head.weight = torch.nn.Parameter(policy.lm_head.weight.detach().flip(1).clone())
    policy.save_pretrained(tmp_path / "start")
    load_tokenizer(tiny_policy).save_pretrained(tmp_path / "start")
    place = Place(tmp_path, tmp_path / "start")

    alone = place.train("alone")

    assert {"lm_head.weight", "model.embed_tokens.weight"} <= alone.keys() and distance(
        alone, place.start()
    ) > 0
    assert_same(
        place,
        alone,
        parallel,
        place.train(parallel, parallel=parallel, processes=2, micro_batch_size=4),
    )


@pytest.mark.parametrize("parallel", ["ddp", *DIVIDED])
def test_step_0_holds_and_updates_below_bfloat16_arrive_with_float32_masters(parallel, place):
    """bfloat16 computes, with gradient checkpointing: the same log-ratios at step 0 as in one process, and updates far below 2^-8 of a weight."""
    options = {
        "precision": "bfloat16",
        "optimizer": "rmsprop",
        "learning_rate": 1e-6,
        "gradient_checkpointing": "true",
    }
    place.train(f"bf16_{parallel}", processes=2, parallel=parallel, micro_batch_size=2, **options)
    trained, start = (
        load_file(place.folder / f"bf16_{parallel}" / "model.safetensors"),
        place.start(),
    )
    step_0 = read_json(record_path(place.folder / f"bf16_{parallel}"))["step_0"]
    assert step_0["log_ratio_per_token"] < 5e-2 and step_0["mean_log_ratio_per_token"] < 1e-2
    name = "model.layers.0.mlp.up_proj.weight"
    step = (trained[name] - start[name]).abs()
    assert (
        trained[name].dtype == torch.float32
        and (step > 0).float().mean() > 0.9
        and step.max() < 1e-4
    )


@pytest.mark.parametrize("parallel", ["ddp", *DIVIDED])
def test_killed_training_goes_on_from_its_checkpoint_to_the_same_weights(parallel, place):
    """Process 1 is killed before the fourth of six steps; RMSProp, so that the optimiser's state counts."""
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
    assert (
        killed.returncode == 1
        and len(errors) == 1
        and "process 1 of the training was ended by SIGKILL" in errors[0]
    ), killed.stderr
    assert not (place.folder / name).exists() and not record_path(place.folder / name).exists()
    done = place.run(name, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    said = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("step ")]
    assert said == ["4", "5", "6"], "it began again, or skipped"
    # RMSProp makes steps of like size from gradients that are 0 but for rounding, which FSDP2 does not repeat: their signs may differ in single weights.
    resumed = load_file(place.folder / name / "model.safetensors")
    spread = torch.cat([(whole[weight] - resumed[weight]).abs().flatten() for weight in whole])
    assert whole.keys() == resumed.keys() and spread.mean().item() < 1e-5 * distance(
        place.start(), whole
    )
    for ours, theirs in zip(place.log(name), place.log(f"whole_{parallel}"), strict=True):
        for column in ("step", "epoch", "learning_rate", "loss", "grad_norm"):
            assert ours[column] == pytest.approx(theirs[column], rel=1e-5), column


def test_two_machines_meet(place, alone):
    """One process on each of two machines, both this one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = place.command("machines", processes=2, machines=2, micro_batch_size=2)
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
    said = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert_same(
        place, alone, "machines", load_file(place.folder / "machines" / "model.safetensors")
    )


def test_error_of_all_processes_is_one_line_and_nothing_is_kept(place, tmp_path):
    """References of another policy: both processes find it out."""
    other = load_policy(place.policy, torch.float32, "cpu")
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    other.save_pretrained(tmp_path)
    for file in place.policy.iterdir():
        if file.name not in {path.name for path in tmp_path.iterdir()}:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    place.score(tmp_path, "float32", "other")
    done = place.run("refused", reference="other", processes=2, micro_batch_size=2)
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and [line for line in lines if line.startswith("error: ")] == [
        lines[-1]
    ], done.stderr
    assert "step-0 identity" in lines[-1] and "Traceback" not in done.stderr
    assert (
        not (place.folder / "refused").exists()
        and not record_path(place.folder / "refused").exists()
    )
