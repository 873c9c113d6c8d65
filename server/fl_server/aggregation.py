"""Federated averaging, one update at a time (McMahan et al. 2017, arXiv 1602.05629).

Weights are equal: example counts are private, and publishing them would cost budget. The running mean is
kept in float32, so memory is that of two adapters however many sites reply.
"""

from __future__ import annotations

import numpy as np

from fl_shared.adapter import Tensors, require_finite, require_same_shapes, shapes
from fl_shared.errors import DataError


class StreamingMean:
    """The mean of updates of equal shape; each is forgotten after `add`."""

    def __init__(self, expected: dict[str, tuple[int, ...]] | None = None) -> None:
        """`expected` fixes names and shapes before the first update, when they are known."""
        self._expected = expected
        self._sum: Tensors = {}
        self.count = 0

    @property
    def expected(self) -> dict[str, tuple[int, ...]] | None:
        """Names and shapes that every further update must have."""
        return self._expected

    def check(self, update: Tensors) -> None:
        """DataError when the update is empty, of other names or shapes, or not finite."""
        if not update:
            raise DataError("the update holds no tensor", fix="the sender must train at least one tensor")
        if self._expected is not None:
            require_same_shapes(update, self._expected)
        require_finite(update)

    def add(self, update: Tensors) -> None:
        """Take one update in; it is checked first, so a refused one changes nothing."""
        self.check(update)
        if self._expected is None:
            self._expected = shapes(update)
        for name, value in update.items():
            if name in self._sum:
                self._sum[name] += value
            else:
                self._sum[name] = value.astype(np.float32, copy=True)
        self.count += 1

    def onto(self, base: Tensors) -> Tensors:
        """`base + mean of the updates`, float32; the sum is used up.

        Raises:
            DataError: nothing was added, or the result is not finite.
        """
        if self.count == 0:
            raise DataError("there is no update to average", fix="wait for the sites")
        if base:
            require_same_shapes(base, shapes(self._sum))
        scale = np.float32(1.0 / self.count)
        result = self._sum
        self._sum = {}
        for name, value in result.items():
            value *= scale
            if name in base:
                value += base[name]
        require_finite(result)
        return result
