"""A ledger that was rolled back is not used: the home remembers how far it had come.

Each settled round writes the ledger's head (number of entries, last hash) into the home. A ledger that is shorter, or
has another entry there, is an old copy: what it has forgotten was spent all the same. Stored releases that the
ledger knows nothing of say so, too. Only a home that was rolled back together with the ledger is not noticed here; the
receipts that the coordinator holds tell then (`fl-audit reconcile`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fl_client.agent.outgoing import EVALUATION, TRAINING
from fl_client.agent.releases import ReleaseStore
from fl_shared.adapters.safetensors import digest
from fl_shared.canonical import parse_json
from fl_shared.declaration import Document
from fl_shared.errors import ConfigError, LedgerError
from fl_shared.fields import Text, Whole
from fl_shared.files import write_durably
from fl_shared.ledger.reader import LedgerReader
from fl_shared.ledger.service import Ledger
from fl_shared.privacy.mechanism import Mechanism

log = logging.getLogger("fl_client.agent")

ACCEPTED = "ledger-accepted"


@dataclass(frozen=True)
class Forgotten:
    """A release on disk that no entry of the ledger knows: it was spent, and must be entered again."""

    run: str
    round: int
    purpose: str
    mechanism: Mechanism
    release_digest: str


@dataclass(frozen=True)
class KnownHead(Document):
    """The ledger's head as the home has written it down: number of entries and last hash."""

    entries: Annotated[int, Whole(1, 2**62)]
    head: Text


class LedgerHead:
    """The file with the last head that this home has seen."""

    def __init__(self, path: Path) -> None:
        """Use `path`."""
        self._path = path

    def write(self, ledger: LedgerReader) -> None:
        """Remember the ledger's head as it is now; OSError when the disk refuses."""
        head = ledger.head()
        text = json.dumps(KnownHead(head.entries, head.hash).to_dict())
        write_durably(self._path, f"{text}\n".encode())

    def objection(self, ledger: LedgerReader) -> str:
        """What speaks against the ledger being at least as new as this home has seen it; "" when nothing does."""
        try:
            known = KnownHead.from_dict(parse_json(self._path.read_bytes(), str(self._path)), where=str(self._path))
            entries, head = known.entries, known.head
        except FileNotFoundError:
            return ""
        except (ConfigError, OSError):
            return f"{self._path} is damaged"
        newest = ledger.head()
        if newest.entries < entries:
            return f"it has {newest.entries} entries, and had {entries} when this home last wrote to it"
        if ledger.entry(entries).hash != head:
            return f"its entry {entries} is not the one that this home has seen there"
        return ""


def reserved_rounds(ledger: LedgerReader, runs: Collection[str]) -> set[tuple[str, int, str]]:
    """Run, round and purpose of all that the ledger has reserved for these runs."""
    return {
        (run, spend.reservation.round, spend.reservation.purpose)
        for run in set(runs)
        for spend in ledger.spends(run=run)
    }


def forgotten(ledger: LedgerReader, store: ReleaseStore) -> list[Forgotten]:
    """The stored releases of which the ledger has no reservation."""
    orders = list(store.all())
    known = reserved_rounds(ledger, [order.run for order in orders])
    missing = [
        Forgotten(order.run, order.round, TRAINING, order.executed, order.update_digest)
        for order in orders
        if order.executed and order.update_digest and (order.run, order.round, TRAINING) not in known
    ]
    for run, figures, mechanism in store.figures():
        if not any(True for _ in ledger.spends(run=run)):
            missing.append(Forgotten(run, 0, EVALUATION, mechanism, digest(figures)))
    return missing


def require_newest(ledger: LedgerReader, head: LedgerHead, store: ReleaseStore) -> None:
    """Raise LedgerError when this home knows more of the ledger than the ledger itself."""
    wrong = head.objection(ledger)
    lost = forgotten(ledger, store)
    if lost and not wrong:
        first = lost[0]
        wrong = f"it has no entry for {first.purpose} of run {first.run}, round {first.round}, whose release lies here"
    if wrong:
        raise LedgerError(
            f"the ledger {ledger.url} was rolled back: {wrong}",
            fix="restore its newest copy; if that is lost for good, compare with the coordinator's receipts "
            "(fl-audit reconcile) and enter what this home knows: fl-client resume --site ID --ledger --by NAME "
            "--reason TEXT",
            code="ledger-rolled-back",
        )


def accept(ledger: Ledger, dataset: str, head: LedgerHead, store: ReleaseStore, operator: str, reason: str) -> int:
    """Enter what an old copy of the ledger has forgotten, as far as the stored releases tell; how many entries.

    The acceptance is itself an entry that names who said so.

    Raises:
        BudgetExhausted: what was spent no longer fits; nothing can be trained until the budget is raised.
    """
    lost = forgotten(ledger, store)
    ledger.witness({"what": ACCEPTED, "by": operator, "reason": reason, "forgotten": len(lost)})
    for release in lost:
        reservation = ledger.reserve(
            dataset, release.mechanism, run=release.run, round=release.round, purpose=release.purpose
        )
        ledger.settle(reservation, release.mechanism, release.release_digest)
    head.write(ledger)
    return len(lost)
