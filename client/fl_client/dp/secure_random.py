"""Random bits for sampling and noise: ChaCha20 keyed by the operating system, never a simulation generator.

torch's and numpy's default generators are predictable from their output; whoever knows the noise can subtract it.
"""

from __future__ import annotations

import os

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

from fl_shared.errors import EngineError

_KEY_BYTES = 32
_REKEY_BYTES = 1 << 36  # a quarter of what ChaCha20's 32-bit block counter can give under one nonce


class SecureStream:
    """A ChaCha20 keystream (RFC 8439) under a key from `os.urandom`.

    Args:
        key: 32 bytes. Only tests pass one: a known key makes sampling and noise predictable.
    """

    def __init__(self, key: bytes | None = None) -> None:
        self._fixed = key
        self._rekeys = 0
        self._start()

    def _start(self) -> None:
        key = os.urandom(_KEY_BYTES) if self._fixed is None else self._fixed
        if len(key) != _KEY_BYTES:
            raise EngineError(f"a stream's key has {_KEY_BYTES} bytes, not {len(key)}", fix="leave the key out")
        nonce = bytes(4) + self._rekeys.to_bytes(12, "big")
        self._cipher = Cipher(algorithms.ChaCha20(key, nonce), mode=None).encryptor()
        self._rekeys += 1
        self._left = _REKEY_BYTES

    def words(self, count: int) -> NDArray[np.uint64]:
        """`count` independent uniform 64-bit words."""
        return np.frombuffer(self._take(8 * count), dtype="<u8").astype(np.uint64, copy=False)

    def words32(self, count: int) -> NDArray[np.uint32]:
        """`count` independent uniform 32-bit words."""
        return np.frombuffer(self._take(4 * count), dtype="<u4").astype(np.uint32, copy=False)

    def halfwords(self, count: int) -> NDArray[np.uint16]:
        """`count` independent uniform 16-bit words."""
        return np.frombuffer(self._take(2 * count), dtype="<u2").astype(np.uint16, copy=False)

    def _take(self, size: int) -> bytes:
        if size > self._left:
            self._start()
        self._left -= size
        return self._cipher.update(bytes(size))
