"""Fixtures of the site's tests."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def _sibling(name: str) -> None:
    """Make `tests/client/NAME.py` importable as `client_NAME`; importlib mode adds no path."""
    spec = importlib.util.spec_from_file_location(f"client_{name}", HERE / f"{name}.py")
    if spec is None or spec.loader is None:
        raise ImportError(name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[f"client_{name}"] = module
    spec.loader.exec_module(module)


_sibling("gateway")
_sibling("sites")
_sibling("agents")
_sibling("sandboxes")
_sibling("users")

from client_gateway import Gateway  # noqa: E402 - made importable above


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    """A running gateway with its own CA."""
    directory = tmp_path / "gateway"
    directory.mkdir()
    made = Gateway(directory)
    yield made
    made.close()
