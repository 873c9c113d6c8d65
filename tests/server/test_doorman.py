"""Connections over real TLS, with short deadlines: what ends them, and that their places come free."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from fl_server.gateway import app as gateway
from fl_server.gateway import connections as doorman
from fl_server.gateway import limits
from fl_server.gateway.limits import Requests
from fl_server.home.layout import ServerHome
from fl_server.identity.authority import Authority
from fl_shared.runtime.limits import ConcurrencyLimit, TokenBucket, network
from helpers.coordinators import until

MUCH = 64 << 20


class Door:
    """The doorman in front of a small application, in a thread of this process."""

    def __init__(self, home: ServerHome) -> None:
        self.home = home
        self.authority = Authority.create(home.ca_key, home.ca)
        self.authority.issue_server(home.server_key, home.server_certificate, "127.0.0.1", 1)
        self.ended: list[str] = []
        self.opened = contextlib.ExitStack()
        self.server: uvicorn.Server | None = None
        self.listening = doorman.listener("127.0.0.1", 0)
        self.port: int = self.listening.getsockname()[1]
        self.thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self.thread.start()
        until(lambda: self.server is not None and self.server.started, "the server has started", 20.0)

    async def _serve(self) -> None:
        async def much(request: Request) -> Response:
            request.state.at_end.callback(self.ended.append, "much")

            async def blocks() -> AsyncIterator[bytes]:
                for _ in range(MUCH >> 20):
                    yield bytes(1 << 20)

            return StreamingResponse(blocks())

        async def little(request: Request) -> Response:
            request.state.at_end.callback(self.ended.append, "little")
            who = request.state.who
            return PlainTextResponse(who.name if who else "nobody")

        app = Requests(Starlette(routes=[Route("/much", much), Route("/little", little)]))
        config = uvicorn.Config(app, http="h11", ws="none", lifespan="off", log_level="warning")
        config.load()
        self.server = uvicorn.Server(config)
        await doorman.serve(self.server, gateway.tls_context(self.home), self.listening)

    def plain(self) -> socket.socket:
        return self.opened.enter_context(socket.create_connection(("127.0.0.1", self.port), timeout=60))

    def connect(self, certificate: Path | None = None, key: Path | None = None) -> ssl.SSLSocket:
        context = ssl.create_default_context(cafile=str(self.home.ca))
        if certificate is not None:
            context.load_cert_chain(certificate, key)
        return self.opened.enter_context(context.wrap_socket(self.plain(), server_hostname="127.0.0.1"))

    def get(self, connection: ssl.SSLSocket, path: str = "/little") -> bytes:
        """The answer's body; empty when the connection ends instead."""
        connection.sendall(f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        received = b""
        while not received.partition(b"\r\n\r\n")[2] and (block := connection.recv(65_536)):
            received += block
        return received.partition(b"\r\n\r\n")[2]

    def close(self) -> None:
        self.opened.close()
        assert self.server is not None
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()


@pytest.fixture
def door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Door]:
    """A server with deadlines of a few seconds and four places for an address."""
    for name in ("HANDSHAKE_S", "HEAD_S", "CLOSING_S"):
        monkeypatch.setattr(doorman, name, 2.5)
    monkeypatch.setattr(limits, "SEND_IDLE_S", 1.0)
    monkeypatch.setattr(doorman, "MAX_FOR_AN_ADDRESS", 4)
    monkeypatch.setattr(doorman, "MAX_FOR_A_SITE", 2)
    made = Door(ServerHome(tmp_path))
    yield made
    made.close()


def is_closed(connection: socket.socket) -> bool:
    """Wait for the other side's end; False when there is data instead."""
    try:
        return connection.recv(65_536) == b""
    except TimeoutError:
        raise AssertionError("the connection stays open") from None
    except OSError:
        return True


def test_what_does_not_speak_in_time_is_closed_and_its_place_is_free_again(door: Door) -> None:
    """No handshake, nothing after it, half a head, half a second head: each ends; then the address is served."""
    silent, idle, half, second = door.plain(), door.connect(), door.connect(), door.connect()
    half.sendall(b"GET /little HTTP/1.1\r\nho")
    assert b"nobody" in door.get(second)
    second.sendall(b"GET /lit")
    with pytest.raises(OSError):
        door.connect()
    for connection in (silent, idle, half, second):
        assert is_closed(connection)
    fresh = door.connect()
    assert b"nobody" in door.get(fresh)
    fresh.close()


def test_a_head_that_comes_byte_by_byte_is_not_waited_for(door: Door) -> None:
    """Every byte in time does not help: the whole head must be there."""
    connection = door.connect()
    with contextlib.suppress(OSError):
        for _ in range(200):
            connection.sendall(b"G")
            time.sleep(0.05)
    assert is_closed(connection)


def test_a_client_that_does_not_take_its_answer_is_ended(door: Door) -> None:
    """It asks for 64 MB and reads nothing: the request ends, what it held is given back, others are served."""
    reluctant = door.connect()
    reluctant.sendall(b"GET /much HTTP/1.1\r\nhost: x\r\n\r\n")
    until(lambda: door.ended == ["much"], "the answer is given up", 30.0)
    received = 0
    with contextlib.suppress(OSError):
        while block := reluctant.recv(1 << 20):
            received += len(block)
    assert received < MUCH
    assert b"nobody" in door.get(door.connect())


def test_a_client_that_reads_gets_all_of_it(door: Door) -> None:
    """The same answer, taken: complete, and its end is noticed once."""
    willing = door.connect()
    willing.sendall(b"GET /much HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    received = 0
    while block := willing.recv(1 << 20):
        received += len(block)
    assert received > MUCH
    until(lambda: door.ended == ["much"], "the answer is complete", 10.0)


def test_a_certificate_takes_a_place_of_its_site_and_frees_the_addresss(door: Door, tmp_path: Path) -> None:
    """Two connections of a site are served, a third is not; the address has its four places all the same."""
    door.authority.issue_client(tmp_path / "k", tmp_path / "c", "site", "hospital-001", 1)
    ours = [door.connect(tmp_path / "c", tmp_path / "k") for _ in range(2)]
    for connection in ours:
        assert b"hospital-001" in door.get(connection)
    refused = door.connect(tmp_path / "c", tmp_path / "k")
    assert is_closed(refused)
    strangers = [door.connect() for _ in range(4)]
    assert all(b"nobody" in door.get(connection) for connection in strangers)
    for connection in ours:
        connection.close()
    until(lambda: _served(door, tmp_path), "the site's places are free again", 10.0)


def _served(door: Door, folder: Path) -> bool:
    with contextlib.suppress(OSError), contextlib.closing(door.connect(folder / "c", folder / "k")) as connection:
        return b"hospital-001" in door.get(connection)
    return False


def test_a_bucket_refills_and_forgets() -> None:
    """A burst, then so many a second; keys that are full again take no memory."""
    now = [0.0]
    rates = TokenBucket(2.0, 4.0, lambda: now[0])
    assert [rates.take("a") for _ in range(5)] == [True] * 4 + [False]
    assert rates.take("b")
    now[0] += 1.0
    assert [rates.take("a") for _ in range(3)] == [True, True, False]
    now[0] += 100.0
    for number in range(10_100):
        now[0] += 0.001
        rates.take(str(number))
    assert len(rates._left) <= 10_000
    assert [rates.take("a") for _ in range(5)] == [True] * 4 + [False]


def test_places_are_counted_for_each_key() -> None:
    """Taken places come free; another key is not affected."""
    limit = ConcurrencyLimit(1)
    assert (limit.acquire("a"), limit.acquire("a"), limit.acquire("b")) == (True, False, True)
    limit.release("a")
    assert limit.acquire("a")


@pytest.mark.parametrize(
    ("address", "whose"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8::1", "2001:db8::/64"),
        ("2001:db8::ffff:1", "2001:db8::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("", ""),
    ],
)
def test_an_ipv6_customer_is_one_network(address: str, whose: str) -> None:
    """A /64 counts as one; IPv4 in IPv6 as IPv4."""
    assert network(address) == whose
