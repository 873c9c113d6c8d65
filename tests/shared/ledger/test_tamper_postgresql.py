"""Change anything in a PostgreSQL ledger as its superuser, triggers switched off: verification finds and names it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from fl_shared.identity.signing import SigningKey
from fl_shared.ledger.models import metadata
from fl_shared.ledger.verify import Checkpoint, verify_ledger
from helpers.ledgers import SITE, opened, story
from helpers.postgres import fresh_schema

KEY = SigningKey.generate()
COLUMNS = [(table.name, column.name) for table in metadata.sorted_tables for column in table.columns]


@pytest.fixture(scope="module")
def place(postgresql: sa.engine.URL) -> Iterator[tuple[str, sa.Engine, Checkpoint]]:
    """A ledger with a bit of everything, an engine on which no trigger fires, and what the coordinator knows."""
    url = fresh_schema(postgresql)
    with opened(url, KEY) as ledger:
        story(ledger)
        ledger.rotate_key(SigningKey.generate(), "DPO", "rotation")
        known = ledger.checkpoint()
    engine = sa.create_engine(url)

    @sa.event.listens_for(engine, "connect")
    def _no_triggers(connection: Any, _record: Any) -> None:
        connection.execute("SET session_replication_role = replica")
        connection.commit()

    yield url, engine, Checkpoint(known["entries"], known["head"], known["merkle_root"])
    engine.dispose()


def complaints(place: tuple[str, sa.Engine, Checkpoint]) -> list[str]:
    url, _engine, known = place
    report = verify_ledger(url, SITE, public_key=KEY.public_hex, checkpoints=[known], processes=1)
    return [problem.message for problem in report.problems]


def named(table: str, problems: list[str]) -> bool:
    return any({"entries": "entr"}.get(table, table) in problem for problem in problems)


def other_values(column: str, value: object) -> list[object]:
    """Values that a forger might put there; CHECK constraints, which stay on, leave at least one."""
    if column == "kind":
        return ["witness", "other-kind"]
    if column == "outcome":
        return [other for other in ("in-doubt", "settled", "released") if other != value]
    if isinstance(value, str) and value:
        return [value[:-1] + ("0" if value[-1] != "0" else "1")]
    if isinstance(value, int | float):
        return [value + 10_000, value * 0.5, value + 1]
    return ["2030-01-01T00:00:00.000000Z" if column.startswith("valid") else "x"]


def test_the_original_is_intact(place: tuple[str, sa.Engine, Checkpoint]) -> None:
    """The control: before anything is changed, nothing is found."""
    assert complaints(place) == []


@pytest.mark.parametrize(("table", "column"), COLUMNS)
def test_a_changed_value_is_found_in_every_column(
    place: tuple[str, sa.Engine, Checkpoint], table: str, column: str
) -> None:
    """One value of each column of each table, changed by a superuser, is found, and the table is named."""
    _url, engine, _known = place
    with engine.connect() as connection:
        rows = connection.execute(sa.text(f"SELECT ctid::text, {column} FROM {table} ORDER BY ctid")).all()
    wanted = [row for row in rows if row[1] is not None] or rows
    where, value = wanted[len(wanted) // 2]
    changed = None
    for candidate in other_values(column, value):
        try:
            with engine.begin() as connection:
                changed = connection.execute(
                    sa.text(f"UPDATE {table} SET {column} = :new WHERE ctid = :place RETURNING ctid::text"),
                    {"new": candidate, "place": where},
                ).scalar_one()
            break
        except sa.exc.IntegrityError:
            continue
    if changed is None:
        assert column == "outcome"  # the CHECKs tie it to steps, digest and reason: the database refuses
        return
    try:
        problems = complaints(place)
        assert named(table, problems), problems
    finally:
        with engine.begin() as connection:
            connection.execute(
                sa.text(f"UPDATE {table} SET {column} = :old WHERE ctid = :place"), {"old": value, "place": changed}
            )


@pytest.mark.parametrize("table", [table.name for table in metadata.sorted_tables])
def test_a_dropped_row_and_an_emptied_table_are_found(place: tuple[str, sa.Engine, Checkpoint], table: str) -> None:
    """A row deleted from the middle of a table, and the whole table truncated, are found and named."""
    _url, engine, _known = place
    rows = metadata.tables[table]
    with engine.begin() as connection:
        whole = [dict(row) for row in connection.execute(rows.select()).mappings()]
        where = connection.execute(
            sa.text(f"DELETE FROM {table} WHERE ctid = (SELECT ctid FROM {table} ORDER BY ctid OFFSET :n LIMIT 1)"),
            {"n": len(whole) // 2},
        )
        assert where.rowcount == 1
    try:
        assert named(table, complaints(place))
        with engine.begin() as connection:
            connection.execute(sa.text(f"DELETE FROM {table}"))
        problems = complaints(place)
        assert named(table, problems) or problems == ["the ledger is empty"]
    finally:
        with engine.begin() as connection:
            connection.execute(sa.text(f"DELETE FROM {table}"))
            connection.execute(rows.insert(), whole)
    assert complaints(place) == []


def test_swapped_and_doubled_entries_are_found(place: tuple[str, sa.Engine, Checkpoint]) -> None:
    """Two entries in each other's place, and one appended again under the next number, are found."""
    _url, engine, _known = place

    def swap() -> None:
        with engine.begin() as connection:
            for seq, other in ((8, -8), (10, 8), (-8, 10)):
                connection.exec_driver_sql("ALTER TABLE entries DROP CONSTRAINT IF EXISTS entries_seq")
                connection.execute(sa.text("UPDATE entries SET seq = :b WHERE seq = :a"), {"a": seq, "b": other})

    swap()
    assert any("entry 8" in problem for problem in complaints(place))
    swap()
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE entries ADD CONSTRAINT entries_seq CHECK (seq >= 1)")
    assert complaints(place) == []
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO entries SELECT (SELECT max(seq) + 1 FROM entries), kind, body, "
            "(SELECT hash FROM entries ORDER BY seq DESC LIMIT 1), substr(hash, 2) || 'f', signature, created_at "
            "FROM entries WHERE seq = 9"
        )
    assert any("signature does not fit" in problem for problem in complaints(place))
    with engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM entries WHERE seq = (SELECT max(seq) FROM entries)")
    assert complaints(place) == []
