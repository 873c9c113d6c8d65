"""What one start of the SuperNode depends on, and the place that it is given to work in.

The agent writes it; whoever starts the SuperNode, perhaps another user, reads it.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from fl_client.node.handover import handover_mode
from fl_shared.errors import ConfigError
from fl_shared.files import write_durably

SPEC_FILE = "launch.json"


@dataclass(frozen=True)
class NodeSpec:
    """Everything that one start of the SuperNode depends on. Holds no path outside its directory
    but the agent's socket.

    `directory` belongs to the agent's user: spec, node key and certificate lie there, and the untrusted half only
    reads them. Below it, `work` belongs to the untrusted half's user, and the code that the coordinator ships may
    write in `work/home` alone, which is new and empty at each start. So nothing that decides about a wall, and
    nothing that is run or read outside of it, lies where the walled can write.
    """

    directory: Path
    socket: Path
    node_key: Path
    tunnel_certificate: Path
    tunnel_port: int
    mode: str = "auto"
    user: str = ""

    def save(self) -> None:
        """Write the spec where `fl-client supernode` finds it."""
        table = {name: str(value) if isinstance(value, Path) else value for name, value in vars(self).items()}
        text = json.dumps(table, indent=2) + "\n"
        write_durably(self.directory / SPEC_FILE, text.encode("utf-8"), mode=handover_mode(self.directory), exact=True)

    @property
    def home(self) -> Path:
        """The only directory in which the untrusted half may write."""
        return self.directory / "work" / "home"

    @classmethod
    def load(cls, directory: Path) -> NodeSpec:
        """Read the spec that the agent wrote into `directory`; ConfigError when there is none, or not the agent's."""
        path = directory / SPEC_FILE
        require_own(directory, path)
        try:
            table = json.loads(path.read_text("utf-8"))
            return cls(
                directory=directory,
                socket=Path(table["socket"]),
                node_key=directory / Path(table["node_key"]).name,
                tunnel_certificate=directory / Path(table["tunnel_certificate"]).name,
                tunnel_port=int(table["tunnel_port"]),
                mode=str(table["mode"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path} cannot be read ({type(error).__name__})",
                fix="start the site's agent first: it writes this file; check --directory and its owner",
            ) from None


def require_own(directory: Path, spec: Path | None = None) -> None:
    """Refuse a directory of the untrusted half that anybody but its owner may write, or a spec of another owner.

    Without `spec`: as the agent, whose own the directory must be. Raises ConfigError.
    """
    fix = (
        f"let the agent's user own {directory} (chown, chmod 2750, in the group of both halves), and give the other "
        f"user {directory / 'work'} (install -d -m 700 -o USER)"
    )
    try:
        status = directory.stat()
        owner = os.geteuid() if spec is None else spec.stat(follow_symlinks=False).st_uid
    except OSError as error:
        hint = fix if spec is None else "start the site's agent first: it writes this file; check --directory"
        raise ConfigError(f"{error.filename} cannot be used: {error.strerror}", fix=hint) from None
    if status.st_mode & 0o022 or status.st_uid != owner:
        raise ConfigError(f"{directory} can be written by others than the agent's user", fix=fix)


def make_home(spec: NodeSpec) -> None:
    """Make the untrusted half a new directory of its own: what an app left meets no later app. Raises ConfigError."""
    work = spec.home.parent
    try:
        work.mkdir(mode=0o711, exist_ok=True)
        if os.path.lexists(spec.home):
            spec.home.rename(work / f"old-{time.time_ns()}")
        spec.home.mkdir(mode=0o700)
        for name in ("tmp", "flwr"):
            (spec.home / name).mkdir(mode=0o700)
        if spec.user:  # we are root, `work` is ours and `home` is new: given away last, so that nobody has a hand in it
            owner = pwd.getpwnam(spec.user)
            for path in (spec.home / "tmp", spec.home / "flwr", spec.home):
                os.chown(path, owner.pw_uid, owner.pw_gid, follow_symlinks=False)
    except (OSError, LookupError) as error:
        raise ConfigError(
            f"[supernode] the untrusted half has no place to work in: {error}",
            fix=f"let the user that runs it own {work}: install -d -m 700 -o USER {work}",
        ) from None
    leftovers = list(work.glob("old-*"))
    # An app may have closed its directories to its own user; a link that it left is not followed.
    closed = [entry for entry in leftovers if not entry.is_symlink()]
    for command, paths in ((["chmod", "-R", "u+rwx"], closed), (["rm", "-rf"], leftovers)):
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):  # what is left is removed at the next start
            subprocess.run([*command, "--", *paths], stderr=subprocess.DEVNULL, timeout=60, check=False)
