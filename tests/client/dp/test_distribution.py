"""The tests of noise and sampler: silent about the right engine, certain about faults that no audit can prove."""

from __future__ import annotations

import numpy as np
import pytest

from fl_client.dp import distribution, noise
from fl_client.dp.adapt import AdaptedModel
from fl_client.dp.distribution import DistributionResult, check_distributions
from fl_client.dp.engine import DPEngine
from fl_client.dp.sampling import PoissonSampler
from fl_client.dp.secure_random import SecureStream
from fl_shared.privacy import Mechanism
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
    before = {name: p.detach().clone() for name, p in adapted.plan.items()}
    found = check(adapted, Mechanism(1.5, q, 3, 0.7))
    assert {name: result.accused for name, result in found.items()} == {"noise": False, "sampler": False}
    assert min(result.p_value for result in found.values()) > 1e-3
    assert all(bool((p == before[name]).all()) for name, p in adapted.plan.items())


@pytest.mark.parametrize("factor", [0.0, 0.5, 0.95, 1.05])
def test_noise_at_another_scale_is_accused(
    adapted: AdaptedModel, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    """No noise, half the noise, and noise that is 5 percent off."""
    right = noise._Draws.next
    monkeypatch.setattr(noise._Draws, "next", lambda self, n: (right(self, n) * factor).astype(np.int64))
    assert check(adapted)["noise"].accused


def test_noise_added_twice_is_accused(adapted: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when two ranks each added their own."""
    right = noise._Draws.next
    monkeypatch.setattr(noise._Draws, "next", lambda self, n: right(self, n).copy() + right(self, n))
    assert check(adapted)["noise"].accused


def test_shuffled_batches_are_accused(adapted: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of a fixed size, as a shuffling loader makes them, are no Poisson samples."""
    rng = np.random.default_rng(0)
    monkeypatch.setattr(PoissonSampler, "draw", lambda self: np.sort(rng.permutation(self.units)[: self.units // 10]))
    assert check(adapted)["sampler"].accused


@pytest.mark.parametrize("q", [0.09, 0.11])
def test_another_probability_is_accused(
    adapted: AdaptedModel, monkeypatch: pytest.MonkeyPatch, q: float
) -> None:
    """A sampler that takes units more or less often than is charged."""
    right = PoissonSampler.__init__
    monkeypatch.setattr(
        PoissonSampler, "__init__", lambda self, units, _, steps, stream: right(self, units, q, steps, stream)
    )
    assert check(adapted)["sampler"].accused


def test_the_samplers_p_values_are_uniform() -> None:
    """Over 400 right samplers a p-value below one in a hundred comes about as often as it should."""
    rng = np.random.default_rng(2)
    values = [
        distribution.sampler_p_value(rng.random((300, 100)) < 0.1, MECHANISM) for _ in range(400)
    ]
    assert sum(value < 0.01 for value in values) <= 15  # 4 expected; more than 15 has a chance of 8e-6
