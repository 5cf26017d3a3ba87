"""Summed log-probabilities equal a loop in float64; batches, padding and order change nothing."""

from __future__ import annotations

import random
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sppo.core.errors import UserError
from sppo.policies.devices import weights_dtype
from sppo.policies.models import load_frozen_policy, load_policy
from sppo.training import attention
from sppo.training.batches import (
    MODELS,
    choose_layout,
    collate,
    collate_packed,
    collate_shared,
    pair_batch,
)
from sppo.training.lengths import (
    computed_tokens,
    pair_length,
)
from sppo.training.logps import (
    forward_precision,
    frozen_logps,
    frozen_response_logps,
    response_logps,
)

EOS = 2  # also the padding token of the tokenizer


@pytest.fixture(scope="module")
def model(tiny_policy):
    return load_policy(tiny_policy, torch.float32, "cpu")


@pytest.fixture(scope="module")
def sequences() -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and responses of many lengths.

    Some responses have EOS inside or at the end, and one is only EOS.
    """
    draw = random.Random(0)

    def ids(longest: int) -> list[int]:
        return [draw.randrange(49152) for _ in range(draw.randint(1, longest))]

    prompts = [ids(30) for _ in range(12)]
    responses = [ids(40) + [EOS] * (i % 3) for i in range(11)]
    responses.append([EOS])
    responses[4][len(responses[4]) // 2] = EOS
    return prompts, responses


@pytest.fixture(scope="module")
def loop(tiny_policy):
    """log pi(response | prompt): one sequence, no padding, all logits, float64, token by token."""
    model = load_policy(tiny_policy, torch.float64, "cpu")

    def logp(prompt: list[int], response: list[int]) -> float:
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + response])).logits[0]
        total = 0.0
        for place, token in enumerate(response):
            row = logits[len(prompt) + place - 1]
            total += (row[token] - row.max() - torch.log(torch.exp(row - row.max()).sum())).item()
        return total

    return logp


@pytest.fixture(scope="module")
def by_hand(loop, sequences) -> list[float]:
    return [loop(prompt, response) for prompt, response in zip(*sequences, strict=True)]


def in_batches(model, prompts, responses, order: list[int], size: int) -> list[float]:
    found: dict[int, float] = {}
    with torch.inference_mode():
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            batch = collate([prompts[i] for i in rows], [responses[i] for i in rows])
            found |= dict(zip(rows, response_logps(model, batch).tolist(), strict=True))
    return [found[i] for i in range(len(order))]


@pytest.mark.parametrize("size", [1, 5, 12])
def test_log_probabilities_equal_the_loop_at_every_batch_size(size, model, sequences, by_hand):
    found = in_batches(model, *sequences, list(range(12)), size)
    assert found == pytest.approx(by_hand, abs=1e-4, rel=1e-6)


def test_order_and_other_rows_do_not_matter(model, sequences, by_hand):
    order = random.Random(1).sample(range(12), 12)
    assert in_batches(model, *sequences, order, 4) == pytest.approx(by_hand, abs=1e-4, rel=1e-6)


def test_wider_padding_does_not_matter(model, sequences, by_hand):
    """Another row of the batch has a far longer prompt and a far longer response."""
    prompts, responses = sequences
    batch = collate([prompts[0], [7] * 200], [responses[0], [9] * 150])
    with torch.inference_mode():
        found = response_logps(model, batch)[0].item()
    assert found == pytest.approx(by_hand[0], abs=1e-4, rel=1e-6)


def test_a_response_of_eos_alone_counts(sequences, by_hand):
    _, responses = sequences
    assert responses[11] == [EOS]
    assert by_hand[11] < -1e-3


def test_eos_at_the_end_of_a_response_counts(model, sequences):
    prompts, responses = sequences
    compared = [responses[0] + [EOS], responses[0]]
    longer, shorter = in_batches(model, [prompts[0]] * 2, compared, [0, 1], 2)
    assert longer < shorter - 1e-3


def test_collate_pads_right_and_says_what_predicts_what():
    batch = collate([[11, 12], [13]], [[21], [EOS, 22, EOS]])
    assert batch["input_ids"].tolist() == [[11, 12, 21, 0], [13, EOS, 22, EOS]]
    assert batch["reads"].tolist() == [1, 4, 5, 6]
    assert batch["response_ids"].tolist() == [[21, 0, 0], [EOS, 22, EOS]]
    assert batch["slots"].tolist() == [0, 3, 4, 5]
    assert batch.keys() == {"input_ids", "reads", "response_ids", "slots"}, (
        "an attention mask would prevent the backward pass of cuDNN"
    )


def test_packed_sequences_have_no_padding_and_own_positions():
    batch = collate_packed([[11, 12], [13]], [[21], [EOS, 22, EOS]])
    assert batch["input_ids"].tolist() == [[11, 12, 21, 13, EOS, 22, EOS]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert batch["cu_seqlens"].tolist() == [0, 3, 7]
    assert batch["cu_seqlens"].dtype == torch.int32
    assert batch["ends"] == [0, 3, 7]
    assert batch["reads"].tolist() == [1, 3, 4, 5]
    assert batch["response_ids"].tolist() == [[21, 0, 0], [EOS, 22, EOS]]


def test_the_end_of_a_shared_prompt_predicts_both_responses():
    batch = collate_shared([[11, 12], [13]], [[21], [22, 23]], [[31, 32], [33]])
    assert batch["input_ids"].tolist() == [[11, 12, 21, 31, 32], [13, 22, 23, 33, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 2, 3], [0, 1, 2, 1, 0]]
    assert batch["segment_ids"].tolist() == [[0, 0, 1, 2, 2], [0, 1, 1, 2, 0]]
    # chosen 21, then 22 and 23; rejected 31 and 32, then 33
    assert batch["reads"].tolist() == [1, 5, 6, 1, 3, 5]
    assert batch["response_ids"].tolist() == [[21, 0], [22, 23], [31, 32], [33, 0]]


def make_pairs(sequences) -> list[dict]:
    prompts, responses = sequences
    return [
        {
            "pair_id": 10 * i,
            "prompt_token_ids": prompts[i],
            "chosen_token_ids": responses[i],
            "rejected_token_ids": responses[i + 6],
        }
        for i in range(6)
    ]


def test_pair_batch_holds_all_chosen_then_all_rejected(sequences):
    pairs = make_pairs(sequences)[:3]
    batch = pair_batch(pairs, "padded")
    wanted = [p[f"{side}_token_ids"] for side in ("chosen", "rejected") for p in pairs]
    prompts = [p["prompt_token_ids"] for p in pairs] * 2
    for row, (prompt, response) in enumerate(zip(prompts, wanted, strict=True)):
        assert batch["input_ids"][row, : len(prompt) + len(response)].tolist() == prompt + response
    held = batch["input_ids"].flatten()[batch["reads"] + 1].tolist()
    assert held == [token for response in wanted for token in response]


# --- layouts ---

TINY = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def random_model(model_type: str, **more):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **TINY | more)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def small_pairs(sequences) -> list[dict]:
    return [
        {key: [i % 300 for i in value] if isinstance(value, list) else value for key, value in p}
        for p in (pair.items() for pair in make_pairs(sequences))
    ]


def gradients_of(model, batch) -> torch.Tensor:
    model.zero_grad()
    logps = response_logps(model, batch)
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters()])


@pytest.mark.parametrize("model_type", sorted(MODELS))
@pytest.mark.parametrize("layout", ["shared", "shared, long rows"])
def test_shared_prompts_give_the_numbers_of_padded_rows(layout, model_type, sequences, monkeypatch):
    model = random_model(model_type, sliding_window=None)
    pairs = small_pairs(sequences)
    padded = pair_batch(pairs, "padded")
    expected = response_logps(model, padded).tolist()
    gradients = gradients_of(model, padded)

    columns = [[p[f"{n}_token_ids"] for p in pairs] for n in ("prompt", "chosen", "rejected")]
    if layout == "shared, long rows":
        monkeypatch.setattr(attention, "LONGEST_ROW", 0)
    assert choose_layout(model, "cpu") == "shared"
    batch = collate_shared(*columns)
    assert batch["input_ids"].numel() < padded["input_ids"].numel()
    assert response_logps(model, batch).tolist() == pytest.approx(expected, abs=1e-4, rel=1e-6)
    assert torch.allclose(gradients_of(model, batch), gradients, rtol=1e-3, atol=1e-4)


CAPPED = {"attn_logit_softcapping": 0.5}
# Rows have up to 70 tokens. Gemma-2 has the window in every second layer.
PACKED_MODELS = {
    **{name: {"model_type": name, "sliding_window": None} for name in sorted(MODELS)},
    "mistral, window": {"model_type": "mistral", "sliding_window": 7},
    "qwen3, window": {
        "model_type": "qwen3",
        "sliding_window": 7,
        "use_sliding_window": True,
        "max_window_layers": 1,
    },
    "gemma2": {"model_type": "gemma2"} | CAPPED,
    "gemma2, window": {"model_type": "gemma2", "sliding_window": 7} | CAPPED,
}


@pytest.fixture(params=PACKED_MODELS.values(), ids=PACKED_MODELS)
def unpacked(request):
    """A model that a GPU packs, before its attention is replaced."""
    model = random_model(**request.param)
    for layer in model.model.layers:  # logits of attention as large as in a trained model
        layer.self_attn.k_proj.weight.data.mul_(1000)
    return model


def test_packed_sequences_give_the_numbers_of_padded_rows(unpacked, sequences):
    """The padded rows are computed by transformers' attention."""
    pairs = small_pairs(sequences)
    padded = pair_batch(pairs, "padded")
    expected = response_logps(unpacked, padded).tolist()
    gradients = gradients_of(unpacked, padded)
    assert choose_layout(unpacked, "cuda") == "packed"
    batch = pair_batch(pairs, "packed")
    assert batch["input_ids"].shape == (1, computed_tokens(pairs, "packed"))
    assert response_logps(unpacked, batch).tolist() == pytest.approx(expected, abs=1e-4, rel=1e-6)
    assert torch.allclose(gradients_of(unpacked, batch), gradients, rtol=1e-3, atol=1e-4)
    with pytest.raises(RuntimeError, match="was given rows that are not"):
        response_logps(unpacked, padded)


@pytest.mark.parametrize(
    "unpacked",
    [each for name, each in PACKED_MODELS.items() if "window" in name or name == "gemma2"],
    indirect=True,
)
def test_windows_and_soft_caps_of_these_models_have_an_effect(unpacked, sequences):
    """Otherwise the test above would not notice if packing ignored them."""
    config = unpacked.config
    batch = pair_batch(small_pairs(sequences), "padded")
    expected = response_logps(unpacked, batch)
    for layer in unpacked.model.layers:
        layer.self_attn.sliding_window = None
        layer.self_attn.attn_logit_softcapping = None
    config.sliding_window = None
    choose_layout(unpacked, "cuda")
    without = response_logps(unpacked, pair_batch(small_pairs(sequences), "packed"))
    assert (without - expected).abs().max() > 1e-3


def test_a_packed_sequence_is_the_same_by_itself(unpacked, sequences):
    """Its log-probability does not depend on the sequences before it."""
    model = unpacked
    attention.use(model, attention.PACKED)
    prompts, responses = ([[i % 300 for i in ids] for ids in part] for part in sequences)
    together = response_logps(model, collate_packed(prompts, responses)).tolist()
    alone = [
        response_logps(model, collate_packed([prompt], [response])).item()
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    assert together == pytest.approx(alone, abs=1e-4, rel=1e-6)


def test_packed_gradients_are_the_same_with_checkpointing(sequences):
    model = random_model("llama")
    attention.use(model, attention.PACKED)
    batch = pair_batch(small_pairs(sequences), "packed")
    expected = gradients_of(model, batch)
    model.train().gradient_checkpointing_enable()
    assert torch.equal(gradients_of(model, batch), expected)


def test_a_rejected_response_does_not_depend_on_the_chosen_one(model, sequences):
    pairs = make_pairs(sequences)
    columns = [[p[f"{n}_token_ids"] for p in pairs] for n in ("prompt", "chosen", "rejected")]
    first = response_logps(model, collate_shared(*columns))
    columns[1] = [[7] * 3 for _ in pairs]
    second = response_logps(model, collate_shared(*columns))
    assert second[6:].tolist() == pytest.approx(first[6:].tolist(), abs=1e-4)
    assert (second[:6] - first[:6]).abs().min() > 1e-2


def test_the_layout_follows_device_and_model():
    def layout(device: str, model_type: str = "llama", **more) -> str:
        return choose_layout(random_model(model_type, **more), device)

    assert layout("cpu") == "shared"
    assert layout("cpu", "mistral", sliding_window=8) == "padded"
    assert layout("cpu", "gemma2") == "padded"
    assert layout("cuda") == "packed"
    assert layout("cuda", "mistral", sliding_window=8) == "packed"
    assert layout("cuda", "gemma2") == "packed"
    assert layout("mps") == "padded"
    for device in ("cpu", "cuda"):
        assert layout(device, attn_implementation="eager") == "padded"
        assert layout(device, "gpt2") == "padded"


def test_which_attention_the_kernel_for_packed_sequences_takes(monkeypatch):
    def takes(width: int, dtype: torch.dtype = torch.bfloat16, window: int | None = None) -> bool:
        return attention._kernel_takes(torch.zeros(1, 4, 3, width, dtype=dtype), window)

    flash = [True]
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: flash[0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert takes(64) and takes(256) and takes(64, window=8)
    assert not takes(12)
    assert not takes(512)
    assert not takes(64, torch.float32)
    monkeypatch.setattr(attention, "_parameters_of_varlen", lambda: {"is_causal"})
    assert takes(64) and not takes(64, window=8)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not takes(64)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    flash[0] = False
    assert not takes(64)


@pytest.mark.parametrize(
    ("known", "window"),
    [
        ({"window_size", "enable_gqa"}, None),
        ({"window_size", "enable_gqa"}, 5),
        ({"is_causal"}, None),  # an older version, which `_kernel_takes` refuses with a window
    ],
)
def test_what_the_kernel_for_packed_sequences_is_given(known, window, monkeypatch):
    """The kernel needs a GPU. Here a stand-in computes what its documentation says."""
    torch.manual_seed(0)
    ends = [0, 9, 10, 30]
    query, key, value = (torch.randn(1, heads, ends[-1], 8) for heads in (4, 2, 2))
    cu_seqlens = torch.tensor(ends, dtype=torch.int32)
    seen = {}

    def varlen_attn(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, **options):
        seen.update(options)
        assert torch.equal(cu_q, cu_k) and max_q == max_k == 20
        before, after = options.get("window_size", (-1, 0))
        assert after == 0 and options.get("is_causal", True)
        places = torch.arange(len(query))
        of_sequence = torch.searchsorted(cu_q[1:].long(), places, right=True)
        distance = places[:, None] - places
        seen_by = (of_sequence[:, None] == of_sequence) & (distance >= 0)
        if before >= 0:
            seen_by &= distance <= before
        key, value = (
            each.repeat_interleave(query.shape[1] // each.shape[1], 1) for each in (key, value)
        )
        scores = torch.einsum("qhd,khd->hqk", query, key) * scale
        weights = scores.masked_fill(~seen_by, -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, value)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    monkeypatch.setattr(attention, "_parameters_of_varlen", lambda: known)
    found = attention._varlen((query, key, value), cu_seqlens, 20, 0.3, window)
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    expected, _ = attention.packed_attention(
        module, query, key, value, None, 0.3, window, cu_seq_lens_q=cu_seqlens, ends=ends
    )
    assert torch.allclose(found, expected, atol=1e-6)
    assert seen.keys() == known


def test_prompts_are_shared_only_where_it_saves_tokens():
    def pair(prompt: int, response: int) -> dict:
        return {
            "prompt_token_ids": [1] * prompt,
            "chosen_token_ids": [1] * response,
            "rejected_token_ids": [1] * response,
        }

    assert "segment_ids" in pair_batch([pair(50, 30)], "shared")
    assert "segment_ids" not in pair_batch([pair(50, 30)], "padded")
    assert "segment_ids" not in pair_batch([pair(50, 500)], "shared")
    # One long row would be padding in all others.
    assert "segment_ids" not in pair_batch([pair(50, 30), pair(1, 100)], "shared")


def test_pair_length_is_the_length_of_its_longer_sequence():
    pair = {
        "prompt_token_ids": [1] * 3,
        "chosen_token_ids": [1] * 5,
        "rejected_token_ids": [1] * 7,
    }
    assert pair_length(pair) == 10


@pytest.mark.parametrize("size", [1, 4, 100])
def test_frozen_logps_keep_the_order_of_the_pairs(size, model, sequences, loop):
    pairs = make_pairs(sequences)
    rows = frozen_logps(model, pairs, torch.float32, "cpu", size)
    assert [row["pair_id"] for row in rows] == [0, 10, 20, 30, 40, 50]
    for side in ("chosen", "rejected"):
        expected = [loop(pair["prompt_token_ids"], pair[f"{side}_token_ids"]) for pair in pairs]
        assert [row[f"{side}_logp"] for row in rows] == pytest.approx(expected, abs=1e-4, rel=1e-6)


@pytest.mark.parametrize(("size", "tokens"), [(1, None), (5, None), (100, None), (1, 1), (1, 40)])
def test_frozen_logps_of_responses_keep_their_order(size, tokens, model, sequences, by_hand):
    rows = [
        {"prompt_id": "p", "sample_id": 0, "prompt_token_ids": prompt, "token_ids": response}
        for prompt, response in zip(*sequences, strict=True)
    ]
    found = frozen_response_logps(model, rows, torch.float32, "cpu", size, tokens)
    assert found == pytest.approx(by_hand, abs=1e-4, rel=1e-6)


def test_frozen_logps_in_bfloat16_are_summed_in_float32(model, sequences, by_hand):
    """A sum in bfloat16 would have 8 bits. The error per token is below 0.1."""
    rows = frozen_logps(model, make_pairs(sequences), torch.bfloat16, "cpu", 4)
    found = [row["chosen_logp"] for row in rows]
    lengths = [len(response) for response in sequences[1][:6]]
    errors = [
        abs(logp - exact) / length
        for logp, exact, length in zip(found, by_hand[:6], lengths, strict=True)
    ]
    assert 0 < max(errors) < 0.1
    assert any(logp != torch.tensor(logp).bfloat16().item() for logp in found)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lora_rank", [0, 8])
def test_a_frozen_policy_gives_the_numbers_of_training(
    lora_rank, dtype, tied, tiny_policy, tmp_path, sequences
):
    """Bit for bit. Only weights that autocast would round are held in bfloat16."""
    training = load_policy(tiny_policy, weights_dtype(lora_rank, dtype), "cpu")
    if not tied:
        training.config.tie_word_embeddings = False
        head = torch.randn_like(training.lm_head.weight.float()) / 10
        training.lm_head.weight = torch.nn.Parameter(head.to(training.dtype))
    folder = shutil.copytree(tiny_policy, tmp_path / "policy")
    training.save_pretrained(folder)
    frozen = load_frozen_policy(folder, lora_rank, dtype, "cpu")
    pairs = make_pairs(sequences)
    expected = frozen_logps(training, pairs, dtype, "cpu", 4)
    assert frozen_logps(frozen, pairs, dtype, "cpu", 4) == expected
    layer = frozen.model.layers[0]
    assert layer.mlp.up_proj.weight.dtype == dtype
    assert layer.input_layernorm.weight.dtype == weights_dtype(lora_rank, dtype)
    assert frozen.get_input_embeddings().weight.dtype == weights_dtype(lora_rank, dtype)


# --- the head ---


def large_logits(folder, scale: float):
    """The tiny policy with logits far above 16, where bfloat16 has a spacing of 1/8 or more."""
    model = load_policy(folder, torch.float32, "cpu")
    with torch.no_grad():
        model.model.norm.weight.mul_(scale)
    return model


def test_bfloat16_states_give_float32_logits(tiny_policy, sequences):
    """Responses of one token: their log-probabilities are not rounded to bfloat16."""
    model = large_logits(tiny_policy, 20.0)
    prompts, _ = sequences
    batch = collate(prompts, [[7]] * len(prompts))
    with torch.inference_mode(), forward_precision("cpu", torch.bfloat16):
        logps = response_logps(model, batch)
        last = torch.tensor([len(prompt) - 1 for prompt in prompts])
        logits = model(batch["input_ids"]).logits[torch.arange(len(prompts)), last].float()
    rounded = logits[:, 7] - logits.logsumexp(-1)
    assert logits.abs().max() > 16
    assert logps.dtype == torch.float32
    assert (logps - rounded).abs().max() > 1e-2
    exact = []
    with torch.inference_mode(), forward_precision("cpu", torch.bfloat16):
        states = model.model(batch["input_ids"]).last_hidden_state[torch.arange(len(prompts)), last]
    for state in states.bfloat16().double():
        row = model.lm_head.weight.bfloat16().double() @ state
        exact.append((row[7] - row.logsumexp(-1)).item())
    assert logps.tolist() == pytest.approx(exact, abs=1e-3)


def test_gradients_through_the_head_have_bfloat16_accuracy(tiny_policy, sequences):
    """Compared with the gradients of a pass in float64."""
    prompts, responses = sequences
    batch = collate(prompts[:4], responses[:4])
    gradients = []
    for weights_in, computed_in in (
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float64),
    ):
        model = load_policy(tiny_policy, weights_in, "cpu")
        with forward_precision("cpu", computed_in):
            response_logps(model, batch).sum().backward()
        flat = [weight.grad.flatten().double() for weight in model.parameters()]
        gradients.append(torch.cat(flat))
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.999


def test_the_head_of_the_model_is_restored_after_a_pass(model, sequences):
    in_batches(model, *sequences, [0, 1], 2)
    assert "forward" not in vars(model.lm_head)


def test_a_nan_log_probability_names_its_pair(tiny_policy, sequences):
    model = load_policy(tiny_policy, torch.float32, "cpu")
    model.model.embed_tokens.register_forward_hook(
        lambda _, ids, states: states.masked_fill((ids[0] == 5)[..., None], torch.nan)
    )
    pairs = make_pairs(sequences)
    pairs[3]["prompt_token_ids"] = [5]
    with pytest.raises(
        UserError, match="log-probability under the frozen policy of pair 30 is nan"
    ):
        frozen_logps(model, pairs, torch.float32, "cpu", 4)
