"""The coordinator's database, empty and migrated, of each kind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fl_server.db.store import Store
from helpers.postgres import fresh_schema


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
