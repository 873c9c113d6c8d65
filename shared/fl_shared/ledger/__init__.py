"""A site's privacy ledger: append-only, signed, never overspent.

`Ledger` is the service; `records` are the facts that it hands out; `verify` checks a whole ledger without
trusting it; `store`, `chain`, `merkle`, `queries` and `migrations` are the machinery below.
"""

from __future__ import annotations

from fl_shared.ledger.reader import LedgerReader, filter_of
from fl_shared.ledger.records import (
    BudgetRecord,
    Dataset,
    Entry,
    Head,
    Position,
    Reservation,
    Spend,
)
from fl_shared.ledger.service import Ledger

__all__ = [
    "BudgetRecord",
    "Dataset",
    "Entry",
    "Head",
    "Ledger",
    "LedgerReader",
    "Position",
    "Reservation",
    "Spend",
    "filter_of",
]
