"""What happened in a run, one row for each event: admins watch them, and none is ever changed."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from fl_server.db.models import EventRow
from fl_server.db.store import Store

log = logging.getLogger("fl_server.runs")


def add_event(session: Session, run: str, kind: str, message: str = "", *, code: str = "", **more: Any) -> None:
    """Add an event to a transaction, and a line to the log. `code`: the typed reason behind the message."""
    data = {"data_json": json.dumps({"code": code})} if code else {}
    session.add(EventRow(run=run, at=time.time(), kind=kind, message=message, **data, **more))
    log.info(message or kind, extra={"run": run, "kind": kind} | {k: more[k] for k in ("round", "site") if more.get(k)})


class Events:
    """The events of one coordinator's runs."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def note(self, run: str, kind: str, message: str, *, round: int = 0, site: str = "") -> None:
        """Write an event."""
        with self._store.write() as session:
            add_event(session, run, kind, message, round=round, site=site)

    def after(self, run: str, number: int, limit: int = 500) -> list[EventRow]:
        """Events of a run with a larger number than `number`, in order."""
        query = select(EventRow).where(EventRow.run == run, EventRow.number > number)
        with self._store.read() as session:
            return list(session.scalars(query.order_by(EventRow.number).limit(limit)))
