"""What the coordinator's database raises becomes one of two typed errors: it is away, or a value does not fit."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from fl_server.db.models import EventRow, RoundRow, RunRow, SiteRow
from fl_server.db.store import DatabaseAway, Store
from fl_server.identity.sites import Sites
from fl_server.runs.plans import Plans
from fl_shared.errors import ConfigError


def test_a_value_that_no_column_holds_is_the_callers_fault(store: Store) -> None:
    """Text with a zero byte, which PostgreSQL refuses, and numbers beyond 64 bits, which neither takes."""
    with pytest.raises(ConfigError):
        Sites(store).get("a\0b")
    with pytest.raises(ConfigError, match=r"no such question|is refused"):
        Plans(store).take("a", {"body": {"question": "a\0b"}})
    with pytest.raises(ConfigError, match="is refused"), store.read() as session:
        session.scalars(sa.select(EventRow).where(EventRow.number > 2**64 - 1)).all()
    with pytest.raises(ConfigError, match="is refused"), store.write() as session:
        session.execute(sa.update(RunRow).values(rounds=2**70))
    assert Sites(store).all() == []


def test_a_read_only_standby_is_away(store: Store) -> None:
    """PostgreSQL while a standby takes over, SQLite on a disk that became read-only."""
    read_only = "SET TRANSACTION READ ONLY" if store._engine.dialect.name == "postgresql" else "PRAGMA query_only = 1"

    def write() -> None:
        with store.write() as session:
            session.execute(sa.text(read_only))
            session.add(SiteRow(site="a", state="invited", invited_at=0.0))

    with pytest.raises(DatabaseAway):
        write()


def test_a_damaged_file_is_away(tmp_path: Path) -> None:
    """It is no database any more: 503 for the sites, who come again, until the backup is in place."""
    path = tmp_path / "c.sqlite"
    made = Store(f"sqlite:///{path}")
    made.migrate()
    made.close()
    path.write_bytes(os.urandom(65_536))
    with pytest.raises(DatabaseAway, match="not a database"):
        Sites(Store(f"sqlite:///{path}")).all()


def test_a_database_of_the_version_before_keeps_its_rows(store: Store) -> None:
    """What was written before the newest columns reads back with them empty, on both kinds of database."""
    config = Config()
    config.set_main_option("script_location", str(resources.files("fl_server.db") / "migrations"))
    config.attributes["configure_logger"] = False
    with store._engine.begin() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "0005")
        connection.exec_driver_sql(
            "INSERT INTO runs (run, state, reason, spec_json, spec_digest, rounds, flower_run, attempt, beat_at,"
            " restarts, created_at, updated_at) VALUES ('old', 'failed', 'no quorum', '{}', '', 2, '', '', 0, 0, 1, 1)"
        )
        connection.exec_driver_sql(
            "INSERT INTO rounds (run, round, state, adapter_digest, adapter_bytes, bytes, seconds, committed_at)"
            " VALUES ('old', 1, 'committed', 'sha256:00', 5, 7, 1.0, 1.0)"
        )
    store.migrate()
    with store.read() as session:
        run, committed = session.get_one(RunRow, "old"), session.get_one(RoundRow, ("old", 1))
    assert (run.reason, run.reason_code) == ("no quorum", "")
    assert (committed.adapter_digest, committed.state_digest) == ("sha256:00", "")
