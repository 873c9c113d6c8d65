"""The choke point: the one place through which bytes leave the trusted half.

There are three ways out and no fourth. An update, and the figures of an evaluation, need the id of a ledger
entry whose recorded digest is the digest of exactly these bytes. A refusal carries no array and no free text
from training: a typed code and a message made of public values.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from fl_shared.adapter import digest
from fl_shared.errors import LedgerError
from fl_shared.ledger.reader import LedgerReader
from fl_shared.manifest import Receipt, Refusal
from fl_shared.signing import SigningKey, sign_document
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

    def __init__(self, key: SigningKey, ledger: LedgerReader) -> None:
        """Take the site's key and its ledger."""
        self._key = key
        self._ledger = ledger

    def release(self, entry_id: str, receipt: Receipt, update: bytes) -> Sealed:
        """Seal an update for leaving; LedgerError unless entry `entry_id` settled exactly these bytes."""
        found = digest(update)
        wrong = self._objection(entry_id, receipt.run, receipt.round, TRAINING, found)
        if receipt.entry_id != entry_id or receipt.update_digest != found:
            wrong = wrong or "the receipt names another entry or other bytes"
        self._stop_if(wrong)
        document = sign_document(self._key, receipt.to_dict())
        return Sealed("ok", json.dumps(document, sort_keys=True), update)

    def evaluation(self, entry_id: str, site: str, run: str, figures: bytes) -> Sealed:
        """Seal an evaluation's figures (canonical JSON); LedgerError unless `entry_id` settled exactly these bytes."""
        found = digest(figures)
        self._stop_if(self._objection(entry_id, run, 0, EVALUATION, found))
        body = {
            "kind": "evaluation",
            "site": site,
            "run": run,
            "entry_id": entry_id,
            "figures_digest": found,
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

    def _objection(self, entry_id: str, run: str, round_: int, purpose: str, found: str) -> str:
        """Say what speaks against a release, "" when nothing does."""
        number = entry_id.partition(":")[0]
        if not number.isdigit():
            return f"{entry_id!r} names no ledger entry"
        entry = self._ledger.entry(int(number))
        if entry.id != entry_id or entry.kind != "settlement" or entry.body["outcome"] != "settled":
            return f"ledger entry {number} is no settlement of a release"
        if entry.body["release_digest"] != found:
            return f"ledger entry {number} settled other bytes than {found}"
        order = self._ledger.entry(int(entry.body["reservation"])).body
        if (order["run"], order["round"], order["purpose"]) != (run, round_, purpose):
            return f"ledger entry {number} belongs to {order['purpose']} of run {order['run']}, round {order['round']}"
        return ""

    def refuse(self, refusal: Refusal) -> Sealed:
        """Seal a refusal: no array, a bounded message."""
        body = refusal.to_dict()
        body["message"] = refusal.message[:MAX_MESSAGE_CHARACTERS]
        status = "failed" if refusal.code == "failed" else "refused"
        return Sealed(status, json.dumps(sign_document(self._key, body), sort_keys=True), b"", refusal.code)


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
