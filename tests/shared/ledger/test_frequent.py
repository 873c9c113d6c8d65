"""The fast comparison of a typed row with its signed body, which `verify` falls back from."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fl_shared.canonical import canonical_bytes
from fl_shared.ledger.shard import _COLUMNS, EVENT_FIELDS, _Frequent

TEXTS = {"dataset", "study", "kind", "neighbouring", "run", "purpose", "outcome", "reason", "release_digest"}


def _body(kind: str) -> dict[str, Any]:
    return {name: "plain-1" if name in TEXTS else 7 for name in _COLUMNS[kind]}


@pytest.mark.parametrize("kind", EVENT_FIELDS)
def test_a_row_is_its_canonical_body_and_no_other(kind: str) -> None:
    """The row in canonical JSON fits; any other value, and text that JSON would escape, does not."""
    frequent, body = _Frequent(kind), _body(kind)
    text = canonical_bytes(body).decode()
    assert frequent.is_body(tuple(body.values()), text)
    for name in body:
        changed = body | {name: "plain-2" if name in TEXTS else 8}
        assert not frequent.is_body(tuple(changed.values()), text)
        odd = body | {name: 'a"b' if name in TEXTS else "7"}
        assert not frequent.is_body(tuple(odd.values()), text)


@pytest.mark.parametrize("kind", EVENT_FIELDS)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, "7", b"7", None])
def test_what_is_no_json_number_never_fits(kind: str, value: object) -> None:
    """A site that signs such a body, in Python's spelling or JSON's neighbours, gets the full check instead."""
    frequent, body = _Frequent(kind), _body(kind)
    for name in set(body) - TEXTS:
        row = body | {name: value}
        text = canonical_bytes(body).decode().replace(f'"{name}":7', f'"{name}":{value!r}')
        assert not frequent.is_body(tuple(row.values()), text)
