"""What every store of artifacts does: it keeps bytes under their digest, for ever and unchanged.

A store knows nothing of runs. Which artifact is whose says a row in SQL that is written after the artifact is safe, so
an artifact that no row names (a crash between the two) is harmless: the round that is done again finds it there if it
comes to the same bytes, and a backup leaves it out.
"""

from __future__ import annotations

from typing import Protocol

from fl_shared.errors import RunError


class ArtifactStore(Protocol):
    """Bytes by their digest, `sha256:` and 64 hex digits."""

    def put(self, data: bytes) -> str:
        """Keep the bytes; their digest. They survive a power cut when this returns. A repeat changes nothing.

        Raises:
            OSError: they cannot be kept.
        """

    def has(self, digest: str) -> bool:
        """Whether there is an artifact of this digest; `get` says whether it is whole."""

    def get(self, digest: str, kind: str = "artifact") -> bytes:
        """The bytes of this digest, verified; the message of an error calls them `kind`.

        Raises:
            ArtifactDamaged: they are missing, cannot be read or are not what was put.
        """


class ArtifactDamaged(RunError):
    """An artifact that a row names is not there, or is not the one that was kept; only a backup helps."""
