"""A bundle for an outside auditor: the signed entries, the coordinator's receipts, public keys, and nothing else.

A ZIP file with `entries.jsonl` (one signed entry a line, as the chain stores it), `receipts.json`,
`bundle.json` and `README.txt`. It needs no signature of its own: every entry has one, and what was left out of it
is missed by the chain, the receipts' checkpoints and the auditor's own copy of the site's key.

To be checked, it is turned back into a ledger (an SQLite file in a temporary directory), so that every verb of
`fl-audit` works on it offline.
"""

from __future__ import annotations

import json
import shlex
import zipfile
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from fl_shared import __version__
from fl_shared.canonical import parse_json
from fl_shared.errors import ConfigError, LedgerError, damaged, shown
from fl_shared.files import sqlite_url
from fl_shared.ledger import chain, merkle, receipts
from fl_shared.ledger.models import TYPED, entries, merkle_nodes, tallies, tally_keys
from fl_shared.ledger.reader import LedgerReader
from fl_shared.ledger.receipts import UNREADABLE_ZIP, StoredReceipt, damaged_file, zip_member
from fl_shared.ledger.reconcile import site_keys
from fl_shared.ledger.replay import Replay, Total
from fl_shared.ledger.store import Store
from fl_shared.ledger.stretch import EVENT_FIELDS
from fl_shared.names import site_id

FORMAT = "concordat-bundle/1"
_COLUMNS = tuple(column.name for column in entries.columns)
_LONGEST_LINE = 1 << 20
_BATCH = 5000

README = """A privacy ledger for an outside auditor, site {site}, {count} entries.

Check it:      fl-audit verify {name} --public-key KEY
Read it:       fl-audit budgets|spends|runs|reconcile --ledger {name} --site {site}
The KEY must come to you by another way than this file; bundle.json only repeats what the ledger says.

Without our program: each line of entries.jsonl is one entry. Its message is the JSON text
  {{"body":BODY,"created_at":"...","kind":"...","prev_hash":"...","seq":N,"site":"{site}"}}
without spaces, BODY put in as it stands. `hash` is the SHA-256 of that message, `signature` its Ed25519 signature,
`prev_hash` the hash of the line before (64 zeros in the first). The Merkle root is that of RFC 6962, section 2.1,
over the 32 bytes of each hash.
"""


def write(ledger: LedgerReader, path: Path, stored: Iterable[StoredReceipt] = ()) -> dict[str, Any]:
    """Write the ledger to `path`, which must not exist; return what `bundle.json` says.

    Raises ConfigError when the file exists; OSError when the disk refuses.
    """
    pinned = ledger.checkpoint()
    stored = list(stored)
    about = {
        "format": FORMAT,
        "site": ledger.site,
        "exported_at": chain.timestamp(datetime.now(UTC)),
        "program": f"concordat {__version__}",
        **pinned,
        "public_keys": site_keys(ledger),
        "receipts": len(stored),
    }
    try:
        target = path.open("xb")
    except FileExistsError as error:
        raise ConfigError(f"{path} exists", fix="choose another name; evidence is not overwritten") from error
    with target, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, allowZip64=True) as archive:
        with archive.open("entries.jsonl", "w", force_zip64=True) as sink, ledger.reading() as connection:
            query = sa.select(entries).where(entries.c.seq <= pinned["entries"]).order_by(entries.c.seq)
            for row in connection.execute(query.execution_options(yield_per=1000)).mappings():
                line = json.dumps({name: row[name] for name in _COLUMNS}, ensure_ascii=False, separators=(",", ":"))
                sink.write(line.encode() + b"\n")
        document = {"format": receipts.FORMAT, "receipts": [receipt.to_dict() for receipt in stored]}
        archive.writestr("receipts.json", json.dumps(document, indent=1, ensure_ascii=False))
        archive.writestr("bundle.json", json.dumps(about, indent=2, ensure_ascii=False) + "\n")
        name = shlex.quote(path.name)
        archive.writestr("README.txt", README.format(site=ledger.site, count=pinned["entries"], name=name))
    return about


def is_bundle(path: Path) -> bool:
    """Say whether the file at `path` looks like a bundle, if a damaged one."""
    if not path.is_file():
        return False
    with path.open("rb") as source:
        return source.read(2) == b"PK" or zipfile.is_zipfile(source)


def about(path: Path) -> dict[str, Any]:
    """Return `bundle.json`; raises LedgerError when the file is no bundle or damaged."""
    try:
        document = parse_json(zip_member(path, "bundle.json"), "bundle.json")
    except ConfigError as error:
        raise damaged_file(path, error.message) from error
    types = {"format": str, "site": str, "entries": int, "head": str, "merkle_root": str, "public_keys": list}
    table: dict[str, Any] = document if isinstance(document, dict) else {}
    if table.get("format") != FORMAT or not all(type(table.get(name)) is kind for name, kind in types.items()):
        raise damaged_file(path, f"bundle.json is not of the form {FORMAT}")
    try:
        return table | {"site": site_id(table["site"])}
    except ConfigError as error:
        raise damaged_file(path, f"bundle.json: {error.message}") from error


def receipts_in(path: Path) -> list[StoredReceipt]:
    """Return the coordinator's receipts that were packed with the ledger."""
    return receipts.parse(zip_member(path, "receipts.json"), f"{path}, receipts.json")


def unpack(path: Path, directory: Path) -> str:
    """Make a ledger of the bundle in `directory`; return its address.

    Nothing is checked here: a forged bundle makes a ledger that does not verify. Raises LedgerError when a line
    is no entry or a place in the chain is taken twice, because then there is no ledger to make.
    """
    url = sqlite_url(directory / "ledger.sqlite")
    store = Store(url, read_only=False)
    try:
        store.migrate()
        _without_guards(store)
        with store.write() as connection:
            guards = connection.execute(sa.text("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'")).all()
            for name, _sql in guards:
                connection.exec_driver_sql(f"DROP TRIGGER {name}")
            _insert_entries(connection, path)
            for _name, sql in guards:
                connection.exec_driver_sql(sql)
    except (LedgerError, OverflowError, UnicodeError) as error:  # the latter two: values that SQLite cannot hold
        reason = error.message if isinstance(error, LedgerError) else str(error)
        raise damaged(
            f"{path} holds no ledger: {reason.removeprefix(f'ledger {store.name}: ')}",
            fix="have the bundle sent again; if it comes the same, it was forged",
            code="bundle-broken",
        ) from error
    finally:
        store.close()
    return url


def _without_guards(store: Store) -> None:
    """Let the pooled connection take rows that do not fit: `verify` is to name them."""
    with store.engine.connect() as connection:
        driver: Any = connection.connection.driver_connection
        for name in ("foreign_keys = OFF", "ignore_check_constraints = ON"):
            driver.execute(f"PRAGMA {name}")


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with zipfile.ZipFile(path) as archive, archive.open("entries.jsonl") as source:
            number = 0
            while line := source.readline(_LONGEST_LINE):
                number += 1
                row = parse_json(line, f"line {number}")
                if not isinstance(row, dict) or set(row) != set(_COLUMNS):
                    raise LedgerError(f"line {number} of entries.jsonl is no entry")
                for name, value in row.items():
                    if type(value) is not (int if name == "seq" else str) or not _storable(value):
                        raise LedgerError(f"line {number} of entries.jsonl: {name} is {shown(value)}")
                yield number, row
    except (*UNREADABLE_ZIP, ConfigError) as error:
        raise LedgerError(f"entries.jsonl cannot be read: {error}") from error


def _storable(value: Any) -> bool:
    """Whether SQLite can hold the value: a number of 64 bits, or text that is Unicode."""
    if isinstance(value, int):
        return -(1 << 63) <= value < 1 << 63
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _insert_entries(connection: sa.Connection, path: Path) -> None:
    """Write the entries, and what follows from them: typed rows, sums, tree nodes."""
    rows: dict[sa.Table, list[dict[str, Any]]] = {}
    state, tree = Replay(), merkle.Tree()
    sums: dict[Total, tuple[int, int]] = {}  # (number, version)
    for number, entry in _lines(path):
        rows.setdefault(entries, []).append(entry)
        try:
            body = json.loads(entry["body"])
            nodes = tree.add(str(entry["hash"]))
        except (TypeError, ValueError) as error:
            raise LedgerError(f"line {number} of entries.jsonl: {error}") from error
        table = TYPED.get(entry["kind"])
        if table is not None and isinstance(body, dict) and {"seq", *body} == {c.name for c in table.columns}:
            rows.setdefault(table, []).append({"seq": entry["seq"], **body})
        short = EVENT_FIELDS.get(entry["kind"])
        event = body if short is None or not isinstance(body, dict) else tuple(body.get(name) for name in short)
        changed = state.feed(entry["seq"], entry["kind"], event, str(entry["created_at"]))
        if changed is not None:
            at, version = sums.get(changed, (len(sums) + 1, 0))
            if not version:
                dataset, study = changed.place
                place = {"id": at, "dataset": dataset, "study": study, **changed.key._asdict()}
                rows.setdefault(tally_keys, []).append(place)
            sums[changed] = (at, version + 1)
            totals = {"held": changed.held, "spent": changed.spent}
            rows.setdefault(tallies, []).append({"seq": entry["seq"], "key": at, "version": version + 1, **totals})
        for level, position, node in nodes:
            rows.setdefault(merkle_nodes, []).append({"level": level, "position": position, "hash": node})
        if len(rows[entries]) >= _BATCH:
            _insert_rows(connection, rows)
    _insert_rows(connection, rows)


def _insert_rows(connection: sa.Connection, rows: dict[sa.Table, list[dict[str, Any]]]) -> None:
    for table in (entries, *TYPED.values(), tally_keys, tallies, merkle_nodes):
        if rows.get(table):
            connection.execute(table.insert(), rows[table])
    for batch in rows.values():
        batch.clear()
    rows.setdefault(entries, [])
