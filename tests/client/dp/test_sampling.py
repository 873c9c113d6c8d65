"""Poisson sampling: the probability that is charged, nothing else."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fl_client.dp.mechanism.sampling import PoissonSampler
from fl_client.dp.mechanism.secure_random import SecureStream
from fl_shared.errors import EngineError

FALSE_ALARM = 1e-6


def _draws(units: int, probability: float, steps: int, seed: int) -> np.ndarray:
    sampler = PoissonSampler(units, probability, steps, SecureStream(seed.to_bytes(32, "big")))
    drawn = np.zeros((steps, units), dtype=bool)
    for step, batch in enumerate(sampler):
        drawn[step, batch] = True
    return drawn


@pytest.mark.parametrize("probability", [0.001, 0.1, 0.5, 0.93])
def test_batch_sizes_are_binomial(probability: float) -> None:
    """Batch sizes follow the binomial distribution of independent coins (chi-square on the step counts)."""
    units, steps = 400, 3000
    sizes = _draws(units, probability, steps, 1).sum(1)
    edges = np.unique(stats.binom.ppf(np.linspace(0, 1, 13)[1:-1], units, probability))
    cells = np.digitize(sizes, edges, right=True)
    cumulative = np.concatenate([[0], stats.binom.cdf(edges, units, probability), [1]])
    expected = np.diff(cumulative) * steps
    observed = np.bincount(cells, minlength=len(expected))
    keep = expected > 1
    assert stats.chisquare(observed[keep], expected[keep] * observed[keep].sum() / expected[keep].sum()).pvalue > (
        FALSE_ALARM
    )


def test_a_fixed_batch_size_is_noticed() -> None:
    """The spread of batch sizes tells Poisson sampling from shuffled batches of a fixed size."""
    units, steps, q = 400, 3000, 0.1
    low, high = stats.chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], steps - 1) / (steps - 1)
    variance = _draws(units, q, steps, 2).sum(1).var(ddof=1) / (units * q * (1 - q))
    assert low < variance < high
    shuffled = np.full(steps, units * q)
    assert not low < shuffled.var(ddof=1) / (units * q * (1 - q)) < high


def test_units_are_drawn_alike_and_independently() -> None:
    """Every unit comes equally often, and no two neighbours come together more often than by chance."""
    drawn = _draws(300, 0.2, 4000, 3)
    z = (drawn.sum(0) - 800) / np.sqrt(4000 * 0.2 * 0.8)
    assert np.abs(z).max() < stats.norm.isf(FALSE_ALARM / 600)
    together = (drawn[:, :-1] & drawn[:, 1:]).sum(0)
    z = (together - 4000 * 0.04) / np.sqrt(4000 * 0.04 * 0.96)
    assert np.abs(z).max() < stats.norm.isf(FALSE_ALARM / 600)
    again = (drawn[:-1] & drawn[1:]).sum()
    z = (again - 3999 * 300 * 0.04) / np.sqrt(3999 * 300 * 0.04 * (0.96 + 2 * 0.2 - 2 * 0.04))
    assert abs(z) < stats.norm.isf(FALSE_ALARM)


@given(st.floats(min_value=2**-11, max_value=1.0, exclude_max=True))
def test_probability_is_met_exactly(probability: float) -> None:
    """For q of at least 2**-11 the threshold over 2**64 equals q as a fraction, with no rounding."""
    sampler = PoissonSampler(10, probability, 1, SecureStream())
    assert Fraction(sampler._threshold, 1 << 64) == Fraction(probability)


@given(st.floats(min_value=2**-60, max_value=2**-11))
def test_small_probability_is_never_exceeded(probability: float) -> None:
    """A tiny q is rounded down, never up: the sampler takes no more than the accountant charges."""
    sampler = PoissonSampler(10, probability, 1, SecureStream())
    assert 0 <= Fraction(probability) - Fraction(sampler._threshold, 1 << 64) < Fraction(1, 1 << 64)


def test_probability_one_takes_everyone() -> None:
    """With q = 1 every step holds every unit."""
    sampler = PoissonSampler(7, 1.0, 3, SecureStream())
    assert list(sampler) == [list(range(7))] * 3
    assert len(sampler) == 3


def test_empty_batches_are_steps() -> None:
    """With few units and a small q empty batches occur, and each counts as a step."""
    drawn = _draws(3, 0.05, 500, 4)
    assert drawn.shape[0] == 500
    assert (drawn.sum(1) == 0).sum() > 300


@pytest.mark.parametrize("probability", [0.05, 1.0])
def test_without_units_every_batch_is_empty(probability: float) -> None:
    """No unit may have a label of a run; its steps are taken all the same."""
    assert list(PoissonSampler(0, probability, 3, SecureStream())) == [[], [], []]


@pytest.mark.parametrize(("units", "probability", "steps"), [(-1, 0.5, 1), (3, 0.0, 1), (3, 1.5, 1), (3, 0.5, -1)])
def test_impossible_sampling_is_refused(units: int, probability: float, steps: int) -> None:
    """A negative number of units, a probability outside (0, 1] or a negative number of steps is a typed error."""
    with pytest.raises(EngineError, match="cannot sample"):
        PoissonSampler(units, probability, steps, SecureStream())
