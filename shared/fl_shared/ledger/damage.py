"""Name the rows of a ledger whose columns hold what they cannot: another type, nothing, or bytes that are no text.

SQLite keeps whatever it finds in a file, so a flipped bit or a stranger's hand can leave a BLOB in a column of texts
or text that is not UTF-8. The checks of `verify` fall over such rows; this says which they were.
"""

from __future__ import annotations

import contextlib
from typing import Any

import sqlalchemy as sa

from fl_shared.errors import LedgerError, shown
from fl_shared.ledger.models import metadata
from fl_shared.ledger.records import Problem
from fl_shared.ledger.store import Store

MOST = 20  # problems named a table

_TYPES: tuple[tuple[type[sa.types.TypeEngine[Any]], str, str], ...] = (
    (sa.String, "text", "text"),
    (sa.Float, "real", "a number"),
    (sa.Integer, "integer", "a whole number"),
)


def misfits(store: Store) -> list[Problem]:
    """Return a problem for each column of each row that is not of its type; at most MOST a table.

    What cannot be read at all is left out: the caller knows that already.
    """
    problems: list[Problem] = []
    with contextlib.suppress(LedgerError), store.read() as connection:
        for table in metadata.sorted_tables:
            with contextlib.suppress(sa.exc.DBAPIError):
                problems += _wrong_types(connection, table) if store.sqlite else _empty_values(connection, table)
    if store.sqlite:
        with contextlib.suppress(LedgerError), store.read() as connection:
            driver: Any = connection.connection.driver_connection
            driver.text_factory = bytes
            try:
                for table in metadata.sorted_tables:
                    with contextlib.suppress(store.driver_error):
                        problems += _undecodable_texts(driver, table)
            finally:
                driver.text_factory = str
    return problems


def _expected_type(column: sa.Column[Any]) -> tuple[str, str]:
    return next((name, words) for kind, name, words in _TYPES if isinstance(column.type, kind))


def _wrong_types(connection: sa.Connection, table: sa.Table) -> list[Problem]:
    columns = list(table.columns)
    kinds = ", ".join(f'typeof("{column.name}")' for column in columns)
    allowed = {column.name: {_expected_type(column)[0], *(["null"] if column.nullable else [])} for column in columns}
    wrong = " OR ".join(
        f'typeof("{name}") NOT IN ({", ".join(repr(kind) for kind in sorted(types))})'
        for name, types in allowed.items()
    )
    first = columns[0].name
    row = f'CASE typeof("{first}") WHEN \'integer\' THEN "{first}" ELSE rowid END'
    query = f'SELECT {row}, {kinds} FROM "{table.name}" WHERE {wrong} LIMIT {MOST}'  # noqa: S608  # our own names
    return [
        Problem(
            f"{table.name}.{column.name} of row {number} is {_type_in_words(kind)}, not {_expected_type(column)[1]}",
            number,
        )
        for number, *kinds_ in connection.exec_driver_sql(query)
        for column, kind in zip(columns, kinds_, strict=True)
        if kind not in allowed[column.name]
    ]


def _type_in_words(kind: str) -> str:
    return {"null": "empty", "blob": "bytes", "real": "a fraction", "integer": "a whole number"}.get(kind, kind)


def _empty_values(connection: sa.Connection, table: sa.Table) -> list[Problem]:
    """PostgreSQL keeps to its types; only NOT NULL can have been taken away."""
    needed = [column for column in table.columns if not column.nullable]
    query = sa.select(table).where(sa.or_(*(column.is_(None) for column in needed))).limit(MOST)
    return [
        Problem(f"{table.name}.{column.name} of row {row[0]} is empty, not {_expected_type(column)[1]}", row[0])
        for row in connection.execute(query)
        for column, value in zip(table.columns, row, strict=True)
        if value is None and not column.nullable
    ]


def _undecodable_texts(driver: Any, table: sa.Table) -> list[Problem]:
    texts = [column.name for column in table.columns if isinstance(column.type, sa.String)]
    if not texts:
        return []
    first = next(iter(table.columns)).name
    names = ", ".join(f'"{name}"' for name in texts)
    query = f'SELECT "{first}", rowid, {names} FROM "{table.name}"'  # noqa: S608  # our own names
    problems = []
    for number, rowid, *values in driver.execute(query):
        seq = number if isinstance(number, int) else rowid
        for name, value in zip(texts, values, strict=True):
            try:
                value.decode() if isinstance(value, bytes) else None
            except UnicodeDecodeError:
                text = shown(value.decode("utf-8", "replace"))
                problems.append(Problem(f"{table.name}.{name} of row {seq} is no text in UTF-8: {text}", seq))
        if len(problems) >= MOST:
            break
    return problems
