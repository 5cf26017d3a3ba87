"""Configuration: defaults, error lines for bad keys, extended files, flags for the programs."""

from __future__ import annotations

import argparse
from pathlib import Path

import jsonschema
import pytest
import yaml

from sppo.core.config import RENAMED, default_of, schema
from sppo.core.config_files import read_files
from sppo.core.errors import UserError
from sppo.core.flags import add_section, flags, of_iteration
from sppo.training.losses import LOSSES, Loss
from sppo.training.requirements import equal_micro_batches
from sppo.workflow.configuration import (
    RESERVED,
    Runs,
    read_configuration,
    resolve,
    without_effect,
)
from sppo.workflow.preflight import check_inputs

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = [ROOT / "config" / "config.yaml", *sorted((ROOT / "config" / "presets").glob("*.yaml"))]
EVERY_FILE = [*SHIPPED, ROOT / "config" / "methods.yaml", ROOT / "config" / "paper_scale.yaml"]
SECTIONS = [key for key, rule in schema()["properties"].items() if "properties" in rule]


def leaves():
    """The dotted name and the schema rule of every key that has a value."""
    for key, rule in schema()["properties"].items():
        for name, inner in rule.get("properties", {}).items():
            yield f"{key}.{name}", inner
        if "properties" not in rule:
            yield key, rule


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    """Paths in configurations are relative to the working directory."""
    monkeypatch.chdir(ROOT)


def all_lines(written: dict) -> list[str]:
    """The lines of `without_effect` for all runs."""
    runs = resolve(written)
    return [line for name in runs.usable() for line in without_effect(written, name, runs)]


def refusal(written: dict) -> str:
    """The one-line error for a configuration of which every run is requested."""
    with pytest.raises(UserError) as caught:
        dict(resolve(written))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_alone_resolve_to_themselves():
    main = resolve({})[""]
    written = {key: value for key, value in main.items() if key != "first_iteration_from"}
    assert resolve(written)[""] == main


def test_default_training_settings_are_the_paper_s():
    train = resolve({})[""]["train"]
    expected = {
        "beta": 1e-3,
        "loss": "sppo",
        "optimizer": "rmsprop",
        "learning_rate": 5e-7,
        "batch_size": 64,
    }
    assert {key: train[key] for key in expected} == expected


@pytest.mark.parametrize(("name", "rule"), list(leaves()))
def test_key_is_described_typed_and_has_a_valid_default(name, rule):
    assert rule["description"].strip(), name
    assert rule["type"], name
    assert ("default" in rule) != ("x-settings" in rule), (
        f"{name} needs a default or x-settings, and only one"
    )
    if "x-settings" in rule:
        assert set(rule["x-settings"]) == {"paper", "repo"}
    for settings in ("paper", "repo"):
        jsonschema.validate(default_of(rule, settings), rule)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_file_is_valid_and_only_the_default_is_unnamed(file):
    runs = resolve(read_files([file]))
    assert (runs[""]["name"] == "") == (file == SHIPPED[0])
    assert len(runs) > 20


def test_numbers_and_booleans_may_be_text():
    """`snakemake --config section={key: 1}` gives text, and YAML reads 1e-6 as text."""
    run = resolve(
        {
            "train": {"learning_rate": "1e-6", "gradient_checkpointing": "true"},
            "responses": {"shards": "2"},
            "alpaca_eval": {"limit": "null"},
        }
    )[""]
    assert run["train"]["learning_rate"] == 1e-6
    assert run["train"]["gradient_checkpointing"] is True
    assert run["responses"]["shards"] == 2
    assert run["alpaca_eval"]["limit"] is None


@pytest.mark.parametrize("file", EVERY_FILE, ids=lambda file: file.stem)
def test_shipped_file_has_no_number_that_yaml_reads_as_text(file):
    """YAML reads 1e-6 as text. The schema cannot detect this for keys that may be text."""
    texts = [
        value
        for section in yaml.safe_load(file.read_text(encoding="utf-8")).values()
        if isinstance(section, dict)
        for value in section.values()
        if isinstance(value, str)
    ]
    for text in texts:
        with pytest.raises(ValueError):
            float(text)


def test_settings_select_paper_or_official_code():
    paper, repo = resolve({"settings": "paper"})[""], resolve({"settings": "repo"})[""]
    assert (
        paper["responses"]["temperature"],
        paper["responses"]["top_p"],
        paper["pairs"]["probability"],
        paper["preference"]["source"],
        paper["train"]["schedule_total_epochs"],
        paper["train"]["max_grad_norm"],
    ) == (1.0, 1.0, "pairwise", "instruction", 18, 1.0)
    assert (
        repo["responses"]["temperature"],
        repo["responses"]["top_p"],
        repo["pairs"]["probability"],
        repo["preference"]["source"],
        repo["train"]["schedule_total_epochs"],
        repo["train"]["max_grad_norm"],
    ) == (0.7, 0.9, "blender", "chat_template", 1, 0)


def test_explicit_key_overrides_settings_for_that_key_only():
    base = resolve({"settings": "repo"})[""]
    one = resolve({"settings": "repo", "responses": {"top_p": 0.5}})[""]
    assert one["responses"].pop("top_p") == 0.5
    assert base["responses"].pop("top_p") == 0.9
    assert one == base


@pytest.mark.parametrize(
    ("train", "cut"),
    [
        ({"batch_size": 64, "micro_batch_size": 8, "processes": 1}, (8, 8)),
        ({"batch_size": 64, "micro_batch_size": 8, "processes": 8}, (8, 1)),
        ({"batch_size": 64, "micro_batch_size": 4, "processes": 8}, (4, 2)),
        ({"batch_size": 64, "micro_batch_size": 32, "processes": 16}, (4, 1)),
        ({"batch_size": 8, "micro_batch_size": 64, "processes": 1}, (8, 1)),
    ],
)
def test_processes_and_micro_batches_multiply_to_the_batch(train, cut):
    assert equal_micro_batches(train) == cut
    assert train["processes"] * cut[0] * cut[1] == train["batch_size"]
    assert resolve({"train": train})


def test_run_uses_its_keys_then_main_then_its_settings():
    runs = resolve(
        {
            "train": {"beta": 0.5},
            "responses": {"samples": 3},
            "runs": {"k2": {"responses": {"samples": 2}, "settings": "repo"}},
        }
    )
    assert runs["k2"]["responses"]["samples"] == 2
    assert runs[""]["responses"]["samples"] == 3
    assert runs["k2"]["train"]["beta"] == 0.5
    assert runs[""]["responses"]["temperature"] == 1.0
    assert runs["k2"]["responses"]["temperature"] == 0.7


def test_null_restores_the_default():
    """In an overlay null means the default of the settings, unless null is a value of the key."""
    for settings, epochs in (("paper", 18), ("repo", 1)):
        run = resolve(
            {
                "settings": settings,
                "iterations": None,
                "train": {
                    "schedule_total_epochs": None,
                    "learning_rate": "null",
                    "reference_every": None,
                },
                "prompts": {"per_iteration": None},
            }
        )[""]
        assert run == resolve({"settings": settings, "train": {"reference_every": None}})[""]
        assert run["train"]["schedule_total_epochs"] == epochs
        assert run["train"]["learning_rate"] == 5e-7
        assert run["iterations"] == 3
        assert run["train"]["reference_every"] is None
        assert run["prompts"]["per_iteration"] is None


def test_null_in_a_run_restores_the_default():
    written = {"dpo": {}, "own": {"train": {"beta": None}}}
    runs = resolve({"train": {"beta": 0.5, "batch_size": 32}, "runs": written})
    assert {name: run["train"]["beta"] for name, run in runs.items()} == {
        "": 0.5,
        "dpo": 0.5,
        "own": 0.001,
    }
    assert {run["train"]["batch_size"] for run in runs.values()} == {32}


def test_run_that_is_null_does_not_exist():
    assert list(resolve({"runs": {"spin": None, "dpo": {}}})) == ["", "dpo"]


def test_run_may_share_only_the_first_iteration():
    hard = {
        "first_iteration_from": "main",
        "train": {"loss": "sppo_hard"},
        "seeds": {"train": 5},
    }
    runs = resolve({"runs": {"hard": hard}})
    assert runs["hard"]["first_iteration_from"] == "main"
    assert runs[""]["first_iteration_from"] is None


BAD = {
    "unknown key": ({"iteratoins": 3}, ["unknown key iteratoins", "did you mean iterations?"]),
    "unknown nested key": (
        {"train": {"betta": 1}},
        ["unknown key train.betta", "did you mean beta?"],
    ),
    "unknown key in a run": (
        {"runs": {"dpo": {"train": {"betta": 1}}}},
        ["unknown key runs.dpo.train.betta"],
    ),
    "unknown top-level key in a run": (
        {"runs": {"dpo": {"trian": {}}}},
        ["unknown key runs.dpo.trian"],
    ),
    "wrong type": ({"iterations": "three"}, ["iterations is 'three'", "integer"]),
    "boolean as text": ({"keep_policies": "yes"}, ["keep_policies is 'yes'", "boolean"]),
    "K = 1": ({"responses": {"samples": 1}}, ["responses.samples", "K = 1"]),
    "K = 1 in a run": (
        {"runs": {"k1": {"responses": {"samples": 1}}}},
        ["runs.k1.responses.samples", "K = 1"],
    ),
    "beta = 0": ({"train": {"beta": 0}}, ["train.beta is 0", "greater than 0"]),
    "text where a number belongs": (
        {"train": {"learning_rate": "small"}},
        ["train.learning_rate is 'small'", "number"],
    ),
    "unknown choice": ({"train": {"loss": "dop"}}, ["train.loss is 'dop'", "sppo_hard"]),
    "too large": ({"responses": {"top_p": 1.5}}, ["responses.top_p is 1.5", "at most 1"]),
    "section is null": ({"train": None}, ["train is null", "object"]),
    "runs is null": ({"runs": None}, ["runs is null", "object"]),
    "a run's section is null": (
        {"runs": {"dpo": {"train": None}}},
        ["runs.dpo.train is null", "object"],
    ),
    "unknown key that is null": (
        {"train": {"betta": None}},
        ["unknown key train.betta", "did you mean beta?"],
    ),
    "hub repository without {t}": (
        {"push_to_hub": "me/policy"},
        ["push_to_hub", "me/policy"],
    ),
    "push_to_hub of a run": (
        {"runs": {"a": {"push_to_hub": "me/a-{t}"}}},
        ["runs.a", "push_to_hub"],
    ),
    "reserved run name": ({"runs": {"tables": {}}}, ["runs.tables", "reserved"]),
    "run name of an iteration": ({"runs": {"iter1": {}}}, ["runs.iter1", "reserved"]),
    "run name with a slash": ({"runs": {"a/b": {}}}, ["a/b"]),
    "name with a parent folder": ({"name": "../x"}, ["name"]),
    "run overrides a shared key": (
        {"runs": {"big": {"policy": {"model": "x/y"}}}},
        ["runs.big", "policy"],
    ),
    "runs inside a run": ({"runs": {"a": {"runs": {}}}}, ["runs.a", "runs"]),
    "first iteration from another run": (
        {"runs": {"a": {"first_iteration_from": "b"}}},
        ["runs.a.first_iteration_from", "'b'"],
    ),
    "shared first iteration, different K": (
        {"runs": {"a": {"first_iteration_from": "main", "responses": {"samples": 2}}}},
        ["runs.a", "responses.samples"],
    ),
    "shared first iteration, different data seed": (
        {"runs": {"a": {"first_iteration_from": "main", "seeds": {"data": 1}}}},
        ["runs.a", "seeds.data"],
    ),
    "stop after the end of the schedule": (
        {"train": {"schedule_total_epochs": 1, "stop_epoch": 2}},
        ["train.stop_epoch", "train.schedule_total_epochs"],
    ),
    "TRL with a soft loss": ({"train": {"backend": "trl"}}, ["TRL", "train.loss"]),
    "TRL with loss_scale": (
        {"train": {"backend": "trl", "loss": "sppo_hard", "loss_scale": "beta_squared"}},
        ["TRL", "train.loss_scale"],
    ),
    "responses at temperature 0": (
        {"responses": {"temperature": 0}},
        ["responses.temperature is 0", "pairs.construction: gold"],
    ),
    "too few instructions": (
        {"alpaca_eval": {"limit": 3}},
        ["alpaca_eval.limit is 3", "at least 5"],
    ),
    "experiment name equal to a run name": (
        {"name": "k2", "runs": {"k2": {}}},
        ["name is k2", "results/k2/"],
    ),
    "keep_policies of a run": (
        {"runs": {"a": {"keep_policies": False}}},
        ["runs.a", "keep_policies"],
    ),
    "shared first iteration, different instructions": (
        {
            "runs": {
                "a": {"first_iteration_from": "main", "alpaca_eval": {"instructions": "x.json"}}
            }
        },
        ["runs.a", "alpaca_eval.instructions"],
    ),
    "shared first iteration, different iterations": (
        {"runs": {"a": {"first_iteration_from": "main", "iterations": 5}}},
        ["runs.a", "iterations"],
    ),
    "EXO without smoothing": (
        {"train": {"loss": "exo"}},
        ["train.loss exo", "train.label_smoothing above 0"],
    ),
    "RSPO without an older reference": (
        {"train": {"loss": "rspo"}},
        ["train.loss rspo", "train.reference_every"],
    ),
    "opponents without pi_t": (
        {"train": {"loss": "mnpo", "tau": 0.0001, "reference_every": None, "history": [0, 1]}},
        ["train.history", "raise the first number"],
    ),
    "lookahead with the base as reference": (
        {"train": {"loss": "ipo", "lookahead": True, "reference_every": None}},
        ["train.lookahead", "train.reference_every: 1"],
    ),
    "the same prompts from a source of each iteration": (
        {"prompts": {"source": "me/prompts{t}", "repeat": True}},
        ["prompts.repeat: false"],
    ),
    "left out gold responses": (
        {
            "pairs": {"construction": "gold", "gold": "g.jsonl", "truncated": "leave_out"},
            "train": {"loss": "dpo"},
        },
        ["pairs.truncated leave_out", "pairs.truncated: keep"],
    ),
    "TRL with a weight for length": (
        {"train": {"backend": "trl", "loss": "dpo", "length_weight": 0.1}},
        ["TRL", "train.length_weight"],
    ),
    "TRL with smoothed DPO": (
        {"train": {"backend": "trl", "loss": "dpo", "label_smoothing": 0.1}},
        ["TRL", "train.label_smoothing"],
    ),
    "TRL with IPO": (
        {"train": {"backend": "trl", "loss": "ipo"}},
        ["TRL", "train.per_token"],
    ),
    "TRL with the base as reference": (
        {"train": {"backend": "trl", "loss": "dpo", "reference_every": None}},
        ["TRL", "train.reference_every"],
    ),
    "KTO with gradient accumulation": (
        {"train": {"loss": "kto_pair"}},
        ["kto_pair", "train.micro_batch_size"],
    ),
    "Nash-MD with best_vs_worst pairs": (
        {"train": {"loss": "nash_md", "tau": 0.0003}},
        ["nash_md", "pairs.construction: all"],
    ),
    "Nash-MD without the pairs of truncated responses": (
        {
            "train": {"loss": "nash_md", "tau": 0.0003, "reference_every": None},
            "pairs": {"construction": "all", "truncated": "drop"},
        },
        ["nash_md", "pairs.truncated: keep or leave_out"],
    ),
    "MPO's tau without another reference": (
        {"train": {"loss": "mpo", "tau": 0.0003}},
        ["train.loss mpo", "train.reference_every: null"],
    ),
    "tau above beta": (
        {"train": {"loss": "inpo", "beta": 0.01, "tau": 0.02}},
        ["train.tau", "train.beta"],
    ),
    "extrapolation of the main run": (
        {"extrapolation": 0.3},
        ["extrapolation", "belongs to a run"],
    ),
    "gold pairs without a gold file": (
        {"pairs": {"construction": "gold"}, "train": {"loss": "dpo"}},
        ["pairs.construction", "pairs.gold"],
    ),
    "gold file with best_vs_worst pairs": (
        {"pairs": {"gold": "gold.jsonl"}},
        ["pairs.construction", "pairs.gold"],
    ),
    "graded pairs with SPPO": (
        {"pairs": {"construction": "graded"}},
        ["train.loss sppo", "P-hat", "pairs.construction graded"],
    ),
    "graded pairs with DNO in a run": (
        {"runs": {"a": {"pairs": {"construction": "graded"}, "train": {"loss": "dno"}}}},
        ["runs.a", "train.loss dno", "pairs.construction graded"],
    ),
    "gold pairs with SPPO": (
        {"pairs": {"construction": "gold", "gold": "x.jsonl"}},
        ["train.loss sppo", "P-hat", "pairs.construction gold"],
    ),
    "INPO without tau": (
        {"train": {"loss": "inpo", "reference_every": None}},
        ["train.loss inpo", "train.tau above 0"],
    ),
    "INPO without the base as reference": (
        {"train": {"loss": "inpo", "beta": 0.01, "tau": 0.005}},
        ["train.loss inpo", "train.reference_every: null"],
    ),
    "graded pairs with target rewards": (
        {"pairs": {"construction": "graded", "target_reward": True}, "train": {"loss": "dpo"}},
        ["pairs.target_reward", "pairs.construction graded"],
    ),
    "grades from llm-blender": (
        {
            "pairs": {"construction": "graded"},
            "train": {"loss": "dpo"},
            "preference": {"backend": "llm_blender"},
        },
        ["grades.judge preference", "preference.backend llm_blender"],
    ),
    "grade margin of 0": (
        {"pairs": {"own_grade_margin": 0}},
        ["pairs.own_grade_margin is 0", "greater than 0"],
    ),
    "target rewards with SPPO": (
        {"pairs": {"target_reward": True}},
        ["pairs.target_reward", "train.loss sppo"],
    ),
    "target rewards with gold pairs": (
        {
            "pairs": {"target_reward": True, "construction": "gold", "gold": "x.jsonl"},
            "train": {"loss": "dpo"},
        },
        ["pairs.target_reward", "construction gold"],
    ),
    "permuted labels with gold pairs": (
        {
            "pairs": {"labels": "permuted", "construction": "gold", "gold": "x.jsonl"},
            "train": {"loss": "dpo"},
        },
        ["pairs.labels permuted", "pairs.construction gold", "set pairs.labels: annotated"],
    ),
    "flipped labels with graded pairs": (
        {
            "pairs": {"labels": "flipped", "construction": "graded"},
            "train": {"loss": "dpo"},
        },
        ["pairs.labels flipped", "pairs.construction graded", "set pairs.labels: annotated"],
    ),
    "unknown labels": (
        {"pairs": {"labels": "shuffled"}},
        ["pairs.labels is 'shuffled'", "annotated, permuted, flipped"],
    ),
    "SFT in TRL": (
        {"train": {"backend": "trl", "loss": "sft"}},
        ["TRL has no loss sft"],
    ),
    "base that this experiment makes": (
        {"name": "x", "policy": {"model": "results/x/iter2/policy"}},
        ["policy.model is results/x/iter2/policy", "name is x", "set another name"],
    ),
    "base that a run of this experiment makes": (
        {"policy": {"model": "./results/a/iter1/policy"}, "runs": {"a": {"train": {"beta": 1}}}},
        ["policy.model is ", "results/a/iter1/policy", "name is not set"],
    ),
    "implicit rewards with SFT": (
        {"preference": {"implicit": True}, "train": {"loss": "sft"}},
        ["preference.implicit", "with a reference"],
    ),
    "implicit rewards with the base as reference": (
        {"preference": {"implicit": True}, "train": {"loss": "dpo", "reference_every": None}},
        ["preference.implicit", "reference_every: 1"],
    ),
    "implicit rewards with an auxiliary policy": (
        {"preference": {"implicit": True}, "train": {"loss": "ipo", "lookahead": True}},
        ["preference.implicit", "train.lookahead: false"],
    ),
    "implicit rewards without a reference": (
        {"preference": {"implicit": True}, "train": {"loss": "simpo"}},
        ["preference.implicit", "with a reference"],
    ),
    "implicit rewards with graded pairs": (
        {
            "preference": {"implicit": True},
            "pairs": {"construction": "graded"},
            "train": {"loss": "dpo"},
        },
        ["preference.implicit", "graded"],
    ),
    "TRL with optimism": (
        {"train": {"backend": "trl", "loss": "dpo", "optimism": 0.1}},
        ["TRL", "optimism"],
    ),
    "Nash-MD with a margin": (
        {"pairs": {"construction": "all", "margin": 0.2}, "train": {"loss": "nash_md"}},
        ["nash_md", "pairs.margin: 0"],
    ),
    "even lengths with all pairs": (
        {"pairs": {"even_lengths": True, "construction": "all"}},
        ["pairs.even_lengths", "pairs.construction: best_vs_worst"],
    ),
    "empty list of learning rates": ({"train": {"learning_rate": []}}, ["train.learning_rate"]),
    "KTO in a run with main's processes": (
        {
            "train": {"processes": 2},
            "runs": {"a": {"train": {"loss": "kto_pair", "micro_batch_size": 64}}},
        },
        ["runs.a: train.loss kto_pair", "train.processes: 1"],
    ),
    "KTO in two processes": (
        {"train": {"loss": "kto_pair", "micro_batch_size": 64, "processes": 2}},
        ["kto_pair", "train.processes: 1"],
    ),
    "processes that do not divide the batch": (
        {"train": {"processes": 6}},
        ["train.batch_size (64)", "train.micro_batch_size (8) x train.processes (6)"],
    ),
    "more processes than pairs": (
        {"train": {"processes": 128}},
        ["train.batch_size (64)", "train.processes (128)"],
    ),
    "micro-batches of all processes that do not divide the batch": (
        {"train": {"processes": 4, "micro_batch_size": 3}},
        ["train.micro_batch_size (3) x train.processes (4)"],
    ),
    "processes that are no multiple of nodes": (
        {"train": {"processes": 8, "nodes": 3}},
        ["train.processes (8)", "train.nodes (3)"],
    ),
    "fewer processes than nodes": (
        {"train": {"nodes": 2}},
        ["train.processes (1)", "train.nodes (2)"],
    ),
    "FSDP2 in one process": (
        {"train": {"parallel": "fsdp2"}},
        ["train.parallel fsdp2", "train.processes is 1"],
    ),
    "FSDP2 on the CPU": (
        {"device": "cpu", "train": {"parallel": "fsdp2", "processes": 2}},
        ["train.parallel fsdp2 needs GPUs"],
    ),
    "HSDP on one node": (
        {"train": {"parallel": "hsdp", "processes": 8}},
        ["train.parallel hsdp", "train.nodes is 1", "fsdp2"],
    ),
    "HSDP with one process on each node": (
        {"train": {"parallel": "hsdp", "processes": 2, "nodes": 2}},
        ["train.parallel hsdp", "train.processes is 2", "fsdp2"],
    ),
    "ZeRO-3 with LoRA": (
        {"train": {"parallel": "zero3", "processes": 8, "lora_rank": 8}},
        ["train.parallel zero3", "train.lora_rank"],
    ),
    "ZeRO-3 with an optimiser of 8 bits": (
        {"train": {"parallel": "zero3", "processes": 8, "optimizer": "adamw_bnb_8bit"}},
        ["train.optimizer adamw_bnb_8bit", "train.parallel zero3"],
    ),
    "TRL in two processes": (
        {"train": {"backend": "trl", "loss": "dpo", "processes": 2}},
        ["TRL", "train.processes: 1"],
    ),
    "tensor parallelism without vllm": (
        {"responses": {"tensor_parallel": 2}},
        ["responses.tensor_parallel is 2", "engine: vllm"],
    ),
    "engine of a run": (
        {"runs": {"a": {"responses": {"engine": "vllm"}}}},
        ["runs.a", "responses.engine"],
    ),
    "tensor parallelism of a run": (
        {"responses": {"engine": "vllm"}, "runs": {"a": {"responses": {"tensor_parallel": 2}}}},
        ["runs.a", "responses.tensor_parallel"],
    ),
    "experiment name in capitals": ({"name": "MyRun"}, ["name is 'MyRun'", "lower-case letters"]),
    "run name in capitals": (
        {"runs": {"MyRun": {}}},
        ["name of a run in runs is 'MyRun'", "lower-case letters"],
    ),
    "experiment name with a newline": (
        {"name": "mine\n"},
        ["name is 'mine\\n'", "form"],
    ),
    "run name with a newline": ({"runs": {"mine\n": {}}}, ["'mine\\n'", "form"]),
    "hub repository with a newline": ({"push_to_hub": "me/a-{t}\n"}, ["push_to_hub", "form"]),
    "experiment name of 300 letters": (
        {"name": "x" * 300},
        ["name is 'xxx", "at most 100 characters"],
    ),
    "run name of 300 letters": ({"runs": {"x" * 300: {}}}, ["'xxx", "at most 100 characters"]),
    "too many shards": ({"responses": {"shards": 257}}, ["responses.shards", "at most 256"]),
    "more shards than prompts": (
        {"responses": {"shards": 9}, "prompts": {"per_iteration": 8}},
        ["responses.shards is 9", "prompts.per_iteration is 8"],
    ),
    "too many iterations": ({"iterations": 101}, ["iterations", "at most 100"]),
    "integer of more than 64 bits": ({"iterations": 10**30}, ["iterations is 1000000", "64 bits"]),
    "integer with too many digits for Python": (
        {"train": {"beta": 16**5000}},
        ["train.beta is a number of thousands of digits"],
    ),
    "integer too large for a float": (
        {"train": {"tau": 10**400}},
        ["train.tau is 10000", "64 bits"],
    ),
    "integer too large for a float in a list": (
        {"train": {"learning_rate": [10**400]}},
        ["train.learning_rate", "64 bits"],
    ),
    "integer with too many digits in a run": (
        {"runs": {"a": {"prompts": {"source": 16**5000}}}},
        ["runs.a.prompts.source", "thousands of digits"],
    ),
    "integer with too many digits as a key": (
        {16**5000: 1},
        ["key a number of thousands of digits is not text"],
    ),
    "seed of more than 32 bits": (
        {"seeds": {"train": 2**32}},
        ["seeds.train is 4294967296", "at most 4294967295"],
    ),
    "key of 5000 letters": ({"x" * 5000: 1}, ["unknown key xxxxx", "...; known are"]),
    "text in a list of numbers": (
        {"train": {"learning_rate": ["fast"]}},
        ["train.learning_rate.0 is 'fast'", "number"],
    ),
    "home folder of an unknown user": (
        {"policy": {"model": "~no such user/x"}},
        ["policy.model", "no such user"],
    ),
    "home folder of an unknown user in a run": (
        {"runs": {"a": {"pairs": {"gold": "~no such user/x"}}}},
        ["runs.a", "pairs.gold", "no such user"],
    ),
    "braces in a path": (
        {"open_llm": {"data": "/data/{x}"}},
        ["open_llm.data is '/data/{x}'", "braces"],
    ),
    "braces in a revision": (
        {"policy": {"revision": "{x}"}},
        ["policy.revision is '{x}'", "braces"],
    ),
    "braces in a run's path": (
        {"runs": {"a": {"mt_bench": {"data": "{x}"}}}},
        ["runs.a.mt_bench.data", "braces"],
    ),
    "unknown wildcard": (
        {"prompts": {"source": "me/p{t}{x}"}},
        ["prompts.source", "braces"],
    ),
    "micro-batches that do not divide the batch": (
        {"train": {"batch_size": 10, "micro_batch_size": 4}},
        ["train.batch_size", "train.micro_batch_size"],
    ),
}


@pytest.mark.parametrize(("written", "words"), BAD.values(), ids=BAD)
def test_bad_key_is_a_one_line_error_with_its_name(written, words):
    line = refusal(written)
    assert all(word in line for word in words), line


ADDRESSES = [
    "",
    " ",
    "nonsense",
    "localhost:8000",
    "ftp://x",
    "http://",
    "http://:80",
    "http://[::1",
    "http://a b/v1",
    "http://host:port",
    "http://host:99999",
    "http://host:0",
    "http://host/v1\n",
]


@pytest.mark.parametrize("section", ["alpaca_eval", "mt_bench", "grades"])
@pytest.mark.parametrize("address", ADDRESSES)
def test_invalid_server_address_is_refused(address, section):
    line = refusal({section: {"judge": "openai", "judge_model": "m", "judge_base_url": address}})
    assert f"{section}.judge_base_url" in line
    assert "http://localhost:8000/v1" in line


@pytest.mark.parametrize(
    "address",
    [
        "http://localhost:8000/v1",
        "https://api.openai.com/v1",
        "http://[::1]:80",
        "http://10.0.0.1/v1",
    ],
)
def test_valid_server_address_is_accepted(address):
    assert (
        resolve({"mt_bench": {"judge_base_url": address}})[""]["mt_bench"]["judge_base_url"]
        == address
    )


@pytest.mark.parametrize(
    "address", ["http://user:secret@host/v1", "https://secret@host", "http://user:secret@[::1"]
)
def test_password_in_an_address_is_refused_and_hidden(address):
    line = refusal({"runs": {"a": {"alpaca_eval": {"judge_base_url": address}}}})
    assert "runs.a" in line
    assert "alpaca_eval.judge_base_url" in line
    assert "OPENAI_API_KEY" in line
    assert "secret" not in line


def test_numbers_in_a_list_may_be_text():
    """YAML reads 5e-7 as text, also in a list."""
    train = resolve({"train": {"learning_rate": ["5e-7", 1e-7]}})[""]["train"]
    assert train["learning_rate"] == [5e-7, 1e-7]


PATHS = [
    f"{section}.{key}"
    for section in SECTIONS
    for key, rule in schema()["properties"][section]["properties"].items()
    if rule.get("x-path")
]


@pytest.mark.parametrize("name", PATHS)
def test_tilde_in_a_path_becomes_the_home_folder(name, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    section, key = name.split(".")
    written = {section: {key: "~/file"}}
    if section != "policy":
        written["runs"] = {"a": {section: {key: "~/other"}}}
    if section == "pairs":
        written["pairs"]["construction"] = "graded"
        written["train"] = {"loss": "dpo"}
    runs = resolve(written)
    assert runs[""][section][key] == "/home/me/file"
    if section != "policy":
        assert runs["a"][section][key] == "/home/me/other"


def test_keys_that_name_files_are_marked_as_paths():
    assert {
        "policy.model",
        "prompts.source",
        "pairs.gold",
        "alpaca_eval.instructions",
        "mt_bench.data",
        "open_llm.data",
    } < set(PATHS)
    assert not {"policy.revision", "train.loss", "alpaca_eval.judge_model"} & set(PATHS)


# --- keys without effect ---

IDLE = {
    "tau": ({"train": {"tau": 0.1}}, "train.tau has no effect where train.loss is sppo"),
    "gamma": (
        {"train": {"gamma": 2, "loss": "dpo"}},
        "train.gamma has no effect where train.loss is dpo",
    ),
    "label smoothing": ({"train": {"label_smoothing": 0.1}}, "train.label_smoothing"),
    "IPO's target": ({"train": {"ipo_target": 1}}, "train.ipo_target"),
    "per_token without IPO": ({"train": {"per_token": True}}, "train.per_token"),
    "opponents of another loss": (
        {"train": {"history": [1, 1]}},
        "train.history has no effect where train.loss is sppo",
    ),
    "a weight for length": ({"train": {"length_weight": 0.1}}, "train.length_weight"),
    "LoRA's scale": (
        {"train": {"lora_alpha": 32}},
        "train.lora_alpha has no effect where train.lora_rank is 0",
    ),
    "warm-up": ({"train": {"lr_schedule": "constant", "warmup_ratio": 0.2}}, "train.warmup_ratio"),
    "share of older pairs": (
        {"replay": {"older_share": 0.5}},
        "replay.older_share has no effect where replay.share is 0",
    ),
    "iteration to replay": ({"replay": {"iteration": "first"}}, "replay.iteration"),
    "winner grade": (
        {"pairs": {"winner_grade": 4}},
        "pairs.winner_grade has no effect where pairs.construction is best_vs_worst",
    ),
    "grade margin of gold": (
        {
            "pairs": {"construction": "graded", "gold_grade_margin": 1},
            "train": {"loss": "dpo"},
        },
        "pairs.gold_grade_margin has no effect where pairs.gold is null",
    ),
    "address of an unused judge": (
        {"mt_bench": {"judge_base_url": "http://h"}},
        "mt_bench.judge_base_url",
    ),
    "model of an unused judge": (
        {"alpaca_eval": {"judge_model": "m"}},
        "alpaca_eval.judge_model has no effect where alpaca_eval.judge is judge",
    ),
    "PairRM's precision": ({"preference": {"precision": "float32"}}, "preference.precision"),
    "PairRM's window": ({"preference": {"max_prompt_tokens": 100}}, "preference.max_prompt_tokens"),
    "logit scale with blender": (
        {"pairs": {"logit_scale": 1, "probability": "blender"}},
        "pairs.logit_scale",
    ),
    "revision of the embedded policy": ({"policy": {"revision": "abc"}}, "policy.revision"),
    "revision of a local file": ({"prompts": {"revision": "abc"}}, "prompts.revision"),
    "tau in a run": (
        {"runs": {"a": {"train": {"tau": 0.1}}}},
        "runs.a.train.tau has no effect where train.loss is sppo",
    ),
    "training key of an extrapolated run": (
        {"runs": {"a": {"extrapolation": 0.3, "train": {"beta": 1}}}},
        "runs.a.train.beta has no effect where extrapolation is 0.3",
    ),
}


@pytest.mark.parametrize(("written", "line"), IDLE.values(), ids=IDLE)
def test_key_without_effect_is_reported_in_one_line(written, line):
    found = all_lines(written)
    assert len(found) == 1, found
    assert f"config: {line}" in found[0], found


@pytest.mark.parametrize(
    "written",
    [
        {},
        {"train": {"loss": "mmpo", "gamma": 2, "lora_rank": 8, "lora_alpha": 32}},
        {"train": {"tau": None}},
        {"replay": {"share": 1, "older_share": 0.5}},
        {"prompts": {"source": "me/data", "revision": "abc"}},
        {
            "train": {"gamma": 2, "loss": "simpo"},
            "runs": {"a": {"train": {"loss": "sppo"}}},
            "name": "x",
        },
    ],
    ids=["no key", "MMPO and LoRA", "null", "replay", "hub data", "main key that a run ignores"],
)
def test_key_with_an_effect_is_not_reported(written):
    assert all_lines(written) == []


def test_main_key_used_only_by_a_run_has_an_effect():
    written = {"train": {"gamma": 2}, "runs": {"a": {"train": {"loss": "simpo"}}}}
    assert all_lines(written) == []
    written["runs"]["a"]["train"]["gamma"] = 1  # Now no run uses main's gamma.
    line = "config: train.gamma has no effect where train.loss is sppo"
    assert all_lines(written) == [line]


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_file_has_no_key_without_effect(file):
    assert all_lines(read_files([file])) == []


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_reserved_word_is_refused_as_a_run_name(name):
    assert name in refusal({"runs": {name: {}}})


@pytest.mark.parametrize("name", ["iter1", *sorted(RESERVED)])
def test_reserved_word_is_refused_as_an_experiment_name(name):
    """results/models/ and results/iter1/ contain artifacts of the default experiment."""
    assert name in refusal({"name": name})


@pytest.mark.parametrize(
    "written", [{3: 1}, {"runs": {2: {}}}, {"train": {True: 1}}], ids=["top", "run", "nested"]
)
def test_key_that_is_not_text_is_a_one_line_error(written):
    refusal(written)


@pytest.mark.parametrize(
    "written", [{"iterations": 3.0}, {"responses": {"samples": 5.0}}], ids=["iterations", "samples"]
)
def test_float_for_an_integer_is_refused_or_converted(written):
    """JSON Schema accepts 5.0 as an integer, but a program's --samples does not."""
    try:
        run = resolve(written)[""]
    except UserError as error:
        assert "3.0" in str(error) or "5.0" in str(error)
    else:
        assert type(run["iterations"]) is int
        assert type(run["responses"]["samples"]) is int


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused(value):
    assert "train.beta" in refusal({"train": {"beta": value}})


def other_value(rule: dict):
    """A valid value that is not a default of `paper` or `repo`, if there is one."""
    defaults = [default_of(rule, "paper"), default_of(rule, "repo")]
    types = [rule["type"]] if isinstance(rule["type"], str) else rule["type"]
    if "enum" in rule:
        others = [value for value in rule["enum"] if value not in [*defaults, None]]
        return others[0] if others else rule["enum"][0]
    if "boolean" in types:
        return not defaults[0]
    if "object" in types:
        return {"enable_thinking": False, "date_string": 'it\'s "so"', "levels": [1, None]}
    if rule.get("pattern", "").startswith("^[0-9]{4}-"):
        return "1999-12-31"
    if "pattern" in rule:
        return "x"
    if types == ["array"]:
        return [other_value(rule["items"] | {"default": 0}), 2.0]
    examples = {"integer": 123, "number": 0.1234567890123, "string": "a folder/with 'quotes' {t}"}
    return examples[types[0]]


# `summary` only says what a target needs; no program has flags for it.
@pytest.mark.parametrize("section", [key for key in SECTIONS if key != "summary"])
@pytest.mark.parametrize("settings", ["paper", "repo", "other"])
def test_flags_reproduce_the_section_in_a_program(section, settings):
    rules = schema()["properties"][section]["properties"]
    values = {
        key: other_value(rule) if settings == "other" else default_of(rule, settings)
        for key, rule in rules.items()
    }
    if settings == "other":
        for key, rule in rules.items():
            jsonschema.validate(values[key], rule)
    parser = argparse.ArgumentParser()
    add_section(parser, section)
    words = flags(values)
    assert all(isinstance(word, str) for word in words)
    assert vars(parser.parse_args(words)) == values


def test_value_may_start_with_a_hyphen():
    parser = argparse.ArgumentParser()
    add_section(parser, "prompts")
    assert parser.parse_args(flags({"field": "-x", "split": "--help"})).field == "-x"


def test_chat_template_variables_keep_their_types():
    """`snakemake --config policy={...}` gives only text."""
    given = {"enable_thinking": "false", "effort": "none", "budget": 5, "mode": "007"}
    policy = resolve({"policy": {"chat_template_kwargs": given}})[""]["policy"]
    expected = given | {"enable_thinking": False}
    assert policy["chat_template_kwargs"] == expected


def test_null_removes_all_chat_template_variables():
    policy = resolve({"policy": {"chat_template_kwargs": None}})[""]["policy"]
    assert policy["chat_template_kwargs"] == {}


@pytest.mark.parametrize("name", ["messages", "add_generation_prompt", "Enable", "a b", "a-b"])
def test_invalid_chat_template_variable_name_is_refused(name):
    assert "policy.chat_template_kwargs" in refusal({"policy": {"chat_template_kwargs": {name: 1}}})


def test_template_date_needs_no_quotes():
    written = yaml.safe_load("policy: {template_date: 2025-01-31}")
    assert resolve(written)[""]["policy"]["template_date"] == "2025-01-31"


def test_template_date_that_is_not_a_day_is_refused():
    line = refusal({"policy": {"template_date": "2025-02-31"}})
    assert "policy.template_date is 2025-02-31" in line
    assert "policy.template_date" in refusal({"policy": {"template_date": "today"}})


def test_object_flag_accepts_only_a_json_object(capsys):
    parser = argparse.ArgumentParser()
    add_section(parser, "policy", only=("chat_template_kwargs",))
    for text in ("5", "{", "[1]"):
        with pytest.raises(SystemExit):
            parser.parse_args(["--chat-template-kwargs", text])
        assert "is not a JSON object" in capsys.readouterr().err


@pytest.mark.parametrize("gold", [None, "gold.jsonl"])
def test_graded_pairs_need_no_gold_responses(gold):
    pairs = {"construction": "graded", "gold": gold}
    run = resolve({"pairs": pairs, "train": {"loss": "dpo"}})[""]
    assert run["pairs"]["gold"] == gold
    assert run["grades"] == {"judge": "preference", "judge_model": None, "judge_base_url": None}


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_renamed_key_is_a_one_line_error_with_the_new_name(old, new):
    section, key = old.split(".")
    assert refusal({section: {key: 1}}) == f"config: {old} is now called {new}; rename it"
    line = f"config: runs.a.{old} is now called {new}; rename it"
    assert refusal({"runs": {"a": {section: {key: 1}}}}) == line
    new_section, new_key = new.split(".")
    assert new_key in schema()["properties"][new_section]["properties"]


def test_renamed_value_is_a_one_line_error_with_the_new_name():
    line = refusal({"pairs": {"construction": "extremes"}})
    assert line == "config: pairs.construction: extremes is now called best_vs_worst; write that"


# --- runs are checked when they are requested ---


def test_invalid_run_fails_only_when_it_is_requested():
    runs = resolve({"runs": {"good": {}, "bad": {"train": {"betta": 1}}}})
    assert isinstance(runs, Runs)
    assert list(runs) == ["", "good", "bad"]
    assert list(runs.usable()) == ["", "good"]
    with pytest.raises(UserError, match="runs.bad.train.betta"):
        runs["bad"]


# --- files that extend other files ---


def written_to(folder: Path, **files: str) -> dict[str, Path]:
    paths = {name: folder / f"{name}.yaml" for name in files}
    for name, path in paths.items():
        path.write_text(files[name], encoding="utf-8")
    return paths


def test_file_without_extends_uses_only_the_defaults(tmp_path):
    files = written_to(tmp_path, own="name: own\n")
    assert dict(resolve(read_files([files["own"]]))) == {"": resolve({"name": "own"})[""]}


def test_extending_file_overrides_the_extended_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = written_to(
        tmp_path,
        a="iterations: 1\ntrain: {beta: 1, tau: 1}\nruns: {x: {}, y: {}}\n",
        b="extends: a.yaml\ntrain: {beta: 2}\n",
        c="extends: b.yaml\niterations: null\nruns: {y: null}\n",
    )
    assert read_files([files["c"]]) == {
        "iterations": None,
        "train": {"beta": 2, "tau": 1},
        "runs": {"x": {}, "y": None},
    }
    assert list(resolve(read_files([files["c"]]))) == ["", "x"]


def test_command_line_and_later_files_override_extended_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = written_to(
        tmp_path, a="seeds: {data: 1, train: 1}\n", b="extends: a.yaml\n", c="seeds: {data: 2}\n"
    )
    written = read_configuration(
        [files["b"], files["c"]], {"seeds": {"train": 3}, "extends": "a.yaml"}
    )
    assert written == {"seeds": {"data": 2, "train": 3}}


def test_module_configuration_can_extend_a_file():
    written = read_configuration([], {"extends": "config/config.yaml", "name": "mine"})
    assert written == read_files([SHIPPED[0]]) | {"name": "mine"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("extends: b.yaml", ["b.yaml extends a.yaml", "remove one"]),
        ("extends: a.yaml", ["a.yaml extends a.yaml", "remove one"]),
        ("extends: no.yaml", ["no.yaml, which a.yaml extends, is missing"]),
        ("extends: [b.yaml]", ["a.yaml: extends is ['b.yaml']", "one file"]),
    ],
)
def test_bad_extends_is_a_one_line_error(text, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = written_to(tmp_path, a=text + "\n", b="extends: a.yaml\n")
    with pytest.raises(UserError) as caught:
        read_files([files["a"].name])
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("file", EVERY_FILE, ids=lambda file: file.stem)
def test_shipped_files_need_no_null_keys(file):
    """A file starts from the defaults of the paper, so it needs no null to undo the demo."""
    written = yaml.safe_load(file.read_text(encoding="utf-8"))
    written.pop("runs", None)
    nulls = [
        f"{section}.{key}"
        for section, keys in written.items()
        if isinstance(keys, dict)
        for key, value in keys.items()
        if value is None
    ]
    assert set(nulls) <= {"policy.revision"}


def test_list_gives_one_value_per_iteration():
    train = resolve({"train": {"beta": [0.1, 5.0], "learning_rate": 1e-6}})[""]["train"]
    assert [of_iteration(train, t)["beta"] for t in (1, 2, 3)] == [0.1, 5.0, 5.0]
    assert of_iteration(train, 3)["learning_rate"] == 1e-6


def test_flags_accept_skipped_keys_and_a_prefix():
    parser = argparse.ArgumentParser()
    add_section(parser, "replay", skip=("iteration",), prefix="replay_")
    words = flags(resolve({})[""]["replay"], skip=("iteration",), prefix="replay_")
    assert vars(parser.parse_args(words)) == {"replay_share": 0.0, "replay_older_share": 0.0}


def test_command_line_can_extend_a_file_if_no_file_is_given():
    written = read_configuration([], {"extends": "config/presets/laptop.yaml", "name": "q"})
    assert written == read_files([ROOT / "config/presets/laptop.yaml"]) | {"name": "q"}


def test_extends_on_the_command_line_beside_a_file_is_refused():
    with pytest.raises(UserError, match="extends is 'x.yaml', but files are given too"):
        read_configuration([SHIPPED[0]], {"extends": "x.yaml"})


def test_extended_files_come_before_all_files_that_extend(tmp_path, monkeypatch):
    """Otherwise what the second file extends would override the first file's own keys."""
    monkeypatch.chdir(tmp_path)
    files = written_to(
        tmp_path,
        base="iterations: 1\nname: base\n",
        a="extends: base.yaml\niterations: 2\n",
        b="extends: base.yaml\nname: b\n",
    )
    assert read_files([files["a"], files["b"]]) == {"iterations": 2, "name": "b"}


def test_json_with_tabs_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{\n\t"iterations": 1\n}\n', encoding="utf-8")
    assert read_files([tmp_path / "a.json"]) == {"iterations": 1}


def test_text_null_of_the_command_line_is_null():
    """`--config policy={attention: null}` hands over the text."""
    written = {
        "policy": {"attention": "null", "revision": "null"},
        "prompts": {"field": "null"},
        "push_to_hub": "null",
        "runs": {"a": "null", "b": {}},
    }
    runs = resolve(written)
    assert list(runs) == ["", "b"]
    assert runs[""] == resolve({})[""]


def test_error_in_the_files_of_a_run_names_the_run():
    runs = resolve({"runs": {"bad": {"prompts": {"source": "data/nowhere.jsonl"}}}})
    with pytest.raises(UserError, match="^config: runs.bad: prompts.source is"):
        check_inputs("bad", runs["bad"])


def test_key_that_another_kind_of_model_reads_has_no_effect():
    written = {"preference": {"model": "a.py:f", "precision": "float32", "revision": "abc"}}
    assert all_lines(written) == [
        f"config: preference.{key} has no effect where preference.model is a.py:f"
        for key in ("precision", "revision")
    ]
    assert all_lines({"preference": {"model": "me/PairRM", "revision": "abc"}}) == []


def test_loss_with_an_unknown_argument_is_one_line(monkeypatch):
    def mine(delta_w, deltal, alpha=0.3):
        return delta_w

    monkeypatch.setitem(LOSSES, "sppo", Loss(mine))
    line = refusal({})
    assert "train.loss sppo reads deltal, which is neither a column" in line
