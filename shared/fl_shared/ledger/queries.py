"""Reads on an open transaction: rows in, frozen records out. No decision is taken here."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from fl_shared.ledger.models import (
    VOIDED,
    budgets,
    datasets,
    entries,
    overlaps,
    reservations,
    settlements,
    tallies,
    tally_keys,
)
from fl_shared.ledger.records import BudgetRecord, Dataset, Reservation, Spend
from fl_shared.privacy.accounting.merge import Key
from fl_shared.privacy.mechanism import Mechanism


@dataclass(frozen=True)
class Charges:
    """Steps by mechanism, charged and held by open reservations."""

    spent: Mapping[Key, int]
    held: Mapping[Key, int]

    @property
    def together(self) -> dict[Key, int]:
        """Charged and held, added."""
        total = dict(self.spent)
        for key, count in self.held.items():
            total[key] = total.get(key, 0) + count
        return total


def dataset_of(row: Mapping[str, Any] | sa.RowMapping) -> Dataset:
    """Return the data set in a row."""
    return Dataset(
        **{name: row[name] for name in ("seq", "name", "version", "fingerprint", "privacy_unit")},
        units=int(row["units"]),
        bound_per_unit=int(row["bound_per_unit"]),
    )


# The statements of every grant are built once: building costs more than running them.
_LATEST_DATASET = (
    sa.select(datasets).where(datasets.c.name == sa.bindparam("name")).order_by(datasets.c.version.desc()).limit(1)
)
_OVERLAPS = sa.select(overlaps.c.first, overlaps.c.second).where(
    (overlaps.c.first == sa.bindparam("name")) | (overlaps.c.second == sa.bindparam("name"))
)


def latest_dataset(connection: sa.Connection, name: str) -> Dataset | None:
    """Return the newest version of a data set, or None when it was never registered."""
    row = connection.execute(_LATEST_DATASET, {"name": name}).mappings().first()
    return None if row is None else dataset_of(row)


def all_datasets(connection: sa.Connection) -> list[Dataset]:
    """Return every version of every data set, by name and version."""
    query = sa.select(datasets).order_by(datasets.c.name, datasets.c.version)
    return [dataset_of(row) for row in connection.execute(query).mappings()]


def overlapping(connection: sa.Connection, name: str) -> list[str]:
    """Return the data sets declared to share units with `name`, sorted."""
    pairs = connection.execute(_OVERLAPS, {"name": name})
    return sorted(second if first == name else first for first, second in pairs)


def budget_of(row: Mapping[str, Any] | sa.RowMapping) -> BudgetRecord:
    """Return the budget in a row."""
    plain = (
        "seq",
        "dataset",
        "version",
        "epsilon",
        "delta",
        "filter_order",
        "valid_from",
        "valid_to",
        "approver",
    )
    return BudgetRecord(**{name: row[name] for name in plain}, study=row["study"] or None)


_newest_budget = (
    sa.select(budgets.c.dataset, budgets.c.study, sa.func.max(budgets.c.version).label("version"))
    .group_by(budgets.c.dataset, budgets.c.study)
    .subquery()
)
_CURRENT_BUDGETS = (
    sa.select(budgets)
    .join(
        _newest_budget,
        (budgets.c.dataset == _newest_budget.c.dataset)
        & (budgets.c.study == _newest_budget.c.study)
        & (budgets.c.version == _newest_budget.c.version),
    )
    .order_by(budgets.c.dataset, budgets.c.study)
)
_CURRENT_BUDGETS_OF = _CURRENT_BUDGETS.where(budgets.c.dataset.in_(sa.bindparam("names", expanding=True)))


def current_budgets(connection: sa.Connection, names: Collection[str] | None = None) -> list[BudgetRecord]:
    """Return the newest version of each budget (of the named data sets), overall before studies."""
    rows = (
        connection.execute(_CURRENT_BUDGETS)
        if names is None
        else connection.execute(_CURRENT_BUDGETS_OF, {"names": list(names)})
    )
    return [budget_of(row) for row in rows.mappings()]


_inner_tallies = tallies.alias("inner_tallies")
_CHARGES = (
    sa.select(tally_keys, tallies.c.spent, tallies.c.held)
    .select_from(tally_keys)
    .join(
        tallies,
        (tallies.c.key == tally_keys.c.id)
        & (
            tallies.c.version
            == sa.select(sa.func.max(_inner_tallies.c.version))
            .where(_inner_tallies.c.key == tally_keys.c.id)
            .scalar_subquery()
        ),
    )
    .where(tally_keys.c.dataset.in_(sa.bindparam("names", expanding=True)))
)
_CHARGES_IN_STUDY = _CHARGES.where(tally_keys.c.study == sa.bindparam("study"))


def charges(connection: sa.Connection, names: Collection[str], study: str | None) -> Charges:
    """Return what the named data sets together are charged with (in one study, or in all)."""
    query = _CHARGES if study is None else _CHARGES_IN_STUDY
    place = {"names": list(names)} | ({} if study is None else {"study": study})
    spent: dict[Key, int] = {}
    held: dict[Key, int] = {}
    for row in connection.execute(query, place).mappings():
        key = Key(row["kind"], row["neighbouring"], row["noise_multiplier"], row["sampling_probability"])
        spent[key] = spent.get(key, 0) + int(row["spent"])
        held[key] = held.get(key, 0) + int(row["held"])
    return Charges(
        dict(sorted((key, count) for key, count in spent.items() if count)),
        dict(sorted((key, count) for key, count in held.items() if count)),
    )


_ending = entries.alias("ending")
_SPEND = (
    sa.select(
        reservations,
        datasets.c.version.label("dataset_version"),
        entries.c.created_at,
        settlements.c.seq.label("settled_seq"),
        settlements.c.outcome,
        settlements.c.steps.label("charged_steps"),
        settlements.c.release_digest,
        settlements.c.reason,
        _ending.c.created_at.label("settled_at"),
    )
    .select_from(reservations)
    .join(datasets, datasets.c.seq == reservations.c.dataset_seq)
    .join(entries, entries.c.seq == reservations.c.seq)
    .outerjoin(settlements, settlements.c.reservation == reservations.c.seq)
    .outerjoin(_ending, _ending.c.seq == settlements.c.seq)
)


_SPEND_AT = _SPEND.where(reservations.c.seq == sa.bindparam("reservation"))
_ROUND_COLUMNS = ("dataset", "run", "round", "purpose")
# Not ordered here: SQLite would walk the whole data set in order rather than look the round up.
_SPENDS_OF_ROUND = _SPEND.where(*(reservations.c[name] == sa.bindparam(name) for name in _ROUND_COLUMNS))


def spends_of_round(connection: sa.Connection, *, dataset: str, run: str, round: int, purpose: str) -> list[Spend]:
    """Return the attempts at one round, oldest first."""
    place = {"dataset": dataset, "run": run, "round": round, "purpose": purpose}
    of_round = [spend_of(row) for row in connection.execute(_SPENDS_OF_ROUND, place).mappings()]
    return sorted(of_round, key=lambda spend: spend.reservation.seq)


def spends(
    connection: sa.Connection,
    *,
    dataset: str | None = None,
    run: str | None = None,
    round: int | None = None,  # the field's own word
    purpose: str | None = None,
    open_only: bool = False,
    stream: bool = False,
) -> Iterator[Spend]:
    """Yield reservations with how they ended, oldest first; `stream` for many, read to the end."""
    query = _SPEND.order_by(reservations.c.seq)
    if dataset is not None:
        query = query.where(reservations.c.dataset == dataset)
    if run is not None:
        query = query.where(reservations.c.run == run)
    if round is not None:
        query = query.where(reservations.c.round == round)
    if purpose is not None:
        query = query.where(reservations.c.purpose == purpose)
    if open_only:
        query = query.where(settlements.c.seq.is_(None))
    if stream:
        query = query.execution_options(yield_per=1000)
    for row in connection.execute(query).mappings():
        yield spend_of(row)


def find_spend(connection: sa.Connection, reservation: int) -> Spend | None:
    """Return one reservation with how it ended, or None when there is no such entry."""
    row = connection.execute(_SPEND_AT, {"reservation": reservation}).mappings().first()
    return None if row is None else spend_of(row)


def spend_of(row: sa.RowMapping) -> Spend:
    """Return the spend in a joined row."""

    def mechanism(steps: int) -> Mechanism:
        return Mechanism(
            noise_multiplier=row["noise_multiplier"],
            sampling_probability=row["sampling_probability"],
            steps=steps,
            clipping_norm=row["clipping_norm"],
            neighbouring=row["neighbouring"],
            kind=row["kind"],
        )

    reservation = Reservation(
        seq=row["seq"],
        dataset=row["dataset"],
        dataset_version=row["dataset_version"],
        study=row["study"] or None,
        run=row["run"],
        round=row["round"],
        purpose=row["purpose"],
        attempt=row["attempt"],
        mechanism=mechanism(int(row["steps"])),
        created_at=row["created_at"],
    )
    ended = row["settled_seq"] is not None
    outcome = str(row["outcome"]) if ended else "open"
    return Spend(
        reservation=reservation,
        outcome=outcome,
        charged=None if outcome == VOIDED else mechanism(int(row["charged_steps"] if ended else row["steps"])),
        release_digest=row["release_digest"],
        reason=row["reason"] or "",
        settled_seq=row["settled_seq"],
        settled_at=row["settled_at"],
    )
