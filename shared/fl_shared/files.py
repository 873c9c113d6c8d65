"""Files: written so that a crash leaves the old content or the new, and the addresses that are made of their paths.

A path may be any that a directory can have, with spaces, accents, percent and question marks.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from urllib.parse import quote

from fl_shared.errors import ConfigError

MAX_SOCKET_BYTES = 107
"""`sun_path` holds 108 bytes, the last of them zero."""


def write_durably(path: Path, content: bytes, *, mode: int = 0o600, exact: bool = False) -> None:
    """Replace `path` by a file of `content`, atomically and safely on disk; missing folders are made (0700).

    The new file has its mode before any byte is in it, and lies beside the target until it is whole. No link at
    `path` is followed.

    Args:
        mode: the rights of the file; the process's umask takes from them.
        exact: give it just these rights, whatever the umask: for a file that another user must read.

    Raises:
        OSError: the disk refuses; then the old content is still there, and nothing beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb") as sink:
            if exact:
                os.fchmod(sink.fileno(), mode)
            sink.write(content)
            sink.flush()
            os.fsync(sink.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Flush a directory's entries to disk, so that what was renamed, linked or removed there survives a power cut."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def socket_address(path: str | Path) -> str:
    """A Unix socket's path as gRPC and other readers of URIs take it after `unix:`; no space or quote is left in it."""
    return quote(os.fsencode(path))


def sqlite_url(path: str | Path) -> str:
    """The SQLAlchemy address of an SQLite file; `?` and `%` are no part of a path there."""
    return "sqlite:///" + str(path).replace("%", "%25").replace("?", "%3F")


def check_socket(path: Path, *, fix: str) -> None:
    """ConfigError unless a socket can have this path."""
    size = len(os.fsencode(path))
    if size > MAX_SOCKET_BYTES:
        raise ConfigError(
            f"the socket path {path} has {size} bytes, and the system takes at most {MAX_SOCKET_BYTES}", fix=fix
        )


def check_grpc_socket(path: Path, *, fix: str) -> None:
    """ConfigError unless a socket can have this path, and gRPC can call it there."""
    check_socket(path, fix=fix)
    if "," in str(path):
        raise ConfigError(f"the socket path {path} has a comma, and gRPC would take it for two addresses", fix=fix)
