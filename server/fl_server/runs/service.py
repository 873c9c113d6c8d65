"""Runs in SQL: launch, state changes, and which attempt carries them.

    pending ── running ── completed
       │         │ └───── failed
       ├─ paused ┤
       └─ stopped┘

`resume` brings paused, stopped and failed runs back to pending; the launcher takes it from there.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace

from sqlalchemy import select
from sqlalchemy.orm import Session

from fl_server.db.models import ENDED, GOING, ReplyRow, RoundRow, RunRow, SiteRow
from fl_server.db.store import Store
from fl_server.runs.bases import Fit
from fl_server.runs.events import add_event
from fl_server.runs.views import RunView
from fl_shared.documents.spec import RunSpec
from fl_shared.errors import RunError

BY_ADMIN = "by-admin"
GIVEN_UP = "given-up"
"""Typed reasons (`RunRow.reason_code`) beside the codes of errors: `quorum-missed`, `run`, `data`, and so on."""


def _held(session: Session, run: str) -> RunRow | None:
    """The run's row, locked until the transaction ends: of two changes at once the second sees the first."""
    return session.get(RunRow, run, with_for_update=True)


class Runs:
    """The runs of one coordinator."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def launch(self, spec: RunSpec, *, force: bool = False) -> RunView:
        """Store a new run as pending.

        A site that is invited, but not enrolled yet, may be named: it takes part from the first round that
        begins after its enrolment (docs/rounds.md). With `force` what sites have announced refuses nothing.

        Raises:
            RunError: the name is taken, a site of it is unknown or revoked, fewer than the quorum are enrolled, or
                the spec does not fit the base model that a site has announced.
        """
        name = spec.run.name
        now = time.time()
        with self._store.write() as session:
            if session.get(RunRow, name) is not None:
                raise RunError(f"there is a run {name!r} already", fix="choose another [run] name", code="name-taken")
            enrolled, rows = 0, []
            for site in spec.run.sites:
                row = session.get(SiteRow, site)
                state = "unknown" if row is None else row.state
                enrolled += state == "enrolled"
                if row is None or state not in ("enrolled", "invited"):
                    raise RunError(
                        f"[run] sites names {site!r}, which is {state}",
                        fix=f"invite it first (`fl-admin sites invite {site}`), or take it out of the spec",
                        code="site-not-enrolled",
                    )
                rows.append(row)
            if enrolled < spec.run.quorum:
                raise RunError(
                    f"{enrolled} of {len(spec.run.sites)} sites are enrolled, and the quorum is {spec.run.quorum}",
                    fix="wait until more have enrolled (`fl-admin sites list`), or lower the quorum",
                    code="site-not-enrolled",
                )
            fit = Fit.of(spec, rows)
            if not force:
                fit.require()
            session.add(
                RunRow(
                    run=name,
                    state="pending",
                    spec_json=json.dumps(spec.to_dict(), sort_keys=True),
                    spec_digest=spec.digest,
                    rounds=spec.run.rounds,
                    created_at=now,
                    updated_at=now,
                )
            )
            session.flush()
            add_event(session, name, "launched", f"{spec.run.rounds} rounds with {len(spec.run.sites)} sites")
        return replace(self.show(name), warnings=fit.warnings())

    def show(self, run: str) -> RunView:
        """One run with its history; RunError when there is none of that name."""
        with self._store.read() as session:
            row = session.get(RunRow, run)
            if row is None:
                raise RunError(f"there is no run {run!r}", fix="see `fl-admin runs list`", code="unknown-run")
            rounds = session.scalars(select(RoundRow).where(RoundRow.run == run).order_by(RoundRow.round))
            replies = session.scalars(
                select(ReplyRow).where(ReplyRow.run == run).order_by(ReplyRow.round, ReplyRow.site)
            )
            return RunView(row, list(rounds), list(replies))

    def all(self) -> list[RunView]:
        """Every run, the newest first, with rounds but without replies."""
        with self._store.read() as session:
            rows = list(session.scalars(select(RunRow).order_by(RunRow.created_at.desc())))
            rounds = list(session.scalars(select(RoundRow)))
        return [RunView(row, [round_row for round_row in rounds if round_row.run == row.run]) for row in rows]

    def active(self) -> list[RunRow]:
        """Runs that should be carried on: pending and running."""
        with self._store.read() as session:
            return list(session.scalars(select(RunRow).where(RunRow.state.in_(GOING)).order_by(RunRow.created_at)))

    def change(self, run: str, state: str, allowed: tuple[str, ...], reason: str, code: str) -> RunView:
        """Move a run to another state, with the reason in words and as a code.

        Raises:
            RunError: no such run, or it is not in one of the allowed states.
        """
        with self._store.write() as session:
            row = _held(session, run)
            if row is None:
                raise RunError(f"there is no run {run!r}", fix="see `fl-admin runs list`", code="unknown-run")
            if row.state not in allowed:
                raise RunError(
                    f"run {run} is {row.state}", fix=f"only a run that is {' or '.join(allowed)} can become {state}"
                )
            row.state, row.reason, row.reason_code, row.updated_at = state, reason, code, time.time()
            if state == "pending":
                row.restarts, row.flower_run, row.attempt = 0, "", ""
            add_event(session, run, state, reason)
        return self.show(run)

    def stop(self, run: str) -> RunView:
        """End a run for good unless it is resumed; committed rounds stay."""
        return self.change(run, "stopped", (*GOING, "paused"), "stopped by an admin", BY_ADMIN)

    def pause(self, run: str) -> RunView:
        """Hold a run after the round that is committed last."""
        return self.change(run, "paused", GOING, "paused by an admin", BY_ADMIN)

    def resume(self, run: str) -> RunView:
        """Carry a paused, stopped or failed run on from its last committed round."""
        return self.change(run, "pending", ("paused", "stopped", "failed"), "resumed by an admin", BY_ADMIN)

    def begin_attempt(self, run: str, attempt: str) -> int:
        """Give the run to a new ServerApp, before it is started; the number of restarts since the last commit.

        Whatever an earlier ServerApp of the run still does is refused. An attempt that Flower never
        took (`carried_by` was not called) is no restart: it says nothing against the run.
        """
        with self._store.write() as session:
            row = _held(session, run)
            if row is None or row.state not in GOING:
                raise RunError(f"run {run} is {row.state if row else 'gone'}", fix="nothing to do")
            again = bool(row.flower_run)
            row.state, row.attempt, row.updated_at = "running", attempt, time.time()
            row.beat_at, row.flower_run = time.time(), ""
            row.restarts += int(again)
            add_event(session, run, "restarted" if again else "started")
            return row.restarts

    def carried_by(self, run: str, attempt: str, flower_run: str) -> None:
        """Note the Flower run of an attempt."""
        with self._store.write() as session:
            row = session.get_one(RunRow, run)
            if row.attempt == attempt:
                row.flower_run = flower_run

    def beat(self, run: str, attempt: str) -> bool:
        """A sign of life of the ServerApp; False when the run is no longer its to carry."""
        with self._store.write() as session:
            row = session.get_one(RunRow, run)
            if row.attempt != attempt or row.state not in GOING:
                return False
            row.beat_at = time.time()
            return True

    def wanted(self, run: str, attempt: str) -> bool:
        """Whether the run goes on and this attempt carries it."""
        with self._store.read() as session:
            row = session.get(RunRow, run)
        return row is not None and row.attempt == attempt and row.state in GOING

    def fail(self, run: str, reason: str, code: str) -> None:
        """End a run as failed, with its reason in words and as a code; nothing happens to one that has ended."""
        with self._store.write() as session:
            row = _held(session, run)
            if row is None or row.state in ENDED:
                return
            row.state, row.reason, row.reason_code, row.updated_at = "failed", reason, code[:64], time.time()
            add_event(session, run, "failed", reason, code=code)
