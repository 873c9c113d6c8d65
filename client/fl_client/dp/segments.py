"""Norms of sums of outer products over runs of rows, without forming the products where that is dearer.

The gradient of one LoRA factor for one privacy unit is `sum_i a_i (x) b_i` over the unit's rows. For a routed expert
those rows are the unit's tokens in that expert: a *segment*. Most segments hold a few rows, and
`|sum_i a_i (x) b_i|^2 = sum_ij <a_i, a_j> <b_i, b_j>` (Goodfellow 2015, arXiv 1510.01799; Li et al. 2022,
arXiv 2110.05679, Section 4) costs least; long ones are multiplied out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SHORT = 16
_CHUNK_FLOATS = 1 << 24


@dataclass(frozen=True)
class Segments:
    """Runs of equal keys among M sorted rows.

    Attributes:
        of_row: `[M]`, the segment of each row.
        unit: `[S]`, the privacy unit of each segment.
        left, right: `[P]`, all pairs of different rows inside the short segments.
        pair: `[P]`, the segment of each pair.
        short: `[M]` bool, rows in short segments.
        long: start and length of each long segment.
    """

    of_row: Tensor
    unit: Tensor
    left: Tensor
    right: Tensor
    pair: Tensor
    short: Tensor
    long: tuple[tuple[int, int, int], ...]


def find_segments(key: Tensor, units: int) -> Segments:
    """Split rows by `key = group * units + unit`, ascending, int64 `[M]`."""
    unique, of_row, counts = torch.unique_consecutive(key, return_inverse=True, return_counts=True)
    is_long = counts > SHORT
    short = ~is_long[of_row]
    lefts, rights = [], []
    alive = torch.nonzero(short).squeeze(-1)
    longest = int(counts[~is_long].max()) if bool((~is_long).any()) else 0
    for distance in range(1, longest):
        alive = alive[alive + distance < key.shape[0]]
        alive = alive[key[alive] == key[alive + distance]]
        lefts.append(alive)
        rights.append(alive + distance)
    none = key.new_empty(0)
    left = torch.cat(lefts) if lefts else none
    right = torch.cat(rights) if rights else none
    long: tuple[tuple[int, int, int], ...] = ()
    if bool(is_long.any()):
        starts = torch.cumsum(counts, 0) - counts
        which = torch.nonzero(is_long).squeeze(-1)
        long = tuple(zip(which.tolist(), starts[which].tolist(), counts[which].tolist(), strict=True))
    return Segments(of_row, unique % units, left, right, of_row[left], short, long)


def squared_norms(a: Tensor, b: Tensor, segments: Segments) -> Tensor:
    """`|sum_i a_i (x) b_i|^2` of every segment.

    Args:
        a: `[M, p]`.
        b: `[M, q]`.

    Returns:
        float64 `[S]`.
    """
    own = (a.square().sum(-1, dtype=torch.float32) * b.square().sum(-1, dtype=torch.float32)).double()
    total = torch.zeros(segments.unit.shape[0], dtype=torch.float64, device=a.device)
    if segments.long:
        own = own * segments.short
    total.index_add_(0, segments.of_row, own)
    if segments.left.numel():
        cross = _dots(a, segments) * _dots(b, segments)
        total.index_add_(0, segments.pair, cross.double(), alpha=2)
    for segment, start, length in segments.long:
        product = a[start : start + length].mT @ b[start : start + length]
        total[segment] = product.float().square().sum().double()
    return total


def _dots(rows: Tensor, segments: Segments) -> Tensor:
    width = rows.shape[1]
    if segments.left.numel() * width <= _CHUNK_FLOATS:
        return torch.linalg.vecdot(rows[segments.left], rows[segments.right]).float()
    size = max(1, _CHUNK_FLOATS // width)
    parts = zip(segments.left.split(size), segments.right.split(size), strict=True)
    return torch.cat([torch.linalg.vecdot(rows[i], rows[j]).float() for i, j in parts])
