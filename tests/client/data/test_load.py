"""From a table to units: what is used, what is left out, and what the fingerprint shows."""

from __future__ import annotations

import csv
import dataclasses
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_client.data.load import load_unit_data, most_units
from fl_client.site.config import DataConfig
from fl_client.tasks.classification import Classification
from fl_client.tasks.task import usable
from fl_shared.errors import DataError

TABLE = """patient,age,note,label
p1,40,broken arm,S
p2,50,cough,J
p1,41,broken leg,S
p1,42,sprain,T
p3,60,,J
p2,51,flu,
p4,70,fever,R
"""


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """A fingerprint key."""
    path = tmp_path / "fingerprint.key"
    path.write_text("ab" * 32)
    return path


def config_of(path: Path, **changes: object) -> DataConfig:
    """[data] for the table at `path`, one patient a unit."""
    made = DataConfig("records", path, ("note",), "label", "patient", "patient", 2, None, public=False, holdout=0.0)
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """The table above."""
    path = tmp_path / "t.csv"
    path.write_text(TABLE)
    return path


def test_rows_of_one_patient_share_a_unit_and_are_bounded(table: Path, key: Path) -> None:
    """The third row of p1 is not used; rows without text or label are left out; p3 has no usable row."""
    data = load_unit_data(config_of(table), key)
    assert data.texts == ("broken arm", "cough", "broken leg", "fever")
    assert data.labels == ("S", "J", "S", "R")
    assert data.unit_of_record.tolist() == [0, 1, 0, 2]
    assert data.units == 3


def test_every_record_is_its_own_unit_when_the_unit_is_the_record(table: Path, key: Path) -> None:
    """Without a unit column units are records."""
    data = load_unit_data(config_of(table, unit_column=None, privacy_unit="record"), key)
    assert data.unit_of_record.tolist() == list(range(5))
    assert data.units == 5


def test_several_text_columns_are_joined_with_their_names(table: Path, key: Path) -> None:
    """Empty parts are left out."""
    data = load_unit_data(config_of(table, text_columns=("age", "note")), key)
    assert data.texts[:3] == ("age: 40; note: broken arm", "age: 50; note: cough", "age: 41; note: broken leg")
    assert "age: 60" in data.texts


def test_a_row_without_its_patient_is_refused(table: Path, key: Path) -> None:
    """It could not be protected together with the patient's other rows."""
    table.write_text(TABLE.replace("p4,", ","))
    with pytest.raises(DataError, match="row 7 has no 'patient'"):
        load_unit_data(config_of(table), key)


def test_a_table_without_usable_rows_is_refused(table: Path, key: Path) -> None:
    """Nothing to train on is an error at start, not in the first round."""
    table.write_text("patient,age,note,label\np1,1,,S\n")
    with pytest.raises(DataError, match="no row"):
        load_unit_data(config_of(table), key)


def test_the_fingerprint_changes_with_the_data_and_with_the_key(table: Path, key: Path) -> None:
    """Same data, same key: same fingerprint. One character or another key: another one."""
    first = load_unit_data(config_of(table), key).fingerprint
    assert load_unit_data(config_of(table), key).fingerprint == first
    key.write_text("cd" * 32)
    assert load_unit_data(config_of(table), key).fingerprint != first
    key.write_text("ab" * 32)
    table.write_text(TABLE.replace("cough", "couch"))
    assert load_unit_data(config_of(table), key).fingerprint != first
    key.write_text("no hex")
    with pytest.raises(DataError, match=r"fingerprint\.key"):
        load_unit_data(config_of(table), key)


def test_a_round_figure_for_the_units_may_not_be_far_below_them(tmp_path: Path, key: Path) -> None:
    """The rounding of so many is paid for: a figure that more than four times as many outnumber is refused."""
    path = tmp_path / "many.csv"
    path.write_text("patient,note,label\n" + "".join(f"p{number}x,cough,X\n" for number in range(9)))
    assert load_unit_data(config_of(path, expected_units=3), key).units == 9
    assert most_units(config_of(path, expected_units=3), 9) == most_units(config_of(path, expected_units=3), 8) == 12
    with pytest.raises(DataError, match="more than 4 times as many units as"):
        load_unit_data(config_of(path, expected_units=2), key)


@given(
    rows=st.lists(
        st.tuples(st.sampled_from("abcd"), st.sampled_from(["t", "u", ""]), st.sampled_from("XYZ")), min_size=1
    ),
    gone=st.sampled_from("abcd"),
)
@settings(max_examples=60, deadline=None)
def test_removing_one_unit_changes_nothing_about_the_others(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, str]], gone: str
) -> None:
    """Neighbouring tables give neighbouring unit data: every other unit keeps exactly its records."""
    directory = tmp_path_factory.mktemp("units")
    (directory / "k").write_text("00" * 32)

    def units(kept: list[tuple[str, str, str]]) -> list[list[tuple[str, str]]]:
        path = directory / "t.csv"
        path.write_text("patient,note,label\n" + "".join(f"{p},{t},{label}\n" for p, t, label in kept))
        try:
            data = usable(Classification(("X", "Y"), 8), load_unit_data(config_of(path), directory / "k"))
        except DataError:
            return []
        assert all(label in "XY" for label in data.labels)
        return sorted([(data.texts[i], data.labels[i]) for i in own] for own in data.records_by_unit())

    alone = units([row for row in rows if row[0] == gone])
    others = units([row for row in rows if row[0] != gone])
    assert units(rows) == sorted(alone + others)


def test_the_same_data_have_the_same_fingerprint_in_another_order(table: Path, key: Path) -> None:
    """Rows and columns in another order, fewer rows a patient, another unit: the same. A row less: another one."""
    both = {"text_columns": ("age", "note")}
    first = load_unit_data(config_of(table, **both), key).fingerprint
    lines = TABLE.splitlines()
    table.write_text("\n".join([lines[0], *reversed(lines[1:])]) + "\n")
    assert load_unit_data(config_of(table, **both), key).fingerprint == first
    table.write_text("\n".join(",".join(line.split(",")[::-1]) for line in lines) + "\n")
    assert load_unit_data(config_of(table, text_columns=("note", "age")), key).fingerprint == first
    assert load_unit_data(config_of(table, **both, max_records_per_unit=1), key).fingerprint == first
    assert load_unit_data(config_of(table, **both, unit_column=None, privacy_unit="record"), key).fingerprint == first
    table.write_text("\n".join(lines[:-1]) + "\n")
    assert load_unit_data(config_of(table, **both), key).fingerprint != first


def test_the_same_data_have_the_same_fingerprint_in_another_export(tmp_path: Path, key: Path) -> None:
    """Other column names, encoding, line ends, Unicode forms, case and numbers' writing; rows twice."""
    long = "Große Übelkeit nach dem Essen,\nseit Tagen Fieber, Müdigkeit und Husten; kein Schmerz"
    rows = [("p1", long, "1"), ("p2", "Husten", "True")]

    def of(name: str, columns: tuple[str, str, str], rows: list[tuple[str, str, str]], encoding: str) -> str:
        path = tmp_path / name
        with path.open("w", newline="", encoding=encoding) as sink:
            writer = csv.writer(sink, lineterminator="\n" if encoding == "utf-8" else "\r\n")
            writer.writerows([columns, *rows])
        patient, note, label = columns
        named = {"unit_column": patient, "text_columns": (note,), "label_column": label}
        return load_unit_data(config_of(path, **named), key).fingerprint

    first = of("a.csv", ("patient", "note", "label"), rows, "utf-8")
    other = [
        ("7", unicodedata.normalize("NFD", long.replace("\n", "\r\n")), "1.0"), ("8", "HUSTEN ", "TRUE"),
        ("8", "HUSTEN ", "TRUE"),
    ]  # fmt: skip
    assert of("b.csv", ("pid", "text", "code"), other, "utf-8-sig") == first
    assert of("c.csv", ("pid", "text", "code"), [*rows[:1], ("p2", "Husten!", "True")], "utf-8") != first
