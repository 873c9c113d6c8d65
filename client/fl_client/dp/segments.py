"""Norms of sums of outer products over runs of rows, without forming the products where that is dearer.

The gradient of one LoRA factor for one privacy unit is `sum_i a_i (x) b_i` over the unit's rows. For a routed expert
those rows are the unit's tokens in that expert: a *segment*. Most segments hold a few rows, and
`|sum_i a_i (x) b_i|^2 = sum_ij <a_i, a_j> <b_i, b_j>` (Goodfellow 2015, arXiv 1510.01799; Li et al. 2022,
arXiv 2110.05679, Section 4) costs least; long ones are multiplied out. Segments of one length go together; lengths
beyond `_EXACT` are padded to one of few, because each length costs a handful of calls.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK_FLOATS = 1 << 24
_EXACT = 4  # the longest segments that are never padded
# Products of rows that cancel leave a sum much smaller than their rounding errors. So that no unit's norm is found too
# small, this share of the squared sum of their lengths is added (docs/decisions/0022).
# Beside a longer row, entries whose squares underflow float32 would matter, and a norm could be found too small.
_LONGEST = 2.0**30
ROUNDING = {torch.float64: 2.0**-48, torch.float32: 2.0**-20, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@dataclass(frozen=True)
class Segments:
    """Runs of equal keys among sorted rows, S segments of M rows, ordered by padded length.

    Attributes:
        unit: `[S]`, the privacy unit of each segment.
        sizes: padded length and number of segments of that length, ascending.
        rows: `[R]`, the rows of one segment after another, each padded to its length with any row.
        segment: `[R]`, the segment of each of them.
        real: float32 `[R]`, 1 for a segment's own rows, 0 for the padding.
    """

    unit: Tensor
    sizes: tuple[tuple[int, int], ...]
    rows: Tensor
    segment: Tensor
    real: Tensor


def find_segments(key: Tensor, units: int) -> Segments:
    """Split rows by `key = group * units + unit`, ascending, int64 `[M]`."""
    unique, counts = torch.unique_consecutive(key, return_counts=True)
    lengths = _lengths(int(counts.max()) if counts.numel() else 0)
    ladder = torch.tensor(lengths, dtype=torch.int64, device=key.device)
    kind = torch.bucketize(counts, ladder)
    order = torch.argsort(kind, stable=True)
    sizes = torch.bincount(kind, minlength=len(lengths))
    padded = ladder.repeat_interleave(sizes)
    segment = torch.arange(order.shape[0], device=key.device).repeat_interleave(padded)
    offset = torch.arange(segment.shape[0], device=key.device)
    offset -= (torch.cumsum(padded, 0) - padded).index_select(0, segment)
    found = order.index_select(0, segment)
    real = offset < counts.index_select(0, found)
    offset += (torch.cumsum(counts, 0) - counts).index_select(0, found)
    return Segments(
        unit=unique.index_select(0, order) % units,
        sizes=tuple((length, size) for length, size in zip(lengths, sizes.tolist(), strict=True) if size),
        rows=offset.clamp_(max=key.shape[0] - 1),
        segment=segment,
        real=real.float(),
    )


def _lengths(longest: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, 24, ... up to the first that holds `longest`."""
    lengths, length = [], 0
    while length < longest:
        length += 1 if length < _EXACT else 1 << (length.bit_length() - 2)
        lengths.append(length)
    return lengths


def squared_norms(a: Tensor, b: Tensor, segments: Segments) -> Tensor:
    """`|sum_i a_i (x) b_i|^2` of every segment, never below its value in exact arithmetic.

    Args:
        a: `[M, p]`.
        b: `[M, q]`.

    Returns:
        float64 `[S]`, in the order of `segments.unit`; not finite where a row is longer than 2**30.
    """
    if a.shape[1] > b.shape[1]:
        a, b = b, a
    reach = (_bounded_length(a) * _bounded_length(b)).index_select(0, segments.rows).mul_(segments.real)
    narrow = a.index_select(0, segments.rows)
    narrow *= segments.real.to(a.dtype).unsqueeze(1)
    found, at = [reach[:0]], 0
    for length, size in segments.sizes:
        chunk = max(1, _CHUNK_FLOATS // (length * b.shape[1]))
        for left in narrow[at : at + length * size].split(chunk * length):
            here = slice(at, at + left.shape[0])
            at = here.stop
            if length == 1:
                found.append(reach[here].square())
            else:
                found.append(_squared(left, b.index_select(0, segments.rows[here]), length))
    squared = torch.cat(found)
    room = torch.zeros_like(squared).index_add_(0, segments.segment, reach).square_()
    return squared.add_(room, alpha=ROUNDING[a.dtype]).double()


def _squared(left: Tensor, right: Tensor, length: int) -> Tensor:
    """Float32 squared norms of segments of `length` rows each, `left` being the narrower side."""
    p, q = left.shape[1], right.shape[1]
    left, right = left.view(-1, length, p), right.view(-1, length, q)
    if length * (p + q) <= p * q:
        return _dot(torch.bmm(left, left.mT).flatten(1), torch.bmm(right, right.mT).flatten(1))
    return _length(torch.bmm(left.mT, right).flatten(1)).square_()


def _length(a: Tensor) -> Tensor:
    """Lengths of rows, in float32."""
    found: Tensor = torch.linalg.vector_norm(a, dim=1, dtype=torch.float32)
    return found


def _bounded_length(a: Tensor) -> Tensor:
    """Lengths of rows, infinite where one is too long for its neighbours' squares."""
    found = _length(a)
    return found.masked_fill_(found > _LONGEST, torch.inf)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of rows, in float32."""
    found: Tensor = torch.linalg.vecdot(a.float(), b.float())
    return found
