"""Norms over runs of rows, against outer products formed in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fl_client.dp.layers import segments as module
from fl_client.dp.layers.book import GradientBook
from fl_client.dp.layers.segments import ROUNDING, find_segments, squared_norms
from fl_client.dp.records.packing import Packed
from fl_client.dp.rounding import slack

torch.set_num_threads(1)


def _expected(a: torch.Tensor, b: torch.Tensor, key: torch.Tensor, units: int) -> torch.Tensor:
    """Each unit's squared norms, added over its segments, from products formed in float64."""
    norms = torch.zeros(units, dtype=torch.float64)
    for value in torch.unique(key).tolist():
        rows = key == value
        norms[value % units] += (a[rows].double().mT @ b[rows].double()).square().sum()
    return norms


def _found(a: torch.Tensor, b: torch.Tensor, key: torch.Tensor, units: int) -> torch.Tensor:
    segments = find_segments(key, units)
    return torch.zeros(units, dtype=torch.float64).index_add_(0, segments.unit, squared_norms(a, b, segments))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 48), min_size=1, max_size=12),
    p=st.integers(1, 9),
    q=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_norms_match_formed_products(lengths: list[int], p: int, q: int, seed: int) -> None:
    """Short, long and absent segments all get the norm of their summed outer products, and the share that is added."""
    torch.manual_seed(seed)
    key = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    if key.numel() == 0:
        return
    a, b = torch.randn(len(key), p), torch.randn(len(key), q)
    reach = torch.linalg.vector_norm(a.double(), dim=1) * torch.linalg.vector_norm(b.double(), dim=1)
    for units in (5, len(lengths)):  # units in several groups; one segment per unit
        found, expected = _found(a, b, key, units), _expected(a, b, key, units)
        room = torch.zeros(len(lengths), dtype=torch.float64).index_add_(0, key, reach).square()
        room = torch.zeros(units, dtype=torch.float64).index_add_(0, torch.arange(len(lengths)) % units, room)
        assert bool(((found - expected - ROUNDING * room).abs() <= 1e-12 * room).all())  # float64 throughout


@pytest.mark.parametrize("length", [2, 5, 40])
@pytest.mark.parametrize("ratio", [1e1, 1e3, 1e5, 1e7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cancelling_rows_never_hide_a_norm(length: int, ratio: float, dtype: torch.dtype) -> None:
    """Rows that cancel, as a hostile adapter could make them, leave a norm that is not below the true one."""
    torch.manual_seed(length)
    segments, p, q = 200, 4, 64
    a, b = torch.randn(segments, length, p), ratio * torch.randn(segments, length, q)
    a[:, 1::2] = -a[:, 0::2][:, : length // 2]
    b[:, 1::2] = b[:, 0::2][:, : length // 2]
    b[:, -1] += torch.randn(segments, q)
    if length % 2:
        b[:, -1] /= ratio
    a, b = a.to(dtype), b.to(dtype)
    key = torch.arange(segments).repeat_interleave(length)
    found = _found(a.flatten(0, 1), b.flatten(0, 1), key, segments)
    true = torch.bmm(a.double().mT, b.double()).flatten(1).square().sum(1)
    assert bool((found >= true * (1 - 1e-6)).all()), float((found / true).min())


def test_chunking_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs worked through in small chunks give the same norms as all at once."""
    key = torch.arange(40) // 8
    a, b = torch.randn(40, 4), torch.randn(40, 64)
    whole = squared_norms(a, b, find_segments(key, 5))
    monkeypatch.setattr(module, "_CHUNK_FLOATS", 256)
    torch.testing.assert_close(squared_norms(a, b, find_segments(key, 5)), whole)


def test_no_rows_give_no_segments() -> None:
    """An expert layer that no token reached has no segments and no norms."""
    found = find_segments(torch.empty(0, dtype=torch.int64), 3)
    assert found.unit.numel() == 0
    assert squared_norms(torch.empty(0, 2), torch.empty(0, 3), found).shape == (0,)


@pytest.mark.parametrize("ratio", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cancelling_rows_add_no_more_than_is_paid_for(ratio: float, dtype: torch.dtype) -> None:
    """A unit whose rows cancel on purpose, among units that all agree, moves the sum by C (1 + slack) at most."""
    torch.manual_seed(0)
    units, tokens, p, q, clip = 96, 6, 4, 64, 0.5
    a = torch.randn(tokens, p).repeat(units, 1)
    b = torch.randn(tokens, q).repeat(units, 1)
    for unit in range(8):  # pairs of rows cancel up to a part in `ratio`
        rows = slice(unit * tokens, (unit + 1) * tokens)
        a[rows] = torch.randn(tokens // 2, p).repeat_interleave(2, 0)
        b[rows] = ratio * torch.randn(tokens // 2, q).repeat_interleave(2, 0) + torch.randn(tokens, q)
        b[rows][1::2] *= -1
    a, b = a.to(dtype), b.to(dtype)
    parameter, unit_of_row = nn.Parameter(torch.zeros(1, p, q)), torch.arange(units).repeat_interleave(tokens)
    ones = torch.ones(units * tokens, dtype=torch.int64)
    whole = Packed(ones, ones, units * tokens, ((tokens, units),), ones[:units], torch.arange(units), units)
    book = GradientBook(whole)
    spans = torch.tensor([[0, units * tokens]])
    book.add_expert_factor(parameter, a, b, unit_of_row, find_segments(unit_of_row, units), spans)
    weights = clip / book.norms().clamp(min=clip)
    [(_, total)] = book.weighted_sums(weights)
    for unit in range(12):
        others = weights.clone()
        others[unit] = 0
        [(_, without)] = book.weighted_sums(others)
        change = float((total.double() - without.double()).norm()) / clip
        assert change <= 1 + slack(units=units, rows=units * tokens)


@pytest.mark.parametrize("size", [2.0**-75, 2.0**-100, 2.0**-149, 2.0**-20])
@pytest.mark.parametrize("partner", [1.0, 2.0**29, 2.0**60, 2.0**120])
def test_rows_whose_squares_underflow_float32_hide_no_contribution(size: float, partner: float) -> None:
    """Whatever float32 holds has a square in float64: no norm is found too small beside a huge partner."""
    tokens, p, q = 64, 256, 8
    a, b = torch.full((tokens, p), size), torch.full((tokens, q), partner)
    key = torch.arange(tokens)  # each row in an expert of its own
    found = float(squared_norms(a, b, find_segments(key, 1)).sum().sqrt())
    truth = float((a.double() * b.double()[:, :1]).norm() * q**0.5)
    assert truth * (1 - 1e-9) <= found < truth * (1 + 1e-5)


def test_padding_of_a_segment_is_not_multiplied() -> None:
    """A neighbour's infinity, in the row that fills a segment up, leaves the segment's norm as it was."""
    key = torch.tensor([0] * 5 + [1] * 5)
    a, b = torch.randn(10, 3), torch.randn(10, 8)
    wanted = squared_norms(a, b, find_segments(key, 2))[0]
    a[5:], b[5:] = torch.inf, torch.nan
    assert torch.equal(squared_norms(a, b, find_segments(key, 2))[0], wanted)


@pytest.mark.parametrize("shape", [(1 << 20, 1), (16384, 1024), (512, 64)])
def test_norms_of_large_factors_are_not_understated(shape: tuple[int, int]) -> None:
    """Equal entries, for which a float32 sum of squares falls behind most: at most 2**-28 below the true norm."""
    p = nn.Parameter(torch.zeros(shape))
    one = torch.zeros(1, dtype=torch.int64)
    book = GradientBook(Packed(one, one, 1, ((1, 1),), one, one, 1))
    book.add_factor(p, torch.full((1, shape[0]), 1.1), torch.full((1, shape[1]), 0.7))
    entry = torch.tensor(1.1) * torch.tensor(0.7)
    assert float(book.norms()) >= float(entry.double()) * (shape[0] * shape[1]) ** 0.5 * (1 - 2**-28)
