"""Rényi differential privacy of the Poisson-subsampled Gaussian mechanism, and epsilon from it.

Formulas: Mironov, Talwar, Zhang, "Rényi differential privacy of the sampled Gaussian mechanism" (arXiv
1908.10530), section 3.3, as implemented by Google's dp-accounting. Conversion to (epsilon, delta): Canonne,
Kamath, Steinke, "The discrete Gaussian for differential privacy" (arXiv 2004.00010), proposition 12.
Neighbouring relation: add or remove one privacy unit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fl_shared.errors import ConfigError
from fl_shared.privacy.accounting.merge import Key, merged
from fl_shared.privacy.mechanism import Mechanism

if TYPE_CHECKING:
    import dp_accounting

# Orders below 2 only help above epsilon 20, and their series does not always converge; leaving them out can
# only make the reported epsilon larger.
ORDERS: tuple[float, ...] = (
    *(round(2 + i / 10, 1) for i in range(90)),
    *(float(i) for i in range(11, 65)),
    *(80.0, 96.0, 128.0, 192.0, 256.0, 512.0, 1024.0),
)

Curve = npt.NDArray[np.float64]


def check_delta(delta: float) -> float:
    """Return `delta` when it lies strictly between 0 and 1; raise ConfigError otherwise."""
    if not isinstance(delta, int | float) or not 0.0 < delta < 1.0:
        raise ConfigError(f"delta {delta!r} is not usable", fix="give a number between 0 and 1, e.g. 1e-5")
    return float(delta)


def event_of(key: Key) -> dp_accounting.DpEvent:
    """Return the dp-accounting event of one step; ConfigError for a mechanism that is not supported."""
    if key.kind != "poisson-gaussian" or key.neighbouring != "add-or-remove-one":
        raise ConfigError(
            f"no accountant for mechanism kind {key.kind!r} under neighbouring {key.neighbouring!r}",
            fix="use kind 'poisson-gaussian' and neighbouring 'add-or-remove-one'",
        )
    if not 0.0 < key.noise_multiplier < math.inf:
        raise ConfigError(
            f"noise multiplier {key.noise_multiplier!r} gives no privacy", fix="use a finite number above 0"
        )
    if not 0.0 < key.sampling_probability <= 1.0:
        raise ConfigError(
            f"sampling probability {key.sampling_probability!r} is not usable", fix="use a number in (0, 1]"
        )
    import dp_accounting  # it brings scipy, a second for every command that asks for no epsilon

    gaussian = dp_accounting.GaussianDpEvent(key.noise_multiplier)
    if key.sampling_probability == 1.0:
        return gaussian
    return dp_accounting.PoissonSampledDpEvent(key.sampling_probability, gaussian)


@lru_cache(maxsize=4096)
def step_curve(key: Key, orders: tuple[float, ...] = ORDERS) -> tuple[float, ...]:
    """Return the Rényi divergence of one step at each of `orders` (nats), `inf` where it is not known."""
    from dp_accounting import rdp  # see event_of

    accountant = rdp.RdpAccountant(list(orders))
    accountant.compose(event_of(key))
    values = [float(value) for value in accountant.rdp]
    return tuple(value if value >= 0.0 else math.inf for value in values)  # NaN compares false: inf


def rdp_curve(mechanisms: Iterable[Mechanism], orders: Sequence[float] = ORDERS) -> Curve:
    """Return the composed Rényi divergence at each of `orders`: an array of `len(orders)` nats."""
    return composed_curve(merged(mechanisms), orders)


def composed_curve(steps: Mapping[Key, int], orders: Sequence[float] = ORDERS) -> Curve:
    """Return the composed Rényi divergence of merged mechanisms at each of `orders`, in nats."""
    total = np.zeros(len(orders))
    for key, count in steps.items():
        total += count * np.asarray(step_curve(key, tuple(orders)))
    return total


def conversion(order: float, delta: float) -> float:
    """Return what turning Rényi divergence of `order` into epsilon at `delta` adds, in nats.

    arXiv 2004.00010, proposition 12: epsilon = divergence + log(1 - 1/a) - log(delta * a) / (a - 1).
    """
    return math.log1p(-1.0 / order) - (math.log(delta) + math.log(order)) / (order - 1.0)


def rdp_epsilon(mechanisms: Iterable[Mechanism], delta: float) -> float:
    """Return epsilon at `delta` of the composition, by the best Rényi order.

    Choosing the order after the fact is valid for mechanisms that were fixed in advance; the decision
    whether a further mechanism may run is `Filter`'s, whose order is fixed with the budget. No mechanism
    costs 0. Raises ConfigError for a delta outside (0, 1) or an unsupported mechanism.
    """
    return curve_epsilon(merged(mechanisms), delta)


def curve_epsilon(steps: Mapping[Key, int], delta: float) -> float:
    """Return epsilon at `delta` of merged mechanisms, by the best Rényi order."""
    check_delta(delta)
    if not steps:
        return 0.0
    curve = composed_curve(steps)
    best = min(value + conversion(order, delta) for value, order in zip(curve, ORDERS, strict=True))
    return max(0.0, float(best))


def renyi_cost(mechanisms: Iterable[Mechanism], order: float) -> float:
    """Return the composed Rényi divergence of `mechanisms` at one `order`, in nats."""
    return float(composed_curve(merged(mechanisms), (order,))[0])
