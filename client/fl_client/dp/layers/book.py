"""The book of one micro-batch: what the backward pass met, per privacy unit, before any of it is summed.

Book-keeping (Bu et al. 2023, arXiv 2210.00038): one backward pass leaves the inputs and output gradients of every
LoRA factor here; the units' norms follow; one weighted product gives the clipped sum. No second backward pass, and
no per-unit gradient of the experts is ever formed. What a unit contributes follows from its own rows alone; norms and
sums are float64 (docs/decisions/0022).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fl_client.dp.layers.segments import Segments, add_rows, find_segments, squared_norms
from fl_client.dp.records.packing import Packed
from fl_shared.errors import EngineError

_CHUNK = 1 << 18  # floats of per-unit gradients that are made float64 at a time


@dataclass(frozen=True)
class _PerUnit:
    """A gradient that is small per unit and kept whole: `[U, p, q]` with p <= q, turned over when `turned`."""

    parameter: nn.Parameter
    gradient: Tensor
    turned: bool


@dataclass(frozen=True)
class _Outer:
    """`sum_i a_i (x) b_i` over rows: kept as its factors. `spans` are the rows of each expert; None: all are one."""

    parameter: nn.Parameter
    a: Tensor
    b: Tensor
    unit_of_row: Tensor
    spans: Tensor | None


class GradientBook:
    """One micro-batch's entries, detached: the graph's nodes hold the book, and such a cycle would never be freed."""

    def __init__(self, batch: Packed) -> None:
        self.batch, self.units = batch, batch.units
        device = batch.unit_of_record.device
        self.records = batch.unit_of_record.shape[0]
        tokens = torch.tensor([tokens for tokens, count in batch.runs for _ in range(count)], device=device)
        self.unit_of_token = batch.unit_of_record.repeat_interleave(tokens)
        straight = torch.arange(self.units, device=device)
        self._single = self.records == self.units and torch.equal(batch.unit_of_record, straight)
        self._squared = torch.zeros(self.units, dtype=torch.float64, device=device)
        self._entries: list[_PerUnit | _Outer] = []
        self._record_segments: Segments | None = None

    def add_factor(self, parameter: nn.Parameter, a: Tensor, b: Tensor) -> None:
        """A LoRA factor's gradient `sum_t a_t (x) b_t`; rows `[M, p]` and `[M, q]` of the packed micro-batch.

        Rows may be wider than the parameter, if what is beyond it is filler.
        """
        height = self.batch.ids.shape[0]
        if a.shape[0] != height:
            raise EngineError(
                f"a layer of shape {tuple(parameter.shape)} saw {a.shape[0]} rows, not {height}: it mixes examples",
                fix="leave this layer out of the LoRA targets",
            )
        turned = a.shape[1] > b.shape[1]  # a narrow matrix on the left is several times faster
        left, right = (b, a) if turned else (a, b)
        product = left.new_empty(self.records, left.shape[1], right.shape[1])
        record = row = 0
        for tokens, count in self.batch.runs:
            here, shape = slice(row, row + tokens * count), (count, tokens, -1)
            torch.bmm(left[here].view(shape).mT, right[here].view(shape), out=product[record : record + count])
            record, row = record + count, here.stop
        narrow, wide = parameter.shape[::-1] if turned else parameter.shape
        product = product[:, :narrow, :wide].float().contiguous()
        if not self._single:
            whole = product.new_zeros(self.units, *product.shape[1:])
            product = add_rows(whole, self.batch.unit_of_record, product)
        self._squared += torch.linalg.vector_norm(product.flatten(1), dim=1, dtype=torch.float64).square_()
        self._entries.append(_PerUnit(parameter, product, turned))

    def add_record_outer(self, parameter: nn.Parameter, a: Tensor, b: Tensor) -> None:
        """A gradient with one row per record: `[R, p]` and `[R, q]`."""
        if a.shape[0] != self.records:
            raise EngineError(f"the head saw {a.shape[0]} rows for {self.records} records", fix="report this defect")
        if self._record_segments is None:
            key, rows = torch.sort(self.batch.unit_of_record, stable=True)
            self._record_segments = find_segments(key, self.units, rows)
        segments = self._record_segments
        add_rows(self._squared, segments.unit, squared_norms(a, b, segments))
        self._entries.append(_Outer(parameter, a.detach(), b.detach(), self.batch.unit_of_record, None))

    def add_expert_factor(
        self, parameter: nn.Parameter, a: Tensor, b: Tensor, unit_of_row: Tensor, segments: Segments, spans: Tensor
    ) -> None:
        """Factors of all experts: rows `[M, p]`, `[M, q]` sorted by expert, those of expert e from `spans[e, 0]` to
        `spans[e, 1]`. Between them is filler, which belongs to nobody and may hold anything."""
        if parameter.ndim != 3 or spans.shape[0] != parameter.shape[0]:
            raise EngineError(f"an expert factor has shape {tuple(parameter.shape)}", fix="report this defect")
        add_rows(self._squared, segments.unit, squared_norms(a, b, segments))
        self._entries.append(_Outer(parameter, a.detach(), b.detach(), unit_of_row, spans))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that the backward pass reached, in that order."""
        return [entry.parameter for entry in self._entries]

    def rows_of(self, unit: int) -> list[Tensor]:
        """All that a unit contributes, before it is weighted: its gradients, or the rows whose products they are."""
        contributed = []
        for entry in self._entries:
            if isinstance(entry, _PerUnit):
                contributed.append(entry.gradient[unit])
            else:
                own = entry.unit_of_row == unit
                if entry.spans is not None:
                    real = torch.zeros_like(own)
                    for start, stop in entry.spans.tolist():
                        real[start:stop] = True
                    own &= real
                contributed += [entry.a[own], entry.b[own]]
        return contributed

    def norms(self) -> Tensor:
        """Each unit's L2 norm over all entries together: float64 `[U]`; not finite where an entry is not."""
        return self._squared.clamp(min=0).sqrt()

    def weighted_sums(self, weights: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        """`sum_u weights[u] * gradient_u` for every parameter, float64 in the parameter's shape.

        A unit of weight zero is left out, whatever its gradient holds: infinities are not multiplied.
        """
        weights = weights.double()
        zero = weights == 0
        left_out = zero if bool(zero.any()) else None  # asked once: on CUDA the answer has to be waited for
        sums = []
        for entry in self._entries:
            if isinstance(entry, _PerUnit):
                total = _sum_units(entry, weights, left_out)
            else:
                total = _sum_rows(entry, weights, left_out)
            sums.append((entry.parameter, total.reshape(entry.parameter.shape)))
        return sums


def _sum_units(entry: _PerUnit, weights: Tensor, left_out: Tensor | None) -> Tensor:
    units = entry.gradient.shape[0]
    flat = entry.gradient.view(units, -1)
    total = weights.new_empty(flat.shape[1])
    for part, result in zip(flat.split(max(1, _CHUNK // units), 1), total.split(max(1, _CHUNK // units)), strict=True):
        exact = part.double()
        if left_out is not None:
            exact.masked_fill_(left_out.unsqueeze(1), 0)
        torch.mv(exact.mT, weights, out=result)
    total = total.view(entry.gradient.shape[1:])
    return total.mT if entry.turned else total


def _sum_rows(entry: _Outer, weights: Tensor, left_out: Tensor | None) -> Tensor:
    a, b = entry.a, entry.b
    spans = [(0, a.shape[0])] if entry.spans is None else entry.spans.tolist()
    total = weights.new_zeros(len(spans), a.shape[1], b.shape[1])
    weight = weights.index_select(0, entry.unit_of_row).unsqueeze(1)
    out = None if left_out is None else left_out.index_select(0, entry.unit_of_row).unsqueeze(1)
    for group, (start, stop) in enumerate(spans):
        if start < stop:
            left, right = a[start:stop].double(), b[start:stop].double()
            if out is not None:
                left.masked_fill_(out[start:stop], 0)
                right.masked_fill_(out[start:stop], 0)
            narrow = left if left.shape[1] <= right.shape[1] else right
            narrow *= weight[start:stop]
            torch.mm(left.mT, right, out=total[group])
    return total


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
