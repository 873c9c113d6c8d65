"""The admin log: who asked this coordinator for what, in the form of a site's ledger.

    genesis   {public_key}: the first entry names the key that signs
    key       {public_key, replaces, rotations}: the key changed; the former key vouches for it in `rotations`
    action    {action, arguments, role, name, fingerprint}: written before the action takes effect. The role is the
              certificate's, or `host` for who types `fl-server` on the coordinator's machine
    outcome   {of, result, code, message}: what became of action `of`: done, refused or failed

An action without an outcome was broken off, by a crash or because the log could not be written any more: it may
have taken effect. Entries are hashed, signed and chained by `fl_shared.ledger.chain`; the database refuses to
change or delete one, and whoever can change the database all the same cannot sign.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pwd
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, cast

import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fl_server.db.models import AdminLogRow
from fl_server.db.store import Store
from fl_server.home.layout import ServerHome
from fl_server.identity.authority import Identity
from fl_server.identity.rotation import rotations
from fl_shared.errors import ConcordatError, SignatureError
from fl_shared.identity.signing import SigningKey, ed25519_key, open_document
from fl_shared.ledger import chain
from fl_shared.ledger.records import Entry, Problem

log = logging.getLogger("fl_server.access.log")

CHAIN = "coordinator:admin"
"""Used where a ledger has its site's name; no site can be called so."""
_TABLE = cast(sa.Table, AdminLogRow.__table__)
_COLUMNS = ("seq", "kind", "body", "prev_hash", "hash", "signature", "created_at")
_ADVISORY_LOCK = 0xAD314
_MAX_MESSAGE = 500
_PAGE = 1000

Keys = Callable[[], tuple[SigningKey, Sequence[Mapping[str, Any]]]]
"""The coordinator's signing key as it is now, and the changes that led to it, oldest first, each signed by the key
that it replaced."""


class AdminLog:
    """Appends to the log and reads it. Several processes may append at once; the database queues them."""

    def __init__(self, store: Store, keys: Keys) -> None:
        self._store = store
        self._keys = keys

    @classmethod
    def of(cls, home: ServerHome, store: Store) -> AdminLog:
        """The log of the coordinator at `home`."""
        return cls(store, lambda: (SigningKey.load(home.signing_key), rotations(home)[1]))

    @contextlib.contextmanager
    def recorded(self, who: Identity, action: str, arguments: Mapping[str, Any]) -> Iterator[None]:
        """Log the action, let the block do it, log the outcome. When the first cannot be written, nothing is done."""
        number = self.begin(who, action, arguments)
        try:
            yield
        except ConcordatError as error:
            self._end(number, "refused", error.code, error.message)
            raise
        except GeneratorExit:
            self._end(number, "failed", "cancelled", "the caller went away before the end")
            raise
        except BaseException as error:
            # The type alone: what a defect says is for the coordinator's own log.
            self._end(number, "failed", "defect", type(error).__name__)
            raise
        self._end(number, "done")

    def begin(self, who: Identity, action: str, arguments: Mapping[str, Any]) -> int:
        """Write an action; its number."""
        body = {
            "action": action,
            "arguments": dict(arguments),
            "role": who.role,
            "name": who.name,
            "fingerprint": who.fingerprint,
        }
        return self._append("action", body).seq

    def _end(self, of: int, result: str, code: str = "", message: str = "") -> None:
        """Write an outcome. What happened has happened: a log that cannot be written now leaves it open."""
        body = {"of": of, "result": result, "code": code, "message": message[:_MAX_MESSAGE]}
        try:
            self._append("outcome", body)
        except (ConcordatError, sa.exc.SQLAlchemyError):
            log.exception("the outcome of action %d could not be written", of)

    def _append(self, kind: str, body: Mapping[str, Any]) -> Entry:
        with self._store.write() as session:
            connection = session.connection()
            if connection.dialect.name == "postgresql":
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_ADVISORY_LOCK)))
            # Read under the lock: another process may have followed a change of the key just now.
            key, changes = self._keys()
            self._follow_key(connection, key, changes)
            return _put(connection, key, kind, body)

    @staticmethod
    def _follow_key(connection: sa.Connection, key: SigningKey, changes: Sequence[Mapping[str, Any]]) -> None:
        """Begin the log, or enter a change of the coordinator's key, before an entry that is signed by it."""
        query = sa.select(_TABLE).where(_TABLE.c.kind.in_(("genesis", "key"))).order_by(_TABLE.c.seq.desc()).limit(1)
        row = connection.execute(query).mappings().first()
        if row is None:
            _put(connection, key, "genesis", {"public_key": key.public_hex})
            return
        current = str(chain.entry_of(row).body["public_key"])
        if current == key.public_hex:
            return
        # Several changes may lie between two entries. A change that nobody vouches for is entered, too, and `check`
        # names it: better a mark in the log than a coordinator that can no longer be stopped.
        ends = [current, *(change["body"]["new_key"] for change in changes)]
        start = next((number for number, change in enumerate(changes) if change["key"] == current), len(changes))
        stop = max((number for number, end in enumerate(ends) if end == key.public_hex), default=0)
        vouched = [dict(change) for change in changes[start:stop]]
        _put(connection, key, "key", {"public_key": key.public_hex, "replaces": current, "rotations": vouched})

    def entries(self, after: int = 0) -> Iterator[AdminLogRow]:
        """Every entry with a larger number than `after`, in order, a page at a time."""
        while True:
            query = sa.select(AdminLogRow).where(AdminLogRow.seq > after).order_by(AdminLogRow.seq).limit(_PAGE)
            with self._store.read() as session:
                rows = list(session.scalars(query))
            yield from rows
            if len(rows) < _PAGE:
                return
            after = rows[-1].seq


def _put(connection: sa.Connection, key: SigningKey, kind: str, body: Mapping[str, Any]) -> Entry:
    now = datetime.now(UTC)
    return chain.append(connection, key, CHAIN, kind, body, now=now, point="adminlog", table=_TABLE)


def local_user() -> Identity:
    """Whoever types on the coordinator's own machine: the role is `host`, and there is no certificate."""
    try:
        name = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container's user need not have a name
        name = str(os.getuid())
    return Identity("host", name, "", 0.0)


@dataclass
class Report:
    """What checking a log found; `problems` is empty when all is well. `open`: actions without an outcome."""

    entries: int = 0
    head: str = chain.GENESIS_HASH
    first: str = ""
    last: str = ""
    keys: list[str] = field(default_factory=list)
    pinned: bool = False
    open: list[int] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def check(
    rows: Iterable[Any], *, public_key: str | None = None, checkpoints: Mapping[int, str] | None = None
) -> Report:
    """Check a log without trusting it; each problem is named, none is raised.

    `rows` have the table's columns as attributes, in the order of their numbers. `public_key` is the coordinator's
    key (64 hex digits) as the auditor knows it; without it the log's own word is taken. `checkpoints` are heads
    noted before, by number: a log that was cut off, or an old copy, is intact in itself, and only they show it.
    """
    report = Report()
    links = chain.Links(CHAIN)
    signer: Ed25519PublicKey | None = None
    noted = dict(checkpoints or {})
    actions: dict[int, bool] = {}
    for record in rows:
        row = tuple(getattr(record, column) for column in _COLUMNS)
        seq, kind, digest = int(row[0]), str(row[1]), str(row[4])
        body = _body(row[2], seq, report)
        if kind in ("genesis", "key"):
            signer = _next_signer(seq, kind, body, report) or signer
        if signer is None:
            report.problems.append(Problem("the first entry, which names the key, is missing or unusable", 1))
            return report
        report.problems += links.feed(row, signer)
        if kind == "action":
            actions[seq] = False
        elif kind == "outcome":
            of = body.get("of")
            if not isinstance(of, int) or actions.get(of, True):  # unknown, or it has an outcome already
                message = f"entry {seq}: it is the outcome of {of!r}, which is no open action"
                report.problems.append(Problem(message, seq))
            else:
                actions[of] = True
        if noted.get(seq, digest) != digest:
            report.problems.append(Problem(f"entry {seq}: it is not the one noted before: the past was rewritten", seq))
        report.entries, report.head, report.last = report.entries + 1, digest, str(row[6])
        report.first = report.first or report.last
    for seq in noted:
        if seq >= links.expected:
            report.problems.append(
                Problem(f"entries: {seq} was noted before, the log ends at {links.expected - 1}: it was cut off", seq)
            )
    report.open = [seq for seq, ended in actions.items() if not ended]
    report.pinned = public_key is not None
    if public_key is not None and public_key not in report.keys:
        report.problems.append(Problem(f"nothing is signed by key {public_key[:16]}…, the one that you know"))
    return report


def _body(text: str, seq: int, report: Report) -> dict[str, Any]:
    try:
        body = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        body = None
    if isinstance(body, dict):
        return body
    report.problems.append(Problem(f"entry {seq}: its body is no table", seq))
    return {}


def _next_signer(seq: int, kind: str, body: dict[str, Any], report: Report) -> Ed25519PublicKey | None:
    """The key that signs from this entry on, after checking that the key before vouches for it."""
    key = body.get("public_key")
    try:
        signer = ed25519_key(str(key))
    except SignatureError:
        report.problems.append(Problem(f"entry {seq}: it names no key", seq))
        return None
    if kind == "genesis":
        if seq != 1 or report.keys:
            report.problems.append(Problem(f"entry {seq}: a second beginning", seq))
            return None
    else:
        try:
            _follow(body.get("rotations"), report.keys[-1] if report.keys else "", str(key))
        except SignatureError as error:
            message = f"entry {seq}: the coordinator's key changed without the former key's word ({error.message})"
            report.problems.append(Problem(message, seq))
    report.keys.append(str(key))
    return signer


def _follow(changes: Any, current: str, signer: str) -> None:
    """Follow signed changes of the key (`identity.rotation`) from one key to another; SignatureError otherwise."""
    for document in changes if isinstance(changes, list) else ():
        vouched = open_document(document, current)
        if vouched.get("kind") != "coordinator-key":
            raise SignatureError("what it signed is no change of the key")
        current = str(vouched.get("new_key"))
    if current != signer:
        raise SignatureError(f"nobody vouches for {signer[:16]}…")
