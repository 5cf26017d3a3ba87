"""All causal language models of transformers: generation and scoring do not depend on the batch."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import prepare_policy
from sppo.core.errors import UserError
from sppo.policies.folders import UNSUPPORTED_ARCHITECTURES, check_policy
from sppo.policies.generation import Sampling, TransformersEngine

VOCABULARY = 64
STOP = 2
NEW_TOKENS = 6
# Sizes under every name that a configuration class uses. Each class gets the names that it has.
# Attention windows are shorter than the prompts.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": STOP,
    "initializer_range": 0.3,
    "hidden_size": 32,
    "n_embd": 32,
    "d_model": 32,
    "word_embed_proj_dim": 32,
    "attention_hidden_size": 32,
    "intermediate_size": 48,
    "n_inner": 48,
    "ffn_dim": 48,
    "dff": 48,
    "ffn_hidden_size": 48,
    "d_inner": 48,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "attention_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 8,
    "global_head_dim": 8,
    "kv_channels": 8,
    "rotary_dim": 4,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "max_seq_len": 128,
    "context_length": 128,
    "sliding_window": 5,
    "window_size": 5,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "shared_experts_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "zero_expert_num": 2,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    # Many index heads, because with few of them many scores are 0 and tie.
    "index_topk": 6,
    "index_head_dim": 8,
    "index_n_heads": 64,
    "gated_norm_rank": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "full_attention_interval": 2,
    "mamba_d_ssm": 64,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "mamba_dt_rank": 4,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_mamba_heads": 8,
    "mamba_ngroups": 1,
    "ssm_state_size": 8,
    "state_size": 8,
    "time_step_rank": 4,
    "n_groups": 1,
    "chunk_size": 8,
    "use_mamba_kernels": False,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "adapter_rank": 4,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "laurel_rank": 4,
}
LATENT = {"num_key_value_heads": 4, "head_dim": 4}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
CONVOLUTION = {"layer_types": ["conv", "full_attention"]}
WINDOW_BELOW = {"use_sliding_window": True, "max_window_layers": 1}
SHARED_KEYS = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# model_type: what its tiny configuration needs besides SIZES.
ARCHITECTURES: dict[str, dict[str, Any]] = dict.fromkeys(
    (
        "afmoe",
        "apertus",
        "arcee",
        "aria_text",
        "beam",
        "biogpt",
        "bitnet",
        "bloom",
        "codegen",
        "cohere",
        "ctrl",
        "cwm",
        "deepseek_v4",
        "diffllama",
        "doge",
        "dots1",
        "ernie4_5",
        "ernie4_5_moe",
        "falcon",
        "falcon_h1",
        "falcon_mamba",
        "flex_olmo",
        "flint",
        "gemma",
        "gemma2",
        "glm",
        "glm4",
        "glm4_moe",
        "gpt-sw3",
        "gpt2",
        "gpt_bigcode",
        "gpt_neox",
        "gpt_neox_japanese",
        "gpt_oss",
        "gptj",
        "granite",
        "granite_swa",
        "granitemoe",
        "granitemoe_swa",
        "granitemoeshared",
        "helium",
        "hrm_text",
        "hunyuan_v1_dense",
        "hunyuan_v1_moe",
        "hy_v3",
        "hy_v4",
        "hyperclovax",
        "inkling2_text",
        "inkling_text",
        "internlm3",
        "iquestcoder",
        "jais2",
        "jamba",
        "jetmoe",
        "kolibri1",
        "laguna",
        "llama",
        "llama4_text",
        "mamba",
        "mellum",
        "mimo_v2_flash",
        "minimax_m2",
        "minimax_m3_vl_text",
        "ministral",
        "ministral3",
        "mistral",
        "mixtral",
        "modernbert-decoder",
        "mpt",
        "nanochat",
        "nemotron",
        "olmo",
        "olmo2",
        "olmoe",
        "openai-gpt",
        "opt",
        "persimmon",
        "phi",
        "phi3",
        "phimoe",
        "qwen2_moe",
        "qwen3_moe",
        "seed_oss",
        "smollm3",
        "solar_open",
        "stablelm",
        "starcoder2",
        "vaultgemma",
        "xglm",
    ),
    {},
) | {
    "axk1": LATENT,
    "axk2": LATENT,
    "bailing_hybrid": LATENT | LINEAR | {"head_dim": 8},
    "bamba": {"attn_layer_indices": [1]},
    "cohere2": SLIDING,
    "cohere2_moe": SLIDING,
    "cohere_compass_text": SLIDING
    | {"rope_parameters": {"sliding_attention": ROPE, "full_attention": ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {
            "ffn_hidden_size": 16,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "hidden_size": 32,
        },
    },
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT,
    "dots3_note_text": LATENT,
    "exaone4": SLIDING,
    "exaone_moe": SLIDING,
    "gemma3_text": SLIDING,
    "gemma3n_text": SHARED_KEYS
    | {"activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0], "intermediate_size": [48] * 4},
    "gemma4_text": SHARED_KEYS,
    "gemma4_unified_text": SHARED_KEYS,
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": LINEAR,
    "kimi_linear": LATENT | LINEAR | {"q_lora_rank": None},
    "lfm2": CONVOLUTION,
    "lfm2_moe": CONVOLUTION | {"num_dense_layers": 1},
    "lfm3": {
        "num_hidden_layers": 3,
        "layer_types": ["conv", "sliding_attention", "full_attention"],
    },
    "longcat_flash": LATENT,
    "mamba2": {"num_heads": 8},
    "minicpm3": LATENT | {"dim_model_base": 4, "scale_emb": 1},
    "nemotron_h": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "attention", "moe", "mamba"],
    },
    "olmo3": SLIDING,
    "olmo_hybrid": LINEAR,
    "qwen2": WINDOW_BELOW,
    "qwen3": WINDOW_BELOW,
    "qwen3_5_moe_text": LINEAR,
    "qwen3_5_text": LINEAR,
    "qwen3_next": LINEAR,
    "qwen4_exp_text": LINEAR
    | {
        "hc_count": 2,
        "hc_lowrank": 4,
        "indexer_n_heads": 16,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "youtu": LATENT,
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "mamba", "hybrid", "hybrid"],
        "n_mamba_heads": 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1, "num_hidden_layers": 4},
}
# Architectures that load, and that are neither tested here nor refused.
UNTESTED = {
    "with images or sound": {
        "dots3_note",
        "emu3",
        "fuyu",
        "gemma3",
        "gemma3n",
        "gemma4",
        "gemma4_assistant",
        "gemma4_unified",
        "gemma4_unified_assistant",
        "git",
        "got_ocr2",
        "llama4",
        "mllama",
        "moss_transcribe_diarize",
        "phi4_multimodal",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen4_exp",
    },
    "with inputs of their own": {"blt", "cpmant", "reformer"},
}
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def tiny_model(kind: str) -> PreTrainedModel:
    """A model with random weights, large enough that its distributions are far from uniform."""
    config_class = CONFIG_MAPPING[kind]
    names = {field.name for field in dataclasses.fields(config_class)}
    sizes = {name: size for name, size in SIZES.items() if name in names}
    sizes |= copy.deepcopy(ARCHITECTURES[kind])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**sizes)).float().eval()
    with torch.no_grad():
        for weights in model.parameters():
            if weights.ndim > 1:
                weights.normal_(std=0.3)
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0.0
    return model


def prompts() -> list[list[int]]:
    draw = torch.Generator().manual_seed(1)
    return [
        torch.randint(3, VOCABULARY, (length,), generator=draw).tolist()
        for length in (11, 3, 1, 7, 16, 11)
    ]


def greedy(model: nn.Module, prompt: list[int]) -> list[int]:
    """The most likely tokens, without padding, mask or cache.

    Generation ends where the two best logits are so close that rounding could swap them.
    """
    ids = list(prompt)
    while len(ids) < len(prompt) + NEW_TOKENS and STOP not in ids:
        logits, tokens = model(torch.tensor([ids]), use_cache=False).logits[0, -1].topk(2)
        if logits[0] - logits[1] < 1e-3:
            break
        ids.append(int(tokens[0]))
    return ids[len(prompt) :]


def generate(
    engine: TransformersEngine, ids: list[list[int]], sampling: Sampling
) -> list[list[int]]:
    rows = [{"prompt_id": str(n), "prompt_token_ids": row} for n, row in enumerate(ids)]
    return [row["token_ids"] for row in engine.generate(rows, sampling, 0, "iter1")]


def open_engine(folder: Path) -> TransformersEngine:
    return TransformersEngine(
        folder, precision="float32", device="cpu", attention=None, batch_size=64
    )


@pytest.fixture(scope="session")
def tokenizer_of_numbers(tmp_path_factory):
    """A folder with a tokenizer of 64 words."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(n): n for n in range(VOCABULARY)}, unk_token="0"))
    folder = tmp_path_factory.mktemp("numbers")
    made = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=str(STOP), pad_token="0")
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def policy(request, tokenizer_of_numbers, tmp_path_factory):
    """A model and the engine that reads it from its folder."""
    model = tiny_model(request.param)
    folder = tmp_path_factory.mktemp("policy")
    model.save_pretrained(folder)
    shutil.copytree(tokenizer_of_numbers, folder, dirs_exist_ok=True)
    GenerationConfig(eos_token_id=STOP).save_pretrained(folder)
    yield model, open_engine(folder)
    shutil.rmtree(folder)


@torch.inference_mode()
def test_a_policy_is_loaded_as_it_was_saved(policy):
    model, engine = policy
    ids = torch.tensor([prompts()[0]])
    torch.testing.assert_close(engine.model(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_a_padded_batch_generates_what_each_prompt_gives_alone(policy):
    model, engine = policy
    alone = [greedy(model, prompt) for prompt in prompts()]
    assert len(set(map(tuple, alone))) > 1, "every prompt has the same answer: nothing was tested"
    sampling = Sampling(samples=2, temperature=0.0, top_p=1.0, max_new_tokens=NEW_TOKENS)
    together = generate(engine, prompts(), sampling)
    expected = [tokens for tokens in alone for _ in range(2)]
    cut = [tokens[: len(known)] for tokens, known in zip(together, expected, strict=True)]
    assert cut == expected


def test_samples_do_not_depend_on_the_batch(policy):
    _, engine = policy
    sampling = Sampling(samples=2, temperature=4.0, top_p=1.0, max_new_tokens=3)
    together = generate(engine, prompts()[:4], sampling)
    engine.batch_size = sampling.samples  # one prompt at a time
    alone = generate(engine, prompts()[:4], sampling)
    engine.batch_size = 64
    assert together == alone
    assert together[::2] != together[1::2], "both samples of every prompt are the same"


@torch.inference_mode()
def test_padding_after_a_row_changes_no_log_probability(policy):
    """Scoring of responses gives the model no attention mask and no position ids."""
    model, _ = policy
    rows = prompts()
    width = max(map(len, rows))
    padded = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    together = model(padded, use_cache=False).logits.log_softmax(-1)
    for row, logps in zip(rows, together, strict=True):
        alone = model(torch.tensor([row]), use_cache=False).logits[0].log_softmax(-1)
        torch.testing.assert_close(logps[: len(row)], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", sorted(UNSUPPORTED_ARCHITECTURES))
def test_unsupported_architectures_are_a_one_line_error(kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(UserError) as caught:
        check_policy(tmp_path)
    reason = UNSUPPORTED_ARCHITECTURES[kind]
    assert f"architecture {kind}, which is unsupported: {reason};" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unsupported_architectures_are_refused_before_any_work(
    tokenizer_of_numbers, tmp_path, program
):
    folder, output = tmp_path / "model", tmp_path / "results" / "policy"
    shutil.copytree(tokenizer_of_numbers, folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "rwkv"}))
    with pytest.raises(UserError, match="architecture rwkv"):
        program(prepare_policy, "--model", folder, "--output", output)
    with pytest.raises(UserError, match="architecture rwkv"):
        open_engine(folder)
    assert not output.exists()


def test_every_architecture_is_tested_or_refused_or_listed():
    tested = set(ARCHITECTURES)
    refused = set(UNSUPPORTED_ARCHITECTURES)
    untested = set().union(*UNTESTED.values())
    assert not tested & refused
    assert not tested & untested
    assert not refused & untested
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) == tested | refused | untested
