"""Our PairRM compared with llm-blender 0.0.2.

llm-blender runs in a separate environment below .cache/, which is made here in some minutes. The
checkpoints are small and random. The official code makes them in both published layouts, so that no
hub is needed.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from sppo.core.tables import read_table, write_table
from sppo.preferences.estimates import mean_logits, p_hat, win_probabilities, winner_and_loser
from sppo.preferences.pairrm_network import PairRM

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
OFFICIAL = Path(__file__).with_name("official_pairrm.py")
TEXTS = ROOT / "data" / "prompts.jsonl"
LIMITS = {"published": (1224, 412), "small": (48, 16)}
BATCH_SIZES = (1, 3)
# Texts that are difficult for a tokenizer, and control tokens that the official code accepts.
ODD = [
    "",
    "  spaces  all   over ",
    "lines\n\nand\ttabs\r\n",
    "ﬁne — “quotes” ２０２６ e\u0301",
    "a [SEP] in the middle [SEP]",
    "[CLS] [MASK] <s>",
    "🙂 emoji 日本語",
]


@pytest.fixture(scope="session")
def official_python() -> Path:
    """The interpreter of an environment with the pins of envs/llm_blender.yaml."""
    file = ROOT / "envs" / "llm_blender.yaml"
    dependencies = yaml.safe_load(file.read_text(encoding="utf-8"))["dependencies"]
    (pins,) = [entry["pip"] for entry in dependencies if isinstance(entry, dict)]
    digest = hashlib.sha256(" ".join(pins).encode()).hexdigest()[:8]
    folder = ROOT / ".cache" / f"llm-blender-{digest}"
    python = folder / "bin" / "python"
    if not (folder / "installed").is_file():
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        index = os.environ.get("TORCH_INDEX")  # as in the Makefile
        from_index = ["--index-url", index] if index else []
        torch_pins = [pin for pin in pins if pin.startswith("torch==")]
        subprocess.run([*pip, *from_index, *torch_pins], check=True)
        subprocess.run([*pip, *pins], check=True)
        (folder / "installed").touch()
    return python


def official(python: Path, *words: object) -> None:
    """Run a program with this interpreter and without the hub."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT / "src"),
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    done = subprocess.run(
        [python, *map(str, words)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def questions(source_tokens: int, candidate_tokens: int) -> list[dict]:
    """Questions for K = 2 to 6, each with both batch sizes.

    Texts are odd, short, or longer than every limit. With more than three candidates, long texts
    occur only for small limits, because DeBERTa needs a second for 2,048 tokens here.
    """
    draw = random.Random(0)
    lines = TEXTS.read_text(encoding="utf-8").splitlines()
    words = " ".join(json.loads(line)["instruction"] for line in lines).split()

    def text(tokens: float) -> str:
        # A word has about two tokens or more. The start is drawn for odd texts too.
        start = draw.randrange(len(words) // 2)
        return " ".join(words[start : start + int(tokens / 2)]) if tokens else draw.choice(ODD)

    found = []
    for k in range(2, 7):
        over = (3.0,) if k <= 3 or source_tokens < 100 else ()
        prompts = [text(part * source_tokens) for part in (0, 0.05, 0.3, *over)]
        candidates = [
            [text(draw.choice((0, 0.05, 0.3, 0.8, *over)) * candidate_tokens) for _ in range(k)]
            for _ in prompts
        ]
        candidates[0][1] = candidates[0][0]  # the same answer twice
        # Where long texts occur: too long even with all the room that its prompt leaves.
        candidates[1][0] = text(sum(over) * (source_tokens + candidate_tokens))
        found += [
            {"prompts": prompts, "candidates": candidates, "batch_size": size}
            for size in BATCH_SIZES
        ]
    return found


@pytest.fixture(scope="session", params=LIMITS)
def asked(request, official_python, tmp_path_factory) -> tuple[Path, list[tuple[dict, dict]]]:
    """A checkpoint in both layouts, and the questions with llm-blender's answers."""
    folder = tmp_path_factory.mktemp(request.param)
    official(official_python, OFFICIAL, "make", folder / "model", *LIMITS[request.param], TEXTS)
    all_questions = questions(*LIMITS[request.param])
    (folder / "questions.json").write_text(json.dumps(all_questions), encoding="utf-8")
    official(
        official_python,
        OFFICIAL,
        "ask",
        folder / "model",
        folder / "questions.json",
        folder / "answers.json",
    )
    answers = json.loads((folder / "answers.json").read_text())
    return folder / "model", list(zip(all_questions, answers, strict=True))


def ours(folder: Path, layout: str, question: dict) -> list[np.ndarray]:
    """Our logits for each prompt of a question."""
    limits = LIMITS["small" if "small" in str(folder) else "published"]
    model = PairRM(
        folder / layout, "cpu", "float32", *limits, truncate_together=question["batch_size"]
    )
    return model.all_pair_logits(list(zip(question["prompts"], question["candidates"])))


@pytest.mark.parametrize("layout", ["llm-blender", "hf"])
def test_logits_equal_those_of_full_predict(asked, layout):
    """All pairs in both orders and both layouts.

    With batch size 1 each prompt is alone, which is our truncation. With batch size 3 three prompts
    are truncated together, which is the official truncation.
    """
    folder, pairs = asked
    worst, largest, batch_effect = 0.0, 0.0, 0.0
    for question, answer in pairs:
        found, theirs = np.array(ours(folder, layout, question)), np.array(answer["logits"])
        worst = max(worst, np.abs(found - theirs).max())
        largest = max(largest, np.abs(theirs).max())
        if question["batch_size"] == 1:
            alone = theirs
        else:
            batch_effect = max(batch_effect, np.abs(alone - theirs).max())
    print(
        f"\n{folder.parent.name} {layout}: largest difference {worst:.1e} "
        f"for logits up to {largest:.1f}; {batch_effect:.1e} between batch sizes"
    )
    assert largest > 1
    assert worst < 1e-5
    # The official truncation depends on the batch, and our code reproduces this.
    assert batch_effect > 1e-2


def test_logits_equal_those_of_the_hf_card(asked):
    """The code on the card of PairRM-hf, for the first two candidates in both orders."""
    folder, pairs = asked
    compared = 0
    for question, answer in pairs:
        if question["batch_size"] != 1:
            continue
        found = ours(folder, "hf", question)
        for prompt, texts, logits, card in zip(
            question["prompts"], question["candidates"], found, answer["card"], strict=True
        ):
            # The card's code keeps a [SEP] of the text, and ours does not.
            has_separator = any("[SEP]" in text for text in (prompt, *texts[:2]))
            if not has_separator and texts[0] != texts[1]:
                np.testing.assert_allclose([logits[0, 1], logits[1, 0]], card, atol=1e-5)
                compared += 1
    assert compared >= 10


def test_blender_probabilities_equal_those_of_compute_prob(asked):
    """Probabilities, P-hat, winner and loser, as the official compute_prob.py gives them."""
    folder, pairs = asked
    for question, answer in pairs:
        for logits, scores in zip(
            ours(folder, "llm-blender", question), np.array(answer["scores"]), strict=True
        ):
            k = len(scores)
            official_p = np.array(
                [[1 / (1 + np.exp(scores[j] - scores[i])) for j in range(k)] for i in range(k)]
            )
            np.testing.assert_allclose(mean_logits(logits), scores, atol=1e-5)
            found = win_probabilities(logits, "blender")
            np.testing.assert_allclose(found, official_p, atol=1e-5)
            np.testing.assert_allclose(p_hat(found), official_p.sum(axis=1) / k, atol=1e-5)
            ends = winner_and_loser(mean_logits(logits))
            if np.diff(np.sort(scores)).min() > 1e-4:
                assert ends == (scores.argmax(), scores.argmin())


def test_both_backends_write_the_same_preferences(asked, official_python, tmp_path):
    """src/annotate_preferences.py runs in both environments."""
    folder, pairs = asked
    question, answer = next(pair for pair in pairs if len(pair[0]["candidates"][0]) == 5)
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
            for k, prompt in enumerate(question["prompts"])
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
            for k, texts in enumerate(question["candidates"])
            for i, text in enumerate(texts)
        ],
        "responses",
    )
    for backend, python in (("llm_blender", official_python), ("transformers", sys.executable)):
        official(
            python,
            ROOT / "src" / "annotate_preferences.py",
            "--prompts",
            tmp_path / "prompts.parquet",
            "--responses",
            tmp_path / "responses.parquet",
            "--model",
            folder / "llm-blender",
            "--device",
            "cpu",
            "--backend",
            backend,
            "--output",
            tmp_path / f"{backend}.parquet",
        )
    both = [
        [row["logits"] for row in read_table(tmp_path / f"{backend}.parquet", "preferences")]
        for backend in ("llm_blender", "transformers")
    ]
    np.testing.assert_allclose(*both, atol=1e-5)
    np.testing.assert_allclose(both[0], answer["logits"], atol=1e-6)
