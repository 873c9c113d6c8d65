"""End everything that a confined command started, however fast it forks (docs/decisions/0087).

Two means, each enough against an honest program, together meant for a hostile one. Where the kernel's cgroup v2
can be written, the command lives in a group of its own that dies with one write (`cgroup.kill`). Everywhere, its
processes are limited in number, and the keeper, to which every orphan comes, stops and kills until none is left:
a stopped process still holds its place within the limit, so that those that fork run out of places.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

MOST_TASKS = 512
"""Processes and threads that the untrusted half may have; a SuperNode with an app has about a hundred."""
SPARED_TASKS = 64
_FREEZE_PASSES = 50
_COMPLAIN_S = 30.0


@dataclass(frozen=True)
class Cgroup:
    """A leaf of the cgroup v2 hierarchy, below the keeper's own group."""

    directory: Path

    @classmethod
    def make(cls, owner: str, *, limited: bool) -> Cgroup | None:
        """A group for the command whose directory is `owner`, empty; None where this user may make none.

        What a killed keeper left in it is ended first.
        """
        try:
            above = _own_group()
            name = hashlib.sha256(os.fsencode(owner)).hexdigest()[:16]
            group = cls(above / f"concordat-{name}")
            group.directory.mkdir(mode=0o700, exist_ok=True)
            group.end()
            group.directory.mkdir(mode=0o700, exist_ok=True)
            if not (group.directory / "cgroup.kill").exists():  # before Linux 5.14
                group.directory.rmdir()
                return None
            if limited and (group.directory / "pids.max").exists():
                (group.directory / "pids.max").write_text(str(MOST_TASKS))
        except (OSError, LookupError, ValueError):  # ValueError: a hierarchy that is only partly to be seen here
            return None
        return group

    def open_procs(self) -> int:
        """A descriptor; what writes `0` to it is in the group. The kernel asks who opened it, not who writes."""
        return os.open(self.directory / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)

    def end(self) -> None:
        """Kill all of it in one step, and remove it as soon as it is empty; gives up waiting after 10 s."""
        deadline = time.monotonic() + 10
        while self.directory.exists():
            with contextlib.suppress(OSError):
                (self.directory / "cgroup.kill").write_text("1")
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            with contextlib.suppress(OSError):
                for inner in sorted(self.directory.rglob("*/"), reverse=True):
                    inner.rmdir()
                self.directory.rmdir()
            if time.monotonic() > deadline:
                return
            time.sleep(0.01)


def _own_group() -> Path:
    """The directory of this process's group in the unified hierarchy; LookupError when none is mounted."""
    for line in Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape").splitlines():
        before, _, after = line.partition(" - ")
        if after.startswith("cgroup2 "):
            root, mount = (word.encode().decode("unicode_escape") for word in before.split()[3:5])
            for entry in Path("/proc/self/cgroup").read_text("utf-8", "surrogateescape").splitlines():
                if entry.startswith("0::"):
                    return Path(mount) / Path(entry[3:]).relative_to(root)
    raise LookupError("no cgroup v2")


def limit_tasks(tasks: int) -> None:
    """Let this process's user have at most `tasks` processes and threads more than now (root is never limited so).

    For the child, before exec: the limit is inherited and cannot be raised again. The last `SPARED_TASKS` that the
    user may have are not for it, so that the agent, under the same user and limit, can always start what it needs.
    """
    most = _tasks_of(os.getuid()) + tasks
    for limit in resource.getrlimit(resource.RLIMIT_NPROC):
        most = most if limit == resource.RLIM_INFINITY else min(most, max(limit - SPARED_TASKS, 1))
    resource.setrlimit(resource.RLIMIT_NPROC, (most, most))


def _tasks_of(user: int) -> int:
    total = 0
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if entry.stat().st_uid == user:
                    total += len(os.listdir(f"/proc/{entry.name}/task"))
    return total


def descendants() -> set[int]:
    """The process ids of this process's children and of theirs, zombies among them.

    OSError when they cannot be listed (no descriptor is free): that is not the same as none.
    """
    pids: set[int] = set()
    waiting = [os.getpid()]
    while waiting:
        pid = waiting.pop()
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            for task in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{task}/children", encoding="ascii") as source:
                    fresh = {int(word) for word in source.read().split()} - pids
                pids |= fresh
                waiting += fresh
    return pids


def reap_orphans(command: int) -> None:
    """Reap ended children other than `command`: each would hold one of the places that it may have."""
    with contextlib.suppress(ChildProcessError):
        while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if ended.si_pid == command:
                return
            os.waitpid(ended.si_pid, 0)


def kill_descendants() -> None:
    """Stop and kill every descendant until none is left. This process must be a child subreaper.

    It does not give up: whoever calls it is there for that alone. A process that the kernel cannot end (a hanging
    network file system) is named on standard error.
    """
    stopped: set[int] = set()
    passes, complain = 0, time.monotonic() + _COMPLAIN_S
    while True:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        try:
            pids = descendants()
        except OSError:
            time.sleep(0.05)
            continue
        if not pids:
            return
        fresh = pids - stopped
        if fresh and passes < _FREEZE_PASSES:
            _signal(fresh, signal.SIGSTOP)
            stopped |= fresh
            passes += 1
            continue
        _signal(pids, signal.SIGKILL)
        stopped.clear()
        passes = 0
        if time.monotonic() > complain:
            print(f"{len(pids)} processes do not end, e.g. {min(pids)}", file=sys.stderr, flush=True)
            complain = time.monotonic() + _COMPLAIN_S
        time.sleep(0.002)


def _signal(pids: set[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)
