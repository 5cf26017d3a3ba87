"""The embedded preference models: their logits, their training data, and their programs."""

import json
import os
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[2]
# A folder with public data sets. Without it, the tests that need a data set are skipped.
PUBLIC_DATA = Path(os.environ.get("SPPO_PUBLIC_DATA", "/nonexistent"))
sys.path.insert(0, str(ROOT / "src"))

from sppo.core.errors import UserError  # noqa: E402
from sppo.preferences import embedded_data  # noqa: E402

SPEC = {
    "name": "tiny",
    "base": "tiny",
    "layers": 2,
    "lora_from": 1,
    "lora_rank": 2,
    "dimensions": 4,
    "max_prompt_tokens": 24,
    "max_answer_tokens": 32,
    "logit_scale": 0.5,
    "length_weight": 0.3,
}
ANSWERS = ["A short answer.", "Another one, somewhat longer than the first.", "", "no", "x " * 100]


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    """A random four-layer Llama with a byte-level tokenizer that has SmolLM2's control tokens."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("base")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(special + letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[1],
        eos_token=special[2],
        pad_token=special[2],
        unk_token=special[0],
    )
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(special + letters),
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter_dir(base_dir, tmp_path_factory):
    """A random adapter, with low-rank updates that are not zero."""
    import torch
    from safetensors.torch import save_file

    from sppo.preferences.embedded_network import PreferenceEmbedder, load_base

    folder = tmp_path_factory.mktemp("adapter")
    backbone, tokenizer = load_base(base_dir, torch.float32)
    shape = [
        backbone.config.hidden_size,
        backbone.config.num_hidden_layers,
        backbone.config.vocab_size,
    ]
    torch.manual_seed(1)
    tensors = {
        name: torch.randn_like(t) / 3
        for name, t in PreferenceEmbedder(backbone, tokenizer, SPEC).adapter().items()
    }
    tensors |= {name: t.abs() + 0.5 for name, t in tensors.items() if name.endswith("_scale")}
    save_file(tensors, folder / "adapter.safetensors")
    (folder / "ranker.json").write_text(json.dumps(SPEC | {"base_shape": shape}))
    return folder


@pytest.fixture(scope="module")
def ranker(adapter_dir, base_dir):
    from sppo.preferences.embedded_network import EmbeddedRanker

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPPO_AUTO_PRECISION", "float32")
        return EmbeddedRanker(adapter_dir, base_dir)


# ---------------------------------------------------------------- the model


def test_logits_are_skew_symmetric(ranker):
    L = ranker.pair_logits("Say something.", ANSWERS)
    assert L.shape == (5, 5)
    assert L.dtype == np.float64
    np.testing.assert_array_equal(L, -L.T)
    # The model does not consider any two of these answers equal.
    assert np.abs(L[np.triu_indices(5, 1)]).min() > 0


def test_skew_logits_equal_equation_3_of_gpm():
    """GPM, eq. 3: L_ij = e_i^T R e_j with R = blockdiag([[0, -1], [1, 0]], ...)."""
    import torch

    from sppo.preferences.embedded_network import skew_logits

    e = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    R = torch.block_diag(*[torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)] * 3)
    torch.testing.assert_close(skew_logits(e), e @ R @ e.T)


def test_skew_logits_can_express_a_reward():
    import torch

    from sppo.preferences.embedded_network import skew_logits

    reward = torch.tensor([0.3, -1.0, 2.0])
    logits = skew_logits(torch.stack([torch.ones(3), reward], 1))
    torch.testing.assert_close(logits, reward[:, None] - reward)


def test_skew_logits_can_express_a_cycle():
    """Rock, paper, scissors: no reward can express these preferences."""
    import torch

    from sppo.preferences.embedded_network import skew_logits

    angles = torch.arange(3) * 2 * torch.pi / 3
    cycle = skew_logits(torch.stack([angles.cos(), angles.sin()], 1))
    assert cycle[1, 0] > 0
    assert cycle[2, 1] > 0
    assert cycle[0, 2] > 0


def test_logits_do_not_depend_on_other_candidates(ranker):
    L = ranker.pair_logits("Say something.", ANSWERS)
    order = [3, 0, 4, 2, 1]
    shuffled = ranker.pair_logits("Say something.", [ANSWERS[i] for i in order])
    np.testing.assert_array_equal(shuffled, L[np.ix_(order, order)])
    np.testing.assert_allclose(
        ranker.pair_logits("Say something.", ANSWERS[:2]), L[:2, :2], atol=1e-4
    )
    ranker.pair_logits("Quite another prompt.", ["a", "b"])
    np.testing.assert_array_equal(ranker.pair_logits("Say something.", ANSWERS), L)


def test_shared_prompt_gives_the_same_states(ranker):
    import torch

    text = ranker.model.text
    prompt, instruction = text.prompt("Say something."), text.plain("Say something.")
    starts = [i for i in range(len(prompt)) if prompt[i : i + len(instruction)] == instruction]
    at = starts[0]
    with torch.inference_mode():
        together = ranker.model.states("Say something.", ANSWERS)
        for row, answer in enumerate(ANSWERS):
            ids = torch.tensor([prompt + text.answer(answer)])
            states = ranker.model.backbone(input_ids=ids).last_hidden_state[0]
            alone = {
                "instruction": states[at : at + len(instruction)].mean(0),
                "mean": states[len(prompt) :].mean(0),
                "last": states[-1],
            }
            torch.testing.assert_close(
                together["instruction"], alone["instruction"], atol=1e-4, rtol=1e-4
            )
            for part in ("mean", "last"):
                torch.testing.assert_close(together[part][row], alone[part], atol=1e-4, rtol=1e-4)


def test_relevance_is_the_capped_cosine_similarity(ranker):
    import torch

    model, instruction = ranker.model, "Say something."
    with torch.inference_mode():
        states = model.states(instruction, ANSWERS)
        standard = {
            part: (x - getattr(model, f"{part}_center")) / getattr(model, f"{part}_scale")
            for part, x in states.items()
        }
        e = model(instruction, ANSWERS) - model.head(
            torch.cat([standard["mean"], standard["last"]], dim=1)
        )
    a, b = standard["mean"].double().numpy(), standard["instruction"].double().numpy()
    cosine = a @ b / np.linalg.norm(a, axis=1) / np.linalg.norm(b)
    np.testing.assert_allclose(
        e[:, 1], model.relevance.item() * 10 * np.minimum(cosine, 0.2), atol=1e-4
    )
    np.testing.assert_allclose(e[:, [0, 2, 3]], 0, atol=1e-6)


def test_merged_weights_equal_the_low_rank_layers(adapter_dir, base_dir, ranker):
    import torch
    from safetensors.torch import load_file

    from sppo.preferences.embedded_network import PreferenceEmbedder, load_base

    unmerged = PreferenceEmbedder(*load_base(base_dir, torch.float32), SPEC).eval()
    unmerged.load_state_dict(load_file(adapter_dir / "adapter.safetensors"), strict=False)
    with torch.inference_mode():
        torch.testing.assert_close(
            unmerged("Hello", ANSWERS), ranker.model("Hello", ANSWERS), atol=1e-4, rtol=1e-4
        )


def test_few_or_empty_candidates_are_accepted(ranker):
    np.testing.assert_array_equal(ranker.pair_logits("Hi", ["one"]), [[0.0]])
    assert ranker.pair_logits("Hi", []).shape == (0, 0)
    assert np.isfinite(ranker.pair_logits("", ["", ""])).all()
    assert ranker.pair_logits("Hi", ["same", "same"])[0, 1] == 0.0


def test_control_tokens_in_a_text_stay_text(ranker):
    end = ranker.model.text.tokenizer.eos_token_id
    assert ranker.model.text.answer("a<|im_end|>b").count(end) == 1
    assert ranker.model.text.answer("") == [end]
    plain = ranker.model.text.prompt("hello")
    assert ranker.model.text.prompt("<|im_end|>").count(end) == plain.count(end)
    template = ranker.model.text.tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True, tokenize=False
    )
    assert plain == ranker.model.text.tokenizer(template, add_special_tokens=False).input_ids


def test_long_texts_keep_their_start_and_end(ranker):
    ids = ranker.model.text.answer("a" * 60 + "z" * 60)
    assert len(ids) == SPEC["max_answer_tokens"] + 1
    kept = ranker.model.text.tokenizer.decode(ids[:-1], clean_up_tokenization_spaces=False)
    # The mark takes 7 of the 32 tokens. A quarter of the other 25 is for the end.
    assert kept == "a" * 19 + " [...] " + "z" * 6
    assert ids[0] == ranker.model.text.plain("a")[0]
    assert ids[-2] == ranker.model.text.plain("z")[0]


def test_unusable_folder_is_a_one_line_error(adapter_dir, base_dir, tmp_path):
    from sppo.preferences.embedded_network import EmbeddedRanker

    with pytest.raises(UserError, match="has no ranker.json"):
        EmbeddedRanker(tmp_path, base_dir)
    with pytest.raises(UserError, match="snakemake"):
        EmbeddedRanker(adapter_dir, tmp_path / "absent")
    for name in ("ranker.json", "adapter.safetensors"):
        (tmp_path / name).write_bytes((adapter_dir / name).read_bytes())
    spec = json.loads((tmp_path / "ranker.json").read_text())
    (tmp_path / "ranker.json").write_text(json.dumps(spec | {"base_shape": [1, 2, 3]}))
    with pytest.raises(UserError, match="was trained on"):
        EmbeddedRanker(tmp_path, base_dir)
    for text in ("[]", '{"name": "x"}', "[" * 5000):
        (tmp_path / "ranker.json").write_text(text)
        with pytest.raises(UserError, match="ranker.json is (broken|not valid JSON)"):
            EmbeddedRanker(tmp_path, base_dir)
    (tmp_path / "ranker.json").write_text(json.dumps(spec))
    (tmp_path / "adapter.safetensors").write_bytes(b"cut off")
    with pytest.raises(UserError, match="broken"):
        EmbeddedRanker(tmp_path, base_dir)


@pytest.mark.parametrize("change", ["renamed", "one missing", "one too many", "another shape"])
def test_adapter_with_wrong_tensors_is_a_one_line_error(change, adapter_dir, base_dir, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    from sppo.preferences.embedded_network import EmbeddedRanker

    folder = Path(shutil.copytree(adapter_dir, tmp_path / "adapter"))
    tensors = load_file(folder / "adapter.safetensors")
    tensors = {
        "renamed": {f"model.{name}": tensor for name, tensor in tensors.items()},
        "one missing": {name: tensor for name, tensor in tensors.items() if name != "head.bias"},
        "one too many": tensors | {"extra": torch.ones(1)},
        "another shape": tensors | {"head.bias": torch.ones(3)},
    }[change]
    save_file(tensors, folder / "adapter.safetensors")
    with pytest.raises(UserError, match="adapter is broken: "):
        EmbeddedRanker(folder, base_dir)


# ---------------------------------------------------------------- the data


def annotations(instructions=30, models=6, seed=0):
    """Random annotations in which longer outputs and output_2 win more often."""
    rng = random.Random(seed)
    rows = []
    for number in range(instructions):
        reference = "reference " * rng.randint(3, 40)
        for model in range(models):
            output = f"model {model} says " * rng.randint(3, 40)
            wins = rng.random() < (0.8 if len(output) > len(reference) else 0.4)
            rows.append(
                (f"instruction {number}", reference, output, 2.0 if wins else 1.0, f"model {model}")
            )
    return pd.DataFrame(
        rows, columns=["instruction", "output_1", "output_2", "preference", "generator_2"]
    )


def test_parts_are_stable_and_have_the_stated_sizes():
    parts = [embedded_data.part_of(f"instruction {i}") for i in range(4000)]
    shares = [parts.count(name) / len(parts) for name in ("ranker", "judge", "test")]
    np.testing.assert_allclose(shares, [0.4, 0.4, 0.2], atol=0.03)
    assert embedded_data.part_of(" instruction 1\n") == parts[1]
    assert embedded_data.instruction_hash("a ") == embedded_data.instruction_hash("a")


def test_shipped_training_instructions_are_disjoint():
    listed = {}
    for name, low, high in (("ranker", 0, 0.4), ("judge", 0.4, 0.8)):
        file = ROOT / "data" / name / "training_instructions.txt"
        listed[name] = set(file.read_text().split())
        assert all(len(line) == 64 for line in listed[name])
        assert len(listed[name]) > 250
        # An instruction's part is determined by the first 32 bits of its hash.
        shares = [int(line[:8], 16) / 2**32 for line in listed[name]]
        assert min(shares) >= low
        assert max(shares) < high
    assert not listed["ranker"] & listed["judge"]


@pytest.mark.parametrize("name", ["ranker", "judge"])
def test_shipped_adapter_has_at_most_5_megabytes(name):
    assert (ROOT / "data" / name / "adapter.safetensors").stat().st_size <= 5_000_000


def test_unusable_rows_are_excluded_and_counted(tmp_path):
    frame = annotations(2, 5)
    frame["preference"] = frame["preference"].astype(float)
    frame.loc[0, "preference"] = np.nan
    frame.loc[1, "preference"] = 0.0
    frame.loc[2, "preference"] = 1.5
    frame.loc[3, "preference"] = 3.0
    frame.loc[4, "output_2"] = frame.loc[4, "output_1"]
    frame.loc[5, "output_2"] = None
    frame.to_parquet(tmp_path / "a.parquet")
    rows, excluded = embedded_data.load_annotations(tmp_path / "a.parquet")
    assert len(rows) == 4
    assert excluded == {
        "missing_preference": 1,
        "missing_text": 1,
        "draw": 2,
        "out_of_range": 1,
        "identical_outputs": 1,
    }


def test_balance_gives_equal_wins_and_is_seeded():
    frame = annotations()
    even = embedded_data.balance(frame, 3)

    def wins(table) -> tuple[int, int]:
        return (table["preference"] < 1.5).sum(), (table["preference"] > 1.5).sum()

    fewer = min(wins(frame))
    assert wins(even) == (fewer, fewer)
    pd.testing.assert_frame_equal(even, embedded_data.balance(frame, 3))


@pytest.fixture
def groups():
    return embedded_data.make_groups([annotations(200)], 5, 1, False, "ranker")


def test_groups_are_seeded_and_keep_to_their_part(groups):
    frame = annotations(200)
    assert groups == embedded_data.make_groups([frame], 5, 1, False, "ranker")
    assert all(embedded_data.part_of(group.instruction) == "ranker" for group in groups)
    held_out = embedded_data.make_groups([frame], 5, 1, True, "ranker")
    assert not {group.instruction for group in groups} & {group.instruction for group in held_out}


def test_reference_wins_and_loses_equally_often_in_each_group(groups):
    """Otherwise a ranker could learn the reference's style instead of quality."""
    for group in groups:
        results = [1 if i == 0 else -1 for i, j, _ in group.pairs if 0 in (i, j)]
        assert sum(results) == 0
        assert all(0.5 < target <= embedded_data.MAX_TARGET for *_, target in group.pairs)


def test_shorter_weight_gives_longer_winners_the_asked_share(groups):
    weight = embedded_data.shorter_weight(groups, 0.6)
    sides = [len(g.texts[i]) > len(g.texts[j]) for g in groups for i, j, _ in g.pairs]
    total = sum(1 if longer else weight for longer in sides)
    assert sum(sides) / total == pytest.approx(0.6)


def test_log_odds_are_clipped_at_16():
    np.testing.assert_allclose(
        embedded_data.log_odds([1.0, 1.5, 2.0, 1.75]), [-16, 0, 16, np.log(3)], atol=1e-9
    )


def test_corruptions_change_the_text_as_named():
    text = (
        "The first sentence is here. The second follows it at once. A third one comes. "
        "Then the fourth. And the end of it all."
    )
    made = {
        kind: corrupt(text, random.Random(1)) for kind, corrupt in embedded_data.CORRUPTIONS.items()
    }
    assert text.startswith(made["cut"])
    assert 0 < len(made["cut"]) < 0.7 * len(text)
    assert sorted(made["shuffled"].split()) == sorted(text.split())
    assert made["shuffled"] != text
    assert made["shuffled_sentences"] != text
    assert len(made["shuffled_sentences"]) == len(text)
    opening = " ".join(made["repeated"].split()[:8])
    assert made["repeated"].count(opening) >= 3
    assert text.startswith(opening)
    for kind, corrupt in embedded_data.CORRUPTIONS.items():
        assert corrupt(text, random.Random(1)) == made[kind]


@pytest.mark.parametrize(
    "corrupt", embedded_data.CORRUPTIONS.values(), ids=embedded_data.CORRUPTIONS
)
def test_corruption_accepts_very_short_texts(corrupt):
    for text in ("", "one"):
        corrupt(text, random.Random(0))


# ---------------------------------------------------------------- the programs


@pytest.mark.parametrize(
    "case, says",
    [
        ("absent", "no annotation file"),
        ("not_parquet", "not a readable parquet"),
        ("no_column", "lacks the column"),
        ("empty", "but no usable one"),
        ("all_training", "was trained on the instructions of all usable rows"),
        ("no_base", "no model folder"),
    ],
)
def test_evaluation_error_is_one_line(tmp_path, case, says, monkeypatch, capsys):
    """main() runs in this process, because a new process needs seconds to import torch."""
    import evaluate_ranker
    from sppo.core.errors import run
    from sppo.preferences.embedded_network import SPEC

    file, frame = tmp_path / "a.parquet", annotations(6)
    adapters = tmp_path / "data" / "judge"
    adapters.mkdir(parents=True)
    hashes = []
    if case == "all_training":
        hashes = [embedded_data.instruction_hash(text) for text in frame["instruction"]]
    (adapters / "training_instructions.txt").write_text("\n".join(hashes))
    (adapters / "ranker.json").write_text(json.dumps(dict.fromkeys(SPEC, "judge")))
    (adapters / "adapter.safetensors").write_bytes(
        (0).to_bytes(8, "little") if case != "no_base" else (2).to_bytes(8, "little") + b"{}"
    )
    monkeypatch.chdir(tmp_path)  # The program reads data/ in the working directory.
    if case == "no_column":
        frame = frame.drop(columns="preference")
    if case == "empty":
        frame = frame[:0]
    if case == "not_parquet":
        file.write_bytes(b"PAR1 cut")
    elif case != "absent":
        frame.to_parquet(file)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "evaluate_ranker.py",
            "--model",
            "judge",
            "--annotations",
            str(file),
            "--base",
            str(tmp_path / "no-such-model"),
        ],
    )
    with pytest.raises(SystemExit) as stop:
        run(evaluate_ranker.main)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 1
    assert says in error
    assert len(error.splitlines()) == 1


def test_training_is_reproducible_and_can_be_evaluated(base_dir, tmp_path, monkeypatch, capsys):
    """Train twice with one seed and evaluate once, on the tiny model."""
    import evaluate_ranker
    import train_ranker

    file = tmp_path / "a.parquet"
    annotations(60).to_parquet(file)
    for output in ("data/ranker", "again"):
        monkeypatch.setattr(
            sys,
            "argv",
            f"train_ranker.py --name ranker --base {base_dir} --annotations {file} "
            f"--steps 2 --layers 2 --lora-from 1 --lora-rank 2 --max-answer-tokens 40 "
            f"--output {tmp_path / output}".split(),
        )
        train_ranker.main()
    folder = tmp_path / "data" / "ranker"
    first, second = (
        (folder / "adapter.safetensors").read_bytes() for folder in (folder, tmp_path / "again")
    )
    assert first == second
    assert sorted(f.name for f in folder.iterdir()) == [
        "adapter.safetensors",
        "ranker.json",
        "training_instructions.txt",
    ]
    monkeypatch.chdir(tmp_path)  # The program reads data/ in the working directory.
    monkeypatch.setattr(
        sys,
        "argv",
        f"evaluate_ranker.py --model ranker --base {base_dir} --annotations {file} "
        f"--limit 40".split(),
    )
    capsys.readouterr()
    evaluate_ranker.main()
    result = json.loads(capsys.readouterr().out)
    assert result["n"] == 40
    assert result["balanced"]
    assert result["asymmetry"] < 1e-12
    assert sum(result["excluded"].values()) + 40 == 360
    trained = (folder / "training_instructions.txt").read_text().split()
    assert result["excluded"]["training_instruction"] == 6 * len(trained) > 0
    assert all(
        0 <= result[k] <= 1
        for k in ("agreement", "length_agreement", "cross_model_agreement", "ece")
    )
    assert set(result["corrupted"]) == {
        "cut",
        "shuffled",
        "shuffled_sentences",
        "off_topic",
        "repeated",
    }


def test_public_annotations_are_filtered_as_documented():
    """The numbers of unusable rows and of wins in AlpacaEval 1's published annotations."""
    file = PUBLIC_DATA / "alpaca_eval_1_gpt4_annotations.parquet"
    if not file.is_file():
        pytest.skip(f"{file} is not here")
    frame, excluded = embedded_data.load_annotations(file)
    assert excluded["missing_preference"] == 57
    assert excluded["draw"] >= 172
    assert 0.79 < (frame["preference"] > 1.5).mean() < 0.81
