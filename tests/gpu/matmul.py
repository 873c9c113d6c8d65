"""The kernels against float64 products of the same weights: types, bits, odd shapes, experts without rows; and speed.

On a GPU the fused kernels run; without one Triton's interpreter, if TRITON_INTERPRET=1, else the CPU's own products.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from compat import Report, exact_products, grouped_products, median, milliseconds, options
from torch import Tensor
from torch.nn import functional as F

from fl_client.model.quantised import matmul as quant_matmul
from fl_client.model.quantised.tensor import dequantise, quantise_tensor

GROUP = 128
BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# Rows of each expert.
ROWS = {"one row": [1], "ragged": [20, 0, 17, 0, 6], "full tiles": [64, 128, 16], "many": [0, 700, 1, 65, 258]}
INPUTS = (64, 65, 127, 128, 200, 576, 577)
OUTPUTS = (1, 70, 96)
SMALL = {"ragged": [20, 0, 17, 0, 6]}


def products(device: torch.device) -> tuple[Any, str]:
    """What is tested, and its name."""
    if device.type == "cuda":
        fused = quant_matmul._kernels(torch.empty(1, device=device), torch.empty(1, dtype=torch.int8), GROUP)
        return quant_matmul, "Triton" if fused else "dequantised, then torch (no Triton)"
    if os.environ.get("TRITON_INTERPRET") == "1":
        from fl_client.model.quantised import triton_kernels as quant_triton

        return quant_triton, "Triton's interpreter"
    return quant_matmul, "the CPU's"


def errors(product: Any, kind: torch.dtype, bits: int, counts: list[int], device: torch.device) -> Iterator[float]:
    """Relative errors (norm over norm) of both directions over inputs and outputs."""
    generator = torch.Generator().manual_seed(0)
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    starts = [0, *ends.tolist()]
    for inputs in INPUTS:
        for outputs in OUTPUTS:
            weight = torch.randn(len(counts), outputs, inputs, generator=generator)
            q, s = quantise_tensor(weight, GROUP, bits)
            exact = dequantise(q, s, GROUP, torch.float64, inputs)
            x = torch.randn(starts[-1], inputs, generator=generator).to(kind)
            g = torch.randn(starts[-1], outputs, generator=generator).to(kind)
            for name, rows, matrix in (("grouped", x, exact.mT), ("grouped_transposed", g, exact)):
                cut = list(itertools.pairwise(starts))
                wanted = torch.cat([rows[a:b].double() @ matrix[at] for at, (a, b) in enumerate(cut)])
                call = getattr(product, name)
                found = call(*(t.to(device) for t in (rows, q, s, ends)), GROUP, inputs)
                yield float((found.double().cpu() - wanted).norm() / wanted.norm())


def speed(device: torch.device, bits: int, rows: int) -> dict[str, Any]:
    """DeepSeek-V2-Lite's experts, 64 of [2816, 2048], on evenly spread rows: fused against bfloat16 weights."""
    experts, outputs, inputs = 64, 2816, 2048
    weight = torch.randn(experts, outputs, inputs, device=device, dtype=torch.bfloat16) * 0.02
    q, s = quantise_tensor(weight.float(), GROUP, bits)
    ends = (torch.arange(1, experts + 1, device=device) * (rows // experts)).to(torch.int32)
    x = torch.randn(rows, inputs, device=device, dtype=torch.bfloat16)
    g = torch.randn(rows, outputs, device=device, dtype=torch.bfloat16)

    def time_of(own: Any, stock: Any) -> dict[str, float]:
        ours, theirs = median(milliseconds(own, device, 10)), median(milliseconds(stock, device, 10))
        return {"ms": ours, "bfloat16_ms": theirs, "ratio": round(ours / theirs, 3)}

    turned: Tensor = weight.mT
    return {
        "rows": rows,
        "forward": time_of(
            lambda: quant_matmul.grouped(x, q, s, ends, GROUP, inputs), lambda: F.grouped_mm(x, turned, offs=ends)
        ),
        "backward": time_of(
            lambda: quant_matmul.grouped_transposed(g, q, s, ends, GROUP, inputs),
            lambda: F.grouped_mm(g, weight, offs=ends),
        ),
    }


def main() -> int:
    """Measure; the exit status is 1 when an error is over its bound."""
    chosen = options(__doc__)
    exact_products()
    device, report = torch.device(chosen.device), Report(chosen.out)
    product, name = products(device)
    report.put(products=name, grouped_mm=grouped_products(), accuracy=[])
    # The interpreter has no bfloat16 products, and neither it nor a CPU shows anything with more rows.
    kinds = [torch.float32, torch.float16] if "interpreter" in name else [torch.float32, torch.bfloat16]
    found, within = report.figures["accuracy"], True
    for kind in kinds:
        for bits in (8, 4):
            for rows, counts in (SMALL if chosen.small else ROWS).items():
                worst = max(errors(product, kind, bits, counts, device))
                within &= worst < BOUND[kind]
                dtype = str(kind).removeprefix("torch.")
                found.append({"dtype": dtype, "bits": bits, "rows": rows, "worst": worst, "bound": BOUND[kind]})
                report.put()
    report.put(within_bounds=within)
    if device.type == "cuda" and not chosen.small:
        for bits in (8, 4):
            report.put(**{f"speed_int{bits}": [speed(device, bits, rows) for rows in (24576, 1024)]})
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
