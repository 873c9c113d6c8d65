"""Copies of a coordinator's database: a snapshot while it is in use, and rows from one kind to another.

SQLite has its own online copy. From PostgreSQL the rows are copied in one repeatable-read transaction into an
SQLite file, and on a restore from such a file into an empty schema, so one archive serves both.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import sqlalchemy as sa

from fl_server.db.store import Store
from fl_shared.errors import ConfigError
from fl_shared.files import sqlite_url
from fl_shared.runtime.private_files import create_file

_VERSIONS = "alembic_version"
_ROWS = 500
_PAGES = 2048  # 8 MiB a step; between steps writers go on


def copy_sqlite(source: Path, target: Path) -> None:
    """Copy one SQLite database, committed transactions and no others, while others write to it."""
    create_file(target)
    address = f"file:{quote(str(source))}?mode=ro"
    with closing(sqlite3.connect(address, uri=True)) as old, closing(sqlite3.connect(target)) as new:
        old.execute("PRAGMA busy_timeout = 30000")
        old.backup(new, pages=_PAGES)


def snapshot(url: str, target: Path) -> None:
    """Write the database at `url` into the new SQLite file `target`.

    Raises:
        ConfigError: a PostgreSQL database whose schema is not the one of this version.
    """
    address = sa.engine.make_url(url)
    if address.get_backend_name() == "sqlite":
        copy_sqlite(Path(str(address.database)), target)
        return
    copy = sqlite_url(target)
    _migrate(copy)
    copy_rows(url, copy)


def fill(source: Path, url: str) -> None:
    """Bring the rows of an SQLite file into the empty database at `url`.

    Raises:
        ConfigError: the database has rows already.
    """
    _migrate(sqlite_url(source))
    _migrate(url)
    copy_rows(sqlite_url(source), url)


def _migrate(url: str) -> None:
    store = Store(url)
    store.migrate()
    store.close()


def copy_rows(source: str, target: str) -> None:
    """Copy every row, all or none; both sides have the tables of the same version, the target no rows."""
    old, new = sa.create_engine(source), sa.create_engine(target)
    try:
        isolation = {"isolation_level": "REPEATABLE READ"} if old.dialect.name == "postgresql" else {}
        with old.connect().execution_options(**isolation) as reading, new.begin() as writing:
            source_schema, target_schema = sa.MetaData(), sa.MetaData()
            source_schema.reflect(reading)
            target_schema.reflect(writing)
            if _version(reading, source_schema) != _version(writing, target_schema):
                raise ConfigError(
                    "the database is not of this version of Concordat",
                    fix="run `fl-server up` of this version once, which brings it up to date",
                )
            for table in target_schema.sorted_tables:
                if table.name != _VERSIONS:
                    _copy_table(reading, source_schema.tables[table.name], writing, table)
    finally:
        old.dispose()
        new.dispose()


def _version(connection: sa.Connection, tables: sa.MetaData) -> object:
    return connection.scalar(sa.select(tables.tables[_VERSIONS].c.version_num))


def _copy_table(reading: sa.Connection, source: sa.Table, writing: sa.Connection, target: sa.Table) -> None:
    if writing.scalar(sa.select(sa.literal(1)).select_from(target).limit(1)):
        raise ConfigError(
            f"the database has rows in {target.name} already", fix="name an empty schema; nothing is overwritten"
        )
    # In the order of the key: an entry of the admin log must follow the one before.
    rows = reading.execution_options(yield_per=_ROWS).execute(sa.select(source).order_by(*source.primary_key))
    for part in rows.mappings().partitions(_ROWS):
        writing.execute(target.insert(), [dict(row) for row in part])
    if writing.dialect.name == "postgresql":
        for column in target.primary_key:
            if column.server_default is not None:  # a sequence: it goes on after the largest number
                writing.execute(
                    sa.text(
                        f"SELECT setval(pg_get_serial_sequence('{target.name}', '{column.name}'), "  # noqa: S608
                        f"coalesce((SELECT max({column.name}) FROM {target.name}), 0) + 1, false)"  # our own names
                    )
                )
