"""Holds this machine's kernels to what the bound on rounding assumes: a unit's bits do not depend on its company.

A kernel's order of additions follows from the shapes, strides and alignment that it is called with, never from values.
So every shape that a round can use is tried on public numbers before private text is read: every height of a packed
micro-batch through the whole model; every product that the model was seen to make, at every height and place of a row;
every number of rows that an expert can get through its products; attention by length. A height that computes otherwise
than the full one is not used; where the full one is at odds with itself, or a product is, the round is refused.

Half precision hides most differences of order, all but one in some thousands. On CPU its products are float32 ones, so
they are tried as such.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fl_client.dp.adapt import AdaptedModel
from fl_client.dp.engine import book_of, precision_of
from fl_client.dp.kernels import independent_rows
from fl_client.dp.layers.attention import Shape, causal, recorded_shapes
from fl_client.dp.layers.lora import ADAPTER, LoraExperts, PlainExperts, filled, shape_of
from fl_client.dp.objective import Objective
from fl_client.dp.records.packing import EVEN, TILE, heights_for, pack, tokens_of
from fl_client.dp.records.records import MAX_UNITS, Records
from fl_client.model.quantised.matmul import ROW_BLOCK, grouped_rows
from fl_shared.errors import EngineError

_FIX = 'use another machine or version of torch, or [model] engine = "hooks", at ten times the time'
_WITNESSES = (1, 2, 3, 5, 8, 9, 13)  # tokens of the units that are looked at; all fit into the least height
_NEIGHBOURS = 64
_ELEMENTS = 1 << 16  # results compared for each number of rows in half precision on CUDA
_NUMBERS = 64  # results of one row that are compared with those of another place: one may agree by chance
_COMPANY = 9
_LENGTHS = (*range(1, 18), 24, 31, 32, 33, 48, 64, 100, 191, 192, 193)  # tokens of records
_LONG = (383, 511, 512, 513, 767, 768, 769, 1023, 1024, 1025, 2048)  # around what kernels cut attention into


def check_invariance(adapted: AdaptedModel, *, vocabulary: int, seed: int, rows: int = 0) -> None:
    """Try every shape; set `adapted.heights` to those that agree.

    Args:
        rows: tokens that all records of one unit may have together.

    Raises:
        EngineError: what a unit contributes depends on its company on this machine.
    """
    chance = np.random.Generator(np.random.PCG64(seed))
    device = next(iter(adapted.trainable.values())).device
    heights = heights_for(rows)
    asked = _Asked()
    with asked, independent_rows(device, precision_of(adapted)), recorded_shapes() as shapes:
        _copies(adapted, heights[-1], vocabulary)
    with independent_rows(device, precision_of(adapted)):
        heights = _heights_of_products(asked.products, heights, chance, device)
        _check_experts(adapted, chance, device)
        _check_attention(shapes, rows, precision_of(adapted), chance, device)
        adapted.heights = _heights_that_agree(adapted, heights, vocabulary, chance, device)


class _Product(NamedTuple):
    """A product of rows with a weight: `turned` where its columns lie close, `added` where there is a sum already.

    `block`: its rows are a block whose number follows from the data, not a height.
    """

    inputs: int
    outputs: int
    turned: bool
    added: bool
    block: bool
    dtype: torch.dtype


class _Asked(TorchDispatchMode):
    """Notes every product of matrices that reaches the libraries, after half precision was made float32."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.products: set[_Product] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        if name in ("mm", "addmm"):
            x, weight = args[-2:]
            if x.dtype != torch.float64:  # what those round is paid for: the sums of the book
                inputs, outputs = weight.shape
                turned = weight.stride(0) == 1 and weight.stride(1) != 1
                block = x.shape[0] <= ROW_BLOCK
                self.products.add(_Product(inputs, outputs, turned, name == "addmm", block, x.dtype))
        return func(*args, **(kwargs or {}))


def _copies(adapted: AdaptedModel, rows: int, vocabulary: int) -> None:
    """One record many times, forward and, with as many as share a micro-batch, backward: all are computed alike.

    Raises:
        EngineError: what a unit contributes, or is answered, depends on where its rows lie.
    """
    device = next(iter(adapted.trainable.values())).device
    for tokens in (1, rows // MAX_UNITS):  # few gradients at a time, as in a round
        units = rows // tokens if tokens == 1 else MAX_UNITS
        tokens_of_one = tuple(token % vocabulary for token in range(1, 1 + tokens))
        target = adapted.objective.random_targets(1, np.random.Generator(np.random.PCG64(0)))
        alike = Records((tokens_of_one,) * units, np.repeat(target, units, 0), tuple(np.arange(units)[:, None]), 0)
        batch = pack(alike, range(units), device, heights=(rows,))
        with torch.no_grad():
            contributions = adapted.module.packed(batch).flatten(1)
        if tokens > 1:
            contributions = torch.cat([contributions.double(), book_of(adapted, batch).norms().unsqueeze(1)], 1)
        if not _alike(contributions):
            raise EngineError(f"at {rows} rows what a unit contributes depends on its place on this machine", fix=_FIX)


def _heights_of_products(
    products: set[_Product], heights: tuple[int, ...], chance: np.random.Generator, device: torch.device
) -> tuple[int, ...]:
    """The heights at which equal rows have equal results at every place, the same as at the full one.

    Raises:
        EngineError: they have not at the full height, or in a block.
    """
    blocks = range(EVEN, ROW_BLOCK + 1, EVEN)
    odd: set[int] = set()
    for kind in sorted(products, key=str):
        weight = _normal(chance, (kind.outputs, kind.inputs), device, kind.dtype).mT
        weight = weight if kind.turned else weight.contiguous()
        for _ in range(-(-_NUMBERS // kind.outputs)):
            row = _normal(chance, (1, kind.inputs), device, kind.dtype)
            expected: Tensor | None = None
            for rows in reversed(blocks if kind.block else heights):
                x = row.repeat(rows, 1)
                results = x.new_zeros(rows, kind.outputs)
                results = results.addmm_(x, weight) if kind.added else torch.mm(x, weight, out=results)
                first = expected is None
                expected = results[:1].clone() if expected is None else expected
                if torch.equal(results, expected.expand_as(results)):
                    continue
                if first or kind.block:
                    raise EngineError(
                        f"a row's product with a weight of shape [{kind.outputs}, {kind.inputs}] depends on its place "
                        f"among {rows} rows on this machine",
                        fix=f"{_FIX}, or another LoRA rank",
                    )
                odd.add(rows)
    return tuple(height for height in heights if height not in odd)


def _normal(chance: np.random.Generator, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(chance.standard_normal(shape, dtype=np.float32)).to(device, dtype)


def _heights_that_agree(
    adapted: AdaptedModel, heights: tuple[int, ...], vocabulary: int, chance: np.random.Generator, device: torch.device
) -> tuple[int, ...]:
    full = heights[-1]
    records = _records(chance, vocabulary, adapted.objective, full)

    def contributions(height: int, fill: float) -> list[Tensor]:
        units = _company(chance, records, int(fill * height))
        book = book_of(adapted, pack(records, units, device, heights=(height,)))
        witnesses = range(len(_WITNESSES))
        return [book.norms()[: len(_WITNESSES)], *(rows for unit in witnesses for rows in book.rows_of(unit))]

    expected = contributions(full, 1.0)
    if not _same(expected, contributions(full, 0.0)):
        raise EngineError(f"at {full} rows a unit's gradient depends on its neighbours on this machine", fix=_FIX)
    adapted.witness = _digest(expected)
    return (*(lower for lower in heights[:-1] if _same(expected, contributions(lower, 1.0))), full)


def _digest(values: list[Tensor]) -> str:
    """Of all bits, by which processes on several devices tell whether they compute alike."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(map(torch.equal, one, other))


def _records(chance: np.random.Generator, vocabulary: int, objective: Objective, rows: int) -> Records:
    """Witnesses of one record, the longest of several; then so many neighbours that they fill the full height."""
    lengths = [*_WITNESSES, *chance.integers(1, 2 * rows // _NEIGHBOURS, 4 * _NEIGHBOURS).tolist()]
    owned = [[at] for at in range(len(lengths))]
    for extra in (4, 11):
        owned[len(_WITNESSES) - 1].append(len(lengths))
        lengths.append(extra)
    return Records(
        tuple(tuple(int(i) for i in chance.integers(0, vocabulary, n)) for n in lengths),
        objective.random_targets(len(lengths), chance),
        tuple(np.array(own) for own in owned),
        0,
    )


def _company(chance: np.random.Generator, records: Records, rows: int) -> list[int]:
    """The witnesses first, then other units in any order, while all of them fit into so many rows."""
    size = [tokens_of(records, unit) for unit in range(records.units)]
    chosen = list(range(len(_WITNESSES)))
    left = rows - sum(size[unit] for unit in chosen)
    for unit in chance.permutation(np.arange(len(_WITNESSES), records.units)).tolist():
        if size[unit] <= left:
            chosen.append(unit)
            left -= size[unit]
    return chosen


def _check_experts(adapted: AdaptedModel, chance: np.random.Generator, device: torch.device) -> None:
    """Each product of an expert layer, one layer of each shape."""
    known = set()
    for path, layer in [*adapted.layers.items(), *adapted.plain_experts.items()]:
        if not isinstance(layer, LoraExperts | PlainExperts):
            continue
        shapes = tuple((tuple(value.shape), value.dtype) for value in layer.parameters())
        if shapes in known:
            continue
        known.add(shapes)
        for product, inputs in _products(layer):
            _check_rows(path, product, inputs, layer.num_experts, chance, device, precision_of(adapted))


_Rows = Callable[[Tensor, Tensor], Tensor]


def _products(layer: LoraExperts | PlainExperts) -> Iterator[tuple[_Rows, int]]:
    """Functions of rows and ends, and the width of the rows: base and factors, forward and backward."""
    _, hidden, inner = shape_of(layer.base_layer)
    for name, inputs, outputs in (("gate_up", hidden, 2 * inner), ("down", inner, hidden)):
        yield partial(layer.base_matmul, name), inputs
        yield partial(layer.base_matmul_transposed, name), outputs
        for factor in "ARB":
            module: Any = getattr(layer, f"lora_{factor}_{name}", None)
            if module is not None:
                weight = filled(module[ADAPTER].weight.detach(), rows=factor in "AR", columns=factor in "BR")
                yield partial(_times, weight.mT), weight.shape[2]
                yield partial(_times, weight), weight.shape[1]


def _times(weight: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
    return grouped_rows(rows, weight.to(rows.dtype), ends)


def _check_rows(
    path: str,
    product: _Rows,
    inputs: int,
    experts: int,
    chance: np.random.Generator,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Every number of rows against a full block, and every place of a row in it, wherever the block begins."""
    exact = device.type == "cpu" or dtype.itemsize >= 4
    dtype = torch.float32 if exact else dtype

    def run(rows: Tensor, before: int = 0) -> Tensor:
        """By the second expert, behind so many rows of the first one."""
        ends = torch.full((experts,), before + len(rows), dtype=torch.int32, device=device)
        if experts > 1:
            ends[0] = before
        return product(torch.cat([rows.new_zeros(before, inputs), rows]), ends)[before:]

    full = run(torch.zeros(ROW_BLOCK, inputs, device=device, dtype=dtype)).numel()
    for _ in range(1 if exact else min(8, -(-_ELEMENTS // full))):
        x = _normal(chance, (ROW_BLOCK, inputs), device, dtype)
        expected = run(x)
        behind = experts == 1 or all(torch.equal(run(x, before), expected) for before in (TILE, 3 * TILE))
        fewer = (torch.equal(run(x[:rows]), expected[:rows]) for rows in range(TILE, ROW_BLOCK, TILE))
        places = (_alike(run(row.repeat(ROW_BLOCK, 1))) for row in x[: -(-_NUMBERS // expected.shape[1])].split(1))
        if not behind or not all(places) or not all(fewer):
            raise EngineError(f"{path}: a row's product depends on its neighbours on this machine", fix=_FIX)


def _alike(rows: Tensor) -> bool:
    return torch.equal(rows, rows[:1].expand_as(rows))


def _check_attention(
    shapes: set[Shape], rows: int, dtype: torch.dtype, chance: np.random.Generator, device: torch.device
) -> None:
    """Attention of a record alone against the same record among others, values and gradients, by length."""
    for shape in sorted(shapes, key=str):
        for tokens in (*_LENGTHS, *(long for long in _LONG if long <= rows)):
            company = _COMPANY if tokens <= max(_LENGTHS) else 3
            widths = (
                (shape.heads, shape.width), (shape.groups, shape.width), (shape.groups, shape.wide),
                (shape.heads, shape.wide),
            )  # fmt: skip
            parts = [_normal(chance, (company, heads, tokens, width), device, dtype) for heads, width in widths]
            whole = _attended(parts, shape)
            for unit, beside in ((0, 1), (company - 1, company), (1, 3)):
                alone = _attended([part[unit:beside] for part in parts], shape)
                if not all(torch.equal(mine, among[unit:beside]) for mine, among in zip(alone, whole, strict=True)):
                    raise EngineError(
                        f"attention over {tokens} tokens depends on the neighbours on this machine", fix=_FIX
                    )


def _attended(parts: list[Tensor], shape: Shape) -> list[Tensor]:
    query, key, value = (part.clone().requires_grad_() for part in parts[:3])
    output = causal(query, key, value, shape.scaling, shape.window)
    return [output.detach(), *torch.autograd.grad(output, (query, key, value), parts[3])]
