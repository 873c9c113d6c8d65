"""The coordinator's copy: receipts as it keeps them, from a file that it exported or from its own database.

A receipt pins the site's ledger (entries, head, Merkle root) and is signed by the site, so the coordinator can
neither invent one nor can the site deny it. The file, `receipts.json`, is

    {"format": "concordat-receipts/1", "receipts": [{"document": {"body", "key", "signature"}, "received_at": 1.0}]}

where `document_json` (the same as text) may stand in place of `document`.
"""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from fl_shared.canonical import parse_json
from fl_shared.documents.round import Receipt
from fl_shared.errors import ConfigError, LedgerError, SignatureError, damaged, shown
from fl_shared.identity.signing import open_document
from fl_shared.ledger.store import Store

FORMAT = "concordat-receipts/1"
_LARGEST_FILE = 1 << 30

# `replies` is the coordinator's table; the audit's install has no fl_server to ask.
_REPLIES = sa.text(
    "SELECT document_json, received_at FROM replies"
    " WHERE status IN ('ok', 'late') AND site = :site ORDER BY received_at"
)


@dataclass(frozen=True)
class StoredReceipt:
    """One receipt as the coordinator keeps it; `received_at` in Unix seconds, 0 when it was not said."""

    document: Any
    received_at: float = 0.0

    def opened(self, keys: Iterable[str]) -> Receipt:
        """Return the receipt after checking that one of the site's `keys` signed it.

        Raises SignatureError when none did, ConfigError when the body is no receipt.
        """
        key = self.document.get("key") if isinstance(self.document, dict) else None
        if key not in set(keys):
            raise SignatureError(
                f"it is signed by {str(key)[:16]}…, which is no key of this site", fix="ask who made it"
            )
        return Receipt.from_dict(open_document(self.document, str(key)))

    @property
    def claims(self) -> dict[str, Any]:
        """The unchecked body, for messages."""
        body = self.document.get("body") if isinstance(self.document, dict) else None
        return body if isinstance(body, dict) else {}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, as `receipts.json` holds them."""
        return {"document": self.document, "received_at": self.received_at}


def load(source: str, site: str) -> list[StoredReceipt]:
    """Return the receipts of `site` from a file, or from the coordinator's database (`sqlite:///`, `postgresql://`).

    Raises ConfigError when there is no such file, LedgerError when it or the database cannot be read or understood.
    """
    if "://" in source:
        return list(_from_database(source, site))
    path = Path(source)
    if not path.is_file():
        raise ConfigError(f"no receipts at {source!r}", fix="give the file, or the coordinator's database as a URL")
    # A bundle carries them, too.
    data = zip_member(path, "receipts.json") if zipfile.is_zipfile(path) else path.read_bytes()
    return [receipt for receipt in parse(data, str(path)) if receipt.claims.get("site", site) == site]


UNREADABLE_ZIP = (
    *(OSError, KeyError, ValueError, EOFError, RuntimeError, OverflowError),  # RuntimeError: marked as encrypted
    *(zipfile.BadZipFile, zlib.error, struct.error),
)
"""What `zipfile` raises for a damaged file."""


def zip_member(path: Path, name: str) -> bytes:
    """Return one file out of a bundle; LedgerError when the bundle is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(name)
    except UNREADABLE_ZIP as error:
        raise damaged_file(path, f"{name} cannot be read: {error}") from error


def damaged_file(source: Path | str, how: str) -> LedgerError:
    """Return the error for a file of evidence that is not as it was written."""
    fix = "have the file sent again; if it comes the same, it was written so"
    return damaged(f"{source}: {how}", fix=fix)


def parse(data: bytes, source: str) -> list[StoredReceipt]:
    """Return the receipts in the bytes of a `receipts.json`; LedgerError names what is wrong with it."""
    content = _json(data, source, limit=_LARGEST_FILE)
    rows = content.get("receipts") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise damaged_file(source, 'it holds no receipts, {"receipts": [...]}')
    stored = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise damaged_file(source, f"receipt {number} is no table")
        text = row.get("document_json")
        document = _json(text, f"{source}, receipt {number}") if isinstance(text, str) else row.get("document", row)
        stored.append(StoredReceipt(document, _moment(row.get("received_at", 0.0))))
    return stored


def _json(text: str | bytes, source: str, **options: Any) -> Any:
    try:
        return parse_json(text, source, **options)
    except ConfigError as error:
        raise damaged_file(source, error.message.removeprefix(f"{source} ")) from error


def _moment(value: Any) -> float:
    try:
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else 0.0
    except OverflowError:
        return 0.0


def _from_database(url: str, site: str) -> Iterator[StoredReceipt]:
    store = Store(url, read_only=True)
    try:
        with store.read() as connection:
            if not sa.inspect(connection).has_table("replies"):
                raise LedgerError(
                    f"{store.name} is no coordinator's database", fix="give the address of coordinator.sqlite"
                )
            for text, at in connection.execute(_REPLIES, {"site": site}):
                if not isinstance(text, str):
                    raise damaged_file(store.name, f"replies.document_json is {shown(text)}")
                yield StoredReceipt(_json(text, f"{store.name}, a receipt"), _moment(at))
    finally:
        store.close()
