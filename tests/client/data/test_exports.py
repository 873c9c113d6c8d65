"""Tables as table programs export them: separators, encodings, marks, line ends, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fl_client.data.tables import read_columns
from fl_shared.errors import DataError

WANTED = {"text": ["Grüße; 1,5 mg", "zwei\nZeilen", "=1+2"], "label": ["S", "T", "1.000,5"]}
ROWS = list(zip(*WANTED.values(), strict=True))


def delimited(separator: str, end: str = "\r\n") -> str:
    """The rows, every field quoted, with a column in front that nobody asks for."""
    lines = [("n", "text", "label"), *((str(n), *row) for n, row in enumerate(ROWS))]
    return "".join(separator.join(f'"{field}"' for field in line) + end for line in lines)


@pytest.mark.parametrize("ending", ["csv", "tsv"])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"])
@pytest.mark.parametrize("end", ["\r\n", "\n", "\r"], ids=["crlf", "lf", "cr"])
def test_separator_encoding_and_line_ends(ending: str, separator: str, encoding: str, end: str, tmp_path: Path) -> None:
    """The separator is found by the header; marks win over the setting; without one the encoding is named."""
    path = tmp_path / f"t.{ending}"
    path.write_bytes(delimited(separator, end).encode(encoding))
    named = encoding if encoding in ("utf-16-le", "utf-16-be", "cp1252") else "utf-8"
    assert read_columns(path, ["text", "label"], named) == WANTED
    if named == "utf-8":
        assert read_columns(path, ["text", "label"], "cp1252" if encoding != "utf-8" else "utf-8") == WANTED


@pytest.mark.parametrize("first", ["sep=;\r\n", '"sep=;"\r\n', "SEP=;\n"])
def test_excels_separator_line_is_followed(first: str, tmp_path: Path) -> None:
    """It is no header."""
    path = tmp_path / "t.csv"
    path.write_text(first + "text;label\na,b;S\n", newline="")
    assert read_columns(path, ["text", "label"]) == {"text": ["a,b"], "label": ["S"]}


def test_the_endings_own_separator_is_kept_where_it_fits(tmp_path: Path) -> None:
    """A header name that holds a semicolon does not change how a comma file is read; nor does a comma in a text."""
    path = tmp_path / "t.csv"
    path.write_text("text,label,a;text;label\nx;y,S,1\n")
    assert read_columns(path, ["text", "label"]) == {"text": ["x;y"], "label": ["S"]}
    path.write_text("text;label\na,b;S\nc;T\n")
    assert read_columns(path, ["text"]) == {"text": ["a,b", "c"]}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-8"])
@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_json_with_a_byte_order_mark(ending: str, encoding: str, tmp_path: Path) -> None:
    """As Windows programs write it."""
    rows = [dict(zip(WANTED, row, strict=True)) for row in ROWS]
    path = tmp_path / f"t.{ending}"
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_bytes((lines if ending == "jsonl" else json.dumps(rows, ensure_ascii=False)).encode(encoding))
    assert read_columns(path, list(WANTED)) == WANTED


def test_rows_of_separators_alone_and_columns_without_a_name_are_what_exports_leave(tmp_path: Path) -> None:
    """Empty columns at the right and empty rows at the end are no fault."""
    path = tmp_path / "t.csv"
    path.write_text("text;label;;\na;S;;\n\n;;;\n")
    assert read_columns(path, ["text", "label"]) == {"text": ["a", ""], "label": ["S", ""]}


REFUSED: dict[str, tuple[str, bytes, str]] = {
    "cp1252 unsaid": ("t.csv", "text,label\nSECRET Grüße,S\n".encode("cp1252"), "is not UTF-8 text"),
    "utf-16 without a mark": ("t.csv", "text,label\nSECRET,S\n".encode("utf-16-le"), "line 1 holds a NUL"),
    "utf-32": ("t.csv", "text,label\nSECRET,S\n".encode("utf-32"), "UTF-32"),
    "half of utf-16": ("t.csv", "text,label\nSECRET,S\n".encode("utf-16")[:-1], "is no UTF-16 text"),
    "a NUL": ("t.csv", b"text,label\nSEC\0RET,S\n", "line 2 holds a NUL"),
    "a NUL in JSON": ("t.jsonl", b'{"text": "SEC\0RET", "label": "S"}\n', "line 1 holds a NUL"),
    "a header twice": ("t.csv", b"text;label;label\nSECRET;S;T\n", "two columns have the same name"),
    "a ragged row": ("t.csv", b"text;label\na;S\nSECRET\n", "row 2 has 1 fields, the header has 2"),
    "a decimal comma": ("t.csv", b"text,label\nSECRET,1,5\n", "row 1 has 3 fields, the header has 2"),
    "a cell past the limit": ("t.csv", b'text,label\n"' + b"SECRET" * 200_000 + b'",S\n', "not valid CSV"),
    "nothing": ("t.csv", b"\xef\xbb\xbf", "no rows"),
    "a header alone": ("t.csv", b"text;label\r\n", "no rows"),
    "an open quote": ("t.csv", b'text;label\n"SECRET;S\n', "not valid CSV"),
    "brackets": ("t.jsonl", b"[" * 200_000 + b"\n", "line 1 is not valid JSON"),
    "endless digits": ("t.jsonl", b'{"text": ' + b"7" * 5000 + b', "label": "S"}\n', "line 1 is not valid JSON"),
    "half a character": ("t.jsonl", b'{"text": "SECRET \\ud800", "label": "S"}\n', "row 1, column 'text' holds half"),
    "the wrong columns": ("t.csv", b"note;class\nSECRET;S\n", "none of them is 'text'"),
    "no header": ("t.csv", b"SECRET,S\nSECRET,T\n", "names 2 columns, and none of them is 'text'"),
    "a title": ("t.csv", b"SECRET of ward 3,,\ntext,label\na,S\n", "names 1 columns"),
    "a value without a name": ("t.csv", b"text;label;\na;S;\nb;1;SECRET\n", "row 2 has 3 fields, the header has 2"),
    "gzip": ("t.csv", b"\x1f\x8bSECRET", "compressed with gzip"),
    "a zip": ("t.csv", b"PK\x03\x04SECRET", ".xlsx"),
    "old Excel": ("t.tsv", b"\xd0\xcf\x11\xe0SECRET", "old Excel"),
    "Parquet": ("t.csv", b"PAR1SECRET", "is a Parquet file"),
    "SQLite": ("t.csv", b"SQLite format 3\0SECRET", "SQLite"),
    "lines in .json": ("t.json", b'{"text": "SECRET", "label": "S"}\n{"text": "b", "label": "T"}\n', "object a line"),
    "a list in .jsonl": ("t.jsonl", b'[{"text": "SECRET", "label": "S"}]\n', "line 1 is not a JSON object"),
    "a key twice": ("t.jsonl", b'{"text": "SECRET", "text": "b", "label": "S"}\n', "line 1 has a column twice"),
    "a key twice in a list": ("t.json", b'[{"text": "SECRET", "label": "S", "label": "T"}]', "has a column twice"),
    "a zip by name": ("t.xlsx", b"PK\x03\x04SECRET", "ending '.xlsx'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_by_name_and_without_a_value(case: str, tmp_path: Path) -> None:
    """File and row are named, with the next step; what stands in a row is not."""
    name, content, message = REFUSED[case]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_columns(path, ["text", "label"])
    assert message in caught.value.message
    assert caught.value.fix
    assert "SECRET" not in caught.value.message + caught.value.fix


def test_what_spreadsheets_leave_about_header_and_rows_is_no_fault(tmp_path: Path) -> None:
    """Blanks about names, a second mark, blank lines, a separator more at the end, DOS's last byte."""
    path = tmp_path / "t.csv"
    for content in (
        " text ;label\t;n\r\na;S;1\r\nb;T;2\r\n", "\ufefftext;label;n\na;S;1\nb;T;2\n",
        "\n  \ntext;label;n\na;S;1\nb;T;2\n",
        "text;label;n\na;S;1\n   \nb;T;2\n\x1a", "text;label;n;\na;S;1\nb;T;2\n", "text;label;n\na;S;1;\nb;T;2;;\n",
    ):  # fmt: skip
        path.write_bytes(b"\xef\xbb\xbf" + content.encode())
        assert read_columns(path, ["text", "label"]) == {"text": ["a", "b"], "label": ["S", "T"]}


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "iso8859-15", "mac_roman", "cp437"])
def test_text_in_utf8_is_not_read_as_letters_of_another_encoding(encoding: str, tmp_path: Path) -> None:
    """Umlauts would become two letters each, in labels too; text that reads alike in both is taken."""
    path = tmp_path / "t.csv"
    path.write_text("text,label\nHerz,Kreisläufe\n", encoding="utf-8")
    with pytest.raises(DataError, match="is UTF-8 text") as caught:
        read_columns(path, ["text"], encoding)
    assert "take encoding out" in caught.value.fix
    path.write_text("text,label\nHerz,Kreislauf\n")
    assert read_columns(path, ["label"], encoding) == {"label": ["Kreislauf"]}
    path.write_bytes(b"text,label\nHerz,\x84\xe4\n")
    assert read_columns(path, ["text"], encoding) == {"text": ["Herz"]}


def test_a_first_line_is_shown_as_far_as_it_is_like_what_was_asked(tmp_path: Path) -> None:
    """It may be a record."""
    path = tmp_path / "t.csv"
    path.write_text("Text,SECRET\na,S\n")
    with pytest.raises(DataError) as caught:
        read_columns(path, ["text"])
    assert "did you mean 'Text'?" in caught.value.fix
    assert "SECRET" not in caught.value.message + caught.value.fix


def test_a_cell_just_below_the_limit_is_read(tmp_path: Path) -> None:
    """999,999 characters."""
    path = tmp_path / "t.csv"
    path.write_text("text,label\n" + "x" * 999_999 + ",S\n")
    assert len(read_columns(path, ["text"])["text"][0]) == 999_999
