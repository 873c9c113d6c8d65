"""TCP ports for tests: no other test process and no outgoing connection can take one before it is used.

A port that the kernel named (bind to 0) and that is closed again may be given to any connection of the machine in the
next moment. These lie below the range from which the kernel takes ports by itself, and each is locked by a file until
the process that asked for it ends.
"""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
from pathlib import Path

FIRST = 15_000
_held: list[int] = []
"""Descriptors of the lock files: closed, and so unlocked, with this process."""


def free_port() -> int:
    """A port of loopback that nobody listens on; it is this process's until it ends.

    Raises:
        OSError: there is none left.
    """
    locks = Path(tempfile.gettempdir()) / f"concordat-test-ports-{os.getuid()}"
    locks.mkdir(mode=0o700, exist_ok=True)
    first, last = FIRST, _first_of_the_kernels()
    begin = os.getpid() * 61 % (last - first)  # so that processes seldom try the same one
    for number in range(last - first):
        port = first + (begin + number) % (last - first)
        held = os.open(locks / str(port), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
        except OSError:
            os.close(held)
            continue
        _held.append(held)
        return port
    raise OSError(f"no free port from {first} to {last}")


def _first_of_the_kernels() -> int:
    """Where the kernel's own range begins."""
    return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
