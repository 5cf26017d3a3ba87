"""Artifacts are written whole or not at all, are checked, and have a record of their inputs."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import list_stale
import verify_results
from sppo.core import artifacts
from sppo.core.artifacts import (
    ROOT,
    code_hashes,
    file_hash,
    json_lines,
    known_hash,
    read_json,
    read_record,
    record_path,
    recorded,
    recorded_all,
    write_json,
    write_json_lines,
    write_text,
    written_whole,
)
from sppo.core.errors import UserError
from sppo.core.stages import STAGES
from sppo.core.tables import TABLES, read_table, write_table
from summarize_run import seconds_by_iteration

MESSAGES = [{"role": "user", "content": "Zeilen\nund „Anführung“ \U0001f600"}]
ROWS = {
    "prompts": [
        {
            "prompt_id": f"p{i}",
            "category": "",
            "messages": MESSAGES,
            "prompt_token_ids": [1, 49151],
            "source": "x",
        }
        for i in range(3)
    ],
    "responses": [
        {
            "prompt_id": "p0",
            "sample_id": i,
            "seed": 2**64 - 1 - i,
            "prompt_token_ids": [1],
            "token_ids": [5, 2],
            "text": "a\0b",
            "finish_reason": "stop",
        }
        for i in range(3)
    ],
    "preferences": [
        {"prompt_id": f"p{i}", "sample_ids": [0, 1], "logits": [[0.0, 1e-300], [-1 / 3, 0.0]]}
        for i in range(3)
    ],
    "grades": [{"prompt_id": "p0", "sample_id": i - 1, "grade": 6 - i / 3} for i in range(3)],
    "pairs": [
        {
            "pair_id": i,
            "prompt_id": "p0",
            "prompt_token_ids": [1],
            "chosen": "a",
            "chosen_token_ids": [5],
            "chosen_sample_id": 0,
            "rejected": "",
            "rejected_token_ids": [],
            "rejected_sample_id": 4,
            "p_hat_chosen": 0.9,
            "p_hat_rejected": 0.1,
            "p_chosen_beats_rejected": 1 / 3,
        }
        for i in range(3)
    ],
    "logps": [{"pair_id": i, "chosen_logp": -1 / 3, "rejected_logp": -1e3} for i in range(3)],
}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refusal(path: Path, name: str) -> str:
    """The error of reading this file as the table `name`."""
    with pytest.raises(UserError) as caught:
        read_table(path, name)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_every_table_has_an_example_here():
    assert ROWS.keys() == TABLES.keys()


@pytest.mark.parametrize("name", TABLES)
def test_rows_are_read_back_bit_for_bit(name, tmp_path):
    write_table(tmp_path / "a" / "t.parquet", ROWS[name], name)
    assert read_table(tmp_path / "a" / "t.parquet", name) == ROWS[name]
    assert names_in(tmp_path / "a") == ["t.parquet"]


@pytest.mark.parametrize("name", TABLES)
def test_repeated_keys_are_refused_on_write(name, tmp_path):
    with pytest.raises(ValueError, match=TABLES[name].key[0]):
        write_table(tmp_path / "t.parquet", ROWS[name][:1] * 2, name)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("name", TABLES)
def test_nulls_are_refused_on_write(name, tmp_path):
    for column in TABLES[name].columns.names:
        with pytest.raises(ValueError, match=column):
            write_table(tmp_path / "t.parquet", [{**ROWS[name][0], column: None}], name)
    assert names_in(tmp_path) == []


def test_missing_table_is_named(tmp_path):
    assert "is missing" in refusal(tmp_path / "none.parquet", "pairs")


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_truncated_table_is_named(keep, tmp_path):
    write_table(tmp_path / "t.parquet", ROWS["pairs"], "pairs")
    whole = (tmp_path / "t.parquet").read_bytes()
    (tmp_path / "t.parquet").write_bytes(whole[: int(keep * len(whole))])
    assert "not a whole parquet file" in refusal(tmp_path / "t.parquet", "pairs")


def test_a_table_of_another_kind_names_the_missing_column(tmp_path):
    write_table(tmp_path / "t.parquet", ROWS["logps"], "logps")
    assert "lacks prompt_id" in refusal(tmp_path / "t.parquet", "pairs")


@pytest.mark.parametrize(
    "column",
    [pa.array(["one"]), pa.array([[1]]), pa.array([{"x": 1}]), pa.array([0.5])],
    ids=["text", "list", "struct", "fraction"],
)
def test_column_of_another_type_is_named(column, tmp_path):
    foreign = pa.table({"pair_id": column, "chosen_logp": [0.0], "rejected_logp": [0.0]})
    pq.write_table(foreign, tmp_path / "t.parquet")
    assert "breaks the schema of logps" in refusal(tmp_path / "t.parquet", "logps")


def test_repeated_keys_and_nulls_are_refused_on_read(tmp_path):
    for ids, logps in (([1, 1], [0.0, 0.0]), ([1, 2], [0.0, None])):
        foreign = pa.table({"pair_id": ids, "chosen_logp": logps, "rejected_logp": [0.0, 0.0]})
        pq.write_table(foreign, tmp_path / "t.parquet")
        assert "breaks the schema of logps" in refusal(tmp_path / "t.parquet", "logps")


FLOATS = [
    (name, column)
    for name, table in TABLES.items()
    for column in table.columns.names
    if "double" in str(table.columns.field(column).type)
]


def with_number(value, number: float):
    """The value, a number or nested lists of numbers, with its last number replaced."""
    if isinstance(value, list):
        return [*value[:-1], with_number(value[-1], number)]
    return number


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("name", "column"), FLOATS)
def test_nan_and_infinity_are_refused_on_write_and_on_read(name, column, number, tmp_path):
    *first_rows, last = ROWS[name]
    rows = [*first_rows, last | {column: with_number(last[column], number)}]
    with pytest.raises(
        UserError,
        match=f"t.parquet was not written: {column} of {name} is NaN or infinite in 1 of "
        f"{len(rows)} rows, first in {TABLES[name].key[0]}",
    ):
        write_table(tmp_path / "t.parquet", rows, name)
    assert names_in(tmp_path) == []
    pq.write_table(pa.Table.from_pylist(rows, schema=TABLES[name].columns), tmp_path / "t.parquet")
    said = refusal(tmp_path / "t.parquet", name)
    assert f"breaks the schema of {name}" in said
    assert f"(column {column} has values that are NaN or infinite)" in said


@pytest.mark.parametrize("name", TABLES)
def test_a_flipped_bit_never_changes_rows_unnoticed(name, tmp_path):
    """Pages have checksums; the counts and types in the footer are checked."""
    path = tmp_path / "t.parquet"
    write_table(path, ROWS[name], name)
    whole = path.read_bytes()
    unnoticed = []
    bits = {*range(0, 8 * len(whole), 101)}
    if name == "grades":
        # Every bit of the footer's part that counts the rows.
        bits |= {*range(8 * (len(whole) - 420), 8 * (len(whole) - 390))}
    for bit in sorted(bits):
        path.write_bytes(flipped(whole, bit))
        try:
            if read_table(path, name) != ROWS[name]:
                unnoticed.append(bit)
        except UserError:
            pass
    assert unnoticed == []


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_null_inside_a_message_is_refused_on_write(tmp_path):
    rows = [ROWS["prompts"][0] | {"messages": [{"role": None, "content": "x"}]}]
    with pytest.raises(ValueError, match="messages has nulls"):
        write_table(tmp_path / "t.parquet", rows, "prompts")


def test_broken_json_is_named(tmp_path):
    (tmp_path / "x.json").write_text('{"a": 1')
    with pytest.raises(UserError, match="x.json is not valid JSON"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize("text", ["[" * 5000, "9" * 5000], ids=["deep", "long number"])
def test_json_that_python_cannot_read_is_named(text, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match="x.json is not valid JSON"):
        read_json(tmp_path / "x.json")
    with pytest.raises(UserError, match="x.json line 1 is not JSON"):
        json_lines(tmp_path / "x.json")


def test_nan_is_not_written_to_json(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "y.json", {"a": float("nan")})
    assert names_in(tmp_path) == []


def test_failed_write_keeps_only_the_old_file(tmp_path):
    write_text(tmp_path / "x", "old")
    with pytest.raises(RuntimeError), written_whole(tmp_path / "x") as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError
    assert (tmp_path / "x").read_text() == "old"
    assert names_in(tmp_path) == ["x"]


def test_failed_write_keeps_only_the_old_folder(tmp_path):
    (tmp_path / "p").mkdir()
    write_text(tmp_path / "p" / "old", "")
    with pytest.raises(KeyboardInterrupt), written_whole(tmp_path / "p") as temporary:
        temporary.mkdir()
        write_text(temporary / "new", "")
        raise KeyboardInterrupt
    assert names_in(tmp_path / "p") == ["old"]
    assert names_in(tmp_path) == ["p"]


def test_a_new_folder_replaces_the_whole_old_folder(tmp_path):
    for content in ("old", "new"):
        with written_whole(tmp_path / "p") as temporary:
            temporary.mkdir()
            write_text(temporary / content, "")
    assert names_in(tmp_path / "p") == ["new"]
    assert names_in(tmp_path) == ["p"]


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    write_text(tmp_path / "x", "old")
    with pytest.raises(FileNotFoundError), written_whole(tmp_path / "x"):
        pass
    assert (tmp_path / "x").read_text() == "old"


def test_folder_hash_depends_on_contents_and_names_only(tmp_path):
    def hash_of(name: str, files: dict[str, str]) -> str:
        for file, text in files.items():
            write_text(tmp_path / name / file, text)
        return file_hash(tmp_path / name)

    one = hash_of("one", {"a": "x", "b/c": "y"})
    os.utime(tmp_path / "one" / "a", (0, 0))
    assert file_hash(tmp_path / "one") == one
    assert hash_of("same", {"b/c": "y", "a": "x"}) == one
    others = [
        hash_of("content", {"a": "x", "b/c": "z"}),
        hash_of("name", {"a": "x", "b/d": "y"}),
        hash_of("place", {"a": "x", "c": "y"}),
        hash_of("swapped", {"a": "y", "b/c": "x"}),
        hash_of("more", {"a": "x", "b/c": "y", "d": ""}),
    ]
    assert len({one, *others}) == 6


def test_folder_hash_follows_links(tmp_path):
    write_text(tmp_path / "real" / "a", "x")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "a").symlink_to(tmp_path / "real" / "a")
    assert file_hash(tmp_path / "links") == file_hash(tmp_path / "real")


def test_json_lines_are_read_as_they_were_written(tmp_path):
    rows = [{"text": "Zeilen\nund \u2028 „Anführung“ \U0001f600"}, {}]
    write_json_lines(tmp_path / "rows.jsonl", rows)
    assert json_lines(tmp_path / "rows.jsonl") == rows
    text = (tmp_path / "rows.jsonl").read_text(encoding="utf-8")
    assert text == '{"text": "Zeilen\\nund \u2028 „Anführung“ \U0001f600"}\n{}\n'


@pytest.fixture
def as_program(monkeypatch):
    monkeypatch.setattr("sys.argv", [str(ROOT / "src" / "build_pairs.py")])


def test_record_describes_the_artifact_and_its_inputs(tmp_path, as_program, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secretsecret")
    with_record, empty = tmp_path / "with_record", tmp_path / "empty"
    artifact = tmp_path / "artifact"
    write_text(with_record, "of another stage")
    write_json(record_path(with_record), {"sha256": file_hash(with_record)})
    write_text(empty, "")
    arguments = {"output": artifact, "beta": 1e-3}
    with recorded("select", artifact, [with_record, empty], arguments) as facts:
        write_text(artifact, "result")
        facts["pairs"] = 3
    text = record_path(artifact).read_text()
    record = json.loads(text)
    assert record["sha256"] == file_hash(artifact) == known_hash(artifact)
    assert record["inputs"] == {
        str(with_record): file_hash(with_record),
        str(empty): "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    }
    assert record["stage"] == "select"
    assert record["stage_version"] == STAGES["select"]
    assert record["pairs"] == 3
    assert record["arguments"] == {"output": str(artifact), "beta": 1e-3}
    assert record["code"]["program"] == "build_pairs.py"
    assert record["packages"]["torch"]
    assert record["seconds"] >= 0
    assert record["peak_memory_mib"] > 0
    assert record["started"].endswith("+00:00")
    assert "secretsecret" not in text


@pytest.mark.parametrize("folder", [False, True])
def test_an_input_that_differs_from_its_record_is_refused(folder, tmp_path, as_program):
    given = tmp_path / "input"
    content = given / "model.safetensors" if folder else given
    with recorded("select", given, [], {}):
        write_text(content, "one")
    write_text(content, "two")
    with pytest.raises(UserError, match="input has changed since its record was written"):
        with recorded("select", tmp_path / "artifact", [given], {}):
            pytest.fail("the work began")
    assert not (tmp_path / "artifact").exists()


@pytest.mark.parametrize(
    "record",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"sha256": null}',
        "\udcff",
        "[" * 5000,
        '{"sha256": "", "inputs": [1]}',
    ],
    ids=lambda record: record[:9],
)
def test_a_broken_record_of_an_input_is_refused(record, tmp_path, as_program):
    given = tmp_path / "input"
    write_text(given, "")
    record_path(given).write_text(record, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(
        UserError,
        match=(
            "input.record.json is broken .*make verify FIX=1.*"
            "make .*input and everything made from it again"
        ),
    ):
        with recorded("select", tmp_path / "artifact", [given], {}):
            pytest.fail("the work began")


def test_a_missing_or_unreadable_input_is_refused(tmp_path, as_program):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "weights").symlink_to("gone")
    for name, said in (
        ("none", "is missing"),
        ("loop", "cannot read .*loop"),
        ("folder", "folder/weights is a link to gone"),
    ):
        with pytest.raises(UserError, match=said):
            with recorded("select", tmp_path / "artifact", [tmp_path / name], {}):
                pytest.fail("the work began")


def test_hash_ignores_the_time_stamp_of_snakemake(tmp_path):
    write_text(tmp_path / "policy" / "a", "x")
    before = file_hash(tmp_path / "policy")
    write_text(tmp_path / "policy" / ".snakemake_timestamp", "")
    assert file_hash(tmp_path / "policy") == before


def test_an_input_is_hashed_once_until_it_changes(tmp_path, monkeypatch):
    hashed = []
    monkeypatch.setattr(artifacts, "file_hash", lambda path: hashed.append(path) or file_hash(path))
    write_text(tmp_path / "a", "one")
    assert known_hash(tmp_path / "a") == known_hash(tmp_path / "a")
    assert len(hashed) == 2, "a change right after the first write may have the same time"
    os.utime(tmp_path / "a", (0, 0))
    one = [known_hash(tmp_path / "a") for _ in range(3)]
    assert len(hashed) == 3
    (tmp_path / "a").write_text("two")
    assert known_hash(tmp_path / "a") != one[0]


def test_written_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with written_whole(tmp_path / "policy") as temporary:
            temporary.mkdir()
            for name in ("model.safetensors", "config.json"):
                (temporary / name).touch(mode=0o600)
        write_text(tmp_path / "file", "")
    finally:
        os.umask(before)
    modes = {
        path.name: path.stat().st_mode & 0o777
        for path in (*(tmp_path / "policy").iterdir(), tmp_path / "file")
    }
    assert modes == {"model.safetensors": 0o640, "config.json": 0o640, "file": 0o640}


def test_failed_stage_leaves_no_record(tmp_path, as_program):
    with pytest.raises(UserError), recorded("select", tmp_path / "artifact", [], {}):
        write_text(tmp_path / "artifact", "half")
        raise UserError("no")
    assert names_in(tmp_path) == ["artifact"]


def test_failed_block_leaves_no_record_of_several_artifacts(tmp_path, as_program):
    given, both = tmp_path / "given", [tmp_path / "a", tmp_path / "b"]
    write_text(given, "")
    with pytest.raises(UserError), recorded_all("select", both, [given], {}):
        write_text(both[0], "")
        write_text(both[1], "half")
        raise UserError("no")
    assert names_in(tmp_path) == ["a", "b", "given"]
    with recorded_all("select", both, [given], {"k": 2}):
        write_text(both[1], "whole")
    for artifact in both:
        record = read_json(record_path(artifact))
        assert record["artifact"] == str(artifact)
        assert record["sha256"] == file_hash(artifact)
        assert record["inputs"].keys() == {str(given)}
        assert record["arguments"] == {"k": 2}


def test_stale_names_only_what_differs(tmp_path, as_program):
    with recorded("select", tmp_path / "a", [], {}):
        write_text(tmp_path / "a", "")
    record = read_json(record_path(tmp_path / "a"))
    assert list_stale.differences(record) == []
    code = record["code"]
    for change, named in (
        ({"code": code | {"program_sha256": "0"}}, "program"),
        ({"code": code | {"sppo_sha256": "0"}}, "src/sppo"),
        ({"stage_version": 0}, "stage version"),
        ({"stage": "gone"}, "stage version"),
        ({"code": code | {"program": "gone.py"}}, "program (gone)"),
    ):
        assert list_stale.differences(record | change) == [named]


def test_stale_lists_each_artifact_with_its_reason(tmp_path, as_program, program, capsys):
    for name in ("fresh", "old"):
        with recorded("select", tmp_path / "iter1" / name, [], {}):
            write_text(tmp_path / "iter1" / name, "")
    old = record_path(tmp_path / "iter1" / "old")
    write_json(old, {**read_json(old), "stage_version": 0})
    program(list_stale, tmp_path)
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/iter1/old: other stage version",
        "1 of 2 artifacts were made by older code",
    ]


@pytest.fixture
def results(tmp_path, as_program, monkeypatch) -> Path:
    """Prompts, pairs, the policy of iteration 1 and their records.

    The policy of iteration 2 has a record, but was deleted.
    """
    monkeypatch.chdir(tmp_path)
    folder = Path("results/iter1")
    stages = [
        (folder / "prompts.parquet", "sample", []),
        (folder / "pairs.parquet", "select", [folder / "prompts.parquet"]),
        (folder / "policy", "train", [folder / "pairs.parquet"]),
        (Path("results/iter2/policy"), "train", [folder / "policy"]),
    ]
    for artifact, stage, inputs in stages:
        with recorded(stage, artifact, inputs, {}):
            write_text(artifact / "weights" if stage == "train" else artifact, stage)
    shutil.rmtree("results/iter2/policy")
    return folder


def verify(program, *words: object) -> None:
    verify_results.hash_of.cache_clear()
    program(verify_results, "results", *words)


def faults(capsys, program, *words: object) -> list[str]:
    """Lines of the faults that verify finds, without the last line, which counts them."""
    with pytest.raises(SystemExit) as ended:
        verify(program, *words)
    assert ended.value.code == 1
    return capsys.readouterr().out.splitlines()[:-1]


def test_results_that_match_their_records_have_no_fault(results, program, capsys):
    write_text(results / "policy" / ".snakemake_timestamp", "")
    verify(program)
    assert (
        capsys.readouterr().out == "4 artifacts, 0 faults; 1 policies are gone, which is no fault\n"
    )


def test_verify_names_each_changed_artifact_and_input(results, program, capsys):
    write_text(results / "prompts.parquet", "other")
    write_text(results / "policy" / "weights", "other")
    expected = [
        f"{results}/pairs.parquet: its input {results}/prompts.parquet has changed "
        "since it was made",
        f"{results}/policy: it has changed since its record was written",
        f"{results}/prompts.parquet: it has changed since its record was written",
    ]
    assert faults(capsys, program) == expected
    assert faults(capsys, program, "--fix") == expected, (
        "--fix must not write new records of changed artifacts"
    )


def test_verify_names_a_missing_artifact_that_has_a_record(results, program, capsys):
    (results / "pairs.parquet").unlink()
    assert f"{results}/pairs.parquet: it is gone, but its record exists" in faults(capsys, program)


# None: the record does not exist.
BROKEN_RECORDS = [None, "", '{"sha256":', "[]"]


@pytest.mark.parametrize("record", BROKEN_RECORDS)
def test_fix_rebuilds_a_record_with_the_artifact_s_time(record, results, program, capsys):
    stages = {"pairs.parquet": "select", "policy": "train"}
    for name in stages:
        record_path(results / name).unlink()
        if record is not None:
            record_path(results / name).write_text(record)
    before = {name: (results / name).stat().st_mtime_ns for name in stages}
    said = "it has no record" if record is None else "record.json is broken"
    assert len([line for line in faults(capsys, program) if said in line]) == 2
    verify(program, "--fix")
    assert capsys.readouterr().out.count("; it has been rebuilt\n") == 2
    for name, stage in stages.items():
        rebuilt = read_json(record_path(results / name))
        assert rebuilt["rebuilt"] is True
        assert rebuilt["stage"] == stage
        assert rebuilt["sha256"] == file_hash(results / name)
        assert (results / name).stat().st_mtime_ns == before[name]
        assert record_path(results / name).stat().st_mtime_ns == before[name]
    verify(program)


@pytest.mark.parametrize("record", BROKEN_RECORDS)
def test_a_rebuilt_record_is_stale_and_still_counts_as_an_input(record, results, program, capsys):
    record_path(results / "policy").unlink()
    if record is not None:
        record_path(results / "policy").write_text(record)
    verify(program, "--fix")
    program(list_stale, "results")
    assert f"{results}/policy: unknown, because its record was rebuilt" in capsys.readouterr().out
    with recorded("train", Path("results/iter2/policy"), [results / "policy"], {}):
        write_text(Path("results/iter2/policy/weights"), "")


def test_the_record_of_a_missing_artifact_is_not_rebuilt(results, program, capsys):
    (results / "pairs.parquet").unlink()
    record_path(results / "pairs.parquet").write_text("")
    assert faults(capsys, program, "--fix") == [
        f"{results}/pairs.parquet: it is gone, but its record exists"
    ]
    assert record_path(results / "pairs.parquet").read_text() == ""


def test_stale_names_a_broken_record_and_continues(results, program, capsys):
    record_path(results / "pairs.parquet").write_text("")
    program(list_stale, "results")
    said = capsys.readouterr().out
    assert "pairs.parquet.record.json is broken" in said
    assert "0 of 4 artifacts" in said


def test_code_hash_covers_every_file_of_the_package(tmp_path, monkeypatch):
    program = ROOT / "src" / "build_pairs.py"
    before = code_hashes(program)
    assert before == code_hashes(program)
    for file in (ROOT / "src").rglob("*.py"):
        write_text(tmp_path / file.relative_to(ROOT), file.read_text(encoding="utf-8"))
    program = tmp_path / "src" / "build_pairs.py"
    monkeypatch.setattr("sppo.core.artifacts.ROOT", tmp_path)
    assert code_hashes(program) == before
    write_text(tmp_path / "src" / "sppo" / "training" / "losses.py", "changed")
    after = code_hashes(program)
    assert after["sppo_sha256"] != before["sppo_sha256"]
    assert after["program_sha256"] == before["program_sha256"]


def test_iteration_with_a_rebuilt_record_has_no_minutes(tmp_path):
    records = {
        tmp_path / "iter1" / "a.record.json": {"seconds": 60},
        tmp_path / "iter1" / "b.record.json": {"rebuilt": True},
        tmp_path / "iter2" / "a.record.json": {"seconds": 30},
    }
    for path, record in records.items():
        write_json(path, record)
    assert seconds_by_iteration(list(records), tmp_path) == {("main", 2): 30.0}


def test_each_artifact_of_a_block_records_all_inputs(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", [__file__])
    inputs = [tmp_path / name for name in ("a.txt", "b.txt")]
    outputs = [tmp_path / name for name in ("c.txt", "d.txt")]
    for file in inputs:
        file.write_text(file.name)
    with recorded_all("tabulate", outputs, inputs, {}):
        for file in outputs:
            file.write_text(file.name)
    for file in outputs:
        assert read_record(file)["inputs"] == {str(each): file_hash(each) for each in inputs}


def test_nan_in_the_probabilities_of_a_member_is_refused(tmp_path):
    member = {"model": "a", "P": [[0.5, float("nan")], [0.5, 0.5]]}
    rows = [ROWS["preferences"][0] | {"members": [member]}]
    with pytest.raises(UserError, match="members of preferences is NaN or infinite in 1 of 1 rows"):
        write_table(tmp_path / "t.parquet", rows, "preferences")
