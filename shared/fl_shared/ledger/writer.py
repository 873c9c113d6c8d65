"""The machinery of writing: opening a ledger, appending an entry with its tree nodes, keeping the sums."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any, Self

import sqlalchemy as sa

from fl_shared.errors import LedgerError, SignatureError
from fl_shared.identity.signing import SigningKey, verify
from fl_shared.ledger import chain, merkle
from fl_shared.ledger.faults import fault
from fl_shared.ledger.models import OVERALL, entries, merkle_nodes, tallies, tally_keys
from fl_shared.ledger.reader import LedgerReader, current_key, entry_hash, genesis_of, now
from fl_shared.ledger.records import Entry
from fl_shared.ledger.store import Store
from fl_shared.privacy.accounting.merge import Key

FORMAT = 1

_PLACE = ("dataset", "study", *Key._fields)
_TALLY_KEY = sa.select(tally_keys.c.id).where(*(tally_keys.c[name] == sa.bindparam(name) for name in _PLACE))
_LAST_TALLY = (
    sa.select(tallies).where(tallies.c.key == sa.bindparam("number")).order_by(tallies.c.version.desc()).limit(1)
)
_INSERT_TALLY = tallies.insert()


class LedgerWriter(LedgerReader):
    """A ledger that can be appended to; the public verbs are in the classes above it."""

    def __init__(self, store: Store, site: str, key: SigningKey | None, clock: Callable[[], datetime]) -> None:
        super().__init__(store, site)
        self._key = key
        self._clock = clock

    @classmethod
    def open(
        cls,
        url: str,
        signing_key: SigningKey | None,
        site: str,
        *,
        clock: Callable[[], datetime] = now,
    ) -> Self:
        """Open the ledger of `site` at `url`, making or migrating its tables.

        With `signing_key` None it is open for reading only, and nothing is made or migrated. The last entry
        is checked; the whole chain is `fl-audit verify`'s work. Raises LedgerError when the database cannot
        be read, belongs to another site, or its last entry does not fit; SignatureError for another key.
        """
        store = Store(url, read_only=signing_key is None)
        ledger = cls(store, site, signing_key, clock)
        try:
            store.migrate()
            if signing_key is not None:
                ledger._begin()
            ledger._check_head()
        except BaseException:
            store.close()
            raise
        return ledger

    def _begin(self) -> None:
        """Write the genesis entry into an empty ledger."""
        with self._store.read() as connection:
            if chain.last_entry(connection) is not None:
                return
        with self._store.write() as connection:
            if chain.last_entry(connection) is None:
                body = {"format": FORMAT, "site": self.site, "public_key": self._signer.public_hex}
                self._append(connection, "genesis", body, point="genesis")

    def _check_head(self) -> None:
        with self._store.read() as connection:
            genesis = genesis_of(connection)
            last = chain.last_entry(connection)
            if genesis is None or last is None:
                raise LedgerError("the ledger is empty", fix="open it once with the site's agent")
            expected = current_key(connection)
        if genesis["site"] != self.site:
            raise LedgerError(
                f"this ledger belongs to site {genesis['site']!r}, not {self.site!r}",
                fix="check --site and the ledger's address",
            )
        if self._key is not None and self._key.public_hex != expected:
            raise SignatureError(
                f"this ledger is signed by key {expected[:16]}…, the site has {self._key.public_hex[:16]}…",
                fix="restore the site's signing key from its backup",
            )
        message = chain.message_bytes(
            seq=last.seq,
            kind=last.kind,
            body=chain.body_text(last.body),
            prev_hash=last.prev_hash,
            created_at=last.created_at,
            site=self.site,
        )
        try:
            # A rotation is signed by the key it replaces.
            verify(expected if last.kind != "key" else last.body["replaces"], message, last.signature)
        except SignatureError as error:
            raise LedgerError(
                f"the ledger's last entry ({last.seq}) does not bear the site's signature",
                fix="run fl-audit verify; restore the newest backup",
            ) from error

    @property
    def _signer(self) -> SigningKey:
        if self._key is None:
            raise LedgerError("this ledger is open for reading", fix="open it with the site's signing key")
        return self._key

    def _append(
        self,
        connection: sa.Connection,
        kind: str,
        body: dict[str, Any],
        *,
        point: str,
        moment: datetime | None = None,
    ) -> Entry:
        entry = chain.append(connection, self._signer, self.site, kind, body, now=moment or self._clock(), point=point)
        nodes = merkle.completed_nodes(connection, entry.seq - 1, entry.hash, lambda at: entry_hash(connection, at + 1))
        if nodes:
            connection.execute(merkle_nodes.insert(), nodes)
        fault(f"{point}.tree")
        return entry

    def _tally(
        self,
        connection: sa.Connection,
        seq: int,
        name: str,
        study: str | None,
        key: Key,
        *,
        point: str,
        held: int = 0,
        spent: int = 0,
    ) -> None:
        place = {"dataset": name, "study": study or OVERALL, **key._asdict()}
        number = connection.execute(_TALLY_KEY, place).scalar()
        if number is None:
            top = connection.execute(sa.select(sa.func.max(tally_keys.c.id))).scalar() or 0
            number = top + 1
            connection.execute(tally_keys.insert().values(id=number, **place))
            fault(f"{point}.tally-key")
        last = connection.execute(_LAST_TALLY, {"number": number}).first()
        row = {
            "seq": seq,
            "key": number,
            "version": 1 if last is None else last.version + 1,
            "held": held + (0 if last is None else last.held),
            "spent": spent + (0 if last is None else last.spent),
        }
        connection.execute(_INSERT_TALLY, row)

    def _entry(self, connection: sa.Connection, seq: int) -> Entry:
        return chain.entry_of(connection.execute(sa.select(entries).where(entries.c.seq == seq)).mappings().one())
