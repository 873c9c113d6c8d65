"""Random bits for sampling and noise: ChaCha20 keyed by the operating system, never a simulation generator.

torch's and numpy's default generators are predictable from their output; whoever knows the noise can subtract it.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

from fl_shared.errors import EngineError

_KEY_BYTES = 32
_ZEROS = memoryview(bytes(1 << 18))
_REKEY_BYTES = 1 << 36  # a quarter of what ChaCha20's 32-bit block counter can give under one nonce
_forks = 0


def _forked() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_forked)


def _process() -> tuple[int, int]:
    """This process: forks are counted because a process id may be used again, ids because C code may fork, too."""
    return _forks, os.getpid()


class SecureStream:
    """A ChaCha20 keystream (RFC 8439) under a key from `os.urandom`.

    After a fork the child's copy takes a new key: parent and child never draw the same words.

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
        self._owner = _process()
        self._left = _REKEY_BYTES

    def fork(self) -> SecureStream:
        """A stream of its own for another thread: keyed by the operating system, or by this one under a test's key."""
        return SecureStream(None if self._fixed is None else self.words(_KEY_BYTES // 8).tobytes())

    def words(self, count: int) -> NDArray[np.uint64]:
        """`count` independent uniform 64-bit words."""
        out = np.empty(count, dtype="<u8")
        self.fill(out)
        return out.astype(np.uint64, copy=False)

    def fill(self, out: NDArray[Any]) -> None:
        """Overwrite a contiguous array of integers with keystream, `<u4` or `<u8` words for instance."""
        if not out.size:
            return  # an empty view cannot be cast
        if self._owner != _process():
            if self._fixed is not None:
                raise EngineError(
                    "a stream with a given key was carried over a fork: both processes would draw the same words",
                    fix="give each process a stream of its own",
                )
            self._start()
        target = memoryview(out.data).cast("B")
        for at in range(0, len(target), len(_ZEROS)):
            self._fill(target[at : at + len(_ZEROS)])

    def _fill(self, target: memoryview) -> None:
        if len(target) > self._left:
            self._start()
        self._left -= len(target)
        self._cipher.update_into(_ZEROS[: len(target)], target)
