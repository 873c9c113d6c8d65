"""Open an SQLite ledger as somebody who may only read it, and see everything that was committed to it.

What was committed last lies in the write-ahead log (`FILE-wal`) until SQLite moves it into the file, and reading that
log through SQLite itself takes a third file (`FILE-shm`), which a reader without rights in the directory cannot make.
So, in this order:

1. There is no log, or an empty one: the file holds everything. It is read as it lies, and reading ends in an error
   when somebody wrote to it meanwhile.
2. The log and its shared memory lie there, as beside a running agent: SQLite reads all three.
3. Otherwise file and log are copied to a private temporary directory, as of one moment, and read there.

Nothing is written beside the ledger in any of them. What cannot be read is an error, never left out.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sqlite3
import struct
import sys
import tempfile
from pathlib import Path
from urllib.parse import quote

from sqlalchemy.engine import URL

from fl_shared.errors import LedgerError

_ATTEMPTS = 20
_WAL_HEADER = 32  # bytes; holds the salts, which change whenever the log is begun again from its start
_FORMAT_AT = 18  # in the file's header: 2 says that a write-ahead log is used
_LOCK_FIRST, _LOCK_BYTES = 0x40000000, 512  # where SQLite locks the file
_FLOCK = "hhqqi"  # struct flock of 64-bit Linux: type, whence, start, length, process

_Stamp = tuple[int, int, int, int]


class ReadableFile:
    """One SQLite file, opened for reading in the way that sees everything in it.

    Attributes:
        path: the file that is read: the ledger itself (links resolved, as SQLite does), or the private copy.
        url: the address for SQLAlchemy.
    """

    def __init__(self, path: Path) -> None:
        """Choose the way; raises LedgerError when there is no such file or a part of it cannot be read."""
        self._copy: tempfile.TemporaryDirectory[str] | None = None
        self._seen: _Stamp | None = None
        self._held: sqlite3.Connection | None = None
        try:
            if not path.is_file():
                raise LedgerError(f"no ledger at {path}", fix="check --site and --home, or give --ledger")
            self.path = path.resolve()
            self._choose()
        except PermissionError as error:
            raise _unreadable(Path(str(error.filename))) from error

    def _choose(self) -> None:
        self._seen = _stamp(self.path)
        wal = _beside(self.path, "-wal")
        # Opening and closing a file that this very process has open as a database would drop SQLite's locks on it.
        for part in (self.path, wal):
            if part.exists() and not os.access(part, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
                raise _unreadable(part)
        if not wal.exists():
            _refuse_hidden_log(self.path)
        if not _size(wal) and not _size(_beside(self.path, "-journal")):
            self.url = _address(self.path, immutable=True)
            return
        self._seen = None
        if _beside(self.path, "-shm").exists():
            self._held = _opened(self.path)
        if self._held is None and _size(wal):
            self._copy = _copied(self.path)
            self.path = Path(self._copy.name) / "ledger.sqlite"
            self._held = _opened(self.path)
        self.url = _address(self.path)

    def require_unchanged(self) -> None:
        """Raise LedgerError when the file was written to while it was read as it lay."""
        if self._seen is not None and _stamp(self.path) != self._seen:
            raise LedgerError(
                f"the ledger {self.path} was written to while it was being read",
                fix="run the command again",
                code="ledger-busy",
            )

    def close(self) -> None:
        """Let go of the file, and delete the copy if there is one."""
        if self._held is not None:
            self._held.close()
            self._held = None
        if self._copy is not None:
            self._copy.cleanup()
            self._copy = None


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _stamp(path: Path) -> _Stamp:
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _address(path: Path, *, immutable: bool = False) -> URL:
    options = {"mode": "ro", "uri": "true"} | ({"immutable": "1"} if immutable else {})
    return URL.create("sqlite", database=f"file:{quote(str(path))}", query=options)


def _unreadable(path: Path) -> LedgerError:
    which = ", which holds the ledger's last entries," if path.name.endswith("-wal") else ""
    return LedgerError(
        f"{path}{which} cannot be read by this user",
        fix="ask its owner for the right to read it, or for a bundle: fl-audit export",
        code="ledger-unreadable",
    )


def _opened(path: Path) -> sqlite3.Connection | None:
    """Return a connection that can read, to be held so that the log stays; None when SQLite cannot read it here."""
    connection = sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, timeout=10, check_same_thread=False)
    try:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.OperationalError:
        connection.close()
        return None
    except (sqlite3.DatabaseError, UnicodeDecodeError):
        pass  # damaged: whoever reads next says so
    return connection


def _copied(path: Path) -> tempfile.TemporaryDirectory[str]:
    """Copy file and log as of one moment.

    Between two looks at the log's header that say the same, the log was not begun again: all that went from it into
    the file meanwhile is in the log's copy too, which is made last. An unfinished end of the log has no valid checksum.
    """
    wal = _beside(path, "-wal")
    for _ in range(_ATTEMPTS):
        folder = tempfile.TemporaryDirectory(prefix="concordat-ledger-")
        target = Path(folder.name) / "ledger.sqlite"
        try:
            before, stamp = _header(wal), _stamp(path)
            shutil.copyfile(path, target)
            if before:
                shutil.copyfile(wal, _beside(target, "-wal"))
            same = before == _header(_beside(target, "-wal")) == _header(wal)
            if same and (before or stamp == _stamp(path)):
                return folder
        except FileNotFoundError:
            pass  # the log went away: look again
        except BaseException:
            folder.cleanup()
            raise
        folder.cleanup()
    raise LedgerError(
        f"the ledger {path} is written to faster than it can be copied",
        fix="try again while no round runs, or have the site make a bundle: fl-audit export",
        code="ledger-busy",
    )


def _header(wal: Path) -> bytes:
    try:
        with wal.open("rb") as source:
            return source.read(_WAL_HEADER)
    except FileNotFoundError:
        return b""


def _refuse_hidden_log(path: Path) -> None:
    """Raise LedgerError when a program has the file open and its log is not beside it: a hard link, a mounted file."""
    if sys.platform != "linux":
        return
    with path.open("rb") as source:
        if source.read(_FORMAT_AT + 1)[_FORMAT_AT:] != b"\2":
            return
        request = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, _LOCK_FIRST, _LOCK_BYTES, 0)
        try:
            kind = struct.unpack(_FLOCK, fcntl.fcntl(source.fileno(), fcntl.F_GETLK, request))[0]
        except OSError:  # a file system without locks
            return
    if kind != fcntl.F_UNLCK and not _beside(path, "-wal").exists():
        raise LedgerError(
            f"a program has the ledger {path} open, and the log with its last entries is not beside it",
            fix="give the ledger by its own name, in the directory where the agent keeps it",
            code="ledger-partial",
        )
