"""The chain of entries: what is hashed and signed, and how an entry is appended.

The signed message is the canonical JSON of `{body, created_at, kind, prev_hash, seq, site}`; the entry's hash
is the SHA-256 of that message. So an entry cannot be changed, moved, or taken to another site's ledger.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any

import sqlalchemy as sa

from fl_shared.canonical import canonical_bytes, sha256_hex
from fl_shared.errors import LedgerError
from fl_shared.ledger.faults import fault
from fl_shared.ledger.models import entries
from fl_shared.ledger.records import Entry, Head
from fl_shared.signing import SigningKey

GENESIS_HASH = "0" * 64
_PLAIN = re.compile(r"[0-9A-Za-z:.-]*").fullmatch
_STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z").fullmatch
CLOCK_TOLERANCE = timedelta(minutes=5)


def message_bytes(*, seq: int, kind: str, body: str, prev_hash: str, created_at: str, site: str) -> bytes:
    """Return the bytes that are hashed and signed; `body` is canonical JSON text and is put in as it is."""
    if _PLAIN(prev_hash + created_at):
        prev_hash, created_at = f'"{prev_hash}"', f'"{created_at}"'
    else:
        prev_hash, created_at = _quoted(prev_hash), _quoted(created_at)
    return (
        f'{{"body":{body},"created_at":{created_at},"kind":{_quoted(kind)},'
        f'"prev_hash":{prev_hash},"seq":{seq},"site":{_quoted(site)}}}'
    ).encode()


@lru_cache(maxsize=64)  # the same few kinds and sites, a million times
def _quoted(text: str) -> str:
    """Return `text` as JSON; what needs no escape, which is everything but forgeries, is only quoted."""
    return f'"{text}"' if _PLAIN(text) else json.dumps(text, ensure_ascii=False)


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


_LAST = sa.select(entries).order_by(entries.c.seq.desc()).limit(1)
_INSERT = entries.insert()


def last_entry(connection: sa.Connection) -> Entry | None:
    """Return the newest entry, or None in an empty ledger."""
    row = connection.execute(_LAST).mappings().first()
    return None if row is None else entry_of(row)


def head_of(entry: Entry | None) -> Head:
    """Return the head that `entry` pins."""
    return Head(0, GENESIS_HASH) if entry is None else Head(entry.seq, entry.hash)


def entry_of(row: Mapping[str, Any] | sa.RowMapping) -> Entry:
    """Return the entry in a database row."""
    return Entry(
        seq=int(row["seq"]),
        kind=str(row["kind"]),
        body=json.loads(row["body"]),
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
) -> Entry:
    """Sign and write the next entry, inside the caller's write transaction.

    `point` names the fault points around the statement. Raises LedgerError when the clock stands before the
    last entry by more than five minutes; a smaller step back takes the last entry's time.
    """
    last = last_entry(connection)
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
    connection.execute(_INSERT, row)
    fault(f"{point}.entry")
    return entry_of(row)
