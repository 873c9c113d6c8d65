"""A coordinator as processes, its gateway with small limits."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers.coordinators import Coordinator
from helpers.gateways import LIMIT, RATE, A, B, OneConnection


@pytest.fixture(scope="module")
def one() -> Iterator[Coordinator]:
    """A coordinator with two enrolled sites and small limits."""
    root = Path(tempfile.mkdtemp(prefix="gw-"))
    made = None
    try:
        made = Coordinator(root)
        toml = made.home / "server.toml"
        text = toml.read_text().replace("max_message_bytes = 1073741824", f"max_message_bytes = {LIMIT}")
        toml.write_text(text.replace("site_requests_per_s = 50", f"site_requests_per_s = {RATE}"))
        made.up()
        made.enrol(A, B)
        yield made
    finally:
        if made is not None:
            made.close()
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def connect(one: Coordinator) -> Iterator[Callable[..., OneConnection]]:
    """Make connections that are closed at the end."""
    with contextlib.ExitStack() as stack:

        def make(certificate: Path, key: Path) -> OneConnection:
            made = OneConnection(one, certificate, key)
            stack.callback(made.close)
            return made

        yield make
