"""Tables in Parquet, checked on write and on read. `TABLES` defines the schemas of all tables."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sppo.core.artifacts import written_whole
from sppo.core.errors import UserError


@dataclass(frozen=True)
class Table:
    """The schema of a table: its columns with types, and the columns that identify a row.

    optional: columns that are written if the rows have them. Programs do not read them.
    """

    columns: pa.Schema
    key: tuple[str, ...]
    optional: tuple[pa.Field, ...] = ()


def _columns(**types: pa.DataType) -> pa.Schema:
    """A schema of columns without nulls."""
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in types.items()])


_ids = pa.list_(pa.int32())
_message = pa.struct([("role", pa.string()), ("content", pa.string())])
_matrix = pa.list_(pa.list_(pa.float64()))
_member = pa.struct([("model", pa.string()), ("P", _matrix)])

TABLES = {
    "prompts": Table(
        _columns(
            prompt_id=pa.string(),
            category=pa.string(),
            messages=pa.list_(_message),
            prompt_token_ids=_ids,
            source=pa.string(),
        ),
        ("prompt_id",),
    ),
    "responses": Table(
        _columns(
            prompt_id=pa.string(),
            sample_id=pa.int32(),
            seed=pa.uint64(),
            prompt_token_ids=_ids,
            token_ids=_ids,
            text=pa.string(),
            finish_reason=pa.string(),
        ),
        ("prompt_id", "sample_id"),
    ),
    # logits[i][j] is the logit that response i beats response j, when the model reads i first.
    # members: P of each model of a population.
    "preferences": Table(
        _columns(prompt_id=pa.string(), sample_ids=_ids, logits=_matrix),
        ("prompt_id",),
        (pa.field("members", pa.list_(_member), nullable=False),),
    ),
    # Grades are from 0 to 6. sample_id -1 is the gold response. A response without a score from
    # the judge has no row.
    "grades": Table(
        _columns(prompt_id=pa.string(), sample_id=pa.int32(), grade=pa.float64()),
        ("prompt_id", "sample_id"),
    ),
    "pairs": Table(
        _columns(
            pair_id=pa.int64(),
            prompt_id=pa.string(),
            prompt_token_ids=_ids,
            chosen=pa.string(),
            chosen_token_ids=_ids,
            chosen_sample_id=pa.int32(),
            rejected=pa.string(),
            rejected_token_ids=_ids,
            rejected_sample_id=pa.int32(),
            p_hat_chosen=pa.float64(),
            p_hat_rejected=pa.float64(),
            p_chosen_beats_rejected=pa.float64(),
        ),
        ("pair_id",),
    ),
    # Summed log-probabilities (nats) of the response tokens under a frozen model.
    "logps": Table(
        _columns(pair_id=pa.int64(), chosen_logp=pa.float64(), rejected_logp=pa.float64()),
        ("pair_id",),
    ),
}


def write_table(path: Path, rows: list[dict[str, Any]], name: str) -> None:
    """Write rows as the table `name` of `TABLES`.

    Rows that break the schema raise ValueError, because that is a bug in this project. A number
    that is NaN or infinite is a UserError, because the model that computed it is broken.
    """
    schema = TABLES[name].columns
    for field in TABLES[name].optional:
        if rows and field.name in rows[0]:
            schema = schema.append(field)
    table = pa.Table.from_pylist(rows, schema=schema)
    _check(table, name)
    column = _not_finite(table)
    if column:
        bad = [row for row in rows if not _finite(row[column])]
        first = ", ".join(f"{key} {bad[0][key]}" for key in TABLES[name].key)
        raise UserError(
            f"{path} was not written: {column} of {name} is NaN or infinite in "
            f"{len(bad)} of {len(rows)} rows, first in {first}; check the weights of "
            "the model that computed it, or run that model in float32"
        )
    with written_whole(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)


def read_table(path: Path, name: str) -> list[dict[str, Any]]:
    """Read the rows of the table `name` of `TABLES`.

    A file that is missing, truncated or damaged, or that is not this table, is a UserError that
    names the file.
    """
    table = _read_parquet(path)
    schema = TABLES[name].columns
    missing = [column for column in schema.names if column not in table.column_names]
    if missing:
        raise UserError(
            f"{path} is not a table of {name}: it lacks {', '.join(missing)}; "
            "delete it and run again"
        )
    try:
        table = table.select(schema.names).cast(schema)
        _check(table, name)
        column = _not_finite(table)
        if column:
            raise ValueError(f"column {column} has values that are NaN or infinite")
    except (pa.ArrowException, ValueError) as error:
        raise UserError(
            f"{path} breaks the schema of {name} ({error}); delete it and run again"
        ) from None
    return table.to_pylist()


def read_responses(
    path: Path, prompts: Path
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """Read the table of responses `path`, and the rows of the table `prompts` by prompt_id.

    A response to a prompt that `prompts` lacks is a UserError, beside those of `read_table`.
    """
    asked = {row["prompt_id"]: row for row in read_table(prompts, "prompts")}
    responses = read_table(path, "responses")
    for row in responses:
        if row["prompt_id"] not in asked:
            raise UserError(
                f"{path} answers prompt {row['prompt_id']}, which {prompts} lacks; delete it and "
                "run again"
            )
    return responses, asked


def _read_parquet(path: Path) -> pa.Table:
    """Read a Parquet file and verify its checksums and row counts."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read()
            metadata = file.metadata
        # Only the pages have checksums. The metadata has none, but it stores the number of rows
        # twice: for the file, and for each row group.
        groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        if not table.num_rows == metadata.num_rows == sum(groups):
            raise ValueError(f"{table.num_rows} rows were read, {metadata.num_rows} were written")
    except FileNotFoundError:
        raise UserError(f"{path} is missing; create it or correct the path") from None
    except (pa.ArrowException, ValueError, OSError) as error:
        raise UserError(
            f"{path} is not a whole parquet file ({error}); delete it and run again"
        ) from None
    return table


def _not_finite(table: pa.Table) -> str | None:
    """The first column with a number that is NaN or infinite, None if all numbers are finite."""
    return next((name for name in table.column_names if not _is_finite(table.column(name))), None)


def _is_finite(values: pa.ChunkedArray) -> bool:
    """Whether all numbers of a column are finite, also inside lists and structs."""
    if pa.types.is_list(values.type):
        return _is_finite(pc.list_flatten(values))
    if pa.types.is_struct(values.type):
        return all(map(_is_finite, values.flatten()))
    if pa.types.is_floating(values.type):
        return pc.all(pc.is_finite(values), min_count=0).as_py()
    return True


def _finite(value: Any) -> bool:
    """Whether a number, or each number in nested lists and structs, is finite."""
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    if isinstance(value, list):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _check(table: pa.Table, name: str) -> None:
    """Raise ValueError if the table contains a null or if two rows have the same key."""
    for column in table.column_names:
        if _has_nulls(table.column(column)):
            raise ValueError(f"column {column} has nulls")
    key = list(TABLES[name].key)
    if table.group_by(key).aggregate([]).num_rows != table.num_rows:
        raise ValueError(f"two rows have the same {' and '.join(key)}")


def _has_nulls(values: pa.ChunkedArray) -> bool:
    """Whether a column contains a null, also inside lists and structs."""
    if values.null_count:
        return True
    if pa.types.is_list(values.type):
        return _has_nulls(pc.list_flatten(values))
    if pa.types.is_struct(values.type):
        return any(map(_has_nulls, values.flatten()))
    return False
