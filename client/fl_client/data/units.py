"""Private records grouped by the privacy units that differential privacy protects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fl_shared.errors import DataError


@dataclass(frozen=True, eq=False)
class UnitData:
    """A site's private data. Values never appear in messages; record numbers do.

    Attributes:
        texts: one per record.
        labels: one per record, its cell of the label column; what it means is the task's.
        unit_of_record: int64 `[records]`, the unit of each record, 0..units-1.
        units: number of privacy units.
        fingerprint: keyed digest of the records, as it is recorded in the ledger.
        left_out: reason and number of rows of the table that are not used, for whoever sits at the site. As private
            as the data: neither sent nor logged.

    Without units it is empty: a run may be able to use no record of a site.

    Raises:
        DataError: lengths differ, a unit number is out of range, or a unit has no record.
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    unit_of_record: NDArray[np.int64]
    units: int
    fingerprint: str
    left_out: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        records = len(self.texts)
        owners = np.asarray(self.unit_of_record)
        if len(self.labels) != records or owners.shape != (records,):
            raise DataError(
                f"{records} texts, {len(self.labels)} labels and {owners.size} unit numbers do not match",
                fix="give one label and one unit number per text",
            )
        if owners.dtype.kind not in "iu" or (records and (owners.min() < 0 or owners.max() >= self.units)):
            raise DataError(
                f"unit numbers must be integers from 0 to {self.units - 1}", fix="number the units without gaps"
            )
        counts = np.bincount(owners, minlength=self.units)
        if (counts == 0).any():
            raise DataError(
                f"unit {int(np.argmin(counts))} has no records",
                fix="number the units without gaps, so that each owns at least one record",
            )

    def records_by_unit(self) -> list[NDArray[np.int64]]:
        """The record numbers of each unit, in order: a list of `units` arrays."""
        owners = np.asarray(self.unit_of_record, dtype=np.int64)
        if not self.units:
            return []
        order = np.argsort(owners, kind="stable")
        ends = np.cumsum(np.bincount(owners, minlength=self.units))
        return list(np.split(order, ends[:-1]))

    def part(self, kept: Sequence[int]) -> UnitData:
        """The records `kept`, in this order, their units numbered again without gaps."""
        owners, units = np.unique(np.asarray(self.unit_of_record)[np.array(kept, dtype=np.intp)], return_inverse=True)
        return UnitData(
            texts=tuple(self.texts[i] for i in kept),
            labels=tuple(self.labels[i] for i in kept),
            unit_of_record=units.astype(np.int64),
            units=len(owners),
            fingerprint=self.fingerprint,
        )
