"""What fits: the noise multiplier for a target epsilon, the steps that a budget still holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from fl_shared.errors import ConfigError
from fl_shared.privacy.accounting.gate import Filter
from fl_shared.privacy.accounting.merge import Key, key_of, merged
from fl_shared.privacy.accounting.pld import pld_epsilon
from fl_shared.privacy.accounting.renyi import check_delta, rdp_epsilon
from fl_shared.privacy.mechanism import MOST_STEPS, Mechanism

_LARGEST = 1e4
_PRECISION = 1e-4


def find_noise_multiplier(
    target_epsilon: float,
    delta: float,
    sampling_probability: float,
    steps: int,
    *,
    prior: Iterable[Mechanism] = (),
    accountant: Literal["rdp", "pld"] = "rdp",
) -> float:
    """Return the smallest noise multiplier, within 1e-4, whose composition with `prior` meets the target.

    `steps` Poisson-subsampled Gaussian steps at `sampling_probability` run after `prior`; epsilon of all of
    them at `delta` is at most `target_epsilon`. Raises ConfigError when no multiplier up to 10,000 fits.
    """
    check_delta(delta)
    earlier = list(prior)
    epsilon_of = rdp_epsilon if accountant == "rdp" else pld_epsilon

    def excess(sigma: float) -> float:
        candidate = Mechanism(
            noise_multiplier=sigma, sampling_probability=sampling_probability, steps=steps, clipping_norm=1.0
        )
        return epsilon_of([*earlier, candidate], delta) - target_epsilon

    return _smallest(excess, f"epsilon {target_epsilon:g} at delta {delta:g} for {steps} steps")


def noise_that_fits(ceiling: Filter, spent: Mapping[Key, int], sampling_probability: float, steps: int) -> float:
    """Return the smallest noise multiplier, within 1e-4, with which `steps` more steps pass the gate."""

    def excess(sigma: float) -> float:
        candidate = Mechanism(
            noise_multiplier=sigma, sampling_probability=sampling_probability, steps=steps, clipping_norm=1.0
        )
        return ceiling.cost(spent) + ceiling.cost(merged([candidate])) - ceiling.bound

    return _smallest(excess, f"{steps} more steps within epsilon {ceiling.epsilon:g}")


def steps_that_fit(ceiling: Filter, spent: Mapping[Key, int], mechanism: Mechanism) -> int:
    """Return how many more steps of `mechanism` the gate would grant after `spent`, at most `MOST_STEPS`."""
    step_cost = ceiling.cost({key_of(mechanism): 1})
    room = ceiling.bound - ceiling.cost(spent)
    if not room > 0.0:
        return 0
    guess = math.floor(room / step_cost) + 1 if room < step_cost * MOST_STEPS else MOST_STEPS
    while guess > 0:
        together = dict(spent)
        together[key_of(mechanism)] = together.get(key_of(mechanism), 0) + guess
        if ceiling.admits(together):
            break
        guess -= 1
    return guess


def _smallest(excess: Callable[[float], float], target: str) -> float:
    """Return the smallest sigma, within 1e-4, at which the falling function `excess` is not above 0."""
    low, high = 0.0, 1.0
    while not excess(high) <= 0.0:
        low, high = high, high * 2.0
        if high > _LARGEST:
            raise ConfigError(
                f"no noise multiplier up to {_LARGEST:g} fits {target}",
                fix="lower the number of steps or the sampling probability, or raise the budget",
            )
    while low == 0.0:
        if excess(high / 2.0) > 0.0:
            low = high / 2.0
        else:
            high /= 2.0
    from scipy.optimize import brentq  # scipy is a second for every command that calibrates nothing

    # An infinite excess would break the interpolation.
    smallest = float(brentq(lambda sigma: min(excess(sigma), 1e6), low, high, xtol=_PRECISION / 4.0))
    while excess(smallest) > 0.0:
        smallest += _PRECISION / 4.0
    return smallest
