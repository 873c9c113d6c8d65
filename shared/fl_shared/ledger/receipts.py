"""The coordinator's copy: receipts as it keeps them, from a file that it exported or from its own database.

A receipt pins the site's ledger (entries, head, Merkle root) and is signed by the site, so the coordinator can
neither invent one nor can the site deny it. The file, `receipts.json`, is

    {"format": "concordat-receipts/1", "receipts": [{"document": {"body", "key", "signature"}, "received_at": 1.0}]}

where `document_json` (the same as text) may stand in place of `document`.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from fl_shared.canonical import parse_json
from fl_shared.errors import ConfigError, LedgerError, SignatureError
from fl_shared.ledger.store import Store
from fl_shared.manifest import Receipt
from fl_shared.signing import open_document

FORMAT = "concordat-receipts/1"
_LARGEST_FILE = 1 << 30

# `replies` is the coordinator's table; the audit's install has no fl_server to ask.
_REPLIES = sa.text(
    "SELECT document_json, received_at FROM replies"
    " WHERE status IN ('ok', 'late') AND site = :site ORDER BY received_at"
)


@dataclass(frozen=True)
class Kept:
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


def load(source: str, site: str) -> list[Kept]:
    """Return the receipts of `site` from a file, or from the coordinator's database (`sqlite:///`, `postgresql://`).

    Raises ConfigError for a file that holds none of the known forms, LedgerError when the database cannot be read.
    """
    if "://" in source:
        return list(_from_database(source, site))
    path = Path(source)
    if not path.is_file():
        raise ConfigError(f"no receipts at {source!r}", fix="give the file, or the coordinator's database as a URL")
    data = path.read_bytes()
    if zipfile.is_zipfile(path):  # a bundle carries them
        with zipfile.ZipFile(path) as archive:
            data = archive.read("receipts.json") if "receipts.json" in archive.namelist() else b""
    return [kept for kept in parse(data, str(path)) if kept.claims.get("site", site) == site]


def parse(data: bytes, what: str) -> list[Kept]:
    """Return the receipts in the bytes of a `receipts.json`; ConfigError names what is wrong with it."""
    found = parse_json(data, what, limit=_LARGEST_FILE)
    rows = found.get("receipts") if isinstance(found, dict) else found
    if not isinstance(rows, list):
        raise ConfigError(f"{what} holds no receipts", fix='expected {"receipts": [...]}')
    kept = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ConfigError(f"{what}: receipt {number} is no table", fix="export the receipts again")
        text = row.get("document_json")
        document = parse_json(text, f"{what}: receipt {number}") if isinstance(text, str) else row.get("document", row)
        at = row.get("received_at", 0.0)
        kept.append(Kept(document, float(at) if isinstance(at, int | float) else 0.0))
    return kept


def _from_database(url: str, site: str) -> Iterator[Kept]:
    store = Store(url, read_only=True)
    try:
        with store.read() as connection:
            if not sa.inspect(connection).has_table("replies"):
                raise LedgerError(
                    f"{store.name} is no coordinator's database", fix="give the address of coordinator.sqlite"
                )
            for text, at in connection.execute(_REPLIES, {"site": site}):
                yield Kept(parse_json(text, "a receipt in the coordinator's database"), float(at))
    finally:
        store.close()
