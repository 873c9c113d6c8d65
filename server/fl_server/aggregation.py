"""Federated averaging, one update at a time (McMahan et al. 2017, arXiv 1602.05629).

Weights are equal: example counts are private, and publishing them would cost budget. The running mean is
kept in float32, so memory is that of two adapters however many sites reply.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fl_shared.adapter import Tensors, require_finite, require_same_shapes, shapes
from fl_shared.errors import DataError

Form = tuple[tuple[str, tuple[int, ...]], ...]

MAX_VALUE = 1e6  # no use of LoRA moves a weight so far in one round; it keeps every sum inside float32
MAX_FORMS = 4  # each form costs one adapter of memory


def form(tensors: Mapping[str, np.ndarray]) -> Form:
    """Names and shapes, in an order that does not depend on the sender."""
    return tuple(sorted((name, value.shape) for name, value in tensors.items()))


def require_moderate(tensors: Tensors) -> None:
    """DataError naming the first tensor with NaN, infinity or a value beyond `MAX_VALUE` in size."""
    require_finite(tensors)
    for name, value in tensors.items():
        if value.size and max(float(value.max()), -float(value.min())) > MAX_VALUE:
            raise DataError(
                f"adapter tensor {name} holds a value beyond {MAX_VALUE:g}", fix="the sender must not release it"
            )


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
        """DataError when the update is empty, of other names or shapes, not finite or beyond `MAX_VALUE`."""
        if not update:
            raise DataError("the update holds no tensor", fix="the sender must train at least one tensor")
        if self._expected is not None:
            require_same_shapes(update, self._expected)
        require_moderate(update)

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


class MeanByForm:
    """A mean for each form of update, while nobody knows which form is right.

    Before the first committed round the coordinator, which has no model, cannot know names and shapes. If
    the first reply decided, one hostile site could shut every other out; so the form of most sites wins.
    """

    def __init__(self, expected: dict[str, tuple[int, ...]] | None = None) -> None:
        """`expected` fixes the form when it is known; then there is only one."""
        self._means: dict[Form, StreamingMean] = {}
        self._known = expected is not None
        if expected is not None:
            self._means[tuple(sorted(expected.items()))] = StreamingMean(expected)

    def add(self, update: Tensors) -> Form:
        """Take one update in; its form.

        Raises:
            DataError: as `StreamingMean.check`, or one form too many. Nothing has changed then.
        """
        if self._known:
            key, mean = next(iter(self._means.items()))
            mean.add(update)
            return key
        key = form(update)
        found = self._means.get(key)
        if found is None and len(self._means) >= MAX_FORMS:
            raise DataError(
                "its tensors are of yet another form than the other sites'",
                fix="sender and receiver must use the same run spec",
            )
        mean = found or StreamingMean()
        mean.add(update)
        self._means[key] = mean
        return key

    @property
    def most(self) -> int:
        """How many updates the most frequent form has."""
        return max((mean.count for mean in self._means.values()), default=0)

    def winner(self) -> tuple[Form, StreamingMean]:
        """The form of most updates, and their mean.

        Raises:
            DataError: no update, or no form has more than every other.
        """
        ranked = sorted(self._means.items(), key=lambda pair: -pair[1].count)
        if not ranked or ranked[0][1].count == 0:
            raise DataError("there is no update to average", fix="wait for the sites")
        if len(ranked) > 1 and ranked[0][1].count == ranked[1][1].count:
            raise DataError(
                "the sites disagree on the adapter's tensors, and no form has a majority",
                fix="compare the sites' versions and base models",
            )
        return ranked[0]
