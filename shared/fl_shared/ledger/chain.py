"""The chain of entries: what is hashed and signed, and how an entry is appended.

The signed message is the canonical JSON of `{body, created_at, kind, prev_hash, seq, site}`; the entry's hash
is the SHA-256 of that message. So an entry cannot be changed, moved, or taken to another site's ledger.

The coordinator's admin log has the same form in a table of its own, so `table` names the chain where it matters.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any

import sqlalchemy as sa
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fl_shared.canonical import canonical_bytes, sha256_hex
from fl_shared.errors import LedgerError, damaged, shown
from fl_shared.identity.signing import SigningKey
from fl_shared.ledger.faults import fault
from fl_shared.ledger.models import ENTRY_KINDS, entries
from fl_shared.ledger.records import Entry, Head, Problem

GENESIS_HASH = "0" * 64
_STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z").fullmatch
CLOCK_TOLERANCE = timedelta(minutes=5)


def message_bytes(*, seq: int, kind: str, body: str, prev_hash: str, created_at: str, site: str) -> bytes:
    """Return the bytes that are hashed and signed; `body` is canonical JSON text and is put in as it is."""
    if is_plain(f"{created_at}{kind}{prev_hash}{site}"):  # one look at all four; what needs an escape is a forgery
        return _message(body, created_at, kind, prev_hash, seq, site)
    return (
        f'{{"body":{body},"created_at":{quoted(created_at)},"kind":{quoted(kind)},'
        f'"prev_hash":{quoted(prev_hash)},"seq":{seq},"site":{quoted(site)}}}'
    ).encode()


def _message(body: str, created_at: str, kind: str, prev_hash: str, seq: int, site: str) -> bytes:
    return (
        f'{{"body":{body},"created_at":"{created_at}","kind":"{kind}",'
        f'"prev_hash":"{prev_hash}","seq":{seq},"site":"{site}"}}'
    ).encode()


def is_plain(text: str) -> bool:
    """Whether JSON writes `text` as it is, between quotation marks."""
    return text.isascii() and text.isprintable() and '"' not in text and "\\" not in text


def quoted(text: str) -> str:
    """Return `text` as JSON; what needs no escape, which is everything but forgeries, is only quoted."""
    return f'"{text}"' if is_plain(text) else json.dumps(text, ensure_ascii=False)


def body_text(body: Mapping[str, Any]) -> str:
    """Return a body as it is stored: canonical JSON."""
    return canonical_bytes(dict(body)).decode()


def timestamp(moment: datetime) -> str:
    """Return `moment` as the ledger writes it: ISO 8601 in UTC with microseconds, 27 characters."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def parse_timestamp(text: str) -> datetime:
    """Return the moment that the ledger wrote as `text`; raises ValueError for any other form."""
    if not _STAMP(text):
        raise ValueError(f"{text!r} is no time of the form 2027-01-31T12:00:00.000000Z")
    return datetime.fromisoformat(text)


def is_timestamp(text: str) -> bool:
    """Whether `text` is a moment as the ledger writes it."""
    try:
        parse_timestamp(text)
    except ValueError:
        return False
    return True


@lru_cache(maxsize=8)  # building a statement costs more than running it
def _statements(table: sa.Table) -> tuple[sa.Select[Any], sa.Insert]:
    return sa.select(table).order_by(table.c.seq.desc()).limit(1), table.insert()


def last_entry(connection: sa.Connection, table: sa.Table = entries) -> Entry | None:
    """Return the newest entry, or None in an empty ledger."""
    row = connection.execute(_statements(table)[0]).mappings().first()
    return None if row is None else entry_of(row)


def head_of(entry: Entry | None) -> Head:
    """Return the head that `entry` pins."""
    return Head(0, GENESIS_HASH) if entry is None else Head(entry.seq, entry.hash)


def entry_of(row: Mapping[str, Any] | sa.RowMapping) -> Entry:
    """Return the entry in a database row; raises LedgerError when its body is no table in JSON."""
    try:
        seq, body = int(row["seq"]), json.loads(row["body"])
    except (TypeError, ValueError, RecursionError) as error:
        raise damaged(f"entries.body of row {shown(row['seq'])} is no JSON") from error
    if not isinstance(body, dict):
        raise damaged(f"entries.body of row {seq} is no table")
    return Entry(
        seq=seq,
        kind=str(row["kind"]),
        body=body,
        prev_hash=str(row["prev_hash"]),
        hash=str(row["hash"]),
        signature=str(row["signature"]),
        created_at=str(row["created_at"]),
    )


def append(
    connection: sa.Connection,
    key: SigningKey,
    site: str,
    kind: str,
    body: Mapping[str, Any],
    *,
    now: datetime,
    point: str,
    table: sa.Table = entries,
) -> Entry:
    """Sign and write the next entry, inside the caller's write transaction.

    `point` names the fault points around the statement. Raises LedgerError when the clock is before the
    last entry by more than five minutes; a smaller step back takes the last entry's time.
    """
    last = last_entry(connection, table)
    if last is not None:
        before = parse_timestamp(last.created_at)
        if now < before - CLOCK_TOLERANCE:
            raise LedgerError(
                f"the clock says {timestamp(now)}, but the last entry is of {last.created_at}",
                fix="set the clock right; entries must not go back in time",
                code="ledger-clock",
            )
        now = max(now, before)
    head = head_of(last)
    text = body_text(body)
    row = {
        "seq": head.entries + 1,
        "kind": kind,
        "body": text,
        "prev_hash": head.hash,
        "created_at": timestamp(now),
    }
    message = message_bytes(
        seq=head.entries + 1,
        kind=kind,
        body=text,
        prev_hash=head.hash,
        created_at=timestamp(now),
        site=site,
    )
    row["hash"] = sha256_hex(message)
    row["signature"] = key.sign(message)
    fault(f"{point}.before-entry")
    connection.execute(_statements(table)[1], row)
    fault(f"{point}.entry")
    return entry_of(row)


class Links:
    """Holds entries, fed in order, against each other: numbers, hashes, signatures, times.

    Args:
        site: whose chain it is.
        first: the number of the first entry.
        prev: the hash of the entry before that; None when somebody else compares it.
    """

    def __init__(self, site: str, first: int = 1, prev: str | None = GENESIS_HASH) -> None:
        self._site = site
        self._site_is_plain = is_plain(site)
        self._good = False  # the entry before, whose hash `prev` then is
        self.expected, self.prev, self.time = first, prev, ""

    def feed(self, row: Sequence[Any], signer: Ed25519PublicKey) -> Sequence[Problem]:
        """Name what is wrong with the next entry: (seq, kind, body, prev_hash, hash, signature, created_at)."""
        seq, kind, body, prev_hash, digest, signature, created_at = row
        timely = is_timestamp(created_at) and created_at >= self.time
        if self._good and self._site_is_plain and timely and prev_hash == self.prev and kind in ENTRY_KINDS:
            message = _message(body, created_at, kind, prev_hash, seq, self._site)
        else:
            message = message_bytes(
                seq=seq, kind=kind, body=body, prev_hash=prev_hash, created_at=created_at, site=self._site
            )
        self._good = (
            timely
            and seq == self.expected
            and (prev_hash == self.prev or self.prev is None)
            and hashlib.sha256(message).hexdigest() == digest
            and _is_signed(signature, message, signer)
        )
        problems = () if self._good else self._problems(row, message, signer)
        self.expected, self.prev, self.time = seq + 1, digest, created_at
        return problems

    def _problems(self, row: Sequence[Any], message: bytes, signer: Ed25519PublicKey) -> list[Problem]:
        """Look closely at an entry that does not follow."""
        seq, _kind, _body, prev_hash, digest, signature, created_at = row
        problems: list[Problem] = []
        if seq < self.expected:
            problems.append(Problem(f"entries: {seq} stands there twice", seq))
        elif seq > self.expected:
            missing = f"{self.expected}" if seq == self.expected + 1 else f"{self.expected} to {seq - 1}"
            problems.append(Problem(f"entries: {missing} missing", self.expected))
        if self.prev is not None and prev_hash != self.prev:
            problems.append(Problem(f"entry {seq}: prev_hash is not the hash of the entry before", seq))
        if sha256_hex(message) != digest:
            column = self._changed(row, message, signer)
            problems.append(Problem(f"entry {seq}: its content was changed, its hash does not fit: {column}", seq))
        if not _is_signed(signature, message, signer):
            problems.append(Problem(f"entry {seq}: its signature does not fit", seq))
        if created_at < self.time:
            problems.append(Problem(f"entry {seq}: created_at {created_at} is before the entry before", seq))
        if not is_timestamp(created_at):
            problems.append(Problem(f"entry {seq}: created_at {created_at!r} is no time", seq))
        return problems

    def _changed(self, row: Sequence[Any], message: bytes, signer: Ed25519PublicKey) -> str:
        """Say which column no longer is what was hashed and signed, as far as the others tell."""
        if _is_signed(row[5], message, signer):
            return "column hash"
        seq, kind, body, prev_hash, digest, _signature, created_at = row
        parts = {"seq": seq, "kind": kind, "body": body, "prev_hash": prev_hash, "created_at": created_at}
        others: list[tuple[str, str]] = [("kind", other) for other in ENTRY_KINDS]
        if self.prev is not None:
            others.append(("prev_hash", self.prev))
        for column, value in others:
            if sha256_hex(message_bytes(**parts | {column: value}, site=self._site)) == digest:
                return f"column {column}"
        return "column body or created_at"


def _is_signed(signature: str, message: bytes, signer: Ed25519PublicKey) -> bool:
    """Whether `signature`, in lower-case hex digits and no other spelling, is the signer's over `message`."""
    try:
        raw = bytes.fromhex(signature)
        if raw.hex() != signature:  # fromhex takes capitals and spaces, too
            return False
        signer.verify(raw, message)
    except (InvalidSignature, ValueError):
        return False
    return True
