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
from fl_client.dp.engine import DPEngine
from fl_client.dp.records.records import Records
from fl_shared.privacy.mechanism import Mechanism

FALSE_ALARM = 1e-6
"""How often each test accuses a right engine, at most."""

NOISE_DRAWS = 200_000  # notices a scale that is 1.5 percent off
UNITS = 400
STEPS = 2000  # notices q = 0.1 that is 3 percent off; of a small q, of which little is drawn, only gross faults


@dataclass(frozen=True, slots=True)
class DistributionResult:
    """One test.

    Attributes:
        name: `noise` or `sampler`.
        p_value: how often a right engine looks at least as odd, at most.
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
    trainer = engine(
        adapted, Records((), nobody, (nobody,) * UNITS, 0), mechanism,
        learning_rate=0.0, head_learning_rate=0.0, momentum=0.0, expected_batch=1.0,
    )  # fmt: skip
    try:
        applied = trainer.optimizer.grid.step * trainer.optimizer.grid.width
        p_values = {
            "noise": noise_p_value(_noise(trainer), applied, mechanism),
            "sampler": sampler_p_value(_samples(trainer), mechanism),
        }
    finally:
        trainer.close()
    return [DistributionResult(name, value, value < FALSE_ALARM) for name, value in p_values.items()]


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


def noise_p_value(noise: NDArray[np.float64], applied: float, mechanism: Mechanism) -> float:
    """Shape (Kolmogorov and Smirnov) and sum of squares (chi-square), two-sided, each for half the false alarm.

    Args:
        noise: `[draws]`.
        applied: the standard deviation that the engine says it adds; below the charged sigma C, or for NaN, p is 0.
    """
    scaled = noise / applied
    squares = float(scaled @ scaled)
    if applied < mechanism.noise_multiplier * mechanism.clipping_norm or math.isnan(squares):
        return 0.0
    scale = 2 * min(stats.chi2.cdf(squares, noise.size), stats.chi2.sf(squares, noise.size))
    return min(1.0, 2 * min(float(stats.kstest(scaled, "norm").pvalue), float(scale)))


def sampler_p_value(drawn: NDArray[np.bool_], mechanism: Mechanism) -> float:
    """Are all entries of `drawn` independent and true with chance q? Nine exact tests, two-sided.

    One counts all entries. Four look at the steps, and the same four at the units: the oddest count; the counts'
    spread, which dependence between any two steps changes for units, and between any two units for steps; and what
    neighbours share, the pairs that begin at even and at odd numbers apart, because disjoint pairs are independent.
    By the union bound nine times the least p-value is one of all together, however the tests depend on each other.

    Args:
        drawn: `[steps, units]`.
    """
    q = mechanism.sampling_probability
    p_values = [_binomial_p_value(drawn.sum(), drawn.size, q)]
    for table in (drawn, drawn.T):
        counts = table.sum(1)
        p_values.append(len(counts) * _binomial_p_value(counts, table.shape[1], q))
        p_values.append(_spread_p_value(counts, table.shape[1], q))
        for start in (0, 1):
            shared = table[start:-1:2] & table[start + 1 :: 2]
            p_values.append(_binomial_p_value(shared.sum(), shared.size, q * q))
    return min(1.0, len(p_values) * min(p_values))


def _binomial_p_value(counts: NDArray[np.int64] | np.int64, trials: int, q: float) -> float:
    """Of the oddest count, two-sided."""
    return float(2 * np.minimum(stats.binom.cdf(counts, trials, q), stats.binom.sf(counts - 1, trials, q)).min())


def _spread_p_value(counts: NDArray[np.int64], trials: int, q: float) -> float:
    """Of the squared deviations' sum, two-sided; `counts` are independent and binomial.

    The sum's distribution is that of one square, convolved with itself by Fourier transforms: right within 1e-11.
    """
    values, centre = np.arange(trials + 1), round(trials * q)
    squares, chances = (values - centre) ** 2, stats.binom.pmf(values, trials, q)
    reach = (2 * len(counts) + 64) * float(squares @ chances) + 4096  # a sum beyond has a chance below 1e-12
    size = 1 << int(reach).bit_length()
    transform = np.fft.rfft(np.bincount(squares, chances), size)
    sums = np.fft.irfft(transform ** len(counts), size)
    seen = int(((counts - centre) ** 2).sum())
    return max(0.0, 2 * min(float(sums[: seen + 1].sum()), 1 - float(sums[:seen].sum())))
