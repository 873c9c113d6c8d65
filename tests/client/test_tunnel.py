"""The tunnel: only Fleet calls, only with the site's certificate, and only apps that the site allows."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import ssl
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from flwr.proto.fab_pb2 import Fab, GetFabResponse
from flwr.proto.fleet_pb2 import ActivateNodeResponse, DeactivateNodeRequest, PushMessagesRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, Metadata
from flwr.proto.message_pb2 import Message as ProtoMessage

from fl_client.identity.enrolment import Coordinator, enrol
from fl_client.identity.renewal import renew
from fl_client.node.helpers import Helpers, listen_loopback
from fl_client.node.spec import SPEC_FILE, NodeSpec
from fl_client.node.tunnel_settings import TunnelSettings, make_local_certificate
from fl_client.site.home import SiteHome
from helpers.gateway import Gateway

APP = b"the shipped app"
APP_DIGEST = "sha256:" + hashlib.sha256(APP).hexdigest()

pytestmark = pytest.mark.usefixtures("processes")


@pytest.fixture
def home(gateway: Gateway, tmp_path: Path) -> SiteHome:
    """An enrolled site."""
    made = SiteHome(tmp_path / "home")
    enrol(made, site="hospital-001", server=gateway.url, token=gateway.token("hospital-001"))
    return made


def settings_of(home: SiteHome, gateway: Gateway, listener: socket.socket, apps: list[str]) -> TunnelSettings:
    """What the agent would hand to the tunnel."""
    make_local_certificate(home.supernode / "tunnel-ca.pem", home.run / "tunnel.key")
    return TunnelSettings(
        listen_fd=listener.fileno(),
        fleet_url=f"{gateway.url}/v1/fleet",
        ca=str(home.ca),
        certificate=str(home.client_certificate),
        key=str(home.client_key),
        local_certificate=str(home.supernode / "tunnel-ca.pem"),
        local_key=str(home.run / "tunnel.key"),
        apps=apps,
        node_file=str(home.run / "node-id"),
    )


class Running:
    """A tunnel process and a client that trusts its local certificate."""

    def __init__(self, home: SiteHome, gateway: Gateway, apps: list[str], *, launch: bool = False) -> None:
        listener = listen_loopback()
        port = listener.getsockname()[1]
        self.url = f"https://127.0.0.1:{port}"
        plan = NodeSpec(home.supernode, home.socket, home.node_key, home.supernode / "tunnel-ca.pem", port)
        self.helpers = Helpers(settings_of(home, gateway, listener, apps), listener, plan, launch=launch)
        self.helpers.start_tunnel()
        context = ssl.create_default_context(cafile=str(home.supernode / "tunnel-ca.pem"))
        self.client = httpx.Client(verify=context, timeout=30, trust_env=False)

    def post(self, path: str, body: bytes = b"body") -> httpx.Response:
        """One request; waits for the process to come up the first time."""
        for _ in range(100):
            try:
                return self.client.post(self.url + path, content=body)
            except httpx.TransportError:
                time.sleep(0.1)
        raise TimeoutError(path)

    def close(self) -> None:
        self.client.close()
        self.helpers.stop()


@pytest.fixture
def tunnel(home: SiteHome, gateway: Gateway) -> Iterator[Running]:
    """A tunnel that allows one app."""
    made = Running(home, gateway, [APP_DIGEST])
    yield made
    made.close()


def test_fleet_calls_pass_with_the_sites_certificate_and_nothing_else_passes(tunnel: Running, gateway: Gateway) -> None:
    """Bytes arrive unchanged under the site's name; other paths and methods never reach the gateway."""
    body = bytes(range(256)) * 8192
    answer = tunnel.post("/v1/fleet/push-object", body)
    assert (answer.status_code, answer.content) == (200, body)
    assert gateway.fleet_calls == [("/v1/fleet/push-object", "hospital-001")]
    for path in (
        "/v1/fleet/register-node",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/push-object/../../control",
        "/v1/fleet/%2e%2e/enroll",
        "/v1/control/start-run",
        "/v1/enroll",
        "/",
    ):
        assert tunnel.post(path).status_code in (404, 405), path
    assert tunnel.client.get(f"{tunnel.url}/v1/fleet/push-object").status_code == 405
    assert len(gateway.fleet_calls) == 1


def test_only_an_allowed_app_passes(tunnel: Running, gateway: Gateway) -> None:
    """The digest is computed from the content; the hash that the coordinator states is not believed."""

    def ship(content: bytes) -> httpx.Response:
        stated = hashlib.sha256(APP).hexdigest()
        message = GetFabResponse(fab=Fab(hash_str=stated, content=content)).SerializeToString()
        gateway.fleet_answer = lambda _path, _body: (200, message)
        return tunnel.post("/v1/fleet/get-fab")

    assert GetFabResponse.FromString(ship(APP).content).fab.content == APP
    refused = ship(b"another app")
    assert refused.status_code == 403
    assert b"another app" not in refused.content
    gateway.fleet_answer = lambda _path, _body: (200, b"\xff\xff no message")
    assert tunnel.post("/v1/fleet/get-fab").status_code == 403


EVIL = b"an app that nobody approved"


def fab(content: bytes, stated: bytes = APP) -> bytes:
    """A serialised answer that ships `content` and states the hash of `stated`."""
    return GetFabResponse(fab=Fab(hash_str=hashlib.sha256(stated).hexdigest(), content=content)).SerializeToString()


def two_faced() -> bytes:
    """A body that is the allowed app as it stands, and another app once inflated.

    A zlib stream with one stored block. Each reading skips what the other one reads inside an unknown field of
    number 15: as it stands the block's head is such a field, inflated the block's first bytes are.
    """
    skip = b"\x7a"  # field 15, length-delimited
    size = 0x8580  # its four bytes in the block's head end a varint and then begin such a field
    inner = skip + zlib_varint(0) + fab(EVIL)
    tail_of_stream = 9  # an empty last block and the checksum
    ours = fab(APP)
    before = 123  # the block's first byte, 0x7a, is the length of the field that hides what follows it
    hidden = before - 3 + len(ours) + 4
    rest = size - before - len(ours) - 4
    block = skip + zlib_varint(hidden) + bytes(before - 3) + ours + skip + zlib_varint(rest + tail_of_stream, 3)
    filler = rest - len(inner) - 4
    block += inner + skip + zlib_varint(filler, 3) + bytes(filler)
    assert len(block) == size
    head = b"\x78\x01\x78" + size.to_bytes(2, "little") + (size ^ 0xFFFF).to_bytes(2, "little")
    return head + block + b"\x01\x00\x00\xff\xff" + zlib.adler32(block).to_bytes(4, "big")


def zlib_varint(number: int, size: int = 2) -> bytes:
    """`number` as a varint of exactly `size` bytes."""
    return bytes((number >> 7 * i & 0x7F) | (0x80 if i < size - 1 else 0) for i in range(size))


def as_flower_reads(tunnel: Running, call: str = "get-fab", **request: Any) -> bytes | None:
    """The app in the tunnel's answer, read as Flower's SuperNode reads it; None when the answer is no success."""
    answer = tunnel.client.post(f"{tunnel.url}/v1/fleet/{call}", content=b"", follow_redirects=True, **request)
    if not answer.is_success:
        assert EVIL not in answer.content
        return None
    return GetFabResponse.FromString(answer.content).fab.content


def test_a_body_of_two_readings_does_not_pass_the_allow_list(tunnel: Running, gateway: Gateway) -> None:
    """What is hashed is what is delivered: an answer with a content coding is none, whatever the request asked."""
    tunnel.post("/v1/fleet/pull-messages")
    body = two_faced()
    assert GetFabResponse.FromString(body).fab.content == APP
    assert GetFabResponse.FromString(zlib.decompress(body)).fab.content == EVIL
    gateway.fleet_answer = lambda _path, _body: (200, body)
    for coding in ("deflate", "Deflate", "gzip, deflate", "identity, deflate", "x-unknown"):
        gateway.fleet_headers = {"Content-Encoding": coding}
        for asked in ({}, {"accept-encoding": "deflate"}):
            assert as_flower_reads(tunnel, headers=asked) is None, coding
    gateway.fleet_headers = {}
    assert as_flower_reads(tunnel) == APP


def _answer(body: bytes, _path: str, _body: bytes) -> tuple[int, bytes]:
    return 200, body


def test_what_is_delivered_is_a_new_message_around_the_hashed_bytes(tunnel: Running, gateway: Gateway) -> None:
    """Nothing of the coordinator's own bytes is passed on: unknown fields, doubles and a false hash are gone."""
    tunnel.post("/v1/fleet/pull-messages")
    shapes = {
        "unknown field": fab(APP) + b"\x7a\x1b" + EVIL,
        "evil first": fab(EVIL) + fab(APP),
        "false hash": fab(APP, stated=EVIL),
    }
    for shape, body in shapes.items():
        gateway.fleet_answer = partial(_answer, body)
        assert tunnel.post("/v1/fleet/get-fab").content == fab(APP), shape
    for body in (fab(APP) + fab(EVIL), fab(APP) + b"\x0a", b"", fab(b"")):
        gateway.fleet_answer = partial(_answer, body)
        assert as_flower_reads(tunnel) is None


def test_no_other_way_of_answering_brings_another_app(tunnel: Running, gateway: Gateway) -> None:
    """Flower's SuperNode follows redirects and takes any 2xx for success; neither reaches it, nor do headers."""
    tunnel.post("/v1/fleet/pull-messages")

    def answer(path: str, _body: bytes) -> tuple[int, bytes]:
        return (status if path.endswith("get-fab") else 200), fab(EVIL)

    gateway.fleet_answer = answer
    for status in (200, 201, 203, 206, 226, 301, 302, 303, 307, 308):
        for place in ("pull-object", f"{tunnel.url}/v1/fleet/pull-object", f"{gateway.url}/v1/fleet/pull-object"):
            gateway.fleet_headers = {"Location": place, "Refresh": f"0; url={place}", "Set-Cookie": "a=b"}
            assert as_flower_reads(tunnel) is None, status
    for spelling in ("get%2Dfab", "%67et-fab", "get-fab?call=pull-object", "get-fab#x"):
        assert as_flower_reads(tunnel, spelling) is None
    gateway.fleet_answer = lambda _path, body: (200, body)
    passed = tunnel.post("/v1/fleet/pull-object")
    assert {"location", "refresh", "set-cookie"}.isdisjoint(passed.headers)


def test_a_killed_node_is_taken_off_line_before_its_successor_goes_on(
    tunnel: Running, gateway: Gateway, home: SiteHome
) -> None:
    """The second activation is preceded by the deactivation of the remembered node."""
    bodies: list[tuple[str, bytes]] = []

    def answer(path: str, body: bytes) -> tuple[int, bytes]:
        bodies.append((path.rpartition("/")[2], body))
        return 200, ActivateNodeResponse(node_id=4711).SerializeToString()

    gateway.fleet_answer = answer
    first = tunnel.post("/v1/fleet/activate-node", b"first")
    assert ActivateNodeResponse.FromString(first.content).node_id == 4711
    tunnel.post("/v1/fleet/activate-node", b"second")
    assert [call for call, _ in bodies] == ["activate-node", "deactivate-node", "activate-node"]
    assert DeactivateNodeRequest.FromString(bodies[1][1]).node_id == 4711
    assert bodies[2][1] == b"second"


def test_a_renewed_certificate_is_taken_up_with_the_next_call(
    tunnel: Running, home: SiteHome, gateway: Gateway
) -> None:
    """The process goes on; an exchange that is half done disturbs nobody."""
    gateway.fleet_answer = lambda _path, body: (200, body)
    assert tunnel.post("/v1/fleet/pull-messages").status_code == 200
    old = gateway.certificates[-1]
    before = tunnel.helpers.pids()
    kept = home.client_key.read_bytes()
    renew(home, Coordinator.load(home))
    renewed = home.client_key.read_bytes()
    home.client_key.write_bytes(kept)
    assert tunnel.post("/v1/fleet/pull-messages").status_code == 200
    assert gateway.certificates[-1] == old
    home.client_key.write_bytes(renewed)
    assert tunnel.post("/v1/fleet/pull-messages").status_code == 200
    assert gateway.certificates[-1] != old
    assert tunnel.helpers.pids() == before


def test_a_gateway_that_is_down_is_a_503(tunnel: Running, gateway: Gateway) -> None:
    """The SuperNode sees a temporary failure and tries again."""
    gateway.close()
    assert tunnel.post("/v1/fleet/pull-messages").status_code == 503


def test_a_killed_tunnel_comes_back_on_the_same_port(tunnel: Running) -> None:
    """The listening socket is the agent's; a new process takes over."""
    assert tunnel.post("/v1/fleet/pull-messages").status_code == 200
    first = tunnel.helpers.pids()["tunnel"]
    psutil.Process(first).kill()
    deadline = time.monotonic() + 60
    while tunnel.helpers.pids().get("tunnel", first) == first:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert tunnel.post("/v1/fleet/pull-messages").status_code == 200


def test_no_secret_stands_in_the_tunnels_arguments_or_environment(tunnel: Running, home: SiteHome) -> None:
    """Its settings came through a pipe."""
    tunnel.post("/v1/fleet/pull-messages")
    process = psutil.Process(tunnel.helpers.pids()["tunnel"])
    assert str(home.root) not in " ".join(process.cmdline())
    assert not any(str(home.root) in value for value in process.environ().values())


def test_the_tunnel_ends_when_its_keeper_does(home: SiteHome, gateway: Gateway) -> None:
    """Closing the pipe, as a killed agent does, ends the process."""
    listener = listen_loopback()
    settings = settings_of(home, gateway, listener, ["any"])
    process = subprocess.Popen(
        [sys.executable, "-m", "fl_client.node.tunnel"], stdin=subprocess.PIPE, pass_fds=[listener.fileno()]
    )
    assert process.stdin is not None
    process.stdin.write(settings.to_line())
    process.stdin.close()
    assert process.wait(60) == 0
    listener.close()


class ConnectProxy:
    """A small HTTP proxy that knows CONNECT alone, as institutions run them."""

    def __init__(self) -> None:
        self.targets: list[str] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += near.recv(4096)
        target = head.split()[1].decode()
        self.targets.append(target)
        port = target.rpartition(":")[2]
        far = socket.create_connection(("127.0.0.1", int(port)))  # whatever name the proxy's side gives it
        near.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        threading.Thread(target=self._pump, args=(far, near), daemon=True).start()
        self._pump(near, far)

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while block := source.recv(65536):
                sink.sendall(block)

    def close(self) -> None:
        self.listener.close()


def test_the_tunnel_goes_through_an_https_proxy(
    home: SiteHome, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With HTTPS_PROXY set, the proxy sees CONNECT to the gateway; TLS is end to end. Loopback asks no proxy."""
    proxy = ConnectProxy()
    port = gateway.url.rpartition(":")[2]
    monkeypatch.setattr(type(gateway), "url", f"https://coordinator.example:{port}")
    monkeypatch.setenv("HTTPS_PROXY", proxy.url)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    running = Running(home, gateway, ["any"])
    try:
        assert running.post("/v1/fleet/push-object").content == b"body"
    finally:
        running.close()
        proxy.close()
    assert proxy.targets == [gateway.url.removeprefix("https://")]
    assert gateway.fleet_calls == [("/v1/fleet/push-object", "hospital-001")]


def test_a_supernode_that_takes_leave_is_replaced(home: SiteHome, gateway: Gateway) -> None:
    """After an answer that Flower does not understand its SuperNode lives on without working; it is started anew."""
    asked = {"activate-node": 0, "pull-messages": 0}

    def answer(path: str, _body: bytes) -> tuple[int, bytes]:
        call = path.rpartition("/")[2]
        asked[call] = asked.get(call, 0) + 1
        if call == "activate-node":
            return 200, ActivateNodeResponse(node_id=7).SerializeToString()
        return (500, b"") if call == "pull-messages" else (200, b"")

    gateway.fleet_answer = answer
    running = Running(home, gateway, ["any"], launch=True)
    try:
        running.helpers.start_node()
        deadline = time.monotonic() + 120
        while asked["activate-node"] < 2 or asked["pull-messages"] < 2:
            assert time.monotonic() < deadline, asked
            time.sleep(0.2)
    finally:
        running.close()


def test_a_plan_is_written_anew_for_a_supernode_of_another_service(home: SiteHome, gateway: Gateway) -> None:
    """Where another user's service runs the SuperNode, a changed plan is what makes it start the next one."""
    running = Running(home, gateway, ["any"])
    try:
        plan = home.supernode / SPEC_FILE
        assert not plan.exists()
        running.post("/v1/fleet/deactivate-node")
        deadline = time.monotonic() + 30
        while not plan.exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        running.close()


def test_a_supernode_that_keeps_a_reply_to_itself_is_replaced(home: SiteHome, gateway: Gateway) -> None:
    """Whoever asks for work before it has answered the order that it took is out of step."""
    gateway.fleet_answer = lambda _path, _body: (200, b"")
    running = Running(home, gateway, ["any"])
    plan = home.supernode / SPEC_FILE

    def take(order: str) -> None:
        confirmed = ConfirmMessageReceivedRequest(message_object_id=order).SerializeToString()
        assert running.post("/v1/fleet/confirm-message-received", confirmed).status_code == 200

    def reply(order: str) -> None:
        message = ProtoMessage(metadata=Metadata(reply_to_message_id=order))
        pushed = PushMessagesRequest(messages_list=[message]).SerializeToString()
        assert running.post("/v1/fleet/push-messages", pushed).status_code == 200
        running.post("/v1/fleet/pull-messages")

    try:
        for order in ("one", "two"):
            take(order)
            reply(order)
        time.sleep(1)
        assert not plan.exists()
        take("three")
        reply("an order that had broken off")
        deadline = time.monotonic() + 30
        while not plan.exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        running.close()
