"""The book of one micro-batch: what the backward pass met, per privacy unit, before any of it is summed.

Book-keeping (Bu et al. 2023, arXiv 2210.00038): one backward pass leaves the inputs and output gradients of every
LoRA factor here; the units' norms follow; one weighted product gives the clipped sum. No second backward pass, and
no per-unit gradient of the experts is ever formed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fl_client.dp.segments import Segments, find_segments, squared_norms
from fl_shared.errors import EngineError


@dataclass(frozen=True)
class _PerUnit:
    """A gradient that is small per unit and kept whole: `[U, p, q]` with p <= q, turned over when `turned`."""

    parameter: nn.Parameter
    gradient: Tensor
    turned: bool


@dataclass(frozen=True)
class _Outer:
    """`sum_i a_i (x) b_i` over rows: kept as its factors. `ends` splits the rows by expert."""

    parameter: nn.Parameter
    a: Tensor
    b: Tensor
    unit_of_row: Tensor
    ends: Tensor | None


class GradientBook:
    """One micro-batch's entries, detached: the graph's nodes hold the book, and such a cycle would never be freed.

    Args:
        unit_of_record: int64 `[B]`, ascending, 0..units-1.
        units: U.
        tokens: T, the padded length of every record.
    """

    def __init__(self, unit_of_record: Tensor, units: int, tokens: int) -> None:
        if unit_of_record.numel() and bool((unit_of_record.diff() < 0).any()):
            raise EngineError("a unit's records are not side by side in the micro-batch", fix="report this defect")
        self.units, self.tokens = units, tokens
        self.records = unit_of_record.shape[0]
        self.unit_of_record = unit_of_record
        self.unit_of_token = unit_of_record.repeat_interleave(tokens)
        self._single = self.records == units
        self._squared = torch.zeros(units, dtype=torch.float64, device=unit_of_record.device)
        self._lengths: list[Tensor] = []
        self._entries: list[_PerUnit | _Outer] = []
        self._record_segments: Segments | None = None

    def add_factor(self, parameter: nn.Parameter, a: Tensor, b: Tensor) -> None:
        """A LoRA factor's gradient `sum_t a_t (x) b_t`; rows `[B*T, p]` and `[B*T, q]` in record order."""
        if a.shape[0] != self.records * self.tokens:
            raise EngineError(
                f"a layer of shape {tuple(parameter.shape)} saw {a.shape[0]} rows, not {self.records} records of "
                f"{self.tokens} tokens: it mixes examples",
                fix="leave this layer out of the LoRA targets",
            )
        turned = a.shape[1] > b.shape[1]  # a narrow matrix on the left is several times faster
        left, right = (b, a) if turned else (a, b)
        shape = (self.records, self.tokens, -1)
        product = torch.bmm(left.view(shape).mT, right.view(shape)).float()
        if not self._single:
            whole = product.new_zeros(self.units, *product.shape[1:])
            product = whole.index_add_(0, self.unit_of_record, product)
        self._lengths.append(torch.linalg.vector_norm(product.flatten(1), dim=1))
        self._entries.append(_PerUnit(parameter, product, turned))

    def add_record_outer(self, parameter: nn.Parameter, a: Tensor, b: Tensor) -> None:
        """A gradient with one row per record: `[B, p]` and `[B, q]`."""
        if a.shape[0] != self.records:
            raise EngineError(f"the head saw {a.shape[0]} rows for {self.records} records", fix="report this defect")
        if self._record_segments is None:
            self._record_segments = find_segments(self.unit_of_record, self.units)
        segments = self._record_segments
        self._squared.index_add_(0, segments.unit, squared_norms(a, b, segments))
        self._entries.append(_Outer(parameter, a.detach(), b.detach(), self.unit_of_record, None))

    def add_expert_factor(
        self, parameter: nn.Parameter, a: Tensor, b: Tensor, unit_of_row: Tensor, segments: Segments, ends: Tensor
    ) -> None:
        """Factors of all experts: rows `[M, p]`, `[M, q]` sorted by expert, then unit."""
        if parameter.ndim != 3 or ends.shape[0] != parameter.shape[0]:
            raise EngineError(f"an expert factor has shape {tuple(parameter.shape)}", fix="report this defect")
        self._squared.index_add_(0, segments.unit, squared_norms(a, b, segments))
        self._entries.append(_Outer(parameter, a.detach(), b.detach(), unit_of_row, ends))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that the backward pass reached, in that order."""
        return [entry.parameter for entry in self._entries]

    def norms(self) -> Tensor:
        """L2 norm of each unit's gradient over all entries together: float64 `[U]`."""
        squared = self._squared.clamp(min=0)
        if self._lengths:
            squared += torch.stack(self._lengths).double().square_().sum(0)
        return squared.sqrt()

    def weighted_sums(self, weights: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        """`sum_u weights[u] * gradient_u` for every parameter, float32 in the parameter's shape."""
        weights = weights.float()
        sums = []
        for entry in self._entries:
            if isinstance(entry, _PerUnit):
                total = torch.mv(entry.gradient.flatten(1).mT, weights).view(entry.gradient.shape[1:])
                total = total.mT if entry.turned else total
            else:
                total = _weighted_outer(entry, weights)
            sums.append((entry.parameter, total.reshape(entry.parameter.shape)))
        return sums


def _weighted_outer(entry: _Outer, weights: Tensor) -> Tensor:
    # Rounded to half precision, weighted rows that cancel and the sum over units would outgrow what is paid for.
    precise = torch.promote_types(entry.a.dtype, torch.float32)
    a, b = entry.a.to(precise), entry.b.to(precise)
    row = weights.index_select(0, entry.unit_of_row).unsqueeze(1)
    if a.shape[1] <= b.shape[1]:
        a = a * row
    else:
        b = b * row
    return (outer(a, b) if entry.ends is None else grouped_outer(a, b, entry.ends)).float()


def outer(a: Tensor, b: Tensor) -> Tensor:
    """`a.T @ b`: `[M, p]`, `[M, q]` to `[p, q]`."""
    return (b.mT @ a).mT if a.shape[1] > b.shape[1] else a.mT @ b


def grouped_outer(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """`a[group].T @ b[group]` for every group of rows: `[M, p]`, `[M, q]` to `[E, p, q]`."""
    p, q, lane = a.shape[1], b.shape[1], 16 // a.element_size()
    if p > q:
        return grouped_outer(b, a, ends).mT
    if p % lane or q % lane:  # the kernel wants rows of whole 16 bytes
        a, b = F.pad(a, (0, -p % lane)), F.pad(b, (0, -q % lane))
        return F.grouped_mm(a.mT, b, offs=ends)[:, :p, :q]
    return F.grouped_mm(a.mT, b, offs=ends)
