"""Which step of which round the site is at: in its own log and in a file of its own, and nowhere else.

How long steps take depends on the data, so the untrusted half must not see it: the agent's socket does not tell, and
the file lies in the trusted home.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from pathlib import Path
from typing import Any

log = logging.getLogger("fl_client.agent")

LOG_EVERY_S = 15.0
WRITE_EVERY_S = 1.0


class Progress:
    """The step that a round is at, written to `path` (None: only to the log) at most once a second."""

    def __init__(self, path: Path | None = None) -> None:
        """Remember where to write."""
        self._path = path
        self._round: dict[str, Any] = {}
        self._written = self._logged = 0.0

    def begin(self, run: str, round_: int) -> None:
        """A round begins to train."""
        self._round = {"run": run, "round": round_, "started_at": time.time()}
        self._written, self._logged = 0.0, time.monotonic()

    def step(self, step: int, steps: int) -> None:
        """One step is done."""
        now = time.monotonic()
        if now - self._logged >= LOG_EVERY_S:
            self._logged = now
            log.info("step %d of %d", step, steps, extra={k: self._round[k] for k in ("run", "round")})
        if self._path is None or now - self._written < WRITE_EVERY_S:
            return
        self._written = now
        with contextlib.suppress(OSError):  # a full disk must not end a round over a line of status
            new = self._path.with_suffix(".new")
            new.touch(mode=0o600)
            new.write_text(json.dumps({**self._round, "step": step, "steps": steps}) + "\n", encoding="utf-8")
            new.replace(self._path)

    def end(self) -> None:
        """The round has ended, or broken off."""
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)


def read_progress(path: Path) -> dict[str, Any] | None:
    """What the running round last wrote; None when there is none."""
    try:
        progress = json.loads(path.read_text("utf-8"))
        return {name: progress[name] for name in ("run", "round", "step", "steps", "started_at")}
    except (OSError, ValueError, KeyError, TypeError):
        return None
