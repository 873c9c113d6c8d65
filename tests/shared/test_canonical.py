"""`fl_shared.canonical`: one document, one sequence of bytes."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fl_shared.canonical import MAX_DEPTH, canonical_bytes, file_sha256, parse_json, sha256_hex
from fl_shared.errors import ConfigError

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT
)
DOCUMENTS = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner), max_leaves=20)


def exactly(left: Any, right: Any) -> bool:
    """Equal in value and type, all the way down (1, 1.0 and true differ; so do 0.0 and -0.0)."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(exactly(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(exactly, left, right))
    return repr(left) == repr(right)


@given(DOCUMENTS)
def test_canonical_bytes_read_back_to_the_same_document(document: Any) -> None:
    """Parsing canonical bytes gives the document, type for type, and encodes to the same bytes again."""
    data = canonical_bytes(document)
    back = parse_json(data, "document")
    assert exactly(back, document)
    assert canonical_bytes(back) == data


@given(DOCUMENTS, DOCUMENTS)
def test_different_documents_have_different_bytes(left: Any, right: Any) -> None:
    """No two different documents share their bytes."""
    assert (canonical_bytes(left) == canonical_bytes(right)) == exactly(left, right)


@given(st.dictionaries(TEXT, SCALARS, min_size=2))
def test_the_order_of_keys_does_not_matter(table: dict[str, Any]) -> None:
    """A table built in another order has the same bytes."""
    assert canonical_bytes(dict(reversed(table.items()))) == canonical_bytes(table)


def test_the_form_is_fixed() -> None:
    """The bytes of a known document never change: signatures of years ago must still verify."""
    document = {"b": [1, 1.0, -0.0, 1e-7, 1e16], "a": None, "é": '\u2028"\\\n', "c": {"y": True, "x": False}}
    expected = ('{"a":null,"b":[1,1.0,-0.0,1e-07,1e+16],"c":{"x":false,"y":true},"é":"\u2028\\"\\\\\\n"}').encode()
    assert canonical_bytes(document) == expected


def nested(levels: int) -> Any:
    document: Any = 0
    for _ in range(levels):
        document = [document]
    return document


@pytest.mark.parametrize(
    "bad",
    [
        math.nan,
        math.inf,
        -math.inf,
        b"bytes",
        {1: "x"},
        {None: 1},
        {"a": {"b": [1, {"c": math.nan}]}},
        2**64,
        -(2**63) - 1,
        10**5000,
        "\ud800",
        {"\udfff": 1},
        {1, 2},
        object(),
        nested(MAX_DEPTH + 1),
        nested(100_000),
    ],
    ids=lambda bad: type(bad).__name__,
)
def test_what_json_cannot_carry_is_refused(bad: Any) -> None:
    """A value that another reader could see differently is refused with a fix."""
    with pytest.raises(ConfigError) as caught:
        canonical_bytes(bad)
    assert caught.value.fix


def test_the_refusal_names_the_place() -> None:
    """The error names where in the document the value stands."""
    with pytest.raises(ConfigError, match=r"document\.a\.b\[1\]\.c: nan"):
        canonical_bytes({"a": {"b": [1, {"c": math.nan}]}})


@pytest.mark.parametrize(
    "text",
    ['{"a":1,"a":2}', '{"a":{"b":1,"b":1}}', "NaN", '{"a":-Infinity}', "[" * 100_000, "9" * 5000, "", "{", b"\xff"],
    ids=str,
)
def test_parse_json_refuses_what_readers_could_disagree_on(text: str | bytes) -> None:
    """Doubled keys, NaN, bottomless nesting, endless numbers and broken text are refused, naming the document."""
    with pytest.raises(ConfigError, match="the manifest is not JSON"):
        parse_json(text, "the manifest")


def test_parse_json_has_a_limit() -> None:
    """A document over the limit is refused before it is parsed."""
    assert parse_json('"12345678"', "x", limit=10) == "12345678"
    with pytest.raises(ConfigError, match="longer than 9 bytes"):
        parse_json('"12345678"', "x", limit=9)


@given(st.binary(max_size=3000))
def test_parse_json_never_raises_anything_else(data: bytes) -> None:
    """Any bytes parse or give a ConfigError."""
    try:
        parse_json(data, "x")
    except ConfigError:
        return
    json.loads(data)


def test_digests_are_sha256(tmp_path: Path) -> None:
    """Both digests agree with hashlib, also for a file larger than one read."""
    data = bytes(range(256)) * 4096
    path = tmp_path / "file"
    path.write_bytes(data)
    assert sha256_hex(data) == file_sha256(path) == hashlib.sha256(data).hexdigest()
    # FIPS 180-2, appendix B.1
    assert sha256_hex(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
