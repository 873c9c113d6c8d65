"""The Task protocol: all that a site knows of one kind of `[task]`; and what follows for every kind.

A task reads a record's text and its cell of the label column, whose meaning is the task's own. It hands the engine an
objective and token ids, and turns the head's outputs into figures. What it is never asked: clipping, noise, sampling,
the ledger.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fl_client.data.units import UnitData
from fl_client.dp.objective import Objective
from fl_client.dp.records.records import Records
from fl_shared.errors import DataError


class Task(Protocol):
    """A run's task. Frozen and comparable by value: equal tasks encode equal data to equal records."""

    @property
    def max_tokens(self) -> int:
        """The most tokens that a record may have."""
        ...

    @property
    def objective(self) -> Objective:
        """Head and loss, for the engine."""
        ...

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of what `measure` gives for each unit."""
        ...

    @property
    def requirement(self) -> str:
        """What a usable record has, for a message: "has one of the spec's labels: 'A', 'B'"."""
        ...

    def accepted(self, cells: Sequence[str]) -> tuple[str | None, ...]:
        """Each cell of the label column as the run writes it; None where the run cannot use the record.

        A cell is looked at for its own sake alone, so that neighbouring data sets stay neighbours.
        """
        ...

    def report(self, data: UnitData) -> str:
        """How the data fit the run, in one line for whoever sits at the site."""
        ...

    def encode(self, data: UnitData, tokenizer: Any) -> Records:
        """Token ids and targets of every record; DataError names a record that is unusable by number, never its cell.

        Args:
            tokenizer: the base model's.
        """
        ...

    def measure(self, outputs: NDArray[np.float32], data: UnitData) -> NDArray[np.float64]:
        """How well the outputs `[records, ...]` do: `[units, len(measures)]`, each in [0, 1] whatever the outputs are.

        A unit's row follows from its own records alone; the sum over units is released with noise.
        """
        ...

    def figures(self, means: Sequence[float] | None, deviation: float | None) -> dict[str, Any]:
        """What a person is told of the measures' means over the units, and of the noise's deviation in each of them.

        Args:
            means: in the order of `measures`, each in [0, 1]; None when the noise hides them: every figure is None.
        """
        ...

    def summary(self, figures: dict[str, Any]) -> str:
        """`figures`, none of them None, in words."""
        ...

    def score(self, outputs: NDArray[np.float32], data: UnitData) -> dict[str, float]:
        """How well the outputs `[records, ...]` do on public records; nothing is bounded, and nothing noised."""
        ...

    def head_metadata(self) -> dict[str, Any]:
        """What an exported head needs beside its weights to be used: plain JSON values."""
        ...


def usable(task: Task, data: UnitData) -> UnitData:
    """The part of `data` that a run can use, in its spelling, its units numbered again without gaps.

    Other records are left out in silence: that a site has them is private, and leaving each one out for its own sake
    keeps neighbouring data sets neighbours. How many units are left is as private, and the run's task is the
    coordinator's choice: nothing public may depend on it, not even whether any is left.
    """
    cells = task.accepted(data.labels)
    if cells == data.labels:
        return data
    part = data.part([i for i, cell in enumerate(cells) if cell is not None])
    return dataclasses.replace(part, labels=tuple(cell for cell in cells if cell is not None))


def require_usable(task: Task, data: UnitData, where: str) -> None:
    """DataError when the run can use no record.

    Only for what an operator starts at the site: the answer is private, and the coordinator must not see it (an order
    of its own is answered with noise alone).
    """
    if not any(cell is not None for cell in task.accepted(data.labels)):
        raise DataError(
            f"no record of {where} {task.requirement}",
            fix="compare them with the label column, e.g. with `fl-client check --spec`; nothing was charged",
        )
