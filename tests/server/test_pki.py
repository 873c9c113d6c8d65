"""The certificate authority: what it signs, what it refuses, what a handshake makes of it."""

from __future__ import annotations

import datetime as dt
import ssl
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fl_server.identity.authority import Authority, identity
from fl_shared.errors import EnrolmentError
from fl_shared.identity.x509 import fingerprint


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """A fresh CA in its own folder."""
    return Authority.create(tmp_path / "ca.key", tmp_path / "ca.pem")


def _request(
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey,
    *,
    name: str = "ignored",
    unit: str = "admin",
) -> str:
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "concordat"),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit),
            x509.NameAttribute(NameOID.COMMON_NAME, name),
        ]
    )
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(subject)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, algorithm)
    )
    return request.public_bytes(serialization.Encoding.PEM).decode()


def test_what_a_request_asks_for_is_ignored_but_for_its_key(authority: Authority) -> None:
    """A request for an admin CA certificate yields a site's client certificate for the same key."""
    key = ec.generate_private_key(ec.SECP384R1())
    signed = authority.sign_request(_request(key, name="root", unit="admin"), "site", "hospital-001", 30)
    who = identity(signed.public_bytes(serialization.Encoding.DER))
    assert (who.role, who.name) == ("site", "hospital-001")
    assert who.fingerprint == fingerprint(signed)
    assert signed.public_key() == key.public_key()
    basic = signed.extensions.get_extension_for_class(x509.BasicConstraints)
    assert basic.critical
    assert not basic.value.ca
    usage = signed.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    left = signed.not_valid_after_utc - dt.datetime.now(dt.UTC)
    assert dt.timedelta(days=29) < left <= dt.timedelta(days=30)


@pytest.mark.parametrize("made", ["rsa", "ed25519", "p521"])
def test_keys_of_other_kinds_are_refused(authority: Authority, made: str) -> None:
    """Only EC P-256 and P-384 keys are certified."""
    key: rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey
    if made == "rsa":
        key = rsa.generate_private_key(65537, 2048)
    elif made == "ed25519":
        key = ed25519.Ed25519PrivateKey.generate()
    else:
        key = ec.generate_private_key(ec.SECP521R1())
    with pytest.raises(EnrolmentError, match="EC P-256 or P-384"):
        authority.sign_request(_request(key), "site", "hospital-001", 30)


def test_a_request_for_a_key_that_one_does_not_hold_is_refused(authority: Authority) -> None:
    """A request whose public key was exchanged after signing is not certified."""
    own, other = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    form = serialization.PublicFormat.UncompressedPoint
    points = [k.public_key().public_bytes(serialization.Encoding.X962, form) for k in (own, other)]
    der = x509.load_pem_x509_csr(_request(own).encode()).public_bytes(serialization.Encoding.DER)
    assert points[0] in der
    forged = x509.load_der_x509_csr(der.replace(points[0], points[1]))
    pem = forged.public_bytes(serialization.Encoding.PEM).decode()
    with pytest.raises(EnrolmentError, match="not signed by its own key"):
        authority.sign_request(pem, "site", "hospital-001", 30)


@pytest.mark.parametrize("text", ["", "-----BEGIN CERTIFICATE REQUEST-----", "\N{SNOWMAN}", "MII" * 100])
def test_what_is_no_request_is_refused(authority: Authority, text: str) -> None:
    """Text that is no PEM request gives an error with its fix, whatever it is."""
    with pytest.raises(EnrolmentError) as caught:
        authority.sign_request(text, "site", "hospital-001", 30)
    assert caught.value.code == "bad-csr"
    assert "fl-client enroll" in caught.value.fix


def test_a_certificate_does_not_outlive_its_ca(authority: Authority) -> None:
    """A validity beyond the CA's own end is cut there."""
    key = ec.generate_private_key(ec.SECP256R1())
    signed = authority.sign_request(_request(key), "site", "hospital-001", 100 * 365)
    assert signed.not_valid_after_utc == authority.certificate.not_valid_after_utc


def test_keys_lie_where_only_their_owner_can_read(authority: Authority, tmp_path: Path) -> None:
    """Private keys have mode 0600; certificates may be read."""
    authority.issue_server(tmp_path / "server.key", tmp_path / "server.pem", "fl.example.org", 10)
    authority.issue_client(tmp_path / "admin.key", tmp_path / "admin.pem", "admin", "first", 10)
    for name in ("ca.key", "server.key", "admin.key"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    assert not stat.S_IMODE((tmp_path / "server.pem").stat().st_mode) & 0o133  # as the umask says


def test_a_key_and_certificate_of_different_cas_do_not_load(authority: Authority, tmp_path: Path) -> None:
    """Files that do not belong together are refused with the way to repair them."""
    Authority.create(tmp_path / "b" / "ca.key", tmp_path / "b" / "ca.pem")
    assert Authority.load(tmp_path / "ca.key", tmp_path / "ca.pem").sha256 == authority.sha256
    with pytest.raises(EnrolmentError, match="do not fit"):
        Authority.load(tmp_path / "ca.key", tmp_path / "b" / "ca.pem")


def _shake(server: ssl.SSLContext, client: ssl.SSLContext, host: str) -> bytes | None:
    """A TLS handshake in memory; the client's certificate as the server saw it."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    near = client.wrap_bio(to_client, to_server, server_hostname=host)
    far = server.wrap_bio(to_server, to_client, server_side=True)
    waiting = [near, far]
    for _ in range(20):
        for side in list(waiting):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            waiting.remove(side)
    assert not waiting
    return far.getpeercert(binary_form=True)


@pytest.mark.parametrize("host", ["fl.example.org", "localhost", "127.0.0.1"])
def test_server_and_client_certificates_make_mutual_tls(authority: Authority, tmp_path: Path, host: str) -> None:
    """Every name in the server's certificate verifies, and the client arrives with role and name."""
    authority.issue_server(tmp_path / "server.key", tmp_path / "server.pem", "fl.example.org", 10)
    authority.issue_client(tmp_path / "admin.key", tmp_path / "admin.pem", "admin", "first", 10)
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(tmp_path / "ca.pem"))
    server.verify_mode = ssl.CERT_REQUIRED
    server.minimum_version = ssl.TLSVersion.TLSv1_3
    server.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")
    client = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    client.load_cert_chain(tmp_path / "admin.pem", tmp_path / "admin.key")
    der = _shake(server, client, host)
    assert der is not None
    assert identity(der).role == "admin"
    with pytest.raises(ssl.SSLCertVerificationError):
        _shake(server, client, "other.example.org")


def test_the_server_certificate_is_no_client_certificate(authority: Authority, tmp_path: Path) -> None:
    """A stolen server key opens no client's door: neither in TLS nor by its subject."""
    authority.issue_server(tmp_path / "server.key", tmp_path / "server.pem", "localhost", 10)
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(tmp_path / "ca.pem"))
    server.verify_mode = ssl.CERT_REQUIRED
    server.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")
    client = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    client.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")
    with pytest.raises(ssl.SSLError):
        _shake(server, client, "localhost")
    certificate = x509.load_pem_x509_certificate((tmp_path / "server.pem").read_bytes())
    with pytest.raises(EnrolmentError, match="another subject"):
        identity(certificate.public_bytes(serialization.Encoding.DER))


def test_an_unknown_role_is_no_identity(authority: Authority) -> None:
    """A subject that our own CA signed but that has no role of ours is refused."""
    key = ec.generate_private_key(ec.SECP256R1())
    signed = authority.sign_request(_request(key), "operator", "somebody", 1)
    with pytest.raises(EnrolmentError, match="'operator'"):
        identity(signed.public_bytes(serialization.Encoding.DER))
    with pytest.raises(EnrolmentError, match="cannot be read"):
        identity(b"no certificate")
