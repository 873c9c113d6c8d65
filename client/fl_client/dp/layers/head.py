"""Heads: what turns the base's last hidden states into a task's outputs. Their parameters are trained with the LoRA
factors, clipped and noised together with them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fl_client.dp.layers.scope import BatchScope
from fl_client.dp.records.packing import EVEN, Packed

_BLOCK = 2 * EVEN


class Head(nn.Module, ABC):
    """A task's head. Each output follows from its own record's hidden states alone.

    Every parameter that is trained writes its gradient into the book when one is open (mode `book`), and is used as a
    module that Opacus has a grad sampler for in mode `hooks`.
    """

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of the outputs of one record."""

    @abstractmethod
    def packed(self, hidden: Tensor, batch: Packed) -> Tensor:
        """Float32 hidden states `[M, H]` of a packed micro-batch to outputs `[R, ...]`."""

    @abstractmethod
    def padded(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Float32 hidden states `[B, T, H]` and 0/1 mask `[B, T]`, padded on the right, to outputs `[B, ...]`."""


class PooledLinear(nn.Linear, Head):
    """The mean over real tokens, standardised by the base's public statistics, and a linear layer; zero at the start.

    Args:
        mean, std: `[H]`, the public feature statistics.
        outputs: numbers that it gives for each record.
    """

    def __init__(self, mean: Tensor, std: Tensor, outputs: int, scope: BatchScope) -> None:
        super().__init__(mean.shape[0], outputs)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        self.register_buffer("feature_mean", mean.detach().float(), persistent=False)
        self.register_buffer("feature_std", std.detach().float(), persistent=False)
        self.scope = scope
        self.to(mean.device)

    @property
    def shape(self) -> tuple[int, ...]:
        """`(outputs,)`."""
        return (self.out_features,)

    def packed(self, hidden: Tensor, batch: Packed) -> Tensor:
        """`[M, H]` to `[R, outputs]`."""
        runs = hidden.split(batch.lengths)
        means = [run.unflatten(0, (count, -1)).mean(1) for run, (_, count) in zip(runs, batch.runs, strict=False)]
        return self._read(torch.cat(means))

    def padded(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """`[B, T, H]` to `[B, outputs]`."""
        real = mask.unsqueeze(-1)
        return self._read(hidden.masked_fill(real == 0, 0).sum(1) / real.sum(1))

    def _read(self, pooled: Tensor) -> Tensor:
        mean: Any = self.feature_mean
        std: Any = self.feature_std
        features = (pooled - mean) / std
        if self.scope.mode == "hooks":
            hooked: Tensor = self(features)
            return hooked
        outputs: Tensor = _Linear.apply(features, self.weight, self.bias, self.scope)  # type: ignore[no-untyped-call]  # torch's
        return outputs


class _Linear(torch.autograd.Function):
    """`f W^T + b`, one row a record; the gradients of weight and bias go to the book."""

    @staticmethod
    def forward(ctx: Any, f: Tensor, weight: nn.Parameter, bias: nn.Parameter, scope: BatchScope) -> Tensor:
        ctx.save_for_backward(f)
        ctx.parameters, ctx.book = (weight, bias), scope.book
        if scope.packed is None:
            return F.linear(f, weight, bias)
        return _few_rows(f, weight.mT) + bias

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (f,), (weight, bias), g = ctx.saved_tensors, ctx.parameters, grads[0]
        if ctx.book is None:
            return g @ weight if ctx.needs_input_grad[0] else None, g.mT @ f, g.sum(0), None
        gf = _few_rows(g, weight) if ctx.needs_input_grad[0] else None
        ctx.book.add_record_outer(weight, g, f)
        ctx.book.add_record_outer(bias, g, torch.ones_like(f[:, :1]))
        return gf, None, None, None


def _few_rows(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight` whose number of rows follows from the data: filled up with zeros, in blocks of one shape."""
    blocks = F.pad(x, (0, 0, 0, -x.shape[0] % _BLOCK)).split(_BLOCK)
    return torch.cat([block @ weight for block in blocks])[: x.shape[0]]
