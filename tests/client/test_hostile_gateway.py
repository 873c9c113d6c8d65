"""Answers of a gateway that is hostile, or is none: they end in one typed error, and fill neither memory nor time."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fl_client.identity import gateway as asking
from fl_client.identity.enrolment import Coordinator, enrol, fetch_ca
from fl_client.identity.gateway import GatewayClient
from fl_client.identity.renewal import renew
from fl_client.identity.rotation import PinnedKeys
from fl_client.site.home import SiteHome
from fl_shared.errors import EnrolmentError, TransportError
from helpers.gateway import Gateway

SITE = "hospital-001"
Said = Callable[[ssl.SSLSocket], None]


class Hostile:
    """Speaks TLS with the gateway's certificate and then says what a test wants; `sent` counts its bytes."""

    def __init__(self, directory: Path, say: Said) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(directory / "server.pem", directory / "server.key")
        self._say = say
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"https://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._one, args=self._listening.accept()[:1], daemon=True).start()

    def _one(self, arrived: socket.socket) -> None:
        with contextlib.suppress(OSError), self._context.wrap_socket(arrived, server_side=True) as connection:
            connection.recv(65_536)
            self._say(connection)

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()


@pytest.fixture
def hostile(gateway: Gateway, tmp_path: Path) -> Iterator[Callable[[Said], tuple[SiteHome, Coordinator]]]:
    """A site enrolled at the real gateway, whose coordinator from now on is hostile."""
    home = SiteHome(tmp_path / "home")
    pinned = enrol(home, site=SITE, server=gateway.url, token=gateway.token(SITE))
    made: list[Hostile] = []

    def answers(say: Said) -> tuple[SiteHome, Coordinator]:
        made.append(Hostile(tmp_path / "gateway", say))
        return home, dataclasses.replace(pinned, server=made[-1].url)

    yield answers
    for each in made:
        each.close()


def whole(body: bytes, *more: str) -> Said:
    """A complete answer."""
    head = "".join(f"{line}\r\n" for line in ("HTTP/1.1 200 OK", f"content-length: {len(body)}", *more, ""))
    return lambda connection: connection.sendall(head.encode() + body)


NO_DOCUMENT = {
    "deep": b"[" * 200_000,
    "deep tables": b'{"a":' * 100_000,
    "not a number": b'{"questions": NaN}',
    "a key twice": b'{"questions": [], "questions": [1]}',
    "a huge number": b'{"a": ' + b"9" * 5000 + b"}",
    "no text": b"\xff\xfe{}",
}


@pytest.mark.parametrize("case", NO_DOCUMENT)
def test_an_answer_that_is_no_document_is_a_typed_error(
    case: str, hostile: Callable[[Said], tuple[SiteHome, Coordinator]]
) -> None:
    """For the agent's calls, for the question whether a key may sign orders, and for enrolment."""
    home, pinned = hostile(whole(NO_DOCUMENT[case]))
    with pytest.raises(TransportError, match="not JSON"):
        GatewayClient.of_site(home, pinned.server).call("GET", "/v1/questions")
    assert not PinnedKeys(home, pinned).accepts(pinned.coordinator_key)
    with pytest.raises(EnrolmentError, match="did not answer with a certificate"):
        fetch_ca(pinned.server, "0" * 64)


@pytest.mark.parametrize(
    ("status", "body", "enrolled", "before"),
    [
        (403, b'{"error": "revoked", "fix": "rm -rf /"}', (EnrolmentError, "refuses this certificate: revoked"),
         (EnrolmentError, "refused: revoked")),
        (503, b'{"error": "not ready", "fix": "wait"}', (TransportError, "cannot answer just now: not ready"),
         (TransportError, "cannot answer just now: not ready")),
        (403, b"<html>a proxy's page</html>", (TransportError, "not JSON"), (EnrolmentError, "status 403")),
        (500, b"[]", (EnrolmentError, "status 500"), (EnrolmentError, "status 500")),
    ],
)  # fmt: skip
def test_a_refusal_says_whether_it_may_pass(
    status: int,
    body: bytes,
    enrolled: tuple[type[Exception], str],
    before: tuple[type[Exception], str],
    hostile: Callable[[Said], tuple[SiteHome, Coordinator]],
) -> None:
    """One reading of what the gateway refuses, with a certificate and before there is one; never is its advice for a
    revoked certificate passed on.
    """
    head = f"HTTP/1.1 {status} No\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    home, pinned = hostile(lambda connection: connection.sendall(head + body))
    with pytest.raises(enrolled[0], match=enrolled[1]) as caught:
        GatewayClient.of_site(home, pinned.server).hello()
    assert "rm -rf" not in str(getattr(caught.value, "fix", ""))
    with pytest.raises(before[0], match=before[1]):
        fetch_ca(pinned.server, "0" * 64)


def test_nothing_is_inflated(hostile: Callable[[Said], tuple[SiteHome, Coordinator]]) -> None:
    """400 KB that would become 400 MB stay 400 KB."""
    home, pinned = hostile(whole(gzip.compress(bytes(400 << 20), 9), "content-encoding: gzip"))
    with pytest.raises(TransportError, match="not JSON"):
        GatewayClient.of_site(home, pinned.server).call("GET", "/v1/questions")
    with pytest.raises(EnrolmentError, match="did not answer with a certificate"):
        fetch_ca(pinned.server, "0" * 64)


def test_an_answer_without_end_is_broken_off(
    hostile: Callable[[Said], tuple[SiteHome, Coordinator]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the limit of size, and, byte by byte, at that of time; the other side gets rid of little."""
    sent = [0]

    def endless(connection: ssl.SSLSocket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        while sent[0] < 256 << 20:
            connection.sendall(b"10000\r\n" + b" " * 65_536 + b"\r\n")
            sent[0] += 65_536

    home, pinned = hostile(endless)
    with pytest.raises(TransportError, match="too large"):
        GatewayClient.of_site(home, pinned.server).call("GET", "/v1/questions")
    with pytest.raises(TransportError, match="too large"):
        fetch_ca(pinned.server, "0" * 64)
    assert sent[0] < 128 << 20  # what lay in the buffers of two sockets

    def trickle(connection: ssl.SSLSocket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n")
        while True:
            connection.sendall(b" ")
            threading.Event().wait(0.05)

    monkeypatch.setattr(asking, "PATIENCE_S", 0.5)
    home, pinned = hostile(trickle)
    with pytest.raises(TransportError, match="too slowly"):
        GatewayClient.of_site(home, pinned.server).call("GET", "/v1/questions")


def _nameless(gateway: Gateway, pem: str) -> str:
    """The same certificate, signed again with a name that is no text: TLS libraries read names late."""
    certificate = x509.load_pem_x509_certificate(pem.encode())
    body = certificate.tbs_certificate_bytes.replace(SITE.encode(), b"\xff" * len(SITE))
    assert body != certificate.tbs_certificate_bytes
    signature = gateway.authority.key.sign(body, ec.ECDSA(hashes.SHA256()))
    algorithm = bytes.fromhex("300a06082a8648ce3d040302")  # ecdsa-with-SHA256
    inner = body + algorithm + b"\x03" + bytes([len(signature) + 1]) + b"\x00" + signature
    der = b"\x30\x82" + len(inner).to_bytes(2, "big") + inner
    return x509.load_der_x509_certificate(der).public_bytes(serialization.Encoding.PEM).decode()


def test_a_certificate_whose_name_is_no_text_is_refused(gateway: Gateway, tmp_path: Path) -> None:
    """At enrolment and at renewal: a typed error, and what was there stays in use."""
    home = SiteHome(tmp_path / "home")

    def change(answer: dict[str, str]) -> dict[str, str]:
        return {**answer, "certificate_pem": _nameless(gateway, answer["certificate_pem"])}

    gateway.change_answer = change
    with pytest.raises(EnrolmentError, match="not valid"):
        enrol(home, site=SITE, server=gateway.url, token=gateway.token(SITE))
    gateway.change_answer = lambda answer: answer
    pinned = enrol(home, site=SITE, server=gateway.url, token=gateway.token(SITE))
    before = home.client_certificate.read_bytes()
    gateway.change_answer = change
    with pytest.raises(EnrolmentError, match="not valid"):
        renew(home, pinned)
    assert home.client_certificate.read_bytes() == before
