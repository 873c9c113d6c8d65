"""Which walls this machine offers around the untrusted half."""

from __future__ import annotations

import json
import subprocess
import sys

from fl_client.node.environment import SYSTEM_READABLE, keeper_environment
from fl_client.node.sandbox import Confinement, Walls
from fl_shared.errors import ConfigError


def offered_walls(mode: str, user: str) -> Walls:
    """Which walls this machine offers. With mode "require" a missing one is a ConfigError that says what to do."""
    tried = Confinement(
        command=[], environment={}, directory="/", log="", readable=[sys.prefix, sys.base_prefix, *SYSTEM_READABLE],
        writable=["/dev/null"], connect_ports=[], bind_ports=[], user=user,
    )  # fmt: skip
    command = [sys.executable, "-P", "-m", "fl_client.node.sandbox", "--walls"]
    done = subprocess.run(
        command, input=tried.to_line(), capture_output=True, env=keeper_environment(), cwd="/", check=False
    )
    try:
        walls = Walls(**json.loads(done.stdout))
    except (ValueError, TypeError):
        raise ConfigError(
            f"[supernode] the walls around the untrusted half cannot be tried: {done.stderr.decode()[-300:].strip()}",
            fix="check [supernode] user, and that the agent may start processes",
        ) from None
    if mode == "require" and walls.missing():
        raise ConfigError(
            f'[supernode] confine is "require", and this machine lacks {"; ".join(walls.missing())}',
            fix="use a kernel of 5.13 or later with Landlock, and let this user make user namespaces (sysctl "
            "kernel.apparmor_restrict_unprivileged_userns=0, user.max_user_namespaces; in a container, its seccomp "
            'profile), or accept what is missing with confine = "auto" (docs/security.md)',
        )
    return walls


def describe_confinement(mode: str, user: str) -> str:
    """Say in one line how far the untrusted half is separated on this machine. ConfigError as `offered_walls`."""
    own = f"user {user}" if user else "same user"
    if mode == "off":
        return f"{own}, confine is off" if user else "NOT separated: same user, and confine is off"
    walls = offered_walls(mode, user)
    kinds = [] if walls.no_namespaces else ["own network, files and processes (namespaces)"]
    kinds += [f"Landlock (ABI {walls.landlock})"] if walls.landlock else []
    kinds += [] if walls.no_filter else ["seccomp"]
    if not kinds and not user:
        return "NOT separated: same user and no wall in this kernel; use [supernode] user, or a newer kernel"
    lacks = "; ".join(walls.missing())
    return ", ".join([own, *kinds]) + (f"; WITHOUT {lacks}" if lacks else "")
