"""Norms of sums of outer products over runs of rows, without forming the products where that is dearer.

The gradient of one LoRA factor for one privacy unit is `sum_i a_i (x) b_i` over the unit's rows. For a routed expert
those rows are the unit's tokens in that expert: a *segment*. Most segments hold a few rows, and
`|sum_i a_i (x) b_i|^2 = sum_ij <a_i, a_j> <b_i, b_j>` (Goodfellow 2015, arXiv 1510.01799; Li et al. 2022,
arXiv 2110.05679, Section 4) costs least; long ones are multiplied out. Segments of one length go together; lengths
beyond `_EXACT` are padded to one of few, because each length costs a handful of calls. All of it is float64, in which
products of the rows' entries are exact; a segment's result follows from its own rows and length alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK_FLOATS = 1 << 19
_EXACT = 4  # the longest segments that are never padded
ROUNDING = 2.0**-20
"""Share of the squared sum of the rows' lengths that is added to a squared norm (docs/decisions/0022): where rows
cancel, it bounds what the weighted rows themselves amount to, and so the rounding of their sum."""


@dataclass(frozen=True)
class Segments:
    """Runs of equal keys among sorted rows, S segments of M rows, ordered by padded length.

    Attributes:
        unit: `[S]`, the privacy unit of each segment.
        sizes: padded length and number of segments of that length, ascending.
        rows: `[R]`, the rows of one segment after another, each padded to its length with any row.
        segment: `[R]`, the segment of each of them.
        real: bool `[R]`, whether a row is the segment's own and not its padding.
    """

    unit: Tensor
    sizes: tuple[tuple[int, int], ...]
    rows: Tensor
    segment: Tensor
    real: Tensor


def find_segments(key: Tensor, units: int, rows: Tensor | None = None) -> Segments:
    """Split rows by `key = group * units + unit`, ascending, int64 `[M]`.

    Args:
        rows: `[M]`, where the sorted rows stand; in this order when left out.
    """
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
    run_of_slot = order.index_select(0, segment)
    real = offset < counts.index_select(0, run_of_slot)
    offset += (torch.cumsum(counts, 0) - counts).index_select(0, run_of_slot)
    offset.clamp_(max=max(0, key.shape[0] - 1))
    return Segments(
        unit=unique.index_select(0, order) % units,
        sizes=tuple((length, size) for length, size in zip(lengths, sizes.tolist(), strict=True) if size),
        rows=offset if rows is None else rows.index_select(0, offset),
        segment=segment,
        real=real,
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
        float64 `[S]`, in the order of `segments.unit`; not finite where a row is not.
    """
    if a.shape[1] > b.shape[1]:
        a, b = b, a
    lengths = _squares(a).mul_(_squares(b)).sqrt_().index_select(0, segments.rows)
    reach = torch.where(segments.real, lengths, 0)
    squares, at = [reach[:0]], 0
    for length, size in segments.sizes:
        if length == 1:
            squares.append(reach[at : at + size].square())
            at += size
            continue
        chunk = max(1, _CHUNK_FLOATS // (length * b.shape[1]))
        for rows in segments.rows[at : at + length * size].split(chunk * length):
            left, right = a.index_select(0, rows).double(), b.index_select(0, rows).double()
            if length > _EXACT:  # the padding is somebody else's row, whatever it holds
                padding = ~segments.real[at : at + len(rows)].unsqueeze(1)
                left.masked_fill_(padding, 0)
                right.masked_fill_(padding, 0)
            at += len(rows)
            squares.append(_squared(left, right, length))
    squared = torch.cat(squares)
    room = add_rows(torch.zeros_like(squared), segments.segment, reach).square_()
    return squared.add_(room, alpha=ROUNDING)


def _squared(left: Tensor, right: Tensor, length: int) -> Tensor:
    """Squared norms of segments of `length` rows each, `left` being the narrower side."""
    p, q = left.shape[1], right.shape[1]
    left, right = left.view(-1, length, p), right.view(-1, length, q)
    if length * (p + q) <= p * q:
        pairs: Tensor = torch.linalg.vecdot(torch.bmm(left, left.mT).flatten(1), torch.bmm(right, right.mT).flatten(1))
        return pairs
    return _squares(torch.bmm(left.mT, right).flatten(1))


def _squares(a: Tensor) -> Tensor:
    """Squared lengths of rows, float64."""
    squares: Tensor = torch.linalg.vector_norm(a, dim=1, dtype=torch.float64).square_()
    return squares


def add_rows(total: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """`total[index] += rows`, added in the order of the rows, on CUDA as well."""
    added: Tensor = (
        total.index_put_((index,), rows, accumulate=True) if total.is_cuda else total.index_add_(0, index, rows)
    )
    return added
