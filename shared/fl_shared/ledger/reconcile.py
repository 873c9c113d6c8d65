"""Two copies that must agree: the site's ledger, which is the authority, and the coordinator's receipts.

Each receipt is opened with the site's keys and held, field by field, against the entry that it names and
against the state of the ledger at that moment; each release in the ledger must have a receipt.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from fl_shared.documents.round import Receipt
from fl_shared.errors import ConcordatError
from fl_shared.ledger import chain, merkle
from fl_shared.ledger.models import SETTLED, entries
from fl_shared.ledger.reader import LedgerReader, entry_hash
from fl_shared.ledger.receipts import StoredReceipt
from fl_shared.ledger.records import Spend
from fl_shared.ledger.replay import Replay
from fl_shared.ledger.stretch import EVENT_FIELDS
from fl_shared.names import ALONE
from fl_shared.privacy.accounting.renyi import curve_epsilon

_TOLERANCE = 1e-6  # of epsilon; versions of the accountant may differ in the last digits


@dataclass(frozen=True)
class Divergence:
    """One thing on which the copies do not agree.

    Attributes:
        kind: `missing` (the ledger has a release, the coordinator no receipt), `extra` (the coordinator has a
            receipt, the ledger no such entry), `different` (both, and they contradict each other) or `unsigned`
            (no key of the site signed it).
    """

    kind: str
    message: str
    run: str
    round: int | None
    entry: str


def reconcile(ledger: LedgerReader, stored: Iterable[StoredReceipt]) -> list[Divergence]:
    """Return every divergence between the ledger and the receipts, in the order of the ledger."""
    keys = site_keys(ledger)
    divergences: list[Divergence] = []
    opened: list[Receipt] = []
    for stored_receipt in stored:
        try:
            receipt = stored_receipt.opened(keys)
        except ConcordatError as error:
            claims = stored_receipt.claims
            number = claims.get("round")
            divergences.append(
                Divergence(
                    "unsigned",
                    f"the coordinator's receipt for run {claims.get('run')}, round {number} is not this site's: "
                    f"{error.message}",
                    str(claims.get("run")),
                    number if isinstance(number, int) else None,
                    str(claims.get("entry_id")),
                )
            )
            continue
        opened.append(receipt)
    spends = {spend.settled_seq: spend for spend in ledger.spends() if spend.outcome == SETTLED}
    with_receipt: set[int] = set()
    epsilons = _epsilons(ledger, opened, spends)
    for index, receipt in sorted(enumerate(opened), key=lambda pair: pair[1].ledger_entries):
        spend = spends.get(_entry_number(receipt))
        if spend is None or spend.settled_seq is None:
            divergences.append(_named(receipt, "extra", "the ledger has no such settled entry"))
            continue
        with_receipt.add(spend.settled_seq)
        divergences += [
            _named(receipt, "different", f"its {name} is {is_!r}, the ledger says {should!r}")
            for name, (is_, should) in _fields(ledger, receipt, spend, epsilons.get(index)).items()
            if not _same(is_, should)
        ]
    for seq, spend in spends.items():
        reservation = spend.reservation
        alone = reservation.run.startswith(ALONE)  # never leaves the site, and has no receipt
        if seq not in with_receipt and reservation.purpose == "training" and not alone:
            divergences.append(
                Divergence(
                    "missing",
                    f"entry {seq} released run {reservation.run}, round {reservation.round}; "
                    "the coordinator has no receipt for it",
                    reservation.run,
                    reservation.round,
                    str(seq),
                )
            )
    return divergences


def site_keys(ledger: LedgerReader) -> list[str]:
    """Return every public key that the ledger names for its site, oldest first."""
    return [str(entry.body.get("public_key")) for entry in ledger.key_entries()]


def _entry_number(receipt: Receipt) -> int:
    """Return the number of the entry that a receipt names, -1 when it names none."""
    number = receipt.entry_id.partition(":")[0]
    return int(number) if re.fullmatch("[0-9]{1,18}", number) else -1


def _named(receipt: Receipt, kind: str, difference: str) -> Divergence:
    return Divergence(
        kind,
        f"the receipt for run {receipt.run}, round {receipt.round} (entry {receipt.entry_id[:24]}…): {difference}",
        receipt.run,
        receipt.round,
        receipt.entry_id,
    )


def _fields(
    ledger: LedgerReader, receipt: Receipt, spend: Spend, epsilon: float | None
) -> Mapping[str, tuple[Any, Any]]:
    """Return (receipt's, ledger's) value of everything that both know."""
    reservation, seq = spend.reservation, spend.settled_seq
    with ledger.reading() as connection:
        last = chain.last_entry(connection)
        size = receipt.ledger_entries
        within = last is not None and size <= last.seq
        head = entry_hash(connection, size) if within else "fewer entries than that"
        root = merkle.stored_root(connection, size, lambda at: entry_hash(connection, at + 1)) if within else ""
        digest = entry_hash(connection, int(seq or 0))
    compared: dict[str, tuple[Any, Any]] = {
        "entry_id": (receipt.entry_id, f"{seq}:{digest}"),
        "run": (receipt.run, reservation.run),
        "round": (receipt.round, reservation.round),
        "update_digest": (receipt.update_digest, spend.release_digest),
        "mechanism": (receipt.mechanism, spend.charged),
        "steps_executed": (receipt.steps_executed, spend.charged.steps if spend.charged else 0),
        "ledger_head": (receipt.ledger_head, head),
    }
    if within:
        compared["merkle_root"] = (receipt.merkle_root, root)
    if epsilon is not None:
        compared["epsilon_spent_total"] = (receipt.epsilon_spent_total, epsilon)
    return compared


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, float) and isinstance(second, float):
        return math.isclose(first, second, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
    return bool(first == second)


def _epsilons(ledger: LedgerReader, opened: list[Receipt], spends: Mapping[int | None, Spend]) -> dict[int, float]:
    """Return what each receipt's epsilon must be: recomputed from the entries that it pins, by its index."""
    by_entries: dict[int, list[int]] = {}
    for index, receipt in enumerate(opened):
        by_entries.setdefault(receipt.ledger_entries, []).append(index)
    expected: dict[int, float] = {}
    state = Replay()
    with ledger.reading() as connection:
        query = sa.select(entries).order_by(entries.c.seq).execution_options(yield_per=1000)
        for row in connection.execute(query).mappings():
            entry = chain.entry_of(row)
            short = EVENT_FIELDS.get(entry.kind)
            body = entry.body if short is None else tuple(entry.body.get(name) for name in short)
            state.feed(entry.seq, entry.kind, body, entry.created_at)
            for index in by_entries.get(entry.seq, ()):
                receipt = opened[index]
                spend = spends.get(_entry_number(receipt))
                if spend is not None and 0.0 < receipt.delta < 1.0:
                    spent, _held = state.charges((spend.reservation.dataset, ""))
                    expected[index] = curve_epsilon(spent, receipt.delta)
    return expected
