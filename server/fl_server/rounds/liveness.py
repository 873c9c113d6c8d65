"""Liveness of the process that runs an attempt: it holds a file lock that the kernel drops when it dies.

A heartbeat says the same only after many missed beats; the lock says it within a second of a kill -9.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from fl_shared.runtime.locks import locked, look

UNKNOWN, ALIVE, DEAD = "unknown", "alive", "dead"


def _path(folder: Path, attempt: str) -> Path:
    return folder / f"{attempt}.lock"


@contextlib.contextmanager
def carrying(folder: Path, attempt: str) -> Iterator[None]:
    """Hold the lock of an attempt while the block runs; afterwards the attempt has ended."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with locked(_path(folder, attempt), note=str(os.getpid()), wait=True):
        yield


def liveness(folder: Path, attempt: str) -> str:
    """`alive` or `dead`; `unknown` while the attempt's process has not come so far as to take its lock."""
    try:
        pid, locked = look(_path(folder, attempt))
    except OSError:
        return UNKNOWN
    if not pid:
        return UNKNOWN  # made, but not locked yet
    return ALIVE if locked else DEAD


def carrier_pid(folder: Path, attempt: str) -> int:
    """The process that carries an attempt; 0 when there is none."""
    if not attempt or liveness(folder, attempt) != ALIVE:
        return 0
    return int(_path(folder, attempt).read_text("ascii"))


def forget(folder: Path, attempt: str) -> None:
    """Remove what an attempt left behind."""
    if attempt:
        _path(folder, attempt).unlink(missing_ok=True)
