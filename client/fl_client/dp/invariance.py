"""Holds this machine's kernels to what the bound on rounding assumes: a unit's bits do not depend on its company.

A kernel's order of additions follows from the shapes, strides and alignment that it is called with, never from values.
So every shape that a round can use is tried on public numbers before private text is read: every height of a packed
micro-batch through the whole model, and every number of rows that an expert can get through its products. A height
that computes otherwise than the full one is not used; where the full one is at odds with itself, or an expert's
products are, the round is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fl_client.dp.adapt import AdaptedModel
from fl_client.dp.attention import causal
from fl_client.dp.batches import Records
from fl_client.dp.engine import book_of, precision_of
from fl_client.dp.kernels import independent_rows
from fl_client.dp.lora_layers import ADAPTER, LoraExperts, PlainExperts, shape_of
from fl_client.dp.packing import TILE, heights_for, pack, tokens_of
from fl_client.model.quant_matmul import ROW_BLOCK, grouped_rows
from fl_shared.errors import EngineError

_FIX = "use another machine or another version of torch"
_WITNESSES = (1, 2, 3, 5, 8, 9, 13)  # tokens of the units that are looked at; all fit into the least height
_NEIGHBOURS = 64
_MOVES = (1, 2, 3, 5, 8, 13, 21, 34)
_ELEMENTS = 1 << 16  # results compared for each number of rows: half precision hides most differences of order
_COMPANY = 9
_LENGTHS = (*range(1, 18), 24, 31, 32, 33, 48, 64, 100, 192, 193)  # tokens of records


def check_invariance(adapted: AdaptedModel, *, vocabulary: int, seed: int, rows: int = 0) -> None:
    """Try every shape; set `adapted.heights` to those that agree.

    Args:
        rows: tokens that all records of one unit may have together.

    Raises:
        EngineError: what a unit contributes depends on its company on this machine.
    """
    chance = np.random.Generator(np.random.PCG64(seed))
    device = next(iter(adapted.plan.values())).device
    with independent_rows(device, precision_of(adapted)):
        _check_experts(adapted, chance, device)
        _check_attention(adapted, chance, device)
        adapted.heights = _heights_that_agree(adapted, heights_for(rows), vocabulary, chance, device)


def _heights_that_agree(
    adapted: AdaptedModel, heights: tuple[int, ...], vocabulary: int, chance: np.random.Generator, device: torch.device
) -> tuple[int, ...]:
    full = heights[-1]
    records = _records(chance, vocabulary, adapted.classifier.head.out_features, full)

    def contributions(height: int, fill: float) -> list[Tensor]:
        units = _company(chance, records, int(fill * height))
        book = book_of(adapted, pack(records, units, device, heights=(height,)))
        witnesses = range(len(_WITNESSES))
        return [book.norms()[: len(_WITNESSES)], *(rows for unit in witnesses for rows in book.rows_of(unit))]

    wanted = contributions(full, 1.0)
    if not _same(wanted, contributions(full, 0.0)):
        raise EngineError(f"at {full} rows a unit's gradient depends on its neighbours on this machine", fix=_FIX)
    return (*(each for each in heights[:-1] if _same(wanted, contributions(each, 1.0))), full)


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(map(torch.equal, one, other))


def _records(chance: np.random.Generator, vocabulary: int, classes: int, rows: int) -> Records:
    """Witnesses of one record, the longest of several; then so many neighbours that they fill the full height."""
    lengths = [*_WITNESSES, *chance.integers(1, 2 * rows // _NEIGHBOURS, 4 * _NEIGHBOURS).tolist()]
    owned = [[at] for at in range(len(lengths))]
    for extra in (4, 11):
        owned[len(_WITNESSES) - 1].append(len(lengths))
        lengths.append(extra)
    return Records(
        tuple(tuple(int(i) for i in chance.integers(0, vocabulary, n)) for n in lengths),
        chance.integers(0, classes, len(lengths)),
        tuple(np.array(each) for each in owned),
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


_Product = Callable[[Tensor, Tensor], Tensor]


def _products(layer: LoraExperts | PlainExperts) -> Iterator[tuple[_Product, int]]:
    """Functions of rows and ends, and the width of the rows: base and factors, forward and backward."""
    _, hidden, inner = shape_of(layer.base_layer)
    for name, inputs, outputs in (("gate_up", hidden, 2 * inner), ("down", inner, hidden)):
        yield partial(layer.base_matmul, name), inputs
        yield partial(layer.base_matmul_transposed, name), outputs
        for factor in "ARB":
            module: Any = getattr(layer, f"lora_{factor}_{name}", None)
            if module is not None:
                weight = module[ADAPTER].weight.detach()
                yield partial(_times, weight.mT), weight.shape[2]
                yield partial(_times, weight), weight.shape[1]


def _times(weight: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
    return grouped_rows(rows, weight.to(rows.dtype), ends)


def _check_rows(
    path: str,
    product: _Product,
    inputs: int,
    experts: int,
    chance: np.random.Generator,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Every number of rows, and every place of a row within some tiles, against a full block."""

    def run(rows: Tensor) -> Tensor:
        return product(rows, torch.full((experts,), len(rows), dtype=torch.int32, device=device))

    full = run(torch.zeros(ROW_BLOCK, inputs, device=device, dtype=dtype)).numel()
    for _ in range(1 if dtype.itemsize >= 4 else min(8, -(-_ELEMENTS // full))):
        x = torch.from_numpy(chance.standard_normal((ROW_BLOCK, inputs), dtype=np.float32)).to(device, dtype)
        wanted = run(x)
        moved = (torch.equal(run(x.roll(by, 0)), wanted.roll(by, 0)) for by in _MOVES)
        fewer = (torch.equal(run(x[:rows]), wanted[:rows]) for rows in range(TILE, ROW_BLOCK, TILE))
        if not all(moved) or not all(fewer):
            raise EngineError(f"{path}: a row's product depends on its neighbours on this machine", fix=_FIX)


def _check_attention(adapted: AdaptedModel, chance: np.random.Generator, device: torch.device) -> None:
    """Attention of a record alone against the same record among others, values and gradients, by length."""
    config: Any = adapted.classifier.backbone.config
    heads = int(config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    for tokens in _LENGTHS:
        shape = (_COMPANY, heads, tokens, width)
        parts = [
            torch.from_numpy(chance.standard_normal(shape, dtype=np.float32)).to(device, precision_of(adapted))
            for _ in range(4)
        ]
        whole = _attended(parts)
        for unit, beside in ((0, 1), (_COMPANY - 1, _COMPANY), (1, 3)):
            alone = _attended([part[unit:beside] for part in parts])
            if not all(torch.equal(mine, among[unit:beside]) for mine, among in zip(alone, whole, strict=True)):
                raise EngineError(f"attention over {tokens} tokens depends on the neighbours on this machine", fix=_FIX)


def _attended(parts: list[Tensor]) -> list[Tensor]:
    query, key, value = (part.clone().requires_grad_() for part in parts[:3])
    found = causal(query, key, value, None, None)
    return [found.detach(), *torch.autograd.grad(found, (query, key, value), parts[3])]
