"""Configuration: defaults hold, every bad key is one line that names it, flags carry every value to the programs."""

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
from sppo.training.requirements import micro_batches
from sppo.workflow.configuration import (
    RESERVED,
    Runs,
    read_configuration,
    resolve,
    without_effect,
)

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = [ROOT / "config" / "config.yaml", *sorted((ROOT / "config" / "presets").glob("*.yaml"))]
EVERY_FILE = [*SHIPPED, ROOT / "config" / "methods.yaml", ROOT / "config" / "paper_scale.yaml"]
SECTIONS = [key for key, rule in schema()["properties"].items() if "properties" in rule]


def leaves():
    """(dotted name, rule) of every key that takes a value."""
    for key, rule in schema()["properties"].items():
        for name, inner in rule.get("properties", {}).items():
            yield f"{key}.{name}", inner
        if "properties" not in rule:
            yield key, rule


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    """Paths in configurations begin at the working directory."""
    monkeypatch.chdir(ROOT)


def all_lines(written: dict) -> list[str]:
    """What `without_effect` says of all runs."""
    runs = resolve(written)
    return [line for name in runs.usable() for line in without_effect(written, name, runs)]


def refusal(written: dict) -> str:
    with pytest.raises(UserError) as caught:
        dict(resolve(written))  # asks for every run
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_alone_are_a_valid_configuration_and_resolve_to_themselves():
    main = resolve({})[""]
    assert (
        resolve({key: value for key, value in main.items() if key != "first_iteration_from"})[""]
        == main
    )
    assert (
        main["train"]
        | {
            "beta": 1e-3,
            "loss": "sppo",
            "optimizer": "rmsprop",
            "learning_rate": 5e-7,
            "batch_size": 64,
        }
        == main["train"]
    )


@pytest.mark.parametrize(("name", "rule"), list(leaves()))
def test_key_is_described_typed_and_has_a_valid_default(name, rule):
    assert rule["description"].strip() and rule["type"], name
    assert ("default" in rule) != ("x-settings" in rule), (
        f"{name} needs a default or x-settings, and only one"
    )
    if "x-settings" in rule:
        assert set(rule["x-settings"]) == {"paper", "repo"}
    for settings in ("paper", "repo"):
        jsonschema.validate(default_of(rule, settings), rule)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_file_resolves_and_only_the_default_is_unnamed(file):
    runs = resolve(read_files([file]))
    assert (runs[""]["name"] == "") == (file == SHIPPED[0])
    assert len(runs) > 20


def test_numbers_and_booleans_spelled_as_text_are_read():
    """As `snakemake --config section={key: 1}` hands them over, and as YAML reads 1e-6."""
    run = resolve(
        {
            "train": {"learning_rate": "1e-6", "gradient_checkpointing": "true"},
            "responses": {"shards": "2"},
            "alpaca_eval": {"limit": "null"},
        }
    )[""]
    assert run["train"]["learning_rate"] == 1e-6 and run["train"]["gradient_checkpointing"] is True
    assert run["responses"]["shards"] == 2 and run["alpaca_eval"]["limit"] is None


@pytest.mark.parametrize("file", EVERY_FILE, ids=lambda file: file.stem)
def test_shipped_file_reads_every_number_as_a_number(file):
    """YAML reads 1e-6 as text; the schema would refuse it where a number is wanted, not where a text is."""
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


def test_settings_switch_between_paper_and_official_code():
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


def test_one_key_set_by_hand_wins_over_settings_and_moves_no_other():
    base, one = (
        resolve({"settings": "repo"})[""],
        resolve({"settings": "repo", "responses": {"top_p": 0.5}})[""],
    )
    assert one["responses"].pop("top_p") == 0.5 and base["responses"].pop("top_p") == 0.9
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
def test_processes_micro_batches_and_accumulation_make_the_batch(train, cut):
    assert micro_batches(train) == cut
    assert train["processes"] * cut[0] * cut[1] == train["batch_size"] and resolve({"train": train})


def test_run_takes_its_override_then_the_main_run_then_its_own_settings():
    runs = resolve(
        {
            "train": {"beta": 0.5},
            "responses": {"samples": 3},
            "runs": {"k2": {"responses": {"samples": 2}, "settings": "repo"}},
        }
    )
    assert runs["k2"]["responses"]["samples"] == 2 and runs[""]["responses"]["samples"] == 3
    assert runs["k2"]["train"]["beta"] == 0.5
    assert (runs[""]["responses"]["temperature"], runs["k2"]["responses"]["temperature"]) == (
        1.0,
        0.7,
    )


def test_null_undoes_what_a_file_below_set():
    """An overlay hands a key back to its settings; of some keys null is a value, and stays one."""
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
        assert (
            run["train"]["schedule_total_epochs"],
            run["train"]["learning_rate"],
            run["iterations"],
        ) == (epochs, 5e-7, 3)
        assert run["train"]["reference_every"] is None and run["prompts"]["per_iteration"] is None


def test_null_in_a_run_undoes_what_main_sets_and_a_run_that_is_null_is_not_there():
    written = {"spin": None, "dpo": {}, "own": {"train": {"beta": None}}}
    runs = resolve({"train": {"beta": 0.5, "batch_size": 32}, "runs": written})
    assert list(runs) == ["", "dpo", "own"]
    assert [(run["train"]["beta"], run["train"]["batch_size"]) for run in runs.values()] == [
        (0.5, 32),
        (0.5, 32),
        (0.001, 32),
    ]


def test_run_may_share_the_first_iteration_and_train_otherwise():
    runs = resolve(
        {
            "runs": {
                "hard": {
                    "first_iteration_from": "main",
                    "train": {"loss": "sppo_hard"},
                    "seeds": {"train": 5},
                }
            }
        }
    )
    assert (
        runs["hard"]["first_iteration_from"] == "main" and runs[""]["first_iteration_from"] is None
    )


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
    "not a choice": ({"train": {"loss": "dop"}}, ["train.loss is 'dop'", "sppo_hard"]),
    "too large": ({"responses": {"top_p": 1.5}}, ["responses.top_p is 1.5", "at most 1"]),
    "section is null": ({"train": None}, ["train is None", "object"]),
    "runs is null": ({"runs": None}, ["runs is None", "object"]),
    "a run's section is null": (
        {"runs": {"dpo": {"train": None}}},
        ["runs.dpo.train is None", "object"],
    ),
    "unknown key that is null": (
        {"train": {"betta": None}},
        ["unknown key train.betta", "did you mean beta?"],
    ),
    "a hub repository without the iteration": (
        {"push_to_hub": "me/policy"},
        ["push_to_hub", "me/policy"],
    ),
    "a run on the hub": ({"runs": {"a": {"push_to_hub": "me/a-{t}"}}}, ["runs.a", "push_to_hub"]),
    "reserved run name": ({"runs": {"tables": {}}}, ["runs.tables", "reserved"]),
    "run called like an iteration": ({"runs": {"iter1": {}}}, ["runs.iter1", "reserved"]),
    "run name with a slash": ({"runs": {"a/b": {}}}, ["a/b"]),
    "name outside results": ({"name": "../x"}, ["name"]),
    "run overrides what all share": (
        {"runs": {"big": {"policy": {"model": "x/y"}}}},
        ["runs.big", "policy"],
    ),
    "runs inside a run": ({"runs": {"a": {"runs": {}}}}, ["runs.a", "runs"]),
    "first iteration from another run": (
        {"runs": {"a": {"first_iteration_from": "b"}}},
        ["runs.a.first_iteration_from", "'b'"],
    ),
    "shared first iteration, other K": (
        {"runs": {"a": {"first_iteration_from": "main", "responses": {"samples": 2}}}},
        ["runs.a", "responses.samples"],
    ),
    "shared first iteration, other data seed": (
        {"runs": {"a": {"first_iteration_from": "main", "seeds": {"data": 1}}}},
        ["runs.a", "seeds.data"],
    ),
    "stops after the schedule": (
        {"train": {"schedule_total_epochs": 1, "stop_epoch": 2}},
        ["train.stop_epoch", "train.schedule_total_epochs"],
    ),
    "TRL has no soft loss": ({"train": {"backend": "trl"}}, ["TRL", "train.loss"]),
    "TRL scales no loss": (
        {"train": {"backend": "trl", "loss": "sppo_hard", "loss_scale": "beta_squared"}},
        ["TRL", "train.loss_scale"],
    ),
    "greedy responses": ({"responses": {"temperature": 0}}, ["responses.temperature", "above 0"]),
    "too few instructions": (
        {"alpaca_eval": {"limit": 3}},
        ["alpaca_eval.limit is 3", "at least 5"],
    ),
    "experiment called like a run": (
        {"name": "k2", "runs": {"k2": {}}},
        ["name is k2", "results/k2/"],
    ),
    "policies kept by one run alone": (
        {"runs": {"a": {"keep_policies": False}}},
        ["runs.a", "keep_policies"],
    ),
    "shared first iteration, other held-out instructions": (
        {
            "runs": {
                "a": {"first_iteration_from": "main", "alpaca_eval": {"instructions": "x.json"}}
            }
        },
        ["runs.a", "alpaca_eval.instructions"],
    ),
    "shared first iteration, other split": (
        {"runs": {"a": {"first_iteration_from": "main", "iterations": 5}}},
        ["runs.a", "iterations"],
    ),
    "TRL has another IPO": (
        {"train": {"backend": "trl", "loss": "ipo"}},
        ["TRL", "train.per_token"],
    ),
    "TRL refers to the previous iterate": (
        {"train": {"backend": "trl", "loss": "dpo", "reference_every": None}},
        ["TRL", "train.reference_every"],
    ),
    "KTO's means over part of a step": (
        {"train": {"loss": "kto_pair"}},
        ["kto_pair", "train.micro_batch_size"],
    ),
    "Nash-MD on winner and loser alone": (
        {"train": {"loss": "nash_md", "tau": 0.0003}},
        ["nash_md", "pairs.construction: all"],
    ),
    "pi_t with a negative weight": (
        {"train": {"loss": "inpo", "beta": 0.01, "tau": 0.02}},
        ["train.tau", "train.beta"],
    ),
    "extrapolation of nothing": ({"extrapolation": 0.3}, ["extrapolation", "belongs to a run"]),
    "gold without a file": (
        {"pairs": {"construction": "gold"}, "train": {"loss": "dpo"}},
        ["pairs.construction", "pairs.gold"],
    ),
    "a file of gold responses for the ends of K": (
        {"pairs": {"gold": "gold.jsonl"}},
        ["pairs.construction", "pairs.gold"],
    ),
    "grades for a loss that learns from P-hat": (
        {"pairs": {"construction": "graded"}},
        ["train.loss sppo", "P-hat", "pairs.construction graded"],
    ),
    "grades for DNO's soft labels in a run": (
        {"runs": {"a": {"pairs": {"construction": "graded"}, "train": {"loss": "dno"}}}},
        ["runs.a", "train.loss dno", "pairs.construction graded"],
    ),
    "gold responses for SPPO": (
        {"pairs": {"construction": "gold", "gold": "x.jsonl"}},
        ["train.loss sppo", "P-hat", "pairs.construction gold"],
    ),
    "INPO without a weight": (
        {"train": {"loss": "inpo", "reference_every": None}},
        ["train.loss inpo", "train.tau above 0"],
    ),
    "INPO held near pi_t alone": (
        {"train": {"loss": "inpo", "beta": 0.01, "tau": 0.005}},
        ["train.loss inpo", "train.reference_every: null"],
    ),
    "grades and target rewards": (
        {"pairs": {"construction": "graded", "target_reward": True}, "train": {"loss": "dpo"}},
        ["pairs.target_reward", "pairs.construction graded"],
    ),
    "grades by llm-blender": (
        {
            "pairs": {"construction": "graded"},
            "train": {"loss": "dpo"},
            "preference": {"backend": "llm_blender"},
        },
        ["grades.judge preference", "preference.backend llm_blender"],
    ),
    "grades without a margin": (
        {"pairs": {"own_grade_margin": 0}},
        ["pairs.own_grade_margin is 0", "greater than 0"],
    ),
    "swapped pairs for a loss of win rates": (
        {"pairs": {"target_reward": True}},
        ["pairs.target_reward", "train.loss sppo"],
    ),
    "target rewards of gold": (
        {
            "pairs": {"target_reward": True, "construction": "gold", "gold": "x.jsonl"},
            "train": {"loss": "dpo"},
        },
        ["pairs.target_reward", "construction gold"],
    ),
    "own rewards against the base": (
        {"preference": {"implicit": True}, "train": {"loss": "dpo", "reference_every": None}},
        ["preference.implicit", "reference_every: 1"],
    ),
    "own rewards without a reference": (
        {"preference": {"implicit": True}, "train": {"loss": "simpo"}},
        ["preference.implicit", "with a reference"],
    ),
    "own rewards of graded": (
        {
            "preference": {"implicit": True},
            "pairs": {"construction": "graded"},
            "train": {"loss": "dpo"},
        },
        ["preference.implicit", "graded"],
    ),
    "TRL without optimism": (
        {"train": {"backend": "trl", "loss": "dpo", "optimism": 0.1}},
        ["TRL", "optimism"],
    ),
    "Nash-MD without near pairs": (
        {"pairs": {"construction": "all", "margin": 0.2}, "train": {"loss": "nash_md"}},
        ["nash_md", "pairs.margin: 0"],
    ),
    "even lengths of every two": (
        {"pairs": {"even_lengths": True, "construction": "all"}},
        ["pairs.even_lengths", "pairs.construction: best_vs_worst"],
    ),
    "an empty list of rates": ({"train": {"learning_rate": []}}, ["train.learning_rate"]),
    "a run that cannot take over main's processes": (
        {
            "train": {"processes": 2},
            "runs": {"a": {"train": {"loss": "kto_pair", "micro_batch_size": 64}}},
        },
        ["runs.a: train.loss kto_pair", "train.processes: 1"],
    ),
    "KTO's means over processes": (
        {"train": {"loss": "kto_pair", "micro_batch_size": 64, "processes": 2}},
        ["kto_pair", "train.processes: 1"],
    ),
    "processes that do not make a batch": (
        {"train": {"processes": 6}},
        ["train.batch_size (64)", "train.micro_batch_size (8) x train.processes (6)"],
    ),
    "more processes than pairs": (
        {"train": {"processes": 128}},
        ["train.batch_size (64)", "train.processes (128)"],
    ),
    "accumulation that does not make a batch": (
        {"train": {"processes": 4, "micro_batch_size": 3}},
        ["train.micro_batch_size (3) x train.processes (4)"],
    ),
    "processes that do not divide over nodes": (
        {"train": {"processes": 8, "nodes": 3}},
        ["train.processes (8)", "train.nodes (3)"],
    ),
    "nodes without processes": (
        {"train": {"nodes": 2}},
        ["train.processes (1)", "train.nodes (2)"],
    ),
    "one process that divides a policy": (
        {"train": {"parallel": "fsdp2"}},
        ["train.parallel fsdp2", "train.processes is 1"],
    ),
    "FSDP2 on the CPU": (
        {"device": "cpu", "train": {"parallel": "fsdp2", "processes": 2}},
        ["train.parallel fsdp2 needs GPUs"],
    ),
    "LoRA divided": (
        {"train": {"parallel": "zero3", "processes": 8, "lora_rank": 8}},
        ["train.parallel zero3", "train.lora_rank"],
    ),
    "TRL in processes": (
        {"train": {"backend": "trl", "loss": "dpo", "processes": 2}},
        ["TRL", "train.processes: 1"],
    ),
    "a model divided by transformers": (
        {"responses": {"tensor_parallel": 2}},
        ["responses.tensor_parallel is 2", "engine: vllm"],
    ),
    "a run by another engine": (
        {"runs": {"a": {"responses": {"engine": "vllm"}}}},
        ["runs.a", "responses.engine"],
    ),
    "a run on more GPUs": (
        {"responses": {"engine": "vllm"}, "runs": {"a": {"responses": {"tensor_parallel": 2}}}},
        ["runs.a", "responses.tensor_parallel"],
    ),
    "an experiment in capitals": ({"name": "MyRun"}, ["name is 'MyRun'", "lower-case letters"]),
    "a run in capitals": (
        {"runs": {"MyRun": {}}},
        ["name of a run in runs is 'MyRun'", "lower-case letters"],
    ),
    "an experiment's name that ends in a newline": (
        {"name": "mine\n"},
        ["name is 'mine\\n'", "form"],
    ),
    "a run's name that ends in a newline": ({"runs": {"mine\n": {}}}, ["'mine\\n'", "form"]),
    "a repository that ends in a newline": ({"push_to_hub": "me/a-{t}\n"}, ["push_to_hub", "form"]),
    "a name of 300 letters": ({"name": "x" * 300}, ["name is 'xxx", "at most 100 characters"]),
    "a run's name of 300 letters": ({"runs": {"x" * 300: {}}}, ["'xxx", "at most 100 characters"]),
    "shards without end": ({"responses": {"shards": 257}}, ["responses.shards", "at most 256"]),
    "more shards than prompts": (
        {"responses": {"shards": 9}, "prompts": {"per_iteration": 8}},
        ["responses.shards is 9", "prompts.per_iteration is 8"],
    ),
    "iterations without end": ({"iterations": 101}, ["iterations", "at most 100"]),
    "more than 64 bits": ({"iterations": 10**30}, ["iterations is 1000000", "64 bits"]),
    "more digits than Python writes": (
        {"train": {"beta": 16**5000}},
        ["train.beta is a number of thousands of digits"],
    ),
    "more than a float holds": ({"train": {"tau": 10**400}}, ["train.tau is 10000", "64 bits"]),
    "such a number in a list": (
        {"train": {"learning_rate": [10**400]}},
        ["train.learning_rate", "64 bits"],
    ),
    "such a number in a run": (
        {"runs": {"a": {"prompts": {"source": 16**5000}}}},
        ["runs.a.prompts.source", "thousands of digits"],
    ),
    "such a number as a key": ({16**5000: 1}, ["key a number of thousands of digits is not text"]),
    "a seed of more than 32 bits": (
        {"seeds": {"train": 2**32}},
        ["seeds.train is 4294967296", "at most 4294967295"],
    ),
    "a key of thousands of letters": ({"x" * 5000: 1}, ["unknown key xxxxx", "...; known are"]),
    "a list of texts": (
        {"train": {"learning_rate": ["fast"]}},
        ["train.learning_rate.0 is 'fast'", "number"],
    ),
    "the home of nobody": (
        {"policy": {"model": "~no such user/x"}},
        ["policy.model", "no such user"],
    ),
    "a run's home of nobody": (
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
    "another wildcard than the iteration": (
        {"prompts": {"source": "me/p{t}{x}"}},
        ["prompts.source", "braces"],
    ),
    "ragged micro-batches": (
        {"train": {"batch_size": 10, "micro_batch_size": 4}},
        ["train.batch_size", "train.micro_batch_size"],
    ),
}


@pytest.mark.parametrize(("written", "words"), BAD.values(), ids=BAD)
def test_bad_key_is_one_line_that_names_it(written, words):
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
def test_what_is_no_address_of_a_server_is_refused_with_the_configuration(address, section):
    line = refusal({section: {"judge": "openai", "judge_model": "m", "judge_base_url": address}})
    assert f"{section}.judge_base_url" in line and "http://localhost:8000/v1" in line


@pytest.mark.parametrize(
    "address",
    [
        "http://localhost:8000/v1",
        "https://api.openai.com/v1",
        "http://[::1]:80",
        "http://10.0.0.1/v1",
    ],
)
def test_address_of_a_server_is_taken(address):
    assert (
        resolve({"mt_bench": {"judge_base_url": address}})[""]["mt_bench"]["judge_base_url"]
        == address
    )


@pytest.mark.parametrize(
    "address", ["http://user:secret@host/v1", "https://secret@host", "http://user:secret@[::1"]
)
def test_password_in_an_address_is_refused_and_not_shown(address):
    line = refusal({"runs": {"a": {"alpaca_eval": {"judge_base_url": address}}}})
    assert (
        "runs.a" in line
        and "alpaca_eval.judge_base_url" in line
        and "OPENAI_API_KEY" in line
        and "secret" not in line
    )


def test_numbers_in_a_list_may_be_spelled_as_text():
    """YAML takes 5e-7 for text, in a list as outside one."""
    assert resolve({"train": {"learning_rate": ["5e-7", 1e-7]}})[""]["train"]["learning_rate"] == [
        5e-7,
        1e-7,
    ]


PATHS = [
    f"{section}.{key}"
    for section in SECTIONS
    for key, rule in schema()["properties"][section]["properties"].items()
    if rule.get("x-path")
]


@pytest.mark.parametrize("name", PATHS)
def test_home_folder_is_written_out_in_every_path_of_main_and_runs(name, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    section, key = name.split(".")
    in_run = {} if section == "policy" else {"a": {section: {key: "~/other"}}}
    more = (
        {"pairs": {"construction": "graded"}, "train": {"loss": "dpo"}}
        if section == "pairs"
        else {}
    )
    runs = resolve({**more, section: {**more.get(section, {}), key: "~/file"}, "runs": in_run})
    assert runs[""][section][key] == "/home/me/file"
    assert all(runs[run][section][key] == "/home/me/other" for run in in_run)


def test_every_key_that_names_files_is_a_path():
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
    "smoothing": ({"train": {"label_smoothing": 0.1}}, "train.label_smoothing"),
    "IPO's target": ({"train": {"ipo_target": 1}}, "train.ipo_target"),
    "IPO per token": ({"train": {"per_token": True}}, "train.per_token"),
    "LoRA's scale": (
        {"train": {"lora_alpha": 32}},
        "train.lora_alpha has no effect where train.lora_rank is 0",
    ),
    "warm-up": ({"train": {"lr_schedule": "constant", "warmup_ratio": 0.2}}, "train.warmup_ratio"),
    "older pairs": (
        {"replay": {"older_share": 0.5}},
        "replay.older_share has no effect where replay.share is 0",
    ),
    "first pairs": ({"replay": {"iteration": "first"}}, "replay.iteration"),
    "grades": (
        {"pairs": {"winner_grade": 4}},
        "pairs.winner_grade has no effect where pairs.construction is best_vs_worst",
    ),
    "gold's margin": (
        {
            "pairs": {"construction": "graded", "gold_grade_margin": 1},
            "train": {"loss": "dpo"},
        },
        "pairs.gold_grade_margin has no effect where pairs.gold is null",
    ),
    "a server nobody asks": (
        {"mt_bench": {"judge_base_url": "http://h"}},
        "mt_bench.judge_base_url",
    ),
    "a model nobody asks": (
        {"alpaca_eval": {"judge_model": "m"}},
        "alpaca_eval.judge_model has no effect where alpaca_eval.judge is judge",
    ),
    "PairRM's precision": ({"preference": {"precision": "float32"}}, "preference.precision"),
    "PairRM's window": ({"preference": {"max_prompt_tokens": 100}}, "preference.max_prompt_tokens"),
    "a scale of the blender": (
        {"pairs": {"logit_scale": 1, "probability": "blender"}},
        "pairs.logit_scale",
    ),
    "a commit of the embedded policy": ({"policy": {"revision": "abc"}}, "policy.revision"),
    "a commit of a file": ({"prompts": {"revision": "abc"}}, "prompts.revision"),
    "a run's tau": (
        {"runs": {"a": {"train": {"tau": 0.1}}}},
        "runs.a.train.tau has no effect where train.loss is sppo",
    ),
    "training of a run that is not trained": (
        {"runs": {"a": {"extrapolation": 0.3, "train": {"beta": 1}}}},
        "runs.a.train.beta has no effect where extrapolation is 0.3",
    ),
}


@pytest.mark.parametrize(("written", "line"), IDLE.values(), ids=IDLE)
def test_key_without_effect_is_one_line(written, line):
    found = all_lines(written)
    assert len(found) == 1 and f"config: {line}" in found[0], found


def test_key_with_effect_or_not_written_is_no_line():
    for written in (
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
    ):
        assert all_lines(written) == []


def test_key_of_main_that_only_a_run_uses_has_an_effect():
    written = {"train": {"gamma": 2}, "runs": {"a": {"train": {"loss": "simpo"}}}}
    assert all_lines(written) == []
    written["runs"]["a"]["train"]["gamma"] = 1  # the run has its own
    line = "config: train.gamma has no effect where train.loss is sppo"
    assert all_lines(written) == [line]


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_file_has_no_key_without_effect(file):
    assert all_lines(read_files([file])) == []


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_reserved_word_is_no_run(name):
    assert name in refusal({"runs": {name: {}}})


@pytest.mark.parametrize("name", ["iter1", *sorted(RESERVED)])
def test_reserved_word_is_no_experiment(name):
    """results/models/ holds the embedded policy and results/iter1/ the default's artifacts."""
    assert name in refusal({"name": name})


@pytest.mark.parametrize(
    "written", [{3: 1}, {"runs": {2: {}}}, {"train": {True: 1}}], ids=["top", "run", "nested"]
)
def test_key_that_yaml_reads_as_no_text_is_one_line(written):
    refusal(written)


@pytest.mark.parametrize(
    "written", [{"iterations": 3.0}, {"responses": {"samples": 5.0}}], ids=["iterations", "samples"]
)
def test_whole_number_with_a_point_is_refused_or_made_whole(written):
    """JSON Schema takes 5.0 for an integer; a program's --samples does not."""
    try:
        run = resolve(written)[""]
    except UserError as error:
        assert "3.0" in str(error) or "5.0" in str(error)
    else:
        assert type(run["iterations"]) is int and type(run["responses"]["samples"]) is int


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_number_that_is_none_is_refused(value):
    assert "train.beta" in refusal({"train": {"beta": value}})


def other_value(rule: dict):
    """A valid value that is not the default of either column."""
    defaults = [default_of(rule, "paper"), default_of(rule, "repo")]
    types = [rule["type"]] if isinstance(rule["type"], str) else rule["type"]
    if "enum" in rule:
        return next(
            (value for value in rule["enum"] if value not in defaults and value is not None),
            rule["enum"][0],
        )
    if "boolean" in types:
        return not defaults[0]
    if "object" in types:
        return {"enable_thinking": False, "date_string": 'it\'s "so"', "levels": [1, None]}
    if rule.get("pattern", "").startswith("^[0-9]{4}-"):
        return "1999-12-31"
    return (
        {"integer": 123, "number": 0.1234567890123, "string": "a folder/with 'quotes' {t}"}[
            types[0]
        ]
        if "pattern" not in rule
        else "x"
    )


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("settings", ["paper", "repo", "other"])
def test_flags_give_a_program_the_section_back(section, settings):
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


def test_value_that_begins_as_a_flag_does_is_a_value():
    parser = argparse.ArgumentParser()
    add_section(parser, "prompts")
    assert parser.parse_args(flags({"field": "-x", "split": "--help"})).field == "-x"


def test_variables_of_the_chat_template_keep_their_types():
    """Also where `snakemake --config policy={...}` hands over text alone; null takes back what a file below sets."""
    given = {"enable_thinking": "false", "effort": "high", "budget": 5}
    assert resolve({"policy": {"chat_template_kwargs": given}})[""]["policy"][
        "chat_template_kwargs"
    ] == {"enable_thinking": False, "effort": "high", "budget": 5}
    assert (
        resolve({"policy": {"chat_template_kwargs": None}})[""]["policy"]["chat_template_kwargs"]
        == {}
    )


@pytest.mark.parametrize("name", ["messages", "add_generation_prompt", "Enable", "a b", "a-b"])
def test_a_chat_template_has_no_variable_of_that_name(name):
    assert "policy.chat_template_kwargs" in refusal({"policy": {"chat_template_kwargs": {name: 1}}})


def test_a_date_without_quotes_is_one_and_no_other_day_is():
    written = yaml.safe_load("policy: {template_date: 2025-01-31}")
    assert resolve(written)[""]["policy"]["template_date"] == "2025-01-31"
    assert "policy.template_date is 2025-02-31" in refusal(
        {"policy": {"template_date": "2025-02-31"}}
    )
    assert "policy.template_date" in refusal({"policy": {"template_date": "today"}})


def test_flags_of_objects_take_json_alone(capsys):
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
def test_old_key_is_one_line_with_its_new_name(old, new):
    section, key = old.split(".")
    assert refusal({section: {key: 1}}) == f"config: {old} is now called {new}; rename it"
    line = f"config: runs.a.{old} is now called {new}; rename it"
    assert refusal({"runs": {"a": {section: {key: 1}}}}) == line
    new_section, new_key = new.split(".")
    assert new_key in schema()["properties"][new_section]["properties"]


def test_old_value_is_one_line_with_its_new_name():
    line = refusal({"pairs": {"construction": "extremes"}})
    assert line == "config: pairs.construction: extremes is now called best_vs_worst; write that"


# --- runs are checked when they are asked for ---


def test_wrong_run_stops_only_those_who_ask_for_it():
    runs = resolve({"runs": {"good": {}, "bad": {"train": {"betta": 1}}}})
    assert isinstance(runs, Runs) and list(runs) == ["", "good", "bad"]
    assert list(runs.usable()) == ["", "good"]
    with pytest.raises(UserError, match="runs.bad.train.betta"):
        runs["bad"]


# --- files that extend others ---


def written_to(folder: Path, **files: str) -> dict[str, Path]:
    paths = {name: folder / f"{name}.yaml" for name in files}
    for name, path in paths.items():
        path.write_text(files[name], encoding="utf-8")
    return paths


def test_file_stands_on_the_defaults_alone_unless_it_extends(tmp_path):
    files = written_to(tmp_path, own="name: own\n")
    assert dict(resolve(read_files([files["own"]]))) == {"": resolve({"name": "own"})[""]}


def test_chain_of_extended_files_is_read_from_the_bottom(tmp_path, monkeypatch):
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


def test_command_line_and_later_files_win_over_what_is_extended(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = written_to(
        tmp_path, a="seeds: {data: 1, train: 1}\n", b="extends: a.yaml\n", c="seeds: {data: 2}\n"
    )
    written = read_configuration([files["b"], files["c"]], {"seeds": {"train": 3}, "extends": "b"})
    assert written == {"seeds": {"data": 2, "train": 3}}


def test_module_configuration_without_files_can_extend_one():
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
def test_bad_extends_is_one_line(text, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = written_to(tmp_path, a=text + "\n", b="extends: a.yaml\n")
    with pytest.raises(UserError) as caught:
        read_files([files["a"].name])
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("file", EVERY_FILE, ids=lambda file: file.stem)
def test_presets_have_no_null_to_undo_the_demo(file):
    """A configuration stands on the paper's defaults, so it has nothing of the demo to undo."""
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


def test_a_list_gives_one_value_an_iteration_and_the_last_for_all_after():
    train = resolve({"train": {"beta": [0.1, 5.0], "learning_rate": 1e-6}})[""]["train"]
    assert [of_iteration(train, t)["beta"] for t in (1, 2, 3)] == [0.1, 5.0, 5.0]
    assert of_iteration(train, 3)["learning_rate"] == 1e-6


def test_flags_leave_out_what_is_skipped_and_take_a_prefix():
    parser = argparse.ArgumentParser()
    add_section(parser, "replay", skip=("iteration",), prefix="replay_")
    words = flags(resolve({})[""]["replay"], skip=("iteration",), prefix="replay_")
    assert vars(parser.parse_args(words)) == {"replay_share": 0.0, "replay_older_share": 0.0}
