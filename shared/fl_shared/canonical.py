"""Canonical bytes of a document: what is hashed and signed is the same on every machine."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

from fl_shared.errors import ConfigError, shown

MAX_DEPTH = 64
MAX_JSON_BYTES = 8 << 20
DIGEST = r"sha256:[0-9a-f]{64}"
HASH = r"[0-9a-f]{64}"
_WHOLE = range(-(1 << 63), 1 << 64)


def _refuse(value: Any, where: str, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ConfigError(f"the document is nested deeper than {MAX_DEPTH} levels", fix="send a flat document")
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"{where}: {value[:80]!r} is not valid text", fix="send UTF-8") from error
        return
    if isinstance(value, int):
        if value not in _WHOLE:
            raise ConfigError(f"{where}: the number has more than 64 bits", fix="write it as text")
        return
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ConfigError(f"{where}: {value} cannot be signed", fix="use a finite number")
        return
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ConfigError(f"{where}: the key {key!r} is no text", fix="use text keys")
            _refuse(key, where, depth)
            _refuse(item, f"{where}.{key[:80]}", depth + 1)
        return
    if isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _refuse(item, f"{where}[{index}]", depth + 1)
        return
    raise ConfigError(
        f"{where}: {type(value).__name__} cannot be signed",
        fix="use text, whole and finite numbers, true, false, lists and tables; write bytes as hex",
    )


def canonical_bytes(document: Any) -> bytes:
    """UTF-8 JSON with sorted keys and no spaces; floats in Python's shortest round-trip form.

    `1` and `1.0` are different documents: writers convert to float where a field is a float.

    Raises:
        ConfigError: NaN, infinity, whole numbers beyond 64 bits, text that is no Unicode, over 64 levels,
            bytes, or another type that JSON does not carry faithfully.
    """
    _refuse(document, "document", 0)
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key is there twice")
    return table


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def parse_json(text: str | bytes, source: str, *, limit: int = MAX_JSON_BYTES) -> Any:
    """Parse JSON from another party: every reader of the same bytes must see the same document.

    Args:
        text: the document.
        source: how the error calls it, for example `the manifest`.
        limit: the most bytes (or characters) accepted.

    Raises:
        ConfigError: too long, not JSON, a key twice in one table, or NaN and infinity.
    """
    if len(text) > limit:
        raise ConfigError(f"{source} is longer than {limit} bytes", fix="send a smaller document")
    try:
        return json.loads(text, object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source} is not JSON: {error}", fix="send the document whole, as it was signed") from error


def sha256_hex(data: bytes | memoryview) -> str:
    """SHA-256, 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def document_digest(body: dict[str, Any]) -> str:
    """`sha256:` and the SHA-256 of the document's canonical bytes."""
    return f"sha256:{sha256_hex(canonical_bytes(body))}"


def check_digest(value: object) -> str:
    """A text of the form `sha256:<64 hex digits>`; ConfigError otherwise."""
    if not isinstance(value, str) or re.fullmatch(DIGEST, value) is None:
        raise ConfigError(
            f"{shown(value)} is not a digest", fix="write sha256: and 64 hex digits, as `fl-model inspect` does"
        )
    return value


def check_hash(value: object) -> str:
    """64 lower-case hex digits; ConfigError otherwise."""
    if not isinstance(value, str) or re.fullmatch(HASH, value) is None:
        raise ConfigError(f"{shown(value)} is not a hash", fix="write 64 lower-case hex digits")
    return value


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in pieces, 64 hex digits."""
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()
