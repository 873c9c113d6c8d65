"""What is registered before anything is spent: data sets, overlaps, budgets, keys."""

from __future__ import annotations

import math
from collections.abc import Collection
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from fl_shared.errors import ConfigError
from fl_shared.identity.signing import SigningKey
from fl_shared.ledger import chain, queries
from fl_shared.ledger.faults import fault
from fl_shared.ledger.models import OVERALL, budgets, datasets, keys, overlaps
from fl_shared.ledger.reader import name_of
from fl_shared.ledger.records import BudgetRecord, Dataset, Entry, is_small
from fl_shared.ledger.writer import LedgerWriter
from fl_shared.privacy.accounting.gate import Filter, default_order
from fl_shared.privacy.accounting.merge import key_of
from fl_shared.privacy.mechanism import Mechanism

_SAID = "the site's configuration says that they share units ([data] shares_units_with)"


class Registry(LedgerWriter):
    """Registers data sets and approves budgets, each as a signed entry."""

    def register_dataset(
        self,
        name: str,
        fingerprint: str,
        privacy_unit: str,
        units: int,
        bound_per_unit: int,
        *,
        shares_with: Collection[str] = (),
    ) -> Dataset:
        """Register a data set, or a new version of it when its fingerprint or size changed; idempotent.

        A new version is charged to the same budgets: the same people must be assumed to be in it. So must they in
        a data set of another name with the same fingerprint: it is refused, unless `shares_with` names it, by which
        both are recorded as overlapping (`declare_overlap`), as is every other data set in `shares_with`.

        Raises:
            ConfigError: the privacy unit changed, because sums over different units mean nothing; the same data are
                registered under another name; `shares_with` names a data set that is not, or has another unit.
        """
        for text, field in ((name, "name"), (fingerprint, "fingerprint"), (privacy_unit, "privacy unit")):
            if not text or len(text) > 200:
                raise ConfigError(f"data set {field} {text!r} is not usable", fix="use 1 to 200 characters")
        for number, field in ((units, "units"), (bound_per_unit, "bound_per_unit")):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ConfigError(f"data set {field} {number!r} is not usable", fix="use a whole number from 1")
        with self._store.write() as connection:
            last = queries.latest_dataset(connection, name)
            shared = self._sharing(connection, name, fingerprint, privacy_unit, shares_with)
            if last is not None:
                if last.privacy_unit != privacy_unit:
                    raise ConfigError(
                        f"data set {name!r} is kept per {last.privacy_unit}, not per {privacy_unit}",
                        fix="keep the unit; a smaller unit would hide what was spent",
                    )
                same = (last.fingerprint, last.units, last.bound_per_unit)
                if same == (fingerprint, units, bound_per_unit):
                    for other in shared:
                        self._overlap(connection, name, other, _SAID)
                    return last
            body = {
                "name": name,
                "version": 1 if last is None else last.version + 1,
                "fingerprint": fingerprint,
                "privacy_unit": privacy_unit,
                "units": units,
                "bound_per_unit": bound_per_unit,
            }
            entry = self._append(connection, "dataset", body, point="dataset")
            connection.execute(datasets.insert().values(seq=entry.seq, **body))
            fault("dataset.row")
            for other in shared:
                self._overlap(connection, name, other, _SAID)
        fault("dataset.committed")
        return queries.dataset_of({"seq": entry.seq, **body})

    def _sharing(
        self, connection: sa.Connection, name: str, fingerprint: str, privacy_unit: str, shares_with: Collection[str]
    ) -> list[str]:
        """Return the data sets of which it must still be recorded that they overlap with `name`."""
        known = queries.all_datasets(connection)
        units = {registered.name: registered.privacy_unit for registered in known if registered.name != name}
        for other in shares_with:
            if other not in units:
                raise ConfigError(
                    f"data set {other!r} is not registered, so {name!r} cannot share its units",
                    fix=f"name one of {', '.join(sorted(units)) or 'none: there is no other'}",
                )
            if units[other] != privacy_unit:
                raise ConfigError(
                    f"{name!r} is kept per {privacy_unit}, and {other!r} per {units[other]}",
                    fix=f"keep {name!r} per {units[other]}, too: one budget cannot be charged in two units",
                )
        already = {name, *queries.overlapping(connection, name)}
        for registered in known:
            if (
                registered.fingerprint == fingerprint
                and registered.name not in already
                and registered.name not in shares_with
            ):
                raise ConfigError(
                    f"data set {name!r} has the very records that are registered as {registered.name!r}: "
                    "under another name they would get a second budget",
                    fix=f'set [data] name = "{registered.name}", or shares_units_with = ["{registered.name}"], '
                    "so that what one spends counts against both",
                )
        return sorted(set(shares_with) - already)

    def declare_overlap(self, first: Dataset | str, second: Dataset | str, reason: str) -> None:
        """Declare that two data sets share privacy units: each one's mechanisms count against both.

        Raises ConfigError when their privacy units differ, LedgerError when one is not registered.
        """
        names = sorted((name_of(first), name_of(second)))
        if names[0] == names[1] or not reason:
            raise ConfigError("an overlap needs two data sets and a reason", fix="name both, and say why")
        with self._store.write() as connection:
            units = {self._known(connection, name).privacy_unit for name in names}
            if len(units) > 1:
                raise ConfigError(
                    f"{names[0]!r} and {names[1]!r} are kept per {' and per '.join(sorted(units))}",
                    fix="register both with the larger unit (the patient)",
                )
            if names[1] in queries.overlapping(connection, names[0]):
                return
            self._overlap(connection, names[0], names[1], reason)
        fault("overlap.committed")

    def _overlap(self, connection: sa.Connection, dataset: str, other: str, reason: str) -> None:
        first, second = sorted((dataset, other))
        body = {"first": first, "second": second, "reason": reason}
        entry = self._append(connection, "overlap", body, point="overlap")
        connection.execute(overlaps.insert().values(seq=entry.seq, **body))
        fault("overlap.row")

    def set_budget(
        self,
        dataset: Dataset | str,
        epsilon: float,
        delta: float,
        approver: str,
        study: str | None = None,
        valid_from: datetime | None = None,
        valid_to: datetime | None = None,
        *,
        planned: tuple[Mechanism, ...] = (),
    ) -> BudgetRecord:
        """Set or change the ceiling of a data set (for one study, or overall); idempotent.

        A change is a new signed entry that names its approver. The Rényi order of the gate is fixed by the
        first version, from `planned` mechanisms if given, and kept, because it must not depend on results.
        Raises ConfigError for an epsilon or delta that is no ceiling, or a delta of 1/units or more.
        """
        name = name_of(dataset)
        if not approver or len(approver) > 200:
            raise ConfigError("a budget needs its approver's name", fix="say who approved it")
        if not isinstance(epsilon, int | float) or not 0.0 < epsilon < 1e6:
            raise ConfigError(f"epsilon {epsilon!r} is not a ceiling", fix="use a finite number above 0")
        if not isinstance(delta, int | float) or not 0.0 < delta < 1.0:
            raise ConfigError(f"delta {delta!r} is not usable", fix="use a number above 0 and below 1/units")
        with self._store.write() as connection:
            known = self._known(connection, name)
            check_delta_against(delta, known)
            current = queries.current_budgets(connection, [name])
            last = next((budget for budget in current if budget.study == (study or None)), None)
            body: dict[str, Any] = {
                "dataset": name,
                "study": study or OVERALL,
                "version": 1 if last is None else last.version + 1,
                "epsilon": float(epsilon),
                "delta": float(delta),
                "filter_order": self._order(connection, last, epsilon, delta, planned),
                "valid_from": None if valid_from is None else chain.timestamp(valid_from),
                "valid_to": None if valid_to is None else chain.timestamp(valid_to),
                "approver": approver,
            }
            Filter(body["epsilon"], body["delta"], body["filter_order"])
            if body["valid_from"] and body["valid_to"] and body["valid_from"] >= body["valid_to"]:
                raise ConfigError("the budget ends before it begins", fix="swap valid_from and valid_to")
            same = None if last is None else {"seq": last.seq, **body, "version": last.version}
            if same is not None and queries.budget_of(same) == last:
                return last
            entry = self._append(connection, "budget", body, point="budget")
            connection.execute(budgets.insert().values(seq=entry.seq, **body))
            fault("budget.row")
        fault("budget.committed")
        return queries.budget_of({"seq": entry.seq, **body})

    def witness(self, body: dict[str, Any]) -> Entry:
        """Append a signed note that charges nothing; `body["what"]` is one word that says what it witnesses."""
        with self._store.write() as connection:
            entry = self._append(connection, "witness", body, point="witness")
            fault("witness.row")
        fault("witness.committed")
        return entry

    def _order(
        self,
        connection: sa.Connection,
        last: BudgetRecord | None,
        epsilon: float,
        delta: float,
        planned: tuple[Mechanism, ...],
    ) -> float:
        if last is not None and ((last.epsilon, last.delta) == (epsilon, delta) or self._touched(connection, last)):
            return last.filter_order
        return default_order(epsilon, delta, [key_of(mechanism) for mechanism in planned])

    def _touched(self, connection: sa.Connection, budget: BudgetRecord) -> bool:
        return bool(self._charges(connection, budget.dataset, budget.study).together)

    def rotate_key(self, new_key: SigningKey, approver: str, reason: str) -> Entry:
        """Replace the signing key: an entry signed by the old key that names and is proven by the new one."""
        if not approver or not reason:
            raise ConfigError("a new key needs an approver and a reason", fix="name both")
        with self._store.write() as connection:
            head = chain.head_of(chain.last_entry(connection))
            body = {
                "public_key": new_key.public_hex,
                "replaces": self._signer.public_hex,
                "approver": approver,
                "reason": reason,
                "proof": new_key.sign(f"concordat key for {self.site} after {head.hash}".encode()),
            }
            entry = self._append(connection, "key", body, point="key")
            connection.execute(keys.insert().values(seq=entry.seq, **body))
            fault("key.row")
        fault("key.committed")
        self._key = new_key
        return entry


def check_delta_against(delta: float, dataset: Dataset) -> None:
    """Refuse a delta of 1/units or more: it would allow to publish one unit outright."""
    if not is_small(delta, dataset.units) or not math.isfinite(delta):
        raise ConfigError(
            f"delta {delta:g} is not below 1/{dataset.units}, the number of units of {dataset.name!r}",
            fix=f"use a delta below {1 / dataset.units:.2g}",
        )
