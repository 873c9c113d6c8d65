"""What a site signs with the keys that it enrols: whoever names a key must hold it.

The request for a certificate proves the TLS key; the signing key (Ed25519) and Flower's node key (ECDSA with SHA-384)
each sign this statement. It names the one-time token, so that it cannot be used again.
"""

from __future__ import annotations

import hashlib

from fl_shared.canonical import canonical_bytes

PROVED = ("signing", "node")
"""The keys that sign it; the signatures travel as hex, by these names."""


def statement(*, token: str, csr_pem: str, signing_key: str, node_key: str) -> bytes:
    """The bytes to sign; ConfigError for text that is no Unicode."""
    return canonical_bytes(
        {
            "kind": "enrolment",
            "token_sha256": hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest(),
            "csr_pem": csr_pem,
            "signing_public_key": signing_key,
            "node_public_key": node_key,
        }
    )
