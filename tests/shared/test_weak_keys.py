"""Public keys under which anybody can sign: refused wherever a key enters.

The points are derived here from the curve's equation (RFC 8032, 5.1), not taken from the module under test.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from fl_client.identity.enrolment import Coordinator
from fl_client.identity.rotation import follow
from fl_client.site.home import SiteHome
from fl_shared.audit.source import key_text
from fl_shared.errors import ConcordatError, EnrolmentError, SignatureError
from fl_shared.identity.signing import SigningKey, ed25519_key, open_document, sign_document, verify

P = 2**255 - 19
L = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, P - 2, P) % P
Point = tuple[int, int]


def add(a: Point, b: Point) -> Point:
    """The sum of two points, affine."""
    (x1, y1), (x2, y2) = a, b
    t = D * x1 * x2 * y1 * y2
    return (x1 * y2 + x2 * y1) * pow(1 + t, P - 2, P) % P, (y1 * y2 + x1 * x2) * pow(1 - t, P - 2, P) % P


def times(n: int, point: Point) -> Point:
    """n times a point."""
    result = (0, 1)
    while n:
        if n & 1:
            result = add(result, point)
        point, n = add(point, point), n >> 1
    return result


def root(value: int) -> int | None:
    """A square root modulo P, None when there is none."""
    found = pow(value, (P + 3) // 8, P)
    for each in (found, found * pow(2, (P - 1) // 4, P) % P):
        if each * each % P == value % P:
            return each
    return None


def torsion() -> set[Point]:
    """The eight points of small order: the multiples of one of order 8, which is L times a point of the whole curve."""
    on_curve = ((root((y * y - 1) * pow(D * y * y + 1, P - 2, P) % P), y) for y in itertools.count(2))
    small = (times(L, (x, y)) for x, y in on_curve if x is not None)
    eighth = next(point for point in small if times(4, point) != (0, 1))
    return {times(n, eighth) for n in range(8)}


def encoded(y: int, sign: int) -> str:
    return (y | sign << 255).to_bytes(32, "little").hex()


SMALL = sorted(encoded(y, x & 1) for x, y in torsion())
NOT_CANONICAL = sorted(
    {encoded(y, sign) for y in range(P, 2**255) for sign in (0, 1)} | {encoded(1, 1), encoded(P - 1, 1)}
)
BASE = [0x216936D3CD6E53FEC0A4E231FDD6DC5C692CC7609525A7B2C9562D608F25D51A]  # RFC 8032's x, its y is 4/5


def test_there_are_eight_points_of_small_order() -> None:
    """The derivation is right: eight points, eight times each is the neutral one."""
    assert len(SMALL) == 8
    assert {times(8, point) for point in torsion()} == {(0, 1)}
    assert len(NOT_CANONICAL) == 40


def test_such_a_key_would_let_anybody_sign() -> None:
    """The library itself takes a signature that nobody made: R the neutral point, S zero."""
    forged = bytes([1] + [0] * 63)
    Ed25519PublicKey.from_public_bytes(bytes([1] + [0] * 31)).verify(forged, b"whatever")
    with pytest.raises(SignatureError):
        verify(bytes([1] + [0] * 31).hex(), b"whatever", forged.hex())


@pytest.mark.parametrize("key", SMALL + NOT_CANONICAL + [encoded(2, 0), "", "0", "g" * 64, "0" * 63, "0" * 65])
def test_a_key_that_proves_nothing_is_refused_wherever_keys_enter(key: str, tmp_path: Path) -> None:
    """The check itself, signatures, documents, the site's pin, a rotation, an auditor's option."""
    with pytest.raises(SignatureError):
        ed25519_key(key)
    with pytest.raises(SignatureError):
        verify(key, b"x", "01" + "00" * 63)
    with pytest.raises(SignatureError):
        open_document({"body": {}, "key": key, "signature": "01" + "00" * 63}, key)
    with pytest.raises(ConcordatError):
        key_text(key)
    old = SigningKey.generate()
    pinned = Coordinator("s", "https://c:1", "/v1/fleet", old.public_hex, "0" * 64, 0)
    now = time.time()
    change = {"kind": "coordinator-key", "new_key": key, "created_at": now, "old_until": now}
    with pytest.raises(EnrolmentError, match="not valid"):
        follow(pinned, [sign_document(old, change)], now)
    home = SiteHome(tmp_path)
    (tmp_path / "coordinator.json").write_text(json.dumps(dataclasses.asdict(pinned) | {"coordinator_key": key}))
    with pytest.raises(EnrolmentError):
        Coordinator.load(home)


@given(st.binary(min_size=32, max_size=32))
def test_any_32_bytes_are_a_usable_key_or_refused(raw: bytes) -> None:
    """Half of all encodings are points; whatever is taken is one, in its only form."""
    try:
        ed25519_key(raw.hex())
    except SignatureError:
        return
    y = int.from_bytes(raw, "little") & ~(1 << 255)
    assert y < P
    assert root((y * y - 1) * pow(D * y * y + 1, P - 2, P) % P) is not None
    assert raw.hex() not in SMALL


def test_real_keys_are_accepted() -> None:
    """Generated keys, and the base point itself."""
    assert ed25519_key(encoded(4 * pow(5, P - 2, P) % P, BASE[0] & 1))
    for _ in range(50):
        assert ed25519_key(SigningKey.generate().public_hex)
