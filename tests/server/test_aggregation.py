"""Streaming federated averaging against the plain mean."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from fl_server.aggregation import StreamingMean
from fl_shared.errors import DataError

SHAPES = {"layer.lora_A": (2, 3), "layer.lora_B": (3,)}
_VALUE = st.floats(-1e3, 1e3, width=32)
_UPDATE = st.fixed_dictionaries(
    {name: hnp.arrays(np.float32, shape, elements=_VALUE) for name, shape in SHAPES.items()}
)


def _update(value: float) -> dict[str, NDArray[np.float32]]:
    return {name: np.full(shape, value, dtype=np.float32) for name, shape in SHAPES.items()}


@given(base=_UPDATE, updates=st.lists(_UPDATE, min_size=1, max_size=6))
@settings(deadline=None)
def test_streaming_equals_the_mean_in_double_precision(
    base: dict[str, NDArray[np.float32]], updates: list[dict[str, NDArray[np.float32]]]
) -> None:
    """base + mean, one update at a time, is the float64 result to float32 accuracy."""
    mean = StreamingMean(SHAPES)
    for update in updates:
        mean.add(update)
    assert mean.count == len(updates)
    found = mean.onto(base)
    for name in SHAPES:
        exact = base[name].astype(np.float64) + np.mean([u[name].astype(np.float64) for u in updates], axis=0)
        largest = max(1.0, float(np.max([np.abs(u[name]).max() for u in [base, *updates]])))
        np.testing.assert_allclose(found[name], exact, rtol=0, atol=largest * 1e-6 * len(updates))
        assert found[name].dtype == np.float32


def test_an_added_update_is_copied_not_kept() -> None:
    """What a caller does to its array afterwards changes nothing."""
    mean = StreamingMean()
    update = _update(1.0)
    mean.add(update)
    for value in update.values():
        value[...] = 99.0
    assert float(mean.onto({})["layer.lora_B"][0]) == 1.0


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused_and_changes_nothing(poison: float) -> None:
    """One bad value among good ones refuses the whole update by the tensor's name; the mean is that of the others."""
    mean = StreamingMean(SHAPES)
    mean.add(_update(2.0))
    bad = _update(5.0)
    bad["layer.lora_B"][1] = poison
    with pytest.raises(DataError, match=r"layer\.lora_B"):
        mean.add(bad)
    assert mean.count == 1
    assert float(mean.onto({})["layer.lora_A"][0, 0]) == 2.0


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda u: u.pop("layer.lora_B"), "missing"),
        (lambda u: u.update({"more": np.zeros(1, np.float32)}), "not expected"),
        (lambda u: u.update({"layer.lora_B": np.zeros(4, np.float32)}), "shape"),
        (lambda u: u.update({"layer.lora_A": np.zeros((3, 2), np.float32)}), "shape"),
        (lambda u: u.clear(), "no tensor"),
    ],
)
def test_other_names_or_shapes_are_refused(change: object, word: str) -> None:
    """An update of another form is refused in words that name the difference."""
    mean = StreamingMean(SHAPES)
    update = _update(1.0)
    change(update)  # type: ignore[operator]
    with pytest.raises(DataError, match=word):
        mean.add(update)
    assert mean.count == 0


def test_without_an_update_there_is_no_mean() -> None:
    """The mean of nothing is an error, not the base."""
    with pytest.raises(DataError, match="no update"):
        StreamingMean(SHAPES).onto(_update(0.0))


def test_a_value_that_could_overflow_a_sum_is_refused() -> None:
    """A finite value that no training reaches is refused by its tensor's name and changes nothing."""
    mean = StreamingMean(SHAPES)
    mean.add(_update(1.0))
    with pytest.raises(DataError, match="beyond 1e"):
        mean.add(_update(3e38))
    assert mean.count == 1
    for value in mean.onto({}).values():
        np.testing.assert_array_equal(value, np.float32(1.0))
