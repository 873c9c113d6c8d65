"""Which runs a site takes no further part in until its operator confirms: read from the ledger's own entries.

A computation that failed after private data was read is charged, and its failure is an answer that no noise covers. So
one such answer ends the site's part in the run. A computation that broke off without an answer (a crash, a power cut)
may be due to the data as well, but mostly is not: several are allowed. Confirmations and resumed computations are
`witness` entries, signed and chained like all others, so that nothing of this depends on another file.
"""

from __future__ import annotations

import sqlalchemy as sa

from fl_shared.errors import ConfigError, LedgerError
from fl_shared.ledger import chain
from fl_shared.ledger.models import IN_DOUBT, entries, reservations, settlements
from fl_shared.ledger.reader import LedgerReader
from fl_shared.ledger.records import Entry, Reservation
from fl_shared.ledger.service import Ledger

FAILED_REASON = "after private data was read"
"""How the reason of a settlement ends whose computation failed; other charges in doubt were broken off."""
MAX_BROKEN_OFF = 10
MAX_FAILED_RUNS = 3
CONFIRMED, RESUMED = "run-confirmed", "computed-again"


class Suspensions:
    """The suspended runs of one ledger. Each look reads only the entries that are new."""

    def __init__(self, ledger: LedgerReader) -> None:
        """Read nothing yet."""
        self._ledger = ledger
        self._seen = 0
        self._failed: dict[str, int] = {}
        self._broken: dict[str, int] = {}

    def of(self, run: str) -> str:
        """Why the site takes no part in `run`, for its own operator; "" when it does."""
        suspended = self.all()
        if run in suspended:
            return suspended[run]
        failed = sorted(name for name in suspended if self._failed.get(name))
        if len(failed) >= MAX_FAILED_RUNS:
            return f"{len(failed)} other runs failed here and are not confirmed: {', '.join(failed)}"
        return ""

    def all(self) -> dict[str, str]:
        """Every suspended run, and why."""
        self._look()
        reasons = {run: f"{n} of its computations broke off" for run, n in self._broken.items() if n >= MAX_BROKEN_OFF}
        return reasons | {run: f"a computation failed {FAILED_REASON}" for run, n in self._failed.items() if n}

    def _look(self) -> None:
        doubts = (
            sa.select(settlements.c.seq, settlements.c.reason, reservations.c.run)
            .join(reservations, reservations.c.seq == settlements.c.reservation)
            .where(settlements.c.seq > self._seen, settlements.c.outcome == IN_DOUBT)
        )
        notes = sa.select(entries).where(entries.c.seq > self._seen, entries.c.kind == "witness")
        with self._ledger.reading() as connection:
            last = chain.last_entry(connection)
            events = [(int(seq), str(reason), str(run)) for seq, reason, run in connection.execute(doubts)]
            for row in connection.execute(notes).mappings():
                entry = chain.entry_of(row)
                events.append((entry.seq, str(entry.body.get("what")), str(entry.body.get("run"))))
        for _seq, reason, run in sorted(events):
            if reason == CONFIRMED:
                self._failed.pop(run, None)
                self._broken.pop(run, None)
            elif reason.endswith(FAILED_REASON):
                self._failed[run] = self._failed.get(run, 0) + 1
            elif reason == RESUMED or not _is_note(reason):
                self._broken[run] = self._broken.get(run, 0) + 1
        self._seen = last.seq if last is not None else 0


def _is_note(reason: str) -> bool:
    """Whether `reason` is a kind of witness entry rather than a settlement's reason, which has words."""
    return " " not in reason


def require_words(operator: str, reason: str) -> None:
    """ConfigError unless a confirmation names who gives it and why."""
    if not operator or not reason or len(operator) > 200 or len(reason) > 1000:
        raise ConfigError("a confirmation needs a name and a reason", fix="give --by NAME and --reason TEXT")


def resume_command(site: str, run: str) -> str:
    """What an operator types to take part in a suspended run again."""
    return f"fl-client resume --site {site} {run} --by NAME --reason TEXT"


def confirm_run(ledger: Ledger, run: str, operator: str, reason: str) -> Entry:
    """Let the site take part in a suspended run again; a signed entry that names who said so.

    Raises:
        ConfigError: nobody or no reason is named. LedgerError: the run is not suspended.
    """
    require_words(operator, reason)
    if run not in Suspensions(ledger).all():
        raise LedgerError(f"run {run!r} is not suspended", fix="fl-client status lists the runs that are")
    return ledger.witness({"what": CONFIRMED, "run": run, "by": operator, "reason": reason})


def note_computed_again(ledger: Ledger, reservation: Reservation) -> Entry:
    """Record that a computation which had broken off is done again under the same reservation."""
    body = {"what": RESUMED, "run": reservation.run, "round": reservation.round, "reservation": reservation.seq}
    return ledger.witness(body)
