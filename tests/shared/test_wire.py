"""`fl_shared.wire`: chunks, and the generated stubs over a real Unix socket."""

from __future__ import annotations

import hashlib
import itertools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fl_shared
from fl_shared.errors import TransportError
from fl_shared.wire import agent_pb2, agent_pb2_grpc, control_pb2, control_pb2_grpc
from fl_shared.wire.chunks import CHUNK_BYTES, join, split

WIRE = Path(next(iter(fl_shared.__path__))) / "wire"


def sha(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES + 7])
@pytest.mark.parametrize("kind", [bytes, memoryview])
def test_data_comes_together_again(size: int, kind: Any) -> None:
    """Any size is cut into full pieces of at most 1 MiB and put together to the same bytes."""
    data = bytes(range(251)) * (size // 251 + 1)
    data = data[:size]
    pieces = list(split(kind(data)))
    assert [len(piece) for piece in pieces[:-1]] == [CHUNK_BYTES] * (len(pieces) - 1)
    assert all(0 < len(piece) <= CHUNK_BYTES for piece in pieces)
    assert join(pieces, expected_bytes=size, expected_digest=sha(data), limit=size) == data


@given(st.binary(max_size=100), st.lists(st.integers(0, 100)))
def test_the_cuts_do_not_matter(data: bytes, cuts: list[int]) -> None:
    """A sender may cut where it likes, as long as no piece is empty."""
    ends = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    pieces = [data[start:end] for start, end in itertools.pairwise(ends)]
    assert join(pieces, expected_bytes=len(data), expected_digest=sha(data), limit=100) == data


WHOLE = b"0123456789"


@pytest.mark.parametrize(
    ("pieces", "announced", "digest", "limit", "message"),
    [
        ([WHOLE], 10, sha(WHOLE), 9, "10 bytes were announced"),
        ([WHOLE[:9]], 10, sha(WHOLE), 10, "9 of 10 announced bytes"),
        ([], 10, sha(WHOLE), 10, "0 of 10 announced bytes"),
        ([WHOLE, b"x"], 10, sha(WHOLE), 99, "more than the 10 announced"),
        ([WHOLE], 10, sha(b"other"), 10, "another digest"),
        ([WHOLE], 10, "", 10, "another digest"),
        ([WHOLE[::-1]], 10, sha(WHOLE), 10, "another digest"),
        ([b"", WHOLE], 10, sha(WHOLE), 10, "empty piece"),
    ],
)
def test_what_was_not_announced_is_refused(
    pieces: list[bytes], announced: int, digest: str, limit: int, message: str
) -> None:
    """Too much, too little, or other bytes than announced are a TransportError with a fix."""
    with pytest.raises(TransportError, match=message) as caught:
        join(pieces, expected_bytes=announced, expected_digest=digest, limit=limit)
    assert caught.value.fix


def endless(taken: list[int]) -> Iterator[bytes]:
    while True:
        taken.append(1)
        yield b"x" * 1000


def test_an_endless_sender_is_cut_off() -> None:
    """A sender that never stops is refused one piece after what it announced, and announces at most the limit."""
    taken: list[int] = []
    with pytest.raises(TransportError, match="more than"):
        join(endless(taken), expected_bytes=5000, expected_digest=sha(b""), limit=5000)
    assert len(taken) == 6
    with pytest.raises(TransportError, match="announced"):
        join(endless(taken), expected_bytes=1 << 60, expected_digest=sha(b""), limit=5000)
    assert len(taken) == 6


class Echo(agent_pb2_grpc.AgentServicer):  # type: ignore[misc]  # generated code has no types
    """Sends the adapter back, through the same helpers that the agent uses."""

    def Round(self, request_iterator: Iterator[agent_pb2.Chunk], context: grpc.ServicerContext) -> Iterator[Any]:
        header = next(request_iterator).header
        data = join(
            (chunk.data for chunk in request_iterator),
            expected_bytes=header.adapter_bytes,
            expected_digest=header.adapter_digest,
            limit=1 << 30,
        )
        yield agent_pb2.Chunk(
            reply=agent_pb2.ReplyHeader(
                status="ok", document_json=header.manifest_json, adapter_bytes=len(data), adapter_digest=sha(data)
            )
        )
        for piece in split(data):
            yield agent_pb2.Chunk(data=piece)

    def Info(self, request: agent_pb2.InfoRequest, context: grpc.ServicerContext) -> agent_pb2.InfoReply:
        return agent_pb2.InfoReply(site="hospital-001", version="1", state="idle")


def test_an_adapter_of_many_chunks_crosses_a_unix_socket(tmp_path: Path) -> None:
    """48 MiB, far over gRPC's 4 MiB message limit, go over a Unix socket and back unchanged."""
    socket = tmp_path / "agent.sock"
    server = grpc.server(ThreadPoolExecutor(2))
    agent_pb2_grpc.add_AgentServicer_to_server(Echo(), server)
    server.add_insecure_port(f"unix:{socket}")
    server.start()
    data = bytes(range(256)) * (48 << 12)

    def order() -> Iterator[agent_pb2.Chunk]:
        yield agent_pb2.Chunk(
            header=agent_pb2.RoundHeader(manifest_json="{}", adapter_bytes=len(data), adapter_digest=sha(data))
        )
        for piece in split(data):
            yield agent_pb2.Chunk(data=piece)

    try:
        with grpc.insecure_channel(f"unix:{socket}") as channel:
            stub = agent_pb2_grpc.AgentStub(channel)
            assert stub.Info(agent_pb2.InfoRequest(), timeout=60).site == "hospital-001"
            answers = stub.Round(order(), timeout=60)
            reply = next(answers).reply
            assert (reply.status, reply.document_json) == ("ok", "{}")
            back = join(
                (chunk.data for chunk in answers),
                expected_bytes=reply.adapter_bytes,
                expected_digest=reply.adapter_digest,
                limit=len(data),
            )
    finally:
        server.stop(0).wait()
    assert back == data


def test_the_committed_stubs_are_the_protos(tmp_path: Path) -> None:
    """Generating again from the committed .proto files gives exactly the committed files."""
    package = tmp_path / "fl_shared" / "wire"
    package.mkdir(parents=True)
    for proto in ("agent.proto", "control.proto"):
        shutil.copy(WIRE / proto, package)
    outputs = ("--python_out=.", "--pyi_out=.", "--grpc_python_out=.")
    protos = ("fl_shared/wire/agent.proto", "fl_shared/wire/control.proto")
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I.", *outputs, *protos], cwd=tmp_path, check=True, timeout=120
    )
    made = sorted(path.name for path in package.iterdir() if "_pb2" in path.name)
    assert made == sorted(path.name for path in WIRE.iterdir() if "_pb2" in path.name)
    for name in made:
        assert (package / name).read_text() == (WIRE / name).read_text(), f"run make proto: {name} is stale"


def test_the_control_service_offers_what_admins_and_auditors_need() -> None:
    """Every documented call exists, with WatchRun, ListReceipts and GetAdapter as streams."""
    service = control_pb2.DESCRIPTOR.services_by_name["Control"]
    streams = {method.name: method.server_streaming for method in service.methods}
    calls = {
        "Status",
        "InviteSite",
        "ListSites",
        "ShowSite",
        "RevokeSite",
        "ListAdapters",
        "GetAdapter",
        "ListReceipts",
    }
    calls |= {"LaunchRun", "ListRuns", "ShowRun", "WatchRun", "StopRun", "PauseRun", "ResumeRun"}
    assert calls <= set(streams)
    assert {name for name in calls if streams[name]} == {"WatchRun", "ListReceipts", "GetAdapter"}
    assert all(hasattr(control_pb2_grpc.ControlServicer, name) for name in calls)


def test_times_are_seconds_as_double() -> None:
    """Every field that is a time or a duration is a double; in the admin log a time is signed as text."""
    times = [
        field
        for message in control_pb2.DESCRIPTOR.message_types_by_name.values()
        if message.name != "AdminLogEntry"
        for field in message.fields
        if field.name.endswith(("_at", "_s")) or field.name in ("at", "seconds")
    ]
    assert len(times) >= 10
    assert {field.type for field in times} == {times[0].TYPE_DOUBLE}
