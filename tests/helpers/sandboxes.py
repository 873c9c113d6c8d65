"""Start a command confined as the SuperNode is, through the real keeper."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fl_client.node.sandbox import Confinement
from fl_client.node.spec import NodeSpec
from fl_client.node.supernode import node_confinement

NO_NAMESPACES = ["unshare", "-Ur", "sh", "-c", 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$0" "$@"']
"""Before a command: run it where nobody may make user namespaces, as on machines that forbid them."""

_WITHOUT = """
import ctypes, os, struct, sys
steps = [(0x20, 0, 0, 0), (0x35, 0, 2, 444), (0x25, 1, 0, 446), (6, 0, 0, 0x50026), (6, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
libc = ctypes.CDLL(None)
libc.prctl(38, 1, 0, 0, 0)
assert libc.prctl(22, 2, struct.pack("@HP", len(steps), ctypes.addressof(code)), 0, 0) == 0
os.execv(sys.argv[1], sys.argv[1:])
"""
NO_LANDLOCK = [sys.executable, "-c", _WITHOUT]
"""Before a command: run it where Landlock's three calls do not exist, as in kernels without it."""


def start_keeper(confinement: Confinement, before: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    """Start the keeper as the agent does, with an inherited secret in its own environment."""
    keeper = subprocess.Popen(
        [*before, sys.executable, "-P", "-m", "fl_client.node.sandbox"],
        stdin=subprocess.PIPE,
        env={**os.environ, "FL_TOKEN": "planted-secret"},
        start_new_session=True,
    )
    assert keeper.stdin is not None
    keeper.stdin.write(confinement.to_line())
    keeper.stdin.flush()
    return keeper


def close(keeper: subprocess.Popen[bytes]) -> None:
    """Close the agent's end of the pipe."""
    if keeper.stdin is not None:
        keeper.stdin.close()


def confinement_of(
    directory: Path, command: list[str], *, agent: Path = Path("/nowhere/agent.sock"), **changes: Any
) -> Confinement:
    """The confinement that a SuperNode would get, around another command."""
    plan = NodeSpec(directory, agent, directory / "node_key", directory / "ca.pem", 1)
    made = node_confinement(plan, 2)
    return Confinement(**{**made.__dict__, "command": command, **changes})
