"""Any bytes as a private table: columns of text of one length, or a DataError with a fix."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fl_client.data.load import load_unit_data
from fl_client.data.tables import read_columns
from fl_client.site.config import DataConfig
from fl_client.tasks.classification import Classification
from fl_client.tasks.task import usable
from fl_shared.errors import ConcordatError, DataError

ENDINGS = st.sampled_from(["csv", "tsv", "jsonl", "json"])
ENCODINGS = st.sampled_from(["utf-8", "utf-16-le", "cp1252", "utf-7", "idna", "punycode", "unicode_escape"])
PIECES = [
    b"id", b"text", b"label", b",", b";", b"\t", b"|", b"\n", b"\r", b"\r\n", b'"', b'""', b"\0", b"\xef\xbb\xbf",
    b"\xff\xfe", b"\xfe\xff", b"sep=;", b"1", b"1.0", b"001", b"NaN", b"nan", b"1e999", b"true", b"null", b"{", b"}",
    b"[", b"]", b":", b'"id":', b'"text":', b'"label":', b"\\ud800", b"\xe4", b"\xc3\xa4", b" ", b"a",
    b'{"id": 1, "text": "a", "label": "S"}', b"id,text,label\n", b"1,a,S\n",
]  # fmt: skip
CONTENT = st.one_of(st.binary(max_size=200), st.lists(st.sampled_from(PIECES), max_size=40).map(b"".join))


def told(error: ConcordatError) -> None:
    """A refusal says the next step."""
    assert error.fix


@given(content=CONTENT, ending=ENDINGS, encoding=ENCODINGS)
@example(content=b"[" * 100_000, ending="json", encoding="utf-8")
@example(content=b'{"id": 1' + b"0" * 5000 + b"}", ending="jsonl", encoding="utf-8")
@example(content=b'{"id": 1, "text": "\\ud800", "label": "S"}', ending="jsonl", encoding="utf-8")
@example(content=b"id\x00text", ending="csv", encoding="utf-8")
def test_any_bytes_are_columns_or_a_data_error(content: bytes, ending: str, encoding: str, tmp_path: Path) -> None:
    """Whatever the ending and the declared encoding say."""
    path = tmp_path / f"t.{ending}"
    path.write_bytes(content)
    try:
        found = read_columns(path, ["id", "text", "label"], encoding)
    except DataError as error:
        told(error)
        return
    assert len({len(values) for values in found.values()}) == 1
    for values in found.values():
        for value in values:
            value.encode("utf-8")


@given(content=CONTENT, ending=ENDINGS, unit=st.booleans(), limit=st.integers(1, 3))
@example(content=b"id,text,label\n" + b"9" * 5000 + b".0,a,S\n", ending="csv", unit=True, limit=1)
def test_any_bytes_are_units_or_a_data_error(
    content: bytes, ending: str, unit: bool, limit: int, tmp_path: Path
) -> None:
    """Every record has a unit, every unit at most so many; a run's labels leave a part of them."""
    path, key = tmp_path / f"t.{ending}", tmp_path / "key"
    path.write_bytes(content)
    key.write_text("ab" * 32)
    config = DataConfig("d", path, ("text",), "label", "id", "patient", limit, None, public=False, holdout=0.0)
    if not unit:
        config = dataclasses.replace(config, unit_column=None, privacy_unit="record", max_records_per_unit=1)
    try:
        data = load_unit_data(config, key)
    except DataError as error:
        told(error)
        return
    assert all(len(own) <= (limit if unit else 1) for own in data.records_by_unit())
    assert set(usable(Classification(("S", "1", "true"), 8), data).labels) <= {"S", "1", "true"}


def test_the_pieces_do_reach_the_inside(tmp_path: Path) -> None:
    """The corpus is not refused at the door: its last two pieces are a table."""
    (tmp_path / "t.csv").write_bytes(PIECES[-2] + PIECES[-1])
    assert read_columns(tmp_path / "t.csv", ["id"]) == {"id": ["1"]}
    (tmp_path / "t.csv").write_bytes(b"")
    with pytest.raises(DataError):
        read_columns(tmp_path / "t.csv", ["id"])
