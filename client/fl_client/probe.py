"""What a hostile app would try first, tried: `fl-client check` runs this text confined as the SuperNode is.

It is started with `python -c` (the walled side does not see this package), so it needs the standard library alone. It
prints one JSON object: for each attempt "" when the wall held, else what was open. Nothing is changed: files are opened
and not written, and what would change something is tried on the decoys that `fl_client.walls` put up.
"""

import ctypes
import errno
import json
import os
import resource
import socket
import sys

NEW_USER, ATTACH, MPTCP, FASTOPEN, IOV_BYTES = 0x10000000, 16, 262, 0x20000000, 16
NUMBERS = {  # x86_64, aarch64
    "io_uring_setup": (425, 425), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "bpf": (321, 280),
    "keyctl": (250, 219), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "mq_open": (240, 180),
}  # fmt: skip
libc = ctypes.CDLL(None, use_errno=True)
facts = json.loads(sys.argv[1])
pid, address = int(facts["pid"]), ("127.0.0.1", int(facts["tcp"]))
found = {}


def attempt(name, act):  # type: ignore[no-untyped-def]  # this text is run by itself, on whatever Python there is
    """Record what `act` got, or that it was refused."""
    try:
        got = act()
        found[name] = "" if got is None else str(got)
    except OSError:
        found[name] = ""


def system(name, *arguments):  # type: ignore[no-untyped-def]
    """Make a system call by number; OSError when it fails."""
    number = NUMBERS[name][os.uname().machine == "aarch64"]
    result = libc.syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    return result


def opened(path, flags):  # type: ignore[no-untyped-def]
    """Open and close a file; no byte is read or written."""
    os.close(os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC))
    return "it could be opened"


def done(result, words="it was done"):  # type: ignore[no-untyped-def]
    """The words for a C function's success; OSError for its failure."""
    if result == -1:
        raise OSError(ctypes.get_errno(), words)
    return words


def connected(family, kind, protocol, place):  # type: ignore[no-untyped-def]
    """Connect a new socket."""
    with socket.socket(family, kind, protocol) as made:
        made.settimeout(3)
        made.connect(place)
        return "it connected"


def sent(kind, flags, place, family=socket.AF_INET):  # type: ignore[no-untyped-def]
    """Send a datagram, or data with the first packet of a connection."""
    with socket.socket(family, kind) as made:
        made.settimeout(3)
        made.sendto(b"probe", flags, place)
        return "it was sent"


def paired():  # type: ignore[no-untyped-def]
    """Send by name through a pair that was made without a name."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    near.sendto(b"probe", facts["datagrams"])
    return "it was sent"


def listening():  # type: ignore[no-untyped-def]
    """Listen without bind; of no use to anybody in a network of one's own."""
    with socket.socket() as made:
        made.listen(1)
        here = os.readlink("/proc/self/ns/net")
        return "the machine's network can connect" if here == facts["network"] else None


def memory(call):  # type: ignore[no-untyped-def]
    """Read or write a byte of another process."""
    mine = ctypes.create_string_buffer(8)
    one = (ctypes.c_void_p * 2)(ctypes.addressof(mine), 1)
    other = (ctypes.c_void_p * 2)(int(facts["address"]), 1)
    return done(system(call, pid, one, ctypes.c_ulong(1), other, ctypes.c_ulong(1), ctypes.c_ulong(0)))


def borrowed():  # type: ignore[no-untyped-def]
    """Take over a descriptor of another process."""
    handle = system("pidfd_open", pid, 0)
    return f"descriptor {system('pidfd_getfd', handle, 0, 0)}"


def limits():  # type: ignore[no-untyped-def]
    """Set another process's limit to what it is."""
    now = resource.prlimit(pid, resource.RLIMIT_CORE)
    return done(resource.prlimit(pid, resource.RLIMIT_CORE, now), "it was set") if now else None


for label, path in facts["files"].items():
    attempt(f"read {label}", lambda path=path: opened(path, os.O_RDONLY))
    attempt(f"write {label}", lambda path=path: opened(path, os.O_WRONLY))
    attempt(f"see the size of {label}", lambda path=path: f"{os.stat(path).st_size} bytes")
decoy = facts["decoy"]
attempt("change a file's mode", lambda: os.chmod(decoy, 0o666) or "it was changed")
attempt("change a file's times", lambda: os.utime(decoy, (1, 1)) or "they were changed")
attempt("change a file's attributes", lambda: os.setxattr(decoy, "user.probe", b"1") or "they were changed")
attempt("delete a file", lambda: os.unlink(decoy) or "it was deleted")
attempt("link a file", lambda: os.link(decoy, "linked") or "it was linked")
attempt("watch a file", lambda: done(libc.inotify_add_watch(libc.inotify_init(), os.fsencode(decoy), 0xFFF)))
attempt("connect elsewhere by TCP", lambda: connected(socket.AF_INET, socket.SOCK_STREAM, 0, address))
attempt(
    "connect to the tunnel's port on another host",
    lambda: connected(socket.AF_INET, socket.SOCK_STREAM, 0, ("127.0.0.2", int(facts["port"]))),
)
attempt("connect by multipath TCP", lambda: connected(socket.AF_INET, socket.SOCK_STREAM, MPTCP, address))
attempt("send data with the first packet", lambda: sent(socket.SOCK_STREAM, FASTOPEN, address))
attempt("send a UDP datagram", lambda: sent(socket.SOCK_DGRAM, 0, ("127.0.0.1", int(facts["udp"]))))
attempt("send a UDP datagram by IPv6", lambda: sent(socket.SOCK_DGRAM, 0, ("::1", 9), socket.AF_INET6))
attempt("listen without an address", listening)
for family in ("NETLINK", "PACKET", "VSOCK", "ALG", "CAN", "BLUETOOTH", "QIPCRTR", "TIPC", "RDS"):
    value = getattr(socket, f"AF_{family}", None)
    if value is not None:
        kinds = (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET)
        for kind in kinds:
            name = f"open a socket of family {family}"
            if not found.get(name):
                attempt(name, lambda value=value, kind=kind: socket.socket(value, kind).close() or "it was opened")
attempt("connect to another Unix socket", lambda: connected(socket.AF_UNIX, socket.SOCK_STREAM, 0, facts["unix"]))
attempt("connect to an abstract socket", lambda: connected(socket.AF_UNIX, socket.SOCK_STREAM, 0, facts["abstract"]))
attempt("send to a Unix socket", lambda: sent(socket.SOCK_DGRAM, 0, facts["datagrams"], socket.AF_UNIX))
attempt("send to a Unix socket from a pair", paired)
attempt("signal the agent", lambda: os.kill(pid, 0) or "it can be killed")
attempt("trace the agent", lambda: done(libc.ptrace(ATTACH, pid, None, None)))
attempt("read the agent's memory", lambda: memory("process_vm_readv"))
attempt("write the agent's memory", lambda: memory("process_vm_writev"))
attempt("read the agent's memory as a file", lambda: opened(f"/proc/{pid}/mem", os.O_RDONLY))
attempt("read the agent's environment", lambda: opened(f"/proc/{pid}/environ", os.O_RDONLY))
attempt("see the agent's command line", lambda: open(f"/proc/{pid}/cmdline").read(4) and "it can be read")
attempt("reach files through the agent", lambda: os.listdir(f"/proc/{pid}/root") and "they can be listed")
attempt("take a descriptor of the agent", borrowed)
attempt("change the agent's limits", limits)
attempt("change the agent's priority", lambda: os.setpriority(os.PRIO_PROCESS, pid, 1) or "it was changed")
attempt("move the agent to another CPU", lambda: os.sched_setaffinity(pid, os.sched_getaffinity(pid)) or "it was moved")
attempt("use io_uring", lambda: done(system("io_uring_setup", 1, ctypes.create_string_buffer(120))))
attempt("load BPF", lambda: done(system("bpf", 0, ctypes.create_string_buffer(b"\2\0\0\0\4\0\0\0\4\0\0\0\1", 72), 72)))
attempt("use the user's keyring", lambda: done(system("keyctl", 0, -4, 1)))
attempt("open a message queue", lambda: done(system("mq_open", b"probe", os.O_RDWR | os.O_CREAT, 0o600, None)))
attempt("share memory by key", lambda: done(libc.shmget(0x5EC2E7, 4096, 0o1600)))
attempt("make a user namespace", lambda: done(libc.unshare(NEW_USER)))
attempt("mount something", lambda: done(libc.mount(b"none", b"/dev", b"tmpfs", 0, None)))
if os.uname().machine == "x86_64":
    attempt("call another ABI", lambda: done(libc.syscall(0x40000000 | 39), "it answered"))
works = {}
for label, act in (
    ("the tunnel", lambda: connected(socket.AF_INET, socket.SOCK_STREAM, 0, ("127.0.0.1", int(facts["port"])))),
    ("the agent's socket", lambda: connected(socket.AF_UNIX, socket.SOCK_STREAM, 0, facts["agent"])),
    ("its own directory", lambda: open("mine", "w").close()),
):
    try:
        act()
        works[label] = ""
    except OSError as error:
        works[label] = errno.errorcode.get(error.errno or 0, str(error))
print(json.dumps({"open": found, "works": works}))
