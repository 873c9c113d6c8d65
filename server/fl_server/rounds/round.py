"""One round of a run: sends every site its signed order, collects the replies, hands over their average.

The rule of a round, in full (docs/rounds.md tells it to admins). Every site is asked once it is online and
has answered earlier rounds. A reply is valid when its signature, digests, shapes and values are right. An order
that was lost on the way (a killed SuperNode, an agent that is being restarted) is sent again until the
deadline; the site answers a repeat from its store. A site that is revoked is no longer waited for. The round ends

* when every site has answered;
* at once when too many have refused for the quorum to be reached;
* at the deadline;
* `OFFLINE_GRACE_S` after the quorum is reached, if every site that is still missing is offline.

With a quorum of good replies the round is committed, otherwise the run fails, naming each site's answer.
What comes later is kept as `late` (`fl_server.rounds.stragglers`), and is in no average.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common import Array
from flwr.serverapp import Grid

from fl_server.aggregation import Form, RoundAggregate
from fl_server.db.models import SiteRow
from fl_server.identity.sites import Sites
from fl_server.rounds.inbox import Inbox
from fl_server.rounds.replies import BadReply, Expected, parts
from fl_server.rounds.stragglers import Straggler, Stragglers
from fl_server.runs.commits import Commits
from fl_server.runs.events import Events
from fl_server.runs.orders import Issued, Orders
from fl_server.runs.views import CommittedRound, Reply
from fl_shared.adapters.safetensors import digest
from fl_shared.documents.order import BY_DIGEST
from fl_shared.documents.spec import RunSpec
from fl_shared.errors import DataError, RunError
from fl_shared.identity.signing import SigningKey

POLL_S = 1.0
RESEND_S = 3.0
OFFLINE_GRACE_S = 30.0
PULL_BYTES = 16 << 20
EXPIRY_MARGIN_S = 300.0


class QuorumMissed(RunError):
    """The round cannot be committed; the message names each site's answer."""

    default_code = "quorum-missed"


class Interrupted(RunError):
    """An admin stopped or paused the run."""


@dataclass
class _AskedSite:
    """One site in the round that is under way."""

    site: str
    node: int
    expected: Expected
    order: Issued
    message: str = ""
    earliest: float = 0.0
    reply: Reply | None = None
    form: Form = ()
    problem: str = "it was never online"


@dataclass(frozen=True)
class RunContext:
    """What all rounds of one attempt at a run have in common. `late`: the orders of its closed rounds."""

    attempt: str
    commits: Commits
    events: Events
    orders: Orders
    sites: Sites
    grid: Grid
    late: Stragglers
    scratch: Path


class Round:
    """One round of one run."""

    def __init__(self, context: RunContext, spec: RunSpec, *, key: SigningKey, number: int, base: bytes) -> None:
        """`base`: the global adapter that the round begins with. `key` signs its orders."""
        self._context = context
        self._key = key
        self._inbox = Inbox(context.grid)
        self._spec = spec
        self._number = number
        self._base_bytes, self._base_digest = base, digest(base)
        state = context.commits.server_state(spec.run.name, number - 1, base)
        self._updates = RoundAggregate(spec, base, state, context.scratch)
        self._received = 0
        self._largest = 1
        self._began = time.monotonic()
        every = {row.site: row for row in context.sites.all()}
        rows = [every[site] for site in spec.run.sites]
        issued = self._issue(*rows)
        self._asked = [
            _AskedSite(row.site, int(row.node_id or 0), self._expected(row), issued[row.site]) for row in rows
        ]

    def _issue(self, *rows: SiteRow) -> dict[str, Issued]:
        ttl = self._spec.run.round_timeout_s + EXPIRY_MARGIN_S
        reads = {row.site: row.orders for row in rows}
        return self._context.orders.issue(self._spec, self._number, reads, self._base_digest, self._key, ttl)

    def _expected(self, row: SiteRow) -> Expected:
        run, number, site, adapter = self._spec.run.name, self._number, row.site, self._base_digest

        def issued(order_digest: str) -> bool:
            return self._context.orders.issued(order_digest, run, number, site, adapter)

        return Expected(self._spec, number, site, row.signing_key, issued)

    def _refresh_sites(self) -> None:
        """Wait no longer for a site that was revoked or is not enrolled yet; follow one that enrolled again.

        One whose agent is of an older version than at the round's begin gets the order that it reads.
        """
        rows = {row.site: row for row in self._context.sites.all()}
        for asked in self._open():
            row = rows[asked.site]
            node = int(row.node_id or 0)
            if row.state != "enrolled":
                asked.reply = Reply(asked.site, "missing", "not-enrolled", f"the site is {row.state}")
                self._note(asked)
            elif node != asked.node:
                asked.node, asked.expected, asked.message = node, self._expected(row), ""
            if asked.reply is None and not asked.message and asked.order.spec_json and row.orders < BY_DIGEST:
                asked.order = self._issue(row)[row.site]

    def _averageable(self) -> int:
        """How many right replies can be averaged with one another."""
        return self._updates.most

    def _open(self) -> list[_AskedSite]:
        return [asked for asked in self._asked if asked.reply is None]

    def collect(self, still_wanted: Callable[[], bool]) -> CommittedRound:
        """Ask, wait and average; the round to commit.

        Raises:
            QuorumMissed: fewer good replies than the quorum, at the deadline or for certain.
            Interrupted: `still_wanted` said no.
        """
        deadline = self._began + self._spec.run.round_timeout_s
        quorum = self._spec.run.quorum
        quorum_at = 0.0
        while self._open():
            if not still_wanted():
                raise Interrupted(f"round {self._number} was interrupted")
            self._refresh_sites()
            online = set(self._context.grid.get_node_ids())
            self._context.late.pull()
            self._send(online, deadline)
            self._pull()
            self._give_up_lost_orders(online)
            now = time.monotonic()
            if self._averageable() >= quorum:
                quorum_at = quorum_at or now
                waiting_for_offline = all(asked.node not in online for asked in self._open())
                if waiting_for_offline and now > quorum_at + OFFLINE_GRACE_S:
                    break
            elif self._averageable() + len(self._open()) < quorum:
                break
            if now > deadline:
                break
            time.sleep(POLL_S)
        for asked in self._open():
            asked.reply = Reply(asked.site, "missing", "no-answer", f"no answer in time: {asked.problem}")
            if asked.message:
                until = deadline + EXPIRY_MARGIN_S
                self._context.late.add(Straggler(asked.site, self._number, asked.message, asked.expected, until))
        self._reject_other_forms()
        replies = [asked.reply for asked in self._asked if asked.reply is not None]
        good = sum(1 for reply in replies if reply.status == "ok")
        if good < quorum:
            self._context.commits.record_replies(self._spec.run.name, self._number, replies)
            answers = "; ".join(
                f"{reply.site}: {reply.code or reply.status}: {reply.message}" if reply.status != "ok" else
                f"{reply.site}: ok"
                for reply in replies
            )  # fmt: skip
            raise QuorumMissed(
                f"round {self._number} has {good} of the {quorum} replies it needs ({answers})",
                fix="see `fl-admin runs show`; fix the cause, then `fl-admin runs resume`",
            )
        adapter, state = self._updates.finish()
        return CommittedRound(
            run=self._spec.run.name,
            attempt=self._context.attempt,
            round=self._number,
            adapter=adapter,
            state=state,
            replies=replies,
            received_bytes=self._received,
            seconds=time.monotonic() - self._began,
        )

    def _reject_other_forms(self) -> None:
        """In the first round: the replies whose tensors are not those of most sites are invalid."""
        try:
            right, problem = self._updates.winner(), "its tensors are not those of most sites"
        except DataError as error:
            right, problem = (), error.message
        for asked in self._asked:
            if asked.reply is not None and asked.reply.status == "ok" and asked.form != right:
                asked.reply = Reply(asked.site, "invalid", "bad-update", problem)
                self._note(asked)

    def _note(self, asked: _AskedSite) -> None:
        if asked.reply is not None:
            text = f"{asked.reply.code}: {asked.reply.message}" if asked.reply.code else ""
            kind = f"reply-{asked.reply.status}"
            self._context.events.note(self._spec.run.name, kind, text, round=self._number, site=asked.site)

    def _send(self, online: set[int], deadline: float) -> None:
        """Push the order to every site that is online and has none under way, one message at a time."""
        run = self._spec.run.name
        for asked in self._open():
            now = time.monotonic()
            if asked.message or asked.node not in online or now < asked.earliest:
                continue
            busy = self._context.late.busy_with(asked.site)
            if busy:
                asked.problem = f"it is still at work on round {busy}"
                continue
            expiry_s = max(deadline - now, 1.0) + EXPIRY_MARGIN_S
            content = RecordDict(
                {
                    "arrays": ArrayRecord({"adapter": Array(np.frombuffer(self._base_bytes, dtype=np.uint8))}),
                    "config": ConfigRecord(
                        {"manifest": asked.order.document, "spec": asked.order.spec_json, "timeout-s": expiry_s}
                    ),
                }
            )
            message = Message(content, dst_node_id=asked.node, message_type="train", ttl=expiry_s + 60.0)
            pushed = list(self._context.grid.push_messages([message]))
            if pushed and pushed[0]:
                asked.message, asked.problem = pushed[0], "it was asked and has not answered"
                self._context.events.note(run, "site-asked", "has the order", round=self._number, site=asked.site)
            else:
                asked.earliest, asked.problem = now + RESEND_S, "Flower did not take the order"

    def _pull(self) -> None:
        by_message = {asked.message: asked for asked in self._open() if asked.message}
        for message in self._inbox.take(list(by_message), PULL_BYTES // self._largest):
            asked = by_message.get(message.metadata.reply_to_message_id)
            if asked is not None:
                asked.message = ""
                self._handle_message(asked, message)
            del message  # before the next one is fetched: memory stays that of one update

    def _give_up_lost_orders(self, online: set[int]) -> None:
        """An order dies with the SuperNode that it was given to, also when that had begun to send the reply."""
        run = self._spec.run.name
        for asked in self._open():
            if asked.message and asked.node not in online:
                asked.message, asked.problem = "", "it went off line while it was asked"
                self._context.events.note(run, "order-lost", asked.problem, round=self._number, site=asked.site)

    def _handle_message(self, asked: _AskedSite, message: Message) -> None:
        if message.has_error():
            asked.earliest = time.monotonic() + RESEND_S
            asked.problem = f"its SuperNode broke off (Flower error {message.error.code})"
            return
        try:
            asked.reply = self._read_reply(asked, message.content)
        except BadReply as error:
            asked.reply = Reply(asked.site, "invalid", error.code, error.message)
        if asked.reply is None:
            asked.earliest = time.monotonic() + RESEND_S
            asked.problem = "its agent is not running"
            return
        self._note(asked)

    def _read_reply(self, asked: _AskedSite, content: RecordDict) -> Reply | None:
        status, document, update = parts(content)
        self._received += len(update)
        self._largest = max(self._largest, len(update))
        if status != "ok":
            return asked.expected.refusal(status, document)
        reply, tensors = asked.expected.receipt(document, update)
        try:
            asked.form = self._updates.add(tensors)
        except DataError as error:
            raise BadReply(error.message, code="bad-update") from error
        return reply
