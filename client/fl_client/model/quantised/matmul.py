"""Products with quantised weights, `x W^T` and `g W`, for one matrix and for one matrix per expert.

On CPU a weight is dequantised just before its product, one expert (of a large matrix: one block) at a time: the float
copy lies in the cache when the product reads it, and experts without rows are never touched. This loop is what torch's
`grouped_mm` does on CPU, too. On CUDA one fused kernel reads the quantised weights of all experts (`quant_triton`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from fl_client.model.quantised.tensor import dequantise

# Weights dequantised at a time on CPU: at most 4 MiB in float32, in one scratch that each thread keeps. Larger copies
# fall out of the cache, and a fresh one is paged in by the system each time, which cost five times the conversion.
BLOCK = 1 << 20
ROW_BLOCK = 512
"""Rows multiplied at a time on CPU: products of more rows are cut, so that few shapes occur at all."""


class _Scratch(threading.local):
    """One float tensor per type and device; `threading.local` makes a new one in each thread."""

    def __init__(self) -> None:
        self.held: dict[tuple[torch.dtype, torch.device], Tensor] = {}


_scratch = _Scratch()


def matmul(x: Tensor, qweight: Tensor, scale: Tensor, group: int, inputs: int) -> Tensor:
    """`x W^T`: `[M, in]` to `[M, out]`."""
    if kernels := _kernels(x, qweight, group):
        fused: Tensor = kernels.grouped(x, qweight.unsqueeze(0), scale.unsqueeze(0), None, group, inputs)
        return fused
    y = x.new_empty(x.shape[0], qweight.shape[0])
    _product(x, qweight, scale, group, inputs, y)
    return y


def matmul_transposed(g: Tensor, qweight: Tensor, scale: Tensor, group: int, inputs: int) -> Tensor:
    """`g W`, the gradient with respect to `x`: `[M, out]` to `[M, in]`."""
    if kernels := _kernels(g, qweight, group):
        fused: Tensor = kernels.grouped_transposed(g, qweight.unsqueeze(0), scale.unsqueeze(0), None, group, inputs)
        return fused
    gx = g.new_empty(g.shape[0], inputs)
    _product_transposed(g, qweight, scale, group, inputs, gx)
    return gx


def grouped(x: Tensor, qweight: Tensor, scale: Tensor, ends: Tensor, group: int, inputs: int) -> Tensor:
    """`x_e W_e^T` for rows sorted by expert: `[M, in]` to `[M, out]`; `ends` as in `grouped_matmul`."""
    if kernels := _kernels(x, qweight, group):
        fused: Tensor = kernels.grouped(x, qweight, scale, ends, group, inputs)
        return fused
    y = x.new_empty(x.shape[0], qweight.shape[1])
    for expert, rows, result in _rows_by_expert(x, y, ends):
        _product(rows, qweight[expert], scale[expert], group, inputs, result)
    return y


def grouped_transposed(g: Tensor, qweight: Tensor, scale: Tensor, ends: Tensor, group: int, inputs: int) -> Tensor:
    """`g_e W_e` for rows sorted by expert: `[M, out]` to `[M, in]`."""
    if kernels := _kernels(g, qweight, group):
        fused: Tensor = kernels.grouped_transposed(g, qweight, scale, ends, group, inputs)
        return fused
    gx = g.new_empty(g.shape[0], inputs)
    for expert, rows, result in _rows_by_expert(g, gx, ends):
        _product_transposed(rows, qweight[expert], scale[expert], group, inputs, result)
    return gx


def grouped_matmul(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`x[ends[e-1]:ends[e]] @ weight[e]` for every e.

    Args:
        x: `[M, in]`, rows sorted by group.
        weight: `[E, in, out]`.
        ends: int32 `[E]`, the end of each group; the last one is M.

    Returns:
        `[M, out]`.
    """
    inner, out = weight.shape[1:]
    lane = 16 // x.element_size()
    if inner % lane or out % lane:  # the kernel wants rows of whole 16 bytes; a LoRA rank may be anything
        x = F.pad(x, (0, -inner % lane))
        weight = F.pad(weight, (0, -out % lane, 0, -inner % lane))
        return F.grouped_mm(x, weight, offs=ends)[:, :out]
    return F.grouped_mm(x, weight, offs=ends)


def grouped_rows(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The same outside autograd, in blocks or tiles of rows as the quantised products have them."""
    if x.is_cuda and (kernels := _import_kernels()) is not None:
        fused: Tensor = kernels.grouped_float(x, weight, ends)
        return fused
    y = x.new_empty(x.shape[0], weight.shape[2])
    for expert, rows, result in _rows_by_expert(x, y, ends):
        _mm(rows, weight[expert], result)
    return y


def _mm(x: Tensor, weight: Tensor, y: Tensor) -> None:
    for rows, result in zip(x.split(ROW_BLOCK), y.split(ROW_BLOCK), strict=True):
        torch.mm(rows, weight, out=result)


def _kernels(x: Tensor, qweight: Tensor, group: int) -> ModuleType | None:
    """The fused kernels, where they can be used: on CUDA, with a group that they can cut, and with Triton."""
    if not x.is_cuda:
        return None
    kernels = _import_kernels()
    return kernels if kernels is not None and kernels.supports(group, int4=qweight.dtype == torch.uint8) else None


@cache
def _import_kernels() -> ModuleType | None:
    """CUDA builds of torch bring Triton along; without it CUDA takes the same way as CPU."""
    if find_spec("triton") is None:
        return None
    return import_module("fl_client.model.quantised.triton_kernels")


def _product(x: Tensor, qweight: Tensor, scale: Tensor, group: int, inputs: int, y: Tensor) -> None:
    if qweight.shape[0] * inputs <= BLOCK:
        _mm(x, _dequantised(qweight, scale, group, x.dtype, inputs).mT, y)
        return
    for start, stop in _blocks(qweight.shape[0], inputs):
        weight = _dequantised(qweight[start:stop], scale[start:stop], group, x.dtype, inputs)
        _mm(x, weight.mT, y[:, start:stop])


def _product_transposed(g: Tensor, qweight: Tensor, scale: Tensor, group: int, inputs: int, gx: Tensor) -> None:
    if qweight.shape[0] * inputs <= BLOCK:
        _mm(g, _dequantised(qweight, scale, group, g.dtype, inputs), gx)
        return
    gx.zero_()
    for start, stop in _blocks(qweight.shape[0], inputs):
        weight = _dequantised(qweight[start:stop], scale[start:stop], group, g.dtype, inputs)
        for rows, result in zip(g[:, start:stop].split(ROW_BLOCK), gx.split(ROW_BLOCK), strict=True):
            result.addmm_(rows, weight)


def _rows_by_expert(x: Tensor, y: Tensor, ends: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each expert that has rows, its rows of `x` and their places in `y`."""
    last = ends.tolist()
    counts = [stop - start for start, stop in zip([0, *last], last, strict=False)]
    for expert, (rows, result) in enumerate(zip(x.split(counts), y.split(counts), strict=True)):
        if counts[expert]:
            yield expert, rows, result


def _dequantised(qweight: Tensor, scale: Tensor, group: int, dtype: torch.dtype, inputs: int) -> Tensor:
    """A block's float weight `[rows, in]`, in this thread's scratch: valid until the next one."""
    size = qweight.shape[0] * inputs
    key = (dtype, qweight.device)
    scratch = _scratch.held.get(key)
    if scratch is None or scratch.numel() < size:
        scratch = _scratch.held[key] = torch.empty(max(size, BLOCK), dtype=dtype, device=qweight.device)
    return dequantise(qweight, scale, group, dtype, inputs, out=scratch[:size].view(-1, inputs))


def _blocks(outputs: int, inputs: int) -> Iterator[tuple[int, int]]:
    count = max(1, -(-outputs * inputs // BLOCK))
    step = -(-outputs // count)  # blocks of equal size
    for start in range(0, outputs, step):
        yield start, min(start + step, outputs)
