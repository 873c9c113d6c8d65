"""Adapters of hundreds of megabytes in gRPC messages of one megabyte: cut up, and put together strictly."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

from fl_shared.errors import TransportError

CHUNK_BYTES = 1 << 20


def split(data: bytes | memoryview) -> Iterator[bytes]:
    """The data in pieces of at most 1 MiB; nothing for no data."""
    view = memoryview(data)
    for start in range(0, len(view), CHUNK_BYTES):
        yield bytes(view[start : start + CHUNK_BYTES])


def join(pieces: Iterable[bytes], *, expected_bytes: int, expected_digest: str, limit: int) -> bytes:
    """Put the pieces together.

    Raises:
        TransportError: more than `limit` announced, another size than announced, another SHA-256, or an
            empty piece (a sender could send those for ever).
    """
    if expected_bytes > limit:
        raise TransportError(f"{expected_bytes} bytes were announced", fix=f"the limit is {limit}")
    data = bytearray()
    sha = hashlib.sha256()
    for piece in pieces:
        if not piece:
            raise TransportError("an empty piece arrived", fix="send pieces of 1 byte to 1 MiB")
        if len(data) + len(piece) > expected_bytes:
            raise TransportError(f"more than the {expected_bytes} announced bytes arrived", fix="send it again")
        data += piece
        sha.update(piece)
    if len(data) != expected_bytes:
        raise TransportError(f"{len(data)} of {expected_bytes} announced bytes arrived", fix="send it again")
    if f"sha256:{sha.hexdigest()}" != expected_digest:
        raise TransportError("the bytes that arrived have another digest than announced", fix="send it again")
    return bytes(data)
