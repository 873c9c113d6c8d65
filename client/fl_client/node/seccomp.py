"""The system calls that the untrusted half may not make: a seccomp filter of our own, put together here.

It closes what Landlock and namespaces leave open: sockets other than TCP and Unix streams (UDP, MPTCP, netlink,
vsock), data in a TCP handshake, io_uring, new namespaces and mounts, leases on files (whoever opens one then waits),
and reading or steering other processes. Where no
mount namespace keeps other files out of reach, changes of modes, owners, times and attributes are answered as done and
not done: Flower copies its app with them and stops at a refusal. Numbers that are newer than this file do not exist for
the caller, nor does another ABI than the machine's own (i386, x32).
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_*
_COLUMN = {"x86_64": 0, "aarch64": 1}

# Number on x86_64 and on aarch64; None where the call does not exist. tests/client/test_seccomp.py holds them
# against the kernel's headers.
FORBIDDEN: dict[str, tuple[int | None, int | None]] = {
    # other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "process_mrelease": (448, 448), "kcmp": (312, 272), "pidfd_getfd": (438, 438),
    "setpriority": (141, 140), "ioprio_set": (251, 30), "migrate_pages": (256, 238), "move_pages": (279, 239),
    "perf_event_open": (298, 241),
    # ways around the other walls
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "bpf": (321, 280),
    "io_setup": (206, 0), "userfaultfd": (323, 282),
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    # other files
    "inotify_init": (253, None), "inotify_init1": (294, 26), "inotify_add_watch": (254, 27),
    "fanotify_init": (300, 262), "fanotify_mark": (301, 263),
    # memory and queues shared by key or name
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "semget": (64, 190), "semop": (65, 193),
    "semctl": (66, 191), "semtimedop": (220, 192), "msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188),
    "msgctl": (71, 187), "mq_open": (240, 180), "mq_unlink": (241, 181),
    # the machine
    "swapon": (167, 224), "swapoff": (168, 225), "reboot": (169, 142), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "acct": (163, 89), "quotactl": (179, 60), "quotactl_fd": (443, 443), "syslog": (103, 116), "vhangup": (153, 58),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "clock_adjtime": (305, 266), "adjtimex": (159, 171),
    "sethostname": (170, 161), "setdomainname": (171, 162), "lookup_dcookie": (212, 18), "modify_ldt": (154, None),
    "iopl": (172, None), "ioperm": (173, None),
}  # fmt: skip
ATTRIBUTES: dict[str, tuple[int | None, int | None]] = {
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "lchown": (94, None), "fchown": (93, 55), "fchownat": (260, 54),
    "utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
}  # fmt: skip
"""Calls that change what is known about a file; Landlock says nothing about them."""

CHECKED: dict[str, tuple[int, int]] = {
    "socket": (41, 198), "socketpair": (53, 199), "sendto": (44, 206), "sendmsg": (46, 211), "sendmmsg": (307, 269),
    "clone": (56, 220), "clone3": (435, 435), "prlimit64": (302, 261), "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119), "sched_setparam": (142, 118), "sched_setattr": (314, 274), "fcntl": (72, 25),
}  # fmt: skip
_FIRST_UNKNOWN = 463  # setxattrat, and what came after it; x32 numbers are far above

_LOAD, _AND, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06  # classic BPF, 32 bits
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
_NEW_NAMESPACES = 0x7E020000  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
_FASTOPEN = 0x20000000
_SET_LEASE, _NOTIFY = 1024, 1026  # F_SETLEASE, with which every other opening of a file waits 45 s, and F_NOTIFY
_UNIX, _INET, _INET6, _STREAM, _TCP = 1, 2, 10, 1, 6
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _MODE_FILTER = 22, 38, 2

_Step = tuple[int, int, int, int]  # code, jump if true, jump if false, operand


def offered() -> bool:
    """Whether this machine has an architecture that the filter knows, and a kernel that takes filters."""
    with open("/proc/self/status", "rb") as status:
        return platform.machine() in _ARCHITECTURES and b"\nSeccomp:" in status.read()


def program(machine: str, *, pretend: bool) -> list[_Step]:
    """Return the filter for `machine` as classic BPF instructions; KeyError for an architecture that it lacks.

    With `pretend`, the calls in `ATTRIBUTES` do nothing and say that they did; without, they are let through.
    """
    column = _COLUMN[machine]
    deny, allow = _give(_ERROR | errno.EPERM), _give(_ALLOW)
    steps = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, _ARCHITECTURES[machine]), _give(_KILL)]
    steps += [(_LOAD, 0, 0, _NUMBER), (_AT_LEAST, 0, 1, _FIRST_UNKNOWN), _give(_ERROR | errno.ENOSYS)]
    for group, answer in ((FORBIDDEN, deny), (ATTRIBUTES if pretend else {}, _give(_ERROR))):
        numbers = [pair[column] for pair in group.values()]
        for number in numbers:
            steps += [] if number is None else [(_EQUAL, 0, 1, number), answer]

    def case(name: str, *checks: _Step) -> None:
        nonlocal steps
        steps += [(_EQUAL, 0, len(checks), CHECKED[name][column]), *checks]

    case("clone3", _give(_ERROR | errno.ENOSYS))  # its flags lie in memory; libraries fall back to clone
    case("clone", _argument(0), (_ANY_BIT, 0, 1, _NEW_NAMESPACES), deny, allow)
    for name in ("prlimit64", "sched_setaffinity", "sched_setscheduler", "sched_setparam", "sched_setattr"):
        case(name, _argument(0), (_EQUAL, 1, 0, 0), deny, allow)  # of the caller alone
    for name, place in (("sendto", 3), ("sendmsg", 2), ("sendmmsg", 3)):
        case(name, _argument(place), (_ANY_BIT, 0, 1, _FASTOPEN), deny, allow)
    case("fcntl", _argument(1), (_EQUAL, 1, 0, _SET_LEASE), (_EQUAL, 0, 1, _NOTIFY), deny, allow)
    stream = [_argument(1), (_AND, 0, 0, 0xF), (_EQUAL, 1, 0, _STREAM), deny]
    case("socketpair", _argument(0), (_EQUAL, 1, 0, _UNIX), deny, *stream, allow)
    case(
        "socket", *stream, _argument(0), (_EQUAL, 0, 1, _UNIX), allow, (_EQUAL, 2, 0, _INET), (_EQUAL, 1, 0, _INET6),
        deny, _argument(2), (_EQUAL, 2, 0, 0), (_EQUAL, 1, 0, _TCP), deny, allow,
    )  # fmt: skip
    return [*steps, allow]


def restrict(*, pretend: bool) -> None:
    """Put the filter (see `program`) on the caller and all that it starts, for good. Raises OSError when refused."""
    steps = program(platform.machine(), pretend=pretend)
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    bundle = struct.pack("@HP", len(steps), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, bundle, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, "cannot restrict the system calls")


def _give(answer: int) -> _Step:
    return _RETURN, 0, 0, answer


def _argument(place: int) -> _Step:
    """Load the low half of an argument; these calls take 32-bit numbers (both machines are little-endian)."""
    return _LOAD, 0, 0, _ARGUMENTS + 8 * place
