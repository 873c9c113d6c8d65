"""Rules that a few hostile or broken sites cannot drag away: coordinate median, trimmed mean, multi-Krum.

They compare all updates, so they cannot stream: updates wait on the coordinator's disk (`spool`), and memory stays
that of one adapter and one block. Noise for privacy looks like disagreement to these rules: they cost accuracy even
when every site is honest (docs/aggregation.md has the figures).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from flwr.serverapp.strategy.fedtrimmedavg import trim_mean
from numpy.typing import NDArray

from fl_server.aggregation.spool import Spool
from fl_shared.adapters.safetensors import Tensors

Block = NDArray[np.float32]


class Columnwise:
    """A rule for each coordinate by itself (Yin et al. 2018, arXiv 1803.01498).

    Args:
        over: float64 `[sites, columns]` to `[columns]`, in whatever order the rows stand.
    """

    def __init__(self, spool: Spool, over: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> None:
        self._spool = spool
        self._over = over

    @property
    def count(self) -> int:
        """Updates taken in."""
        return self._spool.count

    def add(self, update: Tensors) -> None:
        """Take one update in; DataError, with nothing changed, when it is not as it must be."""
        self._spool.add(update)

    def result(self) -> Tensors:
        """The rule over every coordinate, float32. DataError when nothing was added."""
        spool = self._spool
        spool.require_any()
        result = np.empty(spool.width, dtype=np.float32)
        for where, block in spool.columns():
            result[where] = self._over(block.astype(np.float64))
        spool.close()
        return spool.split(result)


def median(spool: Spool) -> Columnwise:
    """The coordinate-wise median."""
    return Columnwise(spool, lambda block: np.median(block, axis=0))


def trimmed_mean(spool: Spool, cut: float) -> Columnwise:
    """The mean without the `cut` largest and the `cut` smallest share of each coordinate; Flower's function."""
    return Columnwise(spool, lambda block: trim_mean(block, cut))


class MultiKrum:
    """The mean of the `select` updates that lie closest to their neighbours (Blanchard et al. 2017, NeurIPS 30).

    The score of an update is the sum of its squared distances to the `n - malicious - 2` nearest others. Flower's
    `select_multikrum` holds all updates in memory and takes differences of float32 squares; here distances add up
    over blocks in float64, and the tests hold the choice against Flower's.
    """

    def __init__(self, spool: Spool, malicious: int, select: int) -> None:
        self._spool = spool
        self._malicious, self._select = malicious, select

    @property
    def count(self) -> int:
        """Updates taken in."""
        return self._spool.count

    def add(self, update: Tensors) -> None:
        """Take one update in; DataError, with nothing changed, when it is not as it must be."""
        self._spool.add(update)

    def result(self) -> Tensors:
        """The mean of the selected updates, float32. DataError when nothing was added."""
        spool = self._spool
        spool.require_any()
        chosen = np.sort(np.argsort(self.scores(), kind="stable")[: self._select])
        mean = np.empty(spool.width, dtype=np.float32)
        for where, block in spool.columns():
            mean[where] = block[chosen].astype(np.float64).mean(axis=0)
        spool.close()
        return spool.split(mean)

    def scores(self) -> NDArray[np.float64]:
        """Every update's sum of squared distances to its nearest others, `[count]`."""
        n = self._spool.count
        products = np.zeros((n, n))
        for _, block in self._spool.columns():
            centred = block.astype(np.float64)
            centred -= centred.mean(axis=0)  # distances stay, and squares lose fewer digits
            products += centred @ centred.T
        squares = np.diag(products)
        distances = np.maximum(squares[:, None] + squares[None, :] - 2.0 * products, 0.0)
        np.fill_diagonal(distances, np.inf)
        nearest = max(1, n - self._malicious - 2)
        scores: NDArray[np.float64] = np.sort(distances, axis=1)[:, :nearest].sum(axis=1)
        return scores
