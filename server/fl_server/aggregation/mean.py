"""Federated averaging, one update at a time (McMahan et al. 2017, arXiv 1602.05629).

Weights are equal: example counts are private, and publishing them would cost budget. The running sum is kept in
float64, so memory is that of two adapters however many sites reply, and the result does not depend on the order in
which they do: a float64 sum of float32 values is exact unless some are a thousand million times smaller than others.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fl_server.aggregation.updates import CHUNK, Checked, Shapes, flat
from fl_shared.adapters.safetensors import Tensors


class StreamingMean(Checked):
    """The mean of updates of equal shape; each is forgotten after `add`."""

    def __init__(self, expected: Shapes | None = None) -> None:
        super().__init__(expected)
        self._sum: dict[str, NDArray[np.float64]] = {}

    def add(self, update: Tensors) -> None:
        """Take one update in; it is checked first, so a refused one changes nothing."""
        self.expected = self.check(update)
        for name, value in update.items():
            values = flat(value)
            if name not in self._sum:
                self._sum[name] = values.astype(np.float64)
                continue
            total = self._sum[name]
            for at in range(0, values.size, CHUNK):
                total[at : at + CHUNK] += values[at : at + CHUNK].astype(np.float64)
        self.count += 1

    def result(self) -> Tensors:
        """The mean, float32; the sum is used up. DataError when nothing was added."""
        self.require_any()
        mean: Tensors = {}
        for name, shape in sorted((self.expected or {}).items()):
            total = self._sum.pop(name)
            total /= self.count
            mean[name] = total.astype(np.float32).reshape(shape)
        return mean
