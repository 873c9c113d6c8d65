"""What was done to private data (a mechanism) and what may be done at most (a budget)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from fl_shared.fields import Fields

NEIGHBOURING = "add-or-remove-one"
KIND = "poisson-gaussian"
LEAST_NOISE, MOST_NOISE = 1e-4, 1e6
LEAST_SAMPLING = 1e-9
MOST_STEPS = 10**9
"""Beyond these bounds nothing is private or nothing is learnt, and the accountant's numbers under- or overflow."""
LEAST_CLIPPING_NORM = 1e-4
"""The least that a run may order: below it, what underflows in float32 could count (docs/decisions/0022)."""


@dataclass(frozen=True, slots=True)
class Mechanism:
    """Poisson-subsampled Gaussian steps: DP-SGD (Abadi et al. 2016, arXiv 1607.00133, Algorithm 1).

    Attributes:
        noise_multiplier: sigma, the noise's standard deviation over the clipping norm.
        sampling_probability: q, each privacy unit's chance to be in a step.
        steps: how many times.
        clipping_norm: C, the bound on one unit's L2 contribution.
        neighbouring: what one neighbouring change adds or removes: one privacy unit.
    """

    noise_multiplier: float
    sampling_probability: float
    steps: int
    clipping_norm: float
    neighbouring: str = NEIGHBOURING
    kind: str = KIND

    def __post_init__(self) -> None:
        fields = Fields(dataclasses.asdict(self), "mechanism")
        fields.number("noise_multiplier", low=LEAST_NOISE, high=MOST_NOISE)
        fields.number("sampling_probability", low=LEAST_SAMPLING, high=1)
        fields.integer("steps", low=0, high=MOST_STEPS)
        fields.number("clipping_norm", low=0, high=1e12, above=True)
        fields.choice("neighbouring", [NEIGHBOURING])
        fields.choice("kind", [KIND])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "kind": self.kind,
            "neighbouring": self.neighbouring,
            "noise_multiplier": float(self.noise_multiplier),
            "sampling_probability": float(self.sampling_probability),
            "steps": self.steps,
            "clipping_norm": float(self.clipping_norm),
        }

    @classmethod
    def from_dict(cls, table: Any) -> Mechanism:
        """Read what `to_dict` wrote; ConfigError on anything else."""
        fields = Fields(table, "mechanism")
        made = cls(
            noise_multiplier=fields.number("noise_multiplier"),
            sampling_probability=fields.number("sampling_probability"),
            steps=fields.integer("steps", low=0, high=MOST_STEPS),
            clipping_norm=fields.number("clipping_norm"),
            neighbouring=fields.text("neighbouring"),
            kind=fields.text("kind"),
        )
        fields.done()
        return made
