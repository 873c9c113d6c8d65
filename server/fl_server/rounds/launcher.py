"""The launcher of runs: starts a Flower run for each that is pending, starts another when its ServerApp has died.

A run's truth is in our SQL, so a dead ServerApp, SuperLink or coordinator costs the round that was under
way and nothing else: the next ServerApp begins after the last committed round, and the sites answer a
round that they have released already from their store. The launcher itself knows nothing that is not in SQL
or in files, so its own death costs nothing at all: an attempt's name begins with the SuperLink's start.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import secrets
import signal
import sys
import time
from pathlib import Path

from fl_server.artifacts.local import LocalArtifacts
from fl_server.db.models import RunRow
from fl_server.db.store import Store
from fl_server.flower.superlink import Flower
from fl_server.home.layout import ServerHome
from fl_server.identity.sites import Sites
from fl_server.rounds.liveness import ALIVE, DEAD, carrier_pid, forget, liveness
from fl_server.rounds.nodes import Nodes
from fl_server.rounds.pack import write_app
from fl_server.runs.events import Events
from fl_server.runs.service import GIVEN_UP, Runs
from fl_shared.errors import ConcordatError, RunError
from fl_shared.runtime.logs import set_up
from fl_shared.runtime.stopping import StopRequest

log = logging.getLogger("fl_server.rounds.launcher")

TICK_S = 1.0
SILENT_S = 20.0
GIVEN_UP_S = 90.0
FIRST_BEAT_S = 90.0
RETRY_S = 5.0


class Launcher:
    """Looks at the runs once a second. Only one launcher works on a home: the supervisor sees to that."""

    def __init__(self, home: ServerHome, runs: Runs, events: Events, flower: Flower) -> None:
        self._home = home
        self._runs = runs
        self._events = events
        self._flower = flower
        self._app = write_app(home.flower / "app")
        self._limit = home.settings().max_restarts
        self._not_before: dict[str, float] = {}
        self._asked_at: dict[str, float] = {}

    def tick(self) -> None:
        """Start what is pending, start again what has died; nothing while the SuperLink is not there."""
        if not self._flower.answers():
            return
        for row in self._runs.active():
            if time.monotonic() < self._not_before.get(row.run, 0.0):
                continue
            try:
                if row.state == "pending" or self._is_dead(row):
                    self._start(row)
            except ConcordatError as error:
                log.warning("run %s: %s", row.run, error.message)
                self._not_before[row.run] = time.monotonic() + RETRY_S

    def _is_dead(self, row: RunRow) -> bool:
        """Whether nobody carries the run: its ServerApp has died, the SuperLink was restarted, or the
        ServerApp is silent and Flower says that it ended (or it is silent for very long).
        """
        carrier = liveness(self._home.attempts, row.attempt)
        if carrier == DEAD or not row.attempt.startswith(self._flower.started()):
            return True
        if not row.flower_run and carrier != ALIVE:
            return True  # Flower did not take it, or an earlier launcher died before it could know
        silent = time.time() - row.beat_at
        if silent < SILENT_S or time.monotonic() < self._asked_at.get(row.run, 0.0) + SILENT_S / 2:
            return False
        self._asked_at[row.run] = time.monotonic()
        if silent > GIVEN_UP_S:
            return True
        status = self._flower.run_status(row.flower_run) if row.flower_run else "unknown"
        return status.startswith("finished") or status == "unknown"

    def _start(self, row: RunRow) -> None:
        if row.state == "running" and row.restarts >= self._limit:
            self._runs.fail(
                row.run,
                f"given up after {row.restarts} restarts without a committed round; see logs/superlink.log",
                GIVEN_UP,
            )
            return
        attempt = self._flower.started() + secrets.token_hex(8)
        earlier = row.flower_run
        restarts = self._runs.begin_attempt(row.run, attempt)
        self._end(row.attempt)
        if earlier:
            try:
                self._flower.stop_run(earlier)
            except ConcordatError as error:
                log.info("run %s: the earlier Flower run %s: %s", row.run, earlier, error.message)
        self._not_before[row.run] = time.monotonic() + min(2.0 ** min(restarts, 5), 30.0)
        try:
            flower_run = self._flower.start_run(
                self._app, {"run": row.run, "attempt": attempt, "home": str(self._home.root)}
            )
        except RunError as error:
            self._events.note(row.run, "not-started", error.message)
            raise
        self._runs.carried_by(row.run, attempt, flower_run)
        log.info("run %s is carried by Flower run %s", row.run, flower_run)

    def _end(self, attempt: str) -> None:
        """Kill the ServerApp of an attempt that is no longer valid; it would only ask sites in vain."""
        pid = carrier_pid(self._home.attempts, attempt)
        if pid:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        forget(self._home.attempts, attempt)


def main() -> int:
    """`python -m fl_server.rounds.launcher --home H`, as the supervisor starts it."""
    parser = argparse.ArgumentParser(prog="fl_server.rounds.launcher")
    parser.add_argument("--home", required=True, type=Path)
    home = ServerHome.open(parser.parse_args().home)
    set_up("launcher")
    over = StopRequest()
    signal.signal(signal.SIGTERM, lambda *_: over.set())
    store, flower = Store(home.database_url()), Flower(home)
    launcher = Launcher(home, Runs(store), Events(store), flower)
    nodes = Nodes(Sites(store), flower)
    LocalArtifacts(home.artifacts).remove_unfinished()
    while not over.wait(TICK_S):
        try:
            nodes.tick()
            launcher.tick()
        except ConcordatError as error:
            log.warning("%s", error.message)
        except Exception:  # whatever one turn meets, the next one must still carry the runs
            log.exception("a turn failed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
