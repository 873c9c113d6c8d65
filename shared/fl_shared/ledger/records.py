"""What the ledger hands out: frozen facts, each read from entries that were signed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fl_shared.privacy.mechanism import Mechanism


def in_period(at: str, valid_from: str | None, valid_to: str | None) -> bool:
    """Whether a time lies in a budget's period: from its first moment until just before its last; None has no end."""
    return not ((valid_from and at < valid_from) or (valid_to and at >= valid_to))


def is_small(delta: float, units: int) -> bool:
    """Whether delta is below 1/units: a greater one would allow to publish one unit outright."""
    return delta * units < 1.0


@dataclass(frozen=True)
class Dataset:
    """One version of a registered data set.

    Attributes:
        seq: number of the entry that registered this version.
        units: number of privacy units (records or patients) in it.
        bound_per_unit: the most records of one unit that training uses.
    """

    seq: int
    name: str
    version: int
    fingerprint: str
    privacy_unit: str
    units: int
    bound_per_unit: int


@dataclass(frozen=True)
class BudgetRecord:
    """A ceiling on one data set: for one study, or overall (`study` is None).

    Attributes:
        filter_order: the Rényi order at which the gate guards the ceiling, fixed with the first version.
        valid_from, valid_to: when grants may be made (ISO 8601, UTC). A period never renews what was spent.
        approver: who approved this version.
    """

    seq: int
    dataset: str
    study: str | None
    version: int
    epsilon: float
    delta: float
    filter_order: float
    valid_from: str | None
    valid_to: str | None
    approver: str

    def is_valid(self, at: str) -> bool:
        """Whether grants may be made at this time (as the ledger writes it)."""
        return in_period(at, self.valid_from, self.valid_to)


@dataclass(frozen=True)
class Reservation:
    """A mechanism held against the budgets before private data is read."""

    seq: int
    dataset: str
    dataset_version: int
    study: str | None
    run: str
    round: int
    purpose: str
    attempt: int
    mechanism: Mechanism
    created_at: str


@dataclass(frozen=True)
class Spend:
    """A reservation and how it ended.

    Attributes:
        outcome: `open`, `settled`, `released` (voided: nothing private was read) or `in-doubt` (charged in full).
        charged: the mechanism that counts against the budgets; None when it was voided.
        settled_seq: number of the entry that ended it; None while open.
    """

    reservation: Reservation
    outcome: str
    charged: Mechanism | None
    release_digest: str | None
    reason: str
    settled_seq: int | None
    settled_at: str | None


@dataclass(frozen=True)
class Position:
    """Where a data set stands against one budget.

    Attributes:
        spent: epsilon of what is charged, by the best Rényi order, at the budget's delta.
        reserved: what open reservations would add to it.
        left: the ceiling minus `spent` and `reserved`, never below 0.
        used: share of the gate's bound that is taken, open reservations included; 1 is full. This meter
            decides; epsilon is its translation.
        steps: charged steps.
    """

    spent: float
    reserved: float
    left: float
    epsilon: float
    delta: float
    used: float
    steps: int
    accountant: str


@dataclass(frozen=True)
class Entry:
    """One link of the chain. `id` is its number as text, as receipts name it."""

    seq: int
    kind: str
    body: dict[str, Any]
    prev_hash: str
    hash: str
    signature: str
    created_at: str

    @property
    def id(self) -> str:
        """The entry's identity in a receipt: its number and its hash."""
        return f"{self.seq}:{self.hash}"


@dataclass(frozen=True)
class Head:
    """The last entry: how many there are, and the hash that pins all of them."""

    entries: int
    hash: str


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, in words that name the row.

    Attributes:
        seq: the entry, where there is one.
        breach: the record says, undamaged, that something was done which must not be, such as a grant beyond a ceiling.
    """

    message: str
    seq: int | None = None
    breach: bool = False
