"""The app that travels to the sites: it imports nothing of ours, and its protocol never changes under a site."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from fl_server.rounds import pack
from fl_server.rounds.app import agent_pb2 as shipped_pb2
from fl_server.rounds.app.relay import RelayError, relay
from fl_shared.runtime.threads import running_pool
from fl_shared.wire import agent_pb2
from fl_shared.wire.agent_pb2 import Chunk, ReplyHeader, RoundHeader
from fl_shared.wire.agent_pb2_grpc import AgentServicer, add_AgentServicer_to_server

V1 = {
    "Chunk": {"header": (1, 11), "reply": (2, 11), "data": (3, 12)},
    "RoundHeader": {
        "manifest_json": (1, 9), "adapter_bytes": (2, 4), "adapter_digest": (3, 9), "spec_json": (4, 9),
    },
    "ReplyHeader": {"status": (1, 9), "document_json": (2, 9), "adapter_bytes": (3, 4), "adapter_digest": (4, 9)},
    "InfoRequest": {},
    "InfoReply": {"site": (1, 9), "version": (2, 9), "state": (3, 9), "problems": (4, 9)},
}  # fmt: skip
"""Every field of `concordat.agent.v1`: (number, type). Fields may be added; none of these is ever changed."""


@pytest.fixture
def app(tmp_path: Path) -> Path:
    """The folder that travels."""
    return pack.write_app(tmp_path / "app") / pack.FOLDER


def test_what_travels_imports_nothing_of_ours(app: Path) -> None:
    for name in ("__init__", "client_app", "relay", "agent_pb2"):
        tree = ast.parse((app / f"{name}.py").read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert (app / f"{node.module}.py").is_file(), node.module
                continue
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for each in names:
                root = each.split(".")[0]
                assert root in {"flwr", "grpc", "numpy", "google"} or root in sys.stdlib_module_names, each


def test_the_packed_app_loads_where_nothing_of_ours_is_installed(app: Path) -> None:
    block = "import sys; sys.modules['fl_shared'] = sys.modules['fl_server'] = sys.modules['fl_client'] = None; "
    done = subprocess.run(
        [sys.executable, "-c", block + f"import {pack.FOLDER}.client_app as a; print(type(a.app).__name__)"],
        cwd=app.parent, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.stdout.strip() == "ClientApp", done.stderr


def test_the_shipped_messages_are_the_agents() -> None:
    assert shipped_pb2.DESCRIPTOR.serialized_pb == agent_pb2.DESCRIPTOR.serialized_pb


@pytest.mark.parametrize("message", V1)
def test_no_field_of_the_protocol_has_changed(message: str) -> None:
    fields = {f.name: (f.number, f.type) for f in agent_pb2.DESCRIPTOR.message_types_by_name[message].fields}
    assert fields.items() >= V1[message].items()
    assert agent_pb2.DESCRIPTOR.package == "concordat.agent.v1"


class Scripted(AgentServicer):  # type: ignore[misc]  # generated, without types
    """An agent that answers with these chunks, whatever it is asked."""

    def __init__(self, chunks: list[Chunk]) -> None:
        self.chunks = chunks
        self.seen: list[Any] = []

    def Round(self, request_iterator: Iterator[Chunk], context: Any) -> Iterator[Chunk]:
        self.seen = list(request_iterator)
        yield from self.chunks


def ask(tmp_path: Path, agent: AgentServicer | None, adapter: bytes = b"", *spec: str) -> tuple[str, str, bytes]:
    server = grpc.server(running_pool(2, "scripted"))
    if agent is not None:
        add_AgentServicer_to_server(agent, server)
    server.add_insecure_port(f"unix:{tmp_path}/s")
    server.start()
    try:
        return relay(f"{tmp_path}/s", "an order", adapter, 30.0, *spec)
    finally:
        server.stop(0).wait()


def head(size: int) -> Chunk:
    return Chunk(reply=ReplyHeader(status="ok", document_json="{}", adapter_bytes=size))


def test_an_order_and_its_answer_arrive_whole(tmp_path: Path) -> None:
    agent = Scripted([head(5), Chunk(data=b"abc"), Chunk(data=b"de")])
    adapter = bytes(range(256)) * 10_000
    assert ask(tmp_path, agent, adapter) == ("ok", "{}", b"abcde")
    first, *pieces = agent.seen
    assert (first.header.manifest_json, first.header.adapter_bytes) == ("an order", len(adapter))
    assert b"".join(each.data for each in pieces) == adapter
    assert max(len(each.data) for each in pieces) <= 1 << 20


def test_a_spec_travels_beside_the_order_and_only_then(tmp_path: Path) -> None:
    """An agent of the version before knows no such field: an order that holds its spec reaches it as ever."""
    agent = Scripted([head(0)])
    spec = "{" + "x" * 700_000 + "}"
    assert ask(tmp_path, agent, b"", spec) == ("ok", "{}", b"")
    assert agent.seen[0].header.spec_json == spec
    ask(tmp_path, agent)
    assert {field.name for field, _ in agent.seen[0].header.ListFields()} == {"manifest_json", "adapter_digest"}


@pytest.mark.parametrize(
    "chunks",
    [
        [],
        [Chunk(data=b"abc")],
        [Chunk(header=RoundHeader())],
        [head(5), Chunk(data=b"abc")],
        [head(2), Chunk(data=b"abc")],
        [head(5), Chunk(data=b"abc"), head(2)],
        [head(1 << 50)],
    ],
)
def test_an_answer_that_is_not_whole_is_none(tmp_path: Path, chunks: list[Chunk]) -> None:
    with pytest.raises(RelayError):
        ask(tmp_path, Scripted(chunks))


def test_another_protocol_is_named(tmp_path: Path) -> None:
    with pytest.raises(RelayError, match=r"does not speak concordat\.agent\.v1"):
        ask(tmp_path, None)


def test_no_agent_is_an_answer_and_not_a_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fl_server.rounds.app.relay.CONNECT_TIMEOUT_S", 0.2)
    with pytest.raises(RelayError, match="not there"):
        relay(f"{tmp_path}/nobody", "an order", b"", 5.0)
