"""PairRM by the official code: makes checkpoints and answers questions.

test_pairrm_parity.py runs this program in llm-blender's own environment, without our code.

    official_pairrm.py make FOLDER SOURCE_TOKENS CANDIDATE_TOKENS TEXTS.jsonl [HIDDEN LAYERS]
    official_pairrm.py ask FOLDER QUESTIONS.json ANSWERS.json

`make` writes FOLDER/backbone, a small DeBERTa-v2 that replaces microsoft/deberta-v3-large, and
FOLDER/llm-blender and FOLDER/hf. The last two have the same random weights in the layouts of
llm-blender/PairRM and llm-blender/PairRM-hf.
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
    """Write a random checkpoint in both layouts; `texts` is JSONL that trains the tokenizer."""
    backbone, blender, hf = folder / "backbone", folder / "llm-blender", folder / "hf"
    backbone.mkdir(parents=True)
    lines = texts.read_text(encoding="utf-8").splitlines()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([json.loads(line)["instruction"] for line in lines]),
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
    build_collator("pairranker", tokenizer, source_tokens, candidate_tokens)  # adds mark tokens
    ranker = build_ranker("pairranker", "deberta", str(backbone), None, config, tokenizer)
    with torch.no_grad():
        # Large random weights give logits far from 0.
        for parameter in ranker.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    blender.mkdir()
    save_model(ranker, str(blender / "model.safetensors"))
    (blender / "config.json").write_text(config.to_json())
    tokenizer.save_pretrained(blender)

    marks = {
        key: getattr(tokenizer, key)
        for key in ("source_prefix_id", "cand1_prefix_id", "cand2_prefix_id", "cand_prefix_id")
    }
    for key, value in (marks | {"n_tasks": 1, "drop_out": 0.05}).items():
        setattr(shape, key, value)
    pairrm = DebertaV2PairRM(shape)
    pairrm.pretrained_model.resize_token_embeddings(len(tokenizer))
    load_model(pairrm, str(blender / "model.safetensors"))
    pairrm.save_pretrained(hf)
    tokenizer.save_pretrained(hf)


@torch.no_grad()
def ask(folder: Path, questions: list[dict]) -> list[dict]:
    """Answer each question, which has prompts, their candidates and a batch size.

    An answer has the scores of `rank`; the logits of `_full_predict`, which `rank` calls; and the
    logits of the first two candidates in both orders, by the code on PairRM-hf's card.
    """
    blender = llm_blender.Blender(llm_blender.BlenderConfig(device="cpu", use_tqdm=False))
    blender.loadranker(str(folder / "llm-blender"), device="cpu")
    limits = (blender.ranker_config.source_maxlength, blender.ranker_config.candidate_maxlength)
    full_predict = blender.ranker._full_predict
    outputs = []

    def recording_predict(**batch):
        outputs.append(full_predict(**batch))
        return outputs[-1]

    blender.ranker._full_predict = recording_predict
    hf = DebertaV2PairRM.from_pretrained(folder / "hf").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")

    def card_logit(prompt: str, first: str, second: str) -> float:
        return hf(**tokenize_pair(tokenizer, [prompt], [first], [second], *limits)).logits.item()

    answers = []
    for question in questions:
        prompts, candidates = question["prompts"], question["candidates"]
        outputs.clear()
        scores = blender.rank(
            prompts, candidates, return_scores=True, batch_size=question["batch_size"]
        ).tolist()
        logits = [values for batch in outputs for values in batch["logits"].tolist()]
        card = [
            [card_logit(prompt, texts[0], texts[1]), card_logit(prompt, texts[1], texts[0])]
            for prompt, texts in zip(prompts, candidates)
        ]
        answers.append({"logits": logits, "scores": scores, "card": card})
    return answers


if __name__ == "__main__":
    command, folder, *words = sys.argv[1:]
    if command == "make":
        source_tokens, candidate_tokens, texts, *sizes = words
        make(Path(folder), int(source_tokens), int(candidate_tokens), Path(texts), *map(int, sizes))
    else:
        questions, answers = map(Path, words)
        asked = json.loads(questions.read_text(encoding="utf-8"))
        answers.write_text(json.dumps(ask(Path(folder), asked)))
