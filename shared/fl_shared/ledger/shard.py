"""Verify one stretch of the chain by itself: hashes, signatures, typed rows, tree nodes.

This is the part of verification that costs time, so it runs in worker processes, one aligned stretch each.
It trusts nothing that the ledger's own programs computed. What needs the state before the stretch (who is
open, what is spent) is handed to `verify` as events.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fl_shared.ledger.chain import message_bytes, parse_timestamp
from fl_shared.ledger.merkle import Tree
from fl_shared.ledger.models import TYPED, entries
from fl_shared.ledger.store import Store

LEVEL = 13
SIZE = 1 << LEVEL  # entries of one stretch
_ENTRY = ", ".join(column.name for column in entries.columns)
_COLUMNS = {
    kind: tuple(column.name for column in table.columns if column.name != "seq") for kind, table in TYPED.items()
}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, in words that name the row; `seq` is the entry, where there is one."""

    message: str
    seq: int | None = None


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
        events: (seq, kind, body, created_at) of the typed entries, in order; the body is the signed one.
        tallies: (key, version, held, spent) by entry, as stored.
        peaks: complete subtrees of the Merkle tree, largest first.
    """

    job: Job
    first_prev: str = ""
    last_hash: str = ""
    first_time: str = ""
    last_time: str = ""
    problems: list[Problem] = field(default_factory=list)
    events: list[tuple[int, str, dict[str, Any], str]] = field(default_factory=list)
    tallies: dict[int, tuple[int, int, int, int]] = field(default_factory=dict)
    peaks: list[tuple[int, bytes]] = field(default_factory=list)


def check(job: Job) -> Result:
    """Verify one stretch."""
    store = Store(job.url, read_only=True)
    try:
        with store.read() as connection:

            def rows(table: str, columns: str, where: str = "") -> list[Sequence[Any]]:
                span = where or f"seq BETWEEN {job.first:d} AND {job.last:d}"
                query = f"SELECT {columns} FROM {table} WHERE {span}"  # noqa: S608  # our own names
                return list(connection.exec_driver_sql(query).fetchall())

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
    signers = [(start, Ed25519PublicKey.from_public_bytes(bytes.fromhex(key))) for start, key in job.keys]
    tree, nodes = Tree(), {}
    base = (job.first - 1) >> LEVEL << LEVEL
    expected, prev, time = job.first, None, ""
    for seq, kind, body, prev_hash, digest, signature, created_at in stored:
        if seq < expected:
            problems.append(Problem(f"entries: {seq} stands there twice", seq))
        elif seq > expected:
            missing = f"{expected}" if seq == expected + 1 else f"{expected} to {seq - 1}"
            problems.append(Problem(f"entries: {missing} missing", expected))
        if prev is None:
            result.first_prev, result.first_time = prev_hash, created_at
        elif prev_hash != prev:
            problems.append(Problem(f"entry {seq}: prev_hash is not the hash of the entry before", seq))
        message = message_bytes(
            seq=seq, kind=kind, body=body, prev_hash=prev_hash, created_at=created_at, site=job.site
        )
        if hashlib.sha256(message).hexdigest() != digest:
            problems.append(Problem(f"entry {seq}: its content was changed, its hash does not fit", seq))
        signer = next(key for start, key in reversed(signers) if start <= seq)
        try:
            signer.verify(bytes.fromhex(signature), message)
        except (InvalidSignature, ValueError):
            problems.append(Problem(f"entry {seq}: its signature does not fit", seq))
        if created_at < time:
            problems.append(Problem(f"entry {seq}: created_at {created_at} is before the entry before", seq))
        _check_time(seq, created_at, problems)
        for level, position, node in tree.add(digest) if _is_digest(digest) else ():
            nodes[level, position + (base >> level)] = node
        _check_typed(result, seq, kind, body, created_at, typed)
        expected, prev, time = seq + 1, digest, created_at
    if expected != job.last + 1:
        problems.append(Problem(f"entries: {expected} to {job.last} missing", expected))
    result.last_hash, result.last_time, result.peaks = prev or "", time, tree.peaks
    for kind, left in typed.items():
        for seq in left:
            problems.append(Problem(f"{TYPED[kind].name}: row {seq} has no {kind} entry", seq))
    return nodes


def _by_seq(result: Result, kind: str, found: list[Sequence[Any]]) -> dict[int, Sequence[Any]]:
    rows: dict[int, Sequence[Any]] = {}
    for row in found:
        if row[0] in rows:
            result.problems.append(Problem(f"{TYPED[kind].name}: row {row[0]} stands there twice", row[0]))
        rows[row[0]] = row[1:]
    return rows


def _is_digest(text: object) -> bool:
    return isinstance(text, str) and len(text) == 64 and not set(text) - set("0123456789abcdef")


def _check_time(seq: int, created_at: str, problems: list[Problem]) -> None:
    try:
        parse_timestamp(created_at)
    except (TypeError, ValueError):
        problems.append(Problem(f"entry {seq}: created_at {created_at!r} is no time", seq))


def _check_typed(
    result: Result,
    seq: int,
    kind: str,
    body: str,
    created_at: str,
    typed: dict[str, dict[int, Sequence[Any]]],
) -> None:
    """Hold the typed row against the signed body, byte for byte, and pass the body on as an event."""
    columns = _COLUMNS.get(kind)
    if columns is not None:
        row = typed[kind].pop(seq, None)
        if row is None:
            result.problems.append(Problem(f"{TYPED[kind].name}: row {seq} is missing", seq))
        else:
            said = dict(zip(columns, row, strict=True))
            if json.dumps(said, sort_keys=True, separators=(",", ":"), ensure_ascii=False) == body:
                result.events.append((seq, kind, said, created_at))
                return
            result.problems.append(Problem(_difference(kind, seq, body, said), seq))
    try:
        signed = json.loads(body)
    except (TypeError, ValueError):
        result.problems.append(Problem(f"entry {seq}: body is no JSON", seq))
        return
    if isinstance(signed, dict):
        result.events.append((seq, kind, signed, created_at))
    else:
        result.problems.append(Problem(f"entry {seq}: body is no table", seq))


def _difference(kind: str, seq: int, body: str, said: dict[str, Any]) -> str:
    table = TYPED[kind].name
    try:
        signed = json.loads(body)
    except ValueError:
        return f"entry {seq}: body is no JSON"
    if not isinstance(signed, dict):
        return f"entry {seq}: body is no table"
    for name in sorted(set(signed) | set(said)):
        if name not in signed or name not in said or signed[name] != said[name]:
            return f"{table}.{name} of row {seq} is {said.get(name)!r}, the signed entry says {signed.get(name)!r}"
    return f"entry {seq}: body is not canonical JSON"


def _check_nodes(result: Result, expected: dict[tuple[int, int], str], stored: list[Sequence[Any]]) -> None:
    for level, position, digest in stored:
        wanted = expected.pop((level, position), None)
        if wanted is None:
            result.problems.append(Problem(f"merkle_nodes: node {level}/{position} does not belong there"))
        elif wanted != digest:
            result.problems.append(Problem(f"merkle_nodes: hash of node {level}/{position} does not fit"))
    for level, position in expected:
        result.problems.append(Problem(f"merkle_nodes: node {level}/{position} is missing"))
