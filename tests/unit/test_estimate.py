"""The cost of a run before it is made: shapes, FLOPs, memory, and what the two programs print."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest

import check_estimate
import estimate_cost
from sppo.core.artifacts import record_path, write_json
from sppo.core.errors import UserError
from sppo.core.tables import write_table
from sppo.policies.shapes import PAIRRM, SHAPES, Shape, shape_of
from sppo.reporting import cost_model
from sppo.reporting.cost_model import GPUS, Use

ROOT = Path(__file__).resolve().parents[2]
PRESETS = {path.stem: path for path in (ROOT / "config" / "presets").glob("*.yaml")}
USE = Use(training=0.4, forward=0.5, bandwidth=0.6, concurrent=256)
SMALL = Shape(
    layers=2, hidden=8, intermediate=16, heads=2, kv_heads=1, head_dim=4, vocabulary=100, tied=True
)
MISTRAL = SHAPES["mistralai/Mistral-7B-Instruct-v0.2"]


def config_of(name: str):
    from transformers import Gemma2Config, LlamaConfig, MistralConfig

    shape = SHAPES[name]
    if "gemma" in name:
        config_class = Gemma2Config
    elif "Mistral" in name:
        config_class = MistralConfig
    else:
        config_class = LlamaConfig
    return config_class(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
    )


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("embedded", 134_515_008),
        ("mistralai/Mistral-7B-Instruct-v0.2", 7_241_732_096),
        ("meta-llama/Meta-Llama-3-8B-Instruct", 8_030_261_248),
        ("google/gemma-2-9b-it", 9_241_705_984),
        ("google/gemma-2-27b-it", 27_227_128_320),
    ],
)
def test_weight_counts_equal_those_of_transformers_and_the_hub(name, published):
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        counted = AutoModelForCausalLM.from_config(config_of(name)).num_parameters()
    assert counted == published
    assert shape_of(config_of(name).to_dict()) == SHAPES[name]
    assert SHAPES[name].weights == pytest.approx(published, rel=1e-3)


def test_preference_model_has_the_size_of_pairrm():
    assert PAIRRM.weights == pytest.approx(435e6, rel=0.02)  # DeBERTa-v3-large


def test_forward_flops_equal_those_that_pytorch_counts():
    """Two FLOPs per weight and token, and the two products of attention, which PyTorch counts
    without the causal mask.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=100,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=4,
            tie_word_embeddings=True,
        ),
        attn_implementation="eager",
    )
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.ones(3, 10, dtype=torch.long), use_cache=False, logits_to_keep=4)
    assert counter.get_total_flops() == pytest.approx(
        cost_model.forward_flops(SMALL, tokens=30, context=10, logits=12), rel=0.02
    )


def test_a_prompt_is_processed_once_for_all_its_samples():
    one = cost_model.generate_flops(MISTRAL, 10, 100, 1, 50)
    five = cost_model.generate_flops(MISTRAL, 10, 100, 5, 50)
    prompts_alone = cost_model.forward_flops(MISTRAL, 1000, 50, 0)
    assert five - one == pytest.approx(4 * (one - prompts_alone))


def test_scoring_processes_the_prompt_with_each_response():
    assert cost_model.score_flops(MISTRAL, 10, 100, 50) > 2 * 2 * MISTRAL.body * 10 * 150


def test_passes_of_a_training_step():
    """One pass forward, two backward (one if the weights are frozen), one for checkpointing."""
    assert cost_model.train_factor(MISTRAL, False, 0) == 3
    assert cost_model.train_factor(MISTRAL, False, 1) == 4
    assert cost_model.train_factor(MISTRAL, False, 2) == 3.5
    assert cost_model.train_factor(MISTRAL, True, 0) == 2
    assert cost_model.train_factor(MISTRAL, True, 1) == 3


def test_every_nth_layer_is_checkpointed():
    def count(checkpointing: bool, every: int) -> int:
        train = {"gradient_checkpointing": checkpointing, "checkpointed_layers": every}
        return cost_model.checkpointed_layers(MISTRAL, cost_model.checkpointed_every(train))

    assert count(False, 2) == 0
    assert [count(True, every) for every in (1, 2, 3, 40)] == [32, 16, 11, 1]


def test_decoding_one_sequence_is_bound_by_memory_bandwidth():
    """Each step reads all weights. Many sequences at once cost less per token."""
    gpu = GPUS["H100"]
    one = cost_model.decode_seconds(MISTRAL, gpu, Use(0.4, 0.5, 1.0, 1), tokens=100, context=100)
    assert one == pytest.approx(100 * 2 * MISTRAL.weights / gpu.bandwidth, rel=0.05)
    assert cost_model.decode_seconds(MISTRAL, gpu, USE, tokens=100, context=100) < one / 50


def test_a_model_that_does_not_fit_has_no_decoding_time():
    large = SHAPES["google/gemma-2-27b-it"]
    assert cost_model.decode_seconds(large, GPUS["RTX4090"], USE, 100, 100) is None


def test_gpus_checkpointing_and_lora_reduce_training_memory():
    def peak(gpus=1, lora=0, every=0, micro=1):
        return cost_model.train_bytes(MISTRAL, gpus, micro, 512, 512, lora, every)

    training_state = 12 * MISTRAL.weights
    assert peak() > training_state
    assert training_state / 8 < peak(gpus=8, every=1) < training_state
    assert peak(every=1) < peak() < peak(micro=2)
    assert peak(8, every=1) < peak(8, every=2) < peak(8)
    assert 2 * MISTRAL.weights < peak(lora=16, every=1) < 24e9


def test_lora_weights_equal_those_of_peft():
    import torch
    from transformers import AutoModelForCausalLM

    from sppo.training.trainer import with_lora

    with torch.device("meta"):
        model = with_lora(
            AutoModelForCausalLM.from_config(config_of("embedded")),
            {"lora_rank": 4, "lora_alpha": 8},
            seed=0,
        )
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert trained == cost_model.lora_weights(SHAPES["embedded"], 4)


def balance(gpus: int, layout: str, spread: float = 0.8, **train: object) -> float:
    options = {"batch_size": 64, "micro_batch_size": 4, "micro_batch_tokens": None} | train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost_model, "SPREAD", spread)
        return cost_model.load_balance(options, gpus, layout, 200, 450, 4096, 2048)


def test_gpus_are_busy_with_pairs_of_equal_length():
    for layout in ("padded", "packed"):
        assert balance(8, layout, spread=0.0) == 1
    # 64 pairs on twelve GPUs: two passes of at most three pairs.
    assert balance(12, "packed", spread=0.0) == pytest.approx(64 / (12 * 2 * 3))


def test_gpus_wait_for_long_pairs_and_compute_padding():
    assert balance(1, "packed") == 1
    assert balance(8, "padded") < balance(1, "padded") < 1
    assert (
        balance(8, "padded") < balance(8, "packed") < balance(8, "packed", micro_batch_tokens=8192)
    )


# --- the programs ---


def printed(program, capsys, monkeypatch, *words: object) -> str:
    monkeypatch.chdir(ROOT)
    program(estimate_cost, *words)
    return capsys.readouterr().out


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def rows_of(text: str) -> list[list[str]]:
    """Cells of the table's rows; each starts with the number of an iteration."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and line[2].isdigit()]
    return [cells_of(line) for line in lines]


@pytest.mark.parametrize("settings", ["paper", "repo"])
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_estimated_by_stage_and_iteration(
    name, settings, program, capsys, monkeypatch
):
    text = printed(program, capsys, monkeypatch, "--config", PRESETS[name], "--settings", settings)
    stages = {(row[0], row[1]) for row in rows_of(text)}
    wanted = itertools.product("123", ("generate", "annotate", "reference", "train", "answer"))
    assert set(wanted) <= stages
    assert "does not fit" not in text
    assert f"settings {settings}" in text
    assert "no price given" in text
    assert "$" not in text


def test_demo_is_estimated_without_models_that_judge(program, capsys, monkeypatch):
    """Code compares responses, and IFEval has no answers of its own."""
    text = printed(program, capsys, monkeypatch)
    stages = {row[1] for row in rows_of(text)}
    assert stages == {"generate", "reference", "train", "answer"}
    for stage in ("annotate", "judge", "against_previous"):
        assert text.count(f"Not counted: {stage}, because the cost of verifiable is not known") == 1
    assert "Not counted: the runs that the summary shows beside it (permuted)" in text
    assert "Not counted: the evaluations" not in text


def test_answers_to_ifeval_are_counted_if_they_are_generated(
    program, capsys, monkeypatch, tmp_path
):
    (tmp_path / "all.yaml").write_text("ifeval: {limit: null, max_new_tokens: 70}")
    configs = ("--config", ROOT / "config/config.yaml", tmp_path / "all.yaml")
    rows = rows_of(printed(program, capsys, monkeypatch, *configs))
    lines = (ROOT / "data/instructions/held_out.jsonl").read_text().splitlines()
    found = [row[:4] for row in rows if row[1] == "answer_ifeval"]
    tokens = f"{70 * len(lines):,}"
    assert found == [[str(t), "answer_ifeval", str(len(lines)), tokens] for t in range(4)]

    (tmp_path / "all.yaml").write_text("summary: {evaluations: [alpaca_eval]}\nifeval: {limit: 9}")
    rows = rows_of(printed(program, capsys, monkeypatch, *configs))
    assert "answer_ifeval" not in {row[1] for row in rows}


def test_comparisons_with_the_previous_policy_are_counted(program, capsys, monkeypatch, tmp_path):
    shown = "summary: {evaluations: [alpaca_eval, against_previous]}"
    (tmp_path / "more.yaml").write_text(shown)
    configs = ("--config", PRESETS["mistral-7b"], tmp_path / "more.yaml")
    text = printed(program, capsys, monkeypatch, *configs, *PRICES)
    assert f"asks gpt-6-luna {805 * (4 + 3):,} times" in text
    configs = ("--config", PRESETS["laptop"], tmp_path / "more.yaml")
    rows = rows_of(printed(program, capsys, monkeypatch, *configs))
    assert [row[0] for row in rows if row[1] == "against_previous"] == ["1", "2", "3"]


PRICES = ("--price", 2, "--judge-price", 10)


@pytest.mark.parametrize(
    ("train", "wanted"),
    [
        ({}, [1, 1, 1]),
        ({"reference_every": None}, [1, 2, 2]),
        ({"reference_every": 2}, [1, 2, 1]),
        ({"lookahead": True}, [2, 2, 2]),
        ({"loss": "mnpo", "history": [1, 1], "reference_every": None}, [1, 3, 3]),
    ],
    ids=str,
)
def test_scorings_of_an_iteration(train, wanted):
    """In iteration 1 the base is pi_t, and MNPO has no earlier opponent."""
    settings = {"loss": "sppo", "reference_every": 1, "lookahead": False, "history": [1]} | train
    assert [estimate_cost.times_scored(settings, t) for t in (1, 2, 3)] == wanted


def test_prices_give_dollars(program, capsys, monkeypatch):
    text = printed(program, capsys, monkeypatch, "--config", PRESETS["mistral-7b"], *PRICES)
    hours = float(text.split("GPU-hours: ")[1].split(",")[0])
    dollars = float(text.split("; $")[1].split(" ")[0].replace(",", ""))
    assert dollars == pytest.approx(2 * hours, abs=1)
    assert "asks gpt-6-luna 3,220 times" in text


def test_requests_to_servers_are_counted(program, capsys, monkeypatch, tmp_path):
    """A server of one's own has no GPU-hours here; its requests and tokens are counted."""
    several = "models: [{model: 'openai:mine'}, {model: 'http://localhost:1/x'}]"
    (tmp_path / "several.yaml").write_text(several)
    (tmp_path / "servers.yaml").write_text(
        f"preference: {{model: {tmp_path}/several.yaml}}\n"
        "alpaca_eval: {judge: 'openai:mine', limit: 10}\n"
        "arena_hard: {judge: openai, judge_model: another, limit: 7}\n"
    )
    configs = ("--config", PRESETS["mistral-7b"], tmp_path / "servers.yaml", "--prompts", 1000)
    text = printed(program, capsys, monkeypatch, *configs, *PRICES)
    # Three iterations of 1000 prompts: 20 ordered pairs, and one request with all responses.
    assert f"annotate asks {tmp_path}/several.yaml {3 * 1000 * (20 + 1):,} times" in text
    assert f"judge asks openai:mine {4 * 10 * 2} times" in text
    assert f"Arena-Hard, if it is made, asks another {4 * 7 * 2} times" in text
    assert "with its evaluations, without the time of servers" in text
    assert {row[1] for row in rows_of(text)}.isdisjoint({"annotate", "judge"})


def test_repeated_judgments_are_counted(program, capsys, monkeypatch, tmp_path):
    (tmp_path / "twice.yaml").write_text("alpaca_eval: {both_orders: true, judge_passes: 3}")
    configs = ("--config", PRESETS["mistral-7b"], tmp_path / "twice.yaml")
    text = printed(program, capsys, monkeypatch, *configs)
    assert f"AlpacaEval asks gpt-6-luna {805 * 4 * 6:,} times" in text


def test_time_is_that_of_the_gpus_that_work_at_once(program, capsys, monkeypatch):
    """GPU-hours divided by the stage's GPUs, and the start-up of its jobs."""
    words = ("--config", PRESETS["mistral-7b"], "--start-up", 120)
    text = printed(program, capsys, monkeypatch, *words)
    rows = [row for row in rows_of(text) if row[0] == "3"]
    for row in rows:
        hours, gpus, minutes = float(row[5]), int(row[6]), float(row[7])
        assert minutes == pytest.approx(60 * hours / gpus + 2, rel=0.01)
        assert gpus == (1 if row[1] in ("answer", "ranker_estimate") else 8)
    trained = sum(
        float(row[7]) for row in rows if row[1] in ("generate", "annotate", "reference", "train")
    )
    assert f"{trained:.0f} minutes until its policy is trained" in text


def test_no_iterations_cost_no_training(program, capsys, monkeypatch, tmp_path):
    (tmp_path / "zero.yaml").write_text("iterations: 0")
    configs = ("--config", PRESETS["mistral-7b"], tmp_path / "zero.yaml")
    text = printed(program, capsys, monkeypatch, *configs, *PRICES)
    assert "asks gpt-6-luna 805 times" in text
    assert {row[1] for row in rows_of(text)} == {"answer", "ranker_estimate"}


def test_the_single_gpu_preset_fits_on_24_gb(program, capsys, monkeypatch):
    text = printed(
        program, capsys, monkeypatch, "--config", PRESETS["single-gpu"], "--gpu", "RTX4090"
    )
    assert "too much" not in text
    assert max(float(row[8]) for row in rows_of(text)) < 24


@pytest.mark.parametrize("name", ["mistral-7b", "llama-3-8b", "gemma-2-9b"])
def test_presets_for_eight_gpus_train_within_80_gb(name, program, capsys, monkeypatch):
    text = printed(program, capsys, monkeypatch, "--config", PRESETS[name])
    assert "too much" not in text


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("policy: {model: me/unknown}", ["policy.model is me/unknown", "shape"]),
        ("- a", ["has no keys"]),
        (None, ["is missing"]),
        ("trian: {}", ["unknown key trian"]),
    ],
)
def test_a_configuration_that_cannot_be_estimated_is_refused(config, words, program, tmp_path):
    if config is not None:
        (tmp_path / "mine.yaml").write_text(config)
    with pytest.raises(UserError) as caught:
        program(estimate_cost, "--config", tmp_path / "mine.yaml")
    assert all(word in str(caught.value) for word in words)


def test_records_of_a_run_are_compared_with_the_formulas(program, tiny_policy, tmp_path, capsys):
    """The run took the time of the formulas, except training, which took three times as long."""
    folder = tmp_path / "iter1"
    ids = list(range(3, 23))
    folder.mkdir()
    shutil.copytree(tiny_policy, folder / "policy")
    shape = shape_of(json.loads((tiny_policy / "config.json").read_text()))
    write_table(
        folder / "responses" / "0.parquet",
        [
            {
                "prompt_id": "p",
                "sample_id": k,
                "seed": k,
                "prompt_token_ids": ids,
                "token_ids": ids,
                "text": f"{k}",
                "finish_reason": "length",
            }
            for k in range(2)
        ],
        "responses",
    )
    write_table(
        folder / "pairs.parquet",
        [
            {
                "pair_id": 0,
                "prompt_id": "p",
                "prompt_token_ids": ids,
                "chosen": "a",
                "chosen_token_ids": ids,
                "chosen_sample_id": 0,
                "rejected": "b",
                "rejected_token_ids": ids,
                "rejected_sample_id": 1,
                "p_hat_chosen": 0.9,
                "p_hat_rejected": 0.1,
                "p_chosen_beats_rejected": 0.9,
            }
        ],
        "pairs",
    )
    scored = cost_model.score_flops(shape, 1, 20, 20)

    def record(artifact: Path, stage: str, flops: float, **arguments) -> None:
        write_json(
            record_path(artifact),
            {
                "sha256": "0",
                "stage": stage,
                "seconds": flops / 1e3,
                "peak_memory_mib": 100,
                "computed_in": "torch.float32",
                "pairs": 1,
                "arguments": arguments,
            },
        )

    record(
        folder / "responses" / "0.parquet",
        "generate",
        cost_model.generate_flops(shape, 1, 20, 2, 20),
        samples=2,
    )
    logps = folder / "logps" / "current" / "0.parquet"
    logps.parent.mkdir(parents=True)
    logps.touch()
    record(logps, "reference", scored, micro_batch_size=1)
    record(
        folder / "policy",
        "train",
        3 * 3 * scored,
        micro_batch_size=1,
        stop_epoch=1,
        lora_rank=0,
        gradient_checkpointing=False,
    )
    program(check_estimate, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    rows = [cells_of(line) for line in lines if line.startswith(f"| {tmp_path}")]
    speeds = {str(Path(row[0]).relative_to(folder)): float(row[4]) for row in rows}
    assert speeds["responses/0.parquet"] == speeds["logps/current/0.parquet"]
    assert speeds["responses/0.parquet"] == pytest.approx(3 * speeds["policy"], rel=0.02)


def test_a_folder_without_iterations_is_refused(program, tmp_path):
    with pytest.raises(UserError, match="has no iter"):
        program(check_estimate, tmp_path / "nowhere")


def test_evaluations_without_an_estimate_are_named(program, capsys, monkeypatch, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("summary: {evaluations: [alpaca_eval, open_llm, mt_bench]}\n")
    text = printed(program, capsys, monkeypatch, "--config", file)
    assert "Not counted: the evaluations open_llm, mt_bench" in text
