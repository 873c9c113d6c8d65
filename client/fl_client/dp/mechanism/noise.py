"""Discrete Gaussian noise on a fixed-point grid.

A Gaussian in floating point has holes and uneven spacing that reveal the value beneath (Mironov 2012, "On
significance of the least significant bits for differential privacy"). Here the summed gradient is rounded to
multiples of a step `g`, integers drawn from the discrete Gaussian are added, and only then is the sum turned into
floats, which is post-processing. The discrete Gaussian with integer shift has the concentrated-DP curve of the
continuous one (Canonne, Kamath and Steinke 2020, arXiv 2004.00010, Theorem 4).

Sampling adds two or three table look-ups at different scales (Micciancio and Walter 2017, eprint 2017/259, Section
4): `X0 + 2**10 X1 (+ 2**20 X2)` with every `Xi` discrete Gaussian of width 2**11. The sum over the hidden coarse
part is flat within `2 exp(-2 pi**2 tau**2) < 2**-110` for tau = 2, so the result is discrete Gaussian up to that
factor. The tables are alias tables (Walker 1977) of probabilities in whole multiples of 2**-96. docs/decisions/0021
adds up what these approximations cost: for 10**6 coordinates and 10**4 steps at most 0.0008 in epsilon and, at
epsilon 8, less than 3e-9 in delta.
"""

from __future__ import annotations

import functools
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fl_client.dp.mechanism.secure_random import SecureStream
from fl_shared.errors import EngineError

BASE_WIDTH = 1 << 11
SCALE = 1 << 10
CELLS = 1 << 16  # outcomes -2**15 .. 2**15-1: 16 widths on either side
THRESHOLD_BITS = 80  # 16 decide all but one draw in 2**16, and 64 more that one
BLOCK = 1 << 13
PART, PART_BLOCK = 1 << 20, 1 << 15  # longer sums are drawn in parts side by side; short calls would queue for the GIL
MAX_DRAWS = 1 << 40  # in one round: what the tables cost grows with them (docs/decisions/0021)
MAX_ROUNDING = 2**-10  # of the clipping norm; decides between two and three tables
_PRECISION = 320


@dataclass(frozen=True)
class Grid:
    """The noise of one logical step.

    Attributes:
        step: g, what one integer is worth.
        width: standard deviation of the integers.
        tables: 2 or 3.
        sensitivity: L2 bound on one unit's change of the rounded sum, rounding and float slack counted.
    """

    step: float
    width: float
    tables: int
    sensitivity: float


def choose_grid(*, clipping_norm: float, noise_multiplier: float, dimensions: int, slack: float) -> Grid:
    """Choose the step so that the noise's standard deviation is `noise_multiplier` times the real sensitivity.

    Two neighbouring sums differ by at most C (1 + slack); rounding each coordinate of both moves them apart by at
    most `g sqrt(d)` more. With `g = sigma * sensitivity / width` this gives
    `sensitivity = C (1 + slack) / (1 - sigma sqrt(d) / width)`.

    Args:
        clipping_norm: C.
        noise_multiplier: sigma, as charged.
        dimensions: d, all coordinates released together.
        slack: bound on the float error of one unit's clipped contribution, relative to C.

    Raises:
        EngineError: no grid keeps the rounding small.
    """
    for tables in (2, 3):
        width = BASE_WIDTH * math.sqrt(sum(SCALE ** (2 * level) for level in range(tables)))
        loss = noise_multiplier * math.sqrt(dimensions) / width
        if loss <= MAX_ROUNDING:
            sensitivity = clipping_norm * (1 + slack) / (1 - loss)
            return Grid(noise_multiplier * sensitivity / width, width, tables, sensitivity)
    raise EngineError(
        f"noise multiplier {noise_multiplier} over {dimensions} coordinates is too coarse for the noise grid",
        fix="lower the noise multiplier or the LoRA rank",
    )


def noisy_sum(
    total: NDArray[np.floating[Any]], grid: Grid, stream: SecureStream, threads: int = 1
) -> NDArray[np.float32]:
    """Round `[d]` to the grid, add the noise as integers, and only then return to floats: float32 `[d]`.

    The integers stand in doubles: a noise value is below 2**37 and exact, and of a sum too large for 53 bits the
    rounding is a function of the exact sum, so it is post-processing. Long sums are cut into parts, each with a stream
    of its own, which up to `threads` threads draw side by side: numpy and the cipher let go of the interpreter.
    """
    out = np.empty(total.shape[0], np.float32)
    if len(out) <= PART:
        _add_noise(total, out, grid, stream, BLOCK)
        return out
    starts = range(0, len(out), PART)

    def draw(at: int, own: SecureStream) -> None:
        _add_noise(total[at : at + PART], out[at : at + PART], grid, own, PART_BLOCK)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(draw, starts, [stream.fork() for _ in starts]))
    return out


def _add_noise(
    total: NDArray[np.floating[Any]], out: NDArray[np.float32], grid: Grid, stream: SecureStream, most: int
) -> None:
    """The same into `out`, at most `most` coordinates at a time."""
    draws = _Draws(grid.tables, stream, most)
    for at in range(0, len(out), most):
        block = total[at : at + most].astype(np.float64)
        block /= grid.step
        np.rint(block, out=block)
        block += draws.next(len(block))
        block *= grid.step
        out[at : at + most] = block


def discrete_gaussian(count: int, grid: Grid, stream: SecureStream) -> NDArray[np.int64]:
    """`count` independent integers of width `grid.width`."""
    draws = _Draws(grid.tables, stream, BLOCK)
    blocks = [draws.next(min(BLOCK, count - at)).astype(np.int64) for at in range(0, count, BLOCK)]
    return np.concatenate([np.empty(0, np.int64), *blocks])


class _Draws:
    """Discrete Gaussian integers, at most `most` at a time, so that every array stays in the cache.

    Of each 32-bit word the lower half picks a cell of the alias table, and the upper half keeps it or takes its
    alias; one word in 2**16 ties, and 64 more bits decide.
    """

    def __init__(self, tables: int, stream: SecureStream, most: int) -> None:
        size = tables * most
        self._tables, self._stream = tables, stream
        self._word, self._entry, self._value, self._floor = (np.empty(size, "<u4") for _ in range(4))
        self._index, self._total = np.empty(size, np.intp), np.empty(most)

    def next(self, count: int) -> NDArray[np.float64]:
        """`count <= most` draws, integers in doubles, valid until the next call."""
        value = self._base(self._tables * count)
        total = self._total[:count]
        np.copyto(total, value[-count:])
        for level in range(self._tables - 2, -1, -1):
            total *= SCALE
            total += value[level * count : (level + 1) * count]
        total -= CELLS // 2 * sum(SCALE**level for level in range(self._tables))
        return total

    def _base(self, count: int) -> NDArray[np.uint32]:
        """Cells 0..CELLS-1 drawn from the alias table: outcomes of width BASE_WIDTH, plus CELLS / 2."""
        packed, rest = _alias_table()
        word, entry, value, floor = (x[:count] for x in (self._word, self._entry, self._value, self._floor))
        index = self._index[:count]
        self._stream.fill(word)
        np.bitwise_and(word, 0xFFFF, out=value)
        np.copyto(index, value)
        packed.take(index, out=entry, mode="wrap")  # 16 bits are always inside: no bounds to check
        np.right_shift(entry, 16, out=floor)
        word >>= 16
        word -= floor  # below zero, that is beyond 2**31: take the alias
        if np.count_nonzero(word) < count:
            tied = np.flatnonzero(word == 0)
            word[tied[self._stream.words(tied.size) >= rest[index[tied]]]] -= 1
        word >>= 16  # 0xFFFF for the alias, 0 for the cell
        word &= entry
        value ^= word
        return value


@functools.cache
def _alias_table() -> tuple[NDArray[np.uint32], NDArray[np.uint64]]:
    """Walker's table of the discrete Gaussian: a cell is kept with probability threshold / 2**80.

    Returns:
        of each cell, 65535 less the threshold's upper 16 bits, above what turns the cell into its alias by exclusive
        or (16 bits); and the threshold's lower 64 bits.
    """
    mass = discrete_gaussian_mass(BASE_WIDTH, CELLS // 2, THRESHOLD_BITS + CELLS.bit_length() - 1)
    one = 1 << THRESHOLD_BITS
    # outcome -2**15 is never drawn: symmetric support
    left = [0, *reversed(mass[1:]), *mass]
    threshold, alias = list(left), list(range(CELLS))
    small = [cell for cell, weight in enumerate(left) if weight < one]
    large = [cell for cell, weight in enumerate(left) if weight >= one]
    while small and large:
        poor, rich = small.pop(), large[-1]
        alias[poor] = rich
        threshold[rich] -= one - threshold[poor]
        if threshold[rich] < one:
            small.append(large.pop())
    # what is left has exactly weight one and is its own alias: any threshold does
    threshold = [min(value, one - 1) for value in threshold]
    packed = [
        (0xFFFF - (value >> 64)) << 16 | cell ^ other
        for cell, (value, other) in enumerate(zip(threshold, alias, strict=True))
    ]
    rest = [value & (2**64 - 1) for value in threshold]
    return np.array(packed, dtype=np.uint32), np.array(rest, dtype=np.uint64)


def discrete_gaussian_mass(width: int, support: int, bits: int) -> list[int]:
    """Probabilities of 0..support-1 as integers that sum, with the mirrored side, to 2**bits.

    Integer arithmetic throughout: `exp(-x**2 / (2 width**2))` by the recurrence `r(x+1) = r(x) e**-(2x+1)/(2w**2)`.
    """
    one = 1 << _PRECISION
    term, decay, n = one, 0, 0
    while term:  # exp(-1 / (2 width**2)) by its series
        decay += term if n % 2 == 0 else -term
        n += 1
        term //= 2 * width * width * n
    weights, value, ratio = [], one, decay
    square = decay * decay >> _PRECISION
    for _ in range(support):
        weights.append(value)
        value = value * ratio >> _PRECISION
        ratio = ratio * square >> _PRECISION
    total = weights[0] + 2 * sum(weights[1:])
    mass = [(weight << bits) // total for weight in weights]
    mass[0] += (1 << bits) - (mass[0] + 2 * sum(mass[1:]))
    return mass
