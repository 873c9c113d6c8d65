"""The tests of noise and sampler: silent about the right engine, certain about faults that no audit can prove."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from fl_client.dp import optimizer
from fl_client.dp.adapt import AdaptedModel
from fl_client.dp.audit import distribution
from fl_client.dp.audit.distribution import DistributionResult, check_distributions
from fl_client.dp.engine import DPEngine
from fl_client.dp.mechanism import noise
from fl_client.dp.mechanism.sampling import PoissonSampler
from fl_client.dp.mechanism.secure_random import SecureStream
from fl_shared.privacy.mechanism import Mechanism
from helpers.random_models import adapted_small

MECHANISM = Mechanism(noise_multiplier=1.5, sampling_probability=0.1, steps=3, clipping_norm=0.7)


@pytest.fixture(scope="module")
def adapted() -> AdaptedModel:
    """A small model; what is tested does not depend on it."""
    return adapted_small("qwen3_moe", quantised=True)


class _Keyed(DPEngine):
    """The engine with known keys, so that a verdict stays a verdict."""

    def __init__(self, *args, **more) -> None:  # type: ignore[no-untyped-def]
        super().__init__(*args, **more, sampling=SecureStream(bytes(32)), noise=SecureStream(bytes([1] * 32)))


def check(adapted: AdaptedModel, mechanism: Mechanism = MECHANISM) -> dict[str, DistributionResult]:
    """Both results by name."""
    return {result.name: result for result in check_distributions(adapted, mechanism, engine=_Keyed)}


@pytest.mark.parametrize("q", [0.01, 0.1, 0.5, 0.9, 1.0])
def test_the_right_engine_is_left_alone(adapted: AdaptedModel, q: float) -> None:
    """Neither test accuses, and the model is as it was."""
    before = {name: p.detach().clone() for name, p in adapted.trainable.items()}
    found = check(adapted, Mechanism(1.5, q, 3, 0.7))
    assert {name: result.accused for name, result in found.items()} == {"noise": False, "sampler": False}
    assert min(result.p_value for result in found.values()) > 1e-3
    assert all(bool((p == before[name]).all()) for name, p in adapted.trainable.items())


@pytest.mark.parametrize("factor", [0.0, 0.5, 0.98, 1.02])
def test_noise_at_another_scale_is_accused(
    adapted: AdaptedModel, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    """No noise, half the noise, and noise that is 2 percent off."""
    right = noise._Draws.next
    monkeypatch.setattr(noise._Draws, "next", lambda self, n: (right(self, n) * factor).astype(np.int64))
    assert check(adapted)["noise"].accused


def test_noise_added_twice_is_accused(adapted: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when two ranks each added their own."""
    right = noise._Draws.next
    monkeypatch.setattr(noise._Draws, "next", lambda self, n: right(self, n).copy() + right(self, n))
    assert check(adapted)["noise"].accused


def test_noise_is_held_against_what_the_grid_adds(adapted: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large slack widens the noise, and the right engine stays right."""
    plan = noise.choose_grid
    monkeypatch.setattr(optimizer, "choose_grid", lambda **given: plan(**given | {"slack": 0.1}))
    assert check(adapted)["noise"].p_value > 1e-3


def test_a_grid_below_the_charge_is_accused(adapted: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise that fits its own grid, when the grid is made for less than sigma C."""
    plan = noise.choose_grid
    monkeypatch.setattr(optimizer, "choose_grid", lambda **given: plan(**given | {"noise_multiplier": 1.49}))
    assert check(adapted)["noise"].accused


def test_noise_that_is_no_number_is_accused() -> None:
    """A comparison with NaN must not acquit."""
    assert distribution.noise_p_value(np.full(10, np.nan), 1.5 * 0.7, MECHANISM) == 0


def test_shuffled_batches_are_accused(adapted: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of a fixed size, as a shuffling loader makes them, are no Poisson samples."""
    rng = np.random.default_rng(0)
    monkeypatch.setattr(PoissonSampler, "draw", lambda self: np.sort(rng.permutation(self.units)[: self.units // 10]))
    assert check(adapted)["sampler"].accused


@pytest.mark.parametrize("q", [0.097, 0.103])
def test_another_probability_is_accused(adapted: AdaptedModel, monkeypatch: pytest.MonkeyPatch, q: float) -> None:
    """A sampler that takes units more or less often than is charged."""
    right = PoissonSampler.__init__
    monkeypatch.setattr(
        PoissonSampler, "__init__", lambda self, units, _, steps, stream: right(self, units, q, steps, stream)
    )
    assert check(adapted)["sampler"].accused


def _first(sizes: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """The first units, always."""
    return [np.arange(size) for size in sizes]


def _round_robin(sizes: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Whoever comes next."""
    return [np.arange(end - size, end) for size, end in zip(sizes, np.cumsum(sizes), strict=True)]


def _epochs(sizes: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Whoever comes next in a list that is shuffled anew when it is at its end."""
    order = np.concatenate([rng.permutation(distribution.UNITS) for _ in range(sizes.sum() // distribution.UNITS + 1)])
    return np.split(order[: sizes.sum()], np.cumsum(sizes)[:-1])


def _neighbours(sizes: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Units in a row, from a random one on."""
    return [rng.integers(distribution.UNITS) + np.arange(size) for size in sizes]


def _again(sizes: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Every second batch is the one before."""
    draws = [rng.permutation(distribution.UNITS)[:size] for size in sizes]
    return [draws[at - at % 2] for at in range(len(draws))]


@pytest.mark.parametrize("q", [0.1, 0.01, 0.001])
@pytest.mark.parametrize("sampler", [_first, _round_robin, _epochs, _neighbours, _again])
def test_binomial_sizes_do_not_excuse_a_sampler(
    sampler: Callable[[np.ndarray, np.random.Generator], list[np.ndarray]], q: float
) -> None:
    """Batches of the right sizes are accused when it is not independent chance that fills them."""
    rng = np.random.default_rng(5)
    drawn = np.zeros((distribution.STEPS, distribution.UNITS), dtype=bool)
    sizes = rng.binomial(distribution.UNITS, q, distribution.STEPS)
    for step, units in enumerate(sampler(sizes, rng)):
        drawn[step, units % distribution.UNITS] = True
    assert distribution.sampler_p_value(drawn, Mechanism(1.5, q, 3, 0.7)) < distribution.FALSE_ALARM


def test_a_favoured_unit_is_accused() -> None:
    """One unit of 400 that comes 1.6 times as often as is charged."""
    rng = np.random.default_rng(6)
    drawn = rng.random((distribution.STEPS, distribution.UNITS)) < 0.1
    drawn[:, 7] = rng.random(distribution.STEPS) < 0.16
    assert distribution.sampler_p_value(drawn, MECHANISM) < distribution.FALSE_ALARM


@pytest.mark.parametrize("q", [0.001, 0.1, 0.5, 0.97])
def test_no_p_value_comes_more_often_than_it_says(q: float) -> None:
    """All 512 samples of 3 steps and 3 units, with their chances: p-values up to x have at most x together."""
    mechanism = Mechanism(1.5, q, 3, 0.7)
    found = []
    for bits in itertools.product([False, True], repeat=9):
        drawn = np.array(bits).reshape(3, 3)
        found.append((distribution.sampler_p_value(drawn, mechanism), q ** sum(bits) * (1 - q) ** (9 - sum(bits))))
    values, chances = np.array(sorted(found)).T
    last = np.append(values[1:] > values[:-1], True)
    assert (np.cumsum(chances)[last] <= values[last] + 1e-11).all()


@pytest.mark.parametrize("q", [1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
def test_small_probabilities_raise_no_more_false_alarms(q: float) -> None:
    """At the real size: the spread's tails agree with plain convolutions, whose sums of positives lose nothing."""
    counts, trials, centre = 2000, 400, round(400 * q)
    squares = (np.arange(trials + 1) - centre) ** 2
    one = np.bincount(squares, stats.binom.pmf(np.arange(trials + 1), trials, q))[:8000]
    sums = np.ones(1)
    for bit in f"{counts:b}":  # the sum of n squares, n growing by the digits of 2000
        sums = np.convolve(sums, sums)[:10_000]
        if bit == "1":
            sums = np.convolve(sums, one)[:10_000]
    for chance in (1e-9, 1e-7, 1e-4, 0.5):
        tail = np.cumsum(sums[::-1])[::-1]
        seen = int(np.flatnonzero(tail <= chance)[0])
        made = np.full(counts, centre)
        for at in range(counts):  # counts whose squared deviations add up to `seen`
            made[at] += int(np.sqrt(seen - ((made - centre) ** 2).sum()))
        wanted = 2 * min(tail[seen], sums[: seen + 1].sum())
        assert distribution._spread_p_value(made, trials, q) == pytest.approx(wanted, rel=1e-3, abs=1e-11)


@pytest.mark.parametrize(("q", "steps"), [(0.1, 300), (1e-3, 300), (1e-5, 2000)])
def test_right_samplers_are_seldom_suspected(q: float, steps: int) -> None:
    """Of 400, a p-value below one in a hundred comes about as often as it should, or less."""
    rng = np.random.default_rng(2)
    mechanism = Mechanism(1.5, q, 3, 0.7)
    values = [distribution.sampler_p_value(rng.random((steps, 100)) < q, mechanism) for _ in range(400)]
    assert sum(value < 0.01 for value in values) <= 15  # at most 4 expected; more than 15 has a chance of 8e-6
