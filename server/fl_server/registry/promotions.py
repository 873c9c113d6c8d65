"""Adapters promoted to a name, such as `production`: a promotion is a row, the adapter stays where it is.

The newest promotion of a name is in force; the earlier ones stay, so that one can see what was in use when.
"""

from __future__ import annotations

import time

from sqlalchemy import select

from fl_server.db.models import PromotionRow
from fl_server.db.store import Store
from fl_server.runs.commits import Commits
from fl_server.runs.service import Runs
from fl_shared.errors import ConfigError
from fl_shared.names import promotion_name


class Promotions:
    """The promoted adapters of one coordinator."""

    def __init__(self, store: Store, runs: Runs, commits: Commits) -> None:
        self._store = store
        self._runs = runs
        self._commits = commits

    def promote(self, run: str, round: int, name: str, by: str) -> PromotionRow:
        """Promote a committed adapter to a name; repeating the current promotion changes nothing.

        Raises:
            ConfigError: a name of another form, or a round that is not committed.
            RunError: no such run, or its adapter is missing or is not the one that was committed.
        """
        promotion_name(name)
        rounds = {row.round: row for row in self._runs.show(run).rounds if row.state == "committed"}
        number = round or max(rounds, default=0)
        if number not in rounds:
            raise ConfigError(
                f"run {run} has no committed round {number or 'yet'}", fix=f"see `fl-admin adapters list {run}`"
            )
        self._commits.adapter(run, number)  # its bytes are there and are the committed ones
        with self._store.write() as session:
            newest = select(PromotionRow).where(PromotionRow.name == name).order_by(PromotionRow.number.desc())
            current = session.scalars(newest.limit(1)).first()
            if current is not None and (current.run, current.round) == (run, number):
                return current
            row = PromotionRow(
                name=name,
                run=run,
                round=number,
                adapter_digest=rounds[number].adapter_digest,
                promoted_by=by,
                promoted_at=time.time(),
            )
            session.add(row)
            session.flush()
            return row

    def all(self, name: str = "") -> list[PromotionRow]:
        """Every promotion (of one name), the newest first."""
        query = select(PromotionRow).order_by(PromotionRow.number.desc())
        if name:
            query = query.where(PromotionRow.name == name)
        with self._store.read() as session:
            return list(session.scalars(query))

    def current(self) -> dict[str, PromotionRow]:
        """The promotion in force of each name."""
        newest: dict[str, PromotionRow] = {}
        for row in self.all():
            newest.setdefault(row.name, row)
        return newest

    def find(self, name: str) -> PromotionRow:
        """The promotion in force of a name; ConfigError when nothing was promoted to it."""
        promotions = self.all(name)
        if not promotions:
            raise ConfigError(f"nothing was released as {name!r}", fix="see `fl-admin adapters list`")
        return promotions[0]
