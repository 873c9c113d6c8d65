"""`fl_shared.identity.signing`: keys on disk, signatures, signed documents."""

from __future__ import annotations

import copy
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from fl_shared.canonical import canonical_bytes
from fl_shared.errors import SignatureError
from fl_shared.identity.signing import SigningKey, open_document, sign_document, verify

KEY = SigningKey.generate()
PEM = serialization.Encoding.PEM
PKCS8 = serialization.PrivateFormat.PKCS8


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    path.chmod(0o600)
    return path


@given(st.binary())
def test_a_signature_verifies_and_any_flipped_bit_does_not(payload: bytes) -> None:
    """What was signed verifies; one changed byte of payload, key or signature does not."""
    signature = KEY.sign(payload)
    verify(KEY.public_hex, payload, signature)
    other = f"{int(signature[0], 16) ^ 1:x}{signature[1:]}"
    for wrong in (
        (KEY.public_hex, payload + b"\0", signature),
        (KEY.public_hex, payload, other),
        (SigningKey.generate().public_hex, payload, signature),
    ):
        with pytest.raises(SignatureError):
            verify(*wrong)


def test_rfc_8032_vector() -> None:
    """Test 2 of RFC 8032, section 7.1, verifies: other Ed25519 programs can check our signatures."""
    verify(
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        b"\x72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
    )


@pytest.mark.parametrize(
    "spell",
    [
        str.upper,
        lambda text: f" {text}",
        lambda text: text + "00",
        lambda text: text[:-2],
        lambda text: "",
        lambda text: "é" * len(text),
        lambda text: text[:-1] + "\n",
    ],
)
def test_one_signature_has_one_spelling(spell: Any) -> None:
    """Capitals, spaces, and too few or too many digits are refused in keys and signatures."""
    signature = KEY.sign(b"x")
    assert signature.upper() != signature
    for key, text in ((spell(KEY.public_hex), signature), (KEY.public_hex, spell(signature))):
        with pytest.raises(SignatureError, match="malformed"):
            verify(key, b"x", text)


def test_a_key_survives_the_disk(tmp_path: Path) -> None:
    """A saved key is mode 0600, loads to the same key, and leaves no other file behind."""
    path = tmp_path / "keys" / "signing.pem"
    umask = os.umask(0)
    try:
        KEY.save(path)
    finally:
        os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert SigningKey.load(path).public_hex == KEY.public_hex
    assert os.listdir(path.parent) == ["signing.pem"]


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    """Saving over an existing file fails and leaves both the file and the folder as they were."""
    path = tmp_path / "signing.pem"
    KEY.save(path)
    with pytest.raises(FileExistsError):
        SigningKey.generate().save(path)
    assert SigningKey.load(path).public_hex == KEY.public_hex
    assert os.listdir(tmp_path) == ["signing.pem"]


def test_a_save_that_is_broken_off_leaves_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk in the middle of a save leaves neither half a key nor a temporary file."""

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        KEY.save(tmp_path / "signing.pem")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o601])
def test_a_key_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    """A key file open to group or others is refused, and the fix is the command."""
    path = tmp_path / "signing.pem"
    KEY.save(path)
    path.chmod(mode)
    with pytest.raises(SignatureError, match="can be read by others") as caught:
        SigningKey.load(path)
    assert caught.value.fix == f"chmod 600 {path}"


def wrong_keys() -> dict[str, bytes]:
    ours = Ed25519PrivateKey.generate()
    return {
        "empty": b"",
        "text": b"not a key",
        "public": ours.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo),
        "encrypted": ours.private_bytes(PEM, PKCS8, serialization.BestAvailableEncryption(b"secret")),
        "another kind": ec.generate_private_key(ec.SECP384R1()).private_bytes(PEM, PKCS8, serialization.NoEncryption()),
        "cut off": ours.private_bytes(PEM, PKCS8, serialization.NoEncryption())[:60],
    }


@pytest.mark.parametrize("name", sorted(wrong_keys()))
def test_what_is_no_key_is_refused(tmp_path: Path, name: str) -> None:
    """A file that is not an unencrypted Ed25519 private key is refused by name, with a fix."""
    path = write(tmp_path / "signing.pem", wrong_keys()[name])
    with pytest.raises(SignatureError, match=str(path)) as caught:
        SigningKey.load(path)
    assert caught.value.fix


def test_a_missing_key_is_refused(tmp_path: Path) -> None:
    """A missing file, or a folder in its place, is a SignatureError that names the path."""
    for path in (tmp_path / "none.pem", tmp_path):
        with pytest.raises(SignatureError, match=str(path)):
            SigningKey.load(path)


BODY = {"kind": "receipt", "round": 3, "epsilon": 1.25, "name": "é"}


def test_a_signed_document_opens_after_a_trip_as_text() -> None:
    """A document that went through JSON text opens to the same body."""
    document = json.loads(json.dumps(sign_document(KEY, BODY)))
    assert open_document(document, KEY.public_hex) == BODY


def tampered() -> dict[str, Any]:
    good = sign_document(KEY, BODY)
    other = SigningKey.generate()
    without = {name: copy.deepcopy(good) for name in ("body", "key", "signature")}
    for name, document in without.items():
        del document[name]
    return {
        "another body": good | {"body": BODY | {"round": 4}},
        "another type": good | {"body": BODY | {"round": 3.0}},
        "a field more": good | {"body": BODY | {"more": None}},
        "another key": sign_document(other, BODY),
        "another key's name": sign_document(other, BODY) | {"key": KEY.public_hex},
        "another signature": good | {"signature": other.sign(canonical_bytes(BODY))},
        "capitals in the signature": good | {"signature": good["signature"].upper()},
        "no text": good | {"signature": 5},
        "a key that is no text": good | {"key": None},
        "a surrogate key": good | {"key": "\ud800"},
        "a list body": good | {"body": [1]},
        "a surrogate body": good | {"body": {"a": "\ud800"}},
        "a NaN body": good | {"body": {"a": float("nan")}},
        "an extra field": good | {"extra": 1},
        "no document": [good],
        "nothing": None,
    } | {f"without {name}": document for name, document in without.items()}


@pytest.mark.parametrize("name", sorted(tampered()))
def test_a_document_that_was_touched_does_not_open(name: str) -> None:
    """Whatever is changed in a signed document, opening it is a SignatureError and nothing else."""
    with pytest.raises(SignatureError) as caught:
        open_document(tampered()[name], KEY.public_hex)
    assert caught.value.fix
