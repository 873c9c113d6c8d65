"""Addresses made of paths: any path that a directory may have, with spaces, accents, percent and question marks."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote

from fl_shared.errors import ConfigError

MAX_SOCKET_BYTES = 107
"""`sun_path` holds 108 bytes, the last of them zero."""


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
