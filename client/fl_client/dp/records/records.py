"""Tokenised records, and how a sample of units is cut into micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_shared.errors import EngineError

MAX_UNITS = 128
MAX_TOKENS = 8192


@dataclass(frozen=True)
class Records:
    """Tokenised private records.

    Attributes:
        ids: token ids of each record, at most `max_tokens`.
        targets: `[records, ...]`, what a task's loss compares the head's outputs with.
        of_unit: record numbers of each unit.
        truncated: how many texts were longer than the limit. It stays at the site.
    """

    ids: tuple[tuple[int, ...], ...]
    targets: NDArray[Any]
    of_unit: tuple[NDArray[np.int64], ...]
    truncated: int

    @property
    def units(self) -> int:
        """Number of privacy units."""
        return len(self.of_unit)


@dataclass(frozen=True)
class MicroBatch:
    """Whole units, padded to the longest record among them.

    Attributes:
        ids, mask: int64 `[B, T]`, padded on the right.
        targets: `[B, ...]`.
        unit_of_record: int64 `[B]`, ascending, 0..units-1.
        units: U.
    """

    ids: Tensor
    mask: Tensor
    targets: Tensor
    unit_of_record: Tensor
    units: int


def micro_batches(
    records: Records, units: Sequence[int], device: torch.device, *, max_units: int = MAX_UNITS
) -> Iterator[MicroBatch]:
    """Sampled units as micro-batches of units of like length."""
    for chosen in cut_units(records, units, max_units=max_units):
        yield pack_units(records, chosen, device)


def cut_units(records: Records, units: Sequence[int], *, max_units: int = MAX_UNITS) -> Iterator[list[int]]:
    """Cut sampled units into groups of like length, at most `max_units` and about `MAX_TOKENS` padded tokens each.

    Units never straddle two micro-batches, so that each is clipped whole. The sum over the logical batch does not
    depend on the cut.
    """
    lengths = {unit: max(len(records.ids[r]) for r in records.of_unit[unit]) for unit in units}
    chosen: list[int] = []
    rows = 0
    for unit in sorted(units, key=lambda u: (-lengths[u], u)):
        count = len(records.of_unit[unit])
        longest = lengths[chosen[0]] if chosen else lengths[unit]
        if chosen and (len(chosen) >= max_units or (rows + count) * longest > MAX_TOKENS):
            yield chosen
            chosen, rows = [], 0
        chosen.append(unit)
        rows += count
    if chosen:
        yield chosen


def pack_units(records: Records, units: Sequence[int], device: torch.device) -> MicroBatch:
    """One micro-batch of exactly these units, in this order."""
    numbers = [int(record) for unit in units for record in records.of_unit[unit]]
    if not numbers:
        raise EngineError("a micro-batch has no records", fix="report this defect")
    ids, mask = pad_ids([records.ids[record] for record in numbers], device)
    owners = np.repeat(np.arange(len(units)), [len(records.of_unit[unit]) for unit in units])
    return MicroBatch(
        ids=ids,
        mask=mask,
        targets=torch.from_numpy(records.targets[numbers]).to(device),
        unit_of_record=torch.from_numpy(owners).to(device),
        units=len(units),
    )


def pad_ids(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and 0/1 mask, int64 `[B, T]`, padded on the right to the longest row."""
    ids = np.zeros((len(rows), max(len(row) for row in rows)), dtype=np.int64)
    mask = np.zeros_like(ids)
    for at, row in enumerate(rows):
        ids[at, : len(row)] = row
        mask[at, : len(row)] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)
