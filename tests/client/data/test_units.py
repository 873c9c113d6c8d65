"""Private records and the units that own them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fl_client.data.units import UnitData
from fl_shared.errors import DataError


def _data(owners: list[int], units: int) -> UnitData:
    texts = tuple(f"secret {i}" for i in range(len(owners)))
    return UnitData(texts, tuple("A" for _ in owners), np.array(owners, dtype=np.int64), units, "keyed:0")


@given(st.lists(st.integers(0, 6), min_size=1, max_size=40))
def test_every_record_lies_with_its_unit(owners: list[int]) -> None:
    """Records are grouped by owner, in their order, each exactly once."""
    numbers = {owner: place for place, owner in enumerate(sorted(set(owners)))}
    dense = [numbers[owner] for owner in owners]
    groups = _data(dense, len(numbers)).records_by_unit()
    assert len(groups) == len(numbers)
    for unit, records in enumerate(groups):
        assert records.tolist() == [i for i, owner in enumerate(dense) if owner == unit]


@pytest.mark.parametrize(
    ("owners", "units", "message"),
    [
        ([0, 2], 3, "unit 1 has no records"),
        ([0, 1], 3, "unit 2 has no records"),
        ([0, 3], 3, "from 0 to 2"),
        ([0, -1], 2, "from 0 to 1"),
    ],
)
def test_wrong_unit_numbers_are_refused(owners: list[int], units: int, message: str) -> None:
    """A unit without a record, a number outside the range or no record at all is a typed error without texts."""
    with pytest.raises(DataError, match=message) as caught:
        _data(owners, units)
    assert "secret" not in caught.value.message


def test_lengths_must_match() -> None:
    """One label too few is refused."""
    with pytest.raises(DataError, match="do not match"):
        UnitData(("a", "b"), ("A",), np.array([0, 1]), 2, "keyed:0")


def test_facts_are_frozen() -> None:
    """No field of the data can be set anew after it was loaded."""
    data = _data([0, 1], 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        data.units = 5  # type: ignore[misc]
