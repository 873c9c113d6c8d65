"""What was done to private data (a mechanism) and what may be done at most (a budget)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from fl_shared.declaration import Document, require_fields
from fl_shared.fields import Between, Choice, Whole

NEIGHBOURING = "add-or-remove-one"
KIND = "poisson-gaussian"
LEAST_NOISE, MOST_NOISE = 1e-4, 1e6
LEAST_SAMPLING = 1e-9
MOST_STEPS = 10**9
"""Beyond these bounds nothing is private or nothing is learnt, and the accountant's numbers under- or overflow."""
LEAST_CLIPPING_NORM = 1e-4
"""The least that a run may order: below it, what underflows in float32 could count (docs/decisions/0022)."""


@dataclass(frozen=True)
class Mechanism(Document):
    """Poisson-subsampled Gaussian steps: DP-SGD (Abadi et al. 2016, arXiv 1607.00133, Algorithm 1).

    Attributes:
        noise_multiplier: sigma, the noise's standard deviation over the clipping norm.
        sampling_probability: q, each privacy unit's chance to be in a step.
        steps: how many times.
        clipping_norm: C, the bound on one unit's L2 contribution.
        neighbouring: what one neighbouring change adds or removes: one privacy unit.
    """

    WHERE: ClassVar = "mechanism"
    STATED: ClassVar = ("kind", "neighbouring")

    noise_multiplier: Annotated[float, Between(LEAST_NOISE, MOST_NOISE)]
    sampling_probability: Annotated[float, Between(LEAST_SAMPLING, 1)]
    steps: Annotated[int, Whole(0, MOST_STEPS)]
    clipping_norm: Annotated[float, Between(0, 1e12, above=True)]
    neighbouring: Annotated[str, Choice([NEIGHBOURING])] = NEIGHBOURING
    kind: Annotated[str, Choice([KIND])] = KIND

    def __post_init__(self) -> None:
        require_fields(self)
