"""Artifacts: written whole or not at all, checked on both sides, with a record that says what they came from."""

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
    record_path,
    recorded,
    write_json,
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


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refusal(path: Path, name: str) -> str:
    with pytest.raises(UserError) as caught:
        read_table(path, name)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_every_table_has_an_example_here():
    assert ROWS.keys() == TABLES.keys()


@pytest.mark.parametrize("name", TABLES)
def test_rows_come_back_bit_for_bit(name, tmp_path):
    write_table(tmp_path / "a" / "t.parquet", ROWS[name], name)
    assert read_table(tmp_path / "a" / "t.parquet", name) == ROWS[name]
    assert left_over(tmp_path / "a") == ["t.parquet"]


@pytest.mark.parametrize("name", TABLES)
def test_repeated_key_and_null_are_refused_on_write(name, tmp_path):
    with pytest.raises(ValueError, match=TABLES[name].key[0]):
        write_table(tmp_path / "t.parquet", ROWS[name][:1] * 2, name)
    for column in TABLES[name].columns.names:
        with pytest.raises(ValueError, match=column):
            write_table(tmp_path / "t.parquet", [{**ROWS[name][0], column: None}], name)
    assert left_over(tmp_path) == []


def test_missing_table_is_named(tmp_path):
    assert "is missing" in refusal(tmp_path / "none.parquet", "pairs")


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_truncated_table_is_named(keep, tmp_path):
    write_table(tmp_path / "t.parquet", ROWS["pairs"], "pairs")
    whole = (tmp_path / "t.parquet").read_bytes()
    (tmp_path / "t.parquet").write_bytes(whole[: int(keep * len(whole))])
    assert "not a whole parquet file" in refusal(tmp_path / "t.parquet", "pairs")


def test_table_of_another_kind_is_named_with_what_it_lacks(tmp_path):
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


def test_foreign_table_with_repeated_keys_or_nulls_is_named(tmp_path):
    for ids, logps in (([1, 1], [0.0, 0.0]), ([1, 2], [0.0, None])):
        pq.write_table(
            pa.table({"pair_id": ids, "chosen_logp": logps, "rejected_logp": [0.0, 0.0]}),
            tmp_path / "t.parquet",
        )
        assert "breaks the schema of logps" in refusal(tmp_path / "t.parquet", "logps")


FLOATS = [
    (name, column)
    for name, table in TABLES.items()
    for column in table.columns.names
    if "double" in str(table.columns.field(column).type)
]


def spoilt(value, number: float):
    """The value with its last number replaced."""
    return [*value[:-1], spoilt(value[-1], number)] if isinstance(value, list) else number


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("name", "column"), FLOATS)
def test_what_is_no_number_is_refused_on_write_and_on_read(name, column, number, tmp_path):
    rows = [*ROWS[name][:-1], {**ROWS[name][-1], column: spoilt(ROWS[name][-1][column], number)}]
    with pytest.raises(
        UserError,
        match=f"t.parquet was not written: {column} of {name} is NaN or infinite in 1 of "
        f"{len(rows)} rows, first in {TABLES[name].key[0]}",
    ):
        write_table(tmp_path / "t.parquet", rows, name)
    assert left_over(tmp_path) == []
    pq.write_table(pa.Table.from_pylist(rows, schema=TABLES[name].columns), tmp_path / "t.parquet")
    assert (
        f"breaks the schema of {name} (column {column} has values that are NaN or infinite)"
        in refusal(tmp_path / "t.parquet", name)
    )


@pytest.mark.parametrize("name", TABLES)
def test_no_flipped_bit_of_a_table_gives_other_rows(name, tmp_path):
    """Pages have checksums; counts and types of the footer are checked."""
    path = tmp_path / "t.parquet"
    write_table(path, ROWS[name], name)
    whole, unnoticed = path.read_bytes(), []
    bits = {*range(0, 8 * len(whole), 101)}
    if name == "grades":  # all of where its footer counts rows
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


def test_broken_json_is_named_and_nan_is_not_written(tmp_path):
    (tmp_path / "x.json").write_text('{"a": 1')
    with pytest.raises(UserError, match="x.json is not valid JSON"):
        read_json(tmp_path / "x.json")
    for text in ("[" * 5000, "9" * 5000):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(UserError, match="x.json is not valid JSON"):
            read_json(tmp_path / "x.json")
        with pytest.raises(UserError, match="x.json line 1 is not JSON"):
            json_lines(tmp_path / "x.json")
    with pytest.raises(ValueError):
        write_json(tmp_path / "y.json", {"a": float("nan")})
    assert left_over(tmp_path) == ["x.json"]


def test_failure_while_writing_keeps_the_old_file_and_nothing_else(tmp_path):
    write_text(tmp_path / "x", "old")
    with pytest.raises(RuntimeError), written_whole(tmp_path / "x") as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError
    assert (tmp_path / "x").read_text() == "old" and left_over(tmp_path) == ["x"]


def test_failure_while_writing_a_folder_keeps_the_old_folder_and_nothing_else(tmp_path):
    (tmp_path / "p").mkdir()
    write_text(tmp_path / "p" / "old", "")
    with pytest.raises(KeyboardInterrupt), written_whole(tmp_path / "p") as temporary:
        temporary.mkdir()
        write_text(temporary / "new", "")
        raise KeyboardInterrupt
    assert left_over(tmp_path / "p") == ["old"] and left_over(tmp_path) == ["p"]


def test_new_folder_replaces_the_old_one_with_all_it_held(tmp_path):
    for content in ("old", "new"):
        with written_whole(tmp_path / "p") as temporary:
            temporary.mkdir()
            write_text(temporary / content, "")
    assert left_over(tmp_path / "p") == ["new"] and left_over(tmp_path) == ["p"]


def test_block_that_writes_nothing_is_an_error_and_keeps_the_old_file(tmp_path):
    write_text(tmp_path / "x", "old")
    with pytest.raises(FileNotFoundError), written_whole(tmp_path / "x"):
        pass
    assert (tmp_path / "x").read_text() == "old"


def test_hash_of_a_folder_follows_contents_and_names_and_nothing_else(tmp_path):
    def made(name: str, files: dict[str, str]) -> str:
        for file, text in files.items():
            write_text(tmp_path / name / file, text)
        return file_hash(tmp_path / name)

    one = made("one", {"a": "x", "b/c": "y"})
    os.utime(tmp_path / "one" / "a", (0, 0))
    assert made("same", {"b/c": "y", "a": "x"}) == one == file_hash(tmp_path / "one")
    others = [
        made("content", {"a": "x", "b/c": "z"}),
        made("name", {"a": "x", "b/d": "y"}),
        made("place", {"a": "x", "c": "y"}),
        made("swapped", {"a": "y", "b/c": "x"}),
        made("more", {"a": "x", "b/c": "y", "d": ""}),
    ]
    assert len({one, *others}) == 6


def test_hash_of_a_folder_of_links_is_that_of_what_they_point_to(tmp_path):
    write_text(tmp_path / "real" / "a", "x")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "a").symlink_to(tmp_path / "real" / "a")
    assert file_hash(tmp_path / "links") == file_hash(tmp_path / "real")


@pytest.fixture
def as_program(monkeypatch):
    monkeypatch.setattr("sys.argv", [str(ROOT / "src" / "build_pairs.py")])


def test_record_tells_what_the_artifact_is_and_came_from(tmp_path, as_program, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secretsecret")
    large, small, artifact = tmp_path / "large", tmp_path / "small", tmp_path / "artifact"
    write_text(large, "of another stage")
    write_json(record_path(large), {"sha256": file_hash(large)})
    write_text(small, "")
    with recorded("select", artifact, [large, small], {"output": artifact, "beta": 1e-3}) as facts:
        write_text(artifact, "result")
        facts["pairs"] = 3
    text = record_path(artifact).read_text()
    record = json.loads(text)
    assert record["sha256"] == file_hash(artifact) == known_hash(artifact)
    assert record["inputs"] == {
        str(large): file_hash(large),
        str(small): "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    }
    assert (record["stage"], record["stage_version"], record["pairs"]) == (
        "select",
        STAGES["select"],
        3,
    )
    assert record["arguments"] == {"output": str(artifact), "beta": 1e-3}
    assert record["code"]["program"] == "build_pairs.py"
    assert (
        record["packages"]["torch"]
        and record["seconds"] >= 0
        and record["peak_memory_mib"] > 0
        and record["started"].endswith("+00:00")
    )
    assert "secretsecret" not in text


@pytest.mark.parametrize("folder", [False, True])
def test_input_that_its_record_does_not_describe_is_refused_before_any_work(
    folder, tmp_path, as_program
):
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
def test_broken_record_of_an_input_is_one_line_before_any_work(record, tmp_path, as_program):
    given = tmp_path / "input"
    write_text(given, "")
    record_path(given).write_text(record, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(
        UserError,
        match="input.record.json is broken .*make verify FIX=1.*make .*input and everything made from it again",
    ):
        with recorded("select", tmp_path / "artifact", [given], {}):
            pytest.fail("the work began")


def test_missing_or_unreadable_input_is_one_line_before_any_work(tmp_path, as_program):
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


def test_hash_passes_over_snakemake_s_time_stamp(tmp_path):
    write_text(tmp_path / "policy" / "a", "x")
    before = file_hash(tmp_path / "policy")
    write_text(tmp_path / "policy" / ".snakemake_timestamp", "")
    assert file_hash(tmp_path / "policy") == before


def test_large_input_is_hashed_once_in_a_process_until_it_changes(tmp_path, monkeypatch):
    hashed = []
    monkeypatch.setattr(artifacts, "file_hash", lambda path: hashed.append(path) or file_hash(path))
    write_text(tmp_path / "a", "one")
    assert known_hash(tmp_path / "a") == known_hash(tmp_path / "a")
    assert len(hashed) == 2, "just written: the time of a change may be the same"
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
    assert left_over(tmp_path) == ["artifact"]


def test_stale_names_what_differs_and_only_that(tmp_path, as_program):
    with recorded("select", tmp_path / "a", [], {}):
        write_text(tmp_path / "a", "")
    record = read_json(record_path(tmp_path / "a"))
    assert list_stale.differences(record) == []
    code = record["code"]
    assert list_stale.differences({**record, "code": {**code, "program_sha256": "0"}}) == [
        "program"
    ]
    assert list_stale.differences({**record, "code": {**code, "sppo_sha256": "0"}}) == ["src/sppo"]
    assert list_stale.differences({**record, "stage_version": 0}) == ["stage version"]
    assert list_stale.differences({**record, "stage": "gone"}) == ["stage version"]
    assert list_stale.differences({**record, "code": {**code, "program": "gone.py"}}) == [
        "program (gone)"
    ]


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
    """Pairs made of prompts, a policy made of pairs, a policy that was dropped, and their records."""
    monkeypatch.chdir(tmp_path)
    folder = Path("results/iter1")
    made = [
        (folder / "prompts.parquet", "sample", []),
        (folder / "pairs.parquet", "select", [folder / "prompts.parquet"]),
        (folder / "policy", "train", [folder / "pairs.parquet"]),
        (Path("results/iter2/policy"), "train", [folder / "policy"]),
    ]
    for artifact, stage, inputs in made:
        with recorded(stage, artifact, inputs, {}):
            write_text(artifact / "weights" if stage == "train" else artifact, stage)
    shutil.rmtree("results/iter2/policy")
    return folder


def verify(program, *words: object) -> None:
    verify_results.hash_of.cache_clear()
    program(verify_results, "results", *words)


def faults(capsys, program, *words: object) -> list[str]:
    with pytest.raises(SystemExit) as ended:
        verify(program, *words)
    assert ended.value.code == 1
    return capsys.readouterr().out.splitlines()[:-1]


def test_results_that_are_what_their_records_say_have_no_fault(results, program, capsys):
    write_text(results / "policy" / ".snakemake_timestamp", "")
    verify(program)
    assert (
        capsys.readouterr().out == "4 artifacts, 0 faults; 1 policies are gone, which is no fault\n"
    )


def test_verify_names_each_artifact_and_input_that_is_other_than_recorded(results, program, capsys):
    write_text(results / "prompts.parquet", "other")
    write_text(results / "policy" / "weights", "other")
    expected = [
        f"{results}/pairs.parquet: its input {results}/prompts.parquet has changed since it was made",
        f"{results}/policy: it has changed since its record was written",
        f"{results}/prompts.parquet: it has changed since its record was written",
    ]
    assert faults(capsys, program) == expected
    assert faults(capsys, program, "--fix") == expected, (
        "a changed artifact is no matter of records"
    )
    shutil.move(results / "pairs.parquet", "elsewhere")
    assert f"{results}/pairs.parquet: it is gone; its record is there" in faults(capsys, program)


@pytest.mark.parametrize("record", [None, "", '{"sha256":', "[]"])
def test_fix_rebuilds_a_broken_or_missing_record_as_old_as_its_artifact(
    record, results, program, capsys
):
    for name in ("pairs.parquet", "policy"):
        record_path(results / name).unlink()
        if record is not None:
            record_path(results / name).write_text(record)
    before = {name: (results / name).stat().st_mtime_ns for name in ("pairs.parquet", "policy")}
    said = "it has no record" if record is None else "record.json is broken"
    assert len([line for line in faults(capsys, program) if said in line]) == 2
    verify(program, "--fix")
    assert capsys.readouterr().out.count("; it is rebuilt\n") == 2
    for name, stage in (("pairs.parquet", "select"), ("policy", "train")):
        rebuilt = read_json(record_path(results / name))
        assert (
            rebuilt["rebuilt"] is True
            and rebuilt["stage"] == stage
            and rebuilt["sha256"] == file_hash(results / name)
        )
        assert {
            (results / name).stat().st_mtime_ns,
            record_path(results / name).stat().st_mtime_ns,
        } == {before[name]}
    verify(program)
    program(list_stale, "results")
    assert f"{results}/policy: unknown, its record was rebuilt" in capsys.readouterr().out
    with recorded(
        "train", Path("results/iter2/policy"), [results / "policy"], {}
    ):  # and it counts as an input
        write_text(Path("results/iter2/policy/weights"), "")


def test_record_is_not_rebuilt_for_an_artifact_that_is_gone(results, program, capsys):
    (results / "pairs.parquet").unlink()
    record_path(results / "pairs.parquet").write_text("")
    assert faults(capsys, program, "--fix") == [
        f"{results}/pairs.parquet: it is gone; its record is there"
    ]
    assert record_path(results / "pairs.parquet").read_text() == ""


def test_stale_names_a_broken_record_and_goes_on(results, program, capsys):
    record_path(results / "pairs.parquet").write_text("")
    program(list_stale, "results")
    assert (
        "pairs.parquet.record.json is broken" in (said := capsys.readouterr().out)
        and "0 of 4 artifacts" in said
    )


def test_code_hash_of_the_package_follows_every_file_of_it(tmp_path, monkeypatch):
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
    assert (
        after["sppo_sha256"] != before["sppo_sha256"]
        and after["program_sha256"] == before["program_sha256"]
    )


def test_iteration_with_a_rebuilt_record_has_no_minutes(tmp_path):
    paths = [
        tmp_path / "iter1" / "a.record.json",
        tmp_path / "iter1" / "b.record.json",
        tmp_path / "iter2" / "a.record.json",
    ]
    for path, record in zip(
        paths, ({"seconds": 60}, {"rebuilt": True}, {"seconds": 30}), strict=True
    ):
        write_json(path, record)
    assert seconds_by_iteration(paths) == {2: 30.0}
