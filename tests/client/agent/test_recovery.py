"""What a start of tunnel and SuperNode may meet: it goes on when the cause is gone, and says why until then."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from fl_client.agent.status import agent_problems, agent_state
from fl_shared.runtime.processes import free_port
from helpers.agents import SITE, RealSite
from helpers.gateway import Gateway
from helpers.users import as_user, barrier

pytestmark = [pytest.mark.timeout(400)]


def wait_for(condition: Callable[[], object], what: Callable[[], object]) -> None:
    deadline = time.monotonic() + 150
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.1)


class Launching(RealSite):
    """A site whose agent starts its own SuperNode and serves its readiness."""

    def __init__(self, root: Path, gateway: Gateway) -> None:
        self.port = free_port()
        super().__init__(
            root,
            gateway,
            metrics={"listen": f"127.0.0.1:{self.port}"},
            supernode={"launch": True, "tunnel_port": free_port()},
        )

    def ready(self) -> str:
        """What /readyz says."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/readyz", timeout=10) as answer:
                return str(answer.read().decode())
        except urllib.error.HTTPError as error:
            return error.read().decode()
        except OSError as error:
            return str(error)

    def helper(self, module: str) -> psutil.Process | None:
        """The agent's child that runs `module`."""
        assert self.process is not None
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.Error):
                if f"fl_client.node.{module}" in child.cmdline():
                    return child
        return None

    def end_helper(self, module: str) -> None:
        """kill -9; whoever keeps it starts the next one."""
        found = self.helper(module)
        if found is not None:
            found.kill()

    def told(self, words: str, *, logged: bool = True) -> None:
        """The socket (so `fl-client status`), /readyz and, if its disk takes it, the log say it."""
        wait_for(lambda: any(words in each for each in agent_problems(self.home.socket)), self.ready)
        wait_for(lambda: words in self.ready(), self.ready)
        assert not logged or words in (self.home.logs / "agent.jsonl").read_text()
        done = self.run("fl-client", "status", "--json")
        assert done.returncode == 0
        assert isinstance(json.loads(done.stdout)["problems"], list)

    def well(self, module: str) -> None:
        """The helper runs again, and nothing is wrong any more."""
        wait_for(lambda: self.helper(module) is not None and self.ready() == "ready\n", self.ready)
        assert agent_problems(self.home.socket) == []


@pytest.fixture
def site(tmp_path: Path, gateway: Gateway) -> Iterator[Launching]:
    """Its home has a space and letters beyond ASCII in its path."""
    made = Launching(tmp_path / "Klinik Süd 1", gateway)
    yield made
    if made.process is not None and made.process.poll() is None:
        made.kill()


def test_a_home_with_a_space_and_umlauts_works_to_the_end(site: Launching, gateway: Gateway) -> None:
    """The SuperNode takes its settings and calls the coordinator; the socket answers; nothing is started twice.

    What an app left, deeper than anybody can walk, ends nothing and is gone after the start.
    """
    left = site.home.untrusted / "home"
    left.mkdir(parents=True, mode=0o700)
    subprocess.run(
        [sys.executable, "-c", "import os\nfor _ in range(3000):\n os.mkdir('d')\n os.chdir('d')"], cwd=left, check=True
    )
    site.start()
    wait_for(lambda: any(path.endswith("activate-node") for path, _ in gateway.fleet_calls), site.ready)
    assert agent_state(site.home) == "idle"
    assert not (left / "d").exists()
    assert site.stop() == 0
    assert "again in" not in (site.home.logs / "agent.jsonl").read_text()


def test_data_where_the_untrusted_half_reads_and_a_socket_that_cannot_be_called_are_refused(
    tmp_path: Path, gateway: Gateway
) -> None:
    """By the start, at once: no wall hides what lies in Python's environment, and gRPC takes a comma for an end."""
    made = RealSite(tmp_path / "home", gateway)
    text = made.home.config.read_text()
    made.home.config.write_text(text.replace('"records.csv"', f'"{sys.prefix}/pyvenv.cfg"'))
    assert made.start(wait=False).wait(60) == 2
    assert "which the untrusted half can read" in made.finish()
    made.home.config.write_text(text.replace("launch = false\n", f'launch = false\nsocket = "{tmp_path}/a,b"\n'))
    assert made.start(wait=False).wait(60) == 2
    assert "has a comma" in made.finish()


def test_a_dangling_link_where_a_start_writes_ends_nothing(site: Launching) -> None:
    """The SuperNode's place is a link to nowhere: told, and started as soon as the link is gone."""
    work = site.home.supernode / "work"
    work.symlink_to(site.home.root / "nowhere")
    site.start()
    site.told("no place to work in")
    work.unlink()
    site.well("sandbox")
    assert site.stop() == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small disk")
def test_a_full_disk_ends_nothing(tmp_path: Path, gateway: Gateway) -> None:
    """Home on a disk of 8 MiB filled to the last byte, its log with it: told, and recovered when there is room."""
    root = tmp_path / "small"
    root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m,mode=0700", "tmpfs", str(root)], check=True)
    made = None
    try:
        made = Launching(root, gateway)
        made.start()
        made.well("sandbox")
        with (root / "filler").open("wb", buffering=0) as sink, contextlib.suppress(OSError):
            while True:
                sink.write(bytes(4096))
        made.end_helper("sandbox")
        made.told("the supernode does not run", logged=False)
        made.end_helper("tunnel")
        wait_for(lambda: made.helper("tunnel") is not None, made.ready)
        (root / "filler").unlink()
        made.well("sandbox")
        assert made.stop() == 0
    finally:
        if made is not None and made.process is not None and made.process.poll() is None:
            made.kill()
        subprocess.run(["umount", "-l", str(root)], check=True)


USER = 61007


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root for a limit of another user")
def test_no_more_processes_ends_nothing(gateway: Gateway) -> None:
    """The limit of the agent's user is reached when the tunnel dies: told, also by /readyz, and recovered."""
    if barrier(Path(__file__)) or barrier(Path(sys.prefix)):
        pytest.skip("the project lies where other users cannot read it")
    place = Path(tempfile.mkdtemp(prefix="few-"))
    place.chmod(0o711)
    made = Launching(place / "home", gateway)
    try:
        for path in (made.home.root, *made.home.root.rglob("*")):
            os.chown(path, USER, USER)
        words = [sys.executable, "-m", "fl_client.cli.client", "--site", SITE, "--home", str(made.home.root)]
        made.process = subprocess.Popen(
            as_user(place, USER, [], *words, umask="022"), env=made.environment(HOME="/"),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        wait_for(lambda: made.helper("tunnel") and agent_state(made.home) == "idle", lambda: made.process.poll())  # type: ignore[union-attr]  # set above
        hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
        back = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)

        def limit(soft: str) -> None:
            words = ["prlimit", f"--pid={pid}", f"--nproc={soft}:"]
            subprocess.run(as_user(place, USER, [], *words), check=True, timeout=60)

        pid = made.process.pid
        limit("1")
        made.end_helper("tunnel")
        # Its forks fail now, and gRPC's handlers of a fork, which would abort the process then, are switched off.
        wait_for(lambda: "Resource temporarily unavailable" in made.ready(), made.ready)
        assert "Resource temporarily unavailable" in (made.home.logs / "agent.jsonl").read_text()
        limit(back)
        wait_for(lambda: made.helper("tunnel"), made.ready)
        wait_for(lambda: not any("tunnel" in each for each in agent_problems(made.home.socket)), made.ready)
        made.process.send_signal(signal.SIGTERM)
        assert made.process.wait(90) == 0
    finally:
        if made.process is not None and made.process.poll() is None:
            made.kill()
        shutil.rmtree(place)


def test_a_socket_path_too_long_is_said_before_the_model_is_loaded(tmp_path: Path, gateway: Gateway) -> None:
    """Start, check and enrolment; with a shorter [supernode] socket the same home works."""
    deep = tmp_path / ("long-" * 12)
    made = RealSite(deep / "home", gateway)
    assert made.start(wait=False).wait(60) == 2
    said = made.finish()
    assert "at most 107" in said
    assert "[supernode] socket" in said
    assert "loading the model" not in said
    line = [sys.executable, "-m", "fl_client.cli.client"]
    for verb in (["check"], ["enroll", "--server", gateway.url, "--token", "ct1.x"]):
        done = subprocess.run(
            [*line, *verb, "--site", SITE, "--home", str(deep / ("home" if verb == ["check"] else "new"))],
            env=made.environment(), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert "at most 107" in done.stdout + done.stderr
    assert not (deep / "new").exists()
    short = Path(tempfile.mkdtemp(prefix="s-"))
    text = made.home.config.read_text()
    made.home.config.write_text(text.replace("launch = false\n", f'launch = false\nsocket = "{short}/a"\n'))
    made.start(wait=False)
    wait_for(lambda: agent_state(made.home, short / "a") == "idle", lambda: made.process)
    assert made.stop() == 0
    shutil.rmtree(short)
