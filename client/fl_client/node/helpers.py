"""Supervise the two helper processes of a site: the tunnel (trusted) and the SuperNode (not). Both end when the agent
does, however it ends.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time

from fl_client.node.spec import NodeSpec
from fl_client.node.supernode import hand_over, start_node
from fl_client.node.tunnel_settings import NODE_LEFT, READY, TunnelSettings
from fl_shared.errors import ConcordatError, ConfigError
from fl_shared.runtime.offline import OFFLINE
from fl_shared.runtime.threads import Loop

_TUNNEL_WAIT_S = 30.0
_PROVEN_S = 10.0  # after a failure a process that runs for so long is well again
_STOP_S = 30.0  # a keeper that has much to kill needs its time


def listen_loopback(port: int = 0) -> socket.socket:
    """Return a listening loopback socket; the tunnel inherits it, so that restarts lose no port."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"[supernode] tunnel_port = {port} cannot be used: {error.strerror}",
            fix="choose another port, or 0 to let the system choose",
        ) from None
    listener.listen(64)
    return listener


class Helpers:
    """Keeps the tunnel and, if a spec is given, the SuperNode running until `stop`.

    A process that dies, or that cannot be started, is started again after 1 s, then 2 s, up to 30 s; the wait starts
    over after a minute of life. So is a SuperNode that has deactivated itself (after an answer that it does not
    understand it does so, and then lives on without ever asking for work again), or that keeps a reply to itself
    (`fl_client.node.fleet.PendingReplies`).
    """

    def __init__(
        self, settings: TunnelSettings, listener: socket.socket, spec: NodeSpec | None, *, launch: bool = True
    ) -> None:
        """Take what the processes need; nothing is started before `start`.

        Without `launch` another service runs the SuperNode by the saved spec (`run_alone`).
        """
        self._settings = settings
        self._listener = listener
        self._spec = spec
        self._launch_node = launch and spec is not None
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._tunnel_ready = threading.Event()
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._began: dict[str, float] = {}
        names = ["tunnel"] + (["supernode"] if self._launch_node else [])
        self._loops = {name: Loop(name, functools.partial(self._life, name)) for name in names}

    def start_tunnel(self) -> None:
        """Start the tunnel; it may come up while the model loads."""
        self._loops["tunnel"].start()

    def start_node(self) -> None:
        """Start the SuperNode, if there is a spec for one, as soon as the tunnel is ready.

        A SuperNode that finds nobody backs off for many seconds, so it is worth waiting.
        """
        if self._launch_node:
            self._loops["supernode"].start()

    def _node_left(self) -> None:
        """End the SuperNode that has deactivated itself; whoever keeps it starts the next one."""
        if self._stopping.is_set() or self._spec is None:
            return
        if not self._launch_node:
            self._spec.save()
            return
        with self._lock:
            node = self._running.get("supernode")
        if node is not None:
            node.terminate()

    def pids(self) -> dict[str, int]:
        """Return the process ids of what runs now, by name."""
        with self._lock:
            return {name: process.pid for name, process in self._running.items()}

    def states(self) -> dict[str, bool]:
        """Return for each process that should run whether it does."""
        running = self.pids()
        return {name: name in running for name in self._loops}

    def problems(self) -> list[str]:
        """What does not run, or has only just been started again, and why, in one line each."""
        problems = []
        for name, runs in self.states().items():
            why = self._loops[name].problem()
            young = time.monotonic() - self._began.get(name, 0.0) < _PROVEN_S
            if not runs or (why and young):
                problems.append(f"the {name} does not run" + (f": {why}" if why else ""))
        return problems

    def stop(self) -> None:
        """End both processes and everything that they started."""
        self._stopping.set()
        for loop in self._loops.values():
            loop.stopping.set()
        self._tunnel_ready.set()
        with self._lock:
            running = [self._running[name] for name in ("supernode", "tunnel") if name in self._running]
        for process in running:
            process.terminate()
        for process in running:
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
        for loop in self._loops.values():
            loop.stop(5)
        self._listener.close()

    def _life(self, name: str) -> float | None:
        """One life of a process, from its start to its end. Raises what kept it from starting, or Ended."""
        if name == "supernode":
            self._tunnel_ready.wait(_TUNNEL_WAIT_S)
        if self._stopping.is_set():
            return None
        process = self._launch(name)
        with self._lock:
            self._running[name] = process
            self._began[name] = time.monotonic()
        if self._stopping.is_set():
            process.terminate()
        last = ""
        try:
            for raw in process.stdout or ():
                line = raw.decode("utf-8", "replace").strip()
                if line == READY:
                    self._tunnel_ready.set()
                elif line == NODE_LEFT:
                    self._node_left()
                elif line:
                    last = line
                    logging.getLogger(f"fl_client.{name}").info(line)
            status = process.wait()
        except BaseException:
            process.terminate()  # nobody would keep it: the next life starts another
            raise
        finally:
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
            with self._lock:
                self._running.pop(name, None)
        where = last if last else "see supernode.log in its directory" if name == "supernode" else ""
        raise Ended(f"it ended with status {status}" + (f": {where[:200]}" if where else ""), fix="see its log")

    def _launch(self, name: str) -> subprocess.Popen[bytes]:
        if name == "tunnel":
            inherited = {k: v for k, v in os.environ.items() if re.fullmatch(r"(?i)(https|no|all)_proxy|PYTHONPATH", k)}
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "fl_client.node.tunnel"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**inherited, **OFFLINE, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
                pass_fds=[self._listener.fileno()],
                start_new_session=True,
            )
            hand_over(process, self._settings.to_line())
            return process
        if self._spec is None:
            raise RuntimeError("the SuperNode was asked for without a spec")
        return start_node(self._spec, says=subprocess.PIPE)


class Ended(ConcordatError):
    """A helper process ended although it should run."""
