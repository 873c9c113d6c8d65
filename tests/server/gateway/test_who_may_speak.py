"""Who may speak at the one open port, with what and for whom: real fl-server processes, real TLS, real Flower."""

from __future__ import annotations

import json
import sqlite3
import ssl
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.proto.fleet_pb2 import ActivateNodeResponse, PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import Message, Metadata, PushObjectRequest
from flwr.proto.node_pb2 import Node

from fl_client.identity.enrolment import enrol
from fl_client.identity.gateway import GatewayClient
from fl_server.flower.superlink import Flower
from fl_server.home.layout import ServerHome
from fl_server.identity.authority import Authority
from fl_shared.errors import ConcordatError, EnrolmentError
from fl_shared.identity.x509 import fingerprint
from helpers.coordinators import Coordinator, Keys, until
from helpers.gateways import (
    PROTOBUF,
    A,
    B,
    OneConnection,
    activation,
    code,
    fresh_site,
    invitation,
    node_of,
    signed_by,
    sites_of,
)

pytestmark = pytest.mark.timeout(300)


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
