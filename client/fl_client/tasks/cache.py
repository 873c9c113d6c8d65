"""A cache of the last round's encoded records, so that the next round on the same data does not tokenise again."""

from __future__ import annotations

from typing import Any

import numpy as np

from fl_client.data.units import UnitData
from fl_client.dp.records.records import Records
from fl_client.tasks.task import Task


class RecordCache:
    """One entry: the records of the last task and data. As private as the data, and as long in memory.

    Data are compared by value, so nothing else has to say when they changed.
    """

    def __init__(self) -> None:
        self._task: Task | None = None
        self._tokenizer: Any = None
        self._data: UnitData | None = None
        self._records: Records | None = None

    def of(self, task: Task, data: UnitData, tokenizer: Any) -> Records:
        """As `task.encode`, whose errors it raises; encoded once for as long as nothing changes."""
        known = self._data is not None and self._tokenizer is tokenizer and self._task == task
        if not known or not _same(self._data, data) or self._records is None:
            self._records = self._data = None  # never two entries at a time
            self._records = task.encode(data, tokenizer)
            self._task, self._tokenizer, self._data = task, tokenizer, data
        return self._records


def _same(one: UnitData | None, other: UnitData) -> bool:
    return one is other or (
        one is not None
        and one.texts == other.texts
        and one.labels == other.labels
        and np.array_equal(one.unit_of_record, other.unit_of_record)
    )
