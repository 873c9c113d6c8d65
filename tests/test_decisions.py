"""The index of decisions is the records: numbers, titles, statuses, and successors that exist."""

from __future__ import annotations

import re

import pytest

from helpers import index

README = index.ROOT / "docs" / "decisions" / "README.md"
RECORDS = index.decisions()


def test_every_number_belongs_to_one_record() -> None:
    """Code cites a record by its number alone."""
    numbers = [record.number for record in RECORDS]
    assert len(numbers) > 60
    assert len(numbers) == len(set(numbers))


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.number)
def test_every_record_states_its_status_in_one_form(record: index.Decision) -> None:
    """Accepted, superseded by a record that exists, or deprecated; in the third line, between blank lines."""
    assert index.STATUS.fullmatch(record.status), (
        f"{record.path.name}: write `**Status.** Accepted.` as its third line, or one of the forms of {README}"
    )
    assert record.path.read_text("utf-8").splitlines()[1:4] == ["", record.status, ""]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.number)
def test_what_superseded_or_amended_a_record_exists_and_is_another_one(record: index.Decision) -> None:
    """Each number that a status names is a file, linked by its right name, and no record follows itself."""
    files = {each.number: each.path.name for each in RECORDS}
    for number in record.others:
        assert number != record.number
        assert f"[{number}]({files.get(number, 'NO SUCH RECORD')})" in record.status
    if "Superseded" in record.status:
        assert record.others


def test_no_circle_of_records_supersedes_itself() -> None:
    """Whoever follows `superseded by` comes to a record that holds."""
    next_of = {record.number: record.others[0] for record in RECORDS if "Superseded" in record.status}
    for number in next_of:
        seen = {number}
        while (number := next_of.get(number, "")) and number not in seen:
            seen.add(number)
        assert number == "", seen


def test_the_index_is_what_the_files_say() -> None:
    """`make index` would change nothing."""
    text = README.read_text("utf-8")
    assert text == index.index_of_decisions(text), "run `make index`"


@pytest.mark.parametrize(
    "line",
    [
        "**Status.** Accepted",
        "**Status.** accepted.",
        "**Status.** Superseded.",
        "**Status.** Superseded by 0084.",
        "**Status.** Rejected.",
        "Status: accepted",
        "",
    ],
)
def test_other_forms_are_refused(line: str) -> None:
    """The form is one, so that a program can read it."""
    assert index.STATUS.fullmatch(line) is None


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.number)
def test_every_test_that_a_record_names_exists(record: index.Decision) -> None:
    """`tests/….py` or `tests/….py::name`."""
    for target in re.findall(r"`(tests/[^`\s]+)`", record.path.read_text("utf-8")):
        path, _, name = target.partition("::")
        assert (index.ROOT / path).exists(), target
        assert not name or f"\ndef {name}(" in (index.ROOT / path).read_text("utf-8"), target
