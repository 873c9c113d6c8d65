"""How the global adapter moves by the round's one update: as it is, with momentum, or by Adam.

Reddi et al. 2021 (arXiv 2003.00295), Algorithm 2: the mean update is the negative of a gradient. The optimizer's state
is part of the committed round, so that a resumed run continues as an undisturbed one. It is one float32 tensor
`[moments, size]` for each tensor of the adapter. All arithmetic is float32 and in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fl_server.aggregation.updates import flat
from fl_shared.adapters.safetensors import Tensors
from fl_shared.errors import DataError

Values = NDArray[np.float32]


@dataclass(frozen=True)
class ServerStep:
    """A rule for every tensor by itself.

    Attributes:
        moments: how many tensors of state there are for each of the adapter.
        move: the flat update `[size]` and its moments `[moments, size]`, changed in place, to what is added.
    """

    moments: int
    move: Callable[[Values, Values], Values]

    def apply(self, base: Tensors, update: Tensors, state: Tensors) -> tuple[Tensors, Tensors]:
        """The next adapter and the next state; `base` and `state` are empty in the first round.

        Raises:
            DataError: the state is of another form than the update.
        """
        adapter: Tensors = {}
        after: Tensors = {}
        for name in sorted(update):
            value = update.pop(name)
            moments = np.zeros((self.moments, value.size), dtype=np.float32)
            if self.moments and state:
                if name not in state or state[name].shape != moments.shape:
                    raise DataError(
                        f"the server optimizer's state has no {name} of {value.size} values",
                        fix="restore adapters/ from the backup of the same time as the database",
                    )
                moments[...] = state[name]
            moved = self.move(flat(value), moments).reshape(value.shape)
            adapter[name] = base[name] + moved if base else moved
            if self.moments:
                after[name] = moments
        return adapter, after


def plain() -> ServerStep:
    """Add the update."""
    return ServerStep(0, lambda update, _: update)


def momentum(rate: float, beta: float) -> ServerStep:
    """FedAvgM (Hsu et al. 2019, arXiv 1909.06335): `v = beta v + update`, add `rate v`."""

    def move(update: Values, moments: Values) -> Values:
        moments[0] *= np.float32(beta)
        moments[0] += update
        added: Values = moments[0] * np.float32(rate)
        return added

    return ServerStep(1, move)


def adam(rate: float, beta_1: float, beta_2: float, tau: float) -> ServerStep:
    """FedAdam: moments `m` and `v` of the update, add `rate m / (sqrt(v) + tau)`; uncorrected, as in the paper."""

    def move(update: Values, moments: Values) -> Values:
        first, second = moments
        first *= np.float32(beta_1)
        first += np.float32(1 - beta_1) * update
        second *= np.float32(beta_2)
        second += np.float32(1 - beta_2) * np.square(update)
        added: Values = np.float32(rate) * first / (np.sqrt(second) + np.float32(tau))
        return added

    return ServerStep(2, move)
