"""Schema versions: up, down, and the same as the models."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from fl_shared.errors import LedgerError
from fl_shared.identity.signing import SigningKey
from fl_shared.ledger.migrations import HEAD
from fl_shared.ledger.models import metadata
from fl_shared.ledger.store import Store, alembic_config, downgrade, upgrade
from fl_shared.ledger.verify import verify_ledger
from helpers.ledgers import SITE, opened, story


def test_the_migrations_make_what_the_models_say(url: str) -> None:
    """A migrated database has exactly the models' tables, columns, keys and indexes."""
    store = Store(url, read_only=False)
    store.migrate()
    with store.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
        made = {
            constraint["name"]
            for table in metadata.tables
            for constraint in sa.inspect(connection).get_check_constraints(table)
        }
        assert made == {
            constraint.name
            for table in metadata.sorted_tables
            for constraint in table.constraints
            if isinstance(constraint, sa.CheckConstraint)
        }
    store.close()


def test_the_head_is_the_newest_migration() -> None:
    """The version that `Ledger.open` looks for is the last file below versions/."""
    assert ScriptDirectory.from_config(alembic_config()).get_current_head() == HEAD


def test_a_ledger_with_data_goes_down_and_comes_up_again(url: str, key: SigningKey) -> None:
    """Down to nothing and up again works on a ledger with data, and the new one can be used."""
    with opened(url, key) as ledger:
        story(ledger)
    store = Store(url, read_only=False)
    with store.write() as connection:
        downgrade(connection, "base")
        assert set(sa.inspect(connection).get_table_names()) == {"alembic_version"}
    with store.write() as connection:
        upgrade(connection)
    store.close()
    with opened(url, key) as ledger:
        story(ledger)
    assert verify_ledger(url, SITE).problems == []


def test_each_migration_keeps_the_data_both_ways(url: str, key: SigningKey) -> None:
    """One step down and up again leaves every row as it was, and the guards of the newest schema are back."""
    with opened(url, key) as ledger:
        story(ledger)
    before = _rows(url)
    store = Store(url, read_only=False)
    with store.write() as connection:
        downgrade(connection, "-1")
    store.close()
    assert _rows(url) == before
    opened(url, key).close()  # migrates
    assert _rows(url) == before
    assert verify_ledger(url, SITE, public_key=key.public_hex, processes=1).problems == []


def _rows(url: str) -> dict[str, list[tuple[object, ...]]]:
    store = Store(url, read_only=True)
    with store.read() as connection:
        found = {
            table.name: sorted((tuple(row) for row in connection.execute(sa.select(table))), key=repr)
            for table in metadata.sorted_tables
        }
    store.close()
    return found


def test_a_migration_that_fails_leaves_nothing(url: str, key: SigningKey, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a migration breaks off, its transaction leaves no table behind, and the next opening succeeds."""
    from fl_shared.ledger import store as module

    def breaks(connection: sa.Connection, revision: str = "head") -> None:
        upgrade(connection, revision)
        raise LedgerError("the power went out")

    monkeypatch.setattr(module, "upgrade", breaks)
    with pytest.raises(LedgerError, match="power"):
        opened(url, key)
    store = Store(url, read_only=False)
    with store.read() as connection:
        assert sa.inspect(connection).get_table_names() == []
    store.close()
    monkeypatch.undo()
    opened(url, key).close()


def test_a_ledger_of_a_later_program_is_not_touched(url: str, key: SigningKey) -> None:
    """A schema version that this program does not know is refused, for reading and for writing."""
    opened(url, key).close()
    store = Store(url, read_only=False)
    with store.write() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    store.close()
    for one in (key, None):
        with pytest.raises(LedgerError, match="9999"):
            opened(url, one)
