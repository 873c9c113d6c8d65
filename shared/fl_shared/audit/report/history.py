"""How a budget was used up: epsilon after each charge, thinned to what a chart can show."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fl_shared.ledger import BudgetRecord, LedgerReader
from fl_shared.ledger.reader import filter_of
from fl_shared.privacy.accounting.merge import Key, key_of
from fl_shared.privacy.accounting.renyi import curve_epsilon


@dataclass(frozen=True)
class Point:
    """The state after a charge. `entry` is the ledger's number, `at` ISO 8601, `used` the gate's share."""

    entry: int
    at: str
    run: str
    round: int
    epsilon: float
    used: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def history(ledger: LedgerReader, budget: BudgetRecord, most: int = 200) -> list[Point]:
    """Return at most about `most` points of what is charged to `budget`, open reservations included, in order."""
    names = {budget.dataset, *ledger.overlapping(budget.dataset)}
    charges: list[tuple[int, str, str, int, Key, int]] = []
    for spend in ledger.spends():
        reservation = spend.reservation
        if spend.charged is None or reservation.dataset not in names or budget.study not in (None, reservation.study):
            continue
        seq, at = spend.settled_seq or reservation.seq, spend.settled_at or reservation.created_at
        charges.append((seq, at, reservation.run, reservation.round, key_of(spend.charged), spend.charged.steps))
    charges.sort(key=lambda charge: charge[0])
    gate, total = filter_of(budget), dict[Key, int]()
    step = max(1, len(charges) // most)
    points = []
    for number, (seq, at, run, round_, key, steps) in enumerate(charges, 1):
        total[key] = total.get(key, 0) + steps
        if number % step == 0 or number == len(charges):
            points.append(Point(seq, at, run, round_, curve_epsilon(total, budget.delta), gate.used(total)))
    return points
