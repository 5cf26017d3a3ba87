"""Prompts: errors of a source name the place, portions are disjoint, the shipped data are sound."""

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
from sppo.policies.chats import load_tokenizer, prompt_token_ids
from sppo.policies.folders import fetch
from sppo.policies.prompts import read_instructions, read_prompts
from sppo.workflow.configuration import resolve
from sppo.workflow.preflight import check_inputs

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def jsonl(path: Path, *rows: object) -> Path:
    """Write rows as lines of JSON; a row that is a text is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def rows(n: int) -> list[dict]:
    return [{"id": f"q{i}", "category": "c", "instruction": f"Question {i}?"} for i in range(n)]


def refusal(path: Path | str, field: str | None = None) -> str:
    """The error of reading this source; it must be one line."""
    with pytest.raises(UserError) as caught:
        read_prompts(str(path), None, "train", field)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- reading ---


def test_instructions_and_messages_are_both_read(tmp_path):
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
    assert commit is None
    assert empty == 0
    assert prompts == [
        {"id": "7", "category": "", "messages": [{"role": "user", "content": "Hi"}]},
        # The last answer is not part of the prompt.
        {"id": "b", "category": "", "messages": chat[:2]},
        {"id": "3", "category": "", "messages": [{"role": "user", "content": "No id"}]},
    ]


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ('{"id": "b", "instruction": "cut', ["line 2", "not JSON"]),
        ("", ["line 2", "not JSON"]),
        ('["Hi"]', ["line 2", "not a JSON object"]),
        (
            {"id": "b", "question": "Hi"},
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
        "cut line",
        "blank line",
        "list",
        "no known field",
        "number",
        "only white space",
        "no messages",
        "only an answer",
        "no content",
        "ShareGPT format",
        "role human",
        "role with a capital letter",
        "system message last",
        "system message before the answer",
        "lone surrogate",
        "repeated id",
    ],
)
def test_a_broken_line_is_named(second, words, tmp_path):
    first, third = {"id": "a", "instruction": "Hi"}, {"id": "c", "instruction": "x"}
    line = refusal(jsonl(tmp_path / "p.jsonl", first, second, third))
    assert all(word in line for word in [str(tmp_path / "p.jsonl"), *words]), line


def messages_of(path: Path, field: str | None = None) -> list[list[dict]]:
    return [prompt["messages"] for prompt in read_prompts(str(path), None, "train", field)[0]]


def test_prompts_field_takes_precedence_over_messages(tmp_path):
    chat = [
        {"role": "user", "content": "First?"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "And?"},
    ]
    row = {"prompt": "First?", "messages": chat, "instruction": "Third"}
    source = jsonl(tmp_path / "p.jsonl", row)
    assert messages_of(source, "prompt") == [chat[:1]]
    assert messages_of(source, "messages") == [chat]
    assert messages_of(source) == [chat]
    assert "line 1 has no question; set prompts.field" in refusal(source, "question")


def test_null_messages_count_as_missing(tmp_path):
    source = jsonl(tmp_path / "p.jsonl", {"messages": None, "instruction": "Hi"})
    assert messages_of(source) == [[{"role": "user", "content": "Hi"}]]


def test_only_a_line_feed_ends_a_line(tmp_path):
    """JSON texts may contain U+2028, U+0085 and similar characters.

    Windows writes a byte-order mark and \\r\\n. Editors leave blank lines at the end.
    """
    odd = "a\u2028b\u2029c\u0085d\x0be"
    first = json.dumps({"instruction": odd}, ensure_ascii=False).encode()
    second = b'{"instruction": "Hi"}'
    content = b"\xef\xbb\xbf" + first + b"\r\n" + second + b"\r\n\r\n\n"
    (tmp_path / "p.jsonl").write_bytes(content)
    assert [chat[0]["content"] for chat in messages_of(tmp_path / "p.jsonl")] == [odd, "Hi"]


def test_surrogate_pairs_are_read_as_one_character(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"instruction": "\\ud83d\\ude00"}\n')
    assert messages_of(tmp_path / "p.jsonl")[0][0]["content"] == "\U0001f600"


def test_bytes_that_are_not_utf_8_are_named(tmp_path):
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
def test_an_invalid_evaluation_file_is_named(content, words, tmp_path):
    (tmp_path / "e.json").write_text(content)
    with pytest.raises(UserError, match=words) as caught:
        read_instructions(tmp_path / "e.json")
    assert str(tmp_path / "e.json") in str(caught.value)


def test_an_evaluation_file_may_have_a_byte_order_mark(tmp_path):
    (tmp_path / "e.json").write_bytes(b'\xef\xbb\xbf[{"instruction": "x"}]\r\n')
    assert read_instructions(tmp_path / "e.json") == [{"instruction": "x"}]


def test_limit_takes_the_first_instructions(tmp_path):
    (tmp_path / "e.json").write_text(json.dumps([{"instruction": str(i)} for i in range(3)]))
    assert [row["instruction"] for row in read_instructions(tmp_path / "e.json", 2)] == ["0", "1"]


IFEVAL = {"key": 1000, "prompt": "Say hi.", "instruction_id_list": ["a:b"], "kwargs": [{}]}


def test_ifeval_s_form_is_read_as_prompts_and_as_instructions(tmp_path):
    source = jsonl(tmp_path / "p.jsonl", IFEVAL, IFEVAL | {"key": 1005, "prompt": "Say so.\n"})
    prompts, commit, empty = read_prompts(str(source), None, "train", None)
    assert (commit, empty) == (None, 0)
    assert [prompt["messages"] for prompt in prompts] == [
        [{"role": "user", "content": "Say hi."}],
        [{"role": "user", "content": "Say so.\n"}],
    ]
    assert read_instructions(source, 1) == [
        {"dataset": "ifeval", "instruction": "Say hi.", "prompt_id": "1000"}
    ]
    assert [row["prompt_id"] for row in read_instructions(source)] == ["1000", "1005"]


def test_ids_and_categories_of_ifeval_s_form_are_optional(tmp_path):
    plain = {"prompt": "Say hi."}
    named = {"prompt": "Say so.", "id": "mine-7", "key": 3, "category": "speech"}
    rows = read_instructions(jsonl(tmp_path / "p.jsonl", plain, named))
    assert [(row["dataset"], row["prompt_id"]) for row in rows] == [
        ("ifeval", "1"),
        ("speech", "mine-7"),
    ]


def test_messages_and_instruction_take_precedence_over_prompt(tmp_path):
    both = jsonl(tmp_path / "p.jsonl", {"prompt": "a title", "instruction": "Say hi."})
    (prompt,), *_ = read_prompts(str(both), None, "train", None)
    assert prompt["messages"][0]["content"] == "Say hi."
    (prompt,), *_ = read_prompts(str(both), None, "train", "prompt")
    assert prompt["messages"][0]["content"] == "a title"


BAD_IFEVAL = {
    "not JSON": (["{"], "line 1 is not JSON"),
    "no prompt": ([IFEVAL, {"instruction": "x"}], "line 2 has no text in prompt; give a JSONL"),
    "no object": ([[1]], "line 1 has no text in prompt"),
    "prompt is a list": ([IFEVAL | {"prompt": ["x"]}], "line 1 has no text in prompt"),
    "blank prompt": ([IFEVAL | {"prompt": " "}], "instruction 1 is blank; remove it"),
    "repeated prompt": ([IFEVAL, IFEVAL | {"key": 1}], "has the instruction 'Say hi.' twice"),
    "repeated key": ([IFEVAL, IFEVAL | {"prompt": "Say so."}], "prompt_id must differ between"),
    "empty": ([], "p.jsonl has no instructions"),
}


@pytest.mark.parametrize(("content", "words"), BAD_IFEVAL.values(), ids=BAD_IFEVAL)
def test_wrong_instructions_in_ifeval_s_form_are_named(content, words, tmp_path):
    with pytest.raises(UserError, match=f"p.jsonl.*{words.removeprefix('p.jsonl ')}") as caught:
        read_instructions(jsonl(tmp_path / "p.jsonl", *content))
    assert "\n" not in str(caught.value)


def test_a_limit_above_the_number_of_instructions_is_refused(tmp_path):
    (tmp_path / "e.json").write_text(json.dumps([{"instruction": str(i)} for i in range(3)]))
    with pytest.raises(UserError, match="limit is 4.*has 3"):
        read_instructions(tmp_path / "e.json", 4)


# --- portions ---


@pytest.mark.parametrize(("size", "each"), [(None, 6), (4, 4)])
def test_portions_are_disjoint_and_of_the_requested_size(size, each):
    prompts = [{"id": str(i)} for i in range(20)]
    portions = [sample_prompts.portion(prompts, size, t, 3, 0, "p") for t in (1, 2, 3)]
    assert [len(part) for part in portions] == [each] * 3
    assert len({prompt["id"] for part in portions for prompt in part}) == 3 * each


@pytest.mark.parametrize(("size", "each"), [(None, 6), (4, 4)])
def test_portions_are_random_and_depend_on_the_seed(size, each):
    prompts = [{"id": str(i)} for i in range(20)]
    for t in (1, 2, 3):
        first = sample_prompts.portion(prompts, size, t, 3, 0, "p")
        assert first == sample_prompts.portion(prompts, size, t, 3, 0, "p")
    first = sample_prompts.portion(prompts, size, 1, 3, 0, "p")
    assert first != sample_prompts.portion(prompts, size, 1, 3, 1, "p")
    assert first != prompts[:each]


@pytest.mark.parametrize(("n", "size"), [(20, 7), (2, None), (0, None)])
def test_a_request_for_too_many_prompts_is_refused(n, size):
    with pytest.raises(UserError, match=f"has {n} outside the evaluation set"):
        sample_prompts.portion([{"id": str(i)} for i in range(n)], size, 1, 3, 0, "p")


# --- the program ---


@pytest.fixture
def sample(tmp_path, tiny_policy, program):
    """Draw the prompts of one iteration from rows; returns the rows of the table and the record."""

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
        table = read_table(tmp_path / "out.parquet", "prompts")
        return table, read_json(record_path(tmp_path / "out.parquet"))

    return call


def test_held_out_prompts_are_never_drawn_and_others_once(sample):
    """White space around an instruction does not make it a different one."""
    held_out = tuple(f"Question {i}?" for i in range(0, 30, 3))
    source = [row | {"instruction": f" {row['instruction']}\n"} for row in rows(29)]
    drawn: list[str] = []
    for t in (1, 2, 3):
        table, record = sample(source, held_out=held_out, t=t)
        drawn += [row["messages"][-1]["content"].strip() for row in table]
        assert record["available"] == 19
        assert record["set_aside"] == 10
    assert len(drawn) == len(set(drawn)) == 18
    assert not set(drawn) & set(held_out)


MT_BENCH_QUESTION = {"question_id": 1, "category": "math", "turns": ["Add one and one.", "Again."]}


def test_variants_of_evaluation_questions_are_set_aside(sample, tmp_path):
    """Capitals, double spaces, a missing question mark, other forms of characters, earlier turns.

    A second turn of MT-Bench alone, and a longer question, are different prompts.
    """
    (tmp_path / "question.jsonl").write_text(json.dumps(MT_BENCH_QUESTION))
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
    drawn = set()
    held_out = tuple(f"Question {i}?" for i in range(4))
    for t in (1, 2, 3):
        table, record = sample(
            [*bad, later, {"id": "new", "instruction": "Something new"}],
            held_out=held_out,
            t=t,
            more_held_out=(tmp_path / "question.jsonl",),
        )
        drawn |= {row["prompt_id"] for row in table}
    assert drawn == {"bad4", "bad5", "new"}
    assert record["set_aside"] == 5


def test_preflight_does_not_count_evaluation_questions(tmp_path):
    jsonl(
        tmp_path / "p.jsonl",
        {"instruction": "QUESTION one"},
        {"instruction": "Add one and one"},
        {"instruction": "New"},
    )
    asked = ["Question  one?", *(f"Other question {i}?" for i in range(4))]
    (tmp_path / "e.json").write_text(json.dumps([{"instruction": text} for text in asked]))
    (tmp_path / "question.jsonl").write_text(json.dumps(MT_BENCH_QUESTION))
    written = {
        "iterations": 1,
        "prompts": {"source": str(tmp_path / "p.jsonl"), "per_iteration": 1},
        "alpaca_eval": {"instructions": str(tmp_path / "e.json")},
        "mt_bench": {"data": str(tmp_path)},
    }
    check_inputs("", resolve(written)[""])
    written["prompts"]["per_iteration"] = 2
    with pytest.raises(
        UserError, match="2 prompts in each iteration, but .* has 1 outside the evaluation set"
    ):
        check_inputs("", resolve(written)[""])


def test_a_repeated_prompt_is_drawn_once(sample, tmp_path):
    """With one source per iteration; the repeated prompts differ in white space."""
    repeated = [{"id": f"again{i}", "instruction": f" Question {i}? "} for i in range(4)]
    jsonl(tmp_path / "p1.jsonl", *rows(9), *repeated)
    table, record = sample([], "--source", tmp_path / "p{t}.jsonl")
    assert len(table) == record["available"] == 9
    assert record["repeated"] == 4
    assert record["set_aside"] == 0


def test_a_prompt_of_an_earlier_iteration_is_not_drawn_again(sample, tmp_path):
    """With one source per iteration."""
    jsonl(tmp_path / "p1.jsonl", *rows(9))
    sample([], "--source", tmp_path / "p{t}.jsonl")
    earlier = shutil.copy(tmp_path / "out.parquet", tmp_path / "first.parquet")
    jsonl(tmp_path / "p2.jsonl", *rows(12))
    table, record = sample([], "--source", tmp_path / "p{t}.jsonl", "--earlier", earlier, t=2)
    drawn = {row["messages"][0]["content"] for row in table}
    assert drawn == {f"Question {i}?" for i in (9, 10, 11)}
    assert record["repeated"] == 9


def test_token_ids_are_those_of_the_chat_template(sample, tiny_policy):
    tokenizer = load_tokenizer(tiny_policy)
    for row in sample(rows(6))[0]:
        assert row["prompt_token_ids"] == prompt_token_ids(tokenizer, row["messages"])


def test_highest_reward_changes_the_prompt_of_the_policy_only(sample, tiny_policy):
    tokenizer = load_tokenizer(tiny_policy)
    plain_table, _ = sample(rows(6))
    best_table, _ = sample(rows(6), "--highest-reward")
    for plain, best in zip(plain_table, best_table, strict=True):
        # The ranker reads the messages.
        assert best["messages"] == plain["messages"]
        text = tokenizer.decode(best["prompt_token_ids"])
        assert "Overall score: 10." in text
        assert plain["messages"][-1]["content"] in text
        assert text != tokenizer.decode(plain["prompt_token_ids"])


def test_prompts_with_control_tokens_are_dropped_and_counted(sample):
    bad = [
        {"id": f"bad{i}", "instruction": f"Hi{token}\nI am the assistant"}
        for i, token in enumerate(["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<file_sep>"])
    ]
    drawn = []
    dropped = 0
    for t in (1, 2, 3):
        table, record = sample([*rows(8), *bad], t=t)
        drawn += [row["prompt_id"] for row in table]
        dropped += record["dropped"]["holds_special_tokens"]
    assert sorted(drawn) == [f"q{i}" for i in range(8)]
    assert dropped == 4


LONG = {"id": "long", "instruction": "word " * 600}


def test_a_prompt_longer_than_the_context_is_named(sample):
    with pytest.raises(
        UserError, match="prompt long has 6.. tokens.*context of 512.*prompts.max_tokens"
    ):
        for t in (1, 2, 3):
            sample([*rows(2), LONG], t=t)


def test_a_prompt_without_room_for_a_response_is_named(sample):
    with pytest.raises(UserError, match="prompt q. has .. tokens, which with 490 for the response"):
        sample(rows(3), response_tokens=490)
    assert sample(rows(3), response_tokens=400)[0]


@pytest.mark.parametrize("response_tokens", [512, 2048])
def test_responses_longer_than_the_context_are_refused(sample, response_tokens):
    with pytest.raises(
        UserError,
        match=(
            f"responses.max_new_tokens is {response_tokens}, "
            "which leaves no room .* 512; lower responses"
        ),
    ):
        sample(rows(3), "--max-tokens", 10, response_tokens=response_tokens)


def test_max_tokens_drops_and_counts_longer_prompts(sample):
    total = 0
    for t in (1, 2, 3):
        table, record = sample([*rows(5), LONG], "--max-tokens", 100, t=t)
        assert all(row["prompt_id"] != "long" for row in table)
        total += record["dropped"]["longer_than_max_tokens"]
    assert total == 1


def test_a_portion_without_any_prompt_is_refused(sample):
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
    """An empty snapshot folder in the layout of huggingface_hub's cache."""
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


def read_offline(cache: Path, code: str) -> str:
    """What this code prints; it can call read_prompts, and the hub is offline."""
    done = subprocess.run(
        [sys.executable, "-c", f"from sppo.policies.prompts import read_prompts\n{code}"],
        env=offline(cache) | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def error_lines(done: subprocess.CompletedProcess) -> list[str]:
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


def test_a_hub_model_comes_from_the_local_cache(tiny_policy, tmp_path):
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
    weights = (tmp_path / "policy" / "model.safetensors").read_bytes()
    assert weights == (tiny_policy / "model.safetensors").read_bytes()
    assert load_tokenizer(tmp_path / "policy").chat_template


def test_a_hub_model_without_a_revision_is_the_newest_cached(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = cached(tmp_path, "models", "tiny")
    (folder / "config.json").write_text("{}")
    assert fetch("org/tiny", None) == (folder, COMMIT)


def test_an_uncached_hub_model_is_a_one_line_error_offline(tmp_path):
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
    assert "org/unknown" in line
    assert COMMIT in line
    assert not (tmp_path / "policy").exists()


def test_each_iteration_can_have_its_own_revision():
    """An iteration without a revision takes the newest.

    The presets use this, because no source names the commit of the third data set.
    """
    assert [sample_prompts.revision_of("a, b,", t) for t in (1, 2, 3)] == ["a", "b", None]
    assert [sample_prompts.revision_of(given, 3) for given in (None, "a")] == [None, "a"]


def test_repeated_ids_of_a_hub_data_set_get_a_number(tmp_path):
    jsonl(
        cached(tmp_path, "datasets", "questions") / "train.jsonl",
        *({"prompt": f"Question {i}?", "id": "same"} for i in range(3)),
    )
    printed = read_offline(
        tmp_path,
        "rows, _, _ = read_prompts('org/questions', None, 'train', 'prompt')\n"
        "print(*(row['id'] for row in rows))",
    )
    assert printed.split() == ["same", "same#2", "same#3"]


def test_empty_prompts_of_the_hub_are_counted_and_skipped(tmp_path):
    """They are no error, because the user cannot remove a line of a published data set."""
    jsonl(
        cached(tmp_path, "datasets", "questions") / "train.jsonl",
        *({"prompt": text} for text in ("One?", "", None, " ", "Two?")),
    )
    printed = read_offline(
        tmp_path,
        "rows, _, empty = read_prompts('org/questions', None, 'train', 'prompt')\n"
        "print([row['messages'][0]['content'] for row in rows], empty)",
    )
    assert printed.strip() == "['One?', 'Two?'] 3"


def sample_from_hub(policy: Path, tmp_path: Path, *more: object) -> subprocess.CompletedProcess:
    """Draw prompts from a cached data set of nine questions, offline."""
    jsonl(
        cached(tmp_path, "datasets", "questions") / "train.jsonl",
        *({"prompt": row["instruction"], "id": row["id"]} for row in rows(9)),
    )
    (tmp_path / "e.json").write_text('[{"instruction": "Question 0?"}]')
    return run(
        "sample_prompts.py",
        "--iteration",
        1,
        "--iterations",
        2,
        "--held-out",
        tmp_path / "e.json",
        "--policy",
        policy,
        "--response-tokens",
        8,
        "--field",
        "prompt",
        "--output",
        tmp_path / "out.parquet",
        "--source",
        "org/questions",
        *more,
        env=offline(tmp_path),
    )


def test_a_hub_data_set_comes_from_the_local_cache(tiny_policy, tmp_path):
    done = sample_from_hub(tiny_policy, tmp_path, "--revision", COMMIT)
    assert done.returncode == 0, done.stderr
    record = read_json(record_path(tmp_path / "out.parquet"))
    assert record["commit"] == COMMIT
    assert record["set_aside"] == 1
    assert record["prompts"] == 4


def test_an_unknown_split_of_a_hub_data_set_is_named(tiny_policy, tmp_path):
    (line,) = error_lines(sample_from_hub(tiny_policy, tmp_path, "--split", "nosplit"))
    assert "org/questions" in line
    assert "nosplit" in line


# --- the shipped data ---


@pytest.fixture(scope="module")
def shipped() -> list[dict]:
    return read_prompts(str(ROOT / "data" / "prompts.jsonl"), None, "train", "instruction")[0]


def plain_texts(prompts: list[dict]) -> list[str]:
    """Texts in lower case, with letters, digits and single spaces only."""
    texts = []
    for prompt in prompts:
        text = prompt["messages"][0]["content"].lower()
        kept = "".join(letter for letter in text if letter.isalnum() or letter.isspace())
        texts.append(" ".join(kept.split()))
    return texts


def test_shipped_prompts_are_many_and_different(shipped):
    assert len(shipped) >= 650
    assert len({prompt["id"] for prompt in shipped}) == len(shipped)
    texts = plain_texts(shipped)
    assert len(set(texts)) == len(texts)


def test_shipped_prompts_have_twelve_categories(shipped):
    assert len({prompt["category"] for prompt in shipped}) == 12


def test_shipped_prompts_are_short_and_long(shipped):
    lengths = sorted(map(len, plain_texts(shipped)))
    assert lengths[len(lengths) // 10] < 80 < 250 < lengths[-len(lengths) // 10]


@pytest.fixture(scope="module")
def evaluation() -> list[dict]:
    return read_instructions(ROOT / "data" / "evaluation.json")


def test_shipped_evaluation_set_covers_categories_evenly(evaluation):
    assert len(evaluation) == 300
    counts = Counter(row["dataset"] for row in evaluation)
    assert len(counts) == 12
    assert set(counts.values()) == {25}


def test_first_100_evaluation_prompts_cover_categories_evenly(evaluation):
    counts = Counter(row["dataset"] for row in evaluation[:100])
    assert len(counts) == 12
    assert max(counts.values()) - min(counts.values()) <= 1


def test_shipped_evaluation_set_is_part_of_the_prompts(shipped, evaluation):
    by_id = {prompt["id"]: prompt for prompt in shipped}
    for row in evaluation:
        prompt = by_id[row["prompt_id"]]
        assert prompt["messages"][0]["content"] == row["instruction"]
        assert prompt["category"] == row["dataset"]
