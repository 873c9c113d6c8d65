"""Canonical bytes of a document: what is hashed and signed is the same on every machine."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from fl_shared.errors import ConfigError


def _refuse(value: Any, where: str) -> None:
    if value is None or isinstance(value, str | bool | int):
        return
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ConfigError(f"{where}: {value} cannot be signed", fix="use a finite number")
        return
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ConfigError(f"{where}: the key {key!r} is no text", fix="use text keys")
            _refuse(item, f"{where}.{key}")
        return
    if isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _refuse(item, f"{where}[{index}]")
        return
    raise ConfigError(f"{where}: {type(value).__name__} cannot be signed", fix="write bytes as hex")


def canonical_bytes(document: Any) -> bytes:
    """UTF-8 JSON with sorted keys and no spaces; floats in Python's shortest round-trip form.

    Raises:
        ConfigError: NaN, infinity, bytes, or another type that JSON does not carry faithfully.
    """
    _refuse(document, "document")
    return json.dumps(
        document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def sha256_hex(data: bytes) -> str:
    """SHA-256, 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in pieces, 64 hex digits."""
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()
