"""How much, how often and how slowly one may speak at the one open port, against those who may be hostile."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.proto.node_pb2 import Node

from fl_server.gateway.app import MAX_ENROL_BYTES, MAX_PER_SITE
from fl_server.gateway.connections import MAX_FOR_AN_ADDRESS
from helpers.coordinators import Coordinator, until
from helpers.gateways import ATTACKER, LIMIT, MUTE, RATE, SLOW_SITE, A, B, C, activation, code, node_of, signed_by

pytestmark = pytest.mark.timeout(300)


# --- How much


def test_oversized_messages_are_refused_and_the_gateway_goes_on(one: Coordinator) -> None:
    """Announced or not, as a body, a push or a head: refused at the limit, and the site's next call works."""

    def endless(size: int) -> Iterator[bytes]:
        for _ in range(size // 65_536 + 1):
            yield b"x" * 65_536

    key = one.keys[A].node
    with one.client(A) as client:
        for content in (b"x" * (LIMIT + 1), endless(LIMIT)):
            for call in ("push-object", "push-messages"):
                answer = client.post(f"/v1/fleet/{call}", content=content, headers=signed_by(key))
                assert code(answer) == (413, "too-large")
                content = endless(LIMIT)
        # The connection is closed while the head is still coming: whether the 400 arrives is up to TCP.
        with contextlib.suppress(httpx.TransportError):
            assert client.get("/v1/hello", headers={"x-much": "y" * 1_000_000}).status_code == 400
        assert client.get("/v1/hello").status_code == 200
        whole = PushObjectRequest(object_content=b"x" * (LIMIT - 4096)).SerializeToString()
        within = client.post("/v1/fleet/push-object", content=whole, headers=signed_by(key))
        assert within.status_code != 413
    with one.client() as client:
        assert code(client.post("/v1/enroll", content=b"x" * (MAX_ENROL_BYTES + 1))) == (413, "too-large")
        assert code(client.post("/v1/enroll", content=b"[" * MAX_ENROL_BYTES))[0] == 400


def test_a_site_that_asks_too_often_is_slowed_down_alone(one: Coordinator) -> None:
    """A flood of one site is answered with 503 once its rate is used up; another site is answered as always."""
    with one.client(A) as flooding, one.client(B) as other, ThreadPoolExecutor(8) as pool:
        flood = [pool.submit(flooding.get, "/v1/hello") for _ in range(20 * RATE)]
        others = [other.get("/v1/hello").status_code for _ in range(10)]
        answers = [each.result() for each in flood]
    assert set(others) == {200}
    assert {answer.status_code for answer in answers} == {200, 503}
    late = next(answer for answer in answers if answer.status_code == 503)
    assert (late.json()["code"], late.headers["retry-after"]) == ("too-many", "1")
    until(lambda: _hello(one, A) == 200, "the flooding site is served again", 30.0)


def _hello(one: Coordinator, site: str) -> int:
    with one.client(site) as client:
        return client.get("/v1/hello").status_code


def test_strangers_are_limited_by_address(one: Coordinator) -> None:
    """A flood without a certificate is answered with 429; another address is served as always."""
    context = ssl.create_default_context(cafile=str(one.home / "tls" / "ca.pem"))
    transport = httpx.HTTPTransport(verify=context, local_address=ATTACKER)
    with (
        httpx.Client(transport=transport, base_url=one.url, timeout=30) as flooding,
        one.client() as other,
        ThreadPoolExecutor(8) as pool,
    ):
        fetched = [pool.submit(flooding.get, "/v1/ca") for _ in range(100)]
        guessed = [pool.submit(flooding.post, "/v1/enroll", content=b"{}") for _ in range(100)]
        assert other.get("/v1/ca").status_code == 200
        assert {each.result().status_code for each in fetched} == {200, 429}
        assert code(guessed[-1].result()) == (429, "too-many")


@pytest.mark.parametrize("path", ["/healthz", "/", "/v1/nothing", "/v1/ca"])
def test_every_open_path_is_limited(one: Coordinator, path: str) -> None:
    """The sign of life and what is not there, too: each from an address of its own, so that each uses up its own."""
    context = ssl.create_default_context(cafile=str(one.home / "tls" / "ca.pem"))
    address = f"127.0.1.{len(path)}"
    transport = httpx.HTTPTransport(verify=context, local_address=address)
    with httpx.Client(transport=transport, base_url=one.url, timeout=30) as client, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: client.get(path), range(120)))
    assert {each.status_code for each in answers} == {429, 200 if path in ("/healthz", "/v1/ca") else 404}
    assert next(each for each in answers if each.status_code == 429).headers["retry-after"] == "1"


def test_a_site_is_limited_where_there_is_nothing_either(one: Coordinator) -> None:
    """With a certificate, by its name."""
    with one.client(A) as client, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: client.get("/nothing").status_code, range(20 * RATE)))
    assert set(answers) == {404, 503}


@pytest.mark.parametrize(
    "path", ["/v1/ca/", "/healthz/", "/v1/enroll/", "/v1/fleet/pull-messages/", "//v1/ca", "/v1//ca", "/v1/fleet/"]
)
def test_nothing_redirects(one: Coordinator, path: str) -> None:
    """A path with a slash too many is not there; no answer repeats the host that the client made up."""
    for method in ("GET", "POST"):
        connection = tls_connection(one, f"127.0.2.{len(path)}")
        with contextlib.closing(connection):
            connection.sendall(f"{method} {path} HTTP/1.1\r\nhost: evil.example\r\nconnection: close\r\n\r\n".encode())
            answer = ends(connection)
        assert answer.split(b" ", 2)[1] == b"404", answer
        assert b"evil.example" not in answer
        assert b"location" not in answer.lower()


CHUNKED = b"transfer-encoding: chunked\r\n"
AMBIGUOUS = {
    "both lengths": b"content-length: 2\r\n" + CHUNKED,
    "both lengths, the other way round": CHUNKED + b"content-length: 2\r\n",
    "two lengths": b"content-length: 2\r\ncontent-length: 3\r\n",
    "one length twice": b"content-length: 2\r\ncontent-length: 2\r\n",
    "a list of lengths": b"content-length: 2, 3\r\n",
    "a negative length": b"content-length: -1\r\n",
    "a signed length": b"content-length: +2\r\n",
    "a huge length": b"content-length: " + b"9" * 400 + b"\r\n",
    "a length in words": b"content-length: two\r\n",
    "another coding": b"transfer-encoding: gzip, chunked\r\n",
    "two codings": CHUNKED + CHUNKED,
    "a folded line": b"content-length: 2\r\nx-long: a\r\n b\r\n",
    "a folded length": b"content-length:\r\n 2\r\n",
    "a bare line feed": b"content-length: 2\nx-other: y\r\n",
    "a bare carriage return": b"content-length: 2\r\nx-other: y\rz: q\r\n",
    "a zero byte": b"content-length: 2\r\nx-other: a\x00b\r\n",
    "a control character": b"content-length: 2\r\nx-other: a\x01b\r\n",
    "a space before the colon": b"content-length : 2\r\n",
    "two hosts": b"content-length: 2\r\nhost: y\r\n",
    "a key twice": b"content-length: 2\r\nflwr-public-key: a\r\nflwr-public-key: b\r\n",
}


@pytest.mark.parametrize("case", AMBIGUOUS)
@pytest.mark.parametrize("piece", [1, 7, 4096])
def test_a_head_that_two_readers_could_read_in_two_ways_is_refused(one: Coordinator, case: str, piece: int) -> None:
    """400 (413 for a length alone) and the end of the connection; what follows is not taken for a request."""
    number = 1 + list(AMBIGUOUS).index(case)
    head = b"POST /v1/enroll HTTP/1.1\r\nhost: x\r\n" + AMBIGUOUS[case] + b"\r\n"
    sent = head + b"{}" + b"GET /v1/ca HTTP/1.1\r\nhost: x\r\n\r\n"
    with contextlib.closing(tls_connection(one, f"127.0.3.{number}")) as connection:
        with contextlib.suppress(OSError):
            for start in range(0, len(sent), piece):
                connection.sendall(sent[start : start + piece])
        answer = ends(connection)
    # Closed while more was coming: whether the answer arrives is up to TCP. No second answer, no 500, no certificate.
    assert answer == b"" or answer.split(b" ", 2)[1] in (b"400", b"413"), answer
    assert answer.count(b"HTTP/1.1 ") <= 1
    assert b"BEGIN CERTIFICATE" not in answer


def test_a_second_node_key_beside_ones_own_is_refused(one: Coordinator) -> None:
    """A's certificate and key, and behind them B's stolen key in a header of the same name: no reader picks one."""
    own, stolen = signed_by(one.keys[A].node), signed_by(one.keys[B].node)
    both = [*own.items(), *((k, v) for k, v in stolen.items() if k.startswith("flwr-"))]
    before = (one.home / "logs" / "superlink.log").read_text().count("POST /v1/fleet")
    until(lambda: _hello(one, A) == 200, "the site is served", 30.0)
    with one.client(A) as client:
        answer = client.post("/v1/fleet/activate-node", content=activation(one.keys[B].node), headers=both)
    assert code(answer) == (400, "bad-request")
    assert (one.home / "logs" / "superlink.log").read_text().count("POST /v1/fleet") == before


# --- How slowly


def tls_connection(one: Coordinator, source: str, folder: Path | None = None) -> ssl.SSLSocket:
    """A bare TLS connection from an address."""
    context = ssl.create_default_context(cafile=str(one.home / "tls" / "ca.pem"))
    if folder is not None:
        context.load_cert_chain(folder / "client.pem", folder / "client.key")
    plain = socket.create_connection(("127.0.0.1", one.gateway), timeout=60, source_address=(source, 0))
    return context.wrap_socket(plain, server_hostname="127.0.0.1")


def ends(connection: socket.socket) -> bytes:
    """What comes until the other side closes; an AssertionError when it does not in a minute."""
    received = b""
    try:
        while block := connection.recv(65_536):
            received += block
    except TimeoutError:
        raise AssertionError("the connection stays open") from None
    except OSError:
        pass
    return received


def test_slow_clients_use_up_their_own_places_and_are_shut_out(one: Coordinator) -> None:
    """No handshake, half a head, a head or body that never ends: others are served meanwhile, and each is ended."""
    one.enrol(C)  # new: no earlier test has used up its rate
    head = b"POST /v1/fleet/push-object HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n"
    signed = "".join(f"{k}: {v}\r\n" for k, v in signed_by(one.keys[C].node).items()).encode()
    with contextlib.ExitStack() as stack:

        def keep(connection: Any) -> Any:
            return stack.enter_context(contextlib.closing(connection))

        place = ("127.0.0.1", one.gateway)
        silent = [keep(socket.create_connection(place, source_address=(MUTE, 0))) for _ in range(200)]
        half = [keep(tls_connection(one, ATTACKER)) for _ in range(MAX_FOR_AN_ADDRESS)]
        for connection in half:
            connection.sendall(b"GET /v1/ca HTTP/1.1\r\nhost: x\r\n")
        # This address has no place left, and a site whose requests stand still has none left either; others have.
        with pytest.raises(OSError):
            keep(tls_connection(one, ATTACKER)).sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        sent = [keep(tls_connection(one, SLOW_SITE, one.keys[C].folder)) for _ in range(MAX_PER_SITE + 4)]
        for connection in sent:
            connection.sendall(head + signed + b"\r\nx")
        # Those too many are answered at once: then, and not before, all places are known to be taken.
        until(lambda: len(answered(sent)) >= 4, "the site has no place left", 20.0)
        refused = answered(sent)
        assert [b" 503 " in each.recv(4096) for each in refused] == [True] * 4
        standing = [each for each in sent if each not in refused]
        assert (pull(one, C), pull(one, B)) == (503, 200)
        with one.client() as stranger:
            assert stranger.get("/v1/ca").status_code == 200
        over = threading.Event()
        drip = threading.Thread(target=_drip, args=(half[0], over), daemon=True)
        drip.start()
        with ThreadPoolExecutor(8) as pool:
            for connection in [silent[0], silent[-1], *half]:
                connection.settimeout(60)
            assert set(pool.map(ends, [silent[0], silent[-1], *half])) == {b""}
            for answer in pool.map(lambda each: each.recv(4096), standing):
                assert b" 408 " in answer
        over.set()
        drip.join(10)
    until(lambda: pull(one, C) == 200, "the slow site is served again", 30.0)


def answered(connections: list[ssl.SSLSocket]) -> list[ssl.SSLSocket]:
    """Those on which something has come."""
    return select.select(connections, [], [], 0)[0]


def pull(one: Coordinator, site: str) -> int:
    """The status that a site's SuperNode gets when it asks for orders."""
    body = PullMessagesRequest(node=Node(node_id=node_of(one, site))).SerializeToString()
    with one.client(site) as client:
        return client.post("/v1/fleet/pull-messages", content=body, headers=signed_by(one.keys[site].node)).status_code


def _drip(connection: ssl.SSLSocket, over: threading.Event) -> None:
    """A byte of the head every half second: what has begun must still end in time."""
    with contextlib.suppress(OSError):
        connection.sendall(b"x-slow: ")
        while not over.wait(0.5):
            connection.sendall(b"y")
