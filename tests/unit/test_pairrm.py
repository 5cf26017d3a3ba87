"""PairRM: what it reads and computes, its two layouts, and the workflow around it. tests/parity holds it to llm-blender itself."""

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
import prepare_preference_model
from sppo.core.artifacts import read_json, record_path
from sppo.core.config import schema
from sppo.core.errors import UserError
from sppo.core.tables import read_table, write_table
from sppo.preferences.base import KINDS
from sppo.preferences.estimates import win_probabilities
from sppo.preferences.pairrm_files import check_pairrm, is_pairrm
from sppo.preferences.pairrm_network import (
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
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "position_buckets": 16,
    "relative_attention": True,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "type_vocab_size": 0,
}
LONG = "and so on, and on, " * 20
PROMPTS = ["Say something.", "Why is the sky blue?", LONG, "", "Name a city in France, please."]
ANSWERS = ["A short answer.", "Another one, somewhat longer than the first.", LONG, "", "no"]
GROUPS = [(prompt, ANSWERS[k:] + ANSWERS[:k]) for k, prompt in enumerate(PROMPTS)]


def tokenizer() -> Tokenizer:
    """Letters and a few words, framed and marked as DeBERTa-v3's tokenizer is in PairRM's files."""
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
    """The same random PairRM in both layouts; limits of 40 and 16 tokens where the layout names any."""
    made, root = tokenizer(), tmp_path_factory.mktemp("pairrm")
    torch.manual_seed(0)
    network = PairRanker(DebertaV2Config(**SHAPE, vocab_size=made.get_vocab_size()), 1)
    with torch.no_grad():
        for (
            parameter
        ) in network.parameters():  # far from the usual start, so that logits are far from 0
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
    return PairRM(folders["llm-blender"])


def by_hand(
    folder: Path, prompt: str, candidates: list[str], max_source: int, max_candidate: int
) -> np.ndarray:
    """The logits, one pair at a time and without padding, by nothing of ours but the names of the tensors."""
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


# --- what it computes ---


@pytest.mark.parametrize("k", range(len(GROUPS)))
def test_logits_are_those_of_each_pair_alone_in_both_orders(pairrm, folders, k):
    prompt, candidates = GROUPS[k]
    logits = pairrm.pair_logits(prompt, candidates)
    assert (
        logits.dtype == np.float64
        and np.abs(logits).max() > 0.1
        and np.abs(logits + logits.T).max() > 1e-3
    )  # no skew symmetry is assumed
    np.testing.assert_allclose(
        logits, by_hand(folders["llm-blender"], prompt, candidates, 40, 16), atol=2e-5
    )


def test_both_layouts_give_the_same_logits(folders):
    read = {"max_prompt_tokens": 40, "max_response_tokens": 16}
    one, other = (PairRM(folders[layout], **read).all_pair_logits(GROUPS) for layout in folders)
    np.testing.assert_array_equal(one, other)


def test_limits_are_the_checkpoint_s_and_without_any_those_of_the_publication(folders):
    one, other = (PairRM(folders[layout]) for layout in folders)
    assert (one.max_source, one.max_candidate) == (40, 16) and (
        other.max_source,
        other.max_candidate,
    ) == (1224, 412)


@pytest.mark.parametrize("batch_tokens", [1, 100, 300, 10_000])
def test_neither_batch_nor_company_nor_order_matter(folders, pairrm, batch_tokens):
    other = PairRM(folders["llm-blender"], batch_tokens=batch_tokens)
    together = other.all_pair_logits(GROUPS)
    for (prompt, candidates), logits in zip(GROUPS, together):
        np.testing.assert_allclose(logits, pairrm.pair_logits(prompt, candidates), atol=2e-5)
    order = [3, 0, 4, 2, 1]
    prompt, candidates = GROUPS[1]
    np.testing.assert_allclose(
        other.pair_logits(prompt, [candidates[i] for i in order]),
        together[1][np.ix_(order, order)],
        atol=2e-5,
    )
    np.testing.assert_allclose(
        other.pair_logits(prompt, candidates[:2]), together[1][:2, :2], atol=2e-5
    )


def test_every_pair_is_read_once_and_no_batch_is_over_budget():
    lengths = [7, 30, 30, 64, 9, 31, 8, 200, 12, 5]
    made = batches(lengths, 64)
    assert (
        sorted(at for batch in made for at in batch) == list(range(len(lengths))) and len(made) == 5
    )
    sizes = [len(batch) * max(lengths[at] for at in batch) for batch in made]
    assert [size for size in sizes if size > 64] == [200]
    assert sum(sizes) < 1.35 * sum(lengths)  # like lengths come together, so that little is padding


def test_identical_answers_tie_exactly_and_few_candidates_are_no_error(pairrm):
    logits = pairrm.pair_logits("Hi", ["same", "other", "same", LONG + "a", LONG + "b"])
    relative = logits - logits.T
    assert (
        relative[0, 2] == 0 == relative[3, 4] and logits[0, 2] != 0
    )  # an answer against itself still shows the order
    np.testing.assert_array_equal(logits[0, [1, 3, 4]], logits[2, [1, 3, 4]])
    np.testing.assert_array_equal(pairrm.pair_logits("Hi", ["one"]), [[0.0]])
    assert pairrm.pair_logits("Hi", []).shape == (0, 0) and pairrm.all_pair_logits([]) == []


def test_marks_that_a_text_spells_out_are_spaces(pairrm):
    marked = pairrm.pair_logits(f"Say{SOURCE}so[SEP]", [f"a{FIRST}b", f"{SECOND}c", f"d{MARKS[1]}"])
    np.testing.assert_array_equal(marked, pairrm.pair_logits("Say so ", ["a b", " c", "d "]))


def test_bfloat16_changes_rounding_alone(folders, pairrm):
    half = PairRM(folders["llm-blender"], precision="bfloat16")
    assert (
        half.dtype == torch.bfloat16
        and half.model.head_layer[1].weight.dtype == torch.float32
        and pairrm.dtype == torch.float32
    )
    exact, rounded = (win_probabilities(model.pair_logits(*GROUPS[1])) for model in (pairrm, half))
    assert 0 < np.abs(exact - rounded).max() < 0.1


# --- what it reads ---


def test_a_prompt_lends_its_answers_what_it_leaves(pairrm):
    short, long = pairrm.read([("Hi", [LONG, "no"])])[0], pairrm.read([(LONG, [LONG, "no"])])[0]
    assert len(long.source) == 40 and len(long.answers[0]) == 16
    assert (
        len(short.source) == 6 and len(short.answers[0]) == 16 + (40 - 6) // 2
    )  # [CLS] mark, a word boundary, H i [SEP]
    assert all(
        ids[0] == 1 and ids[-1] == 2
        for read in (short, long)
        for ids in (read.source, *read.answers)
    )


def test_prompts_cut_together_lend_what_the_longest_leaves(folders, pairrm):
    groups = [("Hi", [LONG, "no"]), (LONG, [LONG, "no"]), ("Hi", [LONG, "no"])]
    lengths = {
        n: [
            len(read.answers[0])
            for read in PairRM(folders["hf"], "cpu", "auto", 40, 16, n).read(groups)
        ]
        for n in (1, 2, 3)
    }
    assert lengths == {1: [33, 16, 33], 2: [16, 16, 33], 3: [16, 16, 16]}


# --- other files are refused ---


def broken(folder: Path, how: str) -> None:
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
    elif how == "no dictionary":
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
    elif how == "no tokenizer at all":
        (folder / "tokenizer.json").write_text("{}")
    elif how == "embeddings without marks":
        name = "pretrained_model.embeddings.word_embeddings.weight"
        save_file(weights | {name: weights[name][:-4].clone()}, folder / "model.safetensors")
    elif how == "other ids":
        (folder / "config.json").write_text(json.dumps(config | {"cand1_prefix_id": 7}))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("another model", "another layout"),
        ("no dictionary", "another layout"),
        ("pickled weights", "model.safetensors"),
        ("no tokenizer", "tokenizer.json"),
        ("cut off", "cut off"),
        ("no head", "head_layer.1.weight"),
    ],
)
def test_files_of_another_layout_are_refused_before_any_work(folders, tmp_path, how, said):
    shutil.copytree(folders["llm-blender"], tmp_path / "model")
    broken(tmp_path / "model", how)
    with pytest.raises(UserError, match=said) as caught:
        check_inputs("", resolve({"preference": {"model": str(tmp_path / "model")}})[""])
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("layout", "how", "said"),
    [
        ("llm-blender", "another backbone", "do not fit its backbone microsoft/deberta-v3-large"),
        ("llm-blender", "no backbone", "nowhere"),
        ("hf", "tokenizer without marks", "does not read <|candidate2|>"),
        ("hf", "no tokenizer at all", "is not a tokenizer"),
        ("llm-blender", "embeddings without marks", "no embeddings"),
        ("hf", "other ids", "cand1_prefix_id 7"),
    ],
)
def test_files_that_do_not_belong_together_are_refused_when_read(
    folders, tmp_path, layout, how, said
):
    shutil.copytree(folders[layout], tmp_path / "model")
    broken(tmp_path / "model", how)
    with pytest.raises(UserError, match=said) as caught:
        PairRM(tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_llm_blender_reads_its_own_layout_alone(folders):
    assert check_pairrm(folders["llm-blender"], "llm_blender") == "llm-blender"
    with pytest.raises(UserError, match="does not read the layout"):
        check_inputs(
            "",
            resolve({"preference": {"model": str(folders["hf"]), "backend": "llm_blender"}})[""],
        )
    with pytest.raises(UserError, match="runs PairRM, but config: preference.model is ranker"):
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
def test_the_name_selects_it(name, is_it, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert is_pairrm(name) == is_it


# --- the workflow around it ---


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_kind_reads_keys_of_the_section(kind):
    assert set(kind.options) <= schema()["properties"]["preference"]["properties"].keys()


def test_it_is_put_in_place_with_its_record_or_not_at_all(folders, tmp_path, program):
    program(
        prepare_preference_model,
        "--model",
        folders["hf"],
        "--output",
        tmp_path / "preference_model",
    )
    record = read_json(record_path(tmp_path / "preference_model"))
    assert (
        record["layout"] == "hf"
        and record["commit"] is None
        and is_pairrm(tmp_path / "preference_model")
    )
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


def test_annotation_by_the_program_is_that_of_the_model(folders, pairrm, tmp_path, program):
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
        "--output",
        tmp_path / "preferences.parquet",
    )
    rows = read_table(tmp_path / "preferences.parquet", "preferences")
    assert [row["prompt_id"] for row in rows] == [f"p{k}" for k in range(len(PROMPTS))]
    for row, (prompt, candidates) in zip(rows, GROUPS):
        np.testing.assert_allclose(row["logits"], pairrm.pair_logits(prompt, candidates), atol=2e-5)


def plan(folder: Path, config: str) -> str:
    """What Snakemake would do with `config` laid over the default, or its one error."""
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


def test_every_stage_that_asks_it_is_planned_with_it(folders, tmp_path):
    """Two runs share one PairRM; neither the embedded ranker nor its base is asked for."""
    said = plan(
        tmp_path,
        f"policy: {{model: {folders['hf']}}}\npreference: {{model: {folders['hf']}, batch_tokens: 512}}\n"
        "runs:\n  k2: {responses: {samples: 2}}\n",
    )
    assert (
        "prepare_preference_model.py --model" in said
        and said.count("Preparing the preference model in results/iter0/preference_model") == 1
    )
    for program in ("annotate_preferences", "pick_best_of_n", "evaluate_alpaca_eval"):
        lines = [line for line in said.splitlines() if f"/{program}.py" in line]
        assert any("results/iter0/preference_model" in line for line in lines), program
    assert (
        "--batch-tokens 512" in said and "data/ranker" not in said and "--model ranker" not in said
    )


def test_llm_blender_without_conda_is_one_line_before_any_work(folders, tmp_path):
    said = plan(
        tmp_path, f"preference: {{model: {folders['llm-blender']}, backend: llm_blender}}\n"
    )
    assert [line for line in said.splitlines() if line.startswith("error: ")] == [
        "error: config: preference.backend is llm_blender, which needs its own environment; run with --use-conda, or set it to transformers"
    ]
    assert "Traceback" not in said


@pytest.mark.slow
def test_the_workflow_trains_on_what_it_prefers(folders, tiny_policy, copy_repository, tmp_path):
    """One iteration and its evaluation in small, from the prompts to the win rate."""
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
    for row in (
        row
        for shard in (0, 1)
        for row in read_table(root / f"iter1/responses/{shard}.parquet", "responses")
    ):
        texts.setdefault(row["prompt_id"], {})[row["sample_id"]] = row["text"]
    asked = {
        row["prompt_id"]: row["messages"][-1]["content"]
        for row in read_table(root / "iter1/prompts.parquet", "prompts")
    }
    model = PairRM(folders["hf"])
    pairs = read_table(root / "iter1/pairs.parquet", "pairs")
    assert pairs and read_json(record_path(root / "iter1/policy"))["pairs"] == len(pairs)
    for pair in pairs:
        mine = texts[pair["prompt_id"]]
        estimates = win_probabilities(
            model.pair_logits(asked[pair["prompt_id"]], [mine[k] for k in sorted(mine)])
        ).mean(axis=1)
        assert (pair["p_hat_chosen"], pair["p_hat_rejected"]) == pytest.approx(
            (estimates[pair["chosen_sample_id"]], estimates[pair["rejected_sample_id"]]), abs=1e-4
        )
    assert (
        read_json(root / "iter1/ranker_estimate.json")["judge"]
        == "results/tiny/iter0/preference_model"
    )
