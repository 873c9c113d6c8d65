"""The agent's socket: chunked rounds over real gRPC, its mode, and what a hostile caller gets."""

from __future__ import annotations

import dataclasses
import json
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from fl_client.agent.outgoing import Sealed
from fl_client.agent.service import AgentService, serve
from fl_shared.adapters.safetensors import digest, pack, unpack
from fl_shared.errors import ConfigError
from fl_shared.identity.signing import SigningKey, sign_document
from fl_shared.wire import agent_pb2_grpc
from fl_shared.wire.agent_pb2 import Chunk, InfoRequest, RoundHeader
from fl_shared.wire.chunks import split
from helpers.sites import Site, Trained, body


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A site whose agent listens below `tmp_path`."""
    return Site(tmp_path)


@pytest.fixture
def stub(site: Site, tmp_path: Path) -> Iterator[agent_pb2_grpc.AgentStub]:
    """A caller on the socket."""
    server = serve(AgentService("hospital-001", site.rounds), tmp_path / "agent.sock")
    with grpc.insecure_channel(f"unix:{tmp_path / 'agent.sock'}") as channel:
        yield agent_pb2_grpc.AgentStub(channel)
    server.stop(0).wait()


def ask(stub: agent_pb2_grpc.AgentStub, header: RoundHeader, pieces: list[bytes]) -> Sealed:
    """Send a round and put the reply together."""
    sent = [Chunk(header=header), *(Chunk(data=piece) for piece in pieces)]
    replies = list(stub.Round(iter(sent)))
    reply = replies[0].reply
    data = b"".join(chunk.data for chunk in replies[1:])
    assert all(len(chunk.data) <= 1 << 20 for chunk in replies[1:])
    assert (len(data), digest(data)) == (reply.adapter_bytes, reply.adapter_digest)
    return Sealed(reply.status, reply.document_json, data)


def header_of(site: Site, adapter: bytes, **changes: object) -> RoundHeader:
    """A header whose manifest the coordinator signed."""
    document = sign_document(site.coordinator, site.manifest(adapter=adapter).to_dict())
    fields = {
        "manifest_json": json.dumps(document),
        "adapter_bytes": len(adapter),
        "adapter_digest": digest(adapter),
        **changes,
    }
    return RoundHeader(**fields)  # type: ignore[arg-type]


def test_megabytes_pass_in_chunks_both_ways(site: Site, stub: agent_pb2_grpc.AgentStub) -> None:
    """An adapter of 24 MB comes in and an update of 24 MB goes out, in pieces of at most 1 MiB."""
    big = np.arange(6_000_000, dtype=np.float32)
    adapter = pack({"w": big})
    site.trainer.change = lambda trained: Trained({"w": big + 1}, trained.executed)
    sealed = ask(stub, header_of(site, adapter), list(split(adapter)))
    assert sealed.status == "ok"
    assert np.array_equal(unpack(sealed.payload)["w"], big + 1)


def test_the_socket_belongs_to_its_owner_alone(stub: agent_pb2_grpc.AgentStub, tmp_path: Path) -> None:
    """Mode 0600; Info tells the site and the state and nothing else."""
    assert stat.S_IMODE((tmp_path / "agent.sock").stat().st_mode) == 0o600
    reply = stub.Info(InfoRequest())
    assert (reply.site, reply.state) == ("hospital-001", "idle")
    assert [field.name for field, _ in reply.ListFields()] == ["site", "version", "state"]


def test_a_refusal_reaches_the_caller_signed_and_without_data(site: Site, stub: agent_pb2_grpc.AgentStub) -> None:
    """A manifest by a stranger's key: `refused`, no bytes."""
    from fl_shared.identity.signing import SigningKey

    site.coordinator = SigningKey.generate()
    sealed = ask(stub, header_of(site, b""), [])
    assert (sealed.status, sealed.payload, body(sealed)["code"]) == ("refused", b"", "bad-manifest")


def test_a_defect_says_nothing_to_the_caller(site: Site, stub: agent_pb2_grpc.AgentStub) -> None:
    """An exception that nobody foresaw quotes a file: the untrusted half gets a fixed sentence, and the next round."""

    def broken(_key: str) -> bool:
        raise KeyError("/home/site/secret/path")

    right, site.rounds._facts = site.rounds._facts, dataclasses.replace(site.facts, accepts_key=broken)
    with pytest.raises(grpc.RpcError) as failure:
        ask(stub, header_of(site, b""), [])
    assert failure.value.code() == grpc.StatusCode.INTERNAL
    assert "secret" not in str(failure.value.details())
    site.rounds._facts = right
    assert ask(stub, header_of(site, b""), []).status == "ok"


HOSTILE: dict[str, Callable[[RoundHeader], list[Chunk]]] = {
    "no header": lambda header: [Chunk(data=b"x")],
    "nothing": lambda header: [],
    "two headers": lambda header: [Chunk(header=header), Chunk(header=header)],
    "more than announced": lambda header: [Chunk(header=header), Chunk(data=b"x")],
    "a huge announcement": lambda header: [Chunk(header=RoundHeader(adapter_bytes=1 << 60))],
    "no manifest": lambda header: [Chunk(header=RoundHeader(manifest_json="{}", adapter_digest=digest(b"")))],
    "deep nesting": lambda header: [Chunk(header=RoundHeader(manifest_json="[" * 100_000, adapter_digest=digest(b"")))],
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_caller_gets_an_error_and_no_round(site: Site, stub: agent_pb2_grpc.AgentStub, case: str) -> None:
    """Malformed streams end as INVALID_ARGUMENT; nothing is trained or charged; the agent lives on."""
    with pytest.raises(grpc.RpcError) as failure:
        list(stub.Round(iter(HOSTILE[case](header_of(site, b"")))))
    assert failure.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert (site.trainer.calls, site.outcomes()) == (0, [])
    assert ask(stub, header_of(site, b""), []).status == "ok"


def test_the_socket_offers_two_calls_and_no_more(stub: agent_pb2_grpc.AgentStub, tmp_path: Path) -> None:
    """Any other method name is unimplemented."""
    with grpc.insecure_channel(f"unix:{tmp_path / 'agent.sock'}") as channel:
        for method in ("ReadData", "Sign", "Ledger", "/grpc.reflection.v1alpha.ServerReflection/Info"):
            call = channel.unary_unary(f"/concordat.agent.v1.Agent/{method}", None, None)
            with pytest.raises(grpc.RpcError) as failure:
                call(b"")
            assert failure.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_a_path_too_long_for_a_socket_is_refused(site: Site, tmp_path: Path) -> None:
    """The kernel's limit is explained instead of failing strangely."""
    with pytest.raises(ConfigError, match="at most 107"):
        serve(AgentService("hospital-001", site.rounds), tmp_path / ("x" * 100) / "agent.sock")


def test_nobody_makes_the_agent_hold_gigabytes(site: Site, stub: agent_pb2_grpc.AgentStub) -> None:
    """An order that no key of the coordinator signed is refused before its adapter is taken in."""
    document = sign_document(SigningKey.generate(), site.manifest().to_dict())
    header = RoundHeader(manifest_json=json.dumps(document), adapter_bytes=4 << 30, adapter_digest=digest(b""))
    sent = 0

    def chunks() -> Iterator[Chunk]:
        nonlocal sent
        yield Chunk(header=header)
        for sent in range(1, 200):  # noqa: B007 - read afterwards
            yield Chunk(data=bytes(1 << 20))

    reply = next(stub.Round(chunks(), timeout=60)).reply
    assert (reply.status, json.loads(reply.document_json)["body"]["code"]) == ("refused", "bad-manifest")
    assert sent < 100


def test_one_adapter_at_a_time_is_in_memory(site: Site, stub: agent_pb2_grpc.AgentStub) -> None:
    """While one is being received, whoever sends another is stopped by flow control, and served afterwards."""
    taken, done = [0, 0], threading.Event()
    adapter = bytes(64 << 20)

    def send(place: int, wait: bool) -> None:
        def chunks() -> Iterator[Chunk]:
            yield Chunk(header=header_of(site, adapter))
            for piece in split(adapter):
                if wait and taken[place] == 1:
                    done.wait(60)
                taken[place] += 1
                yield Chunk(data=piece)

        assert next(stub.Round(chunks(), timeout=60)).reply.status == "refused"

    threads = [threading.Thread(target=send, args=each) for each in ((0, True), (1, False))]
    for thread in threads:
        thread.start()
        time.sleep(1)
    held = taken[1]
    done.set()
    for thread in threads:
        thread.join()
    assert held < 40
    assert taken == [64, 64]
