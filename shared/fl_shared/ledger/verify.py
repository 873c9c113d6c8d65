"""Check a whole ledger without trusting it, with every core of the machine.

Stretches of the chain are checked in worker processes (`stretch`), then replayed in order (`replay`): chain,
signatures, typed rows, state machine, every grant, the caches, the schema with its triggers, and epsilon by
two accountants. Memory does not grow with the ledger. A truncated ledger or a restored backup is intact in
itself: only a checkpoint or a receipt kept elsewhere shows it, so give what you have.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from fl_shared.canonical import sha256_hex
from fl_shared.errors import LedgerError, SignatureError, shown
from fl_shared.identity.signing import ed25519_key, verify
from fl_shared.ledger import chain, merkle, stretch
from fl_shared.ledger.damage import misfits
from fl_shared.ledger.models import TYPED, entries, merkle_nodes, tallies, tally_keys
from fl_shared.ledger.records import Entry, Problem
from fl_shared.ledger.replay import Place, Replay, Total
from fl_shared.ledger.schema import schema_problems
from fl_shared.ledger.store import Store
from fl_shared.privacy.accounting.merge import Key
from fl_shared.privacy.accounting.pld import steps_epsilon
from fl_shared.privacy.accounting.renyi import curve_epsilon

MOST_PROBLEMS = 1000


@dataclass(frozen=True)
class Checkpoint:
    """What somebody else knows of the ledger: after `entries` entries it had this head (and root)."""

    entries: int
    head: str
    merkle_root: str = ""
    source: str = "checkpoint"


@dataclass
class Report:
    """What verification found; `problems` is empty when all is well.

    Attributes:
        key: the public key that the first entry names; pinned says whether the auditor gave it.
        budgets: epsilon of each budget by two accountants, recomputed from the signed entries.
        other_site: the site whose ledger this is, when it is whole and another's.
    """

    site: str
    entries: int = 0
    head: str = chain.GENESIS_HASH
    merkle_root: str = merkle.EMPTY_ROOT
    key: str = ""
    pinned: bool = False
    first: str = ""
    last: str = ""
    reservations: int = 0
    open: int = 0
    settled: Mapping[str, int] = field(default_factory=dict)
    checkpoints: int = 0
    budgets: list[dict[str, Any]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    other_site: str = ""

    @property
    def intact(self) -> bool:
        """Whether nothing was found."""
        return not self.problems

    @property
    def damaged(self) -> list[Problem]:
        """What was found to be wrong with the record itself, leaving out what it truly tells of wrong deeds."""
        return [problem for problem in self.problems if not problem.breach]


def verify_ledger(
    url: str,
    site: str,
    *,
    public_key: str | None = None,
    checkpoints: Sequence[Checkpoint] = (),
    processes: int | None = None,
) -> Report:
    """Check the ledger of `site` at `url`; every problem is named in the report, none is raised.

    `public_key` is the site's key as the auditor knows it (64 hex digits); without it the ledger's own word
    is taken, and a ledger rewritten with another key passes. `checkpoints` are kept elsewhere, for example
    in receipts. `processes` defaults to the number of cores. Raises LedgerError when the database cannot be
    read at all.
    """
    store = Store(url, read_only=True)
    report = Report(site=site)
    try:
        store.migrate()
        try:
            with store.read() as connection:
                _check(connection, store, report, public_key, checkpoints, processes or os.cpu_count() or 1)
        except Exception as error:  # whatever a check fell over is named below; what nobody can name is raised
            if isinstance(error, LedgerError) and error.code == "ledger-busy":
                raise
            report.problems = misfits(store) + report.problems
            if not report.problems:
                raise
            report.problems.append(Problem(f"the checks ended early: {error}"))
        else:
            if report.damaged:
                report.problems = misfits(store) + report.problems
        return report
    finally:
        store.close()


def _check(
    connection: sa.Connection,
    store: Store,
    report: Report,
    public_key: str | None,
    checkpoints: Sequence[Checkpoint],
    processes: int,
) -> None:
    """Check everything in one read transaction: an agent may go on writing meanwhile."""
    report.checkpoints = len(checkpoints)
    report.entries = _size(connection, report)
    keys = _keys(connection, report.site, public_key, report)
    report.problems += schema_problems(connection, store)
    with _no_collection(), _pool(processes, report.entries) as pool:
        file = pool.submit(stretch.check_file, store.reading_url)  # at the same time: it takes one core a while
        before = len(report.problems)
        try:
            if not report.entries:
                report.problems.append(Problem("the ledger is empty"))
            elif not keys:
                message = "entries: the genesis entry, which names the key, is missing or unusable"
                report.problems.append(Problem(message, 1))
            else:
                _walk(connection, store, report, keys, pool, 2 * processes)
        finally:
            report.problems[before:before] = file.result()
    if report.entries and keys:
        _check_counts(connection, report)
        for checkpoint in checkpoints:
            _check_checkpoint(connection, report, checkpoint)


class _SameProcess(Executor):
    """Computes at once, in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Return a future that is done."""
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def _pool(processes: int, total: int) -> Executor:
    """Workers, when there is more than one stretch to share out."""
    if processes == 1 or total <= stretch.SIZE:
        return _SameProcess()
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)
    return ProcessPoolExecutor(processes, mp_context=context)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Look for no reference cycles meanwhile, here and in forked workers: rows by the million hold none."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _size(connection: sa.Connection, report: Report) -> int:
    """Return the last entry's number, or what is close to the number of rows when it is far beyond that."""
    last, count = connection.execute(sa.select(sa.func.max(entries.c.seq), sa.func.count()).select_from(entries)).one()
    if not count:
        return 0
    if not isinstance(last, int) or not 1 <= last <= count + MOST_PROBLEMS:
        report.problems.append(Problem(f"entries.seq of the last row is {shown(last)}, and there are {count} rows"))
        return int(count)
    return last


def _keys(connection: sa.Connection, site: str, pinned: str | None, report: Report) -> tuple[tuple[int, str], ...]:
    """Return (first entry, public key) of each key, after checking that each names the next."""
    query = sa.select(entries).where(entries.c.kind.in_(("genesis", "key"))).order_by(entries.c.seq)
    signers: list[tuple[int, str]] = []
    for row in connection.execute(query).mappings():
        try:
            entry = chain.entry_of(row)
            key = str(entry.body["public_key"])
            ed25519_key(key)
            if entry.kind == "genesis":
                _check_genesis(entry, site, report)
            else:
                statement = f"concordat key for {site} after {entry.prev_hash}".encode()
                verify(key, statement, str(entry.body["proof"]))
                if not signers or entry.body["replaces"] != signers[-1][1]:
                    report.problems.append(Problem(f"entry {entry.seq}: replaces another key", entry.seq))
        except (KeyError, TypeError, ValueError, LedgerError, SignatureError) as error:
            report.problems.append(Problem(f"entry {row['seq']}: this key cannot be used ({error})", row["seq"]))
            continue
        if (entry.kind == "genesis") == (not signers):
            signers.append((entry.seq if entry.kind == "genesis" else entry.seq + 1, key))
    if signers and signers[0][0] == 1 and len(signers[0][1]) == 64:
        report.key, report.pinned = signers[0][1], pinned is not None
        # Any key of the chain pins all of it: each proved the hash of what came before it, and signed its successor.
        if pinned is not None and pinned not in [key for _, key in signers]:
            message = f"the ledger names key {signers[-1][1][:16]}…, the auditor knows {pinned[:16]}…"
            report.problems.append(Problem(message, 1))
        return tuple(signers)
    return ()


def _check_genesis(entry: Entry, site: str, report: Report) -> None:
    if entry.seq != 1:
        report.problems.append(Problem(f"entry {entry.seq}: a second genesis", entry.seq))
    if entry.body["site"] != site:
        report.other_site = _site_of_genesis(entry)
        report.problems.append(Problem(f"the ledger belongs to site {entry.body['site']!r}", 1))


def _site_of_genesis(entry: Entry) -> str:
    """Return the site that the genesis entry names, when its hash says that it was written so; '' when not."""
    site = str(entry.body["site"])
    message = chain.message_bytes(
        seq=entry.seq,
        kind=entry.kind,
        body=chain.body_text(entry.body),
        prev_hash=entry.prev_hash,
        created_at=entry.created_at,
        site=site,
    )
    return site if sha256_hex(message) == entry.hash else ""


def _results(jobs: Iterator[stretch.Job], pool: Executor, most: int) -> Iterator[stretch.Result]:
    """Yield results in order, with `most` stretches in flight."""
    flying: deque[Future[stretch.Result]] = deque()
    for job in jobs:
        flying.append(pool.submit(stretch.check, job))
        if len(flying) > most:
            yield flying.popleft().result()
    while flying:
        yield flying.popleft().result()


def _walk(
    connection: sa.Connection,
    store: Store,
    report: Report,
    keys: tuple[tuple[int, str], ...],
    pool: Executor,
    most: int,
) -> None:
    url = store.reading_url
    jobs = (
        stretch.Job(url, report.site, keys, first, min(first + stretch.SIZE - 1, report.entries))
        for first in range(1, report.entries + 1, stretch.SIZE)
    )
    state, tree = Replay(), merkle.Tree()
    sums = _Sums(connection, report)
    prev, time = chain.GENESIS_HASH, ""
    for result in _results(jobs, pool, most):
        first = result.job.first
        if result.first_prev and result.first_prev != prev:
            result.problems.append(Problem(f"entry {first}: prev_hash is not the hash of the entry before", first))
        if result.first_time < time:
            result.problems.append(Problem(f"entry {first}: created_at is before the entry before", first))
        for seq, kind, body, created_at in result.events:
            changed = state.feed(seq, kind, body, created_at)
            if changed is not None:
                sums.check(seq, changed, result.tallies.pop(seq, None))
        for seq in result.tallies:
            result.problems.append(Problem(f"tallies: row {seq} belongs to no reservation or settlement", seq))
        for level, node in result.peaks:
            for upper, position, digest in tree.add_subtree(level, node) if tree.size % (1 << level) == 0 else ():
                _check_node(connection, report, upper, position, digest)
        prev, time = result.last_hash, result.last_time
        report.first = report.first or result.first_time
        report.problems += result.problems + state.problems
        state.problems.clear()
        if len(report.problems) > MOST_PROBLEMS:
            report.problems[MOST_PROBLEMS:] = [Problem(f"more than {MOST_PROBLEMS} problems; stopped there")]
            break
    sums.finish()
    report.head, report.last, report.merkle_root = prev, time, tree.root()
    report.reservations, report.open, report.settled = state.reservations, len(state.open), state.settled
    if not report.damaged:
        report.budgets = [_budget(state, place) for place in sorted(state.budgets)]


def _budget(state: Replay, place: Place) -> dict[str, Any]:
    body = state.budgets[place]
    spent, held = state.charges(place)
    return {
        "dataset": place[0],
        "study": place[1] or None,
        "epsilon": body["epsilon"],
        "delta": body["delta"],
        "steps": sum(spent.values()),
        "spent_rdp": curve_epsilon(spent, body["delta"]),
        "spent_pld": steps_epsilon(spent, body["delta"]),
        "reserved_steps": sum(held.values()),
    }


def _check_node(connection: sa.Connection, report: Report, level: int, position: int, digest: str) -> None:
    where = (merkle_nodes.c.level == level) & (merkle_nodes.c.position == position)
    if level <= stretch.LEVEL:
        return  # the stretch has checked it
    stored = connection.execute(sa.select(merkle_nodes.c.hash).where(where)).scalar()
    if stored != digest:
        report.problems.append(Problem(f"merkle_nodes: hash of node {level}/{position} does not fit"))


class _Sums:
    """Holds the stored sums against the replayed ones, row by row."""

    def __init__(self, connection: sa.Connection, report: Report) -> None:
        self._report = report
        self._keys: dict[int, tuple[Place, Key]] = {}
        self._versions: dict[int, int] = {}
        self._totals: dict[int, Total] = {}  # of the rows whose key was compared
        for row in connection.execute(sa.select(tally_keys)).mappings():
            key = Key(row["kind"], row["neighbouring"], row["noise_multiplier"], row["sampling_probability"])
            self._keys[int(row["id"])] = ((str(row["dataset"]), str(row["study"])), key)

    def check(self, seq: int, total: Total, stored: tuple[int, int, int, int] | None) -> None:
        """Compare the row that entry `seq` wrote with the sum after it."""
        if stored is None:
            self._say(f"tallies: row {seq} is missing", seq)
            return
        number, version, held, spent = stored
        expected = self._versions.get(number, 0) + 1
        same = self._totals.get(number) is total
        if same and version == expected and held == total.held and spent == total.spent:
            self._versions[number] = version
            return
        changed = (total.place, total.key)
        if not same and self._keys.get(number) == changed:
            self._totals[number] = total
        if self._keys.get(number) != changed and number not in self._versions:
            named = "is missing" if number not in self._keys else f"says {self._keys[number]}"
            self._say(f"tally_keys: row {number}, tallies.key of row {seq}, {named}; entry {seq} says {changed}", seq)
        elif self._keys.get(number) != changed:
            self._say(f"tallies.key of row {seq} is {number}, which does not stand for {changed}", seq)
        self._versions[number] = version
        sums = {
            "version": (version, expected),
            "held": (held, total.held),
            "spent": (spent, total.spent),
        }
        for name, (is_, should) in sums.items():
            if is_ != should:
                self._say(f"tallies.{name} of row {seq} is {is_!r}, the entries say {should!r}", seq)

    def _say(self, message: str, seq: int | None = None) -> None:
        self._report.problems.append(Problem(message, seq))

    def finish(self) -> None:
        """Name keys that no entry uses."""
        for number in set(self._keys) - set(self._versions):
            self._say(f"tally_keys: row {number} belongs to no reservation")


def _check_counts(connection: sa.Connection, report: Report) -> None:
    """Name rows outside the chain's range, which no stretch looks at."""
    for table in (*TYPED.values(), tallies):
        outside = sa.select(table.c.seq).where((table.c.seq < 1) | (table.c.seq > report.entries))
        for seq in connection.execute(outside.limit(20)).scalars():
            report.problems.append(Problem(f"{table.name}: row {seq} has no entry", seq))
    below = connection.execute(sa.select(entries.c.seq).where(entries.c.seq < 1).limit(20)).scalars()
    report.problems += [Problem(f"entries: {seq} is no place in the chain", seq) for seq in below]
    expected = sum(report.entries >> level for level in range(1, report.entries.bit_length() + 1))
    stored = connection.execute(sa.select(sa.func.count()).select_from(merkle_nodes)).scalar_one()
    if stored != expected:
        report.problems.append(Problem(f"merkle_nodes: {stored} nodes, {expected} belong to {report.entries} entries"))


def _check_checkpoint(connection: sa.Connection, report: Report, known: Checkpoint) -> None:
    if known.entries < 0:
        report.problems.append(Problem(f"{known.source}: it pins {known.entries} entries"))
        return
    if known.entries > report.entries:
        report.problems.append(
            Problem(
                f"{known.source}: it pins {known.entries} entries, the ledger has {report.entries}: "
                "entries were cut off, or an old copy was restored",
                known.entries,
            )
        )
        return
    query = sa.select(entries.c.hash).where(entries.c.seq == known.entries)
    head = connection.execute(query).scalar() if known.entries else chain.GENESIS_HASH
    if head != known.head:
        report.problems.append(
            Problem(
                f"{known.source}: entry {known.entries} is not the one that it pins: the past was rewritten",
                known.entries,
            )
        )
    elif known.merkle_root:
        try:
            root = merkle.stored_root(
                connection,
                known.entries,
                lambda at: str(
                    connection.execute(sa.select(entries.c.hash).where(entries.c.seq == at + 1)).scalar_one()
                ),
            )
        except (sa.exc.NoResultFound, ValueError):
            root = ""
        if root != known.merkle_root:
            report.problems.append(Problem(f"{known.source}: the Merkle root does not fit", known.entries))
