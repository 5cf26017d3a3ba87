"""Pairs as a data set: other trainers read it as it is."""

from __future__ import annotations

import json

import pytest
import yaml
from training_runs import make_pairs

import export_pairs
from sppo.core.artifacts import write_json
from sppo.core.errors import UserError
from sppo.core.tables import read_table, write_table


@pytest.fixture
def export(program, tmp_path):
    """Export six pairs; returns the folder of the data set."""
    pairs = make_pairs(6)
    write_table(tmp_path / "pairs.parquet", pairs, "pairs")
    prompts = [
        {
            "prompt_id": pair["prompt_id"],
            "category": "",
            "messages": [
                {"role": "user", "content": f"Question {pair['pair_id']}?"},
                {"role": "assistant", "content": "Yes?"},
                {"role": "user", "content": "Well?"},
            ],
            "prompt_token_ids": pair["prompt_token_ids"],
            "source": "test",
        }
        for pair in pairs
    ]
    write_table(tmp_path / "early.parquet", prompts[:2], "prompts")
    write_table(tmp_path / "late.parquet", prompts[2:], "prompts")

    def call(*names: str):
        program(
            export_pairs,
            "--pairs",
            tmp_path / "pairs.parquet",
            "--prompts",
            *(tmp_path / f"{name}.parquet" for name in names),
            "--output",
            tmp_path / "dataset",
        )
        return tmp_path / "dataset"

    return call


def test_rows_are_chats_with_the_estimates(export, tmp_path):
    from datasets import load_dataset

    folder = export("early", "late")
    found = load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    pairs = read_table(tmp_path / "pairs.parquet", "pairs")
    assert len(found) == len(pairs)
    for row, pair in zip(found, pairs, strict=True):
        assert row["prompt"][0] == {"role": "user", "content": f"Question {pair['pair_id']}?"}
        assert [message["role"] for message in row["prompt"]] == ["user", "assistant", "user"]
        assert row["chosen"] == [{"role": "assistant", "content": pair["chosen"]}]
        assert row["rejected"] == [{"role": "assistant", "content": pair["rejected"]}]
        assert row["p_hat_chosen"] == pair["p_hat_chosen"]
    header = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    assert header["configs"][0]["data_files"] == [{"split": "train", "path": "train.parquet"}]


def test_trl_trains_on_the_data_set_as_it_is(export, tiny_policy, tmp_path):
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    rows = load_dataset(str(export("early", "late")), split="train", cache_dir=str(tmp_path / "c"))
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_policy),
        args=DPOConfig(
            output_dir=str(tmp_path / "trl"),
            max_steps=2,
            per_device_train_batch_size=2,
            use_cpu=True,
            report_to=[],
            bf16=False,
            loss_type=["sppo_hard"],
        ),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(tiny_policy),
    )
    assert trainer.train().training_loss > 0


def test_a_pair_without_its_prompt_is_refused(export, tmp_path):
    with pytest.raises(UserError, match=r"has a pair of prompt .*, which the prompts lack"):
        export("late")
    assert not (tmp_path / "dataset").exists()


def test_pairs_with_rewards_in_their_prompts_are_refused(export, tmp_path):
    export("early", "late")
    record = tmp_path / "pairs.parquet.record.json"
    write_json(record, {"arguments": {"target_reward": True}, "sha256": ""})
    with pytest.raises(UserError, match="set pairs.target_reward: false"):
        export("early", "late")
    assert json.loads(record.read_text())["arguments"]["target_reward"]
