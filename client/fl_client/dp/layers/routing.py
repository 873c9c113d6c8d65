"""Where the (token, expert) pairs of one layer and one micro-batch stand once they are sorted by expert.

In a packed micro-batch every expert's rows are filled up with rows of zeros to a multiple of `TILE`, and cut into
blocks of at most `ROW_BLOCK` when they are multiplied: how many tokens of others an expert gets then chooses among few
shapes, all of which are tried at start-up (`fl_client.dp.invariance`), and moves a row to another place in one of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fl_client.dp.layers.segments import Segments, find_segments
from fl_client.dp.records.packing import EVEN, TILE


class Routing:
    """The sorted rows of T tokens with K experts each.

    Args:
        top_k_index: `[T, K]`, the experts of each token.
        num_experts: E.
        kept: where the real tokens of a padded micro-batch stand; None when all are.
        rows: number of real tokens of a packed micro-batch, its first ones; None for a padded one.

    Attributes:
        tokens: `[M]`, the token at each row; any at a row of filler.
        ends: int32 `[E]`, the end of each expert's rows; the last one is M.
        spans: `[E, 2]`, the first and the end of those of each expert's rows that are no filler.
    """

    def __init__(
        self, top_k_index: Tensor, num_experts: int, kept: Tensor | None = None, rows: int | None = None
    ) -> None:
        self.top_k = top_k_index.shape[1]
        self._all, self._kept = top_k_index.shape[0], kept
        if kept is not None:
            top_k_index = top_k_index.index_select(0, kept)
        self._expert = top_k_index[:rows].flatten()
        order = torch.argsort(self._expert, stable=True)
        counts = torch.bincount(self._expert, minlength=num_experts)
        row = torch.arange(len(order), device=order.device)
        if rows is None:
            self._filler: Tensor | None = None
            self._pairs, ends = order, torch.cumsum(counts, 0)
            self._place = torch.empty_like(order).scatter_(0, order, row)
        else:
            heights = (counts + (TILE - 1)) // TILE * TILE
            total = int(heights.sum())
            heights[-1] += -(-(total + 1) // EVEN) * EVEN - total  # the last row of all is filler
            ends = torch.cumsum(heights, 0)
            down = ends - heights - (torch.cumsum(counts, 0) - counts)
            row += down.index_select(0, self._expert.index_select(0, order))
            last = int(ends[-1])
            self._pairs = order.new_full((last,), -1).scatter_(0, row, order)
            self._filler = torch.nonzero(self._pairs < 0).squeeze(1)
            self._pairs.clamp_(min=0)
            # Tokens that are filler themselves find zeros.
            self._place = order.new_full((self._all * self.top_k,), last - 1).scatter_(0, order, row)
        self.ends = ends.to(torch.int32)
        starts = F.pad(ends[:-1], (1, 0))
        self.spans = torch.stack([starts, starts + counts], 1)
        self.tokens = self._pairs // self.top_k
        if kept is not None:
            self.tokens = kept.index_select(0, self.tokens)
        self._segments: tuple[Tensor, Segments] | None = None

    def segments(self, unit_of_token: Tensor, units: int) -> tuple[Tensor, Segments]:
        """Unit of each row, and the runs of equal (expert, unit): found once, used by every factor."""
        if self._segments is None:
            unit = unit_of_token.repeat_interleave(self.top_k)
            key, sorting = torch.sort(self._expert * units + unit, stable=True)
            segments = find_segments(key, units, self._place.index_select(0, sorting))
            self._segments = unit_of_token.index_select(0, self.tokens), segments
        return self._segments

    def select(self, hidden: Tensor) -> Tensor:
        """Rows `[M, H]` of the tokens `[T, H]`; zeros at filler. Differentiable."""
        selected: Tensor = _Select.apply(hidden, self)  # type: ignore[no-untyped-call]  # torch's
        return selected

    def weighted_sum(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Each token's sum over its experts: rows `[M, H]` and weights `[T, K]` to `[T, H]`. Differentiable.

        Padding and filler get zeros.
        """
        if self._kept is not None:
            weights = weights.index_select(0, self._kept)
        pairs: Tensor = _Unsort.apply(rows, self)  # type: ignore[no-untyped-call]  # torch's
        sums = torch.bmm(weights.unsqueeze(1).to(rows.dtype), pairs.view(-1, self.top_k, rows.shape[1])).squeeze(1)
        if self._kept is None:
            return sums
        return sums.new_zeros(self._all, sums.shape[1]).index_copy(0, self._kept, sums)

    def gather(self, values: Tensor, index: Tensor) -> Tensor:
        """One row of `values` for each sorted row; zeros at filler."""
        gathered = values.index_select(0, index)
        return gathered if self._filler is None else gathered.index_fill_(0, self._filler, 0)


class _Select(torch.autograd.Function):
    """Gathers both ways: a scatter of rows takes four times as long on CPU, and adds in any order on CUDA."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, routing: Routing) -> Tensor:
        ctx.routing = routing
        return routing.gather(hidden, routing.tokens)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        routing: Routing = ctx.routing
        pairs = grads[0].index_select(0, routing._place).view(-1, routing.top_k, grads[0].shape[1])
        total = pairs[:, 0].clone()
        for k in range(1, routing.top_k):
            total += pairs[:, k]
        if routing._kept is None:
            return total, None
        return total.new_zeros(routing._all, total.shape[1]).index_copy_(0, routing._kept, total), None


class _Unsort(torch.autograd.Function):
    """The row of every pair, in the pairs' own order."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, routing: Routing) -> Tensor:
        ctx.routing = routing
        return rows.index_select(0, routing._place)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        routing: Routing = ctx.routing
        return routing.gather(grads[0], routing._pairs), None
