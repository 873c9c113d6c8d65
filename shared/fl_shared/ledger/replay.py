"""Replay a ledger's signed entries and say where its state machine was broken.

Fed with entries in order, it re-decides each grant by the gate, follows each reservation to its end and
recomputes the sums that the ledger keeps as a cache. It reads nothing but signed bodies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fl_shared.errors import ConcordatError
from fl_shared.ledger.models import OUTCOMES, SETTLED, VOIDED
from fl_shared.ledger.records import Problem, in_period, is_small
from fl_shared.privacy.accounting.gate import Filter
from fl_shared.privacy.accounting.merge import Key
from fl_shared.privacy.accounting.renyi import step_curve

# The replay adds millions of doubles one by one; the gate itself sums exactly.
_TOLERANCE = 1e-6

Place = tuple[str, str]  # (data set, study)


@dataclass(slots=True, eq=False)
class Total:
    """Steps of one mechanism at one place; there is one object for each pair, so identity compares them.

    Attributes:
        prices: what one step costs each budget that it touches; None until asked for.
        granted: whether a budget allows grants here at all; known with the prices.
    """

    place: Place
    key: Key
    held: int = 0
    spent: int = 0
    prices: list[tuple[_Ceiling, float]] | None = None
    granted: bool = False


@dataclass(slots=True, eq=False)
class _Ceiling:
    """The newest version of one budget, and what is charged against it.

    Attributes:
        most: the gate's bound with the replay's tolerance; `cost` must not pass it.
        small: whether delta is known to be below 1/units of the data set.
    """

    place: Place
    body: dict[str, Any]
    gate: Filter
    bound: float
    most: float
    cost: float = 0.0
    small: bool = False


class Replay:
    """The state of a ledger as its signed entries tell it."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.datasets: dict[str, dict[str, Any]] = {}
        self.dataset_names: dict[int, str] = {}
        self.neighbours: dict[str, set[str]] = {}
        self.budgets: dict[Place, dict[str, Any]] = {}
        self.open: dict[int, tuple[Total, int]] = {}
        self.settled = dict.fromkeys(OUTCOMES, 0)
        self.reservations = 0
        self._totals: dict[tuple[Place, Key], Total] = {}
        self._ceilings: dict[Place, _Ceiling] = {}
        self._bodies: dict[tuple[Any, ...], tuple[Total, int]] = {}
        self._handlers: dict[str, Callable[[int, Any, str], Total | None]] = {
            "dataset": self._dataset,
            "overlap": self._overlap,
            "budget": self._budget,
            "reservation": self._reservation,
            "settlement": self._settlement,
        }

    def feed(self, seq: int, kind: str, body: Any, created_at: str) -> Total | None:
        """Take the next entry, as a stretch's events give it; return the sum that it changed, if any."""
        handler = self._handlers.get(kind)
        if handler is None:
            return None
        try:
            return handler(seq, body, created_at)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, ConcordatError) as error:
            message = f"entry {seq}: this {kind} cannot be understood ({type(error).__name__}: {error})"
            self.problems.append(Problem(message, seq))
            return None

    def charges(self, place: Place) -> tuple[dict[Key, int], dict[Key, int]]:
        """Return (spent, held) steps by mechanism that count against the budget at `place`."""
        names = {place[0], *self.neighbours.get(place[0], ())}
        spent: dict[Key, int] = {}
        held: dict[Key, int] = {}
        for total in self._totals.values():
            if total.place[0] in names and place[1] in {"", total.place[1]}:
                for merged, steps in ((spent, total.spent), (held, total.held)):
                    if steps:
                        merged[total.key] = merged.get(total.key, 0) + steps
        return dict(sorted(spent.items())), dict(sorted(held.items()))

    def _say(self, seq: int, message: str) -> None:
        self.problems.append(Problem(message, seq, breach=True))

    def _dataset(self, seq: int, body: dict[str, Any], _at: str) -> None:
        last = self.datasets.get(body["name"])
        if body["version"] != (1 if last is None else last["version"] + 1):
            self._say(seq, f"entry {seq}: version {body['version']} of {body['name']!r} does not follow")
        if last is not None and last["privacy_unit"] != body["privacy_unit"]:
            self._say(seq, f"entry {seq}: the privacy unit of {body['name']!r} changed")
        self.datasets[body["name"]] = body
        self.dataset_names[seq] = body["name"]
        for ceiling in self._ceilings.values():
            self._compare_delta(ceiling)

    def _overlap(self, _seq: int, body: dict[str, Any], _at: str) -> None:
        first, second = body["first"], body["second"]
        self.neighbours.setdefault(first, set()).add(second)
        self.neighbours.setdefault(second, set()).add(first)
        self._recount()

    def _budget(self, seq: int, body: dict[str, Any], _at: str) -> None:
        place = (body["dataset"], body["study"])
        last = self.budgets.get(place)
        if body["version"] != (1 if last is None else last["version"] + 1):
            self._say(seq, f"entry {seq}: version {body['version']} of this budget does not follow")
        if last is not None and last["filter_order"] != body["filter_order"]:
            spent, held = self.charges(place)
            if spent or held:
                self._say(seq, f"entry {seq}: the filter's order changed after data had been used")
        if not body["approver"]:
            self._say(seq, f"entry {seq}: the budget names no approver")
        gate = Filter(body["epsilon"], body["delta"], body["filter_order"])
        ceiling = _Ceiling(place, body, gate, gate.bound, gate.bound * (1 + _TOLERANCE))
        self._ceilings[place] = ceiling
        self._compare_delta(ceiling)
        self.budgets[place] = body
        self._recount()

    def _compare_delta(self, ceiling: _Ceiling) -> None:
        dataset = self.datasets.get(ceiling.place[0])
        ceiling.small = dataset is not None and is_small(ceiling.body["delta"], dataset["units"])

    def _recount(self) -> None:
        for total in self._totals.values():
            total.prices = None
        for ceiling in self._ceilings.values():
            spent, held = self.charges(ceiling.place)
            ceiling.cost = ceiling.gate.cost(spent) + ceiling.gate.cost(held)

    def _prices(self, total: Total) -> list[tuple[_Ceiling, float]]:
        """Return what one step costs each budget that it touches, and set whether one allows grants here."""
        dataset, study = place = total.place
        names = {dataset, *self.neighbours.get(dataset, ())}
        touched = [ceiling for at, ceiling in self._ceilings.items() if at[0] in names and at[1] in {"", study}]
        places = [ceiling.place for ceiling in touched]
        total.granted = any(name == dataset for name, _study in places) and (not study or place in places)
        total.prices = [(ceiling, step_curve(total.key, (ceiling.gate.order,))[0]) for ceiling in touched]
        return total.prices

    def _reservation(self, seq: int, body: tuple[Any, ...], at: str) -> Total:
        known = self._bodies.get(body)
        if known is None:
            dataset, study, _seq, kind, neighbouring, noise, sampling, steps = body
            place, key = (dataset, study), Key(kind, neighbouring, noise, sampling)
            total = self._totals.setdefault((place, key), Total(place, key))
            known = self._bodies[body] = (total, steps)
        total, steps = self.open[seq] = known
        self.reservations += 1
        total.held += steps
        if self.dataset_names.get(body[2]) != body[0]:
            self._say(seq, f"entry {seq}: data set entry {body[2]} is not {body[0]!r}")
        prices = total.prices
        if prices is None:
            prices = self._prices(total)
        if not total.granted:
            self._say(seq, f"entry {seq}: granted without a budget for {body[0]!r} {body[1]}".rstrip())
        for ceiling, price in prices:
            ceiling.cost += steps * price
            terms = ceiling.body
            since, until = terms["valid_from"], terms["valid_to"]
            if not (ceiling.cost <= ceiling.most and ceiling.small) or since or until:
                self._check_grant(seq, ceiling, at)
        return total

    def _check_grant(self, seq: int, ceiling: _Ceiling, at: str) -> None:
        (name, study), body = ceiling.place, ceiling.body
        if not ceiling.cost <= ceiling.most:
            self._say(
                seq,
                f"entry {seq}: granted beyond the ceiling of {name!r} {study}".rstrip()
                + f" ({ceiling.cost / ceiling.bound:.2%} of the bound)",
            )
        if not in_period(at, body["valid_from"], body["valid_to"]):
            self._say(seq, f"entry {seq}: granted outside the budget's period")
        if not is_small(body["delta"], self.datasets[name]["units"]):
            self._say(seq, f"entry {seq}: granted at a delta of 1/units or more")

    def _settlement(self, seq: int, body: tuple[Any, ...], _at: str) -> Total:
        reservation, steps, outcome, digest = body
        opened = self.open.pop(reservation, None)
        if opened is None:
            raise ValueError(f"reservation {reservation} is not open")
        total, reserved = opened
        self.settled[outcome] += 1
        most, least = (0, 0) if outcome == VOIDED else (reserved, 1 if outcome == SETTLED else reserved)
        if not least <= steps <= most:
            self._say(seq, f"entry {seq}: {outcome} with {steps} of {reserved} reserved steps")
        if (outcome == SETTLED) != bool(digest):
            self._say(seq, f"entry {seq}: {outcome} with release digest {digest!r}")
        total.held -= reserved
        total.spent += steps
        if steps != reserved:
            for ceiling, price in self._prices(total) if total.prices is None else total.prices:
                ceiling.cost += (steps - reserved) * price
        return total
