"""Opacus' optimizer with exact per-unit clipping from the book, and noise on a grid.

`GridDPOptimizer` is an `opacus.optimizers.DPOptimizer`: `signal_skip_step`, `zero_grad`, step hooks and accountants
work as there. It reads either the `GradientBook` of the micro-batch or, with Opacus' hooks, `grad_sample`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor

from fl_client.dp.layers.book import GradientBook
from fl_client.dp.mechanism.noise import choose_grid, noisy_sum
from fl_client.dp.mechanism.secure_random import SecureStream
from fl_shared.errors import EngineError

Sums = Sequence[tuple[torch.nn.Parameter, Tensor]]


class GridDPOptimizer(DPOptimizer):  # type: ignore[misc]  # Opacus ships no types
    """Clip per unit, sum, add discrete Gaussian noise once per logical step, divide by the expected batch.

    Args:
        optimizer: what steps on the noisy gradient, which is post-processing.
        noise_multiplier: sigma, as charged.
        max_grad_norm: C, the bound on one unit's L2 contribution over all parameters together.
        expected_batch_size: q times the registered number of units: a constant, whatever the sample.
        stream: source of the noise.
        slack: bound on what float arithmetic may add to the change that one unit makes, relative to C
            (`fl_client.dp.rounding`).
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_batch_size: float,
        stream: SecureStream,
        slack: float,
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_batch_size,
            loss_reduction="mean",
        )
        self._stream = stream
        self._book: GradientBook | None = None
        self._units: tuple[Tensor, int] | None = None
        self._sums: Sums | None = None
        self.left_out = 0
        self.dimensions = sum(p.numel() for p in self.params)
        self.grid = choose_grid(
            clipping_norm=max_grad_norm,
            noise_multiplier=noise_multiplier,
            dimensions=self.dimensions,
            slack=slack,
        )

    def take_book(self, book: GradientBook) -> None:
        """Hand over a micro-batch's book after its backward pass."""
        self._book = book

    def take_units(self, unit_of_record: Tensor, units: int) -> None:
        """With Opacus' hooks: which records of the coming `grad_sample` belong to which unit."""
        self._units = (unit_of_record, units)

    def take_sums(self, sums: Sums) -> None:
        """Hand over a micro-batch's clipped sums, made elsewhere (ghost clipping)."""
        self._sums = sums

    def forget(self) -> None:
        """Drop what the last micro-batch handed over; what was accumulated before it stays."""
        self._book = self._units = self._sums = None

    @property
    def accumulated_iterations(self) -> int:
        """Always 1: micro-batches make up one logical step, and the accountant's q is the sampler's."""
        return 1

    def clip_and_accumulate(self) -> None:
        """Clip every unit of the micro-batch to C, jointly over all parameters, and add up."""
        if self._book is not None:
            book, self._book = self._book, None
            sums = self._clipped_by_book(book)
        elif self._units is not None:
            sums = self._clipped_by_hooks(*self._units)
            self._units = None
        elif self._sums is not None:
            sums, self._sums = self._sums, None
        else:
            return
        # All new sums first: when memory runs out here, none of this micro-batch has been added.
        added: list[tuple[Any, Tensor]] = []
        for parameter, total in sums:
            held: Any = parameter  # Opacus keeps the sum as an attribute of the parameter
            total = total.double()
            added.append((held, total if held.summed_grad is None else total.add_(held.summed_grad)))
        for held, total in added:
            held.summed_grad = total

    def _clipped_by_book(self, book: GradientBook) -> Sums:
        trainable, reached = {id(p) for p in self.params}, [id(p) for p in book.parameters]
        if len(reached) != len(set(reached)) or set(reached) != trainable:
            raise EngineError(
                f"the backward pass reached {len(set(reached))} of {len(trainable)} trainable tensors",
                fix="a layer is shared, skipped or not to be trained: check the LoRA targets for this architecture",
            )
        return book.weighted_sums(self.clip_factors(book.norms()))

    def _clipped_by_hooks(self, unit_of_record: Tensor, units: int) -> Sums:
        by_unit = []
        for parameter in self.params:
            sample = self._get_flat_grad_sample(parameter).double()
            if sample.shape[0] != unit_of_record.shape[0]:
                raise EngineError(
                    f"grad_sample has {sample.shape[0]} rows for {unit_of_record.shape[0]} records",
                    fix="a layer flattens tokens, so that clipping would be per token: use engine 'book'",
                )
            parameter.grad_sample = None
            by_unit.append(sample.new_zeros(units, *parameter.shape).index_add_(0, unit_of_record, sample))
        squared = torch.stack([g.flatten(1).square().sum(1) for g in by_unit]).sum(0)
        factors = self.clip_factors(squared.sqrt())
        kept = (factors > 0).nonzero().squeeze(1)
        return [
            (parameter, torch.einsum("u,u...->...", factors[kept], sample[kept]))
            for parameter, sample in zip(self.params, by_unit, strict=True)
        ]

    def clip_factors(self, norms: Tensor) -> Tensor:
        """`min(1, C / norm)` of every unit, float64; 0, and left out of every sum, where a norm is not finite.

        Whether the round goes on must not depend on one unit. How many were left out stays in the process.
        """
        finite = torch.isfinite(norms)
        self.left_out += int((~finite).sum())
        factors: Tensor = self.max_grad_norm / norms.double().clamp(min=self.max_grad_norm)
        return factors.masked_fill(~finite, 0)

    def add_noise(self) -> None:
        """Round the sum to the grid, add integer noise, and only then return to floats."""
        noisy = torch.from_numpy(noisy_sum(self.gather_sum(), self.grid, self._stream, threads=torch.get_num_threads()))
        at = 0
        for p in self.params:
            p.grad = noisy[at : at + p.numel()].view_as(p).to(p.device)
            at += p.numel()

    def gather_sum(self) -> Any:
        """The clipped sum over the logical batch, all coordinates in the order of `params`: float64 `[d]`."""
        parts = [
            torch.zeros(p.numel(), dtype=torch.float64)
            if p.summed_grad is None
            else p.summed_grad.detach().reshape(-1).cpu()
            for p in self.params
        ]
        return torch.cat(parts).numpy()

    def scale_grad(self) -> None:
        """Divide by the expected batch size."""
        for p in self.params:
            p.grad /= self.expected_batch_size

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:  # noqa: ARG002  # Opacus' signature
        """Clip; on the last micro-batch also add noise, scale and run the step hook (the accountant)."""
        self.clip_and_accumulate()
        if self._check_skip_next_step():
            self._is_last_step_skipped = True
            return False
        self.add_noise()
        self.scale_grad()
        if self.step_hook is not None:
            self.step_hook(self)
        self._is_last_step_skipped = False
        return True
