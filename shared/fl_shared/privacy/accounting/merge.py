"""Merge mechanisms that are the same apart from their number of steps.

Composition is commutative, so ten rounds of eight steps are one mechanism of eighty. Merging first keeps
composition fast: its cost grows with the number of *different* mechanisms, not with the number of rounds.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from fl_shared.privacy.mechanism import Mechanism


class Key(NamedTuple):
    """What decides the privacy cost of one step.

    The clipping norm is not in it: noise is `noise_multiplier * clipping_norm`, so its scale cancels.
    """

    kind: str
    neighbouring: str
    noise_multiplier: float
    sampling_probability: float


def key_of(mechanism: Mechanism) -> Key:
    """Return the part of `mechanism` that decides the cost of one of its steps."""
    return Key(
        mechanism.kind,
        mechanism.neighbouring,
        float(mechanism.noise_multiplier),
        float(mechanism.sampling_probability),
    )


def merged(mechanisms: Iterable[Mechanism]) -> dict[Key, int]:
    """Return total steps by key, keys sorted, mechanisms without steps left out."""
    steps: dict[Key, int] = {}
    for mechanism in mechanisms:
        if mechanism.steps:
            key = key_of(mechanism)
            steps[key] = steps.get(key, 0) + mechanism.steps
    return dict(sorted(steps.items()))
