"""For apps of coordinators before 0.2, which import two names from here; nothing else may (docs/decisions/0110)."""

import hashlib

MAX_BYTES = 4 << 30


def digest(data: bytes) -> str:
    """`sha256:` and the SHA-256 of the bytes."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
