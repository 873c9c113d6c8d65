"""The ledger of one site: reserve, settle, release.

The order that keeps a site honest: `reserve` before private data is read, `settle` before anything leaves.
Every step is one database transaction that appends a signed entry; nothing is changed afterwards. A crash
leaves a reservation open, and it stays charged until whoever opens the ledger next ends it (the agent's
`Rounds.recover`), in doubt in full, because its output may have left.
"""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa

from fl_shared.errors import BudgetExhausted, ConfigError, LedgerError
from fl_shared.ledger import chain, queries
from fl_shared.ledger.faults import fault
from fl_shared.ledger.models import IN_DOUBT, OVERALL, SETTLED, VOIDED, reservations, settlements
from fl_shared.ledger.reader import filter_of, name_of
from fl_shared.ledger.records import Dataset, Entry, Reservation
from fl_shared.ledger.registry import Registry, check_delta_against
from fl_shared.privacy.accounting.merge import key_of
from fl_shared.privacy.mechanism import Mechanism

_INSERT_RESERVATION = reservations.insert()
_INSERT_SETTLEMENT = settlements.insert()


class Ledger(Registry):
    """A site's ledger, open for writing (or for reading only, without a signing key)."""

    def reserve(
        self,
        dataset: Dataset | str,
        mechanism: Mechanism,
        *,
        run: str,
        round: int,  # the field's own word
        purpose: str = "training",
        study: str | None = None,
        retry: bool = False,
    ) -> Reservation:
        """Hold `mechanism` against every budget that it touches; call before private data is read.

        Raises BudgetExhausted when one budget says no, and LedgerError when (run, round, data set, purpose)
        was reserved before and not released unused. `retry` allows a further attempt after one that was
        charged in doubt; it is charged again, because it draws new noise.
        """
        name = name_of(dataset)
        if mechanism.steps < 1:
            raise ConfigError("a reservation needs at least one step", fix="set steps to 1 or more")
        if isinstance(round, bool) or not isinstance(round, int) or round < 0 or not run or not purpose:
            raise ConfigError(
                f"run {run!r}, round {round!r} or purpose {purpose!r} is not usable", fix="name all three"
            )
        with self._store.write() as connection:
            fault("reserve.begin")
            known = self._known(connection, name)
            attempt = self._attempt(connection, name, run, round, purpose, retry=retry)
            moment = self._clock()
            self._admit(connection, known, mechanism, study, moment)
            body = {
                "dataset": name,
                "dataset_seq": known.seq,
                "study": study or OVERALL,
                "run": run,
                "round": round,
                "purpose": purpose,
                "attempt": attempt,
                **mechanism.to_dict(),
            }
            entry = self._append(connection, "reservation", body, point="reserve", moment=moment)
            connection.execute(_INSERT_RESERVATION, {"seq": entry.seq, **body})
            fault("reserve.row")
            self._tally(connection, entry.seq, name, study, key_of(mechanism), point="reserve", held=mechanism.steps)
            fault("reserve.before-commit")
        fault("reserve.committed")
        return Reservation(
            seq=entry.seq,
            dataset=name,
            dataset_version=known.version,
            study=study,
            run=run,
            round=round,
            purpose=purpose,
            attempt=attempt,
            mechanism=mechanism,
            created_at=entry.created_at,
        )

    def _attempt(
        self, connection: sa.Connection, name: str, run: str, number: int, purpose: str, *, retry: bool
    ) -> int:
        earlier = queries.spends_of_round(connection, dataset=name, run=run, round=number, purpose=purpose)
        allowed = {VOIDED, IN_DOUBT} if retry else {VOIDED}
        for spend in earlier:
            if spend.outcome not in allowed:
                raise LedgerError(
                    f"run {run!r}, round {number}, {purpose} on {name!r} is already {spend.outcome} "
                    f"(entry {spend.reservation.seq})",
                    fix="answer a repeat from the stored release; it must not be computed again",
                    code="already-reserved",
                )
        return len(earlier) + 1

    def _admit(
        self,
        connection: sa.Connection,
        dataset: Dataset,
        mechanism: Mechanism,
        study: str | None,
        moment: datetime,
    ) -> None:
        """Raise BudgetExhausted unless every budget that `mechanism` touches agrees."""
        touched = [dataset.name, *queries.overlapping(connection, dataset.name)]
        ceilings = [
            budget
            for budget in queries.current_budgets(connection, touched)
            if budget.study is None or budget.study == study
        ]
        own = [budget for budget in ceilings if budget.dataset == dataset.name]
        if not own or (study is not None and not any(budget.study == study for budget in own)):
            wanted = f"for study {study!r}" if study else "overall"
            raise BudgetExhausted(
                f"data set {dataset.name!r} has no budget {wanted}", fix="have the privacy officer set one"
            )
        stamp = chain.timestamp(moment)
        for budget in ceilings:
            label = f"the budget of {budget.dataset!r}" + (f", study {budget.study!r}" if budget.study else "")
            units = dataset if budget.dataset == dataset.name else self._known(connection, budget.dataset)
            check_delta_against(budget.delta, units)
            if not budget.is_valid(stamp):
                raise BudgetExhausted(
                    f"{label} is valid from {budget.valid_from or 'ever'} to {budget.valid_to or 'ever'}, "
                    f"and now is {stamp}",
                    fix="have the privacy officer approve a new period",
                )
            gate = filter_of(budget)
            before = self._charges(connection, budget.dataset, budget.study).together
            after = dict(before)
            after[key_of(mechanism)] = after.get(key_of(mechanism), 0) + mechanism.steps
            # Written so that NaN refuses.
            if not gate.admits(after):
                raise BudgetExhausted(
                    f"{label} (epsilon {budget.epsilon:g} at delta {budget.delta:g}): "
                    f"{gate.used(before):.1%} is used, and {mechanism.steps} steps at noise "
                    f"{mechanism.noise_multiplier:g} and sampling {mechanism.sampling_probability:g} "
                    f"would make it {gate.used(after):.1%}",
                    fix="ask for fewer steps or more noise, or have the privacy officer raise the budget",
                )

    def settle(self, reservation: Reservation | int, executed: Mechanism, release_digest: str) -> Entry:
        """Charge what was executed; call before anything leaves. Returns the entry that receipts name.

        A repeat with the same digest returns the same entry. Raises LedgerError when `executed` is not what
        was reserved (fewer steps are allowed) or the reservation has ended otherwise.
        """
        if not release_digest or len(release_digest) > 200:
            raise LedgerError("a settlement needs the digest of what leaves", fix="hash the release first")
        if executed.steps < 1:
            raise LedgerError("nothing was executed", fix="use void, with the proof")
        return self._end(reservation, SETTLED, executed.steps, release_digest, "", executed)

    def void(self, reservation: Reservation | int, reason: str) -> Entry:
        """Void a reservation, uncharged; only when recorded state proves that no private data was read.

        `reason` names that proof and is recorded in the ledger for good.
        """
        if not reason:
            raise LedgerError("a release needs its proof in words", fix="say what proves it")
        return self._end(reservation, VOIDED, 0, None, reason, None)

    def charge_in_doubt(self, reservation: Reservation | int, reason: str) -> Entry:
        """Charge a reservation in full without a release: its output may have left, or data was read."""
        if not reason:
            raise LedgerError("a charge in doubt needs its reason", fix="say what happened")
        return self._end(reservation, IN_DOUBT, None, None, reason, None)

    def _end(
        self,
        reservation: Reservation | int,
        outcome: str,
        steps: int | None,
        digest: str | None,
        reason: str,
        executed: Mechanism | None,
    ) -> Entry:
        seq = reservation if isinstance(reservation, int) else reservation.seq
        point = {SETTLED: "settle", VOIDED: "release", IN_DOUBT: "doubt"}[outcome]
        with self._store.write() as connection:
            fault(f"{point}.begin")
            spend = queries.find_spend(connection, seq)
            if spend is None:
                raise LedgerError(f"entry {seq} is no reservation", fix="fl-audit spends lists what there is")
            reserved = spend.reservation.mechanism
            if executed is not None and not _fits(executed, reserved):
                raise LedgerError(
                    f"executed {executed} is not what entry {seq} reserved: {reserved}",
                    fix="charge it in doubt and stop: more may have been computed than was granted",
                    code="not-as-reserved",
                )
            charged = reserved.steps if steps is None else steps
            if spend.settled_seq is not None:
                entry = self._entry(connection, spend.settled_seq)
                if (entry.body["outcome"], entry.body["release_digest"]) == (outcome, digest) and entry.body[
                    "steps"
                ] == charged:
                    return entry
                raise LedgerError(
                    f"reservation {seq} has already ended as {spend.outcome} (entry {spend.settled_seq})",
                    fix="nothing may leave under it any more",
                    code="already-ended",
                )
            body = {
                "reservation": seq,
                "outcome": outcome,
                "steps": charged,
                "release_digest": digest,
                "reason": reason,
            }
            entry = self._append(connection, "settlement", body, point=point)
            connection.execute(_INSERT_SETTLEMENT, {"seq": entry.seq, **body})
            fault(f"{point}.row")
            named = spend.reservation
            self._tally(
                connection,
                entry.seq,
                named.dataset,
                named.study,
                key_of(reserved),
                point=point,
                held=-reserved.steps,
                spent=charged,
            )
            fault(f"{point}.before-commit")
        fault(f"{point}.committed")
        return entry


def _fits(executed: Mechanism, reserved: Mechanism) -> bool:
    """Say whether `executed` is the reserved mechanism with as many steps or fewer."""
    return (
        key_of(executed) == key_of(reserved)
        and executed.clipping_norm == reserved.clipping_norm
        and 0 < executed.steps <= reserved.steps
    )
