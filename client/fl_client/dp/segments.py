"""Norms of sums of outer products over runs of rows, without forming the products where that is dearer.

The gradient of one LoRA factor for one privacy unit is `sum_i a_i (x) b_i` over the unit's rows. For a routed expert
those rows are the unit's tokens in that expert: a *segment*. Most segments hold a few rows, and
`|sum_i a_i (x) b_i|^2 = sum_ij <a_i, a_j> <b_i, b_j>` (Goodfellow 2015, arXiv 1510.01799; Li et al. 2022,
arXiv 2110.05679, Section 4) costs least; long ones are multiplied out. Segments of like length go together, padded to
one of few lengths: short segments cost more in calls than in arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK_FLOATS = 1 << 24
# Products of rows that cancel leave a sum much smaller than their rounding errors. So that no unit's norm is found too
# small, this share of the squared sum of their lengths is added (docs/decisions/0022).
ROUNDING = {torch.float64: 2.0**-48, torch.float32: 2.0**-20, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@dataclass(frozen=True)
class Bucket:
    """Segments of at most `length` rows, and of more than the bucket before.

    Attributes:
        rows: `[S * length]`, the rows of each segment; beyond its end any row.
        real: float32 `[S, length, 1]`, 1 for the segment's own rows; None when all are.
    """

    length: int
    rows: Tensor
    real: Tensor | None


@dataclass(frozen=True)
class Segments:
    """Runs of equal keys among sorted rows.

    Attributes:
        unit: `[S]`, the privacy unit of each segment, in the buckets' order.
        of_row: `[M]`, the segment of each row.
        buckets: every segment is in exactly one.
    """

    unit: Tensor
    of_row: Tensor
    buckets: tuple[Bucket, ...]


def find_segments(key: Tensor, units: int) -> Segments:
    """Split rows by `key = group * units + unit`, ascending, int64 `[M]`."""
    unique, counts = torch.unique_consecutive(key, return_counts=True)
    starts = torch.cumsum(counts, 0) - counts
    chosen, buckets = [unique[:0]], []
    below, longest = 0, int(counts.max()) if counts.numel() else 0
    for length in _lengths(longest):
        segment = torch.nonzero((counts > below) & (counts <= length)).squeeze(-1)
        if segment.numel():
            chosen.append(segment)
            buckets.append(_bucket(starts[segment], counts[segment], length, key.shape[0]))
        below = length
    order = torch.cat(chosen)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    return Segments(unique[order] % units, place.repeat_interleave(counts), tuple(buckets))


def _lengths(longest: int) -> Iterator[int]:
    """1, 4, 16, 32, 64, ... up to the first that holds `longest`."""
    length = 1
    while longest > 0:
        yield length
        if length >= longest:
            return
        length *= 4 if length < 16 else 2


def _bucket(starts: Tensor, counts: Tensor, length: int, rows: int) -> Bucket:
    if length == 1:
        return Bucket(1, starts, None)
    offset = torch.arange(length, device=starts.device)
    chosen = (starts.unsqueeze(1) + offset).clamp_(max=rows - 1).flatten()
    full = int(counts.sum()) == length * counts.shape[0]
    return Bucket(length, chosen, None if full else (offset < counts.unsqueeze(1)).float().unsqueeze(-1))


def squared_norms(a: Tensor, b: Tensor, segments: Segments) -> Tensor:
    """`|sum_i a_i (x) b_i|^2` of every segment, never below its value in exact arithmetic.

    Args:
        a: `[M, p]`.
        b: `[M, q]`.

    Returns:
        float64 `[S]`, in the order of `segments.unit`.
    """
    if a.shape[1] > b.shape[1]:
        a, b = b, a
    reach = _length(a) * _length(b)
    found = [reach[:0]]
    for bucket in segments.buckets:
        rows, real, length = bucket.rows, bucket.real, bucket.length
        if length == 1:
            found.append(reach.index_select(0, rows).square_())
            continue
        size = max(1, _CHUNK_FLOATS // (length * b.shape[1]))
        for at in range(0, rows.shape[0] // length, size):
            part = None if real is None else real[at : at + size]
            found.append(_squared(a, b, rows[at * length : (at + size) * length], part, length))
    squared = torch.cat(found)
    room = torch.zeros_like(squared).index_add_(0, segments.of_row, reach).square_()
    return squared.add_(room, alpha=ROUNDING[a.dtype]).double()


def _squared(a: Tensor, b: Tensor, rows: Tensor, real: Tensor | None, length: int) -> Tensor:
    """Float32 squared norms of segments of `length` rows each, `a` being the narrower side."""
    left = a.index_select(0, rows).view(-1, length, a.shape[1])
    right = b.index_select(0, rows).view(-1, length, b.shape[1])
    if real is not None:
        left = left * real.to(left.dtype)
    if length * (a.shape[1] + b.shape[1]) <= a.shape[1] * b.shape[1]:
        return _dot(torch.bmm(left, left.mT).flatten(1), torch.bmm(right, right.mT).flatten(1))
    return _length(torch.bmm(left.mT, right).flatten(1)).square_()


def _length(a: Tensor) -> Tensor:
    """Lengths of rows, in float32."""
    found: Tensor = torch.linalg.vector_norm(a, dim=1, dtype=torch.float32)
    return found


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of rows, in float32."""
    found: Tensor = torch.linalg.vecdot(a.float(), b.float())
    return found
