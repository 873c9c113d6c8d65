"""Let another user run the untrusted half: what it needs lies outside the home, which stays closed.

Beside the home the agent, who is root here, keeps a directory that the user's group may enter and read: the agent's
socket, and the directory of the node key, the tunnel's certificate and the spec. The user owns nothing but
`work/home` in there, which is new at each start (`fl_client.node.spec.make_home`), so that no path that root
touches leads through a directory that the user can write (docs/decisions/0088).
"""

from __future__ import annotations

import logging
import os
import pwd
import subprocess
from collections.abc import Iterable
from pathlib import Path
from shlex import quote

from fl_shared.errors import ConfigError

log = logging.getLogger("fl_client.agent")


def account(user: str) -> pwd.struct_passwd:
    """The other user's entry; ConfigError when there is none, or when we may not become that user."""
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        raise ConfigError(
            f"[supernode] user = {user!r}: there is no such user on this machine",
            fix=f"create it (useradd --system --no-create-home {user}), or leave the field out",
        ) from None
    if os.geteuid() != 0 or entry.pw_uid == 0:
        reason = "that is root itself" if entry.pw_uid == 0 else "the agent does not run as root"
        raise ConfigError(
            f"[supernode] user = {user!r}: {reason}",
            fix="run the agent as root with an ordinary user's name here, or use launch = false (see deploy/)",
        )
    return entry


def handover_mode(directory: Path) -> int:
    """The mode of what is handed to the untrusted half: the group may read it where the directory is for a group."""
    return 0o640 if directory.stat().st_mode & 0o070 else 0o600


def make_shared_directories(directory: Path, socket: Path, owner: pwd.struct_passwd) -> None:
    """Make the directories of the untrusted half and of the agent's socket, as far as they are missing.

    Both are root's, and the user's group may enter and read them. ConfigError when the user could not reach them, or
    could put a link in the socket's place.
    """
    group = "choose a home that others may pass by, such as /var/lib/concordat/SITE, or set directory and socket"
    try:
        for place, mode in ((directory.parent, 0o710), (socket.parent, 0o710), (directory, 0o2750)):
            if not os.path.lexists(place):
                place.mkdir(mode=0o700)
                os.chown(place, -1, owner.pw_gid, follow_symlinks=False)
                place.chmod(mode)  # in a directory of our own: nobody can have put a link there
    except OSError as error:
        raise ConfigError(
            f"[supernode] directory = {str(directory)!r}: {error.strerror}", fix=f"create it, or {group}"
        ) from None
    for name, path in (("directory", directory), ("socket", socket.parent)):
        if not can_access(owner, "-x", path):
            raise ConfigError(f"[supernode] {name}: user {owner.pw_name!r} cannot enter {path}", fix=group)
        if can_access(owner, "-w", path):
            raise ConfigError(
                f"[supernode] {name}: user {owner.pw_name!r} can write {path}, so that what lies there is not ours",
                fix=f"leave the field out, or: chown root {quote(str(path))} && chmod 710 {quote(str(path))}",
            )


def can_access(owner: pwd.struct_passwd, how: str, path: Path) -> bool:
    """Whether the user, in no further group, may read, write or pass (`-r`, `-w`, `-x`): tried as that user."""
    done = subprocess.run(
        ["/bin/sh", "-c", 'test "$1" "$2"', "sh", how, str(path)], cwd="/", env={}, check=False,
        user=owner.pw_uid, group=owner.pw_gid, extra_groups=[],
    )  # fmt: skip
    return done.returncode == 0


def readable_by(owner: pwd.struct_passwd, paths: Iterable[Path]) -> list[Path]:
    """Which of these the user can read."""
    return [path for path in paths if can_access(owner, "-r", path)]
