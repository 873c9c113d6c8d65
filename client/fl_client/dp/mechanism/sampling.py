"""Poisson sampling of privacy units with exactly the accountant's probability."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from fl_client.dp.mechanism.secure_random import SecureStream
from fl_shared.errors import EngineError

_ONE = 1 << 64


class PoissonSampler:
    """Each unit is in each step with probability q, independently of all others.

    A unit is taken when a uniform 64-bit word lies below `floor(q * 2**64)`. A float q of at least 2**-11 is met
    exactly; a smaller one is rounded down by less than 2**-64, which only helps privacy. May be used as the
    `batch_sampler` of a torch `DataLoader` over units.

    Args:
        units: number of privacy units.
        probability: q of the mechanism that is charged.
        steps: number of batches; an empty batch counts.
        stream: where the bits come from.
    """

    def __init__(self, units: int, probability: float, steps: int, stream: SecureStream) -> None:
        if units < 0 or not 0 < probability <= 1 or steps < 0:
            raise EngineError(
                f"cannot sample {units} units with probability {probability} for {steps} steps",
                fix="give a probability in (0, 1]",
            )
        self.units, self.probability, self.steps = units, probability, steps
        self._stream = stream
        self._threshold = int(Fraction(probability) * _ONE)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.steps):
            yield self.draw().tolist()

    def draw(self) -> NDArray[np.int64]:
        """The units of one step, ascending; may be empty."""
        words = self._stream.words(self.units)
        if self._threshold >= _ONE:
            return np.arange(self.units, dtype=np.int64)
        return np.flatnonzero(words < np.uint64(self._threshold)).astype(np.int64)
