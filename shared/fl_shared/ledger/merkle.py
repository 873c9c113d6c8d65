"""A Merkle tree over entry hashes (RFC 6962, section 2.1), kept as an append-only table of inner nodes.

Leaf i is `SHA-256(0x00 || hash of entry i+1)`, an inner node `SHA-256(0x01 || left || right)`. The nodes of
complete subtrees never change, so they are stored; a root needs one look-up a level.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence

import sqlalchemy as sa

from fl_shared.ledger.models import merkle_nodes

EMPTY_ROOT = hashlib.sha256(b"").hexdigest()


def leaf_hash(entry_hash: str) -> bytes:
    """Return the leaf for an entry's hash (64 hex digits)."""
    return hashlib.sha256(b"\0" + bytes.fromhex(entry_hash)).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Return the inner node over two children."""
    return hashlib.sha256(b"\1" + left + right).digest()


class Tree:
    """Roots of a growing tree in memory of O(log n): feed leaves in order, ask for the root at any time."""

    def __init__(self) -> None:
        self._peaks: list[tuple[int, bytes]] = []  # (level, node), falling levels
        self.size = 0

    def add(self, entry_hash: str) -> list[tuple[int, int, str]]:
        """Add a leaf; return the inner nodes (level, position, hex) that became complete."""
        return self.add_subtree(0, leaf_hash(entry_hash))

    def add_subtree(self, level: int, node: bytes) -> list[tuple[int, int, str]]:
        """Add a complete subtree of 2**level leaves; the size so far must be a multiple of that."""
        completed = []
        position = self.size >> level
        self.size += 1 << level
        while self._peaks and self._peaks[-1][0] == level:
            node = node_hash(self._peaks.pop()[1], node)
            level, position = level + 1, position >> 1
            completed.append((level, position, node.hex()))
        self._peaks.append((level, node))
        return completed

    @property
    def peaks(self) -> list[tuple[int, bytes]]:
        """The complete subtrees, largest first: (level, node)."""
        return list(self._peaks)

    def root(self) -> str:
        """Return the root over all leaves so far, 64 hex digits."""
        return fold(node for _level, node in self._peaks)


def build_tree(leaves: Sequence[bytes]) -> tuple[dict[tuple[int, int], bytes], list[tuple[int, bytes]]]:
    """Return the inner nodes by (level, position) over `leaves`, and the peaks, largest first: a tree in one go."""
    nodes: dict[tuple[int, int], bytes] = {}
    peaks: list[tuple[int, bytes]] = []
    level, row = 0, list(leaves)
    while row:
        if len(row) % 2:
            peaks.append((level, row.pop()))
        level += 1
        row = [hashlib.sha256(b"\1" + left + right).digest() for left, right in zip(row[::2], row[1::2], strict=True)]
        nodes.update(((level, position), node) for position, node in enumerate(row))
    return nodes, peaks[::-1]


def fold(peaks: Iterable[bytes]) -> str:
    """Return the root over complete subtrees, given from the largest (left) to the smallest (right)."""
    nodes = list(peaks)
    if not nodes:
        return EMPTY_ROOT
    root = nodes[-1]
    for node in reversed(nodes[:-1]):
        root = node_hash(node, root)
    return root.hex()


def peaks_of(size: int) -> list[tuple[int, int]]:
    """Return (level, position) of the complete subtrees of a tree with `size` leaves, largest first."""
    peaks, offset = [], 0
    for level in range(size.bit_length() - 1, -1, -1):
        if size >> level & 1:
            peaks.append((level, offset >> level))
            offset += 1 << level
    return peaks


def completed_nodes(
    connection: sa.Connection, position: int, entry_hash: str, leaf_at: Callable[[int], str]
) -> list[dict[str, int | str]]:
    """Return the rows to store when leaf `position` (from 0) is appended; `leaf_at` gives entry hashes."""
    rows: list[dict[str, int | str]] = []
    level, node = 0, leaf_hash(entry_hash)
    while position >> level & 1:
        sibling = (position >> level) - 1
        left = leaf_hash(leaf_at(sibling)) if level == 0 else _stored(connection, level, sibling)
        node = node_hash(left, node)
        level += 1
        rows.append({"level": level, "position": position >> level, "hash": node.hex()})
    return rows


def stored_root(connection: sa.Connection, size: int, leaf_at: Callable[[int], str]) -> str:
    """Return the root over the first `size` entries, from the stored nodes."""
    return fold(
        leaf_hash(leaf_at(position)) if level == 0 else _stored(connection, level, position)
        for level, position in peaks_of(size)
    )


_NODE = sa.select(merkle_nodes.c.hash).where(
    merkle_nodes.c.level == sa.bindparam("level"), merkle_nodes.c.position == sa.bindparam("position")
)


def _stored(connection: sa.Connection, level: int, position: int) -> bytes:
    return bytes.fromhex(connection.execute(_NODE, {"level": level, "position": position}).scalar_one())
