"""The CUDA kernels: their arithmetic in Triton's interpreter, their compilation, and on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from fl_client.model.quantised import matmul as quant_matmul
from fl_client.model.quantised.tensor import quantise_tensor

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None,
    reason="Triton is not installed (CUDA builds of torch bring it; else pip install triton)",
)

INTERPRETED = """
import torch
from fl_client.model.quantised import matmul as quant_matmul
from fl_client.model.quantised import triton_kernels as quant_triton
from fl_client.model.quantised.tensor import quantise_tensor
torch.set_num_threads(1)
torch.manual_seed(0)
ends = torch.tensor([20, 20, 37, 37, 43], dtype=torch.int32)
for kind, bound in ((torch.float32, 1e-5), (torch.float16, 2e-3)):  # the interpreter has no bfloat16 products
    for bits in (8, 4):
        for inputs in (65, 128, 200, 577):
            q, s = quantise_tensor(torch.randn(5, 70, inputs), 128, bits)
            x, g = torch.randn(43, inputs).to(kind), torch.randn(43, 70).to(kind)
            cases = [
                (quant_matmul.grouped(x.float(), q, s, ends, 128, inputs),
                 quant_triton.grouped(x, q, s, ends, 128, inputs)),
                (quant_matmul.grouped_transposed(g.float(), q, s, ends, 128, inputs),
                 quant_triton.grouped_transposed(g, q, s, ends, 128, inputs)),
                (quant_matmul.matmul(x.float(), q[1], s[1], 128, inputs),
                 quant_triton.grouped(x, q[1:2], s[1:2], None, 128, inputs)),
            ]
            for wanted, found in cases:
                assert found.dtype == kind
                error = float((found.float() - wanted).norm() / wanted.norm())
                assert error < bound, (kind, bits, inputs, error)
    for inputs, outputs in ((3, 70), (65, 1), (200, 96)):
        weight = torch.randn(5, inputs, outputs)
        for turned in (weight, weight.mT.contiguous().mT):
            x = torch.randn(43, inputs).to(kind)
            wanted = quant_matmul.grouped_rows(x.float(), weight, ends)
            found = quant_triton.grouped_float(x, turned.to(kind), ends)
            assert found.dtype == kind and float((found.float() - wanted).norm() / wanted.norm()) < bound
print("equal")
"""

ALONE = """
import torch
from fl_client.model.quantised import triton_kernels as quant_triton
from fl_client.model.quantised.tensor import quantise_tensor
torch.set_num_threads(1)
torch.manual_seed(0)
torch.use_deterministic_algorithms(True)
q, s = quantise_tensor(torch.randn(3, 40, 200), 128, 8)
weight = torch.randn(3, 200, 40)
x, g = torch.randn(200, 200), torch.randn(80, 40)
def ends(rows):
    return torch.tensor([0, rows, rows], dtype=torch.int32)
products = (
    lambda rows, end: quant_triton.grouped(rows, q, s, end, 128, 200),
    lambda rows, end: quant_triton.grouped_float(rows, weight, end),
)
for product in products:
    whole = product(x, ends(200))
    for rows in (1, 7, 16, 33, 64, 65, 130):
        assert torch.equal(product(x[:rows], ends(rows)), whole[:rows])
    assert torch.equal(product(x[64:], ends(136)), whole[64:])  # numpy's products, in a tile, see a row's place
whole = quant_triton.grouped_transposed(g, q, s, ends(80), 128, 200)
assert torch.equal(quant_triton.grouped_transposed(g[:5], q, s, ends(5), 128, 200), whole[:5])
assert {quant_triton._tiles(rows, 1, None, "cpu")[0] for rows in (1, 16, 10_000)} == {64}
print("alone")
"""

COMPILED = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fl_client.model.quantised import triton_kernels as quant_triton
for kernel in (quant_triton._forward, quant_triton._backward, quant_triton._float):
    for int4 in (False, True):
        kinds = {"q": "*i8", "scale": "*fp32"} | dict.fromkeys(("w_expert", "w_inner", "w_column"), "i64")
        kinds |= dict.fromkeys(("x", "y", "g", "gx", "w"), "*bf16") | dict.fromkeys(("owner", "start", "stop"), "*i32")
        kinds |= dict.fromkeys(("outputs", "inputs", "width", "groups"), "i32")
        fixed = {"EXPERTS": 64, "GROUP": 128, "INT4": int4, "ROWS": 64, "COLUMNS": 64, "STEP": 32}
        names = kernel.arg_names
        source = ASTSource(
            kernel,
            {name: kinds.get(name, "constexpr") for name in names},
            constexprs={(names.index(name),): value for name, value in fixed.items() if name in names},
        )
        for capability in (80, 90):
            ptx = compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
            assert "mma" in ptx, "tensor cores are used"
print("compiled")
"""


def _run(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


@needs_triton
def test_interpreted_kernels_equal_the_reference() -> None:
    """Forward and backward, int8 and int4, whole and short groups, experts without rows: as the CPU's products."""
    assert _run(INTERPRETED, TRITON_INTERPRET="1") == "equal"


@needs_triton
def test_a_row_is_the_same_bits_alone_and_among_others() -> None:
    """However many rows an expert gets: tiles have one size while torch's deterministic algorithms are on."""
    assert _run(ALONE, TRITON_INTERPRET="1") == "alone"


@needs_triton
def test_kernels_compile_for_ampere_and_hopper() -> None:
    """Triton's compiler, which needs no GPU, makes code with tensor-core instructions of both kernels."""
    assert _run(COMPILED, TRITON_INTERPRET="0") == "compiled"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("inputs", [128, 576, 577])
def test_cuda_equals_cpu(bits: int, inputs: int) -> None:
    """bfloat16 on CUDA gives the CPU's float32 products up to its own rounding."""
    torch.manual_seed(0)
    qweight, scale = quantise_tensor(torch.randn(5, 96, inputs), 128, bits)
    ends = torch.tensor([100, 100, 177, 177, 200], dtype=torch.int32)
    x, g = torch.randn(200, inputs).bfloat16(), torch.randn(200, 96).bfloat16()
    for name, rows in (("grouped", x), ("grouped_transposed", g)):
        product = getattr(quant_matmul, name)
        wanted = product(rows.float(), qweight, scale, ends, 128, inputs)
        found = product(rows.cuda(), qweight.cuda(), scale.cuda(), ends.cuda(), 128, inputs).float().cpu()
        assert (found - wanted).norm() < 1e-2 * wanted.norm()
