"""Prove the walls around the untrusted half: confine a process as the SuperNode is and let it try to get out.

What it must not reach is really there: sockets that listen, a process of the same user, files of the same user, and the
site's own private files.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from fl_client.node.environment import SYSTEM_READABLE, keeper_environment, node_environment, shared_source
from fl_client.node.handover import account
from fl_client.node.sandbox import Confinement
from fl_shared.errors import ConfigError

_PROBE_S = 120.0
_STAND_IN = """
import ctypes, sys
byte = ctypes.create_string_buffer(8)
print(ctypes.addressof(byte), flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class Findings:
    """What the probe found: each attempt with "" or what was open, and each thing that must work with "" or why not."""

    open: dict[str, str]
    works: dict[str, str]


def require_apart(paths: Iterable[Path]) -> None:
    """ConfigError when one of these lies where the untrusted half must read to run at all (Python's environment, /usr).

    No wall can stand between a program and the directory that it runs from.
    """
    source = shared_source()
    trees = [sys.prefix, sys.base_prefix, *SYSTEM_READABLE, *([str(source)] if source else [])]
    for path in paths:
        for tree in trees:
            if path.resolve().is_relative_to(Path(tree).resolve()):
                raise ConfigError(
                    f"{path} lies in {tree}, which the untrusted half can read",
                    fix="move it out of there, to /var/lib/concordat/SITE or the like",
                )


def try_walls(files: dict[str, Path], mode: str, user: str = "") -> Findings:
    """Run the probe confined with `mode`, as `user` if given; `files` are what it must not reach, by name.

    Nothing of the site is changed. Raises ConfigError when the probe cannot be run.
    """
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="walls-")))
        home, outside = place / "home", place / "outside"
        home.mkdir(mode=0o700)
        outside.mkdir(mode=0o711)
        (outside / "decoy").write_text("a file of the same user")
        if user:
            owner = account(user)
            place.chmod(0o711)
            for path in (home, outside / "decoy"):
                os.chown(path, owner.pw_uid, owner.pw_gid)
        targets = stack.enter_context(_targets(place, outside, user))
        targets |= {"files": {name: str(path) for name, path in files.items()}, "decoy": str(outside / "decoy")}
        text = resources.files("fl_client.node").joinpath("probe.py").read_text("utf-8")
        confinement = Confinement(
            command=[sys.executable, "-I", "-c", text, json.dumps(targets)], environment=node_environment(home),
            directory=str(home), log=str(place / "probe.log"),
            readable=[sys.prefix, sys.base_prefix, *SYSTEM_READABLE], writable=[str(home), "/dev/null"],
            connect_ports=[int(targets["port"])], bind_ports=[], mode=mode, user=user, agent=str(targets["agent"]),
        )  # fmt: skip
        command = [sys.executable, "-P", "-m", "fl_client.node.sandbox"]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=keeper_environment(), cwd="/"
        ) as keeper:
            if keeper.stdin is None or keeper.stderr is None:
                raise RuntimeError("the keeper has no pipes")
            keeper.stdin.write(confinement.to_line())
            keeper.stdin.flush()
            try:
                keeper.wait(_PROBE_S)
            except subprocess.TimeoutExpired:
                keeper.kill()
            complaint = keeper.stderr.read().decode("utf-8", "replace").strip()
        record = place / "probe.log"
        lines = record.read_text("utf-8", "replace").splitlines() if record.exists() else []
    try:
        findings = json.loads(lines[-1])
        return Findings(findings["open"], findings["works"])
    except (IndexError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"the walls around the untrusted half cannot be tried: {complaint or ' '.join(lines[-3:]) or 'no answer'}",
            fix="see what the kernel lacks in docs/security.md, or report this as a defect",
        ) from None


@contextlib.contextmanager
def _targets(place: Path, outside: Path, user: str) -> Iterator[dict[str, Any]]:
    """Listening sockets and a process of the same user, and where they are."""
    with contextlib.ExitStack() as stack:

        def listen(family: int, kind: int, address: Any) -> socket.socket:
            listener = stack.enter_context(socket.socket(family, kind))
            listener.bind(address)
            if kind == socket.SOCK_STREAM:
                listener.listen()
            if isinstance(address, str) and not address.startswith("\0"):
                os.chmod(address, 0o777)  # noqa: S103 - a decoy in a directory of this test: only walls may hold it
            return listener

        stream, datagrams = socket.SOCK_STREAM, socket.SOCK_DGRAM
        tunnel = listen(socket.AF_INET, stream, ("127.0.0.1", 0))
        port = int(tunnel.getsockname()[1])
        with contextlib.suppress(OSError):  # in use there: then the attempt proves nothing, and harms nothing
            listen(socket.AF_INET, stream, ("127.0.0.2", port))
        tcp = listen(socket.AF_INET, stream, ("127.0.0.1", 0)).getsockname()[1]
        udp = listen(socket.AF_INET, datagrams, ("127.0.0.1", 0)).getsockname()[1]
        abstract = "\0walls-" + secrets.token_hex(8)
        listen(socket.AF_UNIX, stream, abstract)
        run = place / "run"
        run.mkdir(mode=0o711)
        listen(socket.AF_UNIX, stream, str(run / "agent.sock"))
        listen(socket.AF_UNIX, stream, str(outside / "u"))
        listen(socket.AF_UNIX, datagrams, str(outside / "d"))
        agent = subprocess.Popen(
            [sys.executable, "-I", "-c", _STAND_IN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            user=user or None,
        )  # fmt: skip
        stack.callback(agent.communicate)
        stack.callback(agent.kill)
        if agent.stdout is None:
            raise RuntimeError("the stand-in has no pipe")
        yield {
            "pid": agent.pid, "address": int(agent.stdout.readline()), "tcp": tcp, "udp": udp, "port": port,
            "unix": str(outside / "u"), "datagrams": str(outside / "d"), "abstract": abstract,
            "agent": str(run / "agent.sock"), "network": os.readlink("/proc/self/ns/net"),
        }  # fmt: skip
