"""Books that are wrong on purpose, as stock parts are in silence: comparison and audit must notice them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from fl_client.dp.layers.book import GradientBook
from fl_client.dp.records.packing import Packed


class PerTokenBook(GradientBook):
    """What a layer that flattens tokens does to Opacus: every token is clipped as if it were an example."""

    def __init__(self, batch: Packed) -> None:
        lengths = [tokens for tokens, count in batch.runs for _ in range(count)]
        self._first = torch.tensor([0, *lengths[:-1]]).cumsum(0)
        tokens = dataclasses.replace(
            batch, runs=((1, batch.rows),), unit_of_record=torch.arange(batch.rows), units=batch.rows
        )
        super().__init__(tokens)

    def add_record_outer(self, parameter: nn.Parameter, a: Tensor, b: Tensor) -> None:
        """The head's rows belong to each record's first token."""
        spread_a, spread_b = a.new_zeros(self.records, a.shape[1]), b.new_zeros(self.records, b.shape[1])
        spread_a[self._first], spread_b[self._first] = a, b
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
