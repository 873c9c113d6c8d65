"""What carrying a round costs beyond the bytes themselves: a real coordinator, two SuperNodes, tunnels and gateway.

Updates of 50 MB go from stand-in agents through SuperNode, tunnel, gateway and SuperLink to the ServerApp, and the
global adapter goes back. A relay between tunnel and gateway counts what is really sent there. The same rounds with
updates of a few bytes take the polling and starting of processes alone; what the large ones take longer is the bytes'
cost, and is compared with a plain copy of the same bytes over TLS on loopback.

    python tests/benchmarks/transport.py --json
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fl_client.node.helpers import listen_loopback
from fl_client.node.tunnel_settings import TunnelSettings, make_local_certificate
from fl_shared.runtime.processes import free_port

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
from helpers import stand_in_agent  # noqa: E402 - made importable above
from helpers.coordinators import BIN, Coordinator, environment, kill_tree  # noqa: E402

SITES = ("h-1", "h-2")
MB = 1_000_000
LARGE = 50 * MB
PIECE = 1 << 16


class Relay:
    """Forwards TCP connections to a port and counts the bytes of both directions."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = listen_loopback()
        self.port: int = self._listener.getsockname()[1]
        self.bytes = 0
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._target))
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._copy, args=(source, sink), daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while piece := source.recv(PIECE):
                sink.sendall(piece)
                with self._lock:
                    self.bytes += len(piece)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            source.close()
            sink.close()

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()


@contextmanager
def agents(root: Path, size: int) -> Iterator[None]:
    """Stand-in agents of all sites whose updates have `size` bytes."""
    process = subprocess.Popen(
        [sys.executable, __file__, "--agents", str(size), str(root), *SITES],
        env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        if process.stdout is None or process.stdout.readline() != b"ready\n":
            raise SystemExit("the stand-in agents did not start")
        yield
    finally:
        kill_tree(process.pid)


def serve_agents(size: int, arguments: list[str]) -> None:
    """The process of `agents`: the values are drawn once, so that a round costs little but the transport."""
    values = np.random.default_rng(0).standard_normal(max(1, size // 4), dtype=np.float32)

    def large(site: str, round_number: int) -> dict[str, NDArray[np.float32]]:
        # Never the same twice: Flower sends an object that the other side has already only once.
        return {"w": values * np.float32(1 + round_number / 8 + SITES.index(site) / 64)}

    stand_in_agent.honest_update = large
    sys.argv[1:] = arguments
    stand_in_agent.main()


@contextmanager
def site_half(made: Coordinator, site: str, relay: Relay) -> Iterator[None]:
    """A site's tunnel, which calls the relay, and its SuperNode, which calls the tunnel."""
    folder = made.root / site
    listener = listen_loopback()
    make_local_certificate(folder / "tunnel.pem", folder / "tunnel.key")
    settings = TunnelSettings(
        listen_fd=listener.fileno(),
        fleet_url=f"https://127.0.0.1:{relay.port}/v1/fleet",
        ca=str(made.home / "tls" / "ca.pem"),
        certificate=str(folder / "client.pem"),
        key=str(folder / "client.key"),
        local_certificate=str(folder / "tunnel.pem"),
        local_key=str(folder / "tunnel.key"),
        apps=["any"],
        node_file=str(folder / "node-id"),
    )
    (folder / "flwr").mkdir(exist_ok=True)
    with (folder / "site.log").open("ab") as sink:
        tunnel = subprocess.Popen(
            [sys.executable, "-m", "fl_client.node.tunnel"],
            env=environment(), stdin=subprocess.PIPE, stdout=sink, stderr=sink, pass_fds=[listener.fileno()],
        )  # fmt: skip
        if tunnel.stdin is None:
            raise SystemExit("the tunnel has no standard input")
        tunnel.stdin.write(settings.to_line())
        tunnel.stdin.flush()
        node = subprocess.Popen(
            [str(BIN / "flower-supernode"), "--superlink", f"127.0.0.1:{listener.getsockname()[1]}",
             "--root-certificates", str(folder / "tunnel.pem"),
             "--auth-supernode-private-key", str(folder / "node.key"),
             "--host", "127.0.0.1", "--port", str(free_port()),
             "--node-config", f'agent-socket="{folder / "agent.sock"}"'],
            env=environment(FLWR_HOME=str(folder / "flwr"), HOME=str(folder)),
            stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True,
        )  # fmt: skip
    try:
        yield
    finally:
        for process in (node, tunnel):
            kill_tree(process.pid)
        listener.close()


def tls_copy_seconds(home: Path, size: int) -> float:
    """Time to send `size` bytes to another process over TLS 1.3 on loopback, until it has read them all."""
    sink = subprocess.Popen(
        [sys.executable, __file__, "--tls-sink", str(home), str(size)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        if sink.stdout is None:
            raise SystemExit("the TLS sink has no standard output")
        port = int(sink.stdout.readline())
        context = ssl.create_default_context(cafile=str(home / "tls" / "ca.pem"))
        block = memoryview(np.random.default_rng(1).bytes(MB))
        with (
            socket.create_connection(("127.0.0.1", port)) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as secure,
        ):
            began = time.perf_counter()
            left = size
            while left:
                secure.sendall(block[: min(left, len(block))])
                left -= min(left, len(block))
            secure.recv(1)  # it has read them all
            return time.perf_counter() - began
    finally:
        kill_tree(sink.pid)


def tls_sink(home: Path, size: int) -> None:
    """The process of `tls_copy_seconds`: read so many bytes of one connection, then say so."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(home / "tls" / "server.pem", home / "tls" / "server.key")
    listener = listen_loopback()
    print(listener.getsockname()[1], flush=True)
    with listener.accept()[0] as plain, context.wrap_socket(plain, server_side=True) as secure:
        buffer = bytearray(MB)
        while size > 0:
            size -= secure.recv_into(buffer)
        secure.sendall(b".")


def measure(say: Callable[[str], None], large: int = LARGE) -> dict[str, Any]:
    """Two runs of two rounds, small and large; the second rounds, which carry both ways, are compared."""
    root = Path(tempfile.mkdtemp(prefix="tr-"))
    seconds: dict[str, float] = {}
    sent: dict[str, int] = {}
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, root, ignore_errors=True)
        made = Coordinator(root)
        stack.callback(made.close)
        made.up()
        made.enrol(*SITES)
        relay = Relay(made.gateway)
        stack.callback(relay.close)
        for site in SITES:
            stack.enter_context(site_half(made, site, relay))
        for name, size in (("small", 64), ("large", large)):
            say(f"transport: two rounds with updates of {size} bytes ...")
            with agents(root, size):
                before = relay.bytes
                made.launch(name=name, sites=SITES, rounds=2, quorum=2, round_timeout_s=900)
                shown = made.wait(name, "completed", "failed", patience_s=900)
                if shown["state"] != "completed":
                    raise SystemExit(f"run {name} {shown['state']}: {shown['reason']}")
                sent[name] = relay.bytes - before
                seconds[name] = shown["history"][1]["seconds"]
        both_ways = 2 * len(SITES) * large
        copies = sorted(tls_copy_seconds(made.home, both_ways) for _ in range(3))
    payload = 3 * len(SITES) * large  # up in both rounds, down in the second
    return {
        "sites": len(SITES),
        "update_bytes": large,
        "wire_bytes_over_payload": round((sent["large"] - sent["small"]) / payload, 4),
        "bytes_of_a_round_without_payload": sent["small"] // 2,
        "round_seconds_without_payload": round(seconds["small"], 2),
        "round_seconds": round(seconds["large"], 2),
        "tls_copy_seconds": round(copies[1], 2),
        "time_over_tls_copy": round((seconds["large"] - seconds["small"]) / copies[1], 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--quick", action="store_true", help="updates of 5 MB; the figures are rough")
    parser.add_argument("--agents", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--tls-sink", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.agents:
        serve_agents(int(options.agents[0]), options.agents[1:])
        return 0
    if options.tls_sink:
        tls_sink(Path(options.tls_sink[0]), int(options.tls_sink[1]))
        return 0
    size = LARGE // 10 if options.quick else LARGE
    found = measure(lambda text: print(text, file=sys.stderr), size)
    print(json.dumps(found, indent=2) if options.json else "\n".join(f"{k}: {v}" for k, v in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
