"""Databases for the ledger's tests. CI must not skip PostgreSQL: it is a package of the dev extra."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fl_shared.identity.signing import SigningKey
from fl_shared.ledger import Ledger
from helpers.ledgers import opened
from helpers.postgres import fresh_schema


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh, empty database (on PostgreSQL: a schema of its own)."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'ledger.sqlite'}"
    return fresh_schema(request.getfixturevalue("postgresql"))


@pytest.fixture
def key() -> SigningKey:
    """The site's signing key."""
    return SigningKey.generate()


@pytest.fixture
def ledger(url: str, key: SigningKey) -> Iterator[Ledger]:
    """An open ledger on a fresh database."""
    with opened(url, key) as made:
        yield made
