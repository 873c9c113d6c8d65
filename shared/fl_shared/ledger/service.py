"""The ledger of one site: register, budget, reserve, settle, release, recover.

The order that keeps a site honest: `reserve` before private data is read, `settle` before anything leaves.
Every step is one database transaction that appends a signed entry; nothing is changed afterwards. A crash
leaves a reservation open, and `recover` charges it in full, because its output may have left.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from fl_shared.accounting.gate import Filter, default_order
from fl_shared.accounting.merge import Key, key_of
from fl_shared.errors import BudgetExhausted, ConfigError, LedgerError, SignatureError
from fl_shared.ledger import chain, merkle, queries
from fl_shared.ledger.faults import fault
from fl_shared.ledger.models import (
    OVERALL,
    budgets,
    datasets,
    entries,
    keys,
    merkle_nodes,
    overlaps,
    reservations,
    settlements,
    tallies,
    tally_keys,
)
from fl_shared.ledger.reader import LedgerReader, current_key, entry_hash, filter_of, genesis_of, name_of, now
from fl_shared.ledger.records import BudgetRecord, Dataset, Entry, Reservation, Spend
from fl_shared.ledger.store import Store
from fl_shared.privacy import Mechanism
from fl_shared.signing import SigningKey, verify

FORMAT = 1


class Ledger(LedgerReader):
    """A site's ledger, open for writing."""

    def __init__(self, store: Store, site: str, key: SigningKey | None, clock: Callable[[], datetime]) -> None:
        super().__init__(store, site)
        self._key = key
        self._clock = clock

    @classmethod
    def open(
        cls,
        url: str,
        signing_key: SigningKey | None,
        site: str,
        *,
        clock: Callable[[], datetime] = now,
    ) -> Ledger:
        """Open the ledger of `site` at `url`, making or migrating its tables.

        With `signing_key` None it is open for reading only, and nothing is made or migrated. The last entry
        is checked; the whole chain is `fl-audit verify`'s work. Raises LedgerError when the database cannot
        be read, belongs to another site, or its last entry does not fit; SignatureError for another key.
        """
        store = Store(url, read_only=signing_key is None)
        ledger = cls(store, site, signing_key, clock)
        try:
            store.migrate()
            if signing_key is not None:
                ledger._begin()
            ledger._check_head()
        except BaseException:
            store.close()
            raise
        return ledger

    def _begin(self) -> None:
        """Write the genesis entry into an empty ledger."""
        with self._store.read() as connection:
            if chain.last_entry(connection) is not None:
                return
        with self._store.write() as connection:
            if chain.last_entry(connection) is None:
                body = {"format": FORMAT, "site": self.site, "public_key": self._signer.public_hex}
                self._append(connection, "genesis", body, point="genesis")

    def _check_head(self) -> None:
        with self._store.read() as connection:
            genesis = genesis_of(connection)
            last = chain.last_entry(connection)
            if genesis is None or last is None:
                raise LedgerError("the ledger is empty", fix="open it once with the site's agent")
            expected = current_key(connection)
        if genesis["site"] != self.site:
            raise LedgerError(
                f"this ledger belongs to site {genesis['site']!r}, not {self.site!r}",
                fix="check --site and the ledger's address",
            )
        if self._key is not None and self._key.public_hex != expected:
            raise SignatureError(
                f"this ledger is signed by key {expected[:16]}…, the site's key is {self._key.public_hex[:16]}…",
                fix="restore the site's signing key from its backup",
            )
        message = chain.message_bytes(
            seq=last.seq,
            kind=last.kind,
            body=chain.body_text(last.body),
            prev_hash=last.prev_hash,
            created_at=last.created_at,
            site=self.site,
        )
        try:
            # A rotation is signed by the key it replaces.
            verify(expected if last.kind != "key" else last.body["replaces"], message, last.signature)
        except SignatureError as error:
            raise LedgerError(
                f"the ledger's last entry ({last.seq}) does not bear the site's signature",
                fix="run fl-audit verify; restore the newest backup",
            ) from error

    @property
    def _signer(self) -> SigningKey:
        if self._key is None:
            raise LedgerError("this ledger is open for reading", fix="open it with the site's signing key")
        return self._key

    # -- data sets and budgets ---------------------------------------------------------------------------

    def register_dataset(
        self, name: str, fingerprint: str, privacy_unit: str, units: int, bound_per_unit: int
    ) -> Dataset:
        """Register a data set, or a new version of it when its fingerprint or size changed; idempotent.

        A new version is charged to the same budgets: the same people must be assumed to be in it. Raises
        ConfigError for a changed privacy unit, because sums over different units mean nothing.
        """
        for text, what in ((name, "name"), (fingerprint, "fingerprint"), (privacy_unit, "privacy unit")):
            if not text or len(text) > 200:
                raise ConfigError(f"data set {what} {text!r} is not usable", fix="use 1 to 200 characters")
        for number, what in ((units, "units"), (bound_per_unit, "bound_per_unit")):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ConfigError(f"data set {what} {number!r} is not usable", fix="use a whole number of at least 1")
        with self._store.write() as connection:
            last = queries.latest_dataset(connection, name)
            if last is not None:
                if last.privacy_unit != privacy_unit:
                    raise ConfigError(
                        f"data set {name!r} is kept per {last.privacy_unit}, not per {privacy_unit}",
                        fix="register it under another name and declare the overlap to be impossible in writing",
                    )
                same = (last.fingerprint, last.units, last.bound_per_unit)
                if same == (fingerprint, units, bound_per_unit):
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
            return queries.dataset_of({"seq": entry.seq, **body})

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
            body = {"first": names[0], "second": names[1], "reason": reason}
            entry = self._append(connection, "overlap", body, point="overlap")
            connection.execute(overlaps.insert().values(seq=entry.seq, **body))

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
            raise ConfigError("a budget needs its approver's name", fix="say who approved it, e.g. 'DPO Jane Doe'")
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
            if last is not None and queries.budget_of({"seq": last.seq, **body, "version": last.version}) == last:
                return last
            entry = self._append(connection, "budget", body, point="budget")
            connection.execute(budgets.insert().values(seq=entry.seq, **body))
            return queries.budget_of({"seq": entry.seq, **body})

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

    # -- the state machine -------------------------------------------------------------------------------

    def reserve(
        self,
        dataset: Dataset | str,
        mechanism: Mechanism,
        *,
        run: str,
        round: int,  # noqa: A002  # the field's own word
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
            raise ConfigError(f"run {run!r}, round {round!r}, purpose {purpose!r} are not usable", fix="name all three")
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
            connection.execute(reservations.insert().values(seq=entry.seq, **body))
            fault("reserve.row")
            self._tally(connection, entry.seq, name, study, key_of(mechanism), held=mechanism.steps)
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
        earlier = list(queries.spends(connection, dataset=name, run=run, round=number, purpose=purpose))
        allowed = {"released", "in-doubt"} if retry else {"released"}
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
        self, connection: sa.Connection, dataset: Dataset, mechanism: Mechanism, study: str | None, moment: datetime
    ) -> None:
        """Raise BudgetExhausted unless every budget that `mechanism` touches agrees."""
        touched = [dataset.name, *queries.overlapping(connection, dataset.name)]
        found = [
            budget
            for budget in queries.current_budgets(connection, touched)
            if budget.study is None or budget.study == study
        ]
        own = [budget for budget in found if budget.dataset == dataset.name]
        if not own or (study is not None and not any(budget.study == study for budget in own)):
            wanted = f"for study {study!r}" if study else "overall"
            raise BudgetExhausted(
                f"data set {dataset.name!r} has no budget {wanted}", fix="have the privacy officer set one"
            )
        stamp = chain.timestamp(moment)
        for budget in found:
            label = f"budget of {budget.dataset!r}" + (f", study {budget.study!r}" if budget.study else "")
            units = dataset if budget.dataset == dataset.name else self._known(connection, budget.dataset)
            check_delta_against(budget.delta, units)
            if (budget.valid_from and stamp < budget.valid_from) or (budget.valid_to and stamp >= budget.valid_to):
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
                    f"{label} (epsilon {budget.epsilon:g} at delta {budget.delta:g}): {gate.used(before):.1%} is "
                    f"used, and {mechanism.steps} steps at noise {mechanism.noise_multiplier:g} and sampling "
                    f"{mechanism.sampling_probability:g} would make it {gate.used(after):.1%}",
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
            raise LedgerError("nothing was executed", fix="use release_unused, with the proof")
        return self._end(reservation, "settled", executed.steps, release_digest, "", executed)

    def release_unused(self, reservation: Reservation | int, reason: str) -> Entry:
        """Give a reservation back, uncharged; only when recorded state proves that no private data was read.

        `reason` names that proof and stands in the ledger for good.
        """
        if not reason:
            raise LedgerError("a release needs its proof in words", fix="say what proves that nothing was computed")
        return self._end(reservation, "released", 0, None, reason, None)

    def charge_in_doubt(self, reservation: Reservation | int, reason: str) -> Entry:
        """Charge a reservation in full without a release: its output may have left, or data was read."""
        if not reason:
            raise LedgerError("a charge in doubt needs its reason", fix="say what happened")
        return self._end(reservation, "in-doubt", None, None, reason, None)

    def recover(self) -> list[Spend]:
        """Charge every open reservation in full; call once at start, before any work. Returns them."""
        seqs = [reservation.seq for reservation in self.open_reservations()]
        for seq in seqs:
            self.charge_in_doubt(seq, "found open at start: its output may have left")
        with self._store.read() as connection:
            found = [queries.find_spend(connection, seq) for seq in seqs]
        return [spend for spend in found if spend is not None]

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
        point = {"settled": "settle", "released": "release", "in-doubt": "doubt"}[outcome]
        with self._store.write() as connection:
            fault(f"{point}.begin")
            spend = queries.find_spend(connection, seq)
            if spend is None:
                raise LedgerError(f"entry {seq} is no reservation", fix="fl-audit spends lists what there is")
            held = spend.reservation.mechanism
            if executed is not None and not _fits(executed, held):
                raise LedgerError(
                    f"executed {executed} is not what entry {seq} reserved: {held}",
                    fix="charge it in doubt and stop: more may have been computed than was granted",
                    code="not-as-reserved",
                )
            charged = held.steps if steps is None else steps
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
            connection.execute(settlements.insert().values(seq=entry.seq, **body))
            fault(f"{point}.row")
            named = spend.reservation
            self._tally(
                connection, entry.seq, named.dataset, named.study, key_of(held), held=-held.steps, spent=charged
            )
            fault(f"{point}.before-commit")
        fault(f"{point}.committed")
        return entry

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
        self._key = new_key
        return entry

    # -- writing -----------------------------------------------------------------------------------------

    def _append(
        self,
        connection: sa.Connection,
        kind: str,
        body: dict[str, Any],
        *,
        point: str,
        moment: datetime | None = None,
    ) -> Entry:
        entry = chain.append(
            connection, self._signer, self.site, kind, body, now=moment or self._clock(), point=point
        )
        nodes = merkle.completed_nodes(
            connection, entry.seq - 1, entry.hash, lambda at: entry_hash(connection, at + 1)
        )
        if nodes:
            connection.execute(merkle_nodes.insert(), nodes)
        fault(f"{point}.tree")
        return entry

    def _tally(
        self,
        connection: sa.Connection,
        seq: int,
        name: str,
        study: str | None,
        key: Key,
        *,
        held: int = 0,
        spent: int = 0,
    ) -> None:
        place = {"dataset": name, "study": study or OVERALL, **key._asdict()}
        where = sa.and_(*(tally_keys.c[column] == value for column, value in place.items()))
        number = connection.execute(sa.select(tally_keys.c.id).where(where)).scalar()
        if number is None:
            top = connection.execute(sa.select(sa.func.max(tally_keys.c.id))).scalar() or 0
            number = top + 1
            connection.execute(tally_keys.insert().values(id=number, **place))
        last = connection.execute(
            sa.select(tallies).where(tallies.c.key == number).order_by(tallies.c.version.desc()).limit(1)
        ).first()
        connection.execute(
            tallies.insert().values(
                seq=seq,
                key=number,
                version=1 if last is None else last.version + 1,
                held=held + (0 if last is None else last.held),
                spent=spent + (0 if last is None else last.spent),
            )
        )

    def _entry(self, connection: sa.Connection, seq: int) -> Entry:
        return chain.entry_of(connection.execute(sa.select(entries).where(entries.c.seq == seq)).mappings().one())


def check_delta_against(delta: float, dataset: Dataset) -> None:
    """Refuse a delta of 1/units or more: it would allow to publish one unit outright."""
    if not delta * dataset.units < 1.0 or not math.isfinite(delta):
        raise ConfigError(
            f"delta {delta:g} is not below 1/{dataset.units}, the number of units of {dataset.name!r}",
            fix=f"use a delta below {1 / dataset.units:.2g}",
        )


def _fits(executed: Mechanism, held: Mechanism) -> bool:
    """Say whether `executed` is the reserved mechanism with as many steps or fewer."""
    return (
        key_of(executed) == key_of(held)
        and executed.clipping_norm == held.clipping_norm
        and 0 < executed.steps <= held.steps
    )
