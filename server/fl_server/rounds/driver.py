"""Drives a run from its last committed round to its end. Runs in the ServerApp."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from flwr.serverapp import Grid

from fl_server.db.store import DatabaseAway, Store
from fl_server.home.layout import ServerHome
from fl_server.identity.sites import Sites
from fl_server.rounds.liveness import carrying
from fl_server.rounds.round import Interrupted, Round, RunContext
from fl_server.rounds.stragglers import Stragglers
from fl_server.runs.commits import Commits
from fl_server.runs.events import Events
from fl_server.runs.orders import Orders
from fl_server.runs.service import Runs
from fl_shared.errors import ConcordatError
from fl_shared.identity.signing import SigningKey
from fl_shared.runtime.threads import Loop

log = logging.getLogger("fl_server.rounds.driver")

BEAT_S = 3.0
RETRY_S = 2.0


def drive(home: ServerHome, run: str, attempt: str, grid: Grid) -> None:
    """Carry a run from its last committed round to its end, a stop, a pause or a failure.

    `attempt` is what the launcher wrote into the run's row: when that names another one, this ServerApp
    has been given up and does nothing more.
    """
    store = Store(home.database_url())
    runs, commits, events = Runs(store), Commits.of(home, store), Events(store)
    context = RunContext(
        attempt, commits, events, Orders(store), Sites(store), grid, Stragglers(commits, run, grid), home.scratch
    )

    def one_round() -> bool:
        """Whether there may be another round."""
        if not runs.wanted(run, attempt):
            return False
        number, adapter = commits.last_adapter(run)
        spec = runs.show(run).spec
        number += 1
        events.note(run, "round-started", f"round {number} of {spec.run.rounds}", round=number)
        key = SigningKey.load(home.signing_key)  # read for every round: it may have been rotated
        current = Round(context, spec, key=key, number=number, base=adapter)
        commits.commit(current.collect(lambda: runs.wanted(run, attempt)))
        return number < spec.run.rounds

    with carrying(home.attempts, attempt):
        beating = Loop(
            f"sign of life of run {run}", lambda: BEAT_S if runs.beat(run, attempt) else None, most_pause_s=BEAT_S
        )
        beating.start()
        try:
            going = True
            while going:
                going = _outcome(runs, events, run, attempt, one_round)
        finally:
            beating.stop()
            store.close()


def _outcome(runs: Runs, events: Events, run: str, attempt: str, one_round: Callable[[], bool]) -> bool:
    """Do one round, and write down what ended it; whether to go on.

    While the database is away nothing is known for certain, not even whether the commit went through. So
    the round is begun again from what the database says when it is back: nobody trains twice for that.
    """
    try:
        try:
            return one_round()
        except DatabaseAway:
            raise
        except Interrupted as error:
            events.note(run, "interrupted", error.message)
        except ConcordatError as error:
            # A missed quorum, a damaged adapter file: nothing that another ServerApp would do better.
            if runs.wanted(run, attempt):
                runs.fail(run, error.message, error.code)
        return False
    except DatabaseAway as error:
        log.warning("run %s: %s", run, error.message)
        time.sleep(RETRY_S)
        return True
