"""Generation: one seed per sample, draws that follow the distribution, rules of token ids."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch

from sppo.core.errors import UserError
from sppo.policies.chats import load_tokenizer, prompt_token_ids, stop_token_ids
from sppo.policies.engines import EngineOptions, generated
from sppo.policies.generation import (
    FiniteLogits,
    Sampling,
    TransformersEngine,
    draw_tokens,
    sample_seed,
    summary,
)
from sppo.policies.models import load_policy
from sppo.policies.padding import padded
from sppo.policies.vllm_engine import VllmEngine, request_seed

EOS = 2
QUESTIONS = [
    "Hi",
    "Name three rivers.",
    "Why is the sky blue in the day and red in the evening, and black at night?",
    "Ein Satz mit Umlauten: Äpfel, Öl, Übermut.",
    "def f(x):\n    return x",
    "1 + 1 =",
]


# --- seeds ---


def test_seeds_keep_their_values():
    assert sample_seed(0, "iter1", "p1", 0) == 10329470296240424038
    assert sample_seed(7, "alpaca_eval", "open_question-01", 4) == 17986809668610612364


def test_every_sample_has_its_own_seed():
    """Data seed, purpose, prompt and sample number each change the seed."""
    samples = itertools.product(range(3), range(1, 4), range(30), range(12))
    seeds = {
        sample_seed(data_seed, f"iter{iteration}", f"p{prompt}", sample)
        for data_seed, iteration, prompt, sample in samples
    }
    assert len(seeds) == 3 * 3 * 30 * 12
    assert max(seeds) < 2**64
    assert sample_seed(0, "iter1", "p1", 11) != sample_seed(0, "iter1", "p11", 1)


# --- draws ---


def by_hand(logits: list[float], u: float, temperature: float, top_p: float) -> int:
    """Draw a token with plain loops.

    It is the inverse of the cumulative distribution over the nucleus, in the vocabulary's order.
    """
    top = max(logits)
    weights = [math.exp((x - top) / temperature) for x in logits]
    total = math.fsum(weights)
    p = [w / total for w in weights]
    kept = set()
    mass = 0.0
    for token in sorted(range(len(p)), key=lambda i: -p[i]):
        if mass >= top_p and top_p < 1:
            break
        kept.add(token)
        mass += p[token]
    target = (1 - u) * sum(p[i] for i in kept)
    below = 0.0
    for token in range(len(p)):
        if token in kept:
            below += p[token]
            if below >= target:
                return token
    return max(kept)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(
    ("vocabulary", "spread"),
    [(20, 2.0), (3000, 0.5)],
    ids=["peaked", "nucleus of more than 1024 tokens"],
)
def test_draws_equal_those_of_plain_loops(temperature, top_p, vocabulary, spread):
    draw = np.random.default_rng(vocabulary)
    logits = draw.normal(scale=spread, size=(40, vocabulary)).astype(np.float32)
    uniforms = draw.random(40)
    drawn = draw_tokens(torch.tensor(logits), torch.tensor(uniforms), temperature, top_p)
    expected = [
        by_hand(row, u, temperature, top_p)
        for row, u in zip(logits.tolist(), uniforms.tolist(), strict=True)
    ]
    assert drawn.tolist() == expected


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (0.7, 0.9)])
def test_frequencies_follow_the_distribution(temperature, top_p):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0, 1.5])
    p = torch.softmax(logits.double() / temperature, 0).numpy()
    if top_p < 1:
        ranked = np.argsort(-p)
        size_of_nucleus = int((p[ranked].cumsum() < top_p).sum()) + 1
        p[ranked[size_of_nucleus:]] = 0
        assert (p == 0).any()
        p /= p.sum()
    n = 40_000
    uniforms = torch.from_numpy(np.random.default_rng(5).random(n))
    drawn = draw_tokens(logits.expand(n, -1), uniforms, temperature, top_p)
    counts = np.bincount(drawn.numpy(), minlength=6)
    assert (counts[p == 0] == 0).all()
    chi_square = ((counts[p > 0] - n * p[p > 0]) ** 2 / (n * p[p > 0])).sum()
    # The 0.999 quantile at 5 degrees of freedom. The uniforms are fixed, so chance plays no role.
    assert chi_square < 20.5


@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_tokens_of_probability_0_are_never_drawn(top_p):
    """Also not at the ends of the vocabulary or of the interval of the uniforms."""
    logits = torch.tensor([-torch.inf, 1.0, -torch.inf, 0.9, -torch.inf])
    uniforms = torch.tensor([0.0, 5e-324, 0.25, 0.5, 0.75, 1 - 2**-53], dtype=torch.float64)
    drawn = draw_tokens(logits.expand(6, -1), uniforms, 1.0, top_p).tolist()
    assert set(drawn) == ({1} if top_p == 0.5 else {1, 3})


def test_a_row_draws_the_same_alone_and_in_a_batch():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(30, 500, generator=draw)
    uniforms = torch.rand(30, generator=draw, dtype=torch.float64)
    for top_p in (0.9, 1.0):
        alone = [
            draw_tokens(logits[i : i + 1], uniforms[i : i + 1], 1.0, top_p).item()
            for i in range(30)
        ]
        assert draw_tokens(logits, uniforms, 1.0, top_p).tolist() == alone


# --- the engine on the tiny policy ---


@pytest.fixture(scope="module")
def prompts(tiny_policy) -> list[dict]:
    tokenizer = load_tokenizer(tiny_policy)
    return [
        {
            "prompt_id": f"p{i}",
            "prompt_token_ids": prompt_token_ids(tokenizer, [{"role": "user", "content": text}]),
        }
        for i, text in enumerate(QUESTIONS)
    ]


def engine(folder, batch_size: int = 64) -> TransformersEngine:
    return TransformersEngine(
        folder, precision="float32", device="cpu", attention=None, batch_size=batch_size
    )


@pytest.fixture(scope="module")
def often_stopping(tiny_policy):
    """An engine whose policy often stops and often emits other special tokens.

    So both finish reasons occur.
    """
    made = engine(tiny_policy)
    bias = torch.zeros(49152)
    bias[[0, 1, EOS]] = torch.tensor([6.0, 6.0, 6.0])
    made.model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + bias)
    return made


SAMPLING = Sampling(samples=3, temperature=1.0, top_p=1.0, max_new_tokens=10)


@pytest.fixture(scope="module")
def responses(tiny_policy, prompts) -> list[dict]:
    return engine(tiny_policy).generate(prompts, SAMPLING, 0, "iter1")


@pytest.mark.parametrize("batch_size", [1, 4])
def test_batch_size_changes_no_token(batch_size, tiny_policy, prompts, responses):
    assert engine(tiny_policy, batch_size).generate(prompts, SAMPLING, 0, "iter1") == responses


@pytest.mark.parametrize("cores", [1, 2, 4])
def test_the_number_of_cores_changes_no_token(cores, tiny_policy, prompts, responses):
    before = torch.get_num_threads()
    torch.set_num_threads(cores)
    try:
        made = engine(tiny_policy)
        assert made.at_once == min(cores, 2)
        assert made.generate(prompts, SAMPLING, 0, "iter1") == responses
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("kind", "at_once"), [("dynamic", 1), ("longrope", 1), ("linear", 2), ("default", 2)]
)
def test_changing_positions_allow_one_batch_at_once(kind, at_once, tiny_policy, tmp_path):
    folder = shutil.copytree(tiny_policy, tmp_path / "policy")
    config = json.loads((folder / "config.json").read_text())
    factors = [1.0] * (config["head_dim"] // 2) if kind == "longrope" else None
    config["rope_parameters"] = {
        "rope_type": kind,
        "rope_theta": 10000.0,
        "factor": 2.0,
        "short_factor": factors,
        "long_factor": factors,
        "original_max_position_embeddings": 64,
    }
    (folder / "config.json").write_text(json.dumps(config))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert engine(folder).at_once == at_once
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("at_once", [1, 2])
def test_batches_are_even_and_within_the_limit(at_once, tiny_policy, prompts, monkeypatch):
    made = engine(tiny_policy, batch_size=12)
    made.at_once = at_once
    sizes = []
    decode = made._decode

    def seen(ids, *rest):
        sizes.append(len(ids))
        return decode(ids, *rest)

    monkeypatch.setattr(made, "_decode", seen)
    made.generate(prompts, SAMPLING, 0, "iter1")
    assert sorted(sizes) == ([9, 9] if at_once == 1 else [3, 3, 6, 6])


@pytest.mark.parametrize("shards", [2, 3])
def test_shards_and_their_order_change_no_token(shards, tiny_policy, prompts, responses):
    made = engine(tiny_policy)
    rows = []
    for shard in reversed(range(shards)):
        rows += made.generate(prompts[shard::shards], SAMPLING, 0, "iter1")
    assert sorted(rows, key=lambda row: (row["prompt_id"], row["sample_id"])) == responses


def test_rows_have_the_order_of_the_prompts_and_samples(prompts, responses):
    assert [(row["prompt_id"], row["sample_id"]) for row in responses] == [
        (prompt["prompt_id"], sample) for prompt in prompts for sample in range(3)
    ]


def test_the_samples_of_a_prompt_differ(prompts, responses):
    for start in range(0, len(responses), 3):
        samples = {tuple(row["token_ids"]) for row in responses[start : start + 3]}
        assert len(samples) == 3


@pytest.mark.parametrize(("seed", "purpose"), [(1, "iter1"), (0, "iter2")])
def test_another_data_seed_or_iteration_gives_other_tokens(
    seed, purpose, tiny_policy, prompts, responses
):
    others = engine(tiny_policy).generate(prompts, SAMPLING, seed, purpose)
    for row, other in zip(responses, others, strict=True):
        assert row["token_ids"] != other["token_ids"]
        assert row["seed"] != other["seed"]


def test_tokens_equal_draws_by_loops_without_cache(tiny_policy, prompts, responses):
    """Two samples again: without batch and cache, in plain loops, with the seed in their rows."""
    model = load_policy(tiny_policy, torch.float32, "cpu")
    for row in (responses[0], responses[7]):
        noise = np.random.Generator(np.random.Philox(row["seed"]))
        ids = list(row["prompt_token_ids"])
        for u in noise.random(SAMPLING.max_new_tokens)[:4]:
            with torch.inference_mode():
                logits = model(torch.tensor([ids])).logits[0, -1].tolist()
            ids.append(by_hand(logits, u, 1.0, 1.0))
        assert ids[-4:] == row["token_ids"][:4]


def test_prompt_ids_are_exactly_those_of_the_template(tiny_policy, prompts):
    tokenizer = load_tokenizer(tiny_policy)
    for prompt, text in zip(prompts, QUESTIONS, strict=True):
        ids = prompt["prompt_token_ids"]
        rendered = (
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
            "trained by Hugging Face<|im_end|>\n"
            f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        )
        assert tokenizer.decode(ids) == rendered
        assert ids == tokenizer.encode(rendered, add_special_tokens=False)
        # Token 1 is both BOS and <|im_start|>. It occurs once a turn, so there is no BOS before.
        assert ids[0] == 1
        assert ids[1] != 1
        assert ids.count(1) == 3


@pytest.fixture(scope="module")
def mixed(often_stopping, prompts) -> list[dict]:
    """30 responses; some stopped, some were cut at 12 tokens."""
    rows = often_stopping.generate(prompts, Sampling(5, 1.0, 1.0, 12), 0, "iter1")
    assert {row["finish_reason"] for row in rows} == {"stop", "length"}
    return rows


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ended_responses_leave_the_batch(often_stopping, prompts, monkeypatch, temperature):
    """The responses are those of a batch that keeps every row until all have ended."""
    sampling = Sampling(5 if temperature else 1, temperature, 1.0, 40)
    module = "sppo.policies.generation"
    monkeypatch.setattr(f"{module}.WORTH_LEAVING", 2.0)
    kept = often_stopping.generate(prompts, sampling, 0, "iter1")

    monkeypatch.setattr(f"{module}.WORTH_LEAVING", 0.0)
    monkeypatch.setattr(f"{module}.DECODED_AT_ONCE", 3)
    sizes = []
    hook = often_stopping.model.lm_head.register_forward_hook(
        lambda module, inputs, logits: sizes.append(len(logits))
    )
    left = often_stopping.generate(prompts, sampling, 0, "iter1")
    hook.remove()
    assert left == kept
    if temperature:
        assert sizes[-1] < len(left)


def test_only_a_stopped_response_ends_with_a_stop_id(mixed):
    for row in mixed:
        ids = row["token_ids"]
        if row["finish_reason"] == "stop":
            assert ids[-1] == EOS
            assert EOS not in ids[:-1]
            assert len(ids) <= 12
        else:
            assert EOS not in ids
            assert len(ids) == 12


def test_special_tokens_are_not_in_the_text(mixed):
    assert any({0, 1} & set(row["token_ids"]) for row in mixed), (
        "the policy emitted no other special token: nothing was tested"
    )
    for row in mixed:
        for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"):
            assert token not in row["text"]


def test_summary_counts_responses_and_tokens(mixed):
    facts = summary(mixed)
    assert facts["responses"] == 30
    assert facts["tokens"] == sum(len(row["token_ids"]) for row in mixed)
    cut = [row for row in mixed if row["finish_reason"] == "length"]
    assert facts["cut_by_max_new_tokens"] == len(cut)


def test_an_early_stop_changes_no_other_response_in_the_batch(often_stopping, prompts):
    sampling = Sampling(2, 1.0, 1.0, 12)
    together = often_stopping.generate(prompts, sampling, 0, "iter1")
    alone = []
    for prompt in prompts:
        alone += often_stopping.generate([prompt], sampling, 0, "iter1")
    assert together == alone


def test_every_stop_id_of_the_generation_config_ends_a_response(tiny_policy, prompts, tmp_path):
    from transformers import GenerationConfig

    folder = tmp_path / "policy"
    shutil.copytree(tiny_policy, folder)
    GenerationConfig(eos_token_id=[EOS, *range(10_000, 14_000)]).save_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    assert stop_token_ids(folder, tokenizer)[:2] == [EOS, 10_000]
    rows = engine(folder).generate(prompts, Sampling(2, 1.0, 1.0, 12), 0, "iter1")
    assert {row["finish_reason"] for row in rows} == {"stop", "length"}
    for row in rows:
        stops = [token == EOS or 10_000 <= token < 14_000 for token in row["token_ids"]]
        assert stops == [False] * (len(stops) - 1) + [row["finish_reason"] == "stop"]
        spoken = row["token_ids"][:-1] if row["finish_reason"] == "stop" else row["token_ids"]
        assert row["text"] == tokenizer.decode(spoken, skip_special_tokens=True)


def test_temperature_0_equals_greedy_generation(tiny_policy, prompts):
    model = load_policy(tiny_policy, torch.float32, "cpu")
    for row in engine(tiny_policy).generate(prompts, Sampling(1, 0.0, 1.0, 10), 0, "iter1"):
        ids = torch.tensor([row["prompt_token_ids"]])
        greedy = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=10,
            pad_token_id=EOS,
        )
        assert row["token_ids"] == greedy[0, ids.shape[1] :].tolist()


def test_sampling_settings_of_the_model_folder_are_ignored(
    tiny_policy, prompts, responses, tmp_path
):
    """Folders of Qwen and Llama set a temperature, top_k and repetition penalties."""
    from transformers import GenerationConfig

    folder = tmp_path / "policy"
    shutil.copytree(tiny_policy, folder)
    GenerationConfig(
        do_sample=True,
        temperature=0.1,
        top_p=0.1,
        top_k=2,
        repetition_penalty=1.9,
        min_p=0.5,
        typical_p=0.5,
        max_length=40,
        no_repeat_ngram_size=1,
        min_new_tokens=5,
        suppress_tokens=list(range(9000)),
        eos_token_id=EOS,
    ).save_pretrained(folder)
    assert engine(folder).generate(prompts, SAMPLING, 0, "iter1") == responses


# --- policies that are broken, and the device ---


def broken(folder, value: float, first_step: int = 0) -> TransformersEngine:
    """An engine that replaces one logit of one row, from this step on."""
    made = engine(folder)
    steps = iter(range(1000))

    def replace(module, inputs, logits):
        if logits.shape[1] == 1 and next(steps) >= first_step:
            logits[1, 0, 7] = value
        return logits

    made.model.lm_head.register_forward_hook(replace)
    return made


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("first_step", [1, 5], ids=["from the start", "later"])
def test_logits_that_are_not_finite_name_the_policy(
    value, temperature, first_step, tiny_policy, prompts
):
    made = broken(tiny_policy, value, first_step)
    with pytest.raises(UserError) as caught:
        made.generate(prompts, Sampling(2, temperature, 1.0, 8), 0, "iter1")
    said = str(caught.value)
    assert said.startswith(f"the policy {tiny_policy} gives logits that are NaN or infinite, ")
    assert "\n" not in said


def test_nan_weights_stop_generation_at_the_first_token(tiny_policy, prompts):
    made = engine(tiny_policy)
    passes = []
    made.model.register_forward_hook(lambda module, inputs, output: passes.append(1))
    torch.nn.init.constant_(made.model.model.norm.weight, math.nan)
    with pytest.raises(UserError, match="logits that are NaN or infinite"):
        made.generate(prompts, Sampling(1, 1.0, 1.0, 8), 0, "iter1")
    assert len(passes) == 2, "one pass for the prompts, one for the first token"


def test_a_logit_of_minus_infinity_is_no_error(tiny_policy, prompts):
    rows = broken(tiny_policy, -math.inf).generate(prompts, Sampling(2, 1.0, 1.0, 8), 0, "iter1")
    assert len(rows) == 2 * len(prompts)


@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_a_row_of_nan_logits_draws_a_token_of_the_vocabulary(top_p):
    """FiniteLogits.check reports the row later.

    On a GPU, a token outside the vocabulary would kill the process before that.
    """
    logits = torch.randn(3, 300)
    logits[1] = math.nan
    assert draw_tokens(logits, torch.tensor([0.2, 0.5, 0.9]), 1.0, top_p).max() < 300


def test_use_cache_false_in_the_config_changes_no_token(tiny_policy, prompts, responses, tmp_path):
    folder = tmp_path / "policy"
    shutil.copytree(tiny_policy, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"use_cache": False}))
    assert engine(folder).generate(prompts, SAMPLING, 0, "iter1") == responses


def test_padding_is_on_one_side_and_no_token_in_the_mask():
    for side, ids, mask in (
        ("left", [[5, 9], [9, 7], [9, 9]], [[1, 1], [0, 1], [0, 0]]),
        ("right", [[5, 9], [7, 9], [9, 9]], [[1, 1], [1, 0], [0, 0]]),
    ):
        found = padded([[5, 9], [7], []], 9, side=side)
        assert [each.tolist() for each in found] == [ids, mask]
        assert found[0].dtype == torch.int64


def test_prompts_are_processed_once_for_all_samples(tiny_policy, prompts):
    """With full attention, the tokens of a prompt pass through the model once for all samples."""
    made = engine(tiny_policy)
    assert made.reads_prompts_once
    tokens = []
    made.model.model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: tokens.append(inputs[0].numel())
    )
    made.generate(prompts, Sampling(4, 1.0, 1.0, 1), 0, "iter1")
    longest = max(len(prompt["prompt_token_ids"]) for prompt in prompts)
    assert tokens == [len(prompts) * (longest - 1), 4 * len(prompts)]


def test_generation_disables_cudnn_attention(tiny_policy):
    """It gives NaN for rows with padding on the left in torch 2.13."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        engine(tiny_policy)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


# --- vLLM; tests/vllm runs it ---


def test_vllm_generates_in_a_process_of_its_own(tmp_path, prompts):
    """It keeps the GPU's memory until the process ends. This one ends at a missing policy."""
    options = EngineOptions(
        "vllm", "cpu", "float32", 4, None, None, None, None, "keep", {}, "2026-01-01"
    )
    with pytest.raises(UserError, match="none does not exist") as error:
        generated(tmp_path / "none", options, prompts, Sampling(1, 1.0, 1.0, 2), 0, "measure1")
    assert "_RemoteTraceback" in repr(error.value.__cause__)


def test_vllm_seeds_keep_their_values_and_fit_signed_64_bits():
    seed = request_seed(0, "iter1", "p1")
    assert seed == 2582367574060106009
    assert seed == sample_seed(0, "iter1", "p1", 0) // 4
    assert max(request_seed(0, "iter1", f"p{i}") for i in range(1000)) < 2**62


@pytest.mark.parametrize(
    ("device", "tensor_parallel", "said"),
    [
        ("cpu", 2, "responses.tensor_parallel is 2, but there is no GPU here"),
        ("cuda", 2, "responses.tensor_parallel is 2, but PyTorch sees 1 GPU here"),
        ("cpu", 1, "responses.engine is vllm, but vLLM cannot be imported here"),
    ],
)
def test_vllm_without_its_requirements_is_a_one_line_error(
    device, tensor_parallel, said, tiny_policy, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError) as caught:
        VllmEngine(
            tiny_policy,
            precision="float32",
            device=device,
            batch_size=4,
            tensor_parallel=tensor_parallel,
        )
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_logits_that_were_not_finite_once_are_reported(tmp_path):
    seen = FiniteLogits(tmp_path)
    for value in (0.0, float("nan"), 0.0):
        seen(torch.zeros(1, 1, dtype=torch.long), torch.tensor([[value, 1.0]]))
    with pytest.raises(UserError, match="NaN or infinite"):
        seen.check()
