"""The invitation token has one form, and coordinator and site read it alike."""

from __future__ import annotations

import hashlib

import pytest

from fl_shared.errors import EnrolmentError
from fl_shared.identity.token import Token

CA = "a" * 64
SECRET = "x" * 32


@pytest.mark.parametrize("site", ["h", "hospital-001", "a" * 63])
def test_what_is_issued_is_read_as_it_was(site: str) -> None:
    """For every length that a site's name may have."""
    token = Token.new(site, CA)
    assert Token.parse(token.text) == token
    assert token.secret_sha256 == hashlib.sha256(token.secret.encode()).digest()


def test_a_secret_has_192_random_bits_and_is_not_shown() -> None:
    """Two of a million tokens are alike with probability below 2^-152."""
    tokens = [Token.new("h", CA) for _ in range(100)]
    assert len({token.secret for token in tokens}) == 100
    assert all(len(token.secret) == 32 and token.secret not in repr(token) for token in tokens)


@pytest.mark.parametrize(
    "text",
    [
        "",
        f"ct1.h.{SECRET}.{CA}\n",
        f" ct1.h.{SECRET}.{CA}",
        f"ct2.h.{SECRET}.{CA}",
        f"ct1..{SECRET}.{CA}",
        f"ct1.-h.{SECRET}.{CA}",
        f"ct1.h-.{SECRET}.{CA}",
        f"ct1.H.{SECRET}.{CA}",
        f"ct1.{'a' * 64}.{SECRET}.{CA}",
        f"ct1.h.{SECRET[1:]}.{CA}",
        f"ct1.h.{SECRET}x.{CA}",
        f"ct1.h.{SECRET[1:]}=.{CA}",
        f"ct1.h.{SECRET}.{CA.upper()}",
        f"ct1.h.{SECRET}.{CA}a",
        f"ct1.h.{SECRET}." + "\u0661" * 64,
    ],
)
def test_every_other_form_is_refused_without_showing_it(text: str) -> None:
    """One text for one token: no space, no capital, no other length."""
    with pytest.raises(EnrolmentError, match="form") as caught:
        Token.parse(text)
    assert SECRET[1:] not in caught.value.message + caught.value.fix
