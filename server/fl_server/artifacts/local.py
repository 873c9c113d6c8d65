"""Artifacts as files of the coordinator's home: `<first two hex digits>/<64 hex digits>`, mode 0600."""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path

from fl_server.artifacts.store import ArtifactDamaged
from fl_shared.adapters.safetensors import digest as digest_of
from fl_shared.files import sync_directory, write_durably

UNFINISHED_S = 86_400.0
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")


class LocalArtifacts:
    """An `ArtifactStore` in one folder. Several processes may use it at once: a file appears whole or not at all."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def path(self, digest: str) -> Path:
        """Where an artifact of this digest lies, if it is there.

        Raises:
            ArtifactDamaged: this is no digest, so nothing was kept under it.
        """
        match = _DIGEST.fullmatch(digest)
        if match is None:
            raise ArtifactDamaged(
                f"{digest[:100]!r} is no artifact's digest", fix="restore the database from the backup"
            )
        name = match.group(1)
        return self._root / name[:2] / name

    def put(self, data: bytes) -> str:
        """Keep the bytes; their digest. File and folders are on disk when this returns; a damaged file is replaced."""
        digest = digest_of(data)
        path = self.path(digest)
        self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            self.get(digest)
        except ArtifactDamaged:
            write_durably(path, data)
        # Also when it was there: whoever wrote it may have been killed before the folders were flushed.
        for folder in (path.parent, self._root, self._root.parent):
            sync_directory(folder)
        return digest

    def has(self, digest: str) -> bool:
        """Whether there is a file for this digest."""
        return self.path(digest).is_file()

    def get(self, digest: str, kind: str = "artifact") -> bytes:
        """The bytes of this digest, verified; ArtifactDamaged when they are missing or changed."""
        return read_verified(self.path(digest), digest, kind)

    def remove_unfinished(self) -> int:
        """Remove what writers left behind that were killed at least a day ago; the number of files."""
        removed = 0
        for path in self._root.glob("*/.*"):
            with contextlib.suppress(FileNotFoundError):  # finished just now, or removed by another process
                if path.stat().st_mtime < time.time() - UNFINISHED_S:
                    path.unlink()
                    removed += 1
        return removed


def read_verified(path: Path, digest: str, kind: str) -> bytes:
    """The content of a file that must have this digest.

    Raises:
        ArtifactDamaged: it is missing, cannot be read, or is not the `kind` that was committed.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactDamaged(f"{path}: {error.strerror}", fix="restore it from the backup") from error
    if digest_of(data) != digest:
        raise ArtifactDamaged(f"{path} is not the {kind} that was committed", fix="restore it from the backup")
    return data
