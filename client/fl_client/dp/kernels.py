"""How products are computed while private records pass through: nothing that follows from a neighbour, nothing hidden.

On CPU one thread computes, since how work is shared out among several follows from the size of the whole; more cores
are used by more processes (`[model] processes`). Half precision on CPU is multiplied in float32: oneDNN orders the
additions of a bfloat16 product by its number of rows, and rounding to bfloat16 hides it nearly everywhere. On CUDA
TF32 and split sums are off, and operations that add in any order are refused by torch.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_HALF = (torch.bfloat16, torch.float16)
_PRODUCTS = {
    _aten.mm.default, _aten.mm.out, _aten.addmm.default, _aten.addmm_.default, _aten.addmm.out,
    _aten.bmm.default, _aten.bmm.out, _aten.baddbmm.default, _aten.baddbmm_.default, _aten.baddbmm.out,
}  # fmt: skip


class _Float32Products(TorchDispatchMode):
    """Products of half-precision matrices through float32, rounded once at the end."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if func not in _PRODUCTS or args[0].dtype not in _HALF:
            return func(*args, **named)
        target = named.pop("out", None)
        if func in (_aten.addmm_.default, _aten.baddbmm_.default):
            target = args[0]
        wide = [value.float() if isinstance(value, Tensor) else value for value in args]
        product = _PLAIN[func](*wide, **named)
        return product.to(args[0].dtype) if target is None else target.copy_(product)


_PLAIN = {func: getattr(_aten, func.overloadpacket.__name__.rstrip("_")).default for func in _PRODUCTS}


@contextlib.contextmanager
def independent_rows(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Compute as the module says, for as long as the context lasts."""
    use_exact_products()
    if device.type != "cpu":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(mode=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        wide: Any = _Float32Products
        with wide() if dtype in _HALF else contextlib.nullcontext():
            yield
    finally:
        torch.set_num_threads(threads)


def use_exact_products() -> None:
    """Let no product be rounded further than its type says: the process's environment may order TF32 on CUDA.

    What the noise pays for float arithmetic assumes float32 products, and sums of half-precision products in float32.
    """
    matmul = torch.backends.cuda.matmul
    matmul.allow_tf32 = False
    matmul.allow_bf16_reduced_precision_reduction = False
    matmul.allow_fp16_reduced_precision_reduction = False
