"""The cost of a run before it is made: shapes, FLOPs, memory, and what the two programs print."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import check_estimate
import estimate_cost
from sppo.core.artifacts import record_path, write_json
from sppo.core.errors import UserError
from sppo.core.tables import write_table
from sppo.reporting import cost_model
from sppo.reporting.cost_model import GPUS, SHAPES, Shape, Use

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
    kind = Gemma2Config if "gemma" in name else MistralConfig if "Mistral" in name else LlamaConfig
    return kind(
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
def test_weights_are_those_that_transformers_counts_and_the_hub_shows(name, published):
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        counted = AutoModelForCausalLM.from_config(config_of(name)).num_parameters()
    assert counted == published and cost_model.shape_of(config_of(name).to_dict()) == SHAPES[name]
    assert SHAPES[name].weights == pytest.approx(published, rel=1e-3)


def test_preference_model_is_as_large_as_pairrm():
    assert cost_model.PAIRRM.weights == pytest.approx(435e6, rel=0.02)  # DeBERTa-v3-large


def test_forward_flops_are_those_of_its_matrix_products():
    """Counted by torch on the tiny shape: 2 a weight and token, and the two products of attention, which it counts in full."""
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


def test_a_prompt_is_read_once_for_all_its_samples():
    alone, five = (cost_model.generate_flops(MISTRAL, 10, 100, samples, 50) for samples in (1, 5))
    assert five - alone == pytest.approx(
        4
        * (
            cost_model.generate_flops(MISTRAL, 10, 100, 1, 50)
            - cost_model.forward_flops(MISTRAL, 1000, 50, 0)
        )
    )
    assert cost_model.score_flops(MISTRAL, 10, 100, 50) > 2 * 2 * MISTRAL.body * 10 * 150


def test_backward_is_two_passes_one_with_frozen_weights_and_checkpointing_adds_one():
    assert [
        cost_model.train_factor(lora, checkpointing)
        for lora in (False, True)
        for checkpointing in (False, True)
    ] == [3, 4, 2, 3]


def test_decoding_reads_all_weights_at_each_step():
    """One sequence on a bare GPU is bound by the weights' bytes; many at once cost less a token; what does not fit has no time."""
    gpu = GPUS["H100"]
    one = cost_model.decode_seconds(MISTRAL, gpu, Use(0.4, 0.5, 1.0, 1), tokens=100, context=100)
    assert one == pytest.approx(100 * 2 * MISTRAL.weights / gpu.bandwidth, rel=0.05)
    assert cost_model.decode_seconds(MISTRAL, gpu, USE, tokens=100, context=100) < one / 50
    assert (
        cost_model.decode_seconds(SHAPES["google/gemma-2-27b-it"], GPUS["RTX4090"], USE, 100, 100)
        is None
    )


def test_memory_of_training_falls_with_gpus_checkpointing_and_lora():
    def peak(gpus=1, lora=0, checkpointing=False, micro=1):
        return cost_model.train_bytes(MISTRAL, gpus, micro, 512, 512, lora, checkpointing)

    assert (
        peak() > 12 * MISTRAL.weights > peak(gpus=8, checkpointing=True) > 12 * MISTRAL.weights / 8
    )
    assert (
        peak(checkpointing=True) < peak() < peak(micro=2)
        and 2 * MISTRAL.weights < peak(lora=16, checkpointing=True) < 24e9
    )


def test_adapters_are_as_large_as_peft_makes_them():
    import torch
    from transformers import AutoModelForCausalLM

    from sppo.training.trainer import with_lora

    with torch.device("meta"):
        model = with_lora(
            AutoModelForCausalLM.from_config(config_of("embedded")),
            {"lora_rank": 4, "lora_alpha": 8},
        )
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == cost_model.lora_weights(
        SHAPES["embedded"], 4
    )


# --- the programs ---


def printed(program, capsys, monkeypatch, *words: object) -> str:
    monkeypatch.chdir(ROOT)
    program(estimate_cost, *words)
    return capsys.readouterr().out


def rows_of(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| ") and line[2].isdigit()
    ]


@pytest.mark.parametrize("settings", ["paper", "repo"])
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_estimated_by_stage_and_iteration(
    name, settings, program, capsys, monkeypatch
):
    text = printed(program, capsys, monkeypatch, "--config", PRESETS[name], "--settings", settings)
    stages = {(row[0], row[1]) for row in rows_of(text)}
    assert {
        (str(t), stage)
        for t in (1, 2, 3)
        for stage in ("generate", "annotate", "reference", "train", "answer")
    } <= stages
    assert "does not fit" not in text and f"settings {settings}" in text
    assert "no price given" in text and "$" not in text


def test_prices_make_dollars_and_iterations_none_cost_no_training(
    program, capsys, monkeypatch, tmp_path
):
    (tmp_path / "zero.yaml").write_text("iterations: 0")
    words = ("--config", PRESETS["mistral-7b"], "--price", 2, "--judge-price", 10)
    whole, evaluated = (
        printed(program, capsys, monkeypatch, *words[:2], *more, *words[2:])
        for more in ((), (tmp_path / "zero.yaml",))
    )
    hours, dollars = (
        float(whole.split("GPU-hours: ")[1].split(",")[0]),
        float(whole.split("; $")[1].split(" ")[0].replace(",", "")),
    )
    assert dollars == pytest.approx(2 * hours, abs=1)
    assert "asks gpt-6-luna 3,220 times" in whole and "asks gpt-6-luna 805 times" in evaluated
    assert {row[1] for row in rows_of(evaluated)} == {"answer", "ranker_estimate"}


def test_the_single_gpu_preset_fits_on_24_gb(program, capsys, monkeypatch):
    text = printed(
        program, capsys, monkeypatch, "--config", PRESETS["single-gpu"], "--gpu", "RTX4090"
    )
    assert "too much" not in text and max(float(row[6]) for row in rows_of(text)) < 24


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
def test_what_cannot_be_estimated_is_one_line(config, words, program, tmp_path):
    if config is not None:
        (tmp_path / "mine.yaml").write_text(config)
    with pytest.raises(UserError) as caught:
        program(estimate_cost, "--config", tmp_path / "mine.yaml")
    assert all(word in str(caught.value) for word in words)


def test_records_of_a_run_are_held_against_the_formulas(program, tiny_policy, tmp_path, capsys):
    """A run whose seconds and memory are what the formulas say, but for training, which took three times as long."""
    folder, ids = tmp_path / "iter1", list(range(3, 23))
    folder.mkdir()
    shutil.copytree(tiny_policy, folder / "policy")
    shape = cost_model.shape_of(json.loads((tiny_policy / "config.json").read_text()))
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
                "arguments": arguments,
            },
        )

    record(
        folder / "responses" / "0.parquet",
        "generate",
        cost_model.generate_flops(shape, 1, 20, 2, 20),
        samples=2,
    )
    record(folder / "logps" / "current.parquet", "reference", scored, micro_batch_size=1)
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
    speeds = {
        Path(row[0]).name: float(row[4])
        for row in (
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in capsys.readouterr().out.splitlines()
            if line.startswith(f"| {tmp_path}")
        )
    }
    assert (
        speeds["0.parquet"]
        == speeds["current.parquet"]
        == pytest.approx(3 * speeds["policy"], rel=0.02)
    )
    with pytest.raises(UserError, match="has no iter"):
        program(check_estimate, tmp_path / "nowhere")
