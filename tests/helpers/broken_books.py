"""Books that are wrong on purpose, as stock parts are in silence: comparison and audit must notice them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fl_client.dp.book import GradientBook


class PerTokenBook(GradientBook):
    """What a layer that flattens tokens does to Opacus: every token is clipped as if it were an example."""

    def __init__(self, unit_of_record: Tensor, units: int, tokens: int) -> None:
        rows = unit_of_record.shape[0] * tokens
        super().__init__(torch.arange(rows), rows, 1)
        self._per_record = tokens

    def add_record_outer(self, parameter: nn.Parameter, a: Tensor, b: Tensor) -> None:
        """The head's rows belong to each record's first token."""
        spread_a, spread_b = a.new_zeros(self.records, a.shape[1]), b.new_zeros(self.records, b.shape[1])
        spread_a[:: self._per_record], spread_b[:: self._per_record] = a, b
        super().add_record_outer(parameter, spread_a, spread_b)


class UnclippedExpertsBook(GradientBook):
    """Experts outside norm and clipping, as when Opacus does not see them."""

    def add_expert_factor(self, parameter: nn.Parameter, a: Tensor, b: Tensor, *rest) -> None:  # type: ignore[no-untyped-def]
        """Keep the entry, forget the norm."""
        before = self._squared.clone()
        super().add_expert_factor(parameter, a, b, *rest)
        self._squared = before

    def weighted_sums(self, weights: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        """Experts with weight one."""
        clipped = super().weighted_sums(weights)
        whole = super().weighted_sums(torch.ones_like(weights))
        return [pair if pair[0].ndim == 3 else old for pair, old in zip(whole, clipped, strict=True)]
