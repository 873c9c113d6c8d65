"""Ledgers for tests: fresh databases on SQLite and on a real PostgreSQL, and the same small story in each."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from fl_shared.canonical import sha256_hex
from fl_shared.documents.round import Receipt
from fl_shared.identity.signing import SigningKey, sign_document
from fl_shared.ledger import Dataset, Ledger, Spend
from fl_shared.ledger.receipts import StoredReceipt
from fl_shared.privacy.mechanism import Mechanism

SITE = "hospital-001"
ROUND = Mechanism(noise_multiplier=1.0, sampling_probability=0.1, steps=8, clipping_norm=1.0)
fork = multiprocessing.get_context("fork")


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = datetime(2027, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        self.now += timedelta(milliseconds=1)
        return self.now


def opened(url: str, key: SigningKey | None, **options: Any) -> Ledger:
    """The ledger of the test site."""
    return Ledger.open(url, key, SITE, **options)


def with_budget(
    ledger: Ledger, name: str = "icd", epsilon: float = 8.0, delta: float = 1e-5, units: int = 5000
) -> Dataset:
    """Register a data set with one overall budget."""
    dataset = ledger.register_dataset(name, f"sha256:{name}", "record", units, 1)
    ledger.set_budget(dataset, epsilon, delta, "DPO Jane Doe")
    return dataset


def charge_open(ledger: Ledger) -> list[Spend]:
    """Charge every open reservation in full, as whoever opens a ledger after a crash; what they have become."""
    held = {one.seq for one in ledger.open_reservations()}
    for seq in sorted(held):
        ledger.charge_in_doubt(seq, "found open at start: its output may have left")
    return [spend for spend in ledger.spends() if spend.reservation.seq in held]


def release_of(ledger: Ledger, run: str, number: int) -> str | None:
    """The digest that was settled for a round; None when none was."""
    spends = [one for one in ledger.spends(run=run) if one.reservation.round == number]
    return next((one.release_digest for one in spends if one.release_digest), None)


def story(ledger: Ledger) -> None:
    """A little of everything that a ledger can hold; 20 entries."""
    icd = with_budget(ledger)
    notes = with_budget(ledger, "notes", epsilon=20.0)
    ledger.declare_overlap(icd, notes, "the same wards")
    ledger.set_budget(icd, 6.0, 1e-5, "DPO Jane Doe", study="sepsis")
    for number in (1, 2, 3):
        held = ledger.reserve(icd, ROUND, run="demo", round=number, study="sepsis")
        ledger.settle(held, ROUND, f"sha256:release-{number}")
    unused = ledger.reserve(notes, ROUND, run="other", round=1)
    ledger.void(unused, "the data file could not be opened")
    doubt = ledger.reserve(notes, ROUND, run="other", round=1)
    ledger.charge_in_doubt(doubt, "the process died")
    ledger.register_dataset("icd", "sha256:icd-2", "record", 5100, 1)
    ledger.set_budget(icd, 9.0, 1e-5, "DPO John Roe")
    ledger.reserve(icd, ROUND, run="demo", round=4, study="sepsis")


def receipt(ledger: Ledger, key: SigningKey, seq: int, **changes: Any) -> StoredReceipt:
    """The signed receipt that a site would send for settlement `seq` now, with `changes` to its body."""
    (spend,) = [each for each in ledger.spends() if each.settled_seq == seq]
    held, pinned, position = spend.reservation, ledger.checkpoint(), ledger.epsilon(spend.reservation.dataset)
    assert spend.charged is not None
    body = Receipt(
        run=held.run,
        round=held.round,
        site=ledger.site,
        manifest_digest=f"sha256:{'1' * 64}",
        spec_digest=f"sha256:{'2' * 64}",
        update_digest=str(spend.release_digest),
        model_digest=f"sha256:{'3' * 64}",
        mechanism=spend.charged,
        steps_executed=spend.charged.steps,
        epsilon_spent_total=position.spent,
        delta=position.delta,
        privacy_unit="record",
        ledger_head=pinned["head"],
        ledger_entries=pinned["entries"],
        merkle_root=pinned["merkle_root"],
        entry_id=ledger.entry(seq).id,
        created_at=1.8e9,
    )
    return StoredReceipt(sign_document(key, body.to_dict() | changes), 1.8e9)


def with_releases(ledger: Ledger, key: SigningKey, rounds: int = 3) -> list[StoredReceipt]:
    """Settle `rounds` rounds of run `demo`; return the receipts that a coordinator keeps of them."""
    icd = with_budget(ledger)
    kept = []
    for number in range(1, rounds + 1):
        held = ledger.reserve(icd, ROUND, run="demo", round=number)
        entry = ledger.settle(held, ROUND, f"sha256:{sha256_hex(str(number).encode())}")
        kept.append(receipt(ledger, key, entry.seq))
    return kept


def in_process(work: Callable[[], None], environment: dict[str, str] | None = None) -> int:
    """Run `work` in a forked process; its exit code, negative for a signal."""
    process = fork.Process(target=_with_environment, args=(work, environment or {}))
    process.start()
    process.join(120)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError("the process did not end in 120 s")
    return process.exitcode


def _with_environment(work: Callable[[], None], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    work()
