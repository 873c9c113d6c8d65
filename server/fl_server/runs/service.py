"""Runs in SQL: launch, state changes, rounds committed in one transaction, events to watch.

    pending ── running ── completed
       │         │ └───── failed
       ├─ paused ┤
       └─ stopped┘

`resume` brings paused, stopped and failed runs back to pending; the launcher takes it from there.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from fl_server.db.models import ENDED, EventRow, ManifestRow, ReplyRow, RoundRow, RunRow, SiteRow
from fl_server.db.store import Store
from fl_server.home.files import write_durably
from fl_server.runs.bases import Fit
from fl_shared.adapters.safetensors import SERVER_STATE, digest, metadata
from fl_shared.documents.round import RoundManifest
from fl_shared.documents.spec import RunSpec
from fl_shared.errors import ConfigError, RunError
from fl_shared.identity.signing import SigningKey, sign_document

log = logging.getLogger("fl_server.runs")

GOING = ("pending", "running")


@dataclass(frozen=True)
class Reply:
    """What one site answered in one round, as it is stored."""

    site: str
    status: str
    code: str = ""
    message: str = ""
    epsilon_spent_total: float = 0.0
    delta: float = 0.0
    document_json: str = ""


@dataclass(frozen=True)
class CommittedRound:
    """The outcome of one aggregation, ready to be stored.

    `attempt`: who computed it. `state`: the server optimizer's, whose digest the adapter's metadata name.
    """

    run: str
    attempt: str
    round: int
    adapter: bytes
    replies: list[Reply]
    received_bytes: int
    seconds: float
    state: bytes = b""


@dataclass(frozen=True)
class RunView:
    """A run with its rounds and replies, read in one transaction. `warnings`: of its launch, told once."""

    row: RunRow
    rounds: list[RoundRow] = field(default_factory=list)
    replies: list[ReplyRow] = field(default_factory=list)
    warnings: tuple[str, ...] = ()

    @property
    def spec(self) -> RunSpec:
        return RunSpec.from_dict(json.loads(self.row.spec_json))

    @property
    def committed(self) -> int:
        return sum(1 for each in self.rounds if each.state == "committed")


def _held(session: Session, run: str) -> RunRow | None:
    """The run's row, locked until the transaction ends: of two changes at once the second sees the first."""
    return session.get(RunRow, run, with_for_update=True)


def _event(session: Session, run: str, kind: str, message: str = "", **more: Any) -> None:
    session.add(EventRow(run=run, at=time.time(), kind=kind, message=message, **more))
    log.info(message or kind, extra={"run": run, "kind": kind} | {k: more[k] for k in ("round", "site") if more.get(k)})


class Runs:
    """The runs of one coordinator. `adapters` is the folder of the adapter files."""

    def __init__(self, store: Store, adapters: Path) -> None:
        self._store = store
        self._adapters = adapters

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
            _event(session, name, "launched", f"{spec.run.rounds} rounds with {len(spec.run.sites)} sites")
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
        return [RunView(row, [each for each in rounds if each.run == row.run]) for row in rows]

    def active(self) -> list[RunRow]:
        """Runs that should be carried on: pending and running."""
        with self._store.read() as session:
            return list(
                session.scalars(
                    select(RunRow).where(RunRow.state.in_(("pending", "running"))).order_by(RunRow.created_at)
                )
            )

    def change(self, run: str, wanted: str, allowed: tuple[str, ...], reason: str = "") -> RunView:
        """Move a run to another state; RunError when it is not in one of the allowed states."""
        with self._store.write() as session:
            row = _held(session, run)
            if row is None:
                raise RunError(f"there is no run {run!r}", fix="see `fl-admin runs list`", code="unknown-run")
            if row.state not in allowed:
                raise RunError(
                    f"run {run} is {row.state}", fix=f"only a run that is {' or '.join(allowed)} can become {wanted}"
                )
            row.state, row.reason, row.updated_at = wanted, reason, time.time()
            if wanted == "pending":
                row.restarts, row.flower_run, row.attempt = 0, "", ""
            _event(session, run, wanted, reason)
        return self.show(run)

    def stop(self, run: str) -> RunView:
        """End a run for good unless it is resumed; committed rounds stay."""
        return self.change(run, "stopped", ("pending", "running", "paused"), "stopped by an admin")

    def pause(self, run: str) -> RunView:
        """Hold a run after the round that is committed last."""
        return self.change(run, "paused", ("pending", "running"), "paused by an admin")

    def resume(self, run: str) -> RunView:
        """Carry a paused, stopped or failed run on from its last committed round."""
        return self.change(run, "pending", ("paused", "stopped", "failed"), "resumed by an admin")

    def begin_attempt(self, run: str, attempt: str) -> int:
        """Give the run to a new ServerApp, before it is started; the number of restarts since the last commit.

        Whatever an earlier ServerApp of the run still does no longer counts. An attempt that Flower never
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
            _event(session, run, "restarted" if again else "started")
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

    def fail(self, run: str, reason: str) -> None:
        """End a run as failed, with its reason; nothing happens to one that has ended."""
        with self._store.write() as session:
            row = _held(session, run)
            if row is None or row.state in ENDED:
                return
            row.state, row.reason, row.updated_at = "failed", reason, time.time()
            _event(session, run, "failed", reason)

    def note(self, run: str, kind: str, message: str, *, round: int = 0, site: str = "") -> None:
        """Write an event."""
        with self._store.write() as session:
            _event(session, run, kind, message, round=round, site=site)

    def events(self, run: str, after: int, limit: int = 500) -> list[EventRow]:
        """Events of a run with a larger number than `after`, in order."""
        with self._store.read() as session:
            return list(
                session.scalars(
                    select(EventRow)
                    .where(EventRow.run == run, EventRow.number > after)
                    .order_by(EventRow.number)
                    .limit(limit)
                )
            )

    def issue_manifest(
        self, spec: RunSpec, round: int, site: str, adapter_digest: str, key: SigningKey, nonce: str, ttl_s: float
    ) -> tuple[str, str]:
        """Sign and store one site's order for one round; (signed JSON text, digest)."""
        now = time.time()
        manifest = RoundManifest(
            run=spec.run.name,
            round=round,
            site=site,
            spec=spec,
            adapter_digest=adapter_digest,
            nonce=nonce,
            issued_at=now,
            expires_at=now + ttl_s,
        )
        document = json.dumps(sign_document(key, manifest.to_dict()), sort_keys=True)
        with self._store.write() as session:
            session.add(
                ManifestRow(
                    digest=manifest.digest,
                    run=spec.run.name,
                    round=round,
                    site=site,
                    adapter_digest=adapter_digest,
                    document_json=document,
                    issued_at=now,
                    expires_at=manifest.expires_at,
                )
            )
        return document, manifest.digest

    def issued(self, manifest_digest: str, run: str, round: int, site: str, adapter_digest: str) -> bool:
        """Whether this manifest was signed for exactly this run, round, site and adapter."""
        with self._store.read() as session:
            row = session.get(ManifestRow, manifest_digest)
        return row is not None and (row.run, row.round, row.site, row.adapter_digest) == (
            run, round, site, adapter_digest,
        )  # fmt: skip

    def record_replies(self, run: str, round: int, replies: list[Reply]) -> None:
        """Keep what came in a round that was not committed, so that an admin sees it."""
        with self._store.write() as session:
            self._put_replies(session, run, round, replies)

    def record_late(self, run: str, round: int, reply: Reply) -> bool:
        """Keep a reply to a round that has been closed without it; False when the round holds another one of it."""
        with self._store.write() as session:
            found = session.get(ReplyRow, (run, round, reply.site))
            if found is None or found.status != "missing":
                return False
            self._put_replies(session, run, round, [reply])
            _event(session, run, f"reply-{reply.status}", reply.message, round=round, site=reply.site)
            return True

    @staticmethod
    def _put_replies(session: Session, run: str, round: int, replies: list[Reply]) -> None:
        now = time.time()
        for reply in replies:
            session.merge(
                ReplyRow(
                    run=run,
                    round=round,
                    site=reply.site,
                    status=reply.status,
                    code=reply.code[:64],
                    message=reply.message[:2000],
                    epsilon_spent_total=reply.epsilon_spent_total,
                    delta=reply.delta,
                    document_json=reply.document_json,
                    received_at=now,
                )
            )

    def adapter_path(self, run: str, round: int) -> Path:
        """Where a committed round's adapter lies."""
        return self.adapter_folder(run) / f"{round}.safetensors"

    def adapter_folder(self, run: str) -> Path:
        """Where a run's adapters lie."""
        return self._adapters / run

    def server_state(self, run: str, round: int, adapter: bytes) -> bytes:
        """The server optimizer's state that was committed with this adapter; none without one.

        Raises:
            RunError: the file is missing or is not the one that was committed.
        """
        wanted = metadata(adapter).get(SERVER_STATE)
        if wanted is None:
            return b""
        path = self._state_path(run, round)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise RunError(f"{path}: {error.strerror}", fix="restore adapters/ from the backup") from error
        if digest(data) != wanted:
            raise RunError(f"{path} is not the state that was committed", fix="restore it from the backup")
        return data

    def _state_path(self, run: str, round: int) -> Path:
        return self.adapter_folder(run) / f"{round}.state.safetensors"

    def commit(self, done: CommittedRound) -> None:
        """Store a round: the file first (fsynced), then round, receipts, event and, after the last
        round, the run's end in one transaction. A round that is committed already stays as it is.
        """
        now = time.time()
        with self._store.write() as session:
            row = session.get_one(RunRow, done.run, with_for_update=True)
            if row.attempt != done.attempt or row.state not in GOING:
                raise RunError(
                    f"round {done.round} of {done.run} came from an attempt that no longer counts",
                    fix="nothing to do",
                    code="superseded",
                )
            found = session.get(RoundRow, (done.run, done.round))
            if found is not None and found.state == "committed":
                raise RunError(f"round {done.round} of {done.run} is committed already", fix="nothing to do")
            # Inside the transaction, so that a second ServerApp cannot replace a committed file.
            if done.state:
                write_durably(self._state_path(done.run, done.round), done.state)
            write_durably(self.adapter_path(done.run, done.round), done.adapter)
            session.merge(
                RoundRow(
                    run=done.run,
                    round=done.round,
                    state="committed",
                    adapter_digest=digest(done.adapter),
                    adapter_bytes=len(done.adapter),
                    bytes=done.received_bytes,
                    seconds=done.seconds,
                    committed_at=now,
                )
            )
            self._put_replies(session, done.run, done.round, done.replies)
            ok = sum(1 for reply in done.replies if reply.status == "ok")
            text = f"round {done.round} committed with {ok} of {len(done.replies)} replies"
            _event(session, done.run, "round-committed", text, round=done.round)
            row.updated_at, row.restarts = now, 0
            if done.round >= row.rounds:
                row.state, row.reason = "completed", ""
                _event(session, done.run, "completed", f"{done.round} rounds committed")

    def last_adapter(self, run: str) -> tuple[int, bytes]:
        """Number and adapter of the last committed round; (0, no bytes) before the first.

        Raises:
            RunError: the file is missing or is not the one that was committed.
        """
        with self._store.read() as session:
            number = session.scalar(
                select(func.max(RoundRow.round)).where(RoundRow.run == run, RoundRow.state == "committed")
            )
        return (0, b"") if not number else (number, self.adapter(run, number))

    def adapter(self, run: str, round: int) -> bytes:
        """The adapter of a committed round, its digest checked."""
        with self._store.read() as session:
            row = session.get(RoundRow, (run, round))
        if row is None or row.state != "committed":
            raise ConfigError(f"run {run} has no committed round {round}", fix=f"see `fl-admin adapters list {run}`")
        path = self.adapter_path(run, round)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise RunError(f"{path}: {error.strerror}", fix="restore adapters/ from the backup") from error
        if digest(data) != row.adapter_digest:
            raise RunError(f"{path} is not the adapter that was committed", fix="restore it from the backup")
        return data

    def newest_receipt(self, site: str) -> ReplyRow | None:
        """The newest signed receipt of a site; None before its first."""
        query = select(ReplyRow).where(ReplyRow.status.in_(("ok", "late")), ReplyRow.site == site)
        with self._store.read() as session:
            return session.scalars(query.order_by(ReplyRow.received_at.desc()).limit(1)).first()

    def receipts(self, site: str, run: str) -> list[ReplyRow]:
        """Signed receipts, oldest first, late ones among them; empty `site` or `run` means every one."""
        query = select(ReplyRow).where(ReplyRow.status.in_(("ok", "late"))).order_by(ReplyRow.received_at)
        if site:
            query = query.where(ReplyRow.site == site)
        if run:
            query = query.where(ReplyRow.run == run)
        with self._store.read() as session:
            return list(session.scalars(query))
