"""Run by test_pairrm_parity.py in llm-blender's own environment: PairRM checkpoints as the official code makes them, and what it says of texts.

    official_pairrm.py make FOLDER SOURCE_TOKENS CANDIDATE_TOKENS TEXTS.jsonl [HIDDEN LAYERS]
    official_pairrm.py ask FOLDER QUESTIONS.json ANSWERS.json

`make` writes FOLDER/backbone (a small DeBERTa-v2 in the place of microsoft/deberta-v3-large), FOLDER/llm-blender and FOLDER/hf: the same
random weights in the layouts of llm-blender/PairRM and llm-blender/PairRM-hf. Nothing of ours is imported.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import llm_blender
import sentencepiece
import torch
from llm_blender.blender.blender_utils import tokenize_pair
from llm_blender.pair_ranker.model_util import build_collator, build_ranker, build_tokenizer
from llm_blender.pair_ranker.pairrm import DebertaV2PairRM
from safetensors.torch import load_model, save_model
from transformers import AutoTokenizer, DebertaV2Config, DebertaV2Model


def make(
    folder: Path,
    source_tokens: int,
    candidate_tokens: int,
    texts: Path,
    hidden: int = 64,
    layers: int = 3,
) -> None:
    backbone, ours, hf = (folder / name for name in ("backbone", "llm-blender", "hf"))
    backbone.mkdir(parents=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(
            json.loads(line)["instruction"]
            for line in texts.read_text(encoding="utf-8").splitlines()
        ),
        model_prefix=str(backbone / "spm"),
        vocab_size=800,
        minloglevel=2,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        pad_piece="[PAD]",
        bos_piece="[CLS]",
        eos_piece="[SEP]",
        unk_piece="[UNK]",
    )
    (backbone / "spm.vocab").unlink()
    (backbone / "tokenizer_config.json").write_text('{"do_lower_case": false, "vocab_type": "spm"}')
    torch.manual_seed(0)
    shape = DebertaV2Config(
        vocab_size=900,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(4, hidden // 64),
        intermediate_size=4 * hidden,
        relative_attention=True,
        position_buckets=256,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type="p2c|c2p",
        position_biased_input=False,
        type_vocab_size=0,
    )
    DebertaV2Model(shape).save_pretrained(backbone)
    config = llm_blender.RankerConfig(
        ranker_type="pairranker",
        model_type="deberta",
        model_name=str(backbone),
        source_maxlength=source_tokens,
        candidate_maxlength=candidate_tokens,
    )
    tokenizer = build_tokenizer(str(backbone))
    build_collator("pairranker", tokenizer, source_tokens, candidate_tokens)  # adds the marks
    ranker = build_ranker("pairranker", "deberta", str(backbone), None, config, tokenizer)
    with torch.no_grad():
        for (
            parameter
        ) in ranker.parameters():  # far from the usual start, so that logits are far from 0
            parameter.add_(0.2 * torch.randn_like(parameter))
    ours.mkdir()
    save_model(ranker, str(ours / "model.safetensors"))
    (ours / "config.json").write_text(config.to_json())
    tokenizer.save_pretrained(ours)

    marks = {
        key: getattr(tokenizer, key)
        for key in ("source_prefix_id", "cand1_prefix_id", "cand2_prefix_id", "cand_prefix_id")
    }
    for key, value in (marks | {"n_tasks": 1, "drop_out": 0.05}).items():
        setattr(shape, key, value)
    pairrm = DebertaV2PairRM(shape)
    pairrm.pretrained_model.resize_token_embeddings(len(tokenizer))
    load_model(pairrm, str(ours / "model.safetensors"))
    pairrm.save_pretrained(hf)
    tokenizer.save_pretrained(hf)


@torch.no_grad()
def ask(folder: Path, questions: list[dict]) -> list[dict]:
    """For each question (prompts, their candidates, batch size) the scores of `rank`, the logits of the `_full_predict` that it calls, and
    those of the first two candidates, in both orders, by the code on PairRM-hf's card."""
    blender = llm_blender.Blender(llm_blender.BlenderConfig(device="cpu", use_tqdm=False))
    blender.loadranker(str(folder / "llm-blender"), device="cpu")
    limits = (blender.ranker_config.source_maxlength, blender.ranker_config.candidate_maxlength)
    full_predict, seen = blender.ranker._full_predict, []
    blender.ranker._full_predict = lambda **batch: seen.append(full_predict(**batch)) or seen[-1]
    hf, tokenizer = (
        DebertaV2PairRM.from_pretrained(folder / "hf").eval(),
        AutoTokenizer.from_pretrained(folder / "hf"),
    )
    answers = []
    for question in questions:
        prompts, candidates = question["prompts"], question["candidates"]
        seen.clear()
        scores = blender.rank(
            prompts, candidates, return_scores=True, batch_size=question["batch_size"]
        ).tolist()
        logits = [values for batch in seen for values in batch["logits"].tolist()]
        card = [
            [
                hf(
                    **tokenize_pair(tokenizer, [prompt], [texts[0]], [texts[1]], *limits)
                ).logits.item(),
                hf(
                    **tokenize_pair(tokenizer, [prompt], [texts[1]], [texts[0]], *limits)
                ).logits.item(),
            ]
            for prompt, texts in zip(prompts, candidates)
        ]
        answers.append({"logits": logits, "scores": scores, "card": card})
    return answers


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(
            Path(sys.argv[2]),
            int(sys.argv[3]),
            int(sys.argv[4]),
            Path(sys.argv[5]),
            *map(int, sys.argv[6:]),
        )
    else:
        asked = json.loads(Path(sys.argv[3]).read_text(encoding="utf-8"))
        Path(sys.argv[4]).write_text(json.dumps(ask(Path(sys.argv[2]), asked)))
