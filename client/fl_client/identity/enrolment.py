"""Enrolment: a site makes its keys, proves a one-time token and receives its certificate.

The keys never travel. They are made once in `pending/`, kept there while attempts fail (so that a
retry presents the same keys), and moved into place only after the coordinator's answer was checked;
`coordinator.json` is written last, and a site is enrolled exactly when that file exists.

Trust starts from the token: `ct1.<site>.<secret>.<sha256 of the CA certificate>`. The CA is fetched
without verification, compared with the hash, and from then on every connection is verified by it.
"""

from __future__ import annotations

import hmac
import json
import re
import secrets
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fl_client.identity.gateway import GatewayClient, unverified_context, verified_context
from fl_client.site.address import server_url
from fl_client.site.home import SiteHome
from fl_client.site.locks import exclusive
from fl_shared.errors import EnrolmentError, SignatureError
from fl_shared.files import sync_directory, write_durably
from fl_shared.identity.enrolment import statement
from fl_shared.identity.signing import SigningKey, ed25519_key
from fl_shared.identity.token import Token
from fl_shared.identity.x509 import fingerprint, issued, signing_request
from fl_shared.names import site_id


@dataclass(frozen=True)
class Coordinator:
    """What enrolment pinned about the coordinator.

    `previous_key` signed orders before the last rotation (`fl_client.identity.rotation`), and may until
    `previous_until` (Unix seconds). `signing_key` is the site's own that was proved at enrolment; "" where that was
    before it was noted.
    """

    site: str
    server: str
    fleet_path: str
    coordinator_key: str
    ca_sha256: str
    enrolled_at: int
    previous_key: str = ""
    previous_until: float = 0.0
    signing_key: str = ""

    def save(self, home: SiteHome) -> None:
        """Write `coordinator.json` durably."""
        write_durably(home.coordinator, (json.dumps(asdict(self), indent=2) + "\n").encode("utf-8"))

    @classmethod
    def load(cls, home: SiteHome) -> Coordinator:
        """Read `coordinator.json`; EnrolmentError when the site is not enrolled or it is damaged."""
        try:
            body = json.loads(home.coordinator.read_text("utf-8"))
            ed25519_key(body["coordinator_key"])
            return cls(
                **{name: kind(body[name]) for name, kind in _COORDINATOR_FIELDS.items()},
                previous_key=str(body.get("previous_key", "")),
                previous_until=float(body.get("previous_until", 0.0)),
                signing_key=str(body.get("signing_key", "")),
            )
        except FileNotFoundError:
            raise EnrolmentError(
                f"this site is not enrolled: {home.coordinator} does not exist",
                fix="ask the coordinator for a token and run `fl-client enroll --site ID --server URL --token TOKEN`",
            ) from None
        except (SignatureError, ValueError, KeyError, TypeError, OSError) as error:
            raise EnrolmentError(
                f"{home.coordinator} cannot be read: {error}",
                fix="restore it from a backup, or enrol again with a new token and --force",
            ) from None


_COORDINATOR_FIELDS: dict[str, type] = {
    "site": str,
    "server": str,
    "fleet_path": str,
    "coordinator_key": str,
    "ca_sha256": str,
    "enrolled_at": int,
}


def fetch_ca(server: str, expected_sha256: str) -> str:
    """Fetch the CA certificate (PEM) and accept it only if its DER hashes to `expected_sha256`.

    The connection is not verified; the hash is what makes the answer trustworthy.
    """
    answer = GatewayClient.before_enrolment(server, unverified_context()).fetch("GET", "/v1/ca")
    try:
        certificate = x509.load_pem_x509_certificate(answer)
    except (ValueError, x509.InvalidVersion):
        raise EnrolmentError(
            f"{server}/v1/ca did not answer with a certificate",
            fix="check that --server names the coordinator's gateway and its port",
        ) from None
    if not hmac.compare_digest(fingerprint(certificate), expected_sha256):
        raise EnrolmentError(
            f"the CA certificate at {server} is not the one that the token names",
            fix="check the address; if it is right, someone may stand in between: ask for a new token",
        )
    return certificate.public_bytes(serialization.Encoding.PEM).decode("ascii")


def enrol(home: SiteHome, *, site: str, server: str, token: str, force: bool = False) -> Coordinator:
    """Enrol `site` at `server` with a one-time `token` and return what was pinned.

    Refuses when the site is enrolled already, unless `force`: then a new TLS key, certificate and node key are
    made (a revoked site's node key is never admitted again), the old TLS pair moves to `tls/replaced/`, and the
    signing key and the ledger stay as they are.
    A failed attempt changes nothing but `pending/` and can be repeated. Raises EnrolmentError,
    TransportError.
    """
    site_id(site)
    parsed = Token.parse(token.strip())
    if parsed.site != site:
        raise EnrolmentError(
            f"the token is for site {parsed.site!r}, not for {site!r}",
            fix=f"use --site {parsed.site}, or ask for a token for {site}",
        )
    address = server_url(server)
    if home.coordinator.exists() and not force:
        raise _enrolled_already(home, site)
    ca_pem = fetch_ca(address, parsed.ca_sha256)
    home.make()
    # Two at once would put the one's key beside the other's certificate.
    with exclusive(home.run / "enrol.lock", "an enrolment"):
        if home.coordinator.exists() and not force:
            raise _enrolled_already(home, site)
        pending = _pending_keys(home, new_node=force)
        answer = _ask(address, ca_pem, site, parsed, pending)
        pinned = _checked(answer, site=site, server=address, ca_pem=ca_pem, token=parsed, pending=pending)
        _put_in_place(home, pending, ca_pem, str(answer["certificate_pem"]), pinned)
    return pinned


def _enrolled_already(home: SiteHome, site: str) -> EnrolmentError:
    return EnrolmentError(
        f"site {site} is enrolled already ({home.coordinator})",
        fix="nothing to do; to replace the certificate get a new token and add --force",
    )


@dataclass(frozen=True)
class _Pending:
    directory: Path
    signing: SigningKey
    tls_key: ec.EllipticCurvePrivateKey
    node_key: ec.EllipticCurvePrivateKey


def _pending_keys(home: SiteHome, *, new_node: bool) -> _Pending:
    """Make the three keys, or load those an earlier attempt made. Nothing existing is overwritten."""
    directory = home.root / "pending"
    directory.mkdir(exist_ok=True, mode=0o700)
    if home.signing_key.exists():
        signing = SigningKey.load(home.signing_key)
    elif (directory / "signing.pem").exists():
        signing = SigningKey.load(directory / "signing.pem")
    else:
        signing = SigningKey.generate()
        signing.save(directory / "signing.pem")
    tls_key = _ec_key(directory / "client.key", serialization.PrivateFormat.PKCS8)
    node_place = home.node_key if home.node_key.exists() and not new_node else directory / "node_key"
    node_key = _ec_key(node_place, serialization.PrivateFormat.OpenSSH)
    return _Pending(directory, signing, tls_key, node_key)


def _ec_key(path: Path, form: serialization.PrivateFormat) -> ec.EllipticCurvePrivateKey:
    """Load the EC P-384 key at `path`, or make and write it there with mode 0600."""
    ssh = form is serialization.PrivateFormat.OpenSSH
    if path.exists():
        content = path.read_bytes()
        loaded = (
            serialization.load_ssh_private_key(content, None)
            if ssh
            else serialization.load_pem_private_key(content, None)
        )
        if not isinstance(loaded, ec.EllipticCurvePrivateKey):
            raise EnrolmentError(f"{path} is not an EC key", fix=f"move {path} away and enrol again")
        return loaded
    key = ec.generate_private_key(ec.SECP384R1())
    write_durably(path, key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    return key


def new_ec_key() -> bytes:
    """A new EC P-384 key, PEM PKCS8."""
    return ec.generate_private_key(ec.SECP384R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _ask(server: str, ca_pem: str, site: str, token: Token, pending: _Pending) -> dict[str, Any]:
    """Send the signing request and return the coordinator's answer."""
    csr_pem = signing_request(pending.tls_key, site, "site")
    signing_key, node_key = pending.signing.public_hex, _ssh_public(pending.node_key).decode("ascii")
    proof = statement(token=token.text, csr_pem=csr_pem, signing_key=signing_key, node_key=node_key)
    body = {
        "site": site,
        "token": token.text,
        "csr_pem": csr_pem,
        "signing_public_key": signing_key,
        "node_public_key": node_key,
        "proofs": {
            "signing": pending.signing.sign(proof),
            "node": pending.node_key.sign(proof, ec.ECDSA(hashes.SHA384())).hex(),
        },
    }
    return GatewayClient.before_enrolment(server, verified_context(ca_pem)).call("POST", "/v1/enroll", body)


def _ssh_public(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)


def _checked(
    answer: dict[str, Any], *, site: str, server: str, ca_pem: str, token: Token, pending: _Pending
) -> Coordinator:
    """Check the coordinator's answer against what was asked; EnrolmentError names what is wrong."""
    fix = "report this to the coordinator's administrator; nothing was changed here"
    issued(answer.get("certificate_pem"), ca_pem=ca_pem, key=pending.tls_key.public_key(), name=site, fix=fix)
    key = str(answer.get("coordinator_key", ""))
    try:
        ed25519_key(key)
    except SignatureError as error:
        raise EnrolmentError(f"the coordinator sent no valid signing key: {error.message}", fix=fix) from None
    fleet_path = str(answer.get("fleet_path", ""))
    if not re.fullmatch(r"/[A-Za-z0-9/_-]{1,100}", fleet_path):
        raise EnrolmentError(f"the coordinator sent the fleet path {fleet_path!r}", fix=fix)
    ours = pending.signing.public_hex
    return Coordinator(site, server, fleet_path, key, token.ca_sha256, int(time.time()), signing_key=ours)


def _put_in_place(home: SiteHome, pending: _Pending, ca_pem: str, certificate_pem: str, pinned: Coordinator) -> None:
    """Move the keys into place and write `coordinator.json` last."""
    if home.client_key.exists():
        replaced = home.tls / "replaced" / f"{int(time.time())}-{secrets.token_hex(3)}"
        replaced.mkdir(parents=True, mode=0o700)
        for path in (home.client_key, home.client_certificate, home.ca):
            if path.exists():
                path.rename(replaced / path.name)
    for source, target in (
        (pending.directory / "signing.pem", home.signing_key),
        (pending.directory / "node_key", home.node_key),
        (pending.directory / "client.key", home.client_key),
    ):
        if source.exists():
            source.rename(target)
            sync_directory(target.parent)
    write_durably(home.node_key.with_suffix(".pub"), _ssh_public(pending.node_key) + b"\n")
    write_durably(home.ca, ca_pem.encode("ascii"))
    write_durably(home.client_certificate, certificate_pem.encode("ascii"))
    if not home.fingerprint_key.exists():
        write_durably(home.fingerprint_key, secrets.token_hex(32).encode("ascii"))
    pinned.save(home)
    shutil.rmtree(pending.directory)


@dataclass(frozen=True)
class OwnFingerprints:
    """What the coordinator's administrator sees of this site."""

    signing_key: str
    certificate: str


def own_fingerprints(home: SiteHome) -> OwnFingerprints:
    """The site's public signing key (hex) and its certificate's SHA-256 (hex), as they lie in its home."""
    certificate = x509.load_pem_x509_certificate(home.client_certificate.read_bytes())
    return OwnFingerprints(SigningKey.load(home.signing_key).public_hex, fingerprint(certificate))
