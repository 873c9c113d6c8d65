"""Any bytes as an adapter, a frame between agent and ranks, or pieces of a message: a value or a typed error."""

from __future__ import annotations

import json
import socket
import struct
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from fl_client.training.ranks.frames import receive, send
from fl_shared.adapters.safetensors import WIRES, digest, metadata, pack, unpack
from fl_shared.errors import ConcordatError, DataError, EngineError, TransportError
from fl_shared.wire.agent_pb2 import Chunk
from fl_shared.wire.chunks import join, split

NUMBERS: st.SearchStrategy[object] = st.one_of(
    st.integers(-2, 80), st.sampled_from([2**31, 2**63, 2**64, 10**400, 1.0, True, None, "1", [], {}])
)
ENTRIES = st.one_of(
    st.fixed_dictionaries({
        "dtype": st.sampled_from(["F32", "BF16", "I8", "F16", "", None, 3]),
        "shape": st.one_of(st.lists(NUMBERS, max_size=4), NUMBERS),
        "data_offsets": st.one_of(st.lists(NUMBERS, max_size=3), NUMBERS),
    }),
    NUMBERS,
)  # fmt: skip
NAMES = st.sampled_from(["a", "b", "a#scale", "#scale", "__metadata__", "", "\n", "x" * 600, "\ud800"])
HEADERS = st.dictionaries(NAMES, ENTRIES, max_size=4)
GOOD = {
    wire: pack({"a": np.ones((2, 3), np.float32), "b": np.zeros((0, 2), np.float32)}, {"k": "v"}, wire=wire)
    for wire in WIRES
}


def told(error: ConcordatError) -> None:
    """A refusal says the next step."""
    assert error.fix


def read(data: bytes, wire: str) -> None:
    """Both readers of an adapter's bytes."""
    for reader in (lambda: unpack(data, wire=wire), lambda: metadata(data)):
        try:
            reader()
        except DataError as error:
            told(error)


@given(data=st.binary(max_size=200), wire=st.sampled_from(WIRES))
@example(data=struct.pack("<Q", 2**63), wire="float32")
@example(data=struct.pack("<Q", 6000) + b"[" * 6000, wire="float32")
def test_any_bytes_as_an_adapter(data: bytes, wire: str) -> None:
    """Tensors or DataError."""
    read(data, wire)


@given(header=HEADERS, body=st.binary(max_size=64), wire=st.sampled_from(WIRES))
@example(header={"a": {"dtype": "F32", "shape": [2**63, 0], "data_offsets": [0, 0]}}, body=b"", wire="float32")
@example(header={"a": {"dtype": "F32", "shape": [10**400, 0], "data_offsets": [0, 0]}}, body=b"", wire="float32")
def test_any_header_as_an_adapter(header: dict[str, Any], body: bytes, wire: str) -> None:
    """A header that is JSON, with entries that are wrong in one way or another."""
    text = json.dumps(header).encode()  # surrogates are written as escapes
    read(struct.pack("<Q", len(text)) + text + body, wire)


@given(
    wire=st.sampled_from(WIRES), read_as=st.sampled_from(WIRES), at=st.integers(0, 400), byte=st.integers(0, 255),
    cut=st.integers(0, 400),
)  # fmt: skip
def test_a_changed_byte_and_a_cut_end(wire: str, read_as: str, at: int, byte: int, cut: int) -> None:
    """One byte of a valid adapter changed, its end cut off, read as any wire form."""
    data = bytearray(GOOD[wire])
    data[at % len(data)] = byte
    read(bytes(data), read_as)
    read(GOOD[wire][: cut % len(data)], read_as)


@given(data=st.one_of(st.binary(max_size=100), st.tuples(st.binary(max_size=60), st.binary(max_size=20))))
@example(data=(b"[" * 60_000, b""))
@example(data=(b"\xff", b""))
@example(data=(b"[]", b""))
@example(data=(b"9" * 5000, b""))
@example(data=struct.pack(">QQ", 2**40, 0))
def test_any_bytes_as_a_frame(data: bytes | tuple[bytes, bytes]) -> None:
    """A head and a payload, the end of the connection, or EngineError; over a real socket."""
    here, there = socket.socketpair()
    with here, there:
        if isinstance(data, tuple):
            data = struct.pack(">QQ", len(data[0]), len(data[1])) + data[0] + data[1]
        here.sendall(data)
        here.shutdown(socket.SHUT_WR)
        try:
            head, payload = receive(there)
        except (EOFError, EngineError):
            return
        assert isinstance(head, dict)
        assert isinstance(payload, bytes)


def test_what_is_sent_arrives() -> None:
    """The frame that the others are changes of."""
    here, there = socket.socketpair()
    with here, there:
        send(here, {"a": 1}, b"xyz")
        assert receive(there) == ({"a": 1}, b"xyz")


@given(
    pieces=st.lists(st.binary(max_size=8), max_size=6), announced=st.integers(-1, 30), right=st.booleans(),
    limit=st.integers(0, 30),
)  # fmt: skip
def test_any_pieces_of_a_message(pieces: list[bytes], announced: int, right: bool, limit: int) -> None:
    """The very bytes that were announced, or TransportError; `split` and `join` are each other's inverse."""
    whole = b"".join(pieces)
    try:
        found = join(
            pieces, expected_bytes=announced, expected_digest=digest(whole) if right else "sha256:0", limit=limit
        )
    except TransportError as error:
        told(error)
    else:
        assert right
        assert found == whole
        assert len(found) == announced <= limit
    assert join(split(whole), expected_bytes=len(whole), expected_digest=digest(whole), limit=len(whole)) == whole


@given(st.binary(max_size=100))
def test_any_bytes_as_a_chunk(data: bytes) -> None:
    """Protobuf's own error or a chunk that is written again as it is understood."""
    try:
        chunk = Chunk.FromString(data)
    except DecodeError:
        return
    assert Chunk.FromString(chunk.SerializeToString()) == chunk


def test_the_good_adapters_are_good() -> None:
    """What the changes start from."""
    for wire, data in GOOD.items():
        assert unpack(data, wire=wire)["a"].shape == (2, 3)
        with pytest.raises(DataError):
            unpack(data[:-1], wire=wire)
