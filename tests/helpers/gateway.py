"""A small real HTTPS gateway for the site's tests: its own CA, enrolment, and a Fleet path behind mutual TLS.

The coordinator's gateway is tested with the coordinator; this one exists so that the site's half can be
tested against answers that a correct coordinator would never give.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import ipaddress
import json
import ssl
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fl_shared.identity.signing import SigningKey, sign_document

SECRET = "s3cret-s3cret-s3cret-s3cret-s3cr"


def _name(**parts: str) -> x509.Name:
    kinds = {
        "o": NameOID.ORGANIZATION_NAME,
        "ou": NameOID.ORGANIZATIONAL_UNIT_NAME,
        "cn": NameOID.COMMON_NAME,
    }
    return x509.Name([x509.NameAttribute(kinds[key], value) for key, value in parts.items()])


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


class Authority:
    """A certificate authority made for one test."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.certificate = self._sign(_name(cn="test CA"), self.key.public_key(), ca=True)
        self.pem = _pem(self.certificate)
        der = self.certificate.public_bytes(serialization.Encoding.DER)
        self.sha256 = hashlib.sha256(der).hexdigest()

    def _sign(self, subject: x509.Name, public: Any, *, ca: bool = False) -> x509.Certificate:
        now = dt.datetime.now(dt.UTC)
        issuer = subject if ca else self.certificate.subject
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(minutes=5))
            .not_valid_after(now + dt.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if not ca:
            names = [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("coordinator.example")]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        else:
            usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
            builder = builder.add_extension(usage, critical=True)
        return builder.sign(self.key, hashes.SHA256())

    def server_files(self, directory: Path) -> tuple[Path, Path]:
        """Write a server certificate and key for 127.0.0.1."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(_name(cn="gateway"), key.public_key())
        (directory / "server.pem").write_text(_pem(certificate))
        (directory / "server.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return directory / "server.pem", directory / "server.key"

    def site_certificate(self, csr_pem: str, site: str) -> str:
        """Sign the request of a site."""
        request = x509.load_pem_x509_csr(csr_pem.encode())
        assert request.is_signature_valid
        return _pem(self._sign(_name(o="concordat", ou="site", cn=site), request.public_key()))


class Gateway:
    """An HTTPS server on loopback: `/v1/ca`, `/v1/enroll`, `/v1/hello` and a recording `/v1/fleet/*`."""

    def __init__(self, directory: Path) -> None:
        self.authority = Authority()
        self.signing = SigningKey.generate()
        self.secret = SECRET
        self.change_answer: Callable[[dict[str, Any]], dict[str, Any]] = lambda answer: answer
        self.fleet_answer: Callable[[str, bytes], tuple[int, bytes]] = lambda _path, body: (200, body)
        self.fleet_headers: dict[str, str] = {}
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.rotations: Any = []
        self.renewals = 0
        self.announced: list[dict[str, Any]] = []
        self.orders_read: list[str | None] = []
        self.fleet_calls: list[tuple[str, str]] = []
        self.certificates: list[str] = []
        gateway = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                """Stay quiet."""

            def _answer(
                self, status: int, body: bytes, kind: str = "application/json", more: dict[str, str] | None = None
            ) -> None:
                self.send_response(status)
                self.send_header("content-type", kind)
                for name, value in (more or {}).items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def _peer(self) -> str:
                certificate = self.connection.getpeercert()
                names = {k: v for part in (certificate or {}).get("subject", ()) for k, v in part}
                return str(names.get("commonName", ""))

            def _body(self) -> bytes:
                if self.headers.get("transfer-encoding", "") == "chunked":
                    whole = b""
                    while size := int(self.rfile.readline(), 16):
                        whole += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                    return whole
                return self.rfile.read(int(self.headers.get("content-length", 0)))

            def do_GET(self) -> None:
                if self.path == "/v1/ca":
                    self._answer(200, gateway.authority.pem.encode(), "application/x-pem-file")
                elif self.path == "/v1/hello" and self._peer():
                    hello = {"site": self._peer(), "coordinator_key": gateway.signing.public_hex, "time": time.time()}
                    hello["rotations"] = gateway.rotations
                    self._answer(200, json.dumps(hello).encode())
                elif self.path == "/v1/questions" and self._peer():
                    self._answer(200, b'{"questions": []}')
                else:
                    self._answer(403, json.dumps({"error": "no", "code": "role", "fix": "enrol"}).encode())

            def do_POST(self) -> None:
                body = self._body()
                if self.path == "/v1/enroll":
                    asked = json.loads(body)
                    gateway.requests.append((self.path, asked))
                    if asked["token"].split(".")[2] != gateway.secret:
                        text = {"error": "the token is not valid", "code": "enrolment", "fix": "get another"}
                        self._answer(403, json.dumps(text).encode())
                        return
                    answer = {
                        "certificate_pem": gateway.authority.site_certificate(asked["csr_pem"], asked["site"]),
                        "ca_pem": gateway.authority.pem,
                        "coordinator_key": gateway.signing.public_hex,
                        "fleet_path": "/v1/fleet",
                    }
                    self._answer(200, json.dumps(gateway.change_answer(answer)).encode())
                elif self.path == "/v1/renew" and self._peer():
                    made = gateway.authority.site_certificate(json.loads(body)["csr_pem"], self._peer())
                    gateway.renewals += 1
                    self._answer(200, json.dumps(gateway.change_answer({"certificate_pem": made})).encode())
                elif self.path == "/v1/base" and self._peer():
                    gateway.announced.append(json.loads(body))
                    gateway.orders_read.append(self.headers.get("concordat-orders"))
                    self._answer(200, b'{"taken": true}')
                elif self.path.startswith("/v1/fleet/") and self._peer():
                    gateway.fleet_calls.append((self.path, self._peer()))
                    der = self.connection.getpeercert(True)
                    gateway.certificates.append(hashlib.sha256(der).hexdigest())
                    self._answer(*gateway.fleet_answer(self.path, body), more=gateway.fleet_headers)
                else:
                    self._answer(403, b"{}")

        certificate, key = self.authority.server_files(directory)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(certificate, key)
        context.load_verify_locations(cadata=self.authority.pem)
        context.verify_mode = ssl.CERT_OPTIONAL
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.server.server_address[1]}"

    def rotate(self, old_until: float) -> SigningKey:
        """Change the signing key, vouched for by the old one; return the old key."""
        old, self.signing = self.signing, SigningKey.generate()
        change = {
            "kind": "coordinator-key",
            "new_key": self.signing.public_hex,
            "created_at": time.time(),
            "old_until": old_until,
        }
        self.rotations = [*self.rotations, sign_document(old, change)]
        return old

    def token(self, site: str, *, ca: str | None = None, secret: str | None = None) -> str:
        """An enrolment token for `site`."""
        return f"ct1.{site}.{secret or self.secret}.{ca or self.authority.sha256}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
