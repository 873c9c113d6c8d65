"""Run the untrusted half confined, and make sure that nothing of it outlives its keeper.

`python -P -m fl_client.node.sandbox` reads one JSON object from the first line of standard input (see
`Confinement`), starts the command in it and waits. Three walls of the kernel stand around the command, each where
the kernel offers it: namespaces of its own (`fl_client.node.namespaces`), in which there is no other file, process or
network; Landlock, which lets it read the Python environment and the system's libraries and write its own
directory; and a filter of system calls (`fl_client.node.seccomp`). When standard input ends (the agent is gone, however
it died) or on SIGTERM, every descendant is killed, including those that left the process
group and those that fork faster than they are killed (`fl_client.node.reaping`). The keeper is two
processes, each of which ends everything when the other one is killed.

With `--walls` it starts nothing and says which of the walls this machine offers for the confinement
(docs/decisions/0084).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pwd
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from fl_client.node import namespaces, seccomp
from fl_client.node.admission import raise_file_limit
from fl_client.node.forwarder import Target, forward
from fl_client.node.reaping import Cgroup, kill_descendants, limit_tasks, reap_orphans
from fl_client.node.record import Record

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same numbers on every architecture
_RULE_PATH, _RULE_PORT = 1, 2
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
_MOST_FILES = 1024  # descriptors that each process of the command may have
_STOP_S = 2.0  # a SuperNode needs about 5 s to end by itself and has nothing to lose
_PR_CAPBSET_DROP, _CAPABILITY_VERSION_3, _CAPABILITIES = 24, 0x20080522, 64

# linux/landlock.h: bits 0..12 since ABI 1, REFER (13) ABI 2, TRUNCATE (14) ABI 3, IOCTL_DEV (15) ABI 5.
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_FILE_ONLY = _EXECUTE | _WRITE_FILE | _READ_FILE | 1 << 14 | 1 << 15
_BIND, _CONNECT = 1, 2
_SCOPE_ABSTRACT_SOCKET, _SCOPE_SIGNAL = 1, 2


@dataclass(frozen=True)
class Confinement:
    """What one confined command may do, and how it is started."""

    command: list[str]
    environment: dict[str, str]
    directory: str
    log: str
    readable: list[str]
    writable: list[str]
    connect_ports: list[int]
    bind_ports: list[int]
    mode: str = "auto"  # auto: each wall that the kernel offers; require: all of them or no start; off
    user: str = ""  # run as this user (the keeper must be root); "" keeps the user
    tasks: int = 0  # processes and threads that it may have; 0 for no limit
    agent: str = ""  # the agent's Unix socket, brought into the namespaces at its own path

    @property
    def tunnelled(self) -> list[int]:
        """The ports that are reached outside of the namespaces; the others are the command's own."""
        return [port for port in self.connect_ports if port not in self.bind_ports]

    def to_line(self) -> bytes:
        """Return the JSON line that `python -m fl_client.node.sandbox` reads."""
        return json.dumps(asdict(self)).encode("utf-8") + b"\n"


def landlock_abi() -> int:
    """Return the kernel's Landlock version, 0 when it offers none."""
    version: int = _libc().syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    return max(version, 0)


def forbid_inspection() -> None:
    """Make this process undumpable: no unprivileged process may ptrace it or read its memory or fds."""
    _libc().prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Ask the kernel to kill this process (or send it another signal) when its parent dies.

    The keeper's own: what guards the untrusted half imports nothing of `fl_shared`.
    """
    _libc().prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


def limit_itself() -> None:
    """What concerns this process alone: no core files, few descriptors, and the first to go when memory runs out."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(_MOST_FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    libc = _libc()
    libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)  # an undumpable process may not write its own
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def drop_capabilities() -> None:
    """Give up every capability for good, also across exec.

    Landlock alone would let a root process read `/proc/PID/environ` of others (CAP_PERFMON).
    """
    libc = _libc()
    for capability in range(_CAPABILITIES):
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)  # fails without privilege: nothing to drop then
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    _check(libc.capset(header, bytes(24)), "drop capabilities")


def confine(confinement: Confinement) -> None:
    """Restrict the calling process for good. Raises OSError when the kernel refuses a step."""
    abi = landlock_abi()
    libc = _libc()
    files = (1 << 13) - 1
    files |= (1 << 13) if abi >= 2 else 0
    files |= (1 << 14) if abi >= 3 else 0
    files |= (1 << 15) if abi >= 5 else 0
    network = _BIND | _CONNECT if abi >= 4 else 0
    scopes = _SCOPE_ABSTRACT_SOCKET | _SCOPE_SIGNAL if abi >= 6 else 0
    attributes = struct.pack("=QQQ", files, network, scopes)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    ruleset = libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(size), ctypes.c_uint32(0))
    _check(ruleset, "create the rule set")
    for paths, rights in ((confinement.readable, _READ), (confinement.writable, files)):
        for path in paths:
            _allow_path(ruleset, path, rights & files)
    if network:
        for ports, right in ((confinement.connect_ports, _CONNECT), (confinement.bind_ports, _BIND)):
            for port in ports:
                rule = struct.pack("=QQ", right, port)
                _check(libc.syscall(_ADD_RULE, ruleset, _RULE_PORT, rule, ctypes.c_uint32(0)), f"port {port}")
    _check(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "set no_new_privs")
    _check(libc.syscall(_RESTRICT_SELF, ruleset, ctypes.c_uint32(0)), "restrict the process")
    os.close(ruleset)


def _allow_path(ruleset: int, path: str, rights: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError):
        return  # what cannot be opened now cannot be read later either
    try:
        if not os.path.isdir(path):
            rights &= _FILE_ONLY
        rule = struct.pack("=Qi", rights, descriptor)
        _check(_libc().syscall(_ADD_RULE, ruleset, _RULE_PATH, rule, ctypes.c_uint32(0)), f"path {path}")
    finally:
        os.close(descriptor)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int, action: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"cannot {action}: {os.strerror(number)}")


@dataclass(frozen=True)
class Walls:
    """Which walls this machine offers for a confinement: Landlock's version (0: none), and why not the others."""

    landlock: int
    no_namespaces: str
    no_filter: str

    @classmethod
    def offered(cls, confinement: Confinement) -> Walls:
        """Find out by trying in a process of its own."""
        lacks_filter = "" if seccomp.offered() else "no seccomp filters for this kernel or processor"
        return cls(landlock_abi(), _try_namespaces(confinement), lacks_filter)

    def missing(self) -> list[str]:
        """What `confine = "require"` asks for in vain, in words."""
        lacks = [] if self.landlock else ["Landlock (not in this kernel)"]
        lacks += [f"namespaces ({self.no_namespaces})"] if self.no_namespaces else []
        return lacks + ([f"a filter of system calls ({self.no_filter})"] if self.no_filter else [])


def _try_namespaces(confinement: Confinement) -> str:
    """Make the namespaces as `_start` will, in a process that ends at once; why that failed, "" when it did not."""
    read, write = os.pipe()

    def attempt(act: Callable[[], object]) -> NoReturn:
        try:
            act()
        except BaseException as error:  # noqa: BLE001 - whatever it is, this process must end here and tell
            os.write(write, str(getattr(error, "strerror", "") or error).encode("utf-8", "replace")[:500])
        os._exit(0)

    def inside() -> None:
        namespaces.enter()
        first = os.fork()
        if first == 0:
            arguments = (confinement.readable, confinement.writable, confinement.tunnelled, confinement.agent)
            attempt(lambda: namespaces.build_root(*arguments))
        os.waitpid(first, 0)

    def try_all() -> None:
        if confinement.user:
            owner = _account(confinement.user)
            os.setgroups([])
            os.setgid(owner.pw_gid)
            os.setuid(owner.pw_uid)
        inside()

    child = os.fork()
    if child == 0:
        os.close(read)
        attempt(try_all)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        reason = pipe.read().decode("utf-8", "replace")
    os.waitpid(child, 0)
    return reason


def _start(confinement: Confinement, record: Record, group: Cgroup | None = None) -> subprocess.Popen[bytes]:
    """Start the command: own user if asked for, in its group, confined, killed when this process dies.

    Its output goes into the record.
    """
    off = confinement.mode == "off"
    walls = Walls(0, "off", "off") if off else Walls.offered(confinement)
    if confinement.mode == "require" and walls.missing():
        raise OSError(f"the site's configuration requires what this machine lacks: {', '.join(walls.missing())}")
    near, far = socket.socketpair()

    procs_fd = group.open_procs() if group else -1

    def restrict() -> None:
        try:
            near.close()  # so that to hand sockets to a keeper that is gone fails
            if procs_fd >= 0:
                os.write(procs_fd, b"0")
            limit_itself()
            if confinement.tasks:
                limit_tasks(confinement.tasks)
            die_with_parent()
            if not walls.no_namespaces:
                _move_inside(confinement, far)
            drop_capabilities()
            if walls.landlock:
                confine(confinement)
            if not walls.no_filter:
                seccomp.restrict(pretend=bool(walls.no_namespaces))
            if not walls.no_namespaces:
                _leave_to_child()
        except OSError as error:
            os.write(2, f"cannot confine the untrusted half: {error}\n".encode())
            raise

    owner = _account(confinement.user) if confinement.user else None
    try:
        process = subprocess.Popen(
            confinement.command,
            env=confinement.environment,
            cwd="/" if not walls.no_namespaces else confinement.directory,
            stdin=subprocess.DEVNULL,
            stdout=record.entrance,
            stderr=record.entrance,
            close_fds=True,
            preexec_fn=restrict,
            user=owner.pw_uid if owner else None,
            group=owner.pw_gid if owner else None,
            extra_groups=[] if owner else None,
        )
    finally:
        os.close(record.entrance)
        far.close()
        if procs_fd >= 0:
            os.close(procs_fd)
    if not walls.no_namespaces:
        targets: list[Target] = [("127.0.0.1", port) for port in confinement.tunnelled]
        targets += [confinement.agent] if confinement.agent else []
        _, descriptors, _, _ = socket.recv_fds(near, 1, len(targets) + 1)
        listeners = [socket.socket(fileno=descriptor) for descriptor in descriptors]
        forward(list(zip(listeners, targets, strict=True)))
    near.close()
    return process


def _move_inside(confinement: Confinement, keeper: socket.socket) -> None:
    """Go on as the first process of new namespaces, and hand what listens there to the keeper.

    The process that was called stays outside and ends with the one inside.
    """
    namespaces.enter()
    first = os.fork()
    if first:
        _stand_for(first)
    die_with_parent()
    listening = namespaces.build_root(
        confinement.readable, confinement.writable, confinement.tunnelled, confinement.agent
    )
    socket.send_fds(keeper, [b"."], [listener.fileno() for listener in listening])
    for listener in listening:
        listener.close()
    os.chdir(confinement.directory)  # the former working directory still leads to the machine's files


def _leave_to_child() -> None:
    """Go on in a child; the first process of the namespaces reaps orphans, and when it ends all end with it."""
    child = os.fork()
    if child:
        _stand_for(child)


def _stand_for(child: int) -> NoReturn:
    """Pass SIGTERM on to `child`, reap whoever else comes, and end as it does."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda _number, _frame: os.kill(child, signal.SIGTERM))
    os.closerange(0, os.sysconf("SC_OPEN_MAX"))
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def _account(user: str) -> pwd.struct_passwd:
    try:
        return pwd.getpwnam(user)
    except KeyError:
        raise OSError(f"there is no user {user!r} on this machine") from None


def _end_all(group: Cgroup | None) -> None:
    if group is not None:
        group.end()
    kill_descendants()


def main() -> int:
    """Keep one confined command, or say which walls there are; return the exit status.

    The process that was started guards the one that keeps the command: whatever that one leaves when it is killed,
    comes to the guard. When the guard is killed, the other one ends all and itself.
    """
    if "--walls" in sys.argv[1:]:
        print(json.dumps(asdict(Walls.offered(_ordered()))))
        return 0
    _libc().prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    forbid_inspection()
    raise_file_limit()
    guard, ends = os.getpid(), {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    keeper = os.fork()
    if keeper == 0:
        die_with_parent(signal.SIGTERM)
        if os.getppid() != guard:
            os._exit(1)
        return _keep(ends)
    for number in ends:
        signal.signal(number, lambda _number, _frame: os.kill(keeper, signal.SIGTERM))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ends)
    os.close(0)
    while (ended := os.wait())[0] != keeper:
        pass
    kill_descendants()
    return min(abs(os.waitstatus_to_exitcode(ended[1])), 125)


def _ordered() -> Confinement:
    """The confinement on standard input; SystemExit when it ends before."""
    line = b""
    while not line.endswith(b"\n"):
        block = os.read(0, 1)
        if not block:
            raise SystemExit(1)
        line += block
    return Confinement(**json.loads(line))


def _keep(ends: set[signal.Signals]) -> int:
    """Start the command and wait for its end, the agent's, or one of the signals, which are blocked until here."""
    _libc().prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    forbid_inspection()
    stop_read, stop_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(stop_write, warn_on_full_buffer=False)
    for number in (*ends, signal.SIGCHLD):
        signal.signal(number, lambda _number, _frame: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ends)
    confinement = _ordered()
    group = Cgroup.make(confinement.directory, limited=confinement.tasks > 0)
    try:
        record = Record(Path(confinement.log))
        process = _start(confinement, record, group)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: no thread for the forwarder
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        print(f"it cannot be started: {why}", file=sys.stderr, flush=True)
        _end_all(group)
        return 1
    status: int | None = None
    sources = [0, stop_read, record.pipe]
    while status is None:
        ready, _, _ = select.select(sources, [], [], 5.0)
        if record.pipe in ready and not record.take():
            sources.remove(record.pipe)
        if 0 in ready and not os.read(0, 1):
            break
        if stop_read in ready and ends & set(os.read(stop_read, 256)):
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(_STOP_S)
            break
        status = process.poll()
        reap_orphans(process.pid)
    _end_all(group)
    while record.take():
        pass
    return 0 if status is None else min(abs(status), 125)


if __name__ == "__main__":
    sys.exit(main())
