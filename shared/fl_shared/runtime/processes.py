"""Child processes that end with their parent, each in its own process group; and what a process asks of its system.

A site's keeper (`fl_client.node.sandbox`) has its own `die_with_parent` and `raise_file_limit`: it imports nothing
but the standard library and its own room.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from fl_shared.runtime.private_files import create_file

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int = 0) -> None:
    """Ask the kernel for SIGKILL when this process's parent ends (Linux; does nothing elsewhere).

    The wish outlives execve. The kernel ties it to the thread that started the child, so children are
    started by main threads. When `parent`, the id of the process that started this one, has ended before the kernel
    knew of the wish, this process ends at once.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent and os.getppid() != parent:
        os._exit(1)


def spawn(command: list[str], environment: dict[str, str], log: Path | None) -> subprocess.Popen[bytes]:
    """Start a child in its own session, its output appended to a file, or to our own output without one."""
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        create_file(log)
    with log.open("ab") if log is not None else contextlib.nullcontext() as sink:
        return subprocess.Popen(
            # The shim sets the parent-death signal in the child itself: a preexec_fn is not safe with threads.
            [sys.executable, "-m", "fl_shared.runtime.processes", str(os.getpid()), *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        )


def end_group(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    """SIGTERM to the whole group, SIGKILL to what is left of it after `timeout_s`."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + timeout_s
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def free_port() -> int:
    """A TCP port that is free on loopback just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def raise_file_limit(limit: int = resource.RLIM_INFINITY) -> None:
    """Let this process have `limit` descriptors, or as many as the system allows it; the soft limit is often 1024.

    A limit that is high enough already, and the hard one, stay as they are.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = hard if limit == resource.RLIM_INFINITY else limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    if soft != resource.RLIM_INFINITY and (most == resource.RLIM_INFINITY or soft < most):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])  # noqa: S606  # the child becomes the command
