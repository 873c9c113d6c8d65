"""Does this engine's noise have the scale that is charged, and does its sampler take units by independent chance?

A one-run audit lacks the power to accuse noise at half scale or shuffled batches. These tests have it: they look at
the engine's own noise and samples, which only a site can, and know the distribution that both must have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from fl_client.dp.adapt import AdaptedModel
from fl_client.dp.batches import Records
from fl_client.dp.engine import DPEngine
from fl_shared.privacy import Mechanism

FALSE_ALARM = 1e-6
"""How often each test accuses a right engine."""

NOISE_DRAWS = 200_000  # notices a scale that is 4 percent off
UNITS = 400
STEPS = 2000


@dataclass(frozen=True, slots=True)
class DistributionResult:
    """One test.

    Attributes:
        name: `noise` or `sampler`.
        p_value: how often a right engine looks at least as odd.
        accused: `p_value` is below `FALSE_ALARM`.
    """

    name: str
    p_value: float
    accused: bool


def check_distributions(
    adapted: AdaptedModel, mechanism: Mechanism, *, engine: type[DPEngine] = DPEngine
) -> list[DistributionResult]:
    """Test noise and sampler of an engine that is made for this mechanism; no data is needed.

    Args:
        engine: what is tested; tests hand over engines that are broken on purpose.
    """
    nobody = np.empty(0, dtype=np.int64)
    made = engine(
        adapted, Records((), nobody, (nobody,) * UNITS, 0), mechanism,
        learning_rate=0.0, head_learning_rate=0.0, momentum=0.0, expected_batch=1.0,
    )  # fmt: skip
    try:
        found = {"noise": noise_p_value(_noise(made), mechanism), "sampler": sampler_p_value(_samples(made), mechanism)}
    finally:
        made.close()
    return [DistributionResult(name, value, value < FALSE_ALARM) for name, value in found.items()]


def _noise(engine: DPEngine) -> NDArray[np.float64]:
    """Releases of steps without a single unit."""
    parts: list[NDArray[np.float64]] = []
    while sum(part.size for part in parts) < NOISE_DRAWS:
        engine.optimizer.zero_grad(set_to_none=True)
        engine.accumulate([])
        engine.optimizer.step()
        parts += [p.grad.detach().double().cpu().numpy().reshape(-1) for p in engine.optimizer.params]
    summed: NDArray[np.float64] = np.concatenate(parts)[:NOISE_DRAWS] * float(engine.optimizer.expected_batch_size)
    return summed


def _samples(engine: DPEngine) -> NDArray[np.bool_]:
    drawn = np.zeros((STEPS, UNITS), dtype=bool)
    for step in range(STEPS):
        drawn[step, engine.sampler.draw()] = True
    return drawn


def noise_p_value(noise: NDArray[np.float64], mechanism: Mechanism) -> float:
    """Kolmogorov and Smirnov's test against a Gaussian of standard deviation sigma C."""
    scale = mechanism.noise_multiplier * mechanism.clipping_norm
    return float(stats.kstest(noise / scale, "norm").pvalue)


def sampler_p_value(drawn: NDArray[np.bool_], mechanism: Mechanism) -> float:
    """Mean and spread of the batch sizes `drawn.sum(1)` against a binomial distribution, two-sided, both together.

    Args:
        drawn: `[steps, units]`.
    """
    steps, units = drawn.shape
    q = mechanism.sampling_probability
    sizes = drawn.sum(1)
    if q == 1:
        return 1.0 if bool((sizes == units).all()) else 0.0
    mean = 2 * float(stats.norm.sf(abs(sizes.sum() - steps * units * q) / math.sqrt(steps * units * q * (1 - q))))
    # For large samples (n - 1) s^2 / variance is close to chi-square, widened by the binomial's excess kurtosis.
    kurtosis = (1 - 6 * q * (1 - q)) / (units * q * (1 - q))
    ratio = float(sizes.var(ddof=1)) / (units * q * (1 - q))
    spread = 2 * float(stats.norm.sf(abs(ratio - 1) / math.sqrt(2 / (steps - 1) + kurtosis / steps)))
    return min(1.0, 2 * min(mean, spread))
