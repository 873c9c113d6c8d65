"""Fixtures of the site's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.gateway import Gateway


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    """A running gateway with its own CA."""
    directory = tmp_path / "gateway"
    directory.mkdir()
    made = Gateway(directory)
    yield made
    made.close()
