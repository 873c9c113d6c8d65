"""One process at a time works for a site: the agent, or `train-alone`."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from fl_shared.errors import ConfigError


@contextlib.contextmanager
def sole(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path` while the block runs; ConfigError when another process holds it.

    The kernel releases the lock when the process ends, however it ends.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode("utf-8", "replace") or "another process"
            raise ConfigError(
                f"{holder} works for this site already", fix="stop it first, or wait until it has ended"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{what} (process {os.getpid()})".encode(), 0)
        yield
    finally:
        os.close(descriptor)
