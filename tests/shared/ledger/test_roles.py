"""Real roles on a real PostgreSQL: the owner migrates, the agent appends, the auditor reads."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from fl_shared.errors import ConfigError, LedgerError
from fl_shared.identity.signing import SigningKey
from fl_shared.ledger import Ledger
from fl_shared.ledger.models import APPEND_ONLY, metadata
from fl_shared.ledger.roles import grant
from fl_shared.ledger.verify import verify_ledger
from helpers.ledgers import ROUND, SITE, opened, story
from helpers.postgres import fresh_schema


@pytest.fixture
def url(postgresql: sa.engine.URL) -> str:
    """A schema with the roles `site_agent` and `auditor`, which may log in and own nothing."""
    made = fresh_schema(postgresql)
    engine = sa.create_engine(postgresql, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for role in ("site_agent", "auditor"):
            if not connection.execute(sa.text("SELECT 1 FROM pg_roles WHERE rolname = :r"), {"r": role}).scalar():
                connection.execute(sa.text(f"CREATE ROLE {role} LOGIN"))
    engine.dispose()
    grant(made, writer="site_agent", auditor="auditor")
    return made


def as_role(url: str, role: str) -> str:
    return sa.engine.make_url(url).set(username=role).render_as_string(hide_password=False)


def test_the_agents_role_appends_and_can_do_nothing_else(url: str, key: SigningKey) -> None:
    """With SELECT and INSERT alone a site does its whole work; no change, no DDL, no trigger switched off."""
    with opened(as_role(url, "site_agent"), key) as ledger:
        story(ledger)
        ledger.reserve("icd", ROUND, run="more", round=1)
        for table in APPEND_ONLY:
            column = next(iter(metadata.tables[table].columns)).name
            for statement in (
                f"UPDATE {table} SET {column} = {column}",
                f"DELETE FROM {table}",
                f"TRUNCATE {table} CASCADE",
                f"ALTER TABLE {table} DISABLE TRIGGER ALL",
                f"DROP TABLE {table} CASCADE",
            ):
                with (
                    ledger._store.engine.connect() as connection,
                    pytest.raises(sa.exc.ProgrammingError, match=r"permission denied|must be owner"),
                ):
                    connection.execute(sa.text(statement))
        with ledger._store.engine.connect() as connection, pytest.raises(sa.exc.ProgrammingError, match="denied"):
            connection.execute(sa.text("CREATE TABLE mine (a int)"))
        with ledger._store.engine.connect() as connection, pytest.raises(sa.exc.ProgrammingError, match="denied"):
            connection.execute(sa.text("SET session_replication_role = replica"))
    assert verify_ledger(url, SITE, public_key=key.public_hex).problems == []


def test_the_auditors_role_verifies_and_cannot_write(url: str, key: SigningKey) -> None:
    """A role with SELECT alone verifies everything, and the database refuses it any entry."""
    with opened(url, key) as ledger:
        story(ledger)
    mine = as_role(url, "auditor")
    assert verify_ledger(mine, SITE, public_key=key.public_hex).problems == []
    with Ledger.open(mine, None, SITE) as reader:
        assert reader.epsilon("icd").steps > 0
    with Ledger.open(mine, key, SITE) as ledger, pytest.raises(LedgerError, match="permission denied"):
        ledger.register_dataset("x", "sha256:x", "record", 10, 1)


def test_a_function_emptied_by_the_owner_is_found(url: str, key: SigningKey) -> None:
    """A trigger's function replaced by one that lets everything pass is named, although the trigger stands."""
    with opened(url, key) as ledger:
        story(ledger)
        with ledger._store.engine.begin() as connection:
            connection.execute(
                sa.text(
                    "CREATE OR REPLACE FUNCTION ledger_refuse() RETURNS trigger LANGUAGE plpgsql "
                    "AS $$BEGIN RETURN NULL; END$$"
                )
            )
            connection.execute(sa.text("ALTER TABLE entries DISABLE TRIGGER entries_follow"))
    found = [problem.message for problem in verify_ledger(url, SITE, processes=1).problems]
    assert found == [
        "schema: function ledger_refuse was changed",
        "schema: trigger entries_follow on entries was changed",
    ]


def test_unusable_roles_are_refused(url: str, tmp_path: object) -> None:
    """A role's name that could carry SQL, a role that is not there, and SQLite end in words."""
    with pytest.raises(ConfigError, match="not usable"):
        grant(url, auditor="x; DROP TABLE entries")
    with pytest.raises(LedgerError, match="does not exist"):
        grant(url, auditor="nobody_there")
    with pytest.raises(ConfigError, match="knows no roles"):
        grant(f"sqlite:///{tmp_path}/x.sqlite", auditor="auditor")
