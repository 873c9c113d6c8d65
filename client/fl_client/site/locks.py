"""One process at a time works for a site: the agent, or a command that uses its ledger or its keys."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from fl_shared.errors import ConfigError
from fl_shared.runtime.locks import LockHeld, locked


@contextlib.contextmanager
def exclusive(path: Path, purpose: str) -> Iterator[None]:
    """Hold the lock file `path` while the block runs; ConfigError when another process holds it.

    The kernel releases the lock when the process ends, however it ends.
    """
    with contextlib.ExitStack() as locks:
        try:
            locks.enter_context(locked(path, note=f"{purpose} (process {os.getpid()})"))
        except LockHeld as error:
            raise ConfigError(
                f"{error.note or 'another process'} works for this site already",
                fix="stop it first, or wait until it has ended",
            ) from None
        yield
