"""Run a command as another user of this machine, although the interpreter may lie where only root can reach it."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

MEETING = 61005
MEET = "users-of-a-test"
"""The group of the socket: it must have a name, so it is made in a mount namespace with its own /etc/group."""


def barrier(path: Path) -> Path | None:
    """The outermost directory above `path` that other users may not pass through; None when there is none."""
    return next((each for each in reversed(path.parents) if not each.stat().st_mode & 0o001), None)


def as_user(top: Path, user: int, groups: list[int], *words: str, umask: str = "077") -> list[str]:
    """A command line that runs `words` as another user without root's powers, in a mount namespace of its own.

    There the meeting group has a name, and the interpreter can be reached although it may lie below root's home.
    """
    (top / "group").write_text(Path("/etc/group").read_text() + f"{MEET}:x:{MEETING}:\n")
    (top / "group").chmod(0o644)
    setup = ["umask 022", "mount --make-rprivate /", f"mount --bind {top}/group /etc/group"]
    base = Path(sys.base_prefix)
    closed = barrier(base)
    if closed is not None:
        seen = top / "seen" / base.relative_to(closed)
        setup += [f"mkdir -p {seen}", f"mount --bind {base} {seen}", f"mount --rbind {top}/seen {closed}"]
    allowed = f"--groups={','.join(map(str, groups))}" if groups else "--clear-groups"
    become = ["setpriv", f"--reuid={user}", f"--regid={user}", allowed, "--inh-caps=-all", "--bounding-set=-all"]
    line = " && ".join([*setup, "cd /", f"umask {umask}", "exec " + shlex.join([*become, *words])])
    return ["unshare", "--mount", "sh", "-c", line]
