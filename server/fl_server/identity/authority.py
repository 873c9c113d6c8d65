"""The coordinator's certificate authority: one EC key, three roles (site, admin, auditor), one server.

The role is in the subject: `O=concordat, OU=<role>, CN=<id>`. What a request asks for is ignored
but for its public key: the coordinator writes subject, validity and usages itself.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fl_shared.errors import EnrolmentError
from fl_shared.files import write_durably
from fl_shared.identity.x509 import ORGANISATION, ROLES, fingerprint, subject

MAX_CSR_BYTES = 16 << 10
_CA_DAYS = 3650
_BACKDATE = dt.timedelta(minutes=5)  # clocks of institutions differ a little


@dataclass(frozen=True)
class Identity:
    """Who a certificate speaks for."""

    role: str
    name: str
    fingerprint: str
    expires_at: float


def identity(der: bytes) -> Identity:
    """Read role and name from a certificate that TLS has already verified; EnrolmentError otherwise."""
    try:
        certificate = x509.load_der_x509_certificate(der)
        name = certificate.subject  # read only now, and may be no name after all
    except (ValueError, x509.InvalidVersion) as error:
        raise EnrolmentError("the client certificate cannot be read", fix="enrol again") from error
    values = {}
    for oid in (NameOID.ORGANIZATION_NAME, NameOID.ORGANIZATIONAL_UNIT_NAME, NameOID.COMMON_NAME):
        attributes = name.get_attributes_for_oid(oid)
        if len(attributes) != 1:
            raise EnrolmentError("the client certificate has another subject", fix="enrol again")
        values[oid] = str(attributes[0].value)
    role = values[NameOID.ORGANIZATIONAL_UNIT_NAME]
    if values[NameOID.ORGANIZATION_NAME] != ORGANISATION or role not in ROLES:
        raise EnrolmentError(f"the client certificate has the role {role!r}", fix="enrol again")
    return Identity(
        role=role,
        name=values[NameOID.COMMON_NAME],
        fingerprint=fingerprint(certificate),
        expires_at=certificate.not_valid_after_utc.timestamp(),
    )


def _pem_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


class Authority:
    """The CA: its key never leaves `tls/ca.key`."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        self._key = key
        self.certificate = certificate

    @classmethod
    def create(cls, key_file: Path, certificate_file: Path) -> Authority:
        """Make a new CA (EC P-384, ten years) and write both files."""
        key = ec.generate_private_key(ec.SECP384R1())
        name = subject("concordat coordinator CA")
        now = dt.datetime.now(dt.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _BACKDATE)
            .not_valid_after(now + dt.timedelta(days=_CA_DAYS))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(ca=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA384())
        )
        write_durably(key_file, _pem_key(key))
        write_durably(certificate_file, _pem(certificate), mode=0o644)
        return cls(key, certificate)

    @classmethod
    def load(cls, key_file: Path, certificate_file: Path) -> Authority:
        """Read the CA's two files; EnrolmentError when they do not fit."""
        try:
            key = serialization.load_pem_private_key(key_file.read_bytes(), None)
            certificate = x509.load_pem_x509_certificate(certificate_file.read_bytes())
        except (OSError, ValueError) as error:
            raise EnrolmentError(f"the CA cannot be read: {error}", fix="restore tls/ from the backup") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise EnrolmentError("tls/ca.key and tls/ca.pem do not fit", fix="restore tls/ from the backup")
        return cls(key, certificate)

    @property
    def pem(self) -> str:
        """The CA certificate, PEM."""
        return _pem(self.certificate).decode("ascii")

    @property
    def sha256(self) -> str:
        """SHA-256 of the CA certificate's DER form, 64 hex digits: what an invitation carries."""
        return fingerprint(self.certificate)

    def _issue(
        self,
        public_key: ec.EllipticCurvePublicKey,
        name: x509.Name,
        days: float,
        *,
        usage: x509.ObjectIdentifier,
        hosts: tuple[str, ...] = (),
    ) -> x509.Certificate:
        now = dt.datetime.now(dt.UTC)
        ca_identifier = self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self.certificate.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _BACKDATE)
            .not_valid_after(min(now + dt.timedelta(days=days), self.certificate.not_valid_after_utc))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(ca=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ca_identifier), critical=False
            )
        )
        if hosts:
            builder = builder.add_extension(
                x509.SubjectAlternativeName([_general_name(host) for host in hosts]), critical=False
            )
        return builder.sign(self._key, hashes.SHA384())

    def issue_server(self, key_file: Path, certificate_file: Path, host: str, days: float) -> None:
        """Make a server key and a certificate for `host`, localhost and 127.0.0.1."""
        key = ec.generate_private_key(ec.SECP256R1())
        hosts = tuple(dict.fromkeys([host, "localhost", "127.0.0.1"]))
        name = subject(host[:64])
        certificate = self._issue(key.public_key(), name, days, usage=ExtendedKeyUsageOID.SERVER_AUTH, hosts=hosts)
        write_durably(key_file, _pem_key(key))
        write_durably(certificate_file, _pem(certificate), mode=0o644)

    def issue_client(
        self, key_file: Path, certificate_file: Path, role: str, name: str, days: float
    ) -> x509.Certificate:
        """Make a key and a client certificate here (admins, auditors; sites make their keys themselves)."""
        key = ec.generate_private_key(ec.SECP384R1())
        certificate = self._issue(key.public_key(), subject(name, role), days, usage=ExtendedKeyUsageOID.CLIENT_AUTH)
        write_durably(key_file, _pem_key(key))
        write_durably(certificate_file, _pem(certificate), mode=0o644)
        return certificate

    def sign_request(self, csr_pem: str, role: str, name: str, days: float) -> x509.Certificate:
        """Certify a key that its owner made. Subject and usages are ours; the request proves possession of the key.

        Raises:
            EnrolmentError: not a request, a bad self-signature, or a key other than EC P-256/P-384.
        """
        fix = "enrol with `fl-client enroll`, which makes the right request"
        try:
            if len(csr_pem) > MAX_CSR_BYTES:
                raise ValueError("too long")
            request = x509.load_pem_x509_csr(csr_pem.encode("ascii"))
            key = request.public_key()
            # Its kind first: to check the signature of a giant RSA key is work that a stranger could order.
            usable = isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in ("secp256r1", "secp384r1")
            proven = usable and request.is_signature_valid
        except (ValueError, InvalidSignature, UnsupportedAlgorithm, x509.InvalidVersion) as error:
            raise EnrolmentError("the certificate request cannot be read", fix=fix, code="bad-csr") from error
        if not usable or not isinstance(key, ec.EllipticCurvePublicKey):
            raise EnrolmentError("the certificate request's key is not EC P-256 or P-384", fix=fix, code="bad-csr")
        if not proven:
            raise EnrolmentError("the certificate request is not signed by its own key", fix=fix, code="bad-csr")
        return self._issue(key, subject(name, role), days, usage=ExtendedKeyUsageOID.CLIENT_AUTH)


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )
