"""What the engine is handed of a task: a head for the base model, and one loss for each record.

Clipping, noise and book stay the engine's. What an objective gets wrong (a loss that couples records, a head that
leaves a gradient out of the book) is refused by `checks.check_layers` before private text is read.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fl_client.dp.layers.head import Head
from fl_client.dp.layers.scope import BatchScope
from fl_shared.errors import EngineError


class Objective(Protocol):
    """What is minimised. Frozen, and equal objectives build equal heads: an adapted model serves all of them."""

    def head(self, mean: Tensor, std: Tensor, scope: BatchScope) -> Head:
        """A new head, the same at every site, on the device of the public feature statistics `[H]`."""
        ...

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """One loss for each record, `[B]`, from the head's outputs `[B, ...]` and `Records.targets` `[B, ...]`.

        A record's loss follows from its own row alone; no mean over the batch.
        """
        ...

    def random_targets(self, count: int, chance: np.random.Generator) -> NDArray[Any]:
        """Targets `[count, ...]` of records that nobody has: for checks and audits, on which nothing private acts."""
        ...


def losses_of(objective: Objective, outputs: Tensor, targets: Tensor) -> Tensor:
    """The objective's losses `[B]`; a unit's loss is the sum over its records.

    Raises:
        EngineError: they are not one for each record.
    """
    losses = objective.losses(outputs, targets)
    if losses.shape != targets.shape[:1]:
        raise EngineError(
            f"{type(objective).__name__} gives losses of shape {tuple(losses.shape)} for {len(targets)} records",
            fix="a task's loss is one number for each record: correct it",
        )
    return losses
