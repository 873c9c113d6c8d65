"""What the tests of the gateway share: calls as sites and SuperNodes make them."""

from __future__ import annotations

import http.client
import json
import ssl
from base64 import b64encode
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.supercore.date import now as flower_now
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message

from fl_client.identity.enrolment import Coordinator as Pinned
from fl_client.identity.enrolment import enrol
from fl_client.site.home import SiteHome
from fl_server.db.store import Store
from fl_server.identity.sites import Invitation, Sites
from helpers.coordinators import Coordinator

LIMIT = 2 << 20
RATE = 20
A, B, C = "hospital-001", "hospital-002", "hospital-003"
ATTACKER, MUTE, SLOW_SITE = "127.0.0.2", "127.0.0.3", "127.0.0.4"  # loopback has many addresses
PROTOBUF = {"content-type": "application/protobuf"}


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


def fresh_site(one: Coordinator, site: str) -> tuple[SiteHome, Pinned]:
    """A site enrolled by the real client."""
    home = SiteHome(one.root / f"home-{site}")
    return home, enrol(home, site=site, server=one.url, token=invitation(one, site).token)
