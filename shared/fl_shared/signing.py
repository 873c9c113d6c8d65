"""Ed25519 signatures (RFC 8032, through `cryptography`) over canonical bytes."""

from __future__ import annotations

import hmac
import os
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fl_shared.canonical import canonical_bytes
from fl_shared.errors import SignatureError


class SigningKey:
    """An Ed25519 private key."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key

    @classmethod
    def generate(cls) -> SigningKey:
        """A new key from the operating system's random source."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: Path) -> SigningKey:
        """Read a PEM file.

        Raises:
            SignatureError: missing, unreadable, of another kind, or readable by others than its owner.
        """
        try:
            if os.stat(path).st_mode & 0o077:
                raise SignatureError(f"{path} can be read by others", fix=f"chmod 600 {path}")
            key = serialization.load_pem_private_key(path.read_bytes(), password=None)
        except OSError as error:
            raise SignatureError(
                f"{path}: {error.strerror}", fix="enrol the site, or restore the key"
            ) from error
        except ValueError as error:
            raise SignatureError(
                f"{path} holds no private key", fix="restore the key from its backup"
            ) from error
        if not isinstance(key, Ed25519PrivateKey):
            raise SignatureError(f"{path} holds no Ed25519 key", fix="restore the key from its backup")
        return cls(key)

    def save(self, path: Path) -> None:
        """Write the key as PEM with mode 0600; an existing file is never overwritten (FileExistsError)."""
        pem = self._key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as sink:
            sink.write(pem)
            sink.flush()
            os.fsync(sink.fileno())

    @property
    def public_hex(self) -> str:
        """The public key, 64 hex digits."""
        return (
            self._key.public_key()
            .public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
            .hex()
        )

    def sign(self, payload: bytes) -> str:
        """The signature, 128 hex digits."""
        return self._key.sign(payload).hex()


def verify(public_hex: str, payload: bytes, signature_hex: str) -> None:
    """Check a signature; SignatureError when it does not fit or a part is malformed."""
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_hex))
        key.verify(bytes.fromhex(signature_hex), payload)
    except (ValueError, InvalidSignature) as error:
        raise SignatureError(
            f"the signature by key {public_hex[:16]}… does not fit",
            fix="compare the key's fingerprint with the signer by telephone",
        ) from error


def sign_document(key: SigningKey, body: dict[str, Any]) -> dict[str, Any]:
    """`{"body", "key", "signature"}`: the body with a signature over its canonical bytes."""
    return {"body": body, "key": key.public_hex, "signature": key.sign(canonical_bytes(body))}


def open_document(document: Any, expected_key_hex: str) -> dict[str, Any]:
    """The body of a signed document, after its key and signature were checked.

    Raises:
        SignatureError: not of the form of `sign_document`, another key, or a signature that does not fit.
    """
    if not isinstance(document, dict) or set(document) != {"body", "key", "signature"}:
        raise SignatureError("not a signed document", fix="expected the fields body, key and signature")
    body, key, signature = document["body"], document["key"], document["signature"]
    if not isinstance(body, dict) or not isinstance(key, str) or not isinstance(signature, str):
        raise SignatureError("not a signed document", fix="body is an object, key and signature are text")
    if not hmac.compare_digest(key.encode(), expected_key_hex.encode()):
        raise SignatureError(
            f"signed by key {key[:16]}…, expected {expected_key_hex[:16]}…",
            fix="compare the key's fingerprint with the signer by telephone",
        )
    verify(key, canonical_bytes(body), signature)
    return body
