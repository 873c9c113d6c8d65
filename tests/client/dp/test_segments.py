"""Norms over runs of rows, against outer products formed in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_client.dp import segments as module
from fl_client.dp.segments import find_segments, squared_norms

torch.set_num_threads(1)


def _expected(a: torch.Tensor, b: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    norms = []
    for value in torch.unique_consecutive(key):
        rows = key == value
        norms.append((a[rows].double().mT @ b[rows].double()).square().sum())
    return torch.stack(norms)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 48), min_size=1, max_size=12),
    p=st.integers(1, 9),
    q=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_norms_match_formed_products(lengths: list[int], p: int, q: int, seed: int) -> None:
    """Short, long and absent segments all get the norm of their summed outer products."""
    torch.manual_seed(seed)
    units = 5
    key = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    if key.numel() == 0:
        return
    a, b = torch.randn(len(key), p), torch.randn(len(key), q)
    found = find_segments(key, units)
    assert found.unit.tolist() == [value % units for value in torch.unique(key).tolist()]
    torch.testing.assert_close(squared_norms(a, b, found), _expected(a, b, key), rtol=2e-5, atol=1e-4)


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
