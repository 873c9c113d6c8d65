"""Linux namespaces for the untrusted half: user, network, process, mount and IPC, a world of its own.

Inside there is one network interface, an empty loopback; no process but its own; and a file system that holds what the
confinement names and nothing else, so that other files cannot even be asked for their size. It needs no privilege,
only a kernel that lets ordinary users make user namespaces. What is to be reached outside comes in as a listening
socket that this side hands to its keeper (`fl_client.node.forwarder`).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

_NAMESPACES = 0x00020000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000  # mount, IPC, user, process, network
_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442  # the same numbers on every architecture
_AT_FDCWD, _AT_RECURSIVE, _AT_EMPTY_PATH = -100, 0x8000, 0x1000
_TREE_CLONE, _MOVE_EMPTY_PATH, _READ_ONLY = 1, 4, 1
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_PRIVATE, _MNT_DETACH = 1, 2, 4, 8, 0x4000, 0x40000, 2
_PR_SET_DUMPABLE = 4
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_BASE = "/tmp"  # noqa: S108 - mounted over in a mount namespace that nobody else sees: the new root grows there
_PROC = "/proc"


def enter() -> None:
    """Move the calling process into new namespaces; its next child is the first process there. OSError if refused."""
    libc = _libc()
    user, group = os.geteuid(), os.getegid()
    libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)  # an undumpable process may not write its own maps
    _check(libc.unshare(_NAMESPACES), "make namespaces")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP))


def build_root(readable: list[str], writable: list[str], ports: list[int], unix: str) -> list[socket.socket]:
    """Make the namespaces' only file system, and return listening sockets for `ports` and, if given, `unix`.

    To be called by the first process inside. Paths that do not exist are left out. The working directory is the new
    root afterwards. Raises OSError when the kernel refuses a step.
    """
    libc = _libc()
    _check(libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None), "part with the machine's mounts")
    trees: dict[str, tuple[int, bool]] = {}
    links: dict[str, str] = {}
    for paths, read_only in ((readable, True), (writable, False)):
        for path in paths:
            links.update(_links(path))
            real = os.path.realpath(path)
            if real != _PROC and os.access(real, os.F_OK) and not _covered(real, trees, read_only):
                directory = os.path.isdir(real)  # a device is written through a read-only mount, and keeps its mode
                trees[real] = (_tree(real, read_only or not directory), directory)
    proc = _tree(_PROC, True)
    _check(libc.mount(b"tmpfs", _BASE.encode(), b"tmpfs", _MS_NOSUID | _MS_NODEV, b"mode=0755"), "mount a new root")
    for link, target in links.items():
        if not _covered(link, trees, True):
            os.makedirs(_BASE + os.path.dirname(link), exist_ok=True)
            with contextlib.suppress(FileExistsError):
                os.symlink(target, _BASE + link)
    for real in sorted(trees, key=len):
        _attach(*trees[real], _BASE + real)
    os.makedirs(_BASE + _PROC, exist_ok=True)
    flags = _MS_RDONLY | _MS_NOSUID | _MS_NODEV | _MS_NOEXEC  # /proc/sys is the machine's, and root here is root there
    if libc.mount(b"proc", (_BASE + _PROC).encode(), b"proc", flags, None):
        _attach(proc, True, _BASE + _PROC)  # in a container whose /proc is masked: the masked one
    os.close(proc)
    os.chdir(_BASE)
    _check(libc.syscall(_PIVOT_ROOT[os.uname().machine], b".", b"."), "change the root")
    _check(libc.umount2(b".", _MNT_DETACH), "let the old root go")
    os.chdir("/")
    listening = [_listen_tcp(port) for port in ports] + ([_listen_unix(unix)] if unix else [])
    _set_read_only(_AT_FDCWD, b"/", 0)
    return listening


def _links(path: str) -> Iterator[tuple[str, str]]:
    """The symbolic links that lie on the way to `path`: place (itself free of links) and target."""
    for _ in range(40):
        parts = Path(path).parts
        for count in range(2, len(parts) + 1):
            place = os.path.join(*parts[:count])
            if os.path.islink(place):
                target = os.readlink(place)
                yield place, target
                path = os.path.normpath(os.path.join(os.path.dirname(place), target, *parts[count:]))
                break
        else:
            return


def _covered(path: str, trees: dict[str, tuple[int, bool]], read_only: bool) -> bool:
    """Whether `path` is in the new root already, with the rights that it needs."""
    return path in trees or (read_only and any(path.startswith(tree.rstrip("/") + "/") for tree in trees))


def _tree(path: str, read_only: bool) -> int:
    """A copy of the mounts at and below `path`, as a descriptor."""
    flags = _TREE_CLONE | _AT_RECURSIVE | os.O_CLOEXEC
    tree: int = _libc().syscall(_OPEN_TREE, _AT_FDCWD, os.fsencode(path), ctypes.c_uint32(flags))
    _check(tree, f"copy the mount of {path}")
    if read_only:
        _set_read_only(tree, b"", _AT_EMPTY_PATH | _AT_RECURSIVE)
    return tree


def _set_read_only(descriptor: int, path: bytes, flags: int) -> None:
    attributes = struct.pack("=QQQQ", _READ_ONLY, 0, 0, 0)
    result = _libc().syscall(
        _MOUNT_SETATTR, descriptor, path, ctypes.c_uint32(flags), attributes, ctypes.c_size_t(len(attributes))
    )
    _check(result, "make a mount read-only")


def _attach(tree: int, directory: bool, place: str) -> None:
    if directory:
        os.makedirs(place, exist_ok=True)
    elif not os.path.exists(place):
        os.makedirs(os.path.dirname(place), exist_ok=True)
        os.close(os.open(place, os.O_WRONLY | os.O_CREAT, 0o600))
    flags = ctypes.c_uint32(_MOVE_EMPTY_PATH)
    _check(_libc().syscall(_MOVE_MOUNT, tree, b"", _AT_FDCWD, os.fsencode(place), flags), f"attach {place}")


def _listen_tcp(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(64)
    return listener


def _listen_unix(path: str) -> socket.socket:
    """Listen where the other side's socket lies outside; in its directory there is nothing of the machine's but what
    was attached."""
    place = os.path.dirname(path)
    if os.path.isdir(place) and os.statvfs(place).f_flag & os.ST_RDONLY:
        _check(_libc().mount(b"tmpfs", os.fsencode(place), b"tmpfs", _MS_NOSUID | _MS_NODEV, b"mode=0755"), place)
    os.makedirs(place, exist_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    return listener


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int, action: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"cannot {action}: {os.strerror(number)}")
