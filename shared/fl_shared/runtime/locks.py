"""Lock files: at most one process holds one, and the kernel releases it when that process ends, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

_MAX_NOTE_BYTES = 200


class LockHeld(BlockingIOError):
    """Another process holds the lock; `note` is what it wrote into the file, "" for nothing."""

    def __init__(self, path: Path, note: str) -> None:
        super().__init__(f"{path} is locked by another process")
        self.note = note


def acquire(path: Path, *, note: str = "", wait: bool = False) -> int:
    """Lock `path`, made with mode 0600 if need be, and leave `note` in it; the descriptor whose closing unlocks it.

    A child that this process starts does not inherit the lock.

    Raises:
        LockHeld: another process holds it, unless told to `wait` for its end.
        OSError: the file cannot be opened, or is a link.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise LockHeld(path, _note(descriptor)) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, note.encode("utf-8"), 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextlib.contextmanager
def locked(path: Path, *, note: str = "", wait: bool = False) -> Iterator[None]:
    """Hold the lock of `path` while the block runs. Raises as `acquire`."""
    descriptor = acquire(path, note=note, wait=wait)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing alone leaves it to a child that is just being started
        os.close(descriptor)


def look(path: Path) -> tuple[str, bool]:
    """The note of the last process that locked `path`, and whether one holds it now.

    The note is read first: a process that has locked the file and not yet written is seen without one.

    Raises:
        OSError: the file is not there, or cannot be opened.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        note = _note(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return note, True
        return note, False
    finally:
        os.close(descriptor)


def _note(descriptor: int) -> str:
    return os.pread(descriptor, _MAX_NOTE_BYTES, 0).decode("utf-8", "replace")
