"""The untrusted half's output, recorded by its keeper: the app has a pipe and never the file, and fills no disk."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

LIMIT_BYTES = 8 << 20
_BLOCK = 1 << 16
# What is no file of one name (a link, a pipe) is not written to.
_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Record:
    """A log file and the one before it (`.1`), each of at most `LIMIT_BYTES`, fed from `pipe`."""

    def __init__(self, path: Path) -> None:
        """Open or create the file; OSError when it is not a file of its own."""
        self._path = path
        self._file = -1
        self._open()
        self.pipe, self.entrance = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self.pipe, False)

    def _open(self) -> None:
        file = os.open(self._path, _FLAGS, 0o600)
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            os.close(file)
            raise OSError(f"{self._path} is not a file of its own")
        if self._file >= 0:  # only now: the number of a closed file may soon be another file's
            os.close(self._file)
        self._file, self._size = file, status.st_size

    def take(self) -> bool:
        """Write down what the pipe holds, up to 64 KiB; False when it is empty or at its end for good."""
        try:
            block = os.read(self.pipe, _BLOCK)
        except BlockingIOError:
            return False
        with contextlib.suppress(OSError):  # a full disk: these words are lost, and the app goes on
            if self._size + len(block) > LIMIT_BYTES:
                os.replace(self._path, self._path.with_name(self._path.name + ".1"))
                self._open()
            self._size += os.write(self._file, block)
        return bool(block)
