"""Tables in Parquet, checked on write and on read. The schemas of all of them stand here and nowhere else."""

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
    """Columns with their types, and the columns that together name a row."""

    columns: pa.Schema
    key: tuple[str, ...]


def _columns(**types: pa.DataType) -> pa.Schema:
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in types.items()])


_ids = pa.list_(pa.int32())
_message = pa.struct([("role", pa.string()), ("content", pa.string())])

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
    # logits[i][j] is the logit that response i beats response j, read in the order (i, j).
    "preferences": Table(
        _columns(prompt_id=pa.string(), sample_ids=_ids, logits=pa.list_(pa.list_(pa.float64()))),
        ("prompt_id",),
    ),
    # From 0 to 6; sample_id -1 is the gold response. A response that the judge gave no score to has no row.
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
    """Write rows as the table `name`. Rows that break its schema are a ValueError: a bug of ours.

    Numbers that are NaN or infinite are a UserError: the model that gave them is broken.
    """
    schema = TABLES[name].columns
    table = pa.Table.from_pylist(rows, schema=schema)
    _check(table, name)
    column = _not_finite(table)
    if column:
        bad = [row for row in rows if not _finite(row[column])]
        first = ", ".join(f"{key} {bad[0][key]}" for key in TABLES[name].key)
        raise UserError(
            f"{path} was not written: {column} of {name} is NaN or infinite in "
            f"{len(bad)} of {len(rows)} rows, first in {first}; check the weights of "
            "the model that gave it, or run it in float32"
        )
    with written_whole(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)


def read_table(path: Path, name: str) -> list[dict[str, Any]]:
    """Rows of the table `name`. A missing, truncated or foreign file is a UserError that names it."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            table, said = file.read(), file.metadata
        # Pages have checksums, what describes them has none, but it says this twice.
        groups = [said.row_group(i).num_rows for i in range(said.num_row_groups)]
        if not table.num_rows == said.num_rows == sum(groups):
            raise ValueError(f"{table.num_rows} rows where {said.num_rows} were written")
    except FileNotFoundError:
        raise UserError(f"{path} is missing; make it or correct the path") from None
    except (pa.ArrowException, ValueError, OSError) as error:
        raise UserError(
            f"{path} is not a whole parquet file ({error}); delete it and run again"
        ) from None
    wanted = TABLES[name].columns
    missing = [column for column in wanted.names if column not in table.column_names]
    if missing:
        raise UserError(
            f"{path} is not a table of {name}: it lacks {', '.join(missing)}; delete it and run again"
        )
    try:
        table = table.select(wanted.names).cast(wanted)
        _check(table, name)
        column = _not_finite(table)
        if column:
            raise ValueError(f"column {column} has numbers that are NaN or infinite")
    except (pa.ArrowException, ValueError) as error:
        raise UserError(
            f"{path} breaks the schema of {name} ({error}); delete it and run again"
        ) from None
    return table.to_pylist()


def _not_finite(table: pa.Table) -> str | None:
    """The first column with a number that is NaN or infinite."""
    for column in table.column_names:
        values = table.column(column)
        while pa.types.is_list(values.type):
            values = pc.list_flatten(values)
        if pa.types.is_floating(values.type):
            if not pc.all(pc.is_finite(values), min_count=0).as_py():
                return column
    return None


def _finite(value: float | list[Any]) -> bool:
    return all(map(_finite, value)) if isinstance(value, list) else math.isfinite(value)


def _check(table: pa.Table, name: str) -> None:
    for column in table.column_names:
        if _has_nulls(table.column(column)):
            raise ValueError(f"column {column} has nulls")
    key = list(TABLES[name].key)
    if table.group_by(key).aggregate([]).num_rows != table.num_rows:
        raise ValueError(f"{' and '.join(key)} do not name one row each")


def _has_nulls(values: pa.ChunkedArray) -> bool:
    """Whether anything in the column is null, at any depth of lists and structs."""
    if values.null_count:
        return True
    if pa.types.is_list(values.type):
        return _has_nulls(pc.list_flatten(values))
    if pa.types.is_struct(values.type):
        return any(map(_has_nulls, values.flatten()))
    return False
