"""Verify one stretch of the chain by itself: hashes, signatures, typed rows, tree nodes.

This is the part of verification that costs time, so it runs in worker processes, one aligned stretch each.
It trusts nothing that the ledger's own programs computed. What needs the state before the stretch (who is
open, what is spent) is handed to `verify` as events.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fl_shared.errors import damaged, shown
from fl_shared.identity.signing import ed25519_key
from fl_shared.ledger.chain import Links, is_plain
from fl_shared.ledger.merkle import build_tree, leaf_hash
from fl_shared.ledger.models import TYPED, entries
from fl_shared.ledger.records import Problem
from fl_shared.ledger.store import Store

LEVEL = 11  # larger ones leave cores idle at the end
SIZE = 1 << LEVEL  # entries of one stretch
_ENTRY = ", ".join(column.name for column in entries.columns)
# What the replay needs of the frequent kinds, as a tuple: a ledger is mostly these, and they cross processes.
EVENT_FIELDS = {
    "reservation": (
        "dataset",
        "study",
        "dataset_seq",
        "kind",
        "neighbouring",
        "noise_multiplier",
        "sampling_probability",
        "steps",
    ),
    "settlement": ("reservation", "steps", "outcome", "release_digest"),
}
_decode = json.JSONDecoder().raw_decode
_COLUMNS = {
    kind: tuple(sorted(column.name for column in table.columns if column.name != "seq"))
    for kind, table in TYPED.items()  # sorted: as in canonical JSON
}
_values = {kind: itemgetter(*columns) for kind, columns in _COLUMNS.items()}
_event = {kind: itemgetter(*names) for kind, names in EVENT_FIELDS.items()}


# What differs between most rows of a frequent kind: build_tree numbers and one text at the most.
_VARYING = {"reservation": ("round",), "settlement": ("release_digest", "reservation")}


class _Frequent:
    """Compares a typed row of a frequent kind with the signed body as text: no JSON is parsed, no table made.

    Most rows of a stretch differ in few columns; the text around those is made once and kept.
    """

    def __init__(self, kind: str) -> None:
        columns, varying = _COLUMNS[kind], _VARYING[kind]
        self._columns = columns
        self._texts = {name for name in columns if isinstance(TYPED[kind].columns[name].type, sa.Text | sa.String)}
        self._varying = itemgetter(*map(columns.index, varying))
        self._fixed = itemgetter(*(at for at, name in enumerate(columns) if name not in varying))
        self._number = next(at for at, name in enumerate(columns) if name in varying and name not in self._texts)
        self._text = next((at for at, name in enumerate(columns) if name in varying and name in self._texts), None)
        self._event: Callable[[Sequence[Any]], tuple[Any, ...]] = itemgetter(*map(columns.index, EVENT_FIELDS[kind]))
        self._one_event = not set(varying) & set(EVENT_FIELDS[kind])
        self._known: dict[Any, tuple[str | None, tuple[Any, ...] | None]] = {}

    def event(self, row: Sequence[Any], body: str) -> tuple[Any, ...] | None:
        """Return the row's EVENT_FIELDS when `body` is the row in canonical JSON. None may also mean: look closer.

        Equal events of a kind that names no row of its own are one object, which crosses to another process once.
        """
        fixed = self._fixed(row)
        known = self._known.get(fixed)
        if known is None:
            known = self._known[fixed] = (self._form(row), self._event(row) if self._one_event else None)
        form, event = known
        if form is None or type(row[self._number]) is not int:
            return None
        if self._text is not None:
            text = row[self._text]
            if type(text) is not str or not is_plain(text):
                return None
        if form % self._varying(row) != body:
            return None
        return event or self._event(row)

    def _form(self, row: Sequence[Any]) -> str | None:
        """Return the row in canonical JSON with a place for each varying column; None when it needs a closer look."""
        parts = []
        for at, (name, value) in enumerate(zip(self._columns, row, strict=True)):
            if at in (self._number, self._text):
                parts.append(f'"{name}":"%s"' if name in self._texts else f'"{name}":%d')
            elif name in self._texts and isinstance(value, str) and is_plain(value):
                parts.append(f'"{name}":"{value}"'.replace("%", "%%"))
            elif name not in self._texts and isinstance(value, int | float) and math.isfinite(value):
                parts.append(f'"{name}":{value!r}')
            else:
                return None
        return f"{{{','.join(parts)}}}"


@dataclass(frozen=True)
class Job:
    """One stretch: entries `first`..`last`, and which key signs from which entry on."""

    url: str
    site: str
    keys: tuple[tuple[int, str], ...]
    first: int
    last: int


@dataclass
class Result:
    """What a stretch says, for the pass over all of them.

    Attributes:
        events: (seq, kind, signed body, created_at) in order; the body of the frequent kinds is a tuple of
            EVENT_FIELDS.
        tallies: (key, version, held, spent) by entry, as stored.
        peaks: complete subtrees of the Merkle tree, largest first.
    """

    job: Job
    first_prev: str = ""
    last_hash: str = ""
    first_time: str = ""
    last_time: str = ""
    problems: list[Problem] = field(default_factory=list)
    events: list[tuple[int, str, Any, str]] = field(default_factory=list)
    tallies: dict[int, tuple[int, int, int, int]] = field(default_factory=dict)
    peaks: list[tuple[int, bytes]] = field(default_factory=list)


def check_file(url: str) -> list[Problem]:
    """Name what SQLite itself finds wrong with its file; other databases keep no such account."""
    store = Store(url, read_only=True)
    try:
        if not store.sqlite:
            return []
        with store.read() as connection:
            # The quick check would pass an index that leaves rows out, and figures are read through indexes.
            lines = connection.exec_driver_sql("PRAGMA integrity_check(20)").scalars().all()
        return [Problem(f"database file: {line}") for line in lines if line != "ok"]
    finally:
        store.close()


def check(job: Job) -> Result:
    """Verify one stretch."""
    store = Store(job.url, read_only=True)
    try:
        with store.read() as connection:
            # The bare driver: rows by the million need no wrapping.
            cursor = connection.connection.cursor()

            def rows(table: str, columns: str, where: str = "") -> list[Sequence[Any]]:
                span = where or f"seq BETWEEN {job.first:d} AND {job.last:d}"
                query = f"SELECT {columns} FROM {table} WHERE {span}"  # noqa: S608  # our own names
                try:
                    cursor.execute(query)
                    return list(cursor.fetchall())
                except store.driver_error as error:
                    raise damaged(
                        f"ledger {store.name}: {table} cannot be read: {error}",
                        fix="the file is damaged: restore the newest backup, then reconcile",
                        code="ledger-corrupt",
                    ) from error

            result = Result(job)
            typed = {
                kind: _by_seq(result, kind, rows(TYPED[kind].name, ", ".join(("seq", *columns))))
                for kind, columns in _COLUMNS.items()
            }
            stored = sorted(rows("entries", _ENTRY), key=lambda row: row[0])
            tree = _walk(result, stored, typed)
            result.tallies = {
                row[0]: (row[1], row[2], row[3], row[4]) for row in rows("tallies", "seq, key, version, held, spent")
            }
            _check_nodes(
                result,
                tree,
                [
                    row
                    for level in range(1, LEVEL + 1)
                    for row in rows(
                        "merkle_nodes",
                        "level, position, hash",
                        f"level = {level:d} AND position BETWEEN {(job.first - 1) >> level:d} "
                        f"AND {((job.last - 1) >> level):d}",
                    )
                ],
            )
        return result
    finally:
        store.close()


def _walk(
    result: Result, stored: list[Sequence[Any]], typed: dict[str, dict[int, Sequence[Any]]]
) -> dict[tuple[int, int], str]:
    """Check each entry and its typed row; return the tree's inner nodes by (level, position)."""
    job, problems = result.job, result.problems
    signers = [(start, ed25519_key(key)) for start, key in job.keys]
    leaves: list[bytes] = []
    frequent = {kind: _Frequent(kind) for kind in EVENT_FIELDS}
    links = Links(job.site, job.first, prev=None)
    signer, following = _signer(signers, job.first)
    for row in stored:
        seq, kind, body, prev_hash, digest, _signature, created_at = row
        if links.prev is None:
            result.first_prev, result.first_time = prev_hash, created_at
        if seq >= following:
            signer, following = _signer(signers, seq)
        problems += links.feed(row, signer)
        event = None
        if kind in frequent and seq in typed[kind]:
            event = frequent[kind].event(typed[kind][seq], body)
        if event is None:
            _check_typed(result, seq, kind, body, created_at, typed)
        else:
            del typed[kind][seq]
            result.events.append((seq, kind, event, created_at))
        try:
            leaves.append(leaf_hash(digest))
        except (TypeError, ValueError):
            continue  # it is no digest, which `feed` has named
    if links.expected != job.last + 1:
        problems.append(Problem(f"entries: {links.expected} to {job.last} missing", links.expected))
    base = (job.first - 1) >> LEVEL << LEVEL
    nodes, result.peaks = build_tree(leaves)
    result.last_hash, result.last_time = links.prev or "", links.time
    for kind, left in typed.items():
        for seq in left:
            problems.append(Problem(f"{TYPED[kind].name}: row {seq} has no {kind} entry", seq))
    return {(level, at + (base >> level)): node.hex() for (level, at), node in nodes.items()}


def _signer(signers: list[tuple[int, Ed25519PublicKey]], seq: int) -> tuple[Ed25519PublicKey, float]:
    """Return the key that signs entry `seq`, and the entry from which another one does."""
    current = max(index for index, (start, _key) in enumerate(signers) if start <= seq)
    return signers[current][1], signers[current + 1][0] if current + 1 < len(signers) else math.inf


def _by_seq(result: Result, kind: str, fetched: list[Sequence[Any]]) -> dict[int, Sequence[Any]]:
    rows: dict[int, Sequence[Any]] = {}
    for row in fetched:
        if row[0] in rows:
            result.problems.append(Problem(f"{TYPED[kind].name}: row {row[0]} stands there twice", row[0]))
        rows[row[0]] = row[1:]
    return rows


def _check_typed(
    result: Result,
    seq: int,
    kind: str,
    body: str,
    created_at: str,
    typed: dict[str, dict[int, Sequence[Any]]],
) -> None:
    """Hold the typed row against the parsed body, and pass the body on as an event."""
    try:
        signed, end = _decode(body)
    except (TypeError, ValueError, RecursionError):
        signed, end = None, 0
    if not isinstance(signed, dict) or end != len(body):
        result.problems.append(Problem(f"entry {seq}: body is no table in canonical JSON", seq))
        return
    columns = _COLUMNS.get(kind)
    if columns is not None:
        row = typed[kind].pop(seq, None)
        if row is None:
            result.problems.append(Problem(f"{TYPED[kind].name}: row {seq} is missing", seq))
        elif len(signed) != len(columns) or not _equal(kind, signed, row):
            stored = dict(zip(columns, row, strict=True))
            result.problems.append(Problem(_difference(kind, seq, signed, stored), seq))
    short = _event.get(kind)
    if short is None:
        result.events.append((seq, kind, signed, created_at))
        return
    try:
        result.events.append((seq, kind, short(signed), created_at))
    except (KeyError, TypeError) as error:
        result.problems.append(Problem(f"entry {seq}: its body lacks {error}", seq))


def _equal(kind: str, signed: dict[str, Any], row: Sequence[Any]) -> bool:
    try:
        return bool(_values[kind](signed) == row)
    except KeyError:
        return False


def _difference(kind: str, seq: int, signed: dict[str, Any], stored: dict[str, Any]) -> str:
    names = sorted(set(signed) ^ set(stored)) or [name for name in signed if signed[name] != stored[name]]
    return (
        f"{TYPED[kind].name}.{names[0]} of row {seq} is {shown(stored.get(names[0]))}, "
        f"the signed entry says {shown(signed.get(names[0]))}"
    )


def _check_nodes(result: Result, expected: dict[tuple[int, int], str], stored: list[Sequence[Any]]) -> None:
    if len(stored) == len(expected) and {(level, at): digest for level, at, digest in stored} == expected:
        return
    for level, position, digest in stored:
        if (position + 1) << level > result.job.last:
            continue  # written after this check began; `verify` holds the number of nodes against that of entries
        computed = expected.pop((level, position), None)
        if computed is None:
            result.problems.append(Problem(f"merkle_nodes: node {level}/{position} does not belong there"))
        elif computed != digest:
            result.problems.append(Problem(f"merkle_nodes: hash of node {level}/{position} does not fit"))
    for level, position in expected:
        result.problems.append(Problem(f"merkle_nodes: node {level}/{position} is missing"))
