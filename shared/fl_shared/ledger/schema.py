"""Compare a ledger's schema with the one that the migrations make: a missing trigger is a missing guard."""

from __future__ import annotations

import tempfile
from functools import lru_cache
from pathlib import Path

import sqlalchemy as sa

from fl_shared.files import sqlite_url
from fl_shared.ledger.models import APPEND_ONLY, metadata
from fl_shared.ledger.records import Problem
from fl_shared.ledger.store import Store, migrations, upgrade


def schema_problems(connection: sa.Connection, store: Store) -> list[Problem]:
    """Name each table, index, constraint or trigger that differs from what the migrations make."""
    actual, expected = (
        (_sqlite(connection), _fresh_sqlite()) if store.sqlite else (_postgresql(connection), _expected())
    )
    problems = [
        Problem(f"schema: {name} was {'changed' if name in actual else 'removed'}")
        for name, text in sorted(expected.items())
        if actual.get(name) != text
    ]
    return problems + [Problem(f"schema: {name} does not belong there") for name in sorted(set(actual) - set(expected))]


def _sqlite(connection: sa.Connection) -> dict[str, str]:
    query = sa.text("SELECT type, name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'")
    return {f"{kind} {name}": sql or "" for kind, name, sql in connection.execute(query)}


@lru_cache(maxsize=1)
def _fresh_sqlite() -> dict[str, str]:
    with tempfile.TemporaryDirectory(prefix="concordat-schema-") as directory:
        store = Store(sqlite_url(Path(directory) / "fresh.sqlite"), read_only=False)
        try:
            with store.write() as connection:
                upgrade(connection)
                return _sqlite(connection)
        finally:
            store.close()


def _postgresql(connection: sa.Connection) -> dict[str, str]:
    triggers = sa.text(
        "SELECT c.relname, t.tgname, t.tgenabled FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid "
        "WHERE NOT t.tgisinternal AND c.relname = ANY(:tables) AND c.relnamespace = "
        "(SELECT oid FROM pg_namespace WHERE nspname = current_schema())"
    )
    checks = sa.text(
        "SELECT c.relname, k.conname, k.convalidated FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid "
        "WHERE k.contype IN ('c', 'f', 'u') AND c.relname = ANY(:tables) AND c.relnamespace = "
        "(SELECT oid FROM pg_namespace WHERE nspname = current_schema())"
    )
    tables = list(APPEND_ONLY)
    actual = {
        f"trigger {name} on {table}": "on" if enabled in {"O", "A"} else "off"
        for table, name, enabled in connection.execute(triggers, {"tables": tables})
    }
    for table, name, validated in connection.execute(checks, {"tables": tables}):
        actual[f"constraint {name} on {table}"] = "on" if validated else "off"
    functions = sa.text(
        "SELECT proname, prosrc FROM pg_proc WHERE pronamespace = "
        "(SELECT oid FROM pg_namespace WHERE nspname = current_schema())"
    )
    return actual | {f"function {name}": source for name, source in connection.execute(functions)}


def _expected() -> dict[str, str]:
    expected = {}
    for table in metadata.sorted_tables:
        for action in ("change", "truncate"):
            expected[f"trigger {table.name}_refuse_{action} on {table.name}"] = "on"
        for constraint in table.constraints:
            if not isinstance(constraint, sa.PrimaryKeyConstraint):
                expected[f"constraint {constraint.name} on {table.name}"] = "on"
    expected["trigger entries_follow on entries"] = "on"
    expected["trigger settlements_fit on settlements"] = "on"
    for migration in migrations():
        expected |= {f"function {name}": body for name, body in migration.FUNCTIONS.items()}
        for suffix, tables in (("of_its_kind", "KINDS"), ("fit", "RULES")):
            expected |= {f"trigger {table}_{suffix} on {table}": "on" for table in getattr(migration, tables, ())}
    return expected
