"""What every update must be before any rule sees it: the round's tensors, finite, of moderate size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fl_shared.adapters.safetensors import Tensors, require_same_shapes, shapes
from fl_shared.errors import DataError

Form = tuple[tuple[str, tuple[int, ...]], ...]
Shapes = dict[str, tuple[int, ...]]

MAX_VALUE = 1e6  # no use of LoRA moves a weight so far in one round; it keeps every sum inside float32
CHUNK = 1 << 16  # values worked on at a time: they stay in the processor's cache from the first pass to the last


def form(tensors: Mapping[str, np.ndarray]) -> Form:
    """Names and shapes, in an order that does not depend on the sender."""
    return tuple(sorted((name, value.shape) for name, value in tensors.items()))


def require_moderate(tensors: Tensors) -> None:
    """DataError naming the first tensor with NaN, infinity or a value beyond `MAX_VALUE` in size."""
    for name, value in tensors.items():
        if not value.size:
            continue
        largest = max(float(value.max()), -float(value.min()))  # NaN when there is one
        if not np.isfinite(largest):
            raise DataError(f"adapter tensor {name} holds NaN or infinity", fix="the sender must not release it")
        if largest > MAX_VALUE:
            raise DataError(
                f"adapter tensor {name} holds a value beyond {MAX_VALUE:g}", fix="the sender must not release it"
            )


class Rule(Protocol):
    """Takes updates of equal shape one by one, and makes one update of them."""

    @property
    def count(self) -> int:
        """Updates taken in."""

    def add(self, update: Tensors) -> None:
        """Take one update in; DataError, with nothing changed, when it is not as it must be."""

    def result(self) -> Tensors:
        """The one update, float32; the rule is used up. DataError when nothing was added."""


class Checked:
    """The checks that all rules share. `expected` fixes names and shapes before the first update, when known."""

    def __init__(self, expected: Shapes | None = None) -> None:
        self.expected = expected
        self.count = 0

    def check(self, update: Tensors) -> Shapes:
        """Names and shapes of the update.

        Raises:
            DataError: it is empty, of other names or shapes, not finite or beyond `MAX_VALUE`.
        """
        if not update:
            raise DataError("the update holds no tensor", fix="the sender must train at least one tensor")
        if self.expected is not None:
            require_same_shapes(update, self.expected)
        require_moderate(update)
        return shapes(update)

    def require_any(self) -> None:
        """DataError when nothing was added."""
        if self.count == 0:
            raise DataError("there is no update to average", fix="wait for the sites")


def flat(value: NDArray[np.float32]) -> NDArray[np.float32]:
    """The values in C order, `[size]`; a view when they lie so already."""
    return np.ascontiguousarray(value).reshape(-1)
