"""Replay a ledger's signed entries and say where its state machine was broken.

Fed with entries in order, it re-decides each grant by the gate, follows each reservation to its end and
recomputes the sums that the ledger keeps as a cache. It reads nothing but signed bodies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fl_shared.accounting.gate import Filter
from fl_shared.accounting.merge import Key
from fl_shared.accounting.renyi import step_curve
from fl_shared.errors import ConcordatError
from fl_shared.ledger.models import OUTCOMES
from fl_shared.ledger.records import Problem

# The replay adds millions of doubles one by one; the gate itself sums exactly.
_TOLERANCE = 1e-6

Place = tuple[str, str]  # (data set, study)


class Replay:
    """The state of a ledger as its signed entries tell it."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.datasets: dict[str, dict[str, Any]] = {}
        self.dataset_names: dict[int, str] = {}
        self.neighbours: dict[str, set[str]] = {}
        self.budgets: dict[Place, dict[str, Any]] = {}
        self.open: dict[int, tuple[Place, Key, int]] = {}
        self.held: dict[tuple[Place, Key], int] = {}
        self.spent: dict[tuple[Place, Key], int] = {}
        self.settled = dict.fromkeys(OUTCOMES, 0)
        self.reservations = 0
        self._gates: dict[Place, Filter] = {}
        self._bounds: dict[Place, float] = {}
        self._costs: dict[Place, float] = {}
        self._reach: dict[Place, list[Place]] = {}
        self._priced: dict[tuple[Place, Key], list[tuple[Place, float]]] = {}
        self._bodies: dict[tuple[Any, ...], tuple[Place, Key, int]] = {}
        self._changed: tuple[Place, Key] | None = None
        self._handlers: dict[str, Callable[[int, Any, str], None]] = {
            "dataset": self._dataset,
            "overlap": self._overlap,
            "budget": self._budget,
            "reservation": self._reservation,
            "settlement": self._settlement,
        }

    def feed(self, seq: int, kind: str, body: Any, created_at: str) -> tuple[Place, Key] | None:
        """Take the next entry, as a stretch's events give it; return the sum that it changed, if any."""
        handler = self._handlers.get(kind)
        if handler is None:
            return None
        self._changed = None
        try:
            handler(seq, body, created_at)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, ConcordatError) as error:
            what = f"entry {seq}: this {kind} cannot be understood ({type(error).__name__}: {error})"
            self.problems.append(Problem(what, seq))
            return None
        return self._changed

    def charges(self, place: Place) -> tuple[dict[Key, int], dict[Key, int]]:
        """Return (spent, held) steps by mechanism that count against the budget at `place`."""
        names = {place[0], *self.neighbours.get(place[0], ())}
        found: list[dict[Key, int]] = []
        for sums in (self.spent, self.held):
            merged: dict[Key, int] = {}
            for ((name, study), key), steps in sums.items():
                if steps and name in names and place[1] in {"", study}:
                    merged[key] = merged.get(key, 0) + steps
            found.append(dict(sorted(merged.items())))
        return found[0], found[1]

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
        gate = self._gates[place] = Filter(body["epsilon"], body["delta"], body["filter_order"])
        self._bounds[place] = gate.bound
        self.budgets[place] = body
        self._recount()

    def _recount(self) -> None:
        self._reach.clear()
        self._priced.clear()
        for place, gate in self._gates.items():
            spent, held = self.charges(place)
            self._costs[place] = gate.cost(spent) + gate.cost(held)

    def _touched(self, place: Place) -> list[Place]:
        found = self._reach.get(place)
        if found is None:
            names = {place[0], *self.neighbours.get(place[0], ())}
            found = [at for at in self._gates if at[0] in names and at[1] in {"", place[1]}]
            self._reach[place] = found
        return found

    def _move(self, place: Place, key: Key, steps: int) -> None:
        for at, cost in self._prices(place, key):
            self._costs[at] += steps * cost

    def _prices(self, place: Place, key: Key) -> list[tuple[Place, float]]:
        """Return what one step of `key` at `place` costs each budget that it touches."""
        found = self._priced.get((place, key))
        if found is None:
            found = [(at, step_curve(key, (self._gates[at].order,))[0]) for at in self._touched(place)]
            self._priced[place, key] = found
        return found

    def _reservation(self, seq: int, body: tuple[Any, ...], at: str) -> None:
        dataset, study, dataset_seq, kind, neighbouring, noise, sampling, steps = body
        known = self._bodies.get(body)
        if known is None:
            place, key = (dataset, study), Key(kind, neighbouring, noise, sampling)
            known = self._bodies[body] = (place, key, steps)
        place, key, _steps = self.open[seq] = known
        self.reservations += 1
        changed = (place, key)
        self.held[changed] = self.held.get(changed, 0) + steps
        if self.dataset_names.get(dataset_seq) != dataset:
            self._say(seq, f"entry {seq}: data set entry {dataset_seq} is not {dataset!r}")
        self._move(place, key, steps)
        self._check_grant(seq, place, at)
        self._changed = changed

    def _check_grant(self, seq: int, place: Place, at: str) -> None:
        touched = self._touched(place)
        if not any(budget[0] == place[0] for budget in touched) or (place[1] and place not in touched):
            self._say(seq, f"entry {seq}: granted without a budget for {place[0]!r} {place[1]}".rstrip())
        for budget in touched:
            body, bound = self.budgets[budget], self._bounds[budget]
            if not self._costs[budget] <= bound * (1 + _TOLERANCE):
                self._say(
                    seq,
                    f"entry {seq}: granted beyond the ceiling of {budget[0]!r} {budget[1]}".rstrip()
                    + f" ({self._costs[budget] / bound:.2%} of the bound)",
                )
            if (body["valid_from"] and at < body["valid_from"]) or (body["valid_to"] and at >= body["valid_to"]):
                self._say(seq, f"entry {seq}: granted outside the budget's period")
            if not body["delta"] * self.datasets[budget[0]]["units"] < 1:
                self._say(seq, f"entry {seq}: granted at a delta of 1/units or more")

    def _settlement(self, seq: int, body: tuple[Any, ...], _at: str) -> None:
        reservation, steps, outcome, digest = body
        found = self.open.pop(reservation, None)
        if found is None:
            raise ValueError(f"reservation {reservation} is not open")
        place, key, reserved = found
        self.settled[outcome] += 1
        fair = {"settled": 0 < steps <= reserved, "released": steps == 0, "in-doubt": steps == reserved}
        if not fair[outcome]:
            self._say(seq, f"entry {seq}: {outcome} with {steps} of {reserved} reserved steps")
        if (outcome == "settled") != bool(digest):
            self._say(seq, f"entry {seq}: {outcome} with release digest {digest!r}")
        changed = (place, key)
        self.held[changed] -= reserved
        self.spent[changed] = self.spent.get(changed, 0) + steps
        if steps != reserved:
            self._move(place, key, steps - reserved)
        self._changed = changed
