"""How float32 values travel: as they are, rounded to bfloat16, or as int8 in blocks of 128 with one scale each.

Rounding is to the nearest, so equal values give equal bytes on every machine. What is lost is bounded value by value:

* `float32`: nothing;
* `bfloat16`: at most 2^-8 of the value (below 2^-126: at most 2^-134);
* `int8`: at most 1/254 of the largest value of its block (one part in ten thousand more for float32 arithmetic, and
  blocks whose largest value is below 127 x 2^-126 become zero).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BLOCK = 128
_LEVELS = 127
_SMALLEST_SCALE = np.float32(2.0**-126)  # below it float32 loses digits, and a quotient would leave the int8 range

F32 = NDArray[np.float32]


def to_bfloat16(values: F32) -> NDArray[np.uint16]:
    """The upper halves of finite values, rounded to nearest, ties to even; beyond 3.39e38 they become infinite."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    upper: NDArray[np.uint16] = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    return upper


def from_bfloat16(upper: NDArray[np.uint16]) -> F32:
    """The float32 values that the upper halves stand for, exactly."""
    return (upper.astype(np.uint32) << np.uint32(16)).view(np.float32)


def blocks(size: int) -> int:
    """How many scales `size` values have."""
    return -(-size // BLOCK)


def to_int8(values: F32) -> tuple[NDArray[np.int8], F32]:
    """Finite values in C order to int8 `[size]` in -127..127 and float32 scales `[blocks]`: largest of block / 127."""
    count = blocks(values.size)
    padded = np.zeros(count * BLOCK, dtype=np.float32)
    padded[: values.size] = values.reshape(-1)
    table = padded.reshape(count, BLOCK)
    scales = np.maximum(table.max(axis=1, initial=0), -table.min(axis=1, initial=0)) / np.float32(_LEVELS)
    scales[scales < _SMALLEST_SCALE] = 0
    np.divide(table, np.where(scales > 0, scales, np.float32(np.inf))[:, None], out=table)
    return np.rint(padded[: values.size]).astype(np.int8), scales


def from_int8(quantised: NDArray[np.int8], scales: F32) -> F32:
    """int8 `[size]` times the scale of its block: float32 `[size]`."""
    full = quantised.size // BLOCK * BLOCK
    values = quantised.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # a hostile scale gives infinity, which the receiver refuses
        values[:full].reshape(-1, BLOCK)[...] *= scales[: full // BLOCK, None]
        if full < quantised.size:
            values[full:] *= scales[-1]
    return values
