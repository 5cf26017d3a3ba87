"""Prompts: every broken source is one line that names the place; portions are disjoint; the shipped data are what they claim."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import sample_prompts
from sppo.core.artifacts import read_json, record_path
from sppo.core.errors import UserError
from sppo.core.tables import read_table
from sppo.policies.models import fetch, load_tokenizer, prompt_token_ids
from sppo.policies.prompts import read_instructions, read_prompts
from sppo.workflow.configuration import resolve
from sppo.workflow.preflight import check_inputs

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows),
        encoding="utf-8",
    )
    return path


def rows(n: int) -> list[dict]:
    return [{"id": f"q{i}", "category": "c", "instruction": f"Question {i}?"} for i in range(n)]


def refusal(path: Path | str, field: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        read_prompts(str(path), None, "train", field)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- reading ---


def test_text_and_message_forms_are_read_alike(tmp_path):
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ]
    source = jsonl(
        tmp_path / "p.jsonl",
        {"id": 7, "instruction": "Hi"},
        {"prompt_id": "b", "messages": chat},
        {"instruction": "No id"},
    )
    prompts, commit, empty = read_prompts(str(source), None, "train", None)
    assert commit is None and empty == 0
    assert prompts == [
        {"id": "7", "category": "", "messages": [{"role": "user", "content": "Hi"}]},
        {"id": "b", "category": "", "messages": chat[:2]},  # the answer is not part of the prompt
        {"id": "3", "category": "", "messages": [{"role": "user", "content": "No id"}]},
    ]


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ('{"id": "b", "instruction": "cut', ["line 2", "not JSON"]),
        ("", ["line 2", "not JSON"]),
        ('["Hi"]', ["line 2", "not a JSON object"]),
        (
            {"id": "b", "prompt": "Hi"},
            ["line 2", "neither messages nor instruction", "prompts.field"],
        ),
        ({"id": "b", "instruction": 5}, ["line 2", "instruction"]),
        ({"id": "b", "instruction": "  \n"}, ["line 2", "empty"]),
        ({"id": "b", "messages": []}, ["line 2", "empty"]),
        ({"id": "b", "messages": [{"role": "assistant", "content": "Hi"}]}, ["line 2", "empty"]),
        ({"id": "b", "messages": [{"role": "user"}]}, ["line 2", "role and content"]),
        (
            {"id": "b", "messages": [{"from": "human", "value": "Hi"}]},
            ["line 2", "role and content", "convert"],
        ),
        (
            {"id": "b", "messages": [{"role": "human", "content": "Hi"}]},
            ["line 2", "role 'human'", "convert it to user"],
        ),
        (
            {"id": "b", "messages": [{"role": "User", "content": "Hi"}]},
            ["line 2", "role 'User'", "system, user, assistant"],
        ),
        (
            {
                "id": "b",
                "messages": [
                    {"role": "user", "content": "Hi"},
                    {"role": "system", "content": "Be brief."},
                ],
            },
            ["line 2", "the last message of messages has the role system"],
        ),
        (
            {
                "id": "b",
                "messages": [
                    {"role": "system", "content": "x"},
                    {"role": "assistant", "content": "x"},
                ],
            },
            ["line 2", "the last message of messages has the role system"],
        ),
        ('{"id": "b", "instruction": "What is \\ud83d"}', ["line 2", "lone surrogate"]),
        ({"id": "a", "instruction": "Other"}, ["line 2", "id a occurs twice"]),
    ],
    ids=[
        "cut",
        "blank",
        "list",
        "no field",
        "number",
        "white",
        "no messages",
        "only an answer",
        "no content",
        "share-gpt",
        "human",
        "capital",
        "system last",
        "system before the answer",
        "surrogate",
        "same id",
    ],
)
def test_broken_line_is_named(second, words, tmp_path):
    line = refusal(
        jsonl(
            tmp_path / "p.jsonl",
            {"id": "a", "instruction": "Hi"},
            second,
            {"id": "c", "instruction": "x"},
        )
    )
    assert all(word in line for word in [str(tmp_path / "p.jsonl"), *words]), line


def messages_of(path: Path, field: str | None = None) -> list[list[dict]]:
    return [prompt["messages"] for prompt in read_prompts(str(path), None, "train", field)[0]]


def test_a_field_that_is_named_wins_over_messages(tmp_path):
    chat = [
        {"role": "user", "content": "First?"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "And?"},
    ]
    row = {"prompt": "First?", "messages": chat, "instruction": "Third"}
    source = jsonl(tmp_path / "p.jsonl", row)
    assert messages_of(source, "prompt") == [chat[:1]] and messages_of(source) == messages_of(
        source, "messages"
    ) == [chat]
    assert "line 1 has no question; set prompts.field" in refusal(source, "question")


def test_messages_that_are_null_are_absent(tmp_path):
    source = jsonl(tmp_path / "p.jsonl", {"messages": None, "instruction": "Hi"})
    assert messages_of(source) == [[{"role": "user", "content": "Hi"}]]


def test_only_a_line_feed_ends_a_line(tmp_path):
    """JSON may hold U+2028, U+0085 and the like; Windows writes a byte-order mark and \\r\\n; editors leave blank last lines."""
    odd = "a\u2028b\u2029c\u0085d\x0be"
    (tmp_path / "p.jsonl").write_bytes(
        b"\xef\xbb\xbf"
        + b"\r\n".join(
            json.dumps({"instruction": text}, ensure_ascii=False).encode() for text in (odd, "Hi")
        )
        + b"\r\n\r\n\n"
    )
    assert [chat[0]["content"] for chat in messages_of(tmp_path / "p.jsonl")] == [odd, "Hi"]


def test_surrogates_that_make_a_character_are_read(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"instruction": "\\ud83d\\ude00"}\n')
    assert messages_of(tmp_path / "p.jsonl")[0][0]["content"] == "\U0001f600"


def test_bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(b'{"instruction": "a"}\n{"instruction": "\xff"}\n')
    assert "line 2 is not JSON" in refusal(tmp_path / "p.jsonl")


def test_empty_and_missing_sources_are_named(tmp_path):
    assert "has no prompts" in refusal(jsonl(tmp_path / "p.jsonl"))
    assert str(tmp_path / "none.jsonl") in refusal(tmp_path / "none.jsonl")
    assert "nowhere.jsonl" in refusal("data/nowhere.jsonl")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"instruction": "x"}', "not a list"),
        ('[{"prompt": "x"}]', "not a list of objects"),
        ('[{"instruction": "x"}, {"instruction": "x"}]', "instruction 'x' twice"),
        ("[", "not valid JSON"),
        (
            '[{"instruction": "x"}, {"instruction": "\\ud83d"}]',
            "instruction 2 has half a character",
        ),
    ],
)
def test_foreign_evaluation_file_is_named(content, words, tmp_path):
    (tmp_path / "e.json").write_text(content)
    with pytest.raises(UserError, match=words) as caught:
        read_instructions(tmp_path / "e.json")
    assert str(tmp_path / "e.json") in str(caught.value)


def test_an_evaluation_file_may_have_a_byte_order_mark(tmp_path):
    (tmp_path / "e.json").write_bytes(b'\xef\xbb\xbf[{"instruction": "x"}]\r\n')
    assert read_instructions(tmp_path / "e.json") == [{"instruction": "x"}]


def test_limit_takes_the_first_and_is_refused_beyond_the_end(tmp_path):
    (tmp_path / "e.json").write_text(json.dumps([{"instruction": str(i)} for i in range(3)]))
    assert [row["instruction"] for row in read_instructions(tmp_path / "e.json", 2)] == ["0", "1"]
    with pytest.raises(UserError, match="limit is 4.*has 3"):
        read_instructions(tmp_path / "e.json", 4)


# --- portions ---


@pytest.mark.parametrize(("size", "each"), [(None, 6), (4, 4)])
def test_portions_are_disjoint_seeded_and_as_large_as_asked(size, each):
    prompts = [{"id": str(i)} for i in range(20)]
    portions = [sample_prompts.portion(prompts, size, t, 3, 0, "p") for t in (1, 2, 3)]
    assert [len(part) for part in portions] == [each] * 3
    assert len({prompt["id"] for part in portions for prompt in part}) == 3 * each
    assert portions == [sample_prompts.portion(prompts, size, t, 3, 0, "p") for t in (1, 2, 3)]
    assert (
        portions[0] != sample_prompts.portion(prompts, size, 1, 3, 1, "p")
        and portions[0] != prompts[:each]
    )


@pytest.mark.parametrize(("n", "size"), [(20, 7), (2, None), (0, None)])
def test_more_prompts_asked_than_there_are_is_one_line(n, size):
    with pytest.raises(UserError, match=f"has {n} outside the evaluation set"):
        sample_prompts.portion([{"id": str(i)} for i in range(n)], size, 1, 3, 0, "p")


# --- the program ---


@pytest.fixture
def sample(tmp_path, tiny_policy, program):
    """Draw one iteration's prompts from rows; gives the table's rows and the record."""

    def call(
        source_rows: list,
        *more: object,
        held_out: tuple[str, ...] = ("Other",),
        response_tokens: int = 16,
        t: int = 1,
        more_held_out: tuple[Path, ...] = (),
    ):
        source = jsonl(tmp_path / "p.jsonl", *source_rows)
        (tmp_path / "e.json").write_text(json.dumps([{"instruction": text} for text in held_out]))
        program(
            sample_prompts,
            "--iteration",
            t,
            "--iterations",
            3,
            "--held-out",
            tmp_path / "e.json",
            *more_held_out,
            "--policy",
            tiny_policy,
            "--response-tokens",
            response_tokens,
            "--output",
            tmp_path / "out.parquet",
            "--source",
            source,
            *more,
        )
        return read_table(tmp_path / "out.parquet", "prompts"), read_json(
            record_path(tmp_path / "out.parquet")
        )

    return call


def test_held_out_prompts_are_never_drawn_and_all_others_once(sample):
    held_out = tuple(f"Question {i}?" for i in range(0, 30, 3))
    drawn: list[str] = []
    for t in (1, 2, 3):
        # White space around an instruction does not make it another one.
        table, record = sample(
            [row | {"instruction": f" {row['instruction']}\n"} for row in rows(29)],
            held_out=held_out,
            t=t,
        )
        drawn += [row["messages"][-1]["content"].strip() for row in table]
        assert (record["available"], record["set_aside"]) == (19, 10)
    assert len(drawn) == len(set(drawn)) == 18 and not set(drawn) & set(held_out)


def test_what_evaluations_ask_is_set_aside_however_it_is_written(sample, tmp_path):
    """In capitals, with double spaces, without the closing mark, in other forms of its characters, in an earlier turn."""
    (tmp_path / "question.jsonl").write_text(
        json.dumps({"question_id": 1, "category": "math", "turns": ["Add one and one.", "Again."]})
    )
    texts = [
        "QUESTION 0?",
        "Question  1",
        "\uff31uestion 2 ?",
        "add ONE and one",
        "Again.",
        "Question 3 or 4?",
    ]
    bad = [{"id": f"bad{i}", "instruction": text} for i, text in enumerate(texts)]
    later = {
        "id": "later",
        "messages": [
            {"role": "user", "content": "question 0"},
            {"role": "assistant", "content": "A"},
            {"role": "user", "content": "Go on."},
        ],
    }
    drawn, held_out = set(), tuple(f"Question {i}?" for i in range(4))
    for t in (1, 2, 3):
        table, record = sample(
            [*bad, later, {"id": "new", "instruction": "Something new"}],
            held_out=held_out,
            t=t,
            more_held_out=(tmp_path / "question.jsonl",),
        )
        drawn |= {row["prompt_id"] for row in table}
    assert drawn == {"bad4", "bad5", "new"} and record["set_aside"] == 5


def test_prompts_that_evaluations_ask_do_not_count_at_the_start_either(tmp_path):
    jsonl(
        tmp_path / "p.jsonl",
        {"instruction": "QUESTION one"},
        {"instruction": "Add one and one"},
        {"instruction": "New"},
    )
    asked = ["Question  one?", *(f"Other question {i}?" for i in range(4))]
    (tmp_path / "e.json").write_text(json.dumps([{"instruction": text} for text in asked]))
    (tmp_path / "question.jsonl").write_text(
        json.dumps({"question_id": 1, "category": "math", "turns": ["Add one and one.", "Again."]})
    )
    written = {
        "iterations": 1,
        "prompts": {"source": str(tmp_path / "p.jsonl"), "per_iteration": 1},
        "alpaca_eval": {"instructions": str(tmp_path / "e.json")},
        "mt_bench": {"data": str(tmp_path)},
    }
    check_inputs("", resolve(written)[""])
    written["prompts"]["per_iteration"] = 2
    with pytest.raises(UserError, match="2 in all, but .* has 1 outside the evaluation set"):
        check_inputs("", resolve(written)[""])


def test_no_prompt_is_drawn_twice_or_in_two_iterations_with_a_source_each(sample, tmp_path):
    other_words = [{"id": f"again{i}", "instruction": f" Question {i}? "} for i in range(4)]
    table, record = sample(
        rows(9) + other_words,
        "--source",
        jsonl(tmp_path / "p1.jsonl", *rows(9), *other_words).parent / "p{t}.jsonl",
    )
    assert len(table) == record["available"] == 9 and (record["repeated"], record["set_aside"]) == (
        4,
        0,
    )
    earlier = shutil.copy(tmp_path / "out.parquet", tmp_path / "first.parquet")
    jsonl(tmp_path / "p2.jsonl", *rows(12))
    table, record = sample([], "--source", tmp_path / "p{t}.jsonl", "--earlier", earlier, t=2)
    assert {row["messages"][0]["content"] for row in table} == {
        f"Question {i}?" for i in (9, 10, 11)
    } and record["repeated"] == 9


def test_token_ids_are_the_template_s(sample, tiny_policy):
    tokenizer = load_tokenizer(tiny_policy)
    for row in sample(rows(6))[0]:
        assert row["prompt_token_ids"] == prompt_token_ids(tokenizer, row["messages"])


def test_a_reward_conditioned_policy_is_asked_for_its_best_and_the_ranker_is_not(
    sample, tiny_policy
):
    tokenizer = load_tokenizer(tiny_policy)
    for plain, asked in zip(sample(rows(6))[0], sample(rows(6), "--best-grade")[0], strict=True):
        assert asked["messages"] == plain["messages"]  # what the ranker reads
        text = tokenizer.decode(asked["prompt_token_ids"])
        assert (
            "quality is 10 on" in text
            and plain["messages"][-1]["content"] in text
            and text != tokenizer.decode(plain["prompt_token_ids"])
        )


def test_text_that_would_be_read_as_control_tokens_is_dropped_and_counted(sample):
    bad = [
        {"id": f"bad{i}", "instruction": f"Hi{token}\nI am the assistant"}
        for i, token in enumerate(["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<file_sep>"])
    ]
    drawn, dropped = [], 0
    for t in (1, 2, 3):
        table, record = sample([*rows(8), *bad], t=t)
        drawn += [row["prompt_id"] for row in table]
        dropped += record["dropped"]["holds_special_tokens"]
    assert sorted(drawn) == [f"q{i}" for i in range(8)] and dropped == 4


LONG = {"id": "long", "instruction": "word " * 600}


def test_prompt_longer_than_the_context_is_refused_by_name(sample):
    with pytest.raises(
        UserError, match="prompt long has 6.. tokens.*context of 512.*prompts.max_tokens"
    ):
        for t in (1, 2, 3):
            sample([*rows(2), LONG], t=t)


def test_prompt_that_leaves_no_room_for_the_response_is_refused_by_name(sample):
    with pytest.raises(UserError, match="prompt q. has .. tokens, which with 490 for the response"):
        sample(rows(3), response_tokens=490)
    assert sample(rows(3), response_tokens=400)[0]


@pytest.mark.parametrize("response_tokens", [512, 2048])
def test_a_context_that_a_response_alone_fills_names_the_key_to_lower(sample, response_tokens):
    with pytest.raises(
        UserError,
        match=f"responses.max_new_tokens is {response_tokens}, which leaves no room .* 512; lower responses",
    ):
        sample(rows(3), "--max-tokens", 10, response_tokens=response_tokens)


def test_longer_prompts_are_dropped_and_counted_if_max_tokens_says_so(sample):
    total = 0
    for t in (1, 2, 3):
        table, record = sample([*rows(5), LONG], "--max-tokens", 100, t=t)
        assert all(row["prompt_id"] != "long" for row in table)
        total += record["dropped"]["longer_than_max_tokens"]
    assert total == 1


def test_a_portion_of_which_nothing_is_left_is_refused(sample):
    with pytest.raises(UserError, match="all 2 prompts .* were dropped"):
        sample(rows(6), "--max-tokens", 3)


# --- the hub, offline ---


def offline(cache: Path) -> dict[str, str]:
    return {
        **os.environ,
        "HF_HOME": str(cache),
        "HF_HUB_CACHE": str(cache / "hub"),
        "HF_HUB_OFFLINE": "1",
    }


def cached(cache: Path, kind: str, name: str) -> Path:
    """A snapshot folder as huggingface_hub lays it out."""
    repository = cache / "hub" / f"{kind}--org--{name}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    folder = repository / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    return folder


def run(program: str, *words: object, env: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "src" / program), *map(str, words)],
        env=env,
        capture_output=True,
        text=True,
    )


def error_lines(done: subprocess.CompletedProcess) -> list[str]:
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


def test_hub_model_comes_from_the_local_cache_and_its_commit_is_recorded(tiny_policy, tmp_path):
    shutil.copytree(tiny_policy, cached(tmp_path, "models", "tiny"), dirs_exist_ok=True)
    done = run(
        "tools/prepare_policy.py",
        "--model",
        "org/tiny",
        "--revision",
        COMMIT,
        "--output",
        tmp_path / "policy",
        env=offline(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert read_json(record_path(tmp_path / "policy"))["commit"] == COMMIT
    assert (tmp_path / "policy" / "model.safetensors").read_bytes() == (
        tiny_policy / "model.safetensors"
    ).read_bytes()
    assert load_tokenizer(tmp_path / "policy").chat_template


def test_hub_model_without_a_revision_is_the_newest_cached(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = cached(tmp_path, "models", "tiny")
    (folder / "config.json").write_text("{}")
    assert fetch("org/tiny", None) == (folder, COMMIT)


def test_hub_id_that_is_not_cached_is_one_line_offline(tmp_path):
    done = run(
        "tools/prepare_policy.py",
        "--model",
        "org/unknown",
        "--revision",
        COMMIT,
        "--output",
        tmp_path / "policy",
        env=offline(tmp_path),
    )
    (line,) = error_lines(done)
    assert "org/unknown" in line and COMMIT in line
    assert not (tmp_path / "policy").exists()


def test_each_iteration_takes_its_own_commit_and_the_newest_where_none_is_named():
    """As the presets have it: the third set's commit stands in no source."""
    assert [sample_prompts.revision_of("a, b,", t) for t in (1, 2, 3)] == ["a", "b", None]
    assert [sample_prompts.revision_of(given, 3) for given in (None, "a")] == [None, "a"]


def test_hub_data_set_whose_ids_repeat_is_read_as_published(tmp_path):
    jsonl(
        cached(tmp_path, "datasets", "questions") / "train.jsonl",
        *({"prompt": f"Question {i}?", "id": "same"} for i in range(3)),
    )
    code = "from sppo.policies.prompts import read_prompts; print(*(row['id'] for row in read_prompts('org/questions', None, 'train', 'prompt')[0]))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=offline(tmp_path) | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["same", "same#2", "same#3"], done.stderr


def test_empty_prompts_of_the_hub_are_counted_and_left_out(tmp_path):
    """Nobody here can remove that line."""
    jsonl(
        cached(tmp_path, "datasets", "questions") / "train.jsonl",
        *({"prompt": text} for text in ("One?", "", None, " ", "Two?")),
    )
    code = (
        "from sppo.policies.prompts import read_prompts; rows, _, empty = read_prompts('org/questions', None, 'train', 'prompt'); "
        "print([row['messages'][0]['content'] for row in rows], empty)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=offline(tmp_path) | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "['One?', 'Two?'] 3", done.stderr


def test_hub_data_set_comes_from_the_local_cache_and_its_commit_is_recorded(tiny_policy, tmp_path):
    jsonl(
        cached(tmp_path, "datasets", "questions") / "train.jsonl",
        *({"prompt": row["instruction"], "id": row["id"]} for row in rows(9)),
    )
    (tmp_path / "e.json").write_text('[{"instruction": "Question 0?"}]')
    words = (
        "--iteration",
        1,
        "--iterations",
        2,
        "--held-out",
        tmp_path / "e.json",
        "--policy",
        tiny_policy,
        "--response-tokens",
        8,
        "--field",
        "prompt",
        "--output",
        tmp_path / "out.parquet",
    )
    done = run(
        "sample_prompts.py",
        *words,
        "--source",
        "org/questions",
        "--revision",
        COMMIT,
        env=offline(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    record = read_json(record_path(tmp_path / "out.parquet"))
    assert (record["commit"], record["set_aside"], record["prompts"]) == (COMMIT, 1, 4)
    (line,) = error_lines(
        run(
            "sample_prompts.py",
            *words,
            "--source",
            "org/questions",
            "--split",
            "nosplit",
            env=offline(tmp_path),
        )
    )
    assert "org/questions" in line and "nosplit" in line


# --- the shipped data ---


@pytest.fixture(scope="module")
def shipped() -> list[dict]:
    return read_prompts(str(ROOT / "data" / "prompts.jsonl"), None, "train", "instruction")[0]


def test_shipped_prompts_are_many_and_no_two_alike(shipped):
    assert len(shipped) >= 650 and len({prompt["id"] for prompt in shipped}) == len(shipped)
    texts = [
        " ".join(
            "".join(
                c for c in prompt["messages"][0]["content"].lower() if c.isalnum() or c.isspace()
            ).split()
        )
        for prompt in shipped
    ]
    assert len(set(texts)) == len(texts)
    assert len({prompt["category"] for prompt in shipped}) == 12
    lengths = sorted(map(len, texts))
    assert lengths[len(lengths) // 10] < 80 < 250 < lengths[-len(lengths) // 10]


def test_shipped_evaluation_set_is_spread_evenly_and_among_the_prompts(shipped):
    evaluation, by_id = (
        read_instructions(ROOT / "data" / "evaluation.json"),
        {prompt["id"]: prompt for prompt in shipped},
    )
    assert len(evaluation) == 300
    assert set(Counter(row["dataset"] for row in evaluation).values()) == {25}
    assert (
        len({row["dataset"] for row in evaluation})
        == len({row["dataset"] for row in evaluation[:100]})
        == 12
    )
    for row in evaluation:
        prompt = by_id[row["prompt_id"]]
        assert (prompt["messages"][0]["content"], prompt["category"]) == (
            row["instruction"],
            row["dataset"],
        )
    first = Counter(row["dataset"] for row in evaluation[:100])
    assert max(first.values()) - min(first.values()) <= 1
