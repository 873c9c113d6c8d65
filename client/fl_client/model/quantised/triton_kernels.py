"""Products of rows sorted by expert on CUDA; int8 or int4 weights are read, scaled in registers and multiplied at once.

Only `quant_matmul` imports this module, and only for CUDA tensors: Triton comes with torch's CUDA builds. The kernels'
arithmetic is tested in Triton's interpreter (TRITON_INTERPRET=1); docs/quantisation.md says what has run on a GPU.

int8 and int4 levels are exact in bfloat16. Forward, the scale of (output, group) multiplies the group's float32
partial sum; backward it multiplies the gradient, which is rounded to its type once more, as a dequantised weight would.

Every row is summed by one program, in steps of fixed size from first to last, so its bits follow from the row alone
while tiles have one size; they do while torch's deterministic algorithms are on, as in all passes over private text.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_STEP = 32  # inputs or outputs that one step of the inner loop takes
_WIDE = 64  # outputs a program makes


def supports(group: int, *, int4: bool) -> bool:
    """Whether the bytes of a group can be cut into steps of the kernels."""
    return (group // 2 if int4 else group) % _STEP == 0


def grouped(x: Tensor, qweight: Tensor, scale: Tensor, ends: Tensor | None, group: int, inputs: int) -> Tensor:
    """`x_e W_e^T` as in `quant_matmul.grouped`; without `ends` all rows belong to the one matrix."""
    experts, outputs = qweight.shape[:2]
    y = x.new_empty(x.shape[0], outputs)
    tile, owner, start, stop = _tiles(x.shape[0], experts, ends, x.device)
    _forward[len(owner), triton.cdiv(outputs, _WIDE)](
        x.contiguous(), qweight.view(torch.int8), scale, y, owner, start, stop,
        outputs, inputs, qweight.shape[2], scale.shape[2],
        EXPERTS=experts, GROUP=group, INT4=qweight.dtype == torch.uint8, ROWS=tile, COLUMNS=_WIDE, STEP=_STEP,
    )  # fmt: skip
    return y


def grouped_transposed(
    g: Tensor, qweight: Tensor, scale: Tensor, ends: Tensor | None, group: int, inputs: int
) -> Tensor:
    """`g_e W_e` as in `quant_matmul.grouped_transposed`."""
    experts, outputs = qweight.shape[:2]
    gx = g.new_empty(g.shape[0], inputs)
    tile, owner, start, stop = _tiles(g.shape[0], experts, ends, g.device)
    int4 = qweight.dtype == torch.uint8
    steps = scale.shape[2] * (group // 2 if int4 else group) // _STEP
    _backward[len(owner), steps](
        g.contiguous(), qweight.view(torch.int8), scale, gx, owner, start, stop,
        outputs, inputs, qweight.shape[2], scale.shape[2],
        EXPERTS=experts, GROUP=group, INT4=int4, ROWS=tile, COLUMNS=_WIDE, STEP=_STEP,
    )  # fmt: skip
    return gx


def grouped_float(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`x_e W_e` as in `quant_matmul.grouped_matmul`, with `weight [E, in, out]` in x's type and of any strides."""
    experts, inputs, outputs = weight.shape
    y = x.new_empty(x.shape[0], outputs)
    tile, owner, start, stop = _tiles(x.shape[0], experts, ends, x.device)
    _float[len(owner), triton.cdiv(outputs, _WIDE)](
        x.contiguous(), weight, y, owner, start, stop, outputs, inputs, *weight.stride(),
        EXPERTS=experts, ROWS=tile, COLUMNS=_WIDE, STEP=_STEP,
    )  # fmt: skip
    return y


def _tiles(rows: int, experts: int, ends: Tensor | None, device: Any) -> tuple[int, Tensor, Tensor, Tensor]:
    """Rows of a tile; and of each tile: its expert (E: none), first row and the end of that expert's rows.

    Found on the device, without waiting for it: there are at most `rows / tile + E` tiles, and some stay idle.
    """
    tile = 64 if rows > 32 * experts or torch.are_deterministic_algorithms_enabled() else 16
    if ends is None:
        ends = torch.full((1,), rows, dtype=torch.int32, device=device)
    ends = ends.long()
    begins = torch.cat([ends.new_zeros(1), ends[:-1]])
    tiles = (ends - begins + tile - 1) // tile
    last = tiles.cumsum(0)
    number = torch.arange(triton.cdiv(rows, tile) + experts, device=device)
    owner = torch.searchsorted(last, number, right=True)
    known = owner.clamp(max=experts - 1)
    start = begins[known] + (number - (last - tiles)[known]) * tile
    return tile, owner.int(), start.int(), ends[known].int()


@triton.jit  # type: ignore[untyped-decorator]  # Triton ships no types
def _rows(owner, start, stop, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]  # compiled by Triton
    """The expert of this program's tile (none: as many as there are), its rows, and which of these there are."""
    tile = tl.program_id(0)
    row = tl.load(start + tile) + tl.arange(0, ROWS)
    return tl.load(owner + tile), row, row < tl.load(stop + tile)


@triton.jit
def _write(y, total, row, row_in, column, column_in, outputs):  # type: ignore[no-untyped-def]  # compiled by Triton
    """Store a tile of sums in y's type."""
    y_at = y + row.to(tl.int64)[:, None] * outputs + column[None, :]
    tl.store(y_at, total.to(y.dtype.element_ty), mask=row_in[:, None] & column_in[None, :])


@triton.jit  # type: ignore[untyped-decorator]  # Triton ships no types
def _forward(  # type: ignore[no-untyped-def]  # compiled by Triton
    x, q, scale, y, owner, start, stop, outputs, inputs, width, groups,
    EXPERTS: tl.constexpr, GROUP: tl.constexpr, INT4: tl.constexpr,  # Triton's habit
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One tile `[ROWS, COLUMNS]` of `x_e W_e^T`."""
    expert, row, row_in = _rows(owner, start, stop, ROWS)
    if expert >= EXPERTS:
        return
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    column_in = column < outputs
    x_row = x + row.to(tl.int64)[:, None] * inputs
    q_row = q + (expert.to(tl.int64) * outputs + column) * width
    s_row = scale + (expert.to(tl.int64) * outputs + column) * groups
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    stored: tl.constexpr = GROUP // 2 if INT4 else GROUP  # bytes of a whole group
    for group in range(groups):
        part = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        length = tl.minimum(inputs - group * GROUP, GROUP)
        half = (length + 1) // 2
        for first in range(0, stored, STEP):
            inner = first + tl.arange(0, STEP)
            byte_in = inner < (half if INT4 else length)
            byte = tl.load(
                q_row[None, :] + group * stored + inner[:, None], mask=byte_in[:, None] & column_in[None, :], other=0
            )
            low_at = group * GROUP + inner
            low_x = tl.load(x_row + low_at[None, :], mask=row_in[:, None] & byte_in[None, :], other=0.0)
            if INT4:
                wide = byte.to(tl.int32)
                low, high = (wide << 28) >> 28, (wide << 24) >> 28
                high_in = byte_in & (half + inner < length)
                high_x = tl.load(x_row + (low_at + half)[None, :], mask=row_in[:, None] & high_in[None, :], other=0.0)
                part = tl.dot(low_x, low.to(tl.float32).to(low_x.dtype), part, input_precision="ieee")
                part = tl.dot(high_x, high.to(tl.float32).to(high_x.dtype), part, input_precision="ieee")
            else:
                part = tl.dot(low_x, byte.to(tl.float32).to(low_x.dtype), part, input_precision="ieee")
        total += part * tl.load(s_row + group, mask=column_in, other=0.0)[None, :]
    _write(y, total, row, row_in, column, column_in, outputs)


@triton.jit  # type: ignore[untyped-decorator]  # Triton ships no types
def _float(  # type: ignore[no-untyped-def]  # compiled by Triton
    x, w, y, owner, start, stop, outputs, inputs, w_expert, w_inner, w_column,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One tile `[ROWS, COLUMNS]` of `x_e W_e`."""
    expert, row, row_in = _rows(owner, start, stop, ROWS)
    if expert >= EXPERTS:
        return
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    column_in = column < outputs
    x_row = x + row.to(tl.int64)[:, None] * inputs
    w_column_at = w + expert.to(tl.int64) * w_expert + column[None, :] * w_column
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in range(0, inputs, STEP):
        inner = first + tl.arange(0, STEP)
        inner_in = inner < inputs
        value = tl.load(x_row + inner[None, :], mask=row_in[:, None] & inner_in[None, :], other=0.0)
        weight = tl.load(w_column_at + inner[:, None] * w_inner, mask=inner_in[:, None] & column_in[None, :], other=0.0)
        total = tl.dot(value, weight, total, input_precision="ieee")
    _write(y, total, row, row_in, column, column_in, outputs)


@triton.jit  # type: ignore[untyped-decorator]  # Triton ships no types
def _backward(  # type: ignore[no-untyped-def]  # compiled by Triton
    g, q, scale, gx, owner, start, stop, outputs, inputs, width, groups,
    EXPERTS: tl.constexpr, GROUP: tl.constexpr, INT4: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One tile of `g_e W_e`: STEP bytes of a group, which are STEP inputs, or twice as many with int4."""
    expert, row, row_in = _rows(owner, start, stop, ROWS)
    if expert >= EXPERTS:
        return
    stored: tl.constexpr = GROUP // 2 if INT4 else GROUP
    group = tl.program_id(1) * STEP // stored
    inner = tl.program_id(1) * STEP % stored + tl.arange(0, STEP)
    length = tl.minimum(inputs - group * GROUP, GROUP)
    half = (length + 1) // 2
    byte_in = inner < (half if INT4 else length)
    low_sum = tl.zeros((ROWS, STEP), dtype=tl.float32)
    high_sum = tl.zeros((ROWS, STEP), dtype=tl.float32)
    for first in range(0, outputs, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        column_in = column < outputs
        at = expert.to(tl.int64) * outputs + column
        byte = tl.load(
            q + at[:, None] * width + group * stored + inner[None, :],
            mask=column_in[:, None] & byte_in[None, :], other=0,
        )  # fmt: skip
        s = tl.load(scale + at * groups + group, mask=column_in, other=0.0)
        g_at = g + row.to(tl.int64)[:, None] * outputs + column[None, :]
        value = tl.load(g_at, mask=row_in[:, None] & column_in[None, :], other=0.0)
        scaled = (value.to(tl.float32) * s[None, :]).to(value.dtype)
        if INT4:
            wide = byte.to(tl.int32)
            low, high = (wide << 28) >> 28, (wide << 24) >> 28
            low_sum = tl.dot(scaled, low.to(tl.float32).to(value.dtype), low_sum, input_precision="ieee")
            high_sum = tl.dot(scaled, high.to(tl.float32).to(value.dtype), high_sum, input_precision="ieee")
        else:
            low_sum = tl.dot(scaled, byte.to(tl.float32).to(value.dtype), low_sum, input_precision="ieee")
    kind = gx.dtype.element_ty
    gx_at = gx + row.to(tl.int64)[:, None] * inputs + (group * GROUP + inner)[None, :]
    tl.store(gx_at, low_sum.to(kind), mask=row_in[:, None] & byte_in[None, :])
    if INT4:
        high_in = byte_in & (half + inner < length)
        tl.store(gx_at + half, high_sum.to(kind), mask=row_in[:, None] & high_in[None, :])
