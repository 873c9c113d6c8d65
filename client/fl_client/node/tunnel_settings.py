"""What the tunnel process is started with, and what it says to its keeper."""

from __future__ import annotations

import datetime as dt
import ipaddress
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fl_shared.files import write_durably

READY = "tunnel ready"
NODE_LEFT = "the SuperNode has left, or is out of step"


@dataclass(frozen=True)
class TunnelSettings:
    """What the tunnel process needs; sent to it on standard input, never in arguments."""

    listen_fd: int
    fleet_url: str
    ca: str
    certificate: str
    key: str
    local_certificate: str
    local_key: str
    apps: list[str]
    node_file: str

    def to_line(self) -> bytes:
        """Return the JSON line that `python -m fl_client.node.tunnel` reads."""
        return json.dumps(asdict(self)).encode("utf-8") + b"\n"


def make_local_certificate(certificate: Path, key: Path, *, mode: int = 0o600) -> None:
    """Write a fresh self-signed certificate for 127.0.0.1 (`mode`), valid a year, and its key (0600)."""
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "concordat site tunnel")])
    now = dt.datetime.now(dt.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=365))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")]),
            critical=False,
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(private, hashes.SHA256())
    )
    write_durably(
        key,
        private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
    )
    write_durably(certificate, built.public_bytes(serialization.Encoding.PEM), mode=mode, exact=True)
