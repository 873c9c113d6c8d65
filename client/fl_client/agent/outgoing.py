"""The choke point: the one place through which bytes leave the trusted half.

There are four ways out and no fifth. An update, and the figures of an evaluation, need the id of a ledger
entry whose recorded digest is the digest of exactly these bytes. A refusal carries no array and no free text
from training: a typed code and a message made of public values. Nor does the answer to a plan, whose numbers
are computed here from the mechanisms in the ledger.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fl_shared.adapters.safetensors import digest
from fl_shared.documents.plan import MAX_OBJECTIONS, MAX_ROUNDS, Objection, PlanAnswer, PlanQuestion
from fl_shared.documents.round import Receipt, Refusal
from fl_shared.errors import LedgerError
from fl_shared.identity.signing import SigningKey, sign_document
from fl_shared.ledger.chain import timestamp
from fl_shared.ledger.reader import LedgerReader, now
from fl_shared.ledger.standing import Standing, standings
from fl_shared.ledger.suspension import Suspensions
from fl_shared.wire.agent_pb2 import Chunk, ReplyHeader
from fl_shared.wire.chunks import split

MAX_MESSAGE_CHARACTERS = 500
TRAINING = "training"
EVALUATION = "evaluation"


@dataclass(frozen=True)
class Sealed:
    """Something that may leave. Made by `Outgoing` alone. `outcome` is `ok` or the refusal's code."""

    status: str
    document: str
    payload: bytes
    outcome: str = "ok"


class Outgoing:
    """Turns receipts and refusals into signed chunks, after asking the ledger."""

    def __init__(self, key: SigningKey, ledger: LedgerReader, namespace: str = "") -> None:
        """Take the site's key, its ledger, and what the names of runs begin with whose updates may leave this way."""
        self._key = key
        self._namespace = namespace
        self._ledger = ledger
        self._suspensions = Suspensions(ledger)

    def suspended(self, run: str) -> bool:
        """Whether the site takes no part in `run` until its operator confirms."""
        return bool(self._suspensions.of(run))

    def release(self, entry_id: str, receipt: Receipt, update: bytes) -> Sealed:
        """Seal an update for leaving; LedgerError unless entry `entry_id` settled exactly these bytes."""
        update_digest = digest(update)
        wrong = self._objection(entry_id, receipt.run, receipt.round, TRAINING, update_digest)
        if receipt.entry_id != entry_id or receipt.update_digest != update_digest:
            wrong = wrong or "the receipt names another entry or other bytes"
        if receipt.run[: receipt.run.rfind(":") + 1] != self._namespace:
            wrong = wrong or f"run {receipt.run} belongs to others than those who are answered here"
        self._stop_if(wrong)
        document = sign_document(self._key, receipt.to_dict())
        return Sealed("ok", json.dumps(document, sort_keys=True), update)

    def evaluation(self, entry_id: str, site: str, run: str, figures: bytes) -> Sealed:
        """Seal an evaluation's figures (canonical JSON); LedgerError unless `entry_id` settled exactly these bytes."""
        figures_digest = digest(figures)
        self._stop_if(self._objection(entry_id, run, 0, EVALUATION, figures_digest))
        body = {
            "kind": "evaluation",
            "site": site,
            "run": run,
            "entry_id": entry_id,
            "figures_digest": figures_digest,
            "figures": json.loads(figures),
        }
        return Sealed("ok", json.dumps(sign_document(self._key, body), sort_keys=True), b"")

    @staticmethod
    def _stop_if(wrong: str) -> None:
        if wrong:
            raise LedgerError(
                f"nothing leaves: {wrong}",
                fix="this is a defect of the agent or a damaged file; everything was kept back",
                code="no-ledger-entry",
            )

    def _objection(self, entry_id: str, run: str, round_: int, purpose: str, content_digest: str) -> str:
        """Say what speaks against a release, "" when nothing does."""
        number = entry_id.partition(":")[0]
        if not number.isdigit():
            return f"{entry_id!r} names no ledger entry"
        entry = self._ledger.entry(int(number))
        if entry.id != entry_id or entry.kind != "settlement" or entry.body["outcome"] != "settled":
            return f"ledger entry {number} is no settlement of a release"
        if entry.body["release_digest"] != content_digest:
            return f"ledger entry {number} settled other bytes than {content_digest}"
        order = self._ledger.entry(int(entry.body["reservation"])).body
        if (order["run"], order["round"], order["purpose"]) != (run, round_, purpose):
            return f"ledger entry {number} belongs to {order['purpose']} of run {order['run']}, round {order['round']}"
        return ""

    def plan(self, question: PlanQuestion, dataset: str, objections: Sequence[Objection], least_noise: float) -> Sealed:
        """Seal the answer to a plan: `objections` of the policy, and what the ledger says of the budgets.

        Noise that would fit is never less than the policy's `least_noise`, under which nothing would be accepted.

        It depends on mechanisms, ceilings and what was asked alone, and neither reserves nor promises anything.
        """
        asked, rounds = question.spec.mechanism(), question.spec.run.rounds
        stamp = timestamp(now())
        budgets = standings(self._ledger, dataset, None)
        fits = {
            standing.name: standing.rounds_that_fit(asked) if standing.is_valid(stamp) else 0 for standing in budgets
        }
        full = [text for standing in budgets if (text := _refused(standing, rounds, fits[standing.name], stamp))]
        every = [*objections, *(Objection("budget-exhausted", text) for text in full)]
        noise = [standing.noise_for(asked.sampling_probability, asked.steps * rounds) for standing in budgets if full]
        enough = [max(multiplier, least_noise) for multiplier in noise if multiplier]
        answer = PlanAnswer(
            question=question.question,
            question_digest=question.digest,
            site=question.site,
            rounds_asked=rounds,
            rounds_affordable=min(MAX_ROUNDS, *fits.values()),
            noise_that_fits=0.0 if None in noise else max(enough, default=0.0),
            objections=tuple({str(objection): objection for objection in every}.values())[:MAX_OBJECTIONS],
            created_at=time.time(),
        )
        return Sealed("ok", json.dumps(sign_document(self._key, answer.to_dict()), sort_keys=True), b"")

    def refuse(self, refusal: Refusal) -> Sealed:
        """Seal a refusal: no array, a bounded message."""
        body = refusal.to_dict()
        body["message"] = refusal.message[:MAX_MESSAGE_CHARACTERS]
        status = "failed" if refusal.code == "failed" else "refused"
        return Sealed(status, json.dumps(sign_document(self._key, body), sort_keys=True), b"", refusal.code)


def _refused(standing: Standing, rounds: int, fits: int, stamp: str) -> str:
    """Why a budget would refuse, in the same public values as a refusal of a round; "" when it would not."""
    ceiling = f"{standing.name} (epsilon {standing.budget.epsilon:g} at delta {standing.budget.delta:g})"
    if not standing.is_valid(stamp):
        valid_from, valid_to = standing.budget.valid_from or "ever", standing.budget.valid_to or "ever"
        return f"the budget {ceiling} is valid from {valid_from} to {valid_to}, and now is {stamp}"
    if fits < rounds:
        used = standing.gate.used(standing.charged)
        return f"{fits} of {rounds} rounds fit into the budget {ceiling}, of which {used:.1%} is used"
    return ""


def chunks(sealed: Sealed) -> Iterator[Chunk]:
    """Yield the reply's header and its data in pieces of at most 1 MiB."""
    yield Chunk(
        reply=ReplyHeader(
            status=sealed.status,
            document_json=sealed.document,
            adapter_bytes=len(sealed.payload),
            adapter_digest=digest(sealed.payload),
        )
    )
    for piece in split(sealed.payload):
        yield Chunk(data=piece)
