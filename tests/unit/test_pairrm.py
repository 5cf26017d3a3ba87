"""PairRM: its logits, its input, its two layouts, and the workflow around it.

tests/parity compares it with llm-blender.
"""

from __future__ import annotations

import json
import os
import shutil
import string
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import DebertaV2Config, DebertaV2Model

import annotate_preferences
import finetune_pairrm
import prepare_preference_model
from sppo.core.artifacts import read_json, record_path
from sppo.core.config import schema
from sppo.core.errors import UserError
from sppo.core.tables import read_table, write_table
from sppo.preferences.base import KINDS
from sppo.preferences.estimates import win_probabilities
from sppo.preferences.pairrm_files import check_pairrm, is_pairrm
from sppo.preferences.pairrm_network import (
    DEBERTA_V3_LARGE,
    FIRST,
    MARKS,
    SECOND,
    SOURCE,
    PairRanker,
    PairRM,
    batches,
)
from sppo.workflow.configuration import resolve
from sppo.workflow.preflight import check_inputs

ROOT = Path(__file__).resolve().parents[2]
SHAPE = DEBERTA_V3_LARGE | {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "position_buckets": 16,
}
LONG = "and so on, and on, " * 20
PROMPTS = ["Say something.", "Why is the sky blue?", LONG, "", "Name a city in France, please."]
ANSWERS = ["A short answer.", "Another one, somewhat longer than the first.", LONG, "", "no"]
GROUPS = [(prompt, ANSWERS[k:] + ANSWERS[:k]) for k, prompt in enumerate(PROMPTS)]


def tokenizer() -> Tokenizer:
    """A small vocabulary with the special tokens and marks of PairRM's DeBERTa-v3 tokenizer."""
    control = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    pieces = (
        [(token, 0.0) for token in control]
        + [(letter, -5.0) for letter in "▁" + string.printable[:95].replace(" ", "")]
        + [(word, -3.0) for word in ("▁the", "▁an", "▁and", "swer", "ing")]
    )
    made = Tokenizer(models.Unigram(pieces, unk_id=3))
    made.normalizer = normalizers.Sequence(
        [normalizers.Strip(), normalizers.NFKC(), normalizers.Replace("\n", " ")]
    )
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.add_special_tokens([*control, "[MASK]"])
    made.add_tokens(
        [AddedToken(mark, normalized=True) for mark in (SOURCE, FIRST, SECOND, "<|candidate|>")]
    )
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return made


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The same random PairRM in both layouts.

    Only the layout of llm-blender contains token limits. They are 40 and 16 here.
    """
    made, root = tokenizer(), tmp_path_factory.mktemp("pairrm")
    torch.manual_seed(0)
    network = PairRanker(DebertaV2Config(**SHAPE, vocab_size=made.get_vocab_size()), 1)
    with torch.no_grad():
        # Large weights give logits far from 0.
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    backbone = root / "backbone"
    DebertaV2Config(**SHAPE, vocab_size=made.get_vocab_size() - 4).save_pretrained(backbone)
    configs = {
        "llm-blender": {
            "ranker_type": "pairranker",
            "model_type": "deberta",
            "model_name": str(backbone),
            "source_maxlength": 40,
            "candidate_maxlength": 16,
            "n_tasks": 1,
            "fp16": True,
        },
        "hf": DebertaV2Config(
            **SHAPE,
            vocab_size=made.get_vocab_size(),
            architectures=["DebertaV2PairRM"],
            n_tasks=1,
            drop_out=0.05,
            source_prefix_id=made.token_to_id(SOURCE),
            cand1_prefix_id=made.token_to_id(FIRST),
            cand2_prefix_id=made.token_to_id(SECOND),
        ).to_dict(),
    }
    for layout, config in configs.items():
        (root / layout).mkdir()
        (root / layout / "config.json").write_text(json.dumps(config))
        made.save(str(root / layout / "tokenizer.json"))
        save_file(network.state_dict(), root / layout / "model.safetensors")
    return {layout: root / layout for layout in configs}


@pytest.fixture(scope="module")
def pairrm(folders) -> PairRM:
    return PairRM(folders["llm-blender"], precision="float32")


def by_hand(
    folder: Path, prompt: str, candidates: list[str], max_source: int, max_candidate: int
) -> np.ndarray:
    """The logits, one pair at a time and without padding.

    Only the names of the tensors and marks are taken from our code.
    """
    weights = load_file(folder / "model.safetensors")
    spoken = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = DebertaV2Config(
        **SHAPE, vocab_size=len(weights["pretrained_model.embeddings.word_embeddings.weight"])
    )
    backbone = DebertaV2Model(config).eval()
    backbone.load_state_dict(
        {
            name.removeprefix("pretrained_model."): t
            for name, t in weights.items()
            if not name.startswith("head")
        }
    )

    def read(text: str, limit: int) -> list[int]:
        spoken.enable_truncation(limit)
        return spoken.encode(text).ids

    def head(x: torch.Tensor) -> torch.Tensor:
        inner = torch.tanh(x @ weights["head_layer.1.weight"].T + weights["head_layer.1.bias"])
        return inner @ weights["head_layer.4.weight"].T + weights["head_layer.4.bias"]

    source = read(SOURCE + prompt, max_source)
    room = max_candidate + (max_source - len(source)) // 2
    logits = np.zeros((len(candidates), len(candidates)))
    for i, first in enumerate(candidates):
        for j, second in enumerate(candidates):
            if i != j:
                ids = torch.tensor(
                    [source + read(FIRST + first, room) + read(SECOND + second, room)]
                )
                with torch.inference_mode():
                    states = backbone(ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
                at = {
                    mark: states[ids[0].tolist().index(spoken.token_to_id(mark))]
                    for mark in (SOURCE, FIRST, SECOND)
                }
                logits[i, j] = head(torch.cat([at[SOURCE], at[FIRST]])) - head(
                    torch.cat([at[SOURCE], at[SECOND]])
                )
    return logits


# --- logits ---


def pair_logits(model: PairRM, prompt: str, candidates: list[str]) -> np.ndarray:
    """The logits (K, K) of one prompt."""
    return model.all_pair_logits([(prompt, candidates)])[0]


@pytest.mark.parametrize("k", range(len(GROUPS)))
def test_logits_equal_those_of_each_single_pair(pairrm, folders, k):
    prompt, candidates = GROUPS[k]
    logits = pair_logits(pairrm, prompt, candidates)
    assert logits.dtype == np.float64
    assert np.abs(logits).max() > 0.1
    # The logits are not skew-symmetric.
    assert np.abs(logits + logits.T).max() > 1e-3
    np.testing.assert_allclose(
        logits, by_hand(folders["llm-blender"], prompt, candidates, 40, 16), atol=2e-5
    )


def test_both_layouts_give_the_same_logits(folders):
    read = {"max_prompt_tokens": 40, "max_response_tokens": 16}
    one, other = (PairRM(folders[layout], **read).all_pair_logits(GROUPS) for layout in folders)
    np.testing.assert_array_equal(one, other)


def test_token_limits_come_from_the_checkpoint(folders):
    """The Hugging Face layout contains no limits. The defaults are those of the publication."""
    one = PairRM(folders["llm-blender"])
    other = PairRM(folders["hf"])
    assert (one.max_source, one.max_candidate) == (40, 16)
    assert (
        other.max_source,
        other.max_candidate,
    ) == (1224, 412)


@pytest.mark.parametrize("batch_tokens", [1, 100, 300, 10_000])
def test_logits_do_not_depend_on_batching(folders, pairrm, batch_tokens):
    other = PairRM(folders["llm-blender"], precision="float32", batch_tokens=batch_tokens)
    together = other.all_pair_logits(GROUPS)
    for (prompt, candidates), logits in zip(GROUPS, together):
        np.testing.assert_allclose(logits, pair_logits(pairrm, prompt, candidates), atol=2e-5)
    order = [3, 0, 4, 2, 1]
    prompt, candidates = GROUPS[1]
    np.testing.assert_allclose(
        pair_logits(other, prompt, [candidates[i] for i in order]),
        together[1][np.ix_(order, order)],
        atol=2e-5,
    )
    np.testing.assert_allclose(
        pair_logits(other, prompt, candidates[:2]), together[1][:2, :2], atol=2e-5
    )


def test_batches_cover_each_pair_within_the_budget():
    lengths = [7, 30, 30, 64, 9, 31, 8, 200, 12, 5]
    made = batches(lengths, 64)
    assert sorted(at for batch in made for at in batch) == list(range(len(lengths)))
    assert len(made) == 5
    sizes = [len(batch) * max(lengths[at] for at in batch) for batch in made]
    assert [size for size in sizes if size > 64] == [200]
    # Pairs of similar length share a batch, so that there is little padding.
    assert sum(sizes) < 1.35 * sum(lengths)


def test_identical_answers_tie_exactly(pairrm):
    logits = pair_logits(pairrm, "Hi", ["same", "other", "same", LONG + "a", LONG + "b"])
    relative = logits - logits.T
    assert relative[0, 2] == 0
    assert relative[3, 4] == 0
    # The logit of two equal answers depends on their order, so it is not 0.
    assert logits[0, 2] != 0
    np.testing.assert_array_equal(logits[0, [1, 3, 4]], logits[2, [1, 3, 4]])


def test_fewer_than_two_candidates_are_accepted(pairrm):
    np.testing.assert_array_equal(pair_logits(pairrm, "Hi", ["one"]), [[0.0]])
    assert pair_logits(pairrm, "Hi", []).shape == (0, 0)
    assert pairrm.all_pair_logits([]) == []


def test_mark_tokens_in_a_text_become_spaces(pairrm):
    marked = pair_logits(
        pairrm, f"Say{SOURCE}so[SEP]", [f"a{FIRST}b", f"{SECOND}c", f"d{MARKS[1]}"]
    )
    np.testing.assert_array_equal(marked, pair_logits(pairrm, "Say so ", ["a b", " c", "d "]))


def test_bfloat16_changes_only_rounding(folders, pairrm):
    half = PairRM(folders["llm-blender"], precision="bfloat16")
    assert half.dtype == torch.bfloat16
    assert half.model.head_layer[1].weight.dtype == torch.float32
    assert pairrm.dtype == torch.float32
    exact, rounded = (win_probabilities(pair_logits(model, *GROUPS[1])) for model in (pairrm, half))
    assert 0 < np.abs(exact - rounded).max() < 0.1


# --- input ---


def test_answers_use_the_tokens_that_a_short_prompt_leaves(pairrm):
    short, long = pairrm.read([("Hi", [LONG, "no"])])[0], pairrm.read([(LONG, [LONG, "no"])])[0]
    assert len(long.source) == 40
    assert len(long.answers[0]) == 16
    assert len(short.source) == 6  # [CLS], the mark, a word boundary, H, i, [SEP]
    assert len(short.answers[0]) == 16 + (40 - 6) // 2
    for read in (short, long):
        for ids in (read.source, *read.answers):
            assert ids[0] == 1
            assert ids[-1] == 2


def test_prompts_truncated_together_share_one_limit(folders, pairrm):
    groups = [("Hi", [LONG, "no"]), (LONG, [LONG, "no"]), ("Hi", [LONG, "no"])]
    for together, expected in ((1, [33, 16, 33]), (2, [16, 16, 33]), (3, [16, 16, 16])):
        model = PairRM(folders["hf"], "cpu", "float32", 40, 16, together)
        assert [len(read.answers[0]) for read in model.read(groups)] == expected


# --- unsuitable files ---


def damage(folder: Path, how: str) -> None:
    """Damage the checkpoint in `folder` in the way that `how` names."""
    config, weights = read_json(folder / "config.json"), load_file(folder / "model.safetensors")
    if how == "another model":
        (folder / "config.json").write_text(
            json.dumps(
                {
                    "model_type": "deberta-v2",
                    "architectures": ["DebertaV2ForSequenceClassification"],
                }
            )
        )
    elif how == "configuration is a list":
        (folder / "config.json").write_text("[]")
    elif how == "pickled weights":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif how == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif how == "cut off":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])
    elif how == "no head":
        save_file(
            {name: t for name, t in weights.items() if not name.startswith("head")},
            folder / "model.safetensors",
        )
    elif how == "another backbone":
        (folder / "config.json").write_text(
            json.dumps(config | {"model_name": "microsoft/deberta-v3-large"})
        )
    elif how == "no backbone":
        (folder / "config.json").write_text(json.dumps(config | {"model_name": "./nowhere"}))
    elif how == "tokenizer without marks":
        (folder / "tokenizer.json").write_text(
            (folder / "tokenizer.json").read_text().replace(SECOND, "<|another|>")
        )
    elif how == "invalid tokenizer":
        (folder / "tokenizer.json").write_text("{}")
    elif how == "embeddings without marks":
        name = "pretrained_model.embeddings.word_embeddings.weight"
        save_file(weights | {name: weights[name][:-4].clone()}, folder / "model.safetensors")
    elif how == "other ids":
        (folder / "config.json").write_text(json.dumps(config | {"cand1_prefix_id": 7}))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("another model", "a reward model is sequence classification with one output"),
        ("configuration is a list", "another layout"),
        ("pickled weights", "model.safetensors"),
        ("no tokenizer", "tokenizer.json"),
        ("cut off", "cut off"),
        ("no head", "head_layer.1.weight"),
    ],
)
def test_unknown_layout_is_refused_before_any_work(folders, tmp_path, how, said):
    shutil.copytree(folders["llm-blender"], tmp_path / "model")
    damage(tmp_path / "model", how)
    with pytest.raises(UserError, match=said) as caught:
        check_inputs("", resolve({"preference": {"model": str(tmp_path / "model")}})[""])
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("layout", "how", "said"),
    [
        ("llm-blender", "another backbone", "do not fit its backbone microsoft/deberta-v3-large"),
        ("llm-blender", "no backbone", "nowhere"),
        ("hf", "tokenizer without marks", "does not read <|candidate2|>"),
        ("hf", "invalid tokenizer", "is not a tokenizer"),
        ("llm-blender", "embeddings without marks", "no embeddings"),
        ("hf", "other ids", "cand1_prefix_id 7"),
    ],
)
def test_inconsistent_files_are_refused_when_read(folders, tmp_path, layout, how, said):
    shutil.copytree(folders[layout], tmp_path / "model")
    damage(tmp_path / "model", how)
    with pytest.raises(UserError, match=said) as caught:
        PairRM(tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_llm_blender_reads_only_its_own_layout(folders):
    assert check_pairrm(folders["llm-blender"], "llm_blender") == "llm-blender"
    with pytest.raises(UserError, match="does not read the layout"):
        check_inputs(
            "",
            resolve({"preference": {"model": str(folders["hf"]), "backend": "llm_blender"}})[""],
        )
    with pytest.raises(UserError, match="preference.model is ranker, but .*which runs PairRM"):
        check_inputs("", resolve({"preference": {"backend": "llm_blender"}})[""])


@pytest.mark.parametrize(
    ("name", "is_it"),
    [
        ("llm-blender/PairRM", True),
        ("llm-blender/PairRM-hf", True),
        ("ranker", False),
        ("data/ranker", False),
        ("./nowhere/PairRM", False),
        ("some/other-model", False),
    ],
)
def test_model_name_selects_pairrm(name, is_it, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert is_pairrm(name) == is_it


# --- the workflow around it ---


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_each_kind_reads_known_preference_keys(kind):
    assert set(kind.options) <= schema()["properties"]["preference"]["properties"].keys()


def test_model_is_installed_with_its_record_or_not_at_all(folders, tmp_path, program):
    program(
        prepare_preference_model,
        "--model",
        folders["hf"],
        "--output",
        tmp_path / "preference_model",
    )
    record = read_json(record_path(tmp_path / "preference_model"))
    assert record["layout"] == "hf"
    assert record["commit"] is None
    assert is_pairrm(tmp_path / "preference_model")
    with pytest.raises(UserError, match="does not read the layout"):
        program(
            prepare_preference_model,
            "--model",
            folders["hf"],
            "--backend",
            "llm_blender",
            "--output",
            tmp_path / "other",
        )
    with pytest.raises(UserError, match="preference.model"):
        program(prepare_preference_model, "--model", "nonsense", "--output", tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "preference_model",
        "preference_model.record.json",
    ]


def test_annotation_program_writes_the_model_s_logits(folders, pairrm, tmp_path, program):
    write_table(
        tmp_path / "prompts.parquet",
        [
            {
                "prompt_id": f"p{k}",
                "category": "",
                "messages": [{"role": "user", "content": prompt}],
                "prompt_token_ids": [1],
                "source": "",
            }
            for k, prompt in enumerate(PROMPTS)
        ],
        "prompts",
    )
    write_table(
        tmp_path / "responses.parquet",
        [
            {
                "prompt_id": f"p{k}",
                "sample_id": i,
                "seed": 0,
                "prompt_token_ids": [1],
                "token_ids": [1],
                "text": text,
                "finish_reason": "stop",
            }
            for k, (_, candidates) in enumerate(GROUPS)
            for i, text in enumerate(candidates)
        ],
        "responses",
    )
    program(
        annotate_preferences,
        "--prompts",
        tmp_path / "prompts.parquet",
        "--responses",
        tmp_path / "responses.parquet",
        "--model",
        folders["llm-blender"],
        "--ranker-base",
        "--device",
        "cpu",
        "--batch-tokens",
        200,
        "--precision",
        "float32",
        "--output",
        tmp_path / "preferences.parquet",
    )
    rows = read_table(tmp_path / "preferences.parquet", "preferences")
    assert [row["prompt_id"] for row in rows] == [f"p{k}" for k in range(len(PROMPTS))]
    for row, (prompt, candidates) in zip(rows, GROUPS):
        np.testing.assert_allclose(
            row["logits"], pair_logits(pairrm, prompt, candidates), atol=2e-5
        )


def plan(folder: Path, config: str) -> str:
    """The output of a dry run of all targets with the configuration `config`."""
    for name in ("rules", "src", "config", "data", "envs", "profiles", "Snakefile"):
        os.symlink(ROOT / name, folder / name)
    (folder / "mine.yaml").write_text(config)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "snakemake",
            "--cores",
            "2",
            "-n",
            "-p",
            "--configfile",
            "mine.yaml",
            "--",
            "everything",
        ],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr


def test_stages_that_compare_use_the_configured_pairrm(folders, tiny_policy, tmp_path):
    """Two runs share one PairRM. The embedded ranker and its base are not used."""
    said = plan(
        tmp_path,
        f"policy: {{model: {tiny_policy}}}\n"
        f"preference: {{model: {folders['hf']}, batch_tokens: 512}}\n"
        "runs:\n  k2: {responses: {samples: 2}}\n",
    )
    assert "prepare_preference_model.py --model" in said
    assert said.count("Preparing the preference model in results/iter0/preference_model") == 1
    for program in ("annotate_preferences", "pick_best_of_n", "evaluate_alpaca_eval"):
        lines = [line for line in said.splitlines() if f"/{program}.py" in line]
        assert any("results/iter0/preference_model" in line for line in lines), program
    assert "--batch-tokens 512" in said
    assert "data/ranker" not in said
    assert "--model ranker" not in said


def test_llm_blender_without_conda_is_a_one_line_error(folders, tmp_path):
    said = plan(
        tmp_path, f"preference: {{model: {folders['llm-blender']}, backend: llm_blender}}\n"
    )
    assert [line for line in said.splitlines() if line.startswith("error: ")] == [
        "error: config: preference.backend is llm_blender, which needs its own environment;"
        " run with --use-conda, or set it to transformers"
    ]
    assert "Traceback" not in said


@pytest.mark.slow
def test_workflow_trains_on_the_pairs_that_pairrm_prefers(
    folders, tiny_policy, copy_repository, tmp_path
):
    """One small iteration and its evaluation, from the prompts to the win rate."""
    folder = copy_repository(tmp_path)
    config = [
        f"policy={{model: {tiny_policy}}}",
        f"preference={{model: {folders['hf']}, batch_tokens: 512}}",
        "iterations=1",
    ]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "snakemake",
            "--cores",
            "2",
            "--configfile",
            "tests/workflow/config.yaml",
            "--config",
            *config,
            "--",
            "results/tiny/iter1/alpaca_eval.json",
            "results/tiny/iter1/ranker_estimate.json",
        ],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    root = folder / "results/tiny"
    texts: dict[str, dict[int, str]] = {}
    for shard in (0, 1):
        for row in read_table(root / f"iter1/responses/{shard}.parquet", "responses"):
            texts.setdefault(row["prompt_id"], {})[row["sample_id"]] = row["text"]
    asked = {
        row["prompt_id"]: row["messages"][-1]["content"]
        for row in read_table(root / "iter1/prompts.parquet", "prompts")
    }
    model = PairRM(folders["hf"])
    pairs = read_table(root / "iter1/pairs.parquet", "pairs")
    assert pairs
    assert read_json(record_path(root / "iter1/policy"))["pairs"] == len(pairs)
    for pair in pairs:
        mine = texts[pair["prompt_id"]]
        candidates = [mine[k] for k in sorted(mine)]
        logits = pair_logits(model, asked[pair["prompt_id"]], candidates)
        estimates = win_probabilities(logits).mean(axis=1)
        for side in ("chosen", "rejected"):
            expected = estimates[pair[f"{side}_sample_id"]]
            assert pair[f"p_hat_{side}"] == pytest.approx(expected, abs=1e-4)
    assert (
        read_json(root / "iter1/ranker_estimate.json")["judge"]
        == "results/tiny/iter0/preference_model"
    )


# --- fine-tuning ---


def labelled(folder: Path, number: int = 120) -> Path:
    """Pairs whose chosen answer contains `the`."""
    rows = [
        {"prompt": f"Say {n}.", "chosen": f"the {n} swer", "rejected": f"an {n} ing"}
        for n in range(number)
    ]
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def finetune(program, model: Path, output: Path, pairs: Path, *more: object) -> dict:
    flags = ("--model", model, "--output", output, "--pairs", pairs, "--device", "cpu", *more)
    program(finetune_pairrm, *flags)
    return read_json(record_path(output))


@pytest.mark.parametrize("layout", ["llm-blender", "hf"])
def test_finetuning_learns_labels_and_keeps_the_layout(folders, layout, tmp_path, program):
    fast = ("--learning-rate", 3e-3, "--epochs", 4, "--batch-size", 8)
    facts = finetune(program, folders[layout], tmp_path / "mine", labelled(tmp_path), *fast)
    assert facts["after"]["agreement"] > 0.9
    assert facts["after"]["loss"] < facts["before"]["loss"]
    assert check_pairrm(tmp_path / "mine") == layout
    logits = pair_logits(PairRM(tmp_path / "mine"), "Say 500.", ["the 500 swer", "an 500 ing"])
    assert logits[0, 1] > 0 > logits[1, 0]
    hashes = (tmp_path / "mine" / "training_instructions.txt").read_text().split()
    assert len(hashes) == facts["pairs"]
    assert "agreement with held-out labels, after" in (tmp_path / "mine" / "README.md").read_text()


def test_finetuning_step_has_the_stated_gradient(folders, tmp_path):
    """Against a loss written out for one pair, in both orders."""
    model = PairRM(folders["hf"], precision="float32")
    row = {"instruction": "Say it.", "output_1": "the swer", "output_2": "an ing"}
    (triple,) = finetune_pairrm.read_triples(model, [row])
    (loss,), (logit,) = finetune_pairrm.losses(model, [triple])
    both = pair_logits(model, "Say it.", ["the swer", "an ing"])
    expected = (np.log1p(np.exp(-both[0, 1])) + np.log1p(np.exp(both[1, 0]))) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert logit.item() == pytest.approx((both[0, 1] - both[1, 0]) / 2, rel=1e-5)


def test_finetuning_does_not_depend_on_forward_passes(folders, tmp_path, program):
    pairs = labelled(tmp_path, 40)
    for name, tokens in (("one", 64), ("many", 8192)):
        finetune(program, folders["hf"], tmp_path / name, pairs, "--batch-tokens", tokens)
    one, many = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "many"))
    assert one.keys() == many.keys()
    for name in one:
        torch.testing.assert_close(one[name], many[name], rtol=1e-4, atol=1e-6)


def test_wrong_inputs_of_finetuning_are_one_line(folders, tmp_path, program):
    pairs = labelled(tmp_path, 1)
    with pytest.raises(UserError, match="too few to train"):
        finetune(program, folders["hf"], tmp_path / "mine", pairs)
    with pytest.raises(UserError, match="exists; name a new folder"):
        finetune(program, folders["hf"], tmp_path, pairs)
    assert not (tmp_path / "mine").exists()
