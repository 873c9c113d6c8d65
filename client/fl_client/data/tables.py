"""Read a site's table (CSV, JSONL, JSON, Parquet) into columns of text, as table programs export them.

A byte order mark decides the encoding (UTF-8, UTF-16); without one it is UTF-8 unless the site says another. The
separator of a CSV file is the one under which its header names the wanted columns. No value of a row ever appears in
an error or a log line: messages name the file, the row's number and the column.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from fl_client.site.config import UTF_8
from fl_shared.errors import DataError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
MAX_FIELD_CHARACTERS = 1_000_000
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_OTHER_KINDS = (
    (b"\x1f\x8b", "is compressed with gzip", "decompress it: gunzip FILE"),
    (b"PK\x03\x04", "is a ZIP file, as .xlsx and .ods are", "export the sheet as CSV (UTF-8)"),
    (b"\xd0\xcf\x11\xe0", "is an old Excel file (.xls)", "export the sheet as CSV (UTF-8)"),
    (b"PAR1", "is a Parquet file", "end its name in .parquet"),
    (b"SQLite format 3", "is an SQLite database", "export the table as CSV (UTF-8)"),
)
_BLANK = " \t\r\n\x1a\ufeff"  # \x1a: how DOS programs end a text
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
    cells: dict[str, list[str]] = {name: [] for name in columns}
    try:
        for number, row in enumerate(_rows(path, columns, encoding), start=1):
            for name in columns:
                if name not in row:
                    raise _missing(path, name, row, number)
                cells[name].append(_text(path, row[name], name, number))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file", fix="correct [data] path in site.toml") from None
    except UnicodeError:
        raise _undecodable(path, encoding) from None
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror or 'cannot be read'}", fix="check the file's owner and mode"
        ) from None
    if columns and not cells[columns[0]]:
        raise DataError(f"{path}: the table has no rows", fix="check that the export is complete")
    return cells


def _undecodable(path: Path, encoding: str) -> DataError:
    marked = _marked(path)
    if marked is not None:
        return DataError(f"{path} is no {marked.upper()} text, as its first bytes say", fix="export the table again")
    fix = 'save the table as UTF-8, or name its encoding in [data], e.g. encoding = "cp1252" for Western Windows'
    if encoding != UTF_8:
        fix = "save the table as UTF-8 and take encoding out of [data], or name the one that it has"
    return DataError(f"{path} is not {encoding.upper()} text", fix=fix)


def _rows(path: Path, columns: list[str], encoding: str) -> Iterator[Mapping[str, Any]]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet_rows(path, columns)
    if suffix == ".jsonl":
        return _jsonl_rows(path, encoding)
    if suffix == ".json":
        return _json_rows(path, encoding)
    return _csv_rows(path, columns, encoding, "\t" if suffix == ".tsv" else ",")


def _marked(path: Path) -> str | None:
    """The encoding that the file's byte order mark names; DataError for what is no text at all."""
    with path.open("rb") as handle:
        start = handle.read(16)
    for magic, kind, fix in _OTHER_KINDS:
        if start.startswith(magic):
            raise DataError(f"{path} {kind}", fix=fix)
    if start[:2] == codecs.BOM_UTF16_LE and start[2:4] == b"\0\0":
        raise DataError(f"{path} is UTF-32 text", fix="save the table as UTF-8")
    return next((name for mark, name in _MARKS if start.startswith(mark)), None)


def _open(path: Path, encoding: str) -> TextIO:
    """The file as text, line ends as they are; its byte order mark wins over `encoding`."""
    return path.open(encoding=_marked(path) or encoding, newline="")


def _require_encoding(path: Path, encoding: str) -> None:
    """DataError for UTF-8 text that would be read, letter by letter, as another encoding."""
    if _marked(path) is not None or not _one_byte(encoding):
        return
    decoder = codecs.getincrementaldecoder(UTF_8)()
    ascii_alone = True
    with path.open("rb") as handle:
        while part := handle.read(1 << 20):
            ascii_alone = ascii_alone and part.isascii()
            try:
                decoder.decode(part)
            except UnicodeDecodeError:
                return
    if not ascii_alone:
        raise DataError(f"{path} is UTF-8 text, and [data] encoding is {encoding!r}", fix="take encoding out of [data]")


def _one_byte(encoding: str) -> bool:
    """Whether the encoding has a letter for each byte, so that any text can be read as such."""
    try:
        return len("é".encode(encoding)) == 1
    except (UnicodeError, LookupError):
        return False


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
    """The separator that Excel's line `sep=;` names, if there is one, and the lines from the header on."""
    lines = itertools.dropwhile(lambda line: not line.strip(_BLANK), _lines(path, handle))
    first = next(lines, "")
    match = _SEPARATOR_LINE.fullmatch(first)
    return (match.group(1), lines) if match else (None, itertools.chain([first] if first else [], lines))


def _separator(path: Path, columns: Sequence[str], encoding: str, usual: str) -> str:
    """The separator under which the header names most of the columns; the file ending's own wins a tie."""
    best, most = usual, -1
    for candidate in (usual, *(separator for separator in _SEPARATORS if separator != usual)):
        with _open(path, encoding) as handle:
            named, lines = _csv_lines(path, handle)
            if named is not None:
                return named
            try:
                header = next(csv.reader(lines, delimiter=candidate, strict=True), [])
                named_columns = len(set(columns).intersection(name.strip(_BLANK) for name in header))
            except csv.Error:
                continue
        if named_columns > most:
            best, most = candidate, named_columns
        if named_columns == len(set(columns)):
            break
    return best


def _csv_rows(path: Path, columns: list[str], encoding: str, usual: str) -> Iterator[Mapping[str, Any]]:
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    _require_encoding(path, encoding)
    separator = _separator(path, columns, encoding, usual)
    with _open(path, encoding) as handle:
        reader = csv.reader(_csv_lines(path, handle)[1], delimiter=separator, strict=True)
        try:
            header = next(reader, None)
            if header is None:
                return
            header = [name.strip(_BLANK) for name in header]
            while header and not header[-1]:  # exports leave empty columns at the right
                header.pop()
            named = [name for name in header if name]  # and an index without a name at the left
            if len(set(named)) != len(named):
                raise DataError(f"{path}: two columns have the same name", fix="rename one in the header line")
            for name in columns:
                if name not in header:
                    raise _unnamed(path, name, header)
            for number, fields in enumerate(reader, start=1):
                if not fields or (len(header) > 1 and len(fields) == 1 and not fields[0].strip(_BLANK)):
                    continue
                while len(fields) > len(header) and not fields[-1]:
                    fields.pop()
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
        text = "".join(_lines(path, handle))
    lines = text.strip(_BLANK).splitlines()
    if len(lines) > 1 and _is_object(lines[0]):
        raise DataError(f"{path} holds one JSON object a line", fix="end its name in .jsonl")
    rows = _parsed(path, text, "the file")
    if not isinstance(rows, list):
        raise DataError(f"{path}: not a JSON list of objects", fix="write one object per row in a list, or use .jsonl")
    for number, row in enumerate(rows, start=1):
        yield _object(path, row, f"row {number}")


def _parsed(path: Path, text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_fields)
    except KeyError:
        raise DataError(
            f"{path}: {where} has a column twice", fix="export the table again, each column under a name of its own"
        ) from None
    except (ValueError, RecursionError) as error:
        position = getattr(error, "pos", 0)
        raise DataError(
            f"{path}: {where} is not valid JSON (character {position})", fix="export the table again"
        ) from None


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's fields; KeyError when a name comes twice, of which one value would be lost."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise KeyError
    return fields


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _object(path: Path, row: object, where: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise DataError(
            f"{path}: {where} is not a JSON object",
            fix='write rows as {"column": "value", ...}; a list of all rows is a .json file',
        )
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
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
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


def _unnamed(path: Path, name: str, header: Sequence[str]) -> DataError:
    """What to raise for a first line that does not name a column. It may be a record: only what is like it is shown."""
    near = [
        column
        for column in header
        if column and difflib.SequenceMatcher(None, column.lower(), name.lower()).ratio() > 0.8
    ]
    meant = f"did you mean {near[0]!r}?" if near else "its first line must name the columns"
    return DataError(
        f"{path}: the first line names {len(header)} columns, and none of them is {name!r}",
        fix=f"correct the column in [data] of site.toml, or the table: {meant}",
    )
