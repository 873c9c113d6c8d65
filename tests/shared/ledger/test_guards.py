"""What the database itself refuses, on both kinds: changes, entries that do not follow, rows that do not fit."""

from __future__ import annotations

from datetime import timedelta

import pytest
import sqlalchemy as sa

from fl_shared.errors import LedgerError
from fl_shared.identity.signing import SigningKey
from fl_shared.ledger import Ledger
from fl_shared.ledger.models import APPEND_ONLY, metadata
from helpers.ledgers import ROUND, Clock, opened, story, with_budget


@pytest.mark.parametrize("table", APPEND_ONLY)
def test_the_database_itself_refuses_changes(url: str, key: SigningKey, table: str) -> None:
    """UPDATE, DELETE, TRUNCATE and INSERT OR REPLACE are refused on every table, whoever asks."""
    with opened(url, key) as ledger:
        story(ledger)
        ledger.rotate_key(SigningKey.generate(), "DPO", "rotation")
        engine = ledger._store.engine
        columns = [column.name for column in metadata.tables[table].columns]
        attempts = [f"UPDATE {table} SET {columns[-1]} = {columns[-1]}", f"DELETE FROM {table}"]
        if url.startswith("sqlite"):
            attempts.append(f"INSERT OR REPLACE INTO {table} SELECT * FROM {table}")
        else:
            attempts.append(f"TRUNCATE {table} CASCADE")
        for statement in attempts:
            with engine.connect() as connection:
                before = connection.execute(sa.text(f"SELECT count(*) FROM {table}")).scalar_one()
                assert before > 0
                with pytest.raises(sa.exc.DBAPIError, match=r"append-only|must (follow|fit)|needs"):
                    connection.execute(sa.text(statement))
                connection.rollback()
                assert connection.execute(sa.text(f"SELECT count(*) FROM {table}")).scalar_one() == before


def test_the_database_itself_refuses_an_entry_that_does_not_follow(ledger: Ledger) -> None:
    """A direct INSERT that skips a number or does not name the last hash is refused by the database."""
    for seq, prev in ((7, ledger.head().hash), (2, "f" * 64)):
        with ledger._store.engine.connect() as connection, pytest.raises(sa.exc.DBAPIError, match="follow"):
            connection.execute(
                metadata.tables["entries"]
                .insert()
                .values(
                    seq=seq,
                    kind="dataset",
                    body="{}",
                    prev_hash=prev,
                    hash="a" * 64,
                    signature="b" * 128,
                    created_at="2027-01-01T00:00:00.000000Z",
                )
            )


RESERVATION = {
    "dataset": "icd", "dataset_seq": 2, "study": "", "run": "x", "round": 1, "purpose": "training", "attempt": 1,
    **ROUND.to_dict(),
}  # fmt: skip
BUDGET = {
    "dataset": "icd", "study": "", "version": 2, "epsilon": 99.0, "delta": 1e-5, "filter_order": 8.0,
    "valid_from": None, "valid_to": None, "approver": "nobody",
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "table", "row", "said"),
    [
        ("reservation", "reservations", RESERVATION | {"study": "unknown"}, "needs its data set and budgets"),
        ("reservation", "reservations", RESERVATION | {"dataset": "notes"}, "needs its data set and budgets"),
        ("reservation", "reservations", RESERVATION | {"study": "over"}, "in their period"),
        ("reservation", "reservations", RESERVATION | {"noise_multiplier": 0.0}, "reservations_noise"),
        ("reservation", "reservations", RESERVATION | {"sampling_probability": 1.5}, "reservations_sampling"),
        ("reservation", "reservations", RESERVATION | {"dataset_seq": 77}, "needs"),
        ("dataset", "reservations", RESERVATION, "needs an entry of its kind"),
        ("dataset", "budgets", BUDGET, "needs an entry of its kind"),
        ("budget", "budgets", BUDGET | {"delta": 1 / 5000}, "below 1/units"),
        ("budget", "budgets", BUDGET | {"dataset": "unknown"}, "registered data set"),
        ("budget", "budgets", BUDGET | {"version": 7}, "the next version"),
        ("budget", "budgets", BUDGET | {"approver": ""}, "budgets_approver"),
        ("budget", "budgets", BUDGET | {"epsilon": -1.0}, "budgets_epsilon"),
        ("overlap", "dataset_overlaps", {"first": "icd", "second": "unknown", "reason": "x"}, "one privacy unit"),
        (
            "dataset",
            "datasets",
            {
                "name": "icd",
                "version": 2,
                "fingerprint": "x",
                "privacy_unit": "patient",
                "units": 9,
                "bound_per_unit": 1,
            },
            "must stay",
        ),
        (
            "settlement",
            "settlements",
            {"reservation": 3, "outcome": "settled", "steps": 1, "release_digest": "x", "reason": ""},
            r"settled|FOREIGN KEY",
        ),
        ("reservation", "tallies", {"key": 1, "version": 9, "held": 0, "spent": 0}, "must follow"),
    ],
)
def test_the_database_itself_refuses_rows_that_do_not_fit(
    url: str, key: SigningKey, kind: str, table: str, row: dict[str, object], said: str
) -> None:
    """A program that skips the ledger's checks and signs its own entry is refused by the database."""
    clock = Clock()
    with opened(url, key, clock=clock) as ledger:
        icd = with_budget(ledger)
        ledger.set_budget(icd, 6.0, 1e-5, "DPO", study="over", valid_to=clock.now + timedelta(seconds=1))
        clock.now += timedelta(days=1)
        head = ledger.head()

        def forge() -> None:
            with ledger._store.write() as connection:
                entry = ledger._append(connection, kind, {"forged": True}, point="forged")
                connection.execute(metadata.tables[table].insert().values(seq=entry.seq, **row))

        with pytest.raises(LedgerError, match=said):
            forge()
        assert ledger.head() == head
