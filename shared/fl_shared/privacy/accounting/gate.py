"""The gate: a Rényi privacy filter, valid when each mechanism is chosen after seeing earlier results.

Feldman and Zrnic, "Individual privacy accounting via a Rényi filter" (arXiv 2008.11193), theorem 3.1 and
section 4: stop before the sum of the divergences *at one fixed order* passes a bound, and the whole
interaction has at most that divergence, however its parts were chosen. So each budget fixes its order when it
is made. Taking the best order of the moment instead is the common shortcut, and is not proven: which order is
best then depends on the outputs (docs/decisions/0010).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fl_shared.errors import ConfigError
from fl_shared.privacy.accounting.merge import Key
from fl_shared.privacy.accounting.renyi import ORDERS, check_delta, conversion, step_curve

# Sums of up to 1e9 doubles err by less than this share; costs are rounded up by it.
_ROUNDING = 1e-9

# Where the default order should do well: plain Gaussian, small, middling and large batches.
_REFERENCE = (
    Key("poisson-gaussian", "add-or-remove-one", 20.0, 1.0),
    Key("poisson-gaussian", "add-or-remove-one", 1.0, 0.01),
    Key("poisson-gaussian", "add-or-remove-one", 1.0, 0.1),
    Key("poisson-gaussian", "add-or-remove-one", 2.0, 0.3),
)


@dataclass(frozen=True)
class Filter:
    """A ceiling (epsilon, delta) and the Rényi order at which it is guarded."""

    epsilon: float
    delta: float
    order: float

    def __post_init__(self) -> None:
        check_delta(self.delta)
        if not 0.0 < self.epsilon < math.inf:
            raise ConfigError(f"epsilon {self.epsilon!r} is not a ceiling", fix="use a finite number above 0")
        if not 1.0 < self.order < math.inf:
            raise ConfigError(f"Rényi order {self.order!r} is not usable", fix="use a finite number above 1")
        if self.bound <= 0.0:
            raise ConfigError(
                f"epsilon {self.epsilon:g} at delta {self.delta:g} leaves nothing at order {self.order:g}",
                fix="raise epsilon or delta, or leave the order out to have a fitting one chosen",
            )

    @property
    def bound(self) -> float:
        """The most Rényi divergence at `order` that still implies (epsilon, delta), in nats."""
        return self.epsilon - conversion(self.order, self.delta)

    def cost(self, steps: Mapping[Key, int]) -> float:
        """Return the divergence of merged mechanisms at `order`, in nats, rounded up."""
        total = math.fsum(count * step_curve(key, (self.order,))[0] for key, count in steps.items())
        return total * (1.0 + _ROUNDING)

    def admits(self, steps: Mapping[Key, int]) -> bool:
        """Say whether everything in `steps` together stays within the bound."""
        return self.cost(steps) <= self.bound

    def used(self, steps: Mapping[Key, int]) -> float:
        """Return the used share of the bound; 1 is full. Each step adds the same share, whenever it runs."""
        return self.cost(steps) / self.bound


def default_order(epsilon: float, delta: float, planned: Sequence[Key] = ()) -> float:
    """Return the Rényi order that wastes least of (epsilon, delta) over `planned`, or over common mechanisms.

    It is computed once, when a budget is made, and stored in the budget: it may depend on plans, never on
    results. Raises ConfigError when no order leaves anything to spend.
    """
    check_delta(delta)
    bounds = [epsilon - conversion(order, delta) for order in ORDERS]
    scores = []
    for index, bound in enumerate(bounds):
        score = -math.inf
        if bound > 0.0:
            score = 0.0
            for key in planned or _REFERENCE:
                cost = step_curve(key)[index]
                score += math.log(bound) - math.log(cost) if 0.0 < cost < math.inf else -math.inf
        scores.append(score)
    best = max(range(len(ORDERS)), key=scores.__getitem__)
    if scores[best] == -math.inf:
        raise ConfigError(
            f"epsilon {epsilon:g} at delta {delta:g} leaves nothing to spend", fix="raise epsilon or delta"
        )
    return ORDERS[best]
