"""X.509 certificates: their subjects, requests and fingerprints, and the check of one that was issued to us.

A certificate says whose it is by `O=concordat, OU=<role>, CN=<name>`.
"""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fl_shared.errors import EnrolmentError

ROLES = ("site", "admin", "auditor")
ORGANISATION = "concordat"


def subject(name: str, role: str = "") -> x509.Name:
    """`O=concordat, OU=<role>, CN=<name>`; without OU for the coordinator's own certificates."""
    unit = [x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role)] if role else []
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, ORGANISATION),
            *unit,
            x509.NameAttribute(NameOID.COMMON_NAME, name),
        ]
    )


def signing_request(key: ec.EllipticCurvePrivateKey, name: str, role: str) -> str:
    """A request for a certificate of `key`, PEM; its signature proves that who asks holds the key."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject(name, role))
    return builder.sign(key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM).decode("ascii")


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of the certificate's DER form, 64 hex digits."""
    return hashlib.sha256(certificate.public_bytes(serialization.Encoding.DER)).hexdigest()


def has_expired(certificate: x509.Certificate) -> bool:
    """Whether the certificate is no longer valid by this machine's clock."""
    return datetime.now(UTC) >= certificate.not_valid_after_utc


def issued(pem: object, *, ca_pem: str, key: ec.EllipticCurvePublicKey, name: str, fix: str) -> x509.Certificate:
    """The certificate in `pem`, which somebody else made for `key` and `name` at our request.

    Raises:
        EnrolmentError: no certificate, none of this CA, for another key or name, or one that has expired.
    """
    try:
        certificate = x509.load_pem_x509_certificate(str(pem).encode("ascii"))
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(ca_pem.encode("ascii")))
        public_key = certificate.public_key()
        names = [str(attribute.value) for attribute in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        expired = has_expired(certificate)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise EnrolmentError(
            f"the certificate that came back is not valid: {error or type(error).__name__}", fix=fix
        ) from None
    if public_key != key:
        raise EnrolmentError("the certificate that came back is for another key", fix=fix)
    if names != [name]:
        raise EnrolmentError(f"the certificate that came back names {names}, not {name}", fix=fix)
    if expired:
        raise EnrolmentError(
            f"the certificate that came back has expired at {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC",
            fix=f"compare both clocks; {fix}",
        )
    return certificate
