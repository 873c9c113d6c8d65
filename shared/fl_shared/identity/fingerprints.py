"""Fingerprints that two people can compare by telephone: eight groups of four hex digits.

The first 128 bits of a SHA-256. A machine in the middle would need another key or certificate with the same 128
bits as one that he did not choose, which takes about 2^128 attempts.
"""

from __future__ import annotations

import hashlib

_DIGITS = 32


def grouped(sha256_hex: str) -> str:
    """A SHA-256 (hex, of a certificate's DER form for example) as people read it out; empty for an empty one."""
    return " ".join(sha256_hex[start : start + 4] for start in range(0, min(len(sha256_hex), _DIGITS), 4))


def grouped_key(public_hex: str) -> str:
    """A public signing key (hex) as people read it out: the fingerprint of its 32 bytes; empty for an empty one."""
    return grouped(hashlib.sha256(bytes.fromhex(public_hex)).hexdigest()) if public_hex else ""
