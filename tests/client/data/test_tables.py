"""Reading private tables: every form, every fault named by row and column, never by value."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_client.data.tables import read_columns
from fl_shared.errors import DataError

ROWS = [{"text": "broken, arm", "label": "S"}, {"text": 'said "ouch"\nthen left', "label": "T"}]


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    """Write the rows in the form that the ending asks for."""
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as sink:
            writer = csv.DictWriter(sink, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    else:
        path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".json"])
def test_every_form_gives_the_same_columns(tmp_path: Path, ending: str) -> None:
    """Quotes, commas and line breaks inside a field survive."""
    found = read_columns(write(tmp_path / f"t{ending}", ROWS), ["label", "text"])
    assert found == {"label": ["S", "T"], "text": [row["text"] for row in ROWS]}


@given(st.lists(st.tuples(st.text(st.characters(codec="utf-8", exclude_characters="\0\r")), st.text("ab")), min_size=1))
@settings(max_examples=50, deadline=None)
def test_any_text_survives_csv(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]) -> None:
    """What the csv module writes is read back unchanged."""
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    write(path, [{"text": text, "label": label} for text, label in rows])
    assert read_columns(path, ["text"])["text"] == [text for text, _ in rows]


def test_numbers_and_missing_values_become_text(tmp_path: Path) -> None:
    """JSON numbers are written as Python writes them; null is empty."""
    path = tmp_path / "t.jsonl"
    path.write_text('{"a": 1.5, "b": null}\n{"a": 2, "b": true}\n')
    assert read_columns(path, ["a", "b"]) == {"a": ["1.5", "2"], "b": ["", "True"]}


FAULTS = {
    "no header field": ("t.csv", "text,x\nSECRET,1\n", "none of them is 'label'"),
    "short row": ("t.csv", "text,label\nSECRET\n", "row 1 has 1 fields, the header has 2"),
    "long row": ("t.csv", "text,label\na,b\nSECRET,b,c\n", "row 2 has 3 fields"),
    "twice": ("t.csv", "text,text\nSECRET,b\n", "same name"),
    "open quote": ("t.csv", 'text,label\n"SECRET,b\n', "not valid CSV"),
    "empty": ("t.csv", "", "no rows"),
    "header alone": ("t.csv", "text,label\n", "no rows"),
    "bad json": ("t.jsonl", '{"text": "SECRET"\n', "line 1 is not valid JSON"),
    "no object": ("t.jsonl", '["SECRET"]\n', "line 1 is not a JSON object"),
    "no list": ("t.json", '{"text": "SECRET"}', "not a JSON list"),
    "nested": ("t.json", '[{"text": ["SECRET"], "label": "x"}]', "row 1, column 'text' holds a nested value"),
    "unknown ending": ("t.xlsx", "SECRET", "ending '.xlsx'"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_each_fault_is_named_without_its_value(tmp_path: Path, case: str) -> None:
    """The message names file, row and column; the private value is not in it."""
    name, content, message = FAULTS[case]
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError) as failure:
        read_columns(path, ["text", "label"])
    assert message in failure.value.message
    assert "SECRET" not in failure.value.message + failure.value.fix
    assert failure.value.fix


def test_bytes_that_are_no_utf8_are_refused(tmp_path: Path) -> None:
    """A table in another encoding names the byte."""
    path = tmp_path / "t.csv"
    path.write_bytes(b"text,label\n\xff\xfe,b\n")
    with pytest.raises(DataError, match="UTF-8"):
        read_columns(path, ["text"])


def test_a_missing_file_and_a_directory_are_refused(tmp_path: Path) -> None:
    """Both are data errors with a fix."""
    with pytest.raises(DataError, match="no such file"):
        read_columns(tmp_path / "none.csv", ["text"])
    (tmp_path / "d.csv").mkdir()
    with pytest.raises(DataError, match="directory"):
        read_columns(tmp_path / "d.csv", ["text"])


def test_parquet_needs_its_package_or_is_read(tmp_path: Path) -> None:
    """With pyarrow the columns come back; without it the error names the package."""
    path = tmp_path / "t.parquet"
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        path.write_bytes(b"PAR1")
        with pytest.raises(DataError, match="pyarrow"):
            read_columns(path, ["text"])
        return
    parquet.write_table(pa.Table.from_pylist(ROWS), path)
    assert read_columns(path, ["label"]) == {"label": ["S", "T"]}
