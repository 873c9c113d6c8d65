"""Epsilon by privacy loss distributions: tight, and proven for parameters that were fixed in advance.

Reports only. The gate does not use it: later runs are chosen after seeing earlier ones, and for adaptively
chosen parameters this composition is not a proven bound (arXiv 2602.15815: such filters are not free).
Numbers come from Google's dp-accounting with pessimistic (rounded up) discretisation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from fl_shared.errors import EngineError
from fl_shared.privacy.accounting.merge import Key, merged
from fl_shared.privacy.accounting.renyi import check_delta, event_of
from fl_shared.privacy.mechanism import Mechanism


def pld_epsilon(mechanisms: Iterable[Mechanism], delta: float) -> float:
    """Return epsilon at `delta` of the composition, by privacy loss distributions.

    No mechanism costs 0. Raises ConfigError for a delta outside (0, 1) or an unsupported mechanism, and
    EngineError when the numbers do not converge.
    """
    return steps_epsilon(merged(mechanisms), delta)


def steps_epsilon(steps: Mapping[Key, int], delta: float) -> float:
    """Return epsilon at `delta` of merged mechanisms, by privacy loss distributions."""
    check_delta(delta)
    return _epsilons(tuple(steps.items()), (delta,))[0] if steps else 0.0


def pld_curve(mechanisms: Iterable[Mechanism], deltas: Sequence[float]) -> list[float]:
    """Return epsilon at each of `deltas`: the whole privacy curve of the composition."""
    steps = merged(mechanisms)
    for delta in deltas:
        check_delta(delta)
    return list(_epsilons(tuple(steps.items()), tuple(deltas))) if steps else [0.0] * len(deltas)


@lru_cache(maxsize=256)
def _epsilons(steps: tuple[tuple[Key, int], ...], deltas: tuple[float, ...]) -> tuple[float, ...]:
    import dp_accounting  # see renyi.event_of
    from dp_accounting import pld

    accountant = pld.PLDAccountant()
    for key, count in steps:
        accountant.compose(dp_accounting.SelfComposedDpEvent(event_of(key), count))
    epsilons = tuple(float(accountant.get_epsilon(delta)) for delta in deltas)
    if not all(value >= 0.0 for value in epsilons):
        raise EngineError(
            f"privacy loss distribution gave {epsilons} at delta {deltas}",
            fix="report the mechanisms; the Rényi figure stays valid",
        )
    return epsilons
