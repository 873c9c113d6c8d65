"""The fast comparison of a typed row with its signed body, which `verify` falls back from."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fl_shared.canonical import canonical_bytes
from fl_shared.ledger.stretch import _COLUMNS, EVENT_FIELDS, _Frequent

TEXTS = {"dataset", "study", "kind", "neighbouring", "run", "purpose", "outcome", "reason", "release_digest"}


def _body(kind: str) -> dict[str, Any]:
    return {name: "plain-1" if name in TEXTS else 7 for name in _COLUMNS[kind]}


@pytest.mark.parametrize("kind", EVENT_FIELDS)
def test_a_row_is_its_canonical_body_and_no_other(kind: str) -> None:
    """The row in canonical JSON fits; any other value, and text that JSON would escape, does not."""
    frequent, body = _Frequent(kind), _body(kind)
    text = canonical_bytes(body).decode()
    assert frequent.event(tuple(body.values()), text) == tuple(body[name] for name in EVENT_FIELDS[kind])
    for name in body:
        changed = body | {name: "plain-2" if name in TEXTS else 8}
        assert frequent.event(tuple(changed.values()), text) is None
        odd = body | {name: 'a"b' if name in TEXTS else "7"}
        assert frequent.event(tuple(odd.values()), text) is None


@pytest.mark.parametrize("kind", EVENT_FIELDS)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, "7", b"7", None])
def test_what_is_no_json_number_never_fits(kind: str, value: object) -> None:
    """A site that signs such a body, in Python's spelling or JSON's neighbours, gets the full check instead."""
    frequent, body = _Frequent(kind), _body(kind)
    for name in set(body) - TEXTS:
        row = body | {name: value}
        text = canonical_bytes(body).decode().replace(f'"{name}":7', f'"{name}":{value!r}')
        assert frequent.event(tuple(row.values()), text) is None


@pytest.mark.parametrize("kind", EVENT_FIELDS)
def test_no_text_but_the_whole_body_fits(kind: str) -> None:
    """An empty body, a cut one, one with more behind it, with another spelling or another order, is looked at."""
    frequent, body = _Frequent(kind), _body(kind)
    text, row = canonical_bytes(body).decode(), tuple(body.values())
    others = ["", "{}", "%s", text[:-1], text + " ", text + "{}", f" {text}", text.replace(":", ": "), text * 2]
    others += ["{" + ",".join(reversed(text[1:-1].split(","))) + "}"]
    for _ in range(2):  # the first time nothing is known of such rows, the second time their text is
        assert [frequent.event(row, other) for other in others] == [None] * len(others)
        assert frequent.event(row, text) is not None


@pytest.mark.parametrize("kind", EVENT_FIELDS)
def test_percent_signs_stand_for_themselves(kind: str) -> None:
    """Texts that look like places for values are compared as what they are."""
    for name in set(_COLUMNS[kind]) & TEXTS:
        for value in ("%", "%s", "%d%%", "%(round)s", "{0}"):
            frequent, body = _Frequent(kind), _body(kind) | {name: value}
            assert frequent.event(tuple(body.values()), canonical_bytes(body).decode()) is not None
            assert frequent.event(tuple(body.values()), canonical_bytes(_body(kind)).decode()) is None


@pytest.mark.parametrize("kind", EVENT_FIELDS)
def test_what_is_kept_of_one_row_passes_no_other(kind: str) -> None:
    """After a row was accepted, one that differs in a single column is held against its own body."""
    frequent, body = _Frequent(kind), _body(kind)
    assert frequent.event(tuple(body.values()), canonical_bytes(body).decode())
    for name in body:
        for value in ("plain-2", "", 0, -7, 7.5, True, None, b"plain-1", 1e300):
            other = body | {name: value}
            row = tuple(other.values())
            assert frequent.event(row, canonical_bytes(body).decode()) is None
            said = None if isinstance(value, bytes) else frequent.event(row, canonical_bytes(other).decode())
            assert said in (None, tuple(other[column] for column in EVENT_FIELDS[kind]))
