"""Read a site's table (CSV, JSONL, JSON, Parquet) into columns of text, as table programs export them.

A byte order mark decides the encoding (UTF-8, UTF-16); without one it is UTF-8 unless the site says another. The
separator of a CSV file is the one under which its header names the wanted columns. No value of a row ever appears in
an error or a log line: messages name the file, the row's number and the column.
"""

from __future__ import annotations

import codecs
import csv
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from fl_shared.errors import DataError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
MAX_FIELD_CHARACTERS = 1_000_000
UTF_8 = "utf-8"
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_SEPARATORS = (",", ";", "\t", "|")
_SEPARATOR_LINE = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)  # Excel's first line


def read_columns(path: Path, columns: list[str], encoding: str = UTF_8) -> dict[str, list[str]]:
    """Return the named columns of the table at `path`, each a list with one text per row.

    A missing value, JSON's NaN among them, becomes "". Numbers are written as Python writes them.

    Args:
        path: the ending says which form it has.
        columns: their names.
        encoding: of a file without a byte order mark.

    Raises:
        DataError: the file cannot be read, has another form, or lacks a column.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"{path}: the ending {path.suffix!r} is not a known table",
            fix=f"export it as one of {', '.join(SUFFIXES)}",
        )
    found: dict[str, list[str]] = {name: [] for name in columns}
    try:
        for number, row in enumerate(_rows(path, columns, encoding), start=1):
            for name in columns:
                if name not in row:
                    raise _missing(path, name, row, number)
                found[name].append(_text(path, row[name], name, number))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file", fix="correct [data] path in site.toml") from None
    except UnicodeError:
        raise DataError(
            f"{path} is not {encoding.upper()} text",
            fix='save the table as UTF-8, or name its encoding in [data], e.g. encoding = "cp1252" for Western Windows',
        ) from None
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror or 'cannot be read'}", fix="check the file's owner and mode"
        ) from None
    if columns and not found[columns[0]]:
        raise DataError(f"{path}: the table has no rows", fix="check that the export is complete")
    return found


def _rows(path: Path, columns: list[str], encoding: str) -> Iterator[Mapping[str, Any]]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet_rows(path, columns)
    if suffix == ".jsonl":
        return _jsonl_rows(path, encoding)
    if suffix == ".json":
        return _json_rows(path, encoding)
    return _csv_rows(path, columns, encoding, "\t" if suffix == ".tsv" else ",")


def _open(path: Path, encoding: str) -> TextIO:
    """The file as text, line ends as they are; its byte order mark wins over `encoding`."""
    with path.open("rb") as handle:
        start = handle.read(4)
    if start[:2] == codecs.BOM_UTF16_LE and start[2:] == b"\0\0":
        raise DataError(f"{path} is UTF-32 text", fix="save the table as UTF-8")
    known = next((name for mark, name in _MARKS if start.startswith(mark)), encoding)
    return path.open(encoding=known, newline="")


def _lines(path: Path, handle: TextIO) -> Iterator[str]:
    """The lines, none with a NUL character: that is UTF-16 read as UTF-8, or no text at all."""
    for number, line in enumerate(handle, start=1):
        if "\0" in line:
            raise DataError(
                f"{path}: line {number} holds a NUL character",
                fix='save the table as UTF-8, or write encoding = "utf-16-le" in [data] if that is what it is',
            )
        yield line


def _csv_lines(path: Path, handle: TextIO) -> tuple[str | None, Iterator[str]]:
    """The separator that Excel's line `sep=;` names, if there is one, and the lines below."""
    lines = _lines(path, handle)
    first = next(lines, "")
    match = _SEPARATOR_LINE.fullmatch(first)
    return (match.group(1), lines) if match else (None, itertools.chain([first] if first else [], lines))


def _separator(path: Path, columns: Sequence[str], encoding: str, usual: str) -> str:
    """The separator under which the header names most of the columns; the file ending's own wins a tie."""
    best, most = usual, -1
    for candidate in (usual, *(each for each in _SEPARATORS if each != usual)):
        with _open(path, encoding) as handle:
            named, lines = _csv_lines(path, handle)
            if named is not None:
                return named
            try:
                found = len(set(columns).intersection(next(csv.reader(lines, delimiter=candidate, strict=True), [])))
            except csv.Error:
                continue
        if found > most:
            best, most = candidate, found
        if found == len(set(columns)):
            break
    return best


def _csv_rows(path: Path, columns: list[str], encoding: str, usual: str) -> Iterator[Mapping[str, Any]]:
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    separator = _separator(path, columns, encoding, usual)
    with _open(path, encoding) as handle:
        reader = csv.reader(_csv_lines(path, handle)[1], delimiter=separator, strict=True)
        try:
            header = next(reader, None)
            if header is None:
                return
            named = [name for name in header if name]  # exports leave empty columns without a name
            if len(set(named)) != len(named):
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


def _jsonl_rows(path: Path, encoding: str) -> Iterator[Mapping[str, Any]]:
    with _open(path, encoding) as handle:
        for number, line in enumerate(_lines(path, handle), start=1):
            if line.strip():
                yield _object(path, _parsed(path, line, f"line {number}"), f"line {number}")


def _json_rows(path: Path, encoding: str) -> Iterator[Mapping[str, Any]]:
    with _open(path, encoding) as handle:
        rows = _parsed(path, "".join(_lines(path, handle)), "the file")
    if not isinstance(rows, list):
        raise DataError(
            f"{path}: not a JSON list of objects", fix="write one object per row in a list, or use .jsonl"
        )
    for number, row in enumerate(rows, start=1):
        yield _object(path, row, f"row {number}")


def _parsed(path: Path, text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
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
    except pa.ArrowException:
        raise DataError(f"{path}: not a valid Parquet file", fix="export the table again") from None


def _text(path: Path, value: object, name: str, number: int) -> str:
    if value is None or value != value:  # NaN is how table programs write a missing number
        return ""
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= each <= "\udfff" for each in value):
            raise DataError(
                f"{path}: row {number}, column {name!r} holds half a character", fix="export the table again as UTF-8"
            )
        return value
    if isinstance(value, (bool, int, float)):
        return str(value)
    raise DataError(
        f"{path}: row {number}, column {name!r} holds a nested value", fix="use a column of text or numbers"
    )


def _missing(path: Path, name: str, row: Mapping[str, Any], number: int) -> DataError:
    known = ", ".join(sorted(str(key)[:80] for key in row)[:20])
    return DataError(
        f"{path}: row {number} has no column {name!r}",
        fix=f"correct the column in [data] of site.toml; the table has: {known}",
    )
