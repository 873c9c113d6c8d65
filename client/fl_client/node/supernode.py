"""Start the SuperNode, the site's untrusted half, inside its keeper.

It runs code that the coordinator ships. It gets its own session and process group, an environment built from
nothing, no inherited file descriptor, Flower's node key, and the kernel's confinement (`fl_client.node.sandbox`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

from fl_client.node.confinement import describe_confinement
from fl_client.node.environment import SYSTEM_READABLE, keeper_environment, node_environment, shared_source
from fl_client.node.reaping import MOST_TASKS
from fl_client.node.sandbox import Confinement
from fl_client.node.spec import SPEC_FILE, NodeSpec, make_home
from fl_shared.files import socket_address
from fl_shared.runtime.processes import free_port

log = logging.getLogger("fl_client.node.supernode")


def node_confinement(spec: NodeSpec, runtime_port: int) -> Confinement:
    """Return the confined command that runs the SuperNode with its Runtime API on `runtime_port`."""
    directory = spec.directory
    make_home(spec)
    record = (directory if os.access(directory, os.W_OK) else spec.home.parent) / "supernode.log"
    command = [
        str(Path(sys.executable).parent / "flower-supernode"),
        "--superlink", f"127.0.0.1:{spec.tunnel_port}",
        "--root-certificates", str(spec.tunnel_certificate),
        "--auth-supernode-private-key", str(spec.node_key),
        "--host", "127.0.0.1",
        "--port", str(runtime_port),
        "--node-config", f'agent-socket="{socket_address(spec.socket)}"',
    ]  # fmt: skip
    source = shared_source()
    readable = [sys.prefix, sys.base_prefix, *SYSTEM_READABLE, *([str(source)] if source else [])]
    readable += [str(spec.node_key), str(spec.tunnel_certificate)]
    return Confinement(
        command=command,
        environment=node_environment(spec.home),
        directory=str(spec.home),
        log=str(record),
        readable=readable,
        writable=[str(spec.home), "/dev/null"],
        connect_ports=[spec.tunnel_port, runtime_port],
        bind_ports=[runtime_port],
        mode=spec.mode,
        user=spec.user,
        tasks=MOST_TASKS,
        agent=str(spec.socket),
    )


def start_node(spec: NodeSpec, *, says: int | None = None) -> subprocess.Popen[bytes]:
    """Start the keeper of the confined SuperNode; the caller keeps its standard input open.

    What the keeper itself has to say goes to `says`, as for Popen; the SuperNode writes into its log.
    """
    confinement = node_confinement(spec, free_port())
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "fl_client.node.sandbox"],  # -P: no module comes from the working directory
        stdin=subprocess.PIPE,
        stdout=says,
        stderr=subprocess.STDOUT if says is not None else None,
        env=keeper_environment(),
        cwd="/",
        start_new_session=True,
        close_fds=True,
    )
    hand_over(process, confinement.to_line())
    return process


def hand_over(process: subprocess.Popen[bytes], line: bytes) -> None:
    """Send the settings; standard input stays open, its end tells the process to stop."""
    if process.stdin is None:
        raise RuntimeError("the helper process has no standard input")
    try:
        process.stdin.write(line)
        process.stdin.flush()
    except BrokenPipeError:
        log.warning("a helper process ended before it took its settings")


def run_alone(directory: Path) -> int:
    """Run the untrusted half by itself until SIGTERM or Ctrl-C; for a service of another user.

    It also ends when the agent writes its spec again, after its own restart (the tunnel has another
    certificate then) or because the SuperNode has deactivated itself. The exit status is the SuperNode's; the service
    manager starts it again.
    """
    directory = directory.absolute()
    written = (directory / SPEC_FILE).stat().st_mtime_ns if (directory / SPEC_FILE).exists() else 0
    spec = NodeSpec.load(directory)
    log.info("untrusted half: %s", describe_confinement(spec.mode, ""))
    process = start_node(spec)

    def end(_number: int, _frame: FrameType | None) -> None:
        process.terminate()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    status: int | None = None
    while status is None:
        try:
            status = process.wait(1.0)
        except subprocess.TimeoutExpired:
            if (directory / SPEC_FILE).stat().st_mtime_ns != written:
                process.terminate()
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
    return min(abs(status), 125)
