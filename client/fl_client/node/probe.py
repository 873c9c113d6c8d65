"""What a hostile app would try first, tried: `fl-client check` runs this text confined as the SuperNode is.

It is started with `python -c` (the walled side does not see this package), so it needs the standard library alone. It
prints one JSON object: for each attempt "" when the wall held, else what was open. Nothing is changed: files are opened
and not written, and what would change something is tried on the decoys that `fl_client.node.walls` put up.
"""

import ctypes
import errno
import fcntl
import json
import os
import resource
import socket
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

NEW_USER, SEIZE, MPTCP, FASTOPEN = 0x10000000, 0x4206, 262, 0x20000000
NUMBERS = {  # x86_64, aarch64
    "io_uring_setup": (425, 425), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "bpf": (321, 280),
    "io_setup": (206, 0), "keyctl": (250, 219),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "mq_open": (240, 180),
}  # fmt: skip
libc = ctypes.CDLL(None, use_errno=True)
targets = json.loads(sys.argv[1])
pid, address = int(targets["pid"]), ("127.0.0.1", int(targets["tcp"]))
attempts: dict[str, str] = {}


def attempt(name: str, act: Callable[[], object], words: str = "it was done") -> None:
    """Record what `act` got (its own words, else `words`), or that it was refused."""
    try:
        result = act()
        attempts[name] = result if isinstance(result, str) else words
    except OSError:
        attempts[name] = ""


def system(name: str, *arguments: object) -> int:
    """Make a system call by number; OSError when it fails."""
    number = NUMBERS[name][os.uname().machine == "aarch64"]
    result: int = libc.syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    return result


def opened(path: str, flags: int) -> str:
    """Open and close a file; no byte is read or written."""
    os.close(os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC))
    return "it could be opened"


def done(result: object, words: str = "it was done") -> str:
    """The words for a C function's success; OSError for its failure."""
    if result == -1:
        raise OSError(ctypes.get_errno(), words)
    return words


def connected(family: int, kind: int, protocol: int, place: Any) -> str:
    """Connect a new socket."""
    with socket.socket(family, kind, protocol) as channel:
        channel.settimeout(3)
        channel.connect(place)
        return "it connected"


def sent(kind: int, flags: int, place: Any, family: int = socket.AF_INET) -> str:
    """Send a datagram, or data with the first packet of a connection."""
    with socket.socket(family, kind) as channel:
        channel.sendto(b"probe", flags, place)
        return "it was sent"


def paired() -> str:
    """Send by name through a pair that was made without a name."""
    near, _far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    near.sendto(b"probe", targets["datagrams"])
    return "it was sent"


def listening() -> str:
    """Listen without bind; of no use to anybody in a network of one's own."""
    with socket.socket() as channel:
        channel.listen(1)
        return "the machine's network can connect" if os.readlink("/proc/self/ns/net") == targets["network"] else ""


def sized(path: str) -> str:
    """The size of a file that lies there."""
    return f"{os.stat(path).st_size} bytes"


def changed(act: Callable[[], None]) -> str:
    """Do something to the decoy, and see whether it was done."""

    def state() -> object:
        now = os.stat(decoy)
        return now.st_mode, now.st_mtime_ns, os.listxattr(decoy)

    before = state()
    act()
    return "it was changed" if state() != before else ""


def opened_socket(family: int, kind: int) -> str:
    """Open a socket."""
    socket.socket(family, kind).close()
    return "it was opened"


def memory(call: str) -> str:
    """Read or write a byte of another process."""
    mine = ctypes.create_string_buffer(8)
    one = (ctypes.c_void_p * 2)(ctypes.addressof(mine), 1)
    other = (ctypes.c_void_p * 2)(int(targets["address"]), 1)
    return done(system(call, pid, one, ctypes.c_ulong(1), other, ctypes.c_ulong(1), ctypes.c_ulong(0)))


def borrowed() -> str:
    """Take over a descriptor of another process."""
    handle = system("pidfd_open", pid, 0)
    return f"descriptor {system('pidfd_getfd', handle, 0, 0)}"


def queued() -> str:
    """Make a message queue, and remove it."""
    name = f"probe-{os.getpid()}".encode()
    os.close(system("mq_open", name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600, None))
    return done(libc.mq_unlink(b"/" + name), "it was made")


def shared() -> str:
    """Make a segment of shared memory, and remove it."""
    segment = libc.shmget(0, 4096, 0o1600)
    done(segment)
    return done(libc.shmctl(segment, 0, None), "it was made")


def leased() -> str:
    """Lease a file of one's own for a moment: whoever opens a leased file waits for up to 45 s."""
    with open("leased", "w", encoding="ascii") as mine:
        fcntl.fcntl(mine, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    return "it was leased"


def requests() -> str:
    """Take some of the machine's asynchronous requests, and give them back."""
    context = ctypes.c_ulong(0)
    system("io_setup", 1, ctypes.byref(context))
    libc.syscall(207 if os.uname().machine == "x86_64" else 1, context)
    return "they were taken"


def limits() -> str:
    """Set another process's limit to what it is."""
    now = resource.prlimit(pid, resource.RLIMIT_CORE)
    resource.prlimit(pid, resource.RLIMIT_CORE, now)
    return "it was set"


for label, path in targets["files"].items():
    attempt(f"read {label}", partial(opened, path, os.O_RDONLY))
    attempt(f"write {label}", partial(opened, path, os.O_WRONLY))
    attempt(f"see the size of {label}", partial(sized, path))
decoy = targets["decoy"]
attempt("change a file's mode", lambda: changed(lambda: os.chmod(decoy, 0o604)))
attempt("change a file's times", lambda: changed(lambda: os.utime(decoy, (1, 1))))
attempt("change a file's attributes", lambda: changed(lambda: os.setxattr(decoy, "user.probe", b"1")))
attempt("link a file", lambda: os.link(decoy, "linked"), "it was linked")
attempt("watch a file", lambda: done(libc.inotify_add_watch(libc.inotify_init(), os.fsencode(decoy), 0xFFF)))
attempt("delete a file", lambda: os.unlink(decoy), "it was deleted")
attempt("connect elsewhere by TCP", lambda: connected(socket.AF_INET, socket.SOCK_STREAM, 0, address))
attempt(
    "connect to the tunnel's port on another host",
    lambda: connected(socket.AF_INET, socket.SOCK_STREAM, 0, ("127.0.0.2", int(targets["port"]))),
)
attempt("connect by multipath TCP", lambda: connected(socket.AF_INET, socket.SOCK_STREAM, MPTCP, address))
attempt("send data with the first packet", lambda: sent(socket.SOCK_STREAM, FASTOPEN, address))
attempt("send a UDP datagram", lambda: sent(socket.SOCK_DGRAM, 0, ("127.0.0.1", int(targets["udp"]))))
attempt("send a UDP datagram by IPv6", lambda: sent(socket.SOCK_DGRAM, 0, ("::1", 9), socket.AF_INET6))
attempt("listen without an address", listening)
for family in ("NETLINK", "PACKET", "VSOCK", "ALG", "CAN", "BLUETOOTH", "QIPCRTR", "TIPC", "RDS"):
    value = getattr(socket, f"AF_{family}", None)
    if value is not None:
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET):
            name = f"open a socket of family {family}"
            if not attempts.get(name):
                attempt(name, partial(opened_socket, value, kind))
attempt("connect to another Unix socket", lambda: connected(socket.AF_UNIX, socket.SOCK_STREAM, 0, targets["unix"]))
attempt("connect to an abstract socket", lambda: connected(socket.AF_UNIX, socket.SOCK_STREAM, 0, targets["abstract"]))
attempt("send to a Unix socket", lambda: sent(socket.SOCK_DGRAM, 0, targets["datagrams"], socket.AF_UNIX))
attempt("send to a Unix socket from a pair", paired)
attempt("signal the agent", lambda: os.kill(pid, 0), "it can be killed")
attempt("trace the agent", lambda: done(libc.ptrace(SEIZE, pid, None, None)))
attempt("read the agent's memory", lambda: memory("process_vm_readv"))
attempt("write the agent's memory", lambda: memory("process_vm_writev"))
attempt("read the agent's memory as a file", lambda: opened(f"/proc/{pid}/mem", os.O_RDONLY))
attempt("read the agent's environment", lambda: opened(f"/proc/{pid}/environ", os.O_RDONLY))
attempt("see the agent among the processes", lambda: os.path.getsize(f"/proc/{pid}/cmdline"), "it is there")
attempt("reach files through the agent", lambda: os.listdir(f"/proc/{pid}/root"), "they can be listed")
attempt("take a descriptor of the agent", borrowed)
attempt("change the agent's limits", limits)
attempt("change the agent's priority", lambda: os.setpriority(os.PRIO_PROCESS, pid, 19), "it was changed")
attempt("move the agent to another CPU", lambda: os.sched_setaffinity(pid, os.sched_getaffinity(pid)), "it was moved")
attempt("use io_uring", lambda: done(system("io_uring_setup", 1, ctypes.create_string_buffer(120))))
attempt("load BPF", lambda: done(system("bpf", 0, ctypes.create_string_buffer(b"\2\0\0\0\4\0\0\0\4\0\0\0\1", 72), 72)))
attempt("use the user's keyring", lambda: done(system("keyctl", 0, -4, 1)))
attempt("open a message queue", queued)
attempt("share memory by key", shared)
attempt("hold up who opens a file", leased)
attempt("use up the machine's asynchronous requests", requests)
attempt("change the machine's settings", lambda: opened("/proc/sys/kernel/core_pattern", os.O_WRONLY))
attempt("survive when memory runs out", lambda: opened("/proc/self/oom_score_adj", os.O_WRONLY))
attempt("make a user namespace", lambda: done(libc.unshare(NEW_USER)))
attempt("mount something", lambda: done(libc.mount(b"none", b"/dev", b"tmpfs", 0, None)))
if os.uname().machine == "x86_64":
    attempt("call another ABI", lambda: done(libc.syscall(0x40000000 | 39), "it answered"))
works: dict[str, str] = {}
permitted: list[tuple[str, Callable[[], str]]] = [
    ("the tunnel", lambda: connected(socket.AF_INET, socket.SOCK_STREAM, 0, ("127.0.0.1", int(targets["port"])))),
    ("the agent's socket", lambda: connected(socket.AF_UNIX, socket.SOCK_STREAM, 0, targets["agent"])),
    ("its own directory", lambda: opened("mine", os.O_WRONLY | os.O_CREAT)),
]
for label, act in permitted:
    try:
        act()
        works[label] = ""
    except OSError as error:
        works[label] = errno.errorcode.get(error.errno or 0, str(error))
print(json.dumps({"open": attempts, "works": works}))
