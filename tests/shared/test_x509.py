"""What a site checks of a certificate that was issued to it."""

from __future__ import annotations

import datetime as dt

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fl_shared.errors import EnrolmentError
from fl_shared.identity.x509 import issued, signing_request, subject

AUTHORITY, OTHER, KEY = (ec.generate_private_key(ec.SECP384R1()) for _ in range(3))


def certificate(
    key: ec.EllipticCurvePrivateKey,
    name: str,
    signer: ec.EllipticCurvePrivateKey = AUTHORITY,
    days: float = 1.0,
    issuer: str = "CA",
) -> str:
    """One of `signer` for `key`, PEM, valid until `days` from now."""
    now = dt.datetime.now(dt.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(subject(name, "" if key is signer else "site"))
        .issuer_name(subject(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=9))
        .not_valid_after(now + dt.timedelta(days=days))
        .sign(signer, hashes.SHA384())
    )
    return built.public_bytes(serialization.Encoding.PEM).decode("ascii")


CA = certificate(AUTHORITY, "CA")


def check(pem: object) -> x509.Certificate:
    return issued(pem, ca_pem=CA, key=KEY.public_key(), name="hospital-001", fix="report it")


def test_the_one_that_was_asked_for_is_accepted() -> None:
    """And the request that asks for it is signed by its key, for its subject."""
    assert check(certificate(KEY, "hospital-001")).subject == subject("hospital-001", "site")
    request = x509.load_pem_x509_csr(signing_request(KEY, "hospital-001", "site").encode())
    assert request.is_signature_valid
    assert request.public_key() == KEY.public_key()
    assert request.subject.rfc4514_string() == "CN=hospital-001,OU=site,O=concordat"


@pytest.mark.parametrize(
    ("pem", "says"),
    [
        (None, "not valid"),
        (["x"], "not valid"),
        ("nonsense", "not valid"),
        (certificate(KEY, "hospital-001", OTHER), "not valid"),
        (certificate(KEY, "hospital-001", issuer="another CA"), "not valid"),
        (certificate(OTHER, "hospital-001"), "another key"),
        (certificate(KEY, "hospital-002"), "hospital-002"),
        (certificate(KEY, "hospital-001", days=-1.0), "expired"),
    ],
)
def test_every_other_one_is_refused(pem: object, says: str) -> None:
    """By the same function at enrolment and at renewal, with the caller's next step."""
    with pytest.raises(EnrolmentError, match=says) as caught:
        check(pem)
    assert "report it" in caught.value.fix
