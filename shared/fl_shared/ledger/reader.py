"""The reading half of the ledger: what an auditor may do, and what the writing half builds on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import Any, Self

import sqlalchemy as sa

from fl_shared.errors import LedgerError
from fl_shared.ledger import chain, merkle, queries
from fl_shared.ledger.models import entries, keys
from fl_shared.ledger.records import BudgetRecord, Dataset, Entry, Head, Position, Reservation, Spend
from fl_shared.ledger.store import Store
from fl_shared.privacy.accounting.gate import Filter
from fl_shared.privacy.accounting.renyi import curve_epsilon

ACCOUNTANT = "rdp"


def filter_of(budget: BudgetRecord) -> Filter:
    """Return the gate that guards `budget`."""
    return Filter(epsilon=budget.epsilon, delta=budget.delta, order=budget.filter_order)


def now() -> datetime:
    """Return the system's time, UTC."""
    return datetime.now(UTC)


class LedgerReader:
    """A ledger opened for reading. Make one with `Ledger.open(url, None, site)`."""

    def __init__(self, store: Store, site: str) -> None:
        self._store = store
        self.site = site

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the database connections back."""
        self._store.close()

    @property
    def url(self) -> str:
        """The database address, without a password."""
        return self._store.name

    def reading(self) -> AbstractContextManager[sa.Connection]:
        """Return one read transaction, for the audit's own queries."""
        return self._store.read()

    def datasets(self) -> list[Dataset]:
        """Return every version of every data set, by name and version."""
        with self._store.read() as connection:
            return queries.all_datasets(connection)

    def dataset(self, name: str) -> Dataset:
        """Return the newest version of a data set; raises LedgerError when there is none."""
        with self._store.read() as connection:
            return self._known(connection, name)

    def budgets(self, dataset: Dataset | str | None = None) -> list[BudgetRecord]:
        """Return the budgets in their newest versions, of one data set or of all."""
        names = None if dataset is None else [name_of(dataset)]
        with self._store.read() as connection:
            return queries.current_budgets(connection, names)

    def overlapping(self, dataset: Dataset | str) -> list[str]:
        """Return the data sets declared to share privacy units with this one."""
        with self._store.read() as connection:
            return queries.overlapping(connection, name_of(dataset))

    def spends(
        self, *, dataset: Dataset | str | None = None, run: str | None = None, open_only: bool = False
    ) -> Iterator[Spend]:
        """Yield every reservation with how it ended, oldest first, without holding them all in memory."""
        name = None if dataset is None else name_of(dataset)
        with self._store.read() as connection:
            yield from queries.spends(connection, dataset=name, run=run, open_only=open_only, stream=True)

    def open_reservations(self) -> list[Reservation]:
        """Return the reservations that have not ended."""
        return [spend.reservation for spend in self.spends(open_only=True)]

    def charges(self, dataset: Dataset | str, study: str | None = None) -> queries.Charges:
        """Return what counts against the data set's budgets: its own and its overlaps' mechanisms, merged."""
        with self._store.read() as connection:
            return self._charges(connection, name_of(dataset), study)

    def epsilon(self, dataset: Dataset | str, budget: BudgetRecord | None = None) -> Position:
        """Return where a data set stands against `budget` (default: its overall or only budget).

        Raises LedgerError when the data set has no budget or several studies' and no overall one.
        """
        name = name_of(dataset)
        with self._store.read() as connection:
            if budget is None:
                budget = self._main_budget(connection, name)
            charges = self._charges(connection, budget.dataset, budget.study)
        return position_of(budget, charges)

    def head(self) -> Head:
        """Return the chain's head."""
        with self._store.read() as connection:
            return chain.head_of(chain.last_entry(connection))

    def entry(self, seq: int) -> Entry:
        """Return one entry; raises LedgerError when it does not exist."""
        with self._store.read() as connection:
            row = connection.execute(sa.select(entries).where(entries.c.seq == seq)).mappings().first()
        if row is None:
            raise LedgerError(f"the ledger has no entry {seq}", fix="fl-audit spends lists what there is")
        return chain.entry_of(row)

    def checkpoint(self) -> dict[str, Any]:
        """Return `{"entries", "head", "merkle_root"}`: pins the whole ledger as of now.

        A site puts it into each receipt, so that it cannot rewrite what came before.
        """
        with self._store.read() as connection:
            head = chain.head_of(chain.last_entry(connection))
            root = merkle.stored_root(connection, head.entries, lambda at: entry_hash(connection, at + 1))
        return {"entries": head.entries, "head": head.hash, "merkle_root": root}

    def public_key(self) -> str:
        """Return the key that signs new entries, 64 hex digits, as the ledger itself names it."""
        with self._store.read() as connection:
            return current_key(connection)

    def key_entries(self) -> list[Entry]:
        """Return the entries that name the site's keys: the genesis, then each rotation."""
        query = sa.select(entries).where(entries.c.kind.in_(("genesis", "key"))).order_by(entries.c.seq)
        with self._store.read() as connection:
            return [chain.entry_of(row) for row in connection.execute(query).mappings()]

    def _known(self, connection: sa.Connection, name: str) -> Dataset:
        dataset = queries.latest_dataset(connection, name)
        if dataset is None:
            raise LedgerError(f"data set {name!r} is not registered", fix="register it before it is used")
        return dataset

    def _charges(self, connection: sa.Connection, name: str, study: str | None) -> queries.Charges:
        return queries.charges(connection, [name, *queries.overlapping(connection, name)], study)

    def _main_budget(self, connection: sa.Connection, name: str) -> BudgetRecord:
        current = queries.current_budgets(connection, [name])
        overall = [budget for budget in current if budget.study is None] or (current if len(current) == 1 else [])
        if not overall:
            raise LedgerError(f"data set {name!r} has {len(current)} budgets and none overall", fix="name the budget")
        return overall[0]


def name_of(dataset: Dataset | str) -> str:
    """Return a data set's name."""
    return dataset if isinstance(dataset, str) else dataset.name


def position_of(budget: BudgetRecord, charges: queries.Charges) -> Position:
    """Return the position of merged charges against `budget`."""
    spent = curve_epsilon(charges.spent, budget.delta)
    together = curve_epsilon(charges.together, budget.delta)
    return Position(
        spent=spent,
        reserved=together - spent,
        left=max(0.0, budget.epsilon - together),
        epsilon=budget.epsilon,
        delta=budget.delta,
        used=filter_of(budget).used(charges.together),
        steps=sum(charges.spent.values()),
        accountant=ACCOUNTANT,
    )


_ENTRY_HASH = sa.select(entries.c.hash).where(entries.c.seq == sa.bindparam("seq"))


def entry_hash(connection: sa.Connection, seq: int) -> str:
    """Return the hash of entry `seq`."""
    return str(connection.execute(_ENTRY_HASH, {"seq": seq}).scalar_one())


def genesis_of(connection: sa.Connection) -> Mapping[str, Any] | None:
    """Return the first entry's body, or None in an empty ledger; raises LedgerError when it is no genesis."""
    row = connection.execute(sa.select(entries).where(entries.c.seq == 1)).mappings().first()
    if row is None:
        return None
    first = chain.entry_of(row)
    if first.kind != "genesis":
        raise LedgerError("the ledger's first entry is no genesis", fix="restore a backup and verify it")
    return first.body


def current_key(connection: sa.Connection) -> str:
    """Return the public key that signs new entries: the newest rotation's, else the genesis entry's."""
    rotated = connection.execute(sa.select(keys.c.public_key).order_by(keys.c.seq.desc()).limit(1)).scalar()
    if rotated is not None:
        return str(rotated)
    genesis = genesis_of(connection)
    if genesis is None:
        raise LedgerError("the ledger is empty", fix="open it once with the site's agent")
    return str(genesis["public_key"])
