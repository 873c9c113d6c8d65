"""Updates kept on disk until the round is over, for rules that compare all of them, and read back in columns.

The file has no name, so nothing of it is left when the process ends, however it ends. Memory is that of one block of
columns, whatever the number of sites; the disk holds all updates in float32.
"""

from __future__ import annotations

import math
import os
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fl_server.aggregation.updates import Checked, Shapes, flat
from fl_shared.adapters.safetensors import Tensors
from fl_shared.errors import DataError

BLOCK_BYTES = 4 << 20  # a rule that works in float64 needs about five times as much


class Spool(Checked):
    """Updates as rows of an unnamed file below `folder`; tensors in order of name, one after the other."""

    def __init__(self, folder: Path, expected: Shapes | None = None) -> None:
        super().__init__(expected)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            self._file = os.dup(file.fileno())
        self._closed = weakref.finalize(self, os.close, self._file)  # also when the round is given up
        self.block_bytes = BLOCK_BYTES

    @property
    def width(self) -> int:
        """Values in one update."""
        return sum(math.prod(shape) for shape in (self.expected or {}).values())

    def add(self, update: Tensors) -> None:
        """Append one update; it is checked first, so a refused one changes nothing.

        Raises:
            DataError: as `Checked.check`, or the disk is full.
        """
        self.expected = self.check(update)
        at = self.count * self.width * 4
        for _, value in sorted(update.items()):
            unwritten = memoryview(flat(value).view(np.uint8).data)
            while unwritten:
                try:
                    written = os.pwrite(self._file, unwritten, at)
                except OSError as error:
                    raise DataError(
                        f"the update cannot be kept until the round is over: {error.strerror}",
                        fix="free disk space at the coordinator, or choose an aggregator that streams",
                    ) from error
                at, unwritten = at + written, unwritten[written:]
        self.count += 1

    def columns(self) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """Blocks `[count, columns]` and where their columns stand in an update; each block replaces the last one."""
        width = self.width
        step = max(1, min(width, self.block_bytes // (4 * max(1, self.count))))
        buffer = np.empty((self.count, step), dtype=np.float32)
        for start in range(0, width, step):
            end = min(start + step, width)
            block = buffer[:, : end - start]
            for row in range(self.count):
                block[row] = self._read(row * width + start, end - start)
            yield slice(start, end), block

    def _read(self, first: int, count: int) -> NDArray[np.float32]:
        data = os.pread(self._file, count * 4, first * 4)
        if len(data) != count * 4:
            raise DataError("an update that was kept for this round is cut short", fix="look for a damaged disk")
        return np.frombuffer(data, dtype=np.float32)

    def split(self, values: NDArray[np.float32]) -> Tensors:
        """One row as tensors."""
        tensors: Tensors = {}
        at = 0
        for name, shape in sorted((self.expected or {}).items()):
            size = math.prod(shape)
            tensors[name] = values[at : at + size].reshape(shape)
            at += size
        return tensors

    def close(self) -> None:
        """Give the disk space back."""
        self._closed()
