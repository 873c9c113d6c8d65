"""Ids and labels as table programs write them: no patient becomes two, no label is lost without a word."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_client.data.load import load_unit_data
from fl_client.data.spellings import folded, run_labels
from fl_client.data.units import UnitData
from fl_client.site.config import DataConfig
from fl_client.tasks.classification import Classification
from fl_client.tasks.task import require_usable, usable
from fl_shared.errors import DataError


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """A fingerprint key."""
    path = tmp_path / "fingerprint.key"
    path.write_text("ab" * 32)
    return path


def config_of(path: Path, **changes: object) -> DataConfig:
    """[data] for a table with the columns patient, note and label."""
    made = DataConfig("records", path, ("note",), "label", "patient", "patient", 2, None, public=False, holdout=0.0)
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def load(path: Path, key: Path, ids: list[str]) -> UnitData:
    """A CSV table with one row for each id."""
    path.write_text("patient,note,label\n" + "".join(f'"{each}",note {n},S\n' for n, each in enumerate(ids)))
    return load_unit_data(config_of(path), key)


LOOKALIKES = [
    ("1", "1.0"), ("1", "001"), ("1.0", "001"), ("1", "1,0"), ("1", "+1"), ("1", "1."), ("-7", "-7.0"), ("0", "-0"),
    ("p1", "P1"), ("p 1", "p1"), ("p1", "p\u200b1"), ("p1", "\ufeffp1"), ("\uff11", "1"), ("\u0661", "1"),
    ("ä", "a\u0308"), ("Straße", "STRASSE"), ("77", "7\u00a07"), ("1e3", "1000"), ("1.5", "1,50"), ("0.10", "1e-1"),
    ("1.234", "1234"), ("1,234", "1234.0"), ("1'234'567", "1234567"), ("1.000", "1000"), ("1.000", "1"),
    ("'001", "1"), ('=""001""', "1"), ("{AB-1}", "ab-1"), ("(7)", "7"), ("P01", "P1"), ("2020-01-02", "2020-1-2"),
    ("\uff30\uff0d\uff10\uff11", "p-1"), ("9" * 40, "9" * 40 + "\u200d"), ("\u2019001", "1"),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), LOOKALIKES)
def test_two_spellings_of_what_may_be_one_patient_are_refused(one: str, other: str, tmp_path: Path, key: Path) -> None:
    """Neither split into two units nor merged by guess: the rows are named, the ids are not."""
    with pytest.raises(DataError) as caught:
        load(tmp_path / "t.csv", key, ["q17", one, "q18", other])
    assert "rows 2 and 4" in caught.value.message
    assert "'patient'" in caught.value.message
    assert "q17" not in caught.value.message + caught.value.fix


def test_numbers_of_two_kinds_in_json_are_refused_too(tmp_path: Path, key: Path) -> None:
    """1 and 1.0 in one JSON Lines file, and the text "1" beside the number."""
    path = tmp_path / "t.jsonl"
    for one, other in (("1", "1.0"), ('"1"', "1.0"), ("1", '"01"'), ("1e2", "100"), ("0.5", '"0.50"')):
        path.write_text("".join(f'{{"patient": {each}, "note": "x", "label": "S"}}\n' for each in (one, "2", other)))
        with pytest.raises(DataError, match="rows 1 and 3"):
            load_unit_data(config_of(path), key)


@pytest.mark.parametrize(
    "ids",
    [
        ["1", "2", "10"],
        ["1.0", "2.0", "10.0"],
        ["001", "002", "010"],
        ["1a", "1b", "1.5"],
        ["1-23", "12-3", "123"],
        ["12.05", "12.5", "125"],
        ["9" * 40, "9" * 39 + "8", "9" * 39],
        ["A1", "1A", "A-1"],
    ],
)
def test_ids_that_are_written_in_one_way_are_taken_as_they_are(ids: list[str], tmp_path: Path, key: Path) -> None:
    """Whatever the way is: the same id is the same unit, another one another."""
    data = load(tmp_path / "t.csv", key, [*ids, *ids])
    assert data.unit_of_record.tolist() == [0, 1, 2, 0, 1, 2]


MISSING = [
    "", " ", "NaN", "nan", "NULL", "<NA>", "#N/A", "NaT", "\u200b", "-nan", "-", "--", "?", ".", "'", "unknown",
    "Missing",
    "(null)", "[NULL]", "\\N", "#DIV/0!", "#NAME?", "#REF!", "inf", "-Infinity", "not available", "\u2014",
]  # fmt: skip


@pytest.mark.parametrize("word", MISSING)
def test_a_missing_id_is_refused_in_every_spelling(word: str, tmp_path: Path, key: Path) -> None:
    """Rows of several patients would be one unit under it."""
    with pytest.raises(DataError, match="row 2 has no 'patient'"):
        load(tmp_path / "t.csv", key, ["p1", word])


def test_a_missing_json_number_is_a_missing_id(tmp_path: Path, key: Path) -> None:
    """NaN as pandas and Python write it, and null."""
    path = tmp_path / "t.jsonl"
    for word in ("NaN", "null"):
        path.write_text(f'{{"patient": {word}, "note": "x", "label": "S"}}\n')
        with pytest.raises(DataError, match="row 1 has no 'patient'"):
            load_unit_data(config_of(path), key)


@pytest.mark.parametrize("word", ["1.23457E+12", "4e+17", "1.2345678901234568e+16", "9007199254740992.0"])
def test_a_rounded_id_is_refused(word: str, tmp_path: Path, key: Path) -> None:
    """Several patients have become one there: no rule can tell them apart again."""
    with pytest.raises(DataError, match="row 2 has a 'patient' that a table program has rounded"):
        load(tmp_path / "t.csv", key, ["p1", word])
    assert load(tmp_path / "t.csv", key, ["9007199254740993", "12e34567"]).units == 2
    with pytest.raises(DataError, match="rounded"):
        load(tmp_path / "t.csv", key, ["9" * 5000 + ".0"])


@given(st.lists(st.text(st.sampled_from("01.,+-pP \u00a0nNaA"), max_size=4), min_size=1, max_size=8))
@settings(max_examples=200, deadline=None)
def test_no_two_units_of_a_loaded_table_have_ids_that_fold_to_one(
    tmp_path_factory: pytest.TempPathFactory, ids: list[str]
) -> None:
    """Whatever the ids are: either the table is refused, or units and folded ids correspond one to one."""
    directory = tmp_path_factory.mktemp("ids")
    (directory / "k").write_text("00" * 32)
    path = directory / "t.jsonl"
    path.write_text("".join(json.dumps({"patient": each, "note": "x", "label": "S"}) + "\n" for each in ids))
    try:
        data = load_unit_data(config_of(path, max_records_per_unit=100), directory / "k")
    except DataError:
        return
    assert len({folded(each) for each in ids}) == data.units == len({each.strip() for each in ids})


def test_labels_are_matched_in_the_runs_spelling(tmp_path: Path, key: Path) -> None:
    """1.0, True and another case or width are the run's label when exactly one is meant; others are left out."""
    labels = ("1", "2", "true", "Herz", "A", "a")
    found = run_labels(["1.0", "01", "2", "True", "TRUE", "herz ", "A", "a", "Ａ", "3", ""], labels)
    assert found == ("1", "1", "2", "true", "true", "Herz", "A", "a", None, None, None)
    path = tmp_path / "t.jsonl"
    rows = [{"patient": f"p{n}", "note": "x", "label": label} for n, label in enumerate([1.0, True, "HERZ", "other"])]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    data = load_unit_data(config_of(path), key)
    chosen = usable(Classification(labels, 8), data)
    assert chosen.labels == ("1", "true", "Herz")
    assert chosen.units == 3
    assert chosen.fingerprint == data.fingerprint
    assert usable(Classification(labels, 8), chosen) is chosen


def test_how_labels_fit_a_run_is_told_in_numbers(tmp_path: Path, key: Path) -> None:
    """Rows with one of the labels, rows in another spelling, labels without a row; no label of the data is quoted."""
    path = tmp_path / "t.csv"
    path.write_text("patient,note,label\np1,x,Lungs\np2,x,heart\np3,x,SECRET\n")
    data = load_unit_data(config_of(path), key)
    assert Classification(("lungs", "heart", "brain"), 8).report(data) == (
        "2 of 3 used rows have one of the spec's 3 labels; 1 of them in another spelling; no row has 'brain'"
    )
    require_usable(Classification(("lungs", "brain"), 8), data, "the data set")
    with pytest.raises(DataError, match="no record of the data set has one of the spec's labels: 'brain'") as caught:
        require_usable(Classification(("brain",), 8), data, "the data set")
    assert "SECRET" not in caught.value.message


def test_every_row_that_is_not_used_is_told_with_its_reason(tmp_path: Path, key: Path) -> None:
    """600 rows, of which 570 are used: the thirty are told."""
    rows = [f"p{n // 3},note,S" for n in range(591)]
    rows[0], rows[1] = "p0,,S", "p0,note,"
    rows += ["p900,note,S", "p900,,", ",,", *["p901,  ,S"] * 6]
    path = tmp_path / "t.csv"
    path.write_text("patient,note,label\n" + "\n".join(rows) + "\n")
    data = load_unit_data(config_of(path), key)
    assert dict(data.left_out) == {"without text": 9, "without label": 1, "beyond 2 of one unit": 196}
    assert len(data.texts) + sum(number for _, number in data.left_out) == len(rows) == 600


TABLE = """patient,age,note,label
p1,40,broken arm,S
p2,50,cough,J
p1,41,broken leg,S
p1,42,sprain,T
p3,60,,J
p2,51,flu,
p4,70,fever,R
"""
JSON_LINES = '{"id": 1, "t": 1.0, "l": true}\n{"id": 2, "t": "\\u00e4 x", "l": 3}\n'


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["plain", "with a mark"])
def test_the_fingerprint_of_well_formed_data_is_what_it_was(bom: bytes, tmp_path: Path, key: Path) -> None:
    """The budget of a data set belongs to it: these values stay from here on (0082 says why they changed twice)."""
    path, lines = tmp_path / "t.csv", tmp_path / "t.jsonl"
    path.write_bytes(bom + TABLE.encode())
    lines.write_bytes(bom + JSON_LINES.encode())
    whole = config_of(
        path, text_columns=("age", "note"), unit_column=None, privacy_unit="record", max_records_per_unit=1
    )
    other = config_of(lines, text_columns=("t",), label_column="l", unit_column="id")
    wanted = {
        config_of(path): "886c5a32d248245de3ab94366ae80edaf29cb6f07c3bb7e58b77c577b6d611c7",
        whole: "a11cc23452736ba777a7ee55c977459111c50176e2cf8333dd293a555b7e5398",
        other: "3c66a72e490e2a690236051cd8e95c0b30a7c5ea932b20ba095ed1a0f84020b8",
    }
    for config, digest in wanted.items():
        assert load_unit_data(config, key).fingerprint == f"hmac-sha256:{digest}"
