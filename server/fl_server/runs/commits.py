"""Committed rounds: the artifacts first, then round, replies, event and, after the last round, the run's end.

A round exists when its row says `committed`; what the row names was on disk before. Homes of earlier versions have
the files of their rounds at `adapters/<run>/<round>.safetensors` and `<round>.state.safetensors`; they are read there,
and nothing is written there any more.
"""

from __future__ import annotations

import time
from pathlib import Path

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from fl_server.artifacts.local import LocalArtifacts, read_verified
from fl_server.artifacts.store import ArtifactStore
from fl_server.db.models import GOING, ReplyRow, RoundRow, RunRow
from fl_server.db.store import Store
from fl_server.home.layout import ServerHome
from fl_server.runs.events import add_event
from fl_server.runs.views import CommittedRound, Reply
from fl_shared.adapters.safetensors import SERVER_STATE, metadata
from fl_shared.errors import ConfigError, RunError


class Commits:
    """The committed rounds of one coordinator, and what sites answered in all rounds.

    Args:
        adapters: where earlier versions kept the files of committed rounds.
    """

    def __init__(self, store: Store, artifacts: ArtifactStore, adapters: Path) -> None:
        self._store = store
        self._artifacts = artifacts
        self._adapters = adapters

    @classmethod
    def of(cls, home: ServerHome, store: Store) -> Commits:
        """The rounds of the coordinator at `home`."""
        return cls(store, LocalArtifacts(home.artifacts), home.adapters)

    def commit(self, result: CommittedRound) -> None:
        """Store a round. One that is committed already stays as it is.

        Raises:
            RunError: the round is committed already, or the attempt is no longer the one that carries the run.
        """
        now = time.time()
        with self._store.write() as session:
            row = session.get_one(RunRow, result.run, with_for_update=True)
            if row.attempt != result.attempt or row.state not in GOING:
                raise RunError(
                    f"round {result.round} of {result.run} came from an attempt that is no longer valid",
                    fix="nothing to do",
                    code="superseded",
                )
            earlier = session.get(RoundRow, (result.run, result.round))
            if earlier is not None and earlier.state == "committed":
                raise RunError(f"round {result.round} of {result.run} is committed already", fix="nothing to do")
            # Inside the transaction: what an attempt brings that has been replaced is not even written.
            state_digest = self._artifacts.put(result.state) if result.state else ""
            session.merge(
                RoundRow(
                    run=result.run,
                    round=result.round,
                    state="committed",
                    adapter_digest=self._artifacts.put(result.adapter),
                    adapter_bytes=len(result.adapter),
                    state_digest=state_digest,
                    bytes=result.received_bytes,
                    seconds=result.seconds,
                    committed_at=now,
                )
            )
            _put_replies(session, result.run, result.round, result.replies)
            ok = sum(1 for reply in result.replies if reply.status == "ok")
            text = f"round {result.round} committed with {ok} of {len(result.replies)} replies"
            add_event(session, result.run, "round-committed", text, round=result.round)
            row.updated_at, row.restarts = now, 0
            if result.round >= row.rounds:
                row.state, row.reason, row.reason_code = "completed", "", ""
                add_event(session, result.run, "completed", f"{result.round} rounds committed")

    def last_adapter(self, run: str) -> tuple[int, bytes]:
        """Number and adapter of the last committed round; (0, no bytes) before the first.

        Raises:
            RunError: the artifact is missing or is not the one that was committed.
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
        return self._bytes(row.adapter_digest, self._adapters / run / f"{round}.safetensors", "adapter")

    def server_state(self, run: str, round: int, adapter: bytes) -> bytes:
        """The server optimizer's state that was committed with this adapter; none without one.

        Raises:
            RunError: the artifact is missing or is not the one that was committed.
        """
        state_digest = metadata(adapter).get(SERVER_STATE)
        if state_digest is None:
            return b""
        return self._bytes(state_digest, self._adapters / run / f"{round}.state.safetensors", "state")

    def _bytes(self, digest: str, earlier: Path, kind: str) -> bytes:
        """An artifact, or the file that an earlier version committed."""
        if not self._artifacts.has(digest) and earlier.exists():
            return read_verified(earlier, digest, kind)
        return self._artifacts.get(digest, kind)

    def record_replies(self, run: str, round: int, replies: list[Reply]) -> None:
        """Keep what came in a round that was not committed, so that an admin sees it."""
        with self._store.write() as session:
            _put_replies(session, run, round, replies)

    def record_late(self, run: str, round: int, reply: Reply) -> bool:
        """Keep a reply to a round that has been closed without it; False when the round holds another one of it."""
        with self._store.write() as session:
            row = session.get(ReplyRow, (run, round, reply.site))
            if row is None or row.status != "missing":
                return False
            _put_replies(session, run, round, [reply])
            add_event(session, run, f"reply-{reply.status}", reply.message, round=round, site=reply.site)
            return True

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
