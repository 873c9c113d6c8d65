"""Ed25519 signatures (RFC 8032, through `cryptography`) over canonical bytes."""

from __future__ import annotations

import functools
import os
import re
import secrets
import shlex
import stat
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fl_shared.canonical import canonical_bytes
from fl_shared.errors import ConfigError, SignatureError
from fl_shared.files import sync_directory

_KEY = re.compile(r"[0-9a-f]{64}")
_SIGNATURE = re.compile(r"[0-9a-f]{128}")
_MAX_PEM_BYTES = 1 << 16
_P = 2**255 - 19
# The y of every point whose order divides 8 (RFC 8032, 5.1: 0, 1, -1, and the two of order 8): under such a "key"
# anybody can make signatures that fit, some of them for every message.
_Y8 = int.from_bytes(bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"), "little")
_SMALL_ORDER = frozenset({0, 1, _P - 1, _Y8, _P - _Y8})


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
            with path.open("rb") as source:
                mode = os.fstat(source.fileno()).st_mode
                pem = source.read(_MAX_PEM_BYTES)
        except OSError as error:
            raise SignatureError(f"{path}: {error.strerror}", fix="enrol the site, or restore the key") from error
        if stat.S_IMODE(mode) & 0o077:
            raise SignatureError(f"{path} can be read by others", fix=f"chmod 600 {shlex.quote(str(path))}")
        try:
            key = serialization.load_pem_private_key(pem, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError: it wants a password
            raise SignatureError(
                f"{path} holds no unencrypted private key", fix="restore the key from its backup"
            ) from error
        if not isinstance(key, Ed25519PrivateKey):
            raise SignatureError(f"{path} holds no Ed25519 key", fix="restore the key from its backup")
        return cls(key)

    def save(self, path: Path) -> None:
        """Write the key as PEM with mode 0600, whole or not at all.

        Raises:
            FileExistsError: an existing file is never overwritten.
        """
        pem = self._key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fresh = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as sink:
                sink.write(pem)
                sink.flush()
                os.fsync(sink.fileno())
            os.link(fresh, path)  # unlike a rename, this fails when the name is taken
        finally:
            fresh.unlink(missing_ok=True)
        sync_directory(path.parent)

    @property
    def public_hex(self) -> str:
        """The public key, 64 hex digits."""
        return self._key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw).hex()

    def sign(self, payload: bytes) -> str:
        """The signature, 128 hex digits."""
        return self._key.sign(payload).hex()


@functools.lru_cache(maxsize=1024)
def ed25519_key(public_hex: str) -> Ed25519PublicKey:
    """The key that 64 hex digits encode: every key that comes from elsewhere enters here.

    Raises:
        SignatureError: not 64 lower-case hex digits, not the one encoding of a point, or a point of small order.
    """
    fix = "use the key as its owner shows it; `fl-client enroll` and `fl-server init` make keys that are fit"
    if not isinstance(public_hex, str) or _KEY.fullmatch(public_hex) is None:
        raise SignatureError("a public key is malformed", fix="expected 64 lower-case hex digits")
    raw = bytes.fromhex(public_hex)
    y = int.from_bytes(raw, "little") & ~(1 << 255)
    # Edwards25519: x^2 = (y^2 - 1) / (d y^2 + 1); a square exactly when numerator times denominator is one.
    d = -121665 * pow(121666, -1, _P)
    x2 = (y * y - 1) * (d * y * y + 1) % _P
    if y >= _P or y in _SMALL_ORDER or pow(x2, (_P - 1) // 2, _P) != 1:
        raise SignatureError(f"{public_hex[:16]}… is no public key that can be relied on", fix=fix)
    return Ed25519PublicKey.from_public_bytes(raw)


def verify(public_hex: str, payload: bytes, signature_hex: str) -> None:
    """Check a signature; SignatureError when it does not fit or a part is malformed."""
    # bytes.fromhex also takes capitals and spaces: one signature would have many spellings.
    if _KEY.fullmatch(public_hex) is None or _SIGNATURE.fullmatch(signature_hex) is None:
        raise SignatureError("a key or signature is malformed", fix="expected 64 and 128 lower-case hex digits")
    key = ed25519_key(public_hex)
    try:
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
    if key != expected_key_hex:
        raise SignatureError(
            f"signed by key {key[:16]!r}…, expected {expected_key_hex[:16]}…",
            fix="compare the key's fingerprint with the signer by telephone",
        )
    try:
        payload = canonical_bytes(body)
    except ConfigError as error:
        raise SignatureError(f"nobody can have signed this: {error.message}", fix=error.fix) from error
    verify(key, payload, signature)
    return body
