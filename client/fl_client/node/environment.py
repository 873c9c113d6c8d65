"""What the untrusted half and its keeper find around them: an environment built from nothing, and what may be read."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import fl_shared
from fl_shared.runtime.offline import OFFLINE

SYSTEM_READABLE = (
    "/usr", "/bin", "/lib", "/lib64", "/etc/ssl", "/etc/pki", "/etc/localtime", "/etc/ld.so.cache",
    "/etc/passwd", "/etc/group", "/etc/hosts", "/etc/resolv.conf", "/etc/nsswitch.conf",
    "/etc/os-release", "/dev/urandom", "/dev/random", "/proc", "/sys/devices/system/cpu",
)  # fmt: skip


def shared_source() -> Path | None:
    """Return the directory to put on PYTHONPATH for `fl_shared`, None when it is installed."""
    place = Path(fl_shared.__file__).resolve().parent.parent
    inside = any(place.is_relative_to(Path(prefix).resolve()) for prefix in (sys.prefix, sys.base_prefix))
    return None if inside else place


def node_environment(directory: Path) -> dict[str, str]:
    """Return the whole environment of the untrusted half; nothing is inherited."""
    environment = {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), "/usr/bin", "/bin"]),
        "HOME": str(directory),
        "TMPDIR": str(directory / "tmp"),
        "FLWR_HOME": str(directory / "flwr"),
        **OFFLINE,
        "PYTHONUNBUFFERED": "1",
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
    }
    source = shared_source()
    if source is not None:
        environment["PYTHONPATH"] = str(source)
    return environment


def keeper_environment() -> dict[str, str]:
    path = os.environ.get("PYTHONPATH")
    return {**OFFLINE, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", **({"PYTHONPATH": path} if path else {})}
