"""Our PairRM against llm-blender 0.0.2 itself, which runs in an environment of its own below .cache/ (made here, some minutes).

Random small checkpoints, made by the official code in both published layouts: no hub is asked.
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
# Ways to write that a tokenizer may trip over; control tokens that the official code survives.
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
    """The interpreter of an environment with what envs/llm_blender.yaml pins."""
    (pins,) = [
        entry["pip"]
        for entry in yaml.safe_load(
            (ROOT / "envs" / "llm_blender.yaml").read_text(encoding="utf-8")
        )["dependencies"]
        if isinstance(entry, dict)
    ]
    folder = (
        ROOT / ".cache" / f"llm-blender-{hashlib.sha256(' '.join(pins).encode()).hexdigest()[:8]}"
    )
    python = folder / "bin" / "python"
    if not (folder / "installed").is_file():
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        index = os.environ.get("TORCH_INDEX")  # as in the Makefile
        subprocess.run(
            [
                *pip,
                *(["--index-url", index] if index else []),
                *[pin for pin in pins if pin.startswith("torch==")],
            ],
            check=True,
        )
        subprocess.run([*pip, *pins], check=True)
        (folder / "installed").touch()
    return python


def official(python: Path, *words: object) -> None:
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
    """K = 2..6, each at both batch sizes: odd texts, short ones, and texts over every limit, for more than three candidates only
    where the limits are small: DeBERTa takes a second for 2,048 tokens here."""
    draw = random.Random(0)
    words = " ".join(
        json.loads(line)["instruction"] for line in TEXTS.read_text(encoding="utf-8").splitlines()
    ).split()

    def text(tokens: float) -> str:
        start = draw.randrange(len(words) // 2)
        return (
            " ".join(words[start : start + int(tokens / 2)]) if tokens else draw.choice(ODD)
        )  # two tokens a word, or more

    found = []
    for k in range(2, 7):
        over = (3.0,) if k <= 3 or source_tokens < 100 else ()
        prompts = [text(part * source_tokens) for part in (0, 0.05, 0.3, *over)]
        candidates = [
            [text(draw.choice((0, 0.05, 0.3, 0.8, *over)) * candidate_tokens) for _ in range(k)]
            for _ in prompts
        ]
        candidates[0][1] = candidates[0][0]  # one answer given twice
        candidates[1][0] = text(
            sum(over) * (source_tokens + candidate_tokens)
        )  # with all that its prompt can lend, too long
        found += [
            {"prompts": prompts, "candidates": candidates, "batch_size": size}
            for size in BATCH_SIZES
        ]
    return found


@pytest.fixture(scope="session", params=LIMITS)
def asked(request, official_python, tmp_path_factory) -> tuple[Path, list[tuple[dict, dict]]]:
    """A checkpoint in both layouts, and the questions with what llm-blender answers."""
    folder = tmp_path_factory.mktemp(request.param)
    official(official_python, OFFICIAL, "make", folder / "model", *LIMITS[request.param], TEXTS)
    found = questions(*LIMITS[request.param])
    (folder / "questions.json").write_text(json.dumps(found), encoding="utf-8")
    official(
        official_python,
        OFFICIAL,
        "ask",
        folder / "model",
        folder / "questions.json",
        folder / "answers.json",
    )
    return folder / "model", list(
        zip(found, json.loads((folder / "answers.json").read_text()), strict=True)
    )


def ours(folder: Path, layout: str, question: dict) -> list[np.ndarray]:
    limits = LIMITS["small" if "small" in str(folder) else "published"]
    return PairRM(
        folder / layout, "cpu", "auto", *limits, truncate_together=question["batch_size"]
    ).all_pair_logits(list(zip(question["prompts"], question["candidates"])))


@pytest.mark.parametrize("layout", ["llm-blender", "hf"])
def test_logits_equal_those_of_full_predict(asked, layout):
    """Every pair in both orders; both layouts; each prompt alone (our truncation) and three together (the official one)."""
    folder, pairs = asked
    worst, largest, differ = 0.0, 0.0, 0.0
    for question, answer in pairs:
        found, theirs = np.array(ours(folder, layout, question)), np.array(answer["logits"])
        worst, largest = (
            max(worst, np.abs(found - theirs).max()),
            max(largest, np.abs(theirs).max()),
        )
        if question["batch_size"] == 1:
            alone = theirs
        else:
            differ = max(differ, np.abs(alone - theirs).max())
    print(
        f"\n{folder.parent.name} {layout}: largest difference {worst:.1e} of logits up to {largest:.1f}; of batch sizes {differ:.1e}"
    )
    assert largest > 1 and worst < 1e-5
    assert (
        differ > 1e-2
    )  # the official truncation does depend on the batch, and ours follows it there


def test_logits_equal_those_of_the_hf_card(asked):
    """What the card of PairRM-hf runs, on the first two candidates in both orders."""
    folder, pairs = asked
    compared = 0
    for question, answer in pairs:
        if question["batch_size"] == 1:
            for prompt, texts, logits, card in zip(
                question["prompts"],
                question["candidates"],
                ours(folder, "hf", question),
                answer["card"],
                strict=True,
            ):
                if (
                    not any("[SEP]" in text for text in (prompt, *texts[:2]))
                    and texts[0] != texts[1]
                ):  # the card leaves a [SEP] in the text
                    np.testing.assert_allclose([logits[0, 1], logits[1, 0]], card, atol=1e-5)
                    compared += 1
    assert compared >= 10


def test_blender_probabilities_equal_those_of_compute_prob(asked):
    """The official compute_prob.py from the scores of `rank`: probabilities, winner, loser, and what is trained on."""
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


def test_both_backends_of_the_program_write_the_same_preferences(asked, official_python, tmp_path):
    """src/annotate_preferences.py in either environment."""
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
