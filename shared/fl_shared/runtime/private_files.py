"""Files of one user alone: what a process creates, and what lies there already.

Nothing here follows a link.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

_OTHERS = 0o077


def create_privately() -> None:
    """Let this process and its children create files that their owner alone may open, whatever umask it was given."""
    os.umask(_OTHERS)


def create_file(path: Path) -> None:
    """Create `path` empty with mode 0600 unless it is there; OSError when that cannot be done.

    For libraries that create files by the umask. SQLite gives `-wal` and `-shm` the mode of the database.
    """
    with contextlib.suppress(FileExistsError):  # not even opened: closing it would drop SQLite's locks on it
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))


def open_to_others(root: Path, foreign: Path | None = None) -> list[Path]:
    """What lies at `root` and below that others than the owner may open, links aside; nothing inside `foreign`."""
    return [path for path, _ in _open(root, foreign)]


def close_to_others(root: Path, foreign: Path | None = None) -> list[Path]:
    """Take every right from others than the owner, at `root` and below; what was changed.

    What belongs to another user is left as it is: `open_to_others` still names it. What lies in the directory
    `foreign` is not looked at: code that is not ours may have put there as much, and as deep, as it likes.
    """
    changed = []
    for path, descriptor in _open(root, foreign):
        # The descriptor names the file itself, whatever lies at its path by now; it may be a socket.
        place = f"/proc/self/fd/{descriptor}"
        with contextlib.suppress(PermissionError):
            os.chmod(place, stat.S_IMODE(os.stat(place).st_mode) & ~_OTHERS)
            changed.append(path)
    return changed


def _open(root: Path, foreign: Path | None) -> Iterator[tuple[Path, int]]:
    """Each open file or directory with a descriptor that lives until the next one; what vanishes is left out."""
    walk = os.fwalk(root, follow_symlinks=False, onerror=None)
    for place, directories, files, parent in walk:
        for name in (*([""] if place == str(root) else []), *directories, *files):
            try:
                path_only = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
                descriptor = os.open(name or ".", path_only, dir_fd=parent)
            except (FileNotFoundError, PermissionError):
                continue
            try:
                mode = os.fstat(descriptor).st_mode
                if not stat.S_ISLNK(mode) and mode & _OTHERS:
                    yield Path(place, name), descriptor
            finally:
                os.close(descriptor)
        directories[:] = [name for name in directories if Path(place, name) != foreign]
