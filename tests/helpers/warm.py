"""A warm interpreter for tests: a site's commands, and scripts, as forks of a process that has imported PyTorch.

A forked command is a process of its own, with its own pid, arguments, environment, directory, output, signals and end,
and runs the product from its first line; only the seconds of importing PyTorch and Transformers are not spent again.
Where an interpreter's own start matters (its search path, its user, a limit), a test starts one instead.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

MODULES = {"fl-client": "fl_client.cli.client", "fl-model": "fl_client.cli.model", "fl-audit": "fl_shared.audit.cli"}
IMPORTED = (
    "fl_client.agent.main", "fl_client.agent.check", "fl_client.agent.alone", "fl_client.agent.evaluation",
    "fl_client.training.round", "fl_client.model.load", "transformers.models.deepseek_v3.modeling_deepseek_v3",
)  # fmt: skip


class Forked:
    """A command that was forked: what tests use of `subprocess.Popen`."""

    def __init__(self, command: str, pid: int, status: int, output: IO[str], errors: IO[str]) -> None:
        self._command, self.pid = command, pid
        self.returncode: int | None = None
        self._status, self._output, self._errors = status, output, errors
        self._said: tuple[str, str] | None = None

    def poll(self) -> int | None:
        """Its exit status, minus the signal that ended it, or None while it runs."""
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self.returncode = os.waitstatus_to_exitcode(int(os.read(self._status, 16)))
            os.close(self._status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; subprocess.TimeoutExpired when it takes longer."""
        if self.returncode is None and not select.select([self._status], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(self._command, timeout or 0)
        status = self.poll()
        assert status is not None
        return status

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; what it printed, and what it printed as errors if these go elsewhere."""
        self.wait(timeout)
        if self._said is None:
            said = []
            for kept in (self._output, self._errors):
                with kept:
                    kept.seek(0)
                    said.append(kept.read())
            self._said = said[0], said[1]
        return self._said

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """kill -9."""
        self.send_signal(signal.SIGKILL)


@functools.cache
def _interpreter() -> socket.socket:
    """The socket to this process's warm interpreter, which ends with it."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    subprocess.Popen([sys.executable, __file__, str(its.fileno())], pass_fds=[its.fileno()], stdin=subprocess.DEVNULL)
    its.close()
    atexit.register(ours.close)
    return ours


def start(command: str, *words: str, env: Mapping[str, str], cwd: Path | None = None, together: bool = False) -> Forked:
    """Start a command, or a script that is named by its path; `together`: its errors go where its output goes."""
    output, errors = (tempfile.TemporaryFile("w+", encoding="utf-8") for _ in range(2))  # noqa: SIM115 - read after its end
    status, told = os.pipe()
    with open(os.devnull, "rb") as nothing:
        files = [nothing.fileno(), output.fileno(), (output if together else errors).fileno(), told]
        order = json.dumps(
            {"words": [command, *words], "environment": dict(env), "directory": str(cwd or Path.cwd())}
        ).encode()
        socket.send_fds(_interpreter(), [order], files)
    os.close(told)
    return Forked(command, int(_interpreter().recv(16)), status, output, errors)


def run(
    command: str, *words: str, env: Mapping[str, str], cwd: Path | None = None, timeout: float = 120.0
) -> subprocess.CompletedProcess[str]:
    """Run a command, or a script that is named by its path, to its end."""
    process = start(command, *words, env=env, cwd=cwd)
    try:
        output, errors = process.communicate(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess([command, *words], process.wait(), output, errors)


def _serve(orders: socket.socket) -> dict[str, Any] | None:
    """Fork for each order. In a child: its order. In the interpreter, once nobody orders any more: None."""
    with selectors.DefaultSelector() as waiting:
        waiting.register(orders, selectors.EVENT_READ)
        while True:
            for key, _ in waiting.select():
                if key.fileobj is not orders:
                    waiting.unregister(key.fd)
                    os.close(key.fd)
                    _tell(*key.data)
                    continue
                text, files, _, _ = socket.recv_fds(orders, 1 << 20, 4)
                if not text:
                    return None
                pid = os.fork()
                if pid == 0:
                    for number, file in enumerate(files[:3]):
                        os.dup2(file, number)
                    orders.close()
                    others = [fd for one in waiting.get_map().values() if one.data for fd in (one.fd, one.data[1])]
                    for file in [*files, *others]:
                        os.close(file)
                    order: dict[str, Any] = json.loads(text)
                    return order
                for file in files[:3]:
                    os.close(file)
                waiting.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, files[3]))
                orders.send(str(pid).encode())


def _tell(pid: int, told: int) -> None:
    """How a child has ended, to who started it."""
    _, status = os.waitpid(pid, 0)
    os.write(told, str(status).encode())
    os.close(told)


def main() -> None:
    """Import, then fork for each order until the tests' process ends."""
    gc.disable()
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()
    order = _serve(socket.socket(fileno=int(sys.argv[1])))
    if order is not None:
        gc.enable()
        os.environ.clear()
        os.environ.update(order["environment"])
        os.chdir(order["directory"])
        sys.argv = order["words"]
        sys.path[0] = order["directory"]
        if sys.argv[0] in MODULES:
            runpy.run_module(MODULES[sys.argv[0]], run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = str(Path(sys.argv[0]).parent)
            runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
