"""Let another user run the untrusted half: what it needs lies outside the home, which stays closed.

The agent is root here, and the user owns the directory that it is given: what lies there may be a link, a hard link
or gone by the time it is touched. So only names that the agent itself makes are given away, each through a descriptor
that was opened without following links, and never what lies below them (docs/decisions/0088).
"""

from __future__ import annotations

import contextlib
import logging
import os
import pwd
import shutil
import stat
import subprocess
from collections.abc import Iterable
from pathlib import Path

from fl_shared.errors import ConfigError

log = logging.getLogger("fl_client.agent")


def account(user: str) -> pwd.struct_passwd:
    """The other user's entry; ConfigError when there is none, or when we may not become that user."""
    try:
        found = pwd.getpwnam(user)
    except KeyError:
        raise ConfigError(
            f"[supernode] user = {user!r}: there is no such user on this machine",
            fix=f"create it (useradd --system --no-create-home {user}), or leave the field out",
        ) from None
    if os.geteuid() != 0 or found.pw_uid == 0:
        what = "that is root itself" if found.pw_uid == 0 else "the agent does not run as root"
        raise ConfigError(
            f"[supernode] user = {user!r}: {what}",
            fix="run the agent as root with an ordinary user's name here, or use launch = false (see deploy/)",
        )
    return found


def mode_in(directory: Path) -> int:
    """The mode of what is handed to the untrusted half: its group may read it where the directory is for a group."""
    return 0o640 if directory.stat().st_mode & 0o070 else 0o600


def make_meeting_place(directory: Path, socket: Path, owner: pwd.struct_passwd) -> None:
    """Make the user's directory and the one that the agent's socket will lie in, as far as they are missing.

    ConfigError when the user could not reach them, or could put a link in the socket's place.
    """
    try:
        for place in dict.fromkeys((directory.parent, socket.parent)):
            if not place.exists():
                place.mkdir(mode=0o700)
                os.chown(place, -1, owner.pw_gid, follow_symlinks=False)
                place.chmod(0o710)
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode=0o700)
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(
            f"[supernode] directory = {str(directory)!r}: {error.strerror}",
            fix="create it, or name another place outside the site's home",
        ) from None
    try:
        if os.fstat(descriptor).st_uid in (0, owner.pw_uid):
            os.fchown(descriptor, owner.pw_uid, -1)
            os.fchmod(descriptor, stat.S_IMODE(os.fstat(descriptor).st_mode) & 0o2770)
    finally:
        os.close(descriptor)
    if not may(owner, "-w", directory):
        raise ConfigError(
            f"[supernode] user = {owner.pw_name!r} cannot reach {directory}",
            fix="choose a home that others may pass by, such as /var/lib/concordat/SITE, or set directory and socket",
        )
    if not may(owner, "-x", socket.parent) or may(owner, "-w", socket.parent):
        raise ConfigError(
            f"[supernode] socket = {str(socket)!r}: its directory must let {owner.pw_name!r} pass, but not write",
            fix="leave the field out, or choose a directory of root's with mode 0711",
        )


def give(directory: Path, names: Iterable[str], owner: pwd.struct_passwd) -> None:
    """Make `owner` the owner of these files and directories in `directory`; what is missing or a link is left."""
    place = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        for name in names:
            try:
                _give(place, name, owner)
            except OSError as error:  # a link, or gone: the user's own doing, and its own loss
                if not isinstance(error, FileNotFoundError):
                    log.warning("%s in the untrusted directory is not handed over: %s", name, error.strerror)
    finally:
        os.close(place)


def _give(place: int, name: str, owner: pwd.struct_passwd) -> None:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(name, flags, dir_fd=place)
    try:
        found = os.fstat(descriptor)
        if found.st_uid == owner.pw_uid:
            return
        if stat.S_ISDIR(found.st_mode) and os.listdir(descriptor):  # of a time when the half ran as ourselves
            shutil.rmtree(name, dir_fd=place)
            os.mkdir(name, 0o700, dir_fd=place)
            os.close(descriptor)
            descriptor = os.open(name, flags | os.O_DIRECTORY, dir_fd=place)
            found = os.fstat(descriptor)
        if stat.S_ISDIR(found.st_mode) or (stat.S_ISREG(found.st_mode) and found.st_nlink == 1):
            os.fchown(descriptor, owner.pw_uid, owner.pw_gid)
    finally:
        os.close(descriptor)


def may(owner: pwd.struct_passwd, how: str, path: Path) -> bool:
    """Whether the user, in no further group, may read, write or pass (`-r`, `-w`, `-x`): tried as that user."""
    done = subprocess.run(
        ["/bin/sh", "-c", 'test "$1" "$2"', "sh", how, str(path)], cwd="/", env={}, check=False,
        user=owner.pw_uid, group=owner.pw_gid, extra_groups=[],
    )  # fmt: skip
    return done.returncode == 0


def exposed(owner: pwd.struct_passwd, paths: Iterable[Path]) -> list[Path]:
    """Which of these the user can read."""
    return [path for path in paths if may(owner, "-r", path)]
