"""Open the coordinator's database: migrations, one writer at a time, short transactions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import event
from sqlalchemy.orm import Session

from fl_shared.cli.extras import require
from fl_shared.errors import ConfigError, TransportError
from fl_shared.runtime.private_files import create_file

BUSY_MS = 30_000


class DatabaseAway(TransportError):
    """The database cannot be used just now. Nothing of the transaction is stored, unless it ended in its commit."""

    default_code = "no-database"


class Store:
    """Sessions on the coordinator's database. Several processes share it (gateway, control, ServerApps)."""

    def __init__(self, url: str) -> None:
        """Connect; nothing is created before `migrate`."""
        if url.startswith("postgresql"):
            require("postgres")
        try:
            # A connection that a restart of the database has cut off is noticed before it is used.
            self._engine = sa.create_engine(url, pool_pre_ping=not url.startswith("sqlite"))
        except (sa.exc.ArgumentError, ImportError) as error:
            raise ConfigError(
                f"[server] database = {url!r} cannot be used: {error}",
                fix="write sqlite:///PATH or postgresql+psycopg://…",
            ) from error
        if self._engine.dialect.name == "sqlite":
            event.listen(self._engine, "connect", _sqlite_connect)
            event.listen(self._engine, "begin", _sqlite_begin)

    def migrate(self) -> None:
        """Bring the schema up to date; does nothing when it is. DatabaseAway when nobody answers, ConfigError when a
        newer version has been here.
        """
        config = Config()
        config.set_main_option("script_location", str(resources.files("fl_server.db") / "migrations"))
        config.attributes["configure_logger"] = False
        if self._engine.dialect.name == "sqlite" and self._engine.url.database:
            with contextlib.suppress(OSError):  # what is wrong with the path, SQLite says
                create_file(Path(self._engine.url.database))
        with _reached(), self._engine.begin() as connection:
            config.attributes["connection"] = connection
            try:
                command.upgrade(config, "head")
            except CommandError as error:
                raise ConfigError(
                    f"the coordinator's database is not one of this version ({error})",
                    fix="install the version that used it last, or restore the backup made before the upgrade",
                ) from error

    @contextlib.contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction that may write; commits at the end, rolls back on an exception. May raise DatabaseAway."""
        with _reached(), Session(self._engine, expire_on_commit=False) as session:
            if self._engine.dialect.name == "sqlite":
                session.connection(execution_options={"concordat_immediate": True})
            with session.begin() if not session.in_transaction() else contextlib.nullcontext():
                yield session
            session.commit()

    @contextlib.contextmanager
    def read(self) -> Iterator[Session]:
        """A transaction that only reads. May raise DatabaseAway."""
        with _reached(), Session(self._engine, expire_on_commit=False) as session:
            yield session

    def close(self) -> None:
        """Give the connections back."""
        self._engine.dispose()


@contextlib.contextmanager
def _reached() -> Iterator[None]:
    """Turn what a driver raises when the database is gone, restarting, full, read-only or damaged into DatabaseAway.

    A value that it cannot hold (text with NUL, a number beyond 64 bits) came from a caller: ConfigError.
    """
    try:
        yield
    except (sa.exc.DataError, OverflowError) as error:
        raise ConfigError(
            "a value is refused by the coordinator's database", fix="use text without NUL, and numbers below 2^63"
        ) from error
    except (sa.exc.DBAPIError, sa.exc.TimeoutError) as error:
        if not _is_away(error):
            raise
        first = str(getattr(error, "orig", error)).strip().partition("\n")[0]
        raise DatabaseAway(
            f"the coordinator's database cannot be used: {first}", fix="see that it runs; the coordinator waits for it"
        ) from error


def _is_away(error: sa.exc.DBAPIError | sa.exc.TimeoutError) -> bool:
    """Whether the database is at fault, and not what was asked of it."""
    if isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError | sa.exc.TimeoutError):
        return True
    # A SQLite file that is damaged; a PostgreSQL that is a read-only standby for the moment.
    return type(error) is sa.exc.DatabaseError or getattr(error.orig, "sqlstate", "") == "25006"


def _sqlite_connect(connection: object, _record: object) -> None:
    connection.isolation_level = None  # type: ignore[attr-defined]  # BEGIN is ours, see _sqlite_begin
    cursor = connection.cursor()  # type: ignore[attr-defined]  # a driver's connection, which SQLAlchemy gives no type
    cursor.execute(f"PRAGMA busy_timeout = {BUSY_MS}")
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _sqlite_begin(connection: sa.Connection) -> None:
    immediate = connection.get_execution_options().get("concordat_immediate", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")
