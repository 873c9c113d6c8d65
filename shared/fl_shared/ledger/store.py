"""The database below the ledger: engines, transactions, migrations, and errors in our own words.

SQLite (WAL, synchronous FULL) takes the write lock when a transaction begins (BEGIN IMMEDIATE). PostgreSQL
takes an advisory lock that ends with the transaction; the rights to append suffice for it, where a row or
table lock would need UPDATE. So writers queue, in one place, and cannot deadlock.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from fl_shared.cli.extras import require
from fl_shared.errors import ConfigError, LedgerError, damaged
from fl_shared.files import sqlite_url
from fl_shared.ledger.migrations import HEAD
from fl_shared.ledger.readable import ReadableFile
from fl_shared.runtime.private_files import create_file

BUSY_SECONDS = 120
_ADVISORY_LOCK = 0x1ED6E4
_migrating = threading.Lock()


def parse_url(url: str) -> URL:
    """Return the parsed database address; raises ConfigError for one that the ledger cannot use."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError) as error:
        raise ConfigError(f"ledger address {url!r} is not usable", fix="e.g. sqlite:////path/ledger.sqlite") from error
    if parsed.drivername in {"postgresql", "postgresql+psycopg2"}:
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername not in {"sqlite", "postgresql+psycopg"}:
        raise ConfigError(f"ledger address names {parsed.drivername!r}", fix="use sqlite:///FILE or postgresql://...")
    if parsed.drivername == "sqlite" and parsed.database in {None, "", ":memory:"}:
        raise ConfigError("a ledger in memory would be lost", fix="name a file: sqlite:////path/ledger.sqlite")
    return parsed


class Store:
    """One database; hands out write and read transactions."""

    def __init__(self, url: str, *, read_only: bool) -> None:
        self.url = parse_url(url)
        self.read_only = read_only
        self.sqlite = self.url.drivername == "sqlite"
        self._file: ReadableFile | None = None
        if not self.sqlite:
            require("postgres")
        self.engine = self._sqlite_engine() if self.sqlite else self._postgresql_engine()

    @property
    def driver_error(self) -> type[Exception]:
        """What the bare database driver raises."""
        dbapi: Any = self.engine.dialect.dbapi
        error: type[Exception] = dbapi.Error
        return error

    @property
    def name(self) -> str:
        """The address without its password, for messages."""
        return self.url.render_as_string(hide_password=True)

    @property
    def reading_url(self) -> str:
        """The address at which another process of this command reads the same; with its password."""
        if self._file is not None:
            return sqlite_url(self._file.path)
        return self.url.render_as_string(hide_password=False)

    def _sqlite_engine(self) -> sa.Engine:
        url: URL = self.url
        if self.read_only:
            self._file = ReadableFile(Path(str(self.url.database)))
            url = self._file.url
        else:
            with contextlib.suppress(OSError):  # what is wrong with the path, SQLite says
                create_file(Path(str(self.url.database)))
        engine = sa.create_engine(url, connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False})

        @sa.event.listens_for(engine, "connect")
        def _connect(connection: Any, _record: Any) -> None:
            connection.isolation_level = None  # transactions are begun below, not guessed by the driver
            if not self.read_only:
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("PRAGMA synchronous=FULL")
            connection.execute("PRAGMA foreign_keys=ON")

        @sa.event.listens_for(engine, "begin")
        def _begin(connection: sa.Connection) -> None:
            writing = connection.get_execution_options().get("ledger_write", False)
            connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")

        return engine

    def _postgresql_engine(self) -> sa.Engine:
        return sa.create_engine(self.url, pool_pre_ping=True)

    @contextlib.contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """One write transaction, alone in the ledger; committed at the end, rolled back on any error."""
        if self.read_only:
            raise LedgerError("this ledger is open for reading", fix="open it with the site's signing key")
        with self._translated(), self.engine.connect() as connection:
            options: dict[str, Any] = {"ledger_write": True}
            if not self.sqlite:
                # Under READ COMMITTED each statement sees what is committed when it starts, so what is read
                # after the lock is the newest state. A snapshot taken before the lock would be stale.
                options["isolation_level"] = "READ COMMITTED"
            connection = connection.execution_options(**options)
            with connection.begin():
                if not self.sqlite:
                    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_ADVISORY_LOCK)))
                yield connection

    @contextlib.contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """One read transaction: everything read in it is of one moment.

        Raises LedgerError when an SQLite file that nobody had open was written to meanwhile.
        """
        try:
            with self._translated(), self.engine.connect() as connection:
                if not self.sqlite:
                    connection = connection.execution_options(isolation_level="REPEATABLE READ")
                with connection.begin():
                    yield connection
        finally:
            if self._file is not None:
                self._file.require_unchanged()

    def migrate(self) -> None:
        """Bring the schema up to date; many processes may do so at once."""
        with self.read() as connection:
            revision = _schema_version(connection)
        if revision == HEAD:
            return
        if self.read_only:
            raise LedgerError(
                f"the ledger has schema {revision or 'none'}, this program reads {HEAD}",
                fix="open it once with the site's agent, or use the program version that wrote it",
            )
        with _migrating, self.write() as connection:
            revision = _schema_version(connection)
            if revision == HEAD:
                return
            if revision is not None and revision not in known_revisions():
                raise LedgerError(
                    f"the ledger has schema {revision}, which this program ({HEAD}) does not know",
                    fix="use the program version that wrote it, or a later one",
                )
            upgrade(connection)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            raise _ledger_error(error, self.name) from error
        except SQLAlchemyError as error:
            raise LedgerError(f"ledger {self.name}: {error}", fix="run fl-audit verify") from error
        except UnicodeDecodeError as error:  # SQLite quotes a damaged name in its own message
            raise damaged(f"ledger {self.name}: a name in its schema is no text ({error})") from error

    def close(self) -> None:
        """Give the connections back."""
        self.engine.dispose()
        if self._file is not None:
            self._file.close()


def upgrade(connection: sa.Connection, revision: str = "head") -> None:
    """Run the migrations up to `revision` on `connection`, in its transaction."""
    from alembic import command

    command.upgrade(alembic_config(connection), revision)


def downgrade(connection: sa.Connection, revision: str) -> None:
    """Run the migrations down to `revision` on `connection`, in its transaction."""
    from alembic import command

    command.downgrade(alembic_config(connection), revision)


def known_revisions() -> set[str]:
    """Return every schema version that this program can migrate from."""
    return {str(module.revision) for module in migrations()}


def migrations() -> list[Any]:
    """Return the modules below `migrations/versions`, newest first."""
    from alembic.script import ScriptDirectory

    return [script.module for script in ScriptDirectory.from_config(alembic_config()).walk_revisions()]


def alembic_config(connection: sa.Connection | None = None) -> Any:
    """Return alembic's configuration for the migrations inside this package."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(resources.files("fl_shared.ledger") / "migrations"))
    config.attributes["connection"] = connection
    return config


def _schema_version(connection: sa.Connection) -> str | None:
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()


_CORRUPT = ("malformed", "not a database", "could not decode", "no such", "too big", "unsupported file format")


def _ledger_error(error: DBAPIError, name: str) -> LedgerError:
    text = str(error.orig).strip().splitlines()[0] if str(error.orig).strip() else type(error.orig).__name__
    lowered = text.lower()
    hints = (
        ("append-only", "refused", "the ledger only grows; correct a mistake by a new entry"),
        *(
            (word, "corrupt", "keep it as evidence; restore the newest backup, then run fl-audit verify and reconcile")
            for word in _CORRUPT
        ),
        ("disk is full", "disk-full", "free disk space; nothing was granted or lost"),
        ("disk i/o", "disk", "check the disk; nothing was granted"),
        ("locked", "busy", "another process holds the ledger; try again"),
        ("readonly", "read-only", "check the file's owner and rights"),
        ("unable to open", "missing", "check that the directory exists and may be written"),
        ("connection", "gone", "start the database and try again; nothing was granted"),
    )
    for word, code, fix in hints:
        if word in lowered:
            make = damaged if code == "corrupt" else LedgerError
            return make(f"ledger {name}: {text}", fix=fix, code=f"ledger-{code}")
    return LedgerError(f"ledger {name}: {text}", fix="nothing was granted; run fl-audit verify")
