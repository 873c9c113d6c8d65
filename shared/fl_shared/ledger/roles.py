"""Who may do what in a PostgreSQL ledger: the owner migrates, the agent appends, the auditor reads.

Triggers refuse changes whoever asks; grants are the second lock, which the agent's role cannot remove. On SQLite
the file's owner and mode stand in their place.
"""

from __future__ import annotations

import re

import sqlalchemy as sa

from fl_shared.errors import ConfigError
from fl_shared.ledger.models import APPEND_ONLY
from fl_shared.ledger.store import Store

_ROLE = re.compile(r"[a-z_][a-z0-9_]{0,62}").fullmatch


def grant_statements(*, schema: str, writer: str | None = None, auditor: str | None = None) -> list[str]:
    """Return the SQL that gives `writer` SELECT and INSERT, and `auditor` SELECT, and takes everything else.

    The roles must exist. Raises ConfigError for a name that would need quoting.
    """
    tables = ", ".join(f"{schema}.{name}" for name in (*APPEND_ONLY, "alembic_version"))
    statements: list[str] = []
    for role, rights in ((writer, "SELECT, INSERT"), (auditor, "SELECT")):
        if role is None:
            continue
        if not _ROLE(role) or not _ROLE(schema):
            raise ConfigError(
                f"{role!r} in schema {schema!r} is not usable", fix="use lower-case letters, digits and underscores"
            )
        statements += [
            f"REVOKE ALL ON {tables} FROM {role}",
            f"REVOKE ALL ON SCHEMA {schema} FROM {role}",
            f"GRANT USAGE ON SCHEMA {schema} TO {role}",
            f"GRANT {rights} ON {tables} TO {role}",
        ]
        if rights != "SELECT":
            statements.append(f"REVOKE INSERT ON {schema}.alembic_version FROM {role}")
    if statements:
        statements.insert(0, f"REVOKE ALL ON {tables} FROM PUBLIC")
    return statements


def grant(url: str, *, writer: str | None = None, auditor: str | None = None) -> list[str]:
    """Bring the ledger's schema up to date as its owner and grant; return the statements that were run.

    Raises ConfigError for SQLite or an unusable role, LedgerError when the database says no.
    """
    store = Store(url, read_only=False)
    try:
        if store.sqlite:
            raise ConfigError(
                "SQLite knows no roles", fix="give the auditor a copy by fl-audit export, or read rights on the file"
            )
        store.migrate()
        with store.write() as connection:
            schema = str(connection.execute(sa.text("SELECT current_schema()")).scalar_one())
            statements = grant_statements(schema=schema, writer=writer, auditor=auditor)
            for statement in statements:
                connection.execute(sa.text(statement))
        return statements
    finally:
        store.close()
