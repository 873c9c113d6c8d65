"""Products with quantised weights, `x W^T` and `g W`, for one matrix and for one matrix per expert.

On CPU a weight is dequantised block by block, just before the block's product: the float copy is never larger than a
block (or one expert's matrix), lies in the cache when the product reads it, and experts without rows are never
touched. On CUDA one fused kernel reads the quantised weight (`quant_triton`).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from fl_client.model.quant_tensor import dequantise

# Weights dequantised at a time on CPU: 4 MiB in float32, in one scratch that each thread keeps. Larger copies fall out
# of the cache, and a fresh one is paged in by the system each time, which cost five times the conversion.
BLOCK = 1 << 20


class _Scratch(threading.local):
    """One float tensor per type and device; `threading.local` makes it anew in each thread."""

    def __init__(self) -> None:
        self.held: dict[tuple[torch.dtype, torch.device], Tensor] = {}


_scratch = _Scratch()


def matmul(x: Tensor, qweight: Tensor, scale: Tensor, group: int, inputs: int) -> Tensor:
    """`x W^T`: `[M, in]` to `[M, out]`."""
    if kernels := _kernels(x, qweight, group):
        fused: Tensor = kernels.grouped(x, qweight.unsqueeze(0), scale.unsqueeze(0), None, group, inputs)
        return fused
    outputs = qweight.shape[0]
    y = x.new_empty(x.shape[0], outputs)
    for start, stop in _blocks(outputs, inputs):
        weight = _dequantised(qweight[start:stop], scale[start:stop], group, x.dtype, inputs)
        torch.mm(x, weight.mT, out=y[:, start:stop])
    return y


def matmul_transposed(g: Tensor, qweight: Tensor, scale: Tensor, group: int, inputs: int) -> Tensor:
    """`g W`, the gradient with respect to `x`: `[M, out]` to `[M, in]`."""
    if kernels := _kernels(g, qweight, group):
        fused: Tensor = kernels.grouped_transposed(g, qweight.unsqueeze(0), scale.unsqueeze(0), None, group, inputs)
        return fused
    gx = g.new_empty(g.shape[0], inputs)
    for start, stop in _blocks(qweight.shape[0], inputs):
        weight = _dequantised(qweight[start:stop], scale[start:stop], group, g.dtype, inputs)
        gx.addmm_(g[:, start:stop], weight, beta=0 if start == 0 else 1)
    return gx


def grouped(x: Tensor, qweight: Tensor, scale: Tensor, ends: Tensor, group: int, inputs: int) -> Tensor:
    """`x_e W_e^T` for rows sorted by expert: `[M, in]` to `[M, out]`; `ends` as in `grouped_matmul`."""
    if kernels := _kernels(x, qweight, group):
        fused: Tensor = kernels.grouped(x, qweight, scale, ends, group, inputs)
        return fused
    blocks = _experts(x, qweight, scale, ends, group, inputs)
    return _joined([grouped_matmul(x[rows], weight.mT, inner) for rows, weight, inner in blocks], x, qweight.shape[1])


def grouped_transposed(g: Tensor, qweight: Tensor, scale: Tensor, ends: Tensor, group: int, inputs: int) -> Tensor:
    """`g_e W_e` for rows sorted by expert: `[M, out]` to `[M, in]`."""
    if kernels := _kernels(g, qweight, group):
        fused: Tensor = kernels.grouped_transposed(g, qweight, scale, ends, group, inputs)
        return fused
    blocks = _experts(g, qweight, scale, ends, group, inputs)
    return _joined([grouped_matmul(g[rows], weight, inner) for rows, weight, inner in blocks], g, inputs)


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
    return import_module("fl_client.model.quant_triton")


def _joined(parts: list[Tensor], x: Tensor, width: int) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts else x.new_empty(0, width)


def _dequantised(qweight: Tensor, scale: Tensor, group: int, dtype: torch.dtype, inputs: int) -> Tensor:
    """The block's float weight, in this thread's scratch: valid until the next one."""
    shape = (*qweight.shape[:-1], inputs)
    size = math.prod(shape)
    key = (dtype, qweight.device)
    scratch = _scratch.held.get(key)
    if scratch is None or scratch.numel() < size:
        scratch = _scratch.held[key] = torch.empty(max(size, BLOCK), dtype=dtype, device=qweight.device)
    return dequantise(qweight, scale, group, dtype, inputs, out=scratch[:size].view(shape))


def _blocks(outputs: int, inputs: int) -> Iterator[tuple[int, int]]:
    step = max(1, BLOCK // inputs)
    for start in range(0, outputs, step):
        yield start, min(start + step, outputs)


def _experts(
    x: Tensor, qweight: Tensor, scale: Tensor, ends: Tensor, group: int, inputs: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows, float weights `[B, out, in]` and ends of a block of B experts that have rows, block after block."""
    experts, outputs = qweight.shape[:2]
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    used = counts.nonzero().flatten()
    per = max(1, BLOCK // (outputs * inputs))
    at = 0
    for chosen in used.split(per) if len(used) else ():
        inner = counts[chosen].cumsum(0, dtype=torch.int32)
        stop = at + int(inner[-1])
        if len(used) == experts:  # a view instead of a copy
            first = int(chosen[0])
            pick: slice | Tensor = slice(first, first + len(chosen))
        else:
            pick = chosen
        yield slice(at, stop), _dequantised(qweight[pick], scale[pick], group, x.dtype, inputs), inner
        at = stop
