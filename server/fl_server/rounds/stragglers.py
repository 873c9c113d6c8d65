"""Replies to a round that was closed without them: kept with their receipts, never averaged.

The update of a late site belongs to an adapter that is no longer the current one; an average over updates
from different starting points would be another algorithm. Its receipt is kept, though: the site has charged
the release, and the coordinator's books must show it. A site is not asked for a further round before its
late reply is in, so it cannot pay round after round for updates that nobody uses.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from flwr.serverapp import Grid

from fl_server.rounds.inbox import Inbox
from fl_server.rounds.replies import BadReply, Expected, parts
from fl_server.runs.commits import Commits
from fl_server.runs.views import Reply


@dataclass(frozen=True)
class Straggler:
    """One site's order that is still out. `until`: when it is taken for lost, by the monotonic clock."""

    site: str
    round: int
    message: str
    expected: Expected
    until: float


class Stragglers:
    """The orders of closed rounds of one run."""

    def __init__(self, commits: Commits, run: str, grid: Grid) -> None:
        self._commits = commits
        self._run = run
        self._inbox = Inbox(grid)
        self._out: dict[str, Straggler] = {}

    def add(self, straggler: Straggler) -> None:
        """Go on waiting for a site whose round is closed."""
        self._out[straggler.site] = straggler

    def busy_with(self, site: str) -> int:
        """The closed round that the site is still at work on; 0 when it is free."""
        straggler = self._out.get(site)
        return straggler.round if straggler else 0

    def pull(self) -> None:
        """Take in what has arrived since; one reply at a time, so that memory stays that of one update."""
        by_message = {straggler.message: straggler for straggler in self._out.values()}
        for message in self._inbox.take(list(by_message)):
            straggler = by_message.get(message.metadata.reply_to_message_id)
            if straggler is not None and self._out.pop(straggler.site, None) is not None and not message.has_error():
                reply = self._read_reply(straggler, message.content)
                if reply is not None:
                    self._commits.record_late(self._run, straggler.round, reply)
        now = time.monotonic()
        self._out = {site: straggler for site, straggler in self._out.items() if straggler.until > now}

    @staticmethod
    def _read_reply(straggler: Straggler, content: object) -> Reply | None:
        try:
            status, document, update = parts(content)
            if status != "ok":
                return straggler.expected.refusal(status, document)
            reply, _ = straggler.expected.receipt(document, update)
        except BadReply as error:
            return Reply(straggler.site, "invalid", error.code, error.message)
        message = f"arrived after round {straggler.round} was closed; it is in no average"
        return replace(reply, status="late", code="late", message=message)
