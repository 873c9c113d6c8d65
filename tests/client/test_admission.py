"""Many connections, long heads: the doors of the untrusted half take so much and no more, and are never shut alone."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fl_client.node.admission import admit
from fl_client.node.forwarder import MAX_CONNECTIONS
from fl_client.node.helpers import listen_loopback
from fl_client.node.tunnel import MAX_CONNECTIONS as MAX_TUNNELLED
from fl_client.node.tunnel_settings import READY, TunnelSettings, make_local_certificate
from helpers.sandboxes import close, confinement_of, start_keeper

MANY = """
import socket, sys, time
kept = []
def knock(family, place):
    try:
        made = socket.socket(family)
        made.settimeout(2)
        made.connect(place)
        kept.append(made)
    except OSError:
        return False
    return True
for _ in range(800):
    if not knock(socket.AF_INET, ("127.0.0.1", int(sys.argv[1]))):
        break
print("full", flush=True)
print(knock(socket.AF_UNIX, sys.argv[2]), flush=True)
time.sleep(600)
"""


def wait_for(condition: object) -> None:
    deadline = time.monotonic() + 60
    while not condition():  # type: ignore[operator]  # a function
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_app_that_opens_connections_takes_its_own_places_alone(tmp_path: Path) -> None:
    """Through one door come so many as are let through; the other door stays free. The agent's socket lies above the
    app's own directory here, which the app has all the same."""
    node = tmp_path / "home" / "supernode"
    node.mkdir(parents=True)
    with listen_loopback() as tunnel, socket.socket(socket.AF_UNIX) as agent:
        tunnel.listen(1000)
        agent.bind(str(tmp_path / "a"))
        agent.listen()
        port = tunnel.getsockname()[1]
        command = [sys.executable, "-c", MANY, str(port), str(tmp_path / "a")]
        made = confinement_of(node, command, agent=tmp_path / "a", connect_ports=[port], bind_ports=[])
        keeper = start_keeper(made)
        wait_for(lambda: Path(made.log).exists() and len(Path(made.log).read_text().split()) == 2)
        assert Path(made.log).read_text().split() == ["full", "True"]
        agent.settimeout(10)
        agent.accept()[0].close()
        tunnel.settimeout(0.5)
        heard = []
        with contextlib.suppress(TimeoutError):
            while True:
                heard.append(tunnel.accept()[0])
        assert len(heard) == MAX_CONNECTIONS
        for each in heard:
            each.close()
        close(keeper)
        assert keeper.wait(60) == 0


def test_no_descriptor_left_is_waited_for_in_silence() -> None:
    """accept() fails for want of descriptors: nothing is printed, nothing spins, and it goes on afterwards."""
    script = (
        "import asyncio, os, resource, socket, sys, time\n"
        "from fl_client.node.admission import admit\n"
        "listener = socket.socket(fileno=int(sys.argv[1]))\n"
        "async def serve(arrived): arrived.close(); print('served', flush=True)\n"
        "async def main():\n"
        "    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))\n"
        "    admitting = asyncio.create_task(admit(listener, 5, serve))\n"
        "    before = time.process_time()\n"
        "    await asyncio.sleep(2)\n"
        "    print('busy' if time.process_time() - before > 1 else 'calm', flush=True)\n"
        "    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))\n"
        "    await asyncio.sleep(5)\n"
        "asyncio.run(main())\n"
    )
    with listen_loopback() as listener, socket.create_connection(listener.getsockname()):
        done = subprocess.run(
            [sys.executable, "-c", script, str(listener.fileno())], pass_fds=[listener.fileno()],
            capture_output=True, text=True, check=True, timeout=120,
        )  # fmt: skip
    assert (done.stdout.split(), done.stderr) == (["calm", "served"], "")


def test_a_door_that_is_lost_raises() -> None:
    """A closed listener is no reason to wait."""
    listener = socket.socket()

    async def lost() -> None:
        listener.close()
        await admit(listener, 5, lambda _: asyncio.sleep(0))

    with pytest.raises(OSError, match="descriptor"):
        asyncio.run(lost())


def test_when_the_forwarder_ends_its_keeper_ends() -> None:
    """Its thread never dies alone: the process gets SIGTERM, so that whoever keeps it starts the next."""
    script = (
        "import signal, socket; from fl_client.node.forwarder import forward; made = socket.socket(); made.close();"
        "forward([(made, ('127.0.0.1', 1))]); signal.pause()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == -signal.SIGTERM
    assert "connections to tunnel and agent ended" in done.stderr


class Door:
    """A tunnel process, its port and its certificate; there is no coordinator behind it."""

    def __init__(self, place: Path, listener: socket.socket) -> None:
        certificate, key = str(place / "c.pem"), str(place / "k.pem")
        make_local_certificate(Path(certificate), Path(key))
        settings = TunnelSettings(
            listener.fileno(), "https://127.0.0.1:1/v1/fleet", certificate, certificate, key, certificate, key,
            ["any"], str(place / "node"),
        )  # fmt: skip
        self.address = listener.getsockname()
        self.context = ssl.create_default_context(cafile=certificate)
        self.context.check_hostname = False
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "fl_client.node.tunnel"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            pass_fds=[listener.fileno()],
        )  # fmt: skip
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(settings.to_line())
        self.process.stdin.flush()
        assert self.process.stdout.readline().decode().strip() == READY
        self.seen = psutil.Process(self.process.pid)

    def connect(self) -> ssl.SSLSocket:
        return self.context.wrap_socket(socket.create_connection(self.address, 20))


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Door]:
    with listen_loopback() as listener:
        made = Door(tmp_path, listener)
        yield made
        made.process.communicate(timeout=60)


@pytest.mark.parametrize("head", [b"x-a: " + b"a" * 1000 + b"\r\n", b"a" * 1000], ids=["many lines", "one line"])
def test_a_head_without_end_takes_no_memory(door: Door, head: bytes) -> None:
    """The tunnel is of the trusted half: what an app sends it is ended at 64 KiB."""
    before = door.seen.memory_info().rss
    with door.connect() as made, contextlib.suppress(OSError):
        made.sendall(b"POST /v1/fleet/get-fab HTTP/1.1\r\nhost: x\r\nx-b: ")
        for _ in range(60):
            made.sendall(head * 1000)
    assert door.seen.memory_info().rss - before < 16 << 20


def test_connections_to_the_tunnel_are_taken_up_to_a_number(door: Door) -> None:
    """Silent ones end after the handshake's time at the latest; when they are gone others are served."""
    calm = door.seen.num_fds()
    kept = []
    for _ in range(200):
        made = socket.socket()
        made.setblocking(False)
        made.connect_ex(door.address)
        kept.append(made)
    wait_for(lambda: door.seen.num_fds() >= calm + MAX_TUNNELLED)
    time.sleep(0.5)
    assert door.seen.num_fds() <= calm + MAX_TUNNELLED + 2
    for made in kept:
        made.close()
    with door.connect() as asking:
        asking.sendall(b"POST /v1/fleet/nonsense HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n")
        assert asking.recv(100).startswith(b"HTTP/1.1 404")
