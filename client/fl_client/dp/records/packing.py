"""Lays the records of a micro-batch end to end, so that no record's length changes the shape in which another computes.

Nothing is padded to a neighbour's length. All tokens of the micro-batch are the rows of one matrix; the rows after the
last token are filler, up to one of few public heights. Records of equal length lie side by side, a *run*: attention,
pooling and per-record products take a run as a batch of equal, independent shapes. What follows from a record's own
tokens is then computed by operations whose shapes are public or the record's own (docs/decisions/0022).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fl_client.dp.records.records import MAX_UNITS, Records
from fl_shared.errors import EngineError

FULL = 2048
"""Rows of a full micro-batch, unless a single unit may have more."""
HEIGHTS = (64, 128, *range(256, FULL + 1, 256))
"""Numbers of rows that a micro-batch may have. Each costs a pass through the model at start-up."""
_PASS = 256  # what one more micro-batch costs, in rows: weights are dequantised again
TILE = 8
"""Rows of a product come in multiples of this wherever their number follows from the data."""
EVEN = 32
"""Rows of data-dependent number fill whole vectors of elementwise loops, whose remainder is computed otherwise."""


@dataclass(frozen=True)
class Packed:
    """Whole units, their records by length.

    Attributes:
        ids, positions: int64 `[M]`: every token, and its place in its record; filler after `rows`.
        rows: number of real tokens.
        runs: (tokens of a record, number of records) of each run, ascending.
        targets: `[R, ...]`.
        unit_of_record: int64 `[R]`, 0..units-1, not sorted.
        units: U.
    """

    ids: Tensor
    positions: Tensor
    rows: int
    runs: tuple[tuple[int, int], ...]
    targets: Tensor
    unit_of_record: Tensor
    units: int

    @property
    def lengths(self) -> list[int]:
        """Rows of each run, and of the filler."""
        return [*(tokens * count for tokens, count in self.runs), self.ids.shape[0] - self.rows]


def tokens_of(records: Records, unit: int) -> int:
    """Tokens of all records of a unit."""
    return sum(len(records.ids[record]) for record in records.of_unit[unit])


def heights_for(rows: int) -> tuple[int, ...]:
    """`HEIGHTS`, and twice the last one again until a unit of so many rows finds room."""
    heights = [*HEIGHTS]
    while heights[-1] < rows:
        heights.append(2 * heights[-1])
    return tuple(heights)


def height(rows: int, heights: Sequence[int] = HEIGHTS) -> int:
    """The least public height that holds so many rows.

    Raises:
        EngineError: none does.
    """
    for candidate in heights:
        if rows <= candidate:
            return candidate
    raise EngineError(
        f"a unit has {rows} tokens, and at most {heights[-1]} were tried on this machine",
        fix="lower [task] max_tokens or [data] max_records_per_unit",
    )


def cut(
    records: Records, units: Sequence[int], *, max_units: int = MAX_UNITS, heights: Sequence[int] = HEIGHTS
) -> list[list[int]]:
    """Cut sampled units into micro-batches of units of like length: at most `max_units` and the full height each.

    A unit never straddles two. What it contributes does not depend on the cut, so the cut may look at all of them: it
    is made where little filler is needed.
    """
    size = {unit: tokens_of(records, unit) for unit in units}
    longest = {unit: max(len(records.ids[record]) for record in records.of_unit[unit]) for unit in units}
    waiting = sorted(units, key=lambda unit: (longest[unit], unit))
    batches = []
    while waiting:
        ends: list[int] = []
        rows = 0
        for unit in waiting[:max_units]:
            rows += size[unit]
            if ends and rows > min(FULL, heights[-1]):
                break
            ends.append(rows)
        if len(ends) < len(waiting):  # more will come: leave what would need filler to the next
            later = range(len(ends) // 2, len(ends))
            best = min(later, key=lambda at: ((height(ends[at], heights) + _PASS) / ends[at], -at))
            ends = ends[: best + 1]
        batches.append(waiting[: len(ends)])
        waiting = waiting[len(ends) :]
    return batches


def pack(records: Records, units: Sequence[int], device: torch.device, *, heights: Sequence[int] = HEIGHTS) -> Packed:
    """One micro-batch of exactly these units; unit u of the result is `units[u]`."""
    owned = [(len(records.ids[r]), u, int(r)) for u, unit in enumerate(units) for r in records.of_unit[unit]]
    if not owned:
        raise EngineError("a micro-batch has no records", fix="report this defect")
    owned.sort()
    lengths = np.array([length for length, _, _ in owned])
    rows = int(lengths.sum())
    total = height(rows, heights)
    ids, positions = np.zeros(total, np.int64), np.zeros(total, np.int64)
    ids[:rows] = np.concatenate([records.ids[record] for _, _, record in owned])
    positions[:rows] = np.arange(rows) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    kinds, counts = np.unique(lengths, return_counts=True)
    return Packed(
        ids=torch.from_numpy(ids).to(device),
        positions=torch.from_numpy(positions).to(device),
        rows=rows,
        runs=tuple(zip(kinds.tolist(), counts.tolist(), strict=True)),
        targets=torch.from_numpy(records.targets[[record for _, _, record in owned]]).to(device),
        unit_of_record=torch.tensor([unit for _, unit, _ in owned], device=device),
        units=len(units),
    )
