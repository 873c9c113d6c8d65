"""Threads whose work is started again after a pause when it raises, and that report meanwhile what is wrong."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from fl_shared.errors import ConcordatError, ConfigError

log = logging.getLogger("fl_shared.runtime.threads")

FIRST_PAUSE_S, MOST_PAUSE_S, CALM_S = 1.0, 30.0, 60.0


def reason(error: BaseException) -> str:
    """What a person may be told about an error. The words of unknown exceptions may quote data and stay out."""
    if isinstance(error, ConcordatError):
        return error.message
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return type(error).__name__


def running_pool(count: int, name: str) -> ThreadPoolExecutor:
    """A pool whose threads all run already; ConfigError when this machine does not give so many.

    For gRPC, whose serving thread ends for good when a pool that grows by need cannot get its next thread.
    """
    pool = ThreadPoolExecutor(max_workers=count, thread_name_prefix=name)
    met = threading.Barrier(count + 1)
    try:
        for _ in range(count):
            pool.submit(met.wait)
        met.wait()
    except RuntimeError as error:
        met.abort()
        raise _no_thread(name, error) from None
    return pool


def _no_thread(name: str, error: RuntimeError) -> ConfigError:
    return ConfigError(
        f"no thread can be started for {name}: {error}",
        fix="end other programs of this user, or raise its limit (ulimit -u; TasksMax in a systemd unit)",
    )


class Loop:
    """A thread that does one turn after another until `stop`.

    A turn returns the seconds until the next one, or None when all is done. When it raises, whatever it raises, it is
    logged and begun again after 1 s, then 2 s, up to `most_pause_s`; after a minute of life the pause starts over.
    """

    def __init__(self, name: str, turn: Callable[[], float | None], *, most_pause_s: float = MOST_PAUSE_S) -> None:
        """Take the work; nothing runs before `start`."""
        self.name = name
        self.stopping = threading.Event()
        self._turn = turn
        self._most = most_pause_s
        self._problem = ""
        self._done = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin the first turn. ConfigError when this machine gives no thread."""
        try:
            self._thread.start()
        except RuntimeError as error:
            raise _no_thread(self.name, error) from None

    def stop(self, timeout_s: float = 1.0) -> None:
        """Ask it to end and wait so long; a turn in progress is not broken off."""
        self.stopping.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def problem(self) -> str:
        """Why the work does not go on just now, "" when it does."""
        if self.stopping.is_set() or self._done or self._thread.ident is None:
            return ""
        if not self._thread.is_alive():
            return "its thread has ended"
        return self._problem

    def _run(self) -> None:
        pause = 0.0
        while not self.stopping.is_set():
            began = time.monotonic()
            try:
                wait = self._turn()
                if wait is None:
                    self._done = True
                    return
                self._problem, pause = "", 0.0
            except BaseException as error:  # no kind of error may end it, SystemExit of a library neither
                if self.stopping.is_set():
                    return
                calm = time.monotonic() - began > CALM_S
                pause = FIRST_PAUSE_S if calm or not pause else min(pause * 2, self._most)
                self._problem, wait = reason(error), pause
                expected = isinstance(error, ConcordatError | OSError)
                log.warning(
                    "%s: %s; again in %.0f s", self.name, self._problem, pause, exc_info=None if expected else error
                )
            self.stopping.wait(wait)
