"""One round at a site: check the order, charge the ledger, train, keep the update, settle, answer.

The sequence is what makes a crash harmless:

1. everything that can be refused is refused, and everything that needs no private data is done, the model's
   adaptation included, before the mechanism is reserved: what fails there reads nothing and costs nothing;
2. the mechanism is reserved;
3. the update is computed, then written and flushed to `releases/`;
4. the ledger settles with the update's digest;
5. only then may the bytes pass `agent.outgoing`.

A repeat of a settled (run, round) answers with the stored bytes and spends nothing.

After a crash or a stop in step 3 the reservation is still open. Since nothing passes `agent.outgoing` without a
settlement, that proves that nothing left, so a repeat of the same order computes again under the same
reservation (docs/decisions/0043). It stays held against the budget until then, and is charged in full
when it is not asked for again within a day or the run has moved on.

What fails after private data was read is charged in full, and ends the site's part in the run until its operator
confirms: "failed" is an exact answer that no noise covers, so there is at most one (docs/decisions/0080). Answers to
rounds that were computed are settled and leave at multiples of `[policy] reply_every_s`, counted from the order's
start.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from fl_client.agent.head import reserved_rounds
from fl_client.agent.orders import Assignment, ReceivedOrder
from fl_client.agent.outgoing import TRAINING, Outgoing, Sealed
from fl_client.agent.policy import check_policy
from fl_client.agent.progress import Progress
from fl_client.agent.releases import Order, ReleaseStore
from fl_client.site.config import PolicyConfig
from fl_shared.adapters.safetensors import digest, pack, require_finite, unpack
from fl_shared.documents.base_model import BaseModel
from fl_shared.documents.round import Receipt, Refusal
from fl_shared.documents.spec import LORA_TARGETS, RunSpec
from fl_shared.errors import BudgetExhausted, ConcordatError, DataError, PolicyRefusal, RunError
from fl_shared.ledger.faults import fault
from fl_shared.ledger.records import Dataset, Reservation
from fl_shared.ledger.service import Ledger
from fl_shared.ledger.suspension import FAILED_REASON, Suspensions, note_computed_again
from fl_shared.names import ALONE, run_name
from fl_shared.privacy.mechanism import Mechanism

log = logging.getLogger("fl_client.agent")

CLOCK_SKEW_S = 300.0
HELD_S = 86_400.0
SUSPENDED = "this site takes no part in the run until its operator has confirmed"


class Stopping(ConcordatError):
    """The agent is shutting down; the round gets no answer now, and the same one after the next start."""

    def __init__(self) -> None:
        """There is one message."""
        super().__init__("the site's agent is shutting down", fix="send the order again later", code="stopping")


class Trained(Protocol):
    """What training hands back: the update, and the mechanism that was executed."""

    @property
    def update(self) -> dict[str, Any]:
        """Name to float32 array."""

    @property
    def executed(self) -> Mechanism:
        """The mechanism that was applied to the data."""


Train = Callable[[RunSpec, Mechanism, dict[str, Any], int, Callable[..., None]], Trained]
"""(spec, mechanism, offset, round, progress) -> Trained"""
Prepare = Callable[[RunSpec, dict[str, Any]], None]
"""(spec, offset): does, without private data, all that training will need; a ConcordatError says what is wrong."""


@dataclass(frozen=True)
class SiteFacts:
    """What a round depends on and does not change while the agent runs.

    `accepts_key` says whether a public key (hex) may sign orders; the coordinator may rotate its key. `namespace`
    begins the names of the runs that these keys may order: "" is the coordinator's, `alone:` the site's own. `targets`:
    the groups of layers that the base model has.
    """

    site: str
    accepts_key: Callable[[str], bool]
    model_digest: str
    policy: PolicyConfig
    dataset: Dataset
    namespace: str = ""
    targets: tuple[str, ...] = LORA_TARGETS

    @property
    def base(self) -> BaseModel:
        """The site's base model."""
        return BaseModel(self.model_digest, self.targets)


class Refused(Exception):
    """Carries a refusal's code and message from a check to the reply."""

    def __init__(self, code: str, message: str) -> None:
        """Keep the code of `manifest.REFUSAL_CODES` and the public message."""
        super().__init__(message)
        self.code = code
        self.message = message


class Rounds:
    """Handles rounds one at a time."""

    def __init__(
        self,
        facts: SiteFacts,
        *,
        ledger: Ledger,
        store: ReleaseStore,
        outgoing: Outgoing,
        train: Train,
        prepare: Prepare = lambda *_: None,
        written: Callable[[], None] = lambda: None,
        progress: Progress | None = None,
    ) -> None:
        """Take the parts; `recover` must be called before the first round. `written`: the ledger has grown."""
        self._facts = facts
        self._ledger = ledger
        self._store = store
        self._outgoing = outgoing
        self._train, self._prepare, self._written = train, prepare, written
        self._progress = progress or Progress()
        self._suspensions = Suspensions(ledger)
        self._receiving, self._busy = threading.Lock(), threading.Lock()
        self._stopping = threading.Event()
        self._nonces: dict[str, tuple[str, int]] = {}
        self._specs: dict[str, str] = {}
        self._began, self._computed = 0.0, False
        self.state = "idle"

    def recover(self) -> None:
        """Bring ledger and store into agreement after a crash, before anything is answered.

        An update that was written but not settled is settled now, so that it can be fetched. A reservation
        whose order is recent stays held for a repeat; every other open one is charged in full.
        """
        orders = list(self._store.all())
        known = {(run, number) for run, number, _ in reserved_rounds(self._ledger, [order.run for order in orders])}
        for order in orders:
            if order.update_digest is None and (order.run, order.round) not in known:
                self._store.drop(order)  # a crash came before the ledger was asked
                continue
            self._remember(order)
        for reservation in self._ledger.open_reservations():
            at = {"run": reservation.run, "round": reservation.round}
            stored = self._store.find(reservation.run, reservation.round)
            if stored and stored.update_digest and stored.executed and self._store.update(stored) is not None:
                self._ledger.settle(reservation, stored.executed, stored.update_digest)
                log.warning("settled an update that a crash had left behind", extra=at)
            elif stored and time.time() - stored.ordered_at < HELD_S:
                log.warning("a crash broke this round off; it stays held against the budget", extra=at)
            else:
                self._ledger.charge_in_doubt(reservation, "found open at start, and nobody asked for it again")
                log.warning("a round that a crash broke off was charged in full", extra=at)
        self._written()
        for run, why in self._suspensions.all().items():
            log.warning("takes no part in this run until `fl-client resume`: %s", why, extra={"run": run})

    def drain(self, grace_s: float) -> bool:
        """Take no further round, wait `grace_s` seconds for the one in progress; say whether it has ended."""
        ended = self._busy.acquire(timeout=grace_s)
        self._stopping.set()
        if ended:
            self._busy.release()
        return ended

    def break_off(self) -> None:
        """End the round in progress at its next step. Nothing leaves; its reservation stays held, as after a crash."""
        self._stopping.set()
        with self._busy:
            return

    def handle(self, order_json: str, adapter: Callable[[], bytes], spec_json: str = "") -> Sealed:
        """Answer one round. Raises RunError for an order that names no usable run and round, and Stopping.

        `adapter` fetches the adapter: once for an order that a key that may sign orders signed, of no other, and of one
        order at a time, so that nobody fills the memory. `spec_json`: what came beside an order that names its spec.
        """
        arrived = ReceivedOrder.read(order_json, self._facts.site)
        try:
            arrived.require_signed(self._facts.accepts_key)
        except ConcordatError as error:
            return self._refused(arrived, "bad-manifest", error.message)
        with self._receiving:
            fetched = adapter()
            with self._busy:
                return self._handle(arrived, fetched, spec_json)

    def _handle(self, arrived: ReceivedOrder, adapter: bytes, spec_json: str) -> Sealed:
        self._began, self._computed = time.monotonic(), False
        at = {"run": arrived.run, "round": arrived.round}
        try:
            return self._answer(arrived, adapter, spec_json)
        except Refused as refused:
            code, message = refused.code, refused.message
        except BudgetExhausted as error:
            code, message = "budget-exhausted", error.message
        except PolicyRefusal as error:
            code, message = "policy", error.message
        except Stopping:
            log.warning("the round gets no answer: shutting down", extra=at)
            raise
        except (ConcordatError, OSError):
            # A damaged file, a full disk, a ledger that cannot be written: the details stay here.
            log.exception("the round cannot be answered", extra=at)
            code, message = "failed", "the site cannot answer this round; see the site's own log"
        finally:
            self._progress.end()
            self._wait_for_the_moment()
            self.state = "idle"
        return self._refused(arrived, code, message)

    def _refused(self, arrived: ReceivedOrder, code: str, message: str) -> Sealed:
        log.warning("refused: %s", message, extra={"run": arrived.run, "round": arrived.round, "code": code})
        refusal = Refusal(arrived.run, arrived.round, self._facts.site, arrived.digest, code, message, time.time())
        return self._outgoing.refuse(refusal)

    def _wait_for_the_moment(self) -> None:
        """Once a round was computed, wait until a whole number of intervals has passed since the order began.

        How long it took is private, and what is entered and signed from here on bears the time of the moment: a
        receipt has a time, and names a hash of ledger entries that have one each.
        """
        every = self._facts.policy.reply_every_s
        if self._computed and every > 0:
            self._stopping.wait(every - (time.monotonic() - self._began) % every)
        self._computed = False

    def _answer(self, arrived: ReceivedOrder, adapter: bytes, spec_json: str) -> Sealed:
        assigned = self._checked(arrived, adapter, spec_json)
        stored = self._repeat(assigned)
        if stored is not None:
            return stored
        if self._stopping.is_set():
            raise Stopping
        check_policy(assigned.spec, self._facts.policy)
        if why := self._suspensions.of(assigned.run):
            log.warning("not taking part until `fl-client resume`: %s", why, extra=assigned.at)
            raise Refused("suspended", SUSPENDED)
        try:
            offset = unpack(adapter)
            require_finite(offset)
        except DataError as error:
            raise Refused("bad-manifest", error.message) from error
        fault("round.checked")
        self._prepare_publicly(assigned, offset)
        reservation = self._reserve(assigned)
        fault("round.reserved")
        order, update = self._compute(assigned, reservation, offset)
        if order.executed is None or order.update_digest is None:
            raise RunError("the round has no update", fix="this is a defect of the agent")
        self._progress.end()
        self._wait_for_the_moment()
        entry = self._ledger.settle(reservation, order.executed, order.update_digest)
        fault("round.settled")
        self._written()
        self._store.prune(assigned.run, assigned.round)
        log.info("released update %s", order.update_digest[:19], extra={**assigned.at, "entry": entry.id})
        return self._release(assigned, order, entry.id, update)

    def _prepare_publicly(self, assigned: Assignment, offset: dict[str, Any]) -> None:
        """Do all that needs no private data. Nothing is reserved yet, so whatever fails may be told, and is free."""
        try:
            self._prepare(assigned.spec, offset)
        except PolicyRefusal:
            raise
        except ConcordatError as error:
            log.warning("the round cannot be prepared: %s", error.message, extra=assigned.at)
            raise Refused("unsupported-spec", f"{error.message}; fix: {error.fix}") from error
        except Exception as error:  # anything may fail in a library; the message may name this site's files
            log.exception("the round cannot be prepared; nothing is charged", extra=assigned.at)
            raise Refused("unsupported-spec", "the site cannot prepare this round; see the site's own log") from error

    def _reserve(self, assigned: Assignment) -> Reservation:
        """Write the order, then hold its mechanism against the budget (or find it held since a crash)."""
        mechanism = assigned.spec.mechanism()
        for spend in list(self._ledger.spends(run=assigned.run)):
            earlier = spend.reservation
            if earlier.purpose != TRAINING or spend.outcome != "open":
                if earlier.round == assigned.round and spend.outcome == "in-doubt":
                    raise Refused("failed", "this round failed here and was charged; it is not tried again")
                continue
            order = self._store.find(earlier.run, earlier.round)
            same = order and (order.spec_digest, order.adapter_digest) == (
                assigned.spec_digest,
                assigned.adapter_digest,
            )
            # The data that is read is the data that was charged for, whatever site.toml names since the crash.
            data = (earlier.dataset, earlier.dataset_version) == (self._facts.dataset.name, self._facts.dataset.version)
            if earlier.round == assigned.round and same and data and earlier.mechanism == mechanism:
                log.warning("computing again what a crash broke off; its charge is held", extra=assigned.at)
                note_computed_again(self._ledger, earlier)
                return earlier
            self._ledger.charge_in_doubt(earlier, "broken off by a crash, and the run went on without it")
            if earlier.round == assigned.round:
                raise Refused("failed", "this round was broken off here and charged; it is not tried again")
        order = Order(
            run=assigned.run,
            round=assigned.round,
            nonce=assigned.nonce,
            spec_digest=assigned.spec_digest,
            adapter_digest=assigned.adapter_digest,
            model_digest=self._facts.model_digest,
            ordered_at=time.time(),
        )
        self._store.put(order)
        fault("round.ordered")
        try:
            reservation = self._ledger.reserve(
                self._facts.dataset, mechanism, run=assigned.run, round=assigned.round, purpose=TRAINING
            )
        except BudgetExhausted:
            self._store.drop(order)  # whoever may order without being granted anything must not fill the disk
            raise
        self._remember(order)
        if self._stopping.is_set():  # while it was prepared: no record was read for it, so it costs nothing
            self._ledger.void(reservation, "the agent was stopped before it read a record")
            self._store.drop(order)
            raise Stopping
        return reservation

    def _compute(self, assigned: Assignment, reservation: Reservation, offset: dict[str, Any]) -> tuple[Order, bytes]:
        """Train and keep the update on disk. Whatever goes wrong inside, the reservation is charged in full."""
        self.state, self._computed = "training", True
        log.info("training", extra=assigned.at)
        self._progress.begin(assigned.run, assigned.round)

        def progress(step: int = 0, steps: int = reservation.mechanism.steps) -> None:
            fault("round.step")
            self._progress.step(step, steps)
            if self._stopping.is_set():
                raise Stopping

        try:
            trained = self._train(assigned.spec, reservation.mechanism, offset, assigned.round, progress)
            require_finite(trained.update)
            update = pack(trained.update, wire=assigned.spec.run.wire)
            fault("round.trained")
            order = self._store.find(assigned.run, assigned.round)
            if order is None:
                raise DataError("the round's order vanished from the disk", fix="look for who deleted it")
            order = dataclasses.replace(order, update_digest=digest(update), executed=trained.executed)
            self._store.put(order, update)
            fault("round.stored")
        except Stopping:
            raise  # nothing can have left: held for a repeat, like a round that a crash broke off
        except Exception as error:  # anything may fail in training, and the charge must not depend on what did
            self._ledger.charge_in_doubt(reservation, f"{type(error).__name__} {FAILED_REASON}")
            self._written()
            log.exception(
                "the round failed; it is charged in full, and the site leaves the run until `fl-client resume`",
                extra=assigned.at,
            )
            raise Refused("failed", "training failed at the site; see the site's own log") from error
        return order, update

    def _repeat(self, assigned: Assignment) -> Sealed | None:
        """The answer to a round that was settled before, None when it is new."""
        spends = self._ledger.spends(run=assigned.run)
        settled = [
            spend
            for spend in spends
            if spend.outcome == "settled"
            and (spend.reservation.round, spend.reservation.purpose) == (assigned.round, TRAINING)
        ]
        if not settled:
            return None
        spend = settled[-1]
        order = self._store.find(assigned.run, assigned.round)
        if order is None:
            raise Refused("bad-manifest", "this round is too old: its update is no longer kept")
        if order.update_digest != spend.release_digest or spend.settled_seq is None:
            raise Refused("failed", "this round was charged, but its update is no longer stored")
        if (order.spec_digest, order.adapter_digest) != (assigned.spec_digest, assigned.adapter_digest):
            raise Refused("bad-manifest", "this round was already released for another spec or adapter")
        update = self._store.update(order)
        if update is None:
            raise Refused("bad-manifest", "this round is too old: its update is no longer kept")
        log.info("sending the stored update again; nothing is spent", extra=assigned.at)
        return self._release(assigned, order, self._ledger.entry(spend.settled_seq).id, update)

    def _release(self, assigned: Assignment, order: Order, entry_id: str, update: bytes) -> Sealed:
        position = self._ledger.epsilon(self._facts.dataset)
        pinned = self._ledger.checkpoint()
        if order.executed is None or order.update_digest is None:
            raise RunError("the round has no update", fix="this is a defect of the agent")
        receipt = Receipt(
            run=assigned.run,
            round=assigned.round,
            site=self._facts.site,
            manifest_digest=assigned.digest,
            spec_digest=assigned.spec_digest,
            update_digest=order.update_digest,
            model_digest=order.model_digest,
            mechanism=order.executed,
            steps_executed=order.executed.steps,
            epsilon_spent_total=position.spent,
            delta=position.delta,
            privacy_unit=self._facts.dataset.privacy_unit,
            ledger_head=pinned["head"],
            ledger_entries=pinned["entries"],
            merkle_root=pinned["merkle_root"],
            entry_id=entry_id,
            created_at=time.time(),
        )
        sealed = self._outgoing.release(entry_id, receipt, update)
        fault("round.sealed")
        return sealed

    def _checked(self, arrived: ReceivedOrder, adapter: bytes, spec_json: str) -> Assignment:
        """Return what is asked for after every check that needs no private data; Refused otherwise."""
        facts = self._facts
        try:
            arrived.require_accepted(facts.accepts_key)
            assigned = Assignment.of(arrived, spec_json)
        except ConcordatError as error:
            raise Refused("bad-manifest", error.message) from error
        now = time.time()
        earlier = self._nonces.get(assigned.nonce)
        for wrong, message in (
            (assigned.site != facts.site, f"the order is for site {assigned.site}"),
            (facts.site not in assigned.spec.run.sites, "the spec does not name this site"),
            (assigned.round > assigned.spec.run.rounds, f"the run has {assigned.spec.run.rounds} rounds"),
            (not self._may_order(assigned.run), f"run {assigned.run!r} is not the coordinator's to order"),
            (now > assigned.expires_at, "the order has expired; check both clocks"),
            (assigned.issued_at > now + CLOCK_SKEW_S, "the order is from the future; check both clocks"),
            (assigned.adapter_digest != digest(adapter), "the adapter is not the one that the order names"),
            (
                earlier is not None and earlier != (assigned.run, assigned.round),
                "the order's nonce was used for another round",
            ),
            (
                self._specs.get(assigned.run, assigned.spec_digest) != assigned.spec_digest,
                "the run's spec is not the one of its earlier rounds",
            ),
        ):
            if wrong:
                raise Refused("bad-manifest", message)
        if objection := facts.base.objection(assigned.spec):
            raise Refused(objection.code, objection.message)
        return assigned

    def _may_order(self, run: str) -> bool:
        """Whether the run lies in the name space of those who may sign orders here."""
        if self._facts.namespace == ALONE:
            return run.startswith(ALONE)
        try:
            return run_name(run) == run
        except ConcordatError:
            return False

    def _remember(self, order: Order) -> None:
        self._nonces[order.nonce] = (order.run, order.round)
        self._specs.setdefault(order.run, order.spec_digest)
