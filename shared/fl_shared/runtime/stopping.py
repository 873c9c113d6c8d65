"""A request to stop that a signal handler may set.

`threading.Event` is none: a handler runs between two instructions of the main thread, and `set` wants the lock that
`wait` may be holding there, so that the process hangs for good.
"""

from __future__ import annotations

import math
import time

_NAP_S = 0.2  # a signal just before a sleep does not cut it short


class StopRequest:
    """Set once, by a signal handler or by any thread; never taken back."""

    def __init__(self) -> None:
        """Nobody has asked yet."""
        self._asked = False

    def set(self) -> None:
        """Ask to stop."""
        self._asked = True

    def is_set(self) -> bool:
        """Whether somebody asked."""
        return self._asked

    def wait(self, timeout_s: float = math.inf) -> bool:
        """Wait until somebody asks, at most `timeout_s`; whether somebody did."""
        end = time.monotonic() + timeout_s
        while not self._asked and (left := end - time.monotonic()) > 0:
            time.sleep(min(_NAP_S, left))
        return self._asked
