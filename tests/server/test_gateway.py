"""The one open port against those who may be hostile: real fl-server processes, real TLS, real Flower."""

from __future__ import annotations

import contextlib
import http.client
import json
import select
import shutil
import socket
import sqlite3
import ssl
import tempfile
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import ActivateNodeRequest, ActivateNodeResponse, PullMessagesRequest, PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import Message, Metadata, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.date import now as flower_now
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message

from fl_client.agent.check import _server
from fl_client.identity import rotation as site_rotation
from fl_client.identity.enrolment import Coordinator as Pinned
from fl_client.identity.enrolment import enrol
from fl_client.identity.gateway import GatewayClient
from fl_client.identity.renewal import renew
from fl_client.identity.rotation import PinnedKeys
from fl_client.site.home import SiteHome
from fl_server.db.store import Store
from fl_server.flower.superlink import Flower
from fl_server.gateway.app import MAX_ENROL_BYTES, MAX_PER_SITE
from fl_server.gateway.connections import MAX_FOR_AN_ADDRESS
from fl_server.home.layout import ServerHome
from fl_server.identity.authority import Authority
from fl_server.identity.sites import Invitation, Sites
from fl_shared.errors import ConcordatError, EnrolmentError
from fl_shared.identity.x509 import fingerprint
from helpers.coordinators import Coordinator, Keys, until

LIMIT = 2 << 20
RATE = 20
A, B, C = "hospital-001", "hospital-002", "hospital-003"
ATTACKER, MUTE, SLOW_SITE = "127.0.0.2", "127.0.0.3", "127.0.0.4"  # loopback has many addresses
PROTOBUF = {"content-type": "application/protobuf"}

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def one() -> Iterator[Coordinator]:
    """A coordinator with two enrolled sites and small limits."""
    root = Path(tempfile.mkdtemp(prefix="gw-"))
    made = None
    try:
        made = Coordinator(root)
        toml = made.home / "server.toml"
        text = toml.read_text().replace("max_message_bytes = 1073741824", f"max_message_bytes = {LIMIT}")
        toml.write_text(text.replace("site_requests_per_s = 50", f"site_requests_per_s = {RATE}"))
        made.up()
        made.enrol(A, B)
        yield made
    finally:
        if made is not None:
            made.close()
        shutil.rmtree(root, ignore_errors=True)


def code(answer: httpx.Response) -> tuple[int, str]:
    """Status and code of a refusal."""
    return answer.status_code, str(answer.json().get("code", ""))


def signed_by(key: ec.EllipticCurvePrivateKey) -> dict[str, str]:
    """The headers of Flower's SuperNode with this node key."""
    timestamp = flower_now().isoformat()
    return PROTOBUF | {
        "flwr-public-key": b64encode(public_key_to_bytes(key.public_key())).decode(),
        "flwr-timestamp": timestamp,
        "flwr-signature": b64encode(sign_message(key, timestamp.encode())).decode(),
    }


def activation(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The call with which a node comes on line."""
    public = public_key_to_bytes(key.public_key())
    return ActivateNodeRequest(public_key=public, heartbeat_interval=30.0).SerializeToString()


def sites_of(one: Coordinator) -> Sites:
    """The coordinator's sites, without starting a process for each question."""
    return Sites(Store(f"sqlite:///{one.home / 'coordinator.sqlite'}"))


def invitation(one: Coordinator, site: str, *, ttl_s: float = 600.0) -> Invitation:
    """A token as `fl-admin sites invite` makes it."""
    return sites_of(one).invite(site, ca_sha256=one.facts["ca_sha256"], ttl_s=ttl_s)


def node_of(one: Coordinator, site: str) -> int:
    """Flower's id of a site's node."""
    return int(sites_of(one).get(site).node_id)


class OneConnection:
    """Requests over one and the same TLS connection, to see what a connection that is open already can do."""

    def __init__(self, one: Coordinator, certificate: Path, key: Path, *, source: str = "127.0.0.1") -> None:
        context = ssl.create_default_context(cafile=str(one.home / "tls" / "ca.pem"))
        context.load_cert_chain(certificate, key)
        self._connection = http.client.HTTPSConnection(
            "127.0.0.1", one.gateway, context=context, timeout=30, source_address=(source, 0)
        )
        self._connection.connect()
        self._socket = self._connection.sock

    def ask(self, method: str = "GET", path: str = "/v1/hello", **more: Any) -> tuple[int, str]:
        """Status and code."""
        self._connection.request(method, path, **more)
        answer = self._connection.getresponse()
        body = json.loads(answer.read())
        assert self._connection.sock is self._socket
        return answer.status, str(body.get("code", ""))

    def close(self) -> None:
        self._connection.close()


@pytest.fixture
def connect(one: Coordinator) -> Iterator[Callable[..., OneConnection]]:
    """Make connections that are closed at the end."""
    with contextlib.ExitStack() as stack:

        def make(certificate: Path, key: Path) -> OneConnection:
            made = OneConnection(one, certificate, key)
            stack.callback(made.close)
            return made

        yield make


def fresh_site(one: Coordinator, site: str) -> tuple[SiteHome, Pinned]:
    """A site enrolled by the real client."""
    home = SiteHome(one.root / f"home-{site}")
    return home, enrol(home, site=site, server=one.url, token=invitation(one, site).token)


# --- Who may speak


PROTECTED = [
    ("GET", "/v1/hello"), ("POST", "/v1/renew"), ("GET", "/v1/questions"), ("POST", "/v1/answers"),
    ("POST", "/v1/base"), ("POST", "/v1/fleet/pull-messages"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), PROTECTED)
def test_anonymous_callers_get_nothing(one: Coordinator, method: str, path: str) -> None:
    """Without a certificate every path of the sites is closed."""
    with one.client() as client:
        assert code(client.request(method, path)) == (403, "no-certificate")


def test_a_certificate_of_another_authority_ends_in_the_handshake(one: Coordinator, tmp_path: Path) -> None:
    """A CA of the attacker's own, with the same names in it."""
    Authority.create(tmp_path / "ca.key", tmp_path / "ca.pem").issue_client(
        tmp_path / "client.key", tmp_path / "client.pem", "site", A, 30
    )
    with one.client(folder=tmp_path) as client, pytest.raises(httpx.TransportError):
        client.get("/v1/hello")


def test_older_tls_is_refused(one: Coordinator) -> None:
    """TLS 1.2 gets no handshake, 1.3 does."""
    for version, accepted in ((ssl.TLSVersion.TLSv1_2, False), (ssl.TLSVersion.TLSv1_3, True)):
        context = ssl.create_default_context(cafile=str(one.home / "tls" / "ca.pem"))
        context.maximum_version = version
        with httpx.Client(verify=context, trust_env=False) as client:
            if accepted:
                assert client.get(f"{one.url}/healthz").status_code == 200
            else:
                with pytest.raises(httpx.ConnectError):
                    client.get(f"{one.url}/healthz")


@pytest.mark.parametrize("role", ["admin", "auditor"])
@pytest.mark.parametrize(("method", "path"), PROTECTED)
def test_other_roles_are_no_sites(one: Coordinator, role: str, method: str, path: str, tmp_path: Path) -> None:
    """A certificate of our own CA, but of an admin or auditor, even one that is called like a site."""
    Authority.load(one.home / "tls" / "ca.key", one.home / "tls" / "ca.pem").issue_client(
        tmp_path / "client.key", tmp_path / "client.pem", role, A, 30
    )
    with one.client(folder=tmp_path) as client:
        assert code(client.request(method, path)) == (403, "not-authorised")


def test_a_certificate_of_the_right_name_that_was_not_handed_out_is_refused(one: Coordinator, tmp_path: Path) -> None:
    """Whatever our own CA signed: only the certificate that stands in the site's row counts."""
    Authority.load(one.home / "tls" / "ca.key", one.home / "tls" / "ca.pem").issue_client(
        tmp_path / "client.key", tmp_path / "client.pem", "site", A, 30
    )
    with one.client(folder=tmp_path) as client:
        assert code(client.get("/v1/hello")) == (403, "not-authorised")


@pytest.mark.parametrize(
    "path",
    [
        "/v1/fleet/register-node", "/v1/fleet/unregister-node", "/v1/control/start-run", "/v1/runtime/pull-task-input",
        "/v1/fleet/../control/start-run", "/v1/fleet/%2e%2e/control/start-run", "/", "/docs", "/openapi.json",
        "/v1%2Fhello", "/v1/%68ello", "/v1%2ffleet/pull-messages", "/v1/fleet%2fpull-messages", "/v1/renew%00",
    ],
)  # fmt: skip
def test_nothing_else_of_flower_is_published(one: Coordinator, path: str) -> None:
    """Registration, the Control and Runtime APIs and the rest of the SuperLink are not there, even for sites."""
    with one.client(A) as client:
        for method in ("GET", "POST"):
            request = client.build_request(method, one.url)
            request.url = request.url.copy_with(raw_path=path.encode())
            answer = client.send(request)
            assert answer.status_code == 404


def test_a_revocation_counts_from_the_next_request_on(one: Coordinator, connect: Callable[..., OneConnection]) -> None:
    """Even on a connection that was opened before, for every path, and for a renewal; other sites go on."""
    keys = Keys("hospital-revoked", one.root / "hospital-revoked")
    with one.client() as client:
        token = invitation(one, keys.site).token
        keys.save(client.post("/v1/enroll", json=keys.request(token)).json()["certificate_pem"])
    connection = connect(keys.folder / "client.pem", keys.folder / "client.key")
    assert connection.ask() == (200, "")
    one.admin("sites", "revoke", keys.site)
    for method, path in PROTECTED:
        assert connection.ask(method, path) == (403, "not-authorised")
    assert connection.ask("POST", "/v1/renew", body=json.dumps(keys.request(""))) == (403, "not-authorised")
    with one.client(A) as client:
        assert client.get("/v1/hello").status_code == 200


def test_a_revoked_site_comes_back_with_a_new_token_and_its_old_ledger_key(one: Coordinator) -> None:
    """Certificate and node key are new, which the revoked ones must be; the signing key of its ledger stays."""
    site = "hospital-back"
    home, _ = fresh_site(one, site)
    before = sites_of(one).get(site)
    sites_of(one).revoke(site, Flower(ServerHome(one.home)))
    token = invitation(one, site).token
    with pytest.raises(EnrolmentError, match="enrolled already"):
        enrol(home, site=site, server=one.url, token=token)
    pinned = enrol(home, site=site, server=one.url, token=token, force=True)
    assert GatewayClient.of_site(home, pinned.server).hello()["site"] == site
    after = sites_of(one).get(site)
    assert after.signing_key == before.signing_key
    assert after.certificate_fingerprint != before.certificate_fingerprint
    assert (after.node_key_fingerprint, after.node_id) != (before.node_key_fingerprint, before.node_id)


def test_an_expired_certificate_is_refused_even_on_an_open_connection(
    one: Coordinator, connect: Callable[..., OneConnection]
) -> None:
    """A certificate that ends while its connection is open, and the handshake after that."""
    site = "hospital-expired"
    home, pinned = fresh_site(one, site)
    authority = Authority.load(one.home / "tls" / "ca.key", one.home / "tls" / "ca.pem")
    short = authority.issue_client(home.client_key, home.client_certificate, "site", site, 6 / 86_400)
    database = sqlite3.connect(one.home / "coordinator.sqlite", timeout=30)
    with database:
        database.execute("UPDATE sites SET certificate_fingerprint = ? WHERE site = ?", (fingerprint(short), site))
    database.close()
    connection = connect(home.client_certificate, home.client_key)
    assert connection.ask() == (200, "")
    until(lambda: time.time() > short.not_valid_after_utc.timestamp() + 0.5, "the certificate has expired")
    assert connection.ask() == (403, "expired")
    with pytest.raises(ConcordatError):
        GatewayClient.of_site(home, pinned.server).hello()


# --- Tokens


def test_a_token_counts_once_for_its_site_until_it_expires_and_is_hashed_at_rest(one: Coordinator) -> None:
    """Used, expired, another site's, made up: refused by name; nothing on disk gives a secret away."""
    used, expired, other = (f"hospital-{word}" for word in ("used", "late", "other"))
    first, foreign = invitation(one, used).token, invitation(one, other).token
    short = invitation(one, expired, ttl_s=1.0)
    keys = {site: Keys(site, one.root / site) for site in (used, expired)}
    time.sleep(max(0.0, short.expires_at - time.time() + 0.2))
    secret = first.split(".")[2]
    disk = b"".join(path.read_bytes() for path in one.home.glob("coordinator.sqlite*"))
    assert secret.encode() not in disk
    assert secret not in (one.home / "logs" / "gateway.log").read_text()
    with one.client() as client:

        def ask(site: str, token: str) -> tuple[int, str]:
            return code(client.post("/v1/enroll", json=keys[site].request(token)))

        assert ask(expired, short.token) == (403, "expired-token")
        assert ask(used, foreign) == (403, "bad-token")
        assert ask(used, first.replace(secret, secret[::-1])) == (403, "bad-token")
        assert ask(used, first) == (200, "")
        assert ask(used, first) == (403, "used-token")


def test_a_token_that_many_use_at_once_enrols_one(one: Coordinator) -> None:
    """Eight with their own keys and the same token: one is certified."""
    token = invitation(one, "hospital-race").token
    bodies = [Keys("hospital-race", one.root / f"race-{n}").request(token) for n in range(8)]
    with one.client() as client, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda body: client.post("/v1/enroll", json=body), bodies))
    assert sorted(answer.status_code for answer in answers) == [200] + [403] * 7


# --- Whose node


def test_a_site_speaks_to_flower_with_its_own_node(one: Coordinator) -> None:
    """The node of the enrolment comes on line and beats through the gateway."""
    key = one.keys[A].node
    with one.client(A) as client:
        answer = client.post("/v1/fleet/activate-node", content=activation(key), headers=signed_by(key))
        assert answer.status_code == 200, answer.text
        node = ActivateNodeResponse.FromString(answer.content).node_id
        assert node == node_of(one, A)
        beat = SendNodeHeartbeatRequest(node=Node(node_id=node), heartbeat_interval=30.0)
        answer = client.post("/v1/fleet/send-node-heartbeat", content=beat.SerializeToString(), headers=signed_by(key))
        assert answer.status_code == 200, answer.text


def test_another_sites_node_key_is_refused_at_the_gateway(one: Coordinator) -> None:
    """A's valid certificate with B's Flower key, rightly signed: refused before the SuperLink hears of it."""
    stolen = one.keys[B].node
    calls = {
        "activate-node": activation(stolen),
        "pull-messages": b"",
        "push-object": PushObjectRequest(node=Node(node_id=node_of(one, B)), object_content=b"x").SerializeToString(),
    }
    before = (one.home / "logs" / "superlink.log").read_text().count("POST /v1/fleet")
    with one.client(A) as client:
        for call, body in calls.items():
            answer = client.post(f"/v1/fleet/{call}", content=body, headers=signed_by(stolen))
            assert code(answer) == (403, "wrong-node"), call
        assert code(client.post("/v1/fleet/pull-messages", headers=PROTOBUF)) == (403, "wrong-node")
    assert (one.home / "logs" / "superlink.log").read_text().count("POST /v1/fleet") == before
    # The same bytes with B's certificate are accepted: it was the certificate that made the difference.
    with one.client(B) as client:
        answer = client.post("/v1/fleet/activate-node", content=calls["activate-node"], headers=signed_by(stolen))
        assert answer.status_code == 200, answer.text


def pushed(**metadata: Any) -> bytes:
    """A push of one message."""
    return PushMessagesRequest(messages_list=[Message(metadata=Metadata(**metadata))]).SerializeToString()


def test_a_message_in_anothers_name_is_refused_at_the_gateway(one: Coordinator) -> None:
    """Rightly signed by A's node, but from B's, or an order to B as if from the SuperLink: refused.

    Flower itself checks neither; see fl_server.gateway.fleet.
    """
    ours, theirs = node_of(one, A), node_of(one, B)
    with one.client(A) as client:

        def push(body: bytes) -> httpx.Response:
            return client.post("/v1/fleet/push-messages", content=body, headers=signed_by(one.keys[A].node))

        forged = pushed(src_node_id=theirs, dst_node_id=1, reply_to_message_id="a" * 64)
        order = pushed(src_node_id=1, dst_node_id=theirs, message_type="train")
        unasked = pushed(src_node_id=ours, dst_node_id=theirs, message_type="train")
        for body in (forged, order, unasked):
            assert code(push(body)) == (403, "wrong-node")
        assert code(push(b"\xff" * 40)) == (400, "bad-call")
        honest = push(pushed(src_node_id=ours, dst_node_id=1, reply_to_message_id="a" * 64))
        assert "wrong-node" not in honest.text  # it reached the SuperLink, which has no such run


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


# --- New certificates and keys


def test_a_site_renews_its_certificate_and_the_old_one_ends_with_the_first_use_of_the_new(
    one: Coordinator, connect: Callable[..., OneConnection], tmp_path: Path
) -> None:
    """Until then both count, so a lost answer costs nothing; afterwards the old one is refused on open connections."""
    home, pinned = fresh_site(one, "hospital-renewing")
    old_key, old = tmp_path / "old.key", tmp_path / "old.pem"
    shutil.copy(home.client_key, old_key)
    shutil.copy(home.client_certificate, old)
    connection = connect(old, old_key)
    lost = renew(home, pinned)
    # The answer was lost: the site asks once more with what it had.
    shutil.copy(old_key, home.client_key)
    shutil.copy(old, home.client_certificate)
    made = renew(home, pinned)
    assert made.serial_number != lost.serial_number
    assert connection.ask() == (200, "")
    assert GatewayClient.of_site(home, pinned.server).hello()["site"] == "hospital-renewing"
    assert connection.ask() == (403, "not-authorised")
    row = sites_of(one).get("hospital-renewing")
    assert (row.certificate_fingerprint, row.next_fingerprint) == (fingerprint(made), "")
    assert row.certificate_expires_at == made.not_valid_after_utc.timestamp()
    renew(home, pinned)
    assert GatewayClient.of_site(home, pinned.server).hello()["site"] == "hospital-renewing"


def test_a_renewal_of_nonsense_or_in_anothers_name_is_refused(one: Coordinator) -> None:
    """The name in the request does not matter: the certificate that asks decides for whom the new one is."""
    from cryptography import x509

    with one.client(A) as client:
        for body in (b"", b"[]", b'{"csr_pem": 1}', b'{"csr_pem": "x"}', b"[" * 60_000):
            answer = client.post("/v1/renew", content=body)
            assert answer.status_code in (400, 403), answer.text
        asked = Keys(B, one.root / "unused").request("")
        made = client.post("/v1/renew", json={"csr_pem": asked["csr_pem"]}).json()["certificate_pem"]
    names = x509.load_pem_x509_certificate(made.encode()).subject.rfc4514_string()
    assert names == f"CN={A},OU=site,O=concordat"


def test_the_coordinators_key_changes_under_running_sites_with_a_grace(
    one: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sites follow by the old key's word, accept both for the grace, and the new one alone after it; one slept."""
    monkeypatch.setattr(site_rotation, "ASK_EVERY_S", 0.0)
    home, pinned = fresh_site(one, "hospital-awake")
    sleeper_home, sleeper = fresh_site(one, "hospital-asleep")
    keys = PinnedKeys(home, pinned)
    first = pinned.coordinator_key
    second = rotate_key(one, 1)
    assert keys.accepts(second)
    assert keys.accepts(first)
    third = rotate_key(one, 0)
    assert keys.accepts(third)
    assert not keys.accepts(second)
    assert PinnedKeys(sleeper_home, sleeper).accepts(third)
    assert Pinned.load(sleeper_home).coordinator_key == third
    assert "accepts the certificate" in _server(sleeper_home, sleeper)


def rotate_key(one: Coordinator, grace_days: int) -> str:
    """`fl-server rotate-key` while everything runs; the new key."""
    line = ("rotate-key", "--home", str(one.home), "--grace-days", str(grace_days), "--json")
    found: str = json.loads(one.run("fl-server", *line).stdout)["body"]["new_key"]
    return found


def test_the_fingerprints_that_both_sides_show_are_the_same(one: Coordinator) -> None:
    """What `fl-client enroll` prints, `fl-admin sites show` prints: they can be compared by telephone."""
    site = "hospital-phone"
    enrolled = one.run(
        "fl-client", "enroll", "--site", site, "--home", str(one.root / "phone"), "--server", one.url,
        "--token", invitation(one, site).token,
    ).stdout  # fmt: skip
    shown = one.run("fl-admin", "sites", "show", site).stdout
    for name in ("coordinator's key", "CA certificate", "site's key", "site's certificate"):
        (theirs,) = [line.split(name)[1].split() for line in enrolled.splitlines() if name in line]
        (ours,) = [line.split(name)[1].split() for line in shown.splitlines() if name in line]
        assert theirs == ours, name
        assert len("".join(theirs)) >= 32
