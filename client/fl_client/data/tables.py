"""Read a site's table (CSV, JSONL, JSON, Parquet) into columns of text.

No value of a row ever appears in an error or a log line: messages name the file, the row's number and
the column.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fl_shared.errors import DataError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
MAX_FIELD_CHARACTERS = 1_000_000


def read_columns(path: Path, columns: list[str]) -> dict[str, list[str]]:
    """Return the named columns of the table at `path`, each a list with one text per row.

    A missing value becomes "". Numbers are written as Python writes them. Raises DataError when the
    file cannot be read, has another form, or lacks a column.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"{path}: the ending {path.suffix!r} is not a known table",
            fix=f"use one of {', '.join(SUFFIXES)}",
        )
    found: dict[str, list[str]] = {name: [] for name in columns}
    try:
        for number, row in enumerate(_rows(path, columns), start=1):
            for name in columns:
                if name not in row:
                    raise _missing(path, name, row, number)
                found[name].append(_text(path, row[name], name, number))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file", fix="correct [data] path in site.toml") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8", fix="save the table as UTF-8") from None
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror or 'cannot be read'}", fix="check the file's owner and mode"
        ) from None
    if columns and not found[columns[0]]:
        raise DataError(f"{path}: the table has no rows", fix="check that the export is complete")
    return found


def _rows(path: Path, columns: list[str]) -> Iterator[Mapping[str, Any]]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet_rows(path, columns)
    if suffix == ".jsonl":
        return _jsonl_rows(path)
    if suffix == ".json":
        return _json_rows(path)
    return _csv_rows(path, "\t" if suffix == ".tsv" else ",")


def _csv_rows(path: Path, delimiter: str) -> Iterator[Mapping[str, Any]]:
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    with path.open(encoding="utf-8-sig", newline="") as handle:
        reader = csv.reader(handle, delimiter=delimiter, strict=True)
        try:
            header = next(reader, None)
            if header is None:
                return
            if len(set(header)) != len(header):
                raise DataError(
                    f"{path}: two columns have the same name", fix="rename one in the header line"
                )
            for number, fields in enumerate(reader, start=1):
                if not fields:
                    continue
                if len(fields) != len(header):
                    raise DataError(
                        f"{path}: row {number} has {len(fields)} fields, the header has {len(header)}",
                        fix="quote fields that hold the separator, or export the table again",
                    )
                yield dict(zip(header, fields, strict=True))
        except csv.Error as error:
            raise DataError(
                f"{path}: line {reader.line_num} is not valid CSV: {error}", fix="export the table again"
            ) from None


def _jsonl_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open(encoding="utf-8") as handle:
        for number, line in enumerate(handle, start=1):
            if line.strip():
                yield _object(path, _parsed(path, line, f"line {number}"), f"line {number}")


def _json_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    rows = _parsed(path, path.read_text("utf-8"), "the file")
    if not isinstance(rows, list):
        raise DataError(
            f"{path}: not a JSON list of objects", fix="write one object per row in a list, or use .jsonl"
        )
    for number, row in enumerate(rows, start=1):
        yield _object(path, row, f"row {number}")


def _parsed(path: Path, text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        position = getattr(error, "pos", 0)
        raise DataError(
            f"{path}: {where} is not valid JSON (character {position})", fix="export the table again"
        ) from None


def _object(path: Path, row: object, where: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{path}: {where} is not a JSON object", fix='write rows as {"column": "value", ...}')
    return row


def _parquet_rows(path: Path, columns: list[str]) -> Iterator[Mapping[str, Any]]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise DataError(
            f"{path}: reading Parquet needs the package pyarrow",
            fix="`pip install pyarrow`, or export the table as CSV or JSONL",
        ) from None
    try:
        table = parquet.ParquetFile(path)
        known = set(table.schema_arrow.names)
        for batch in table.iter_batches(columns=[name for name in columns if name in known]):
            yield from batch.to_pylist()
    except pa.ArrowInvalid:
        raise DataError(f"{path}: not a valid Parquet file", fix="export the table again") from None


def _text(path: Path, value: object, name: str, number: int) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, (bool, int, float)):
        return str(value)
    raise DataError(
        f"{path}: row {number}, column {name!r} holds a nested value", fix="use a column of text or numbers"
    )


def _missing(path: Path, name: str, row: Mapping[str, Any], number: int) -> DataError:
    known = ", ".join(sorted(str(key) for key in row)[:20])
    return DataError(
        f"{path}: row {number} has no column {name!r}",
        fix=f"correct the column in [data] of site.toml; the table has: {known}",
    )
