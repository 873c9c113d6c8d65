"""The coordinator's supervisor goes on whatever a start meets; its files are private; its home has any name."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import ssl
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fl_server.gateway import connections as doorman
from helpers.coordinators import BIN, Coordinator, environment, kill_tree, until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


@pytest.fixture
def place() -> Iterator[Path]:
    """A short directory of any name, under the worst umask."""
    before = os.umask(0)
    with tempfile.TemporaryDirectory(prefix="c-") as name:
        yield Path(name)
    os.umask(before)


@contextlib.contextmanager
def running(made: Coordinator, *, wait: bool = True) -> Iterator[None]:
    """`fl-server up`, and whatever is left of it killed."""
    try:
        if wait:
            made.up()
        yield
        assert made.down() == 0
    finally:
        if made.process is not None:
            kill_tree(made.process.pid)


def status(made: Coordinator) -> dict[str, dict[str, Any]]:
    done = made.run("fl-server", "status", "--home", str(made.home), "--json", check=False)
    return {each["name"]: each for each in json.loads(done.stdout)["components"]}


def open_files(root: Path) -> list[str]:
    return [
        f"{path.relative_to(root)} {stat.S_IMODE(path.lstat().st_mode):o}"
        for path in (root, *root.rglob("*"))
        if not path.is_symlink() and path.lstat().st_mode & 0o077
    ]


def test_a_home_with_spaces_and_umlauts_under_umask_000_is_private(place: Path) -> None:
    """Everything that init, a start, an enrolment and Flower write; what was opened meanwhile is closed and told."""
    (place / "Süd 1").mkdir(mode=0o700)
    made = Coordinator(place / "Süd 1")
    assert open_files(made.home) == []
    (made.home / "keys" / "left").write_text("x")
    (made.home / "adapters").mkdir(mode=0o755, exist_ok=True)
    with running(made):
        made.enrol("h-1")
        assert open_files(made.home) == []
    assert open_files(made.home) == []
    assert "files that others than their owner could open" in (made.root / "up.log").read_text()


def test_a_component_that_cannot_be_started_ends_neither_the_others_nor_the_supervisor(place: Path) -> None:
    """Its log is a link to nowhere: told by status and log with the reason, and started when the link is gone."""
    made = Coordinator(place)
    (made.home / "logs").mkdir(mode=0o700, exist_ok=True)
    link = made.home / "logs" / "gateway.log"
    link.symlink_to(place / "no" / "where")
    with running(made, wait=False):
        with (made.root / "up.log").open("ab") as sink:
            made.process = subprocess.Popen(
                [str(BIN / "fl-server"), "up", "--home", str(made.home)],
                env=environment(), stdout=sink, stderr=sink, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        until(lambda: status(made)["gateway"]["state"] == "not started", "the reason is told")
        until(lambda: status(made)["control"]["state"] == "ready", "the others run")
        assert status(made)["gateway"]["why"] == "No such file or directory"
        assert "gateway: not started: No such file or directory" in (made.root / "up.log").read_text()
        link.unlink()
        until(made.is_ready, "all is ready")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small disk")
def test_a_full_disk_ends_nothing(place: Path) -> None:
    """Filled to the last byte while the SuperLink dies: the supervisor goes on and says why; then there is room."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m,mode=0700", "tmpfs", str(place)], check=True)
    try:
        made = Coordinator(place)
        with running(made):
            pid = status(made)["superlink"]["pid"]
            with (place / "filler").open("wb", buffering=0) as sink, contextlib.suppress(OSError):
                while True:
                    sink.write(bytes(4096))
            kill_tree(pid)
            until(lambda: status(made)["superlink"]["state"] == "not started", "the reason is told")
            assert status(made)["superlink"]["why"] == "No space left on device"
            assert status(made)["control"]["state"] == "ready"
            (place / "filler").unlink()
            until(made.is_ready, "all is ready")
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_door_that_nobody_keeps_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the loop at the gateway's door meets, the gateway does not live on deaf: it ends."""

    class Server:
        should_exit = False
        config = SimpleNamespace()
        server_state = None

        async def serve(self, sockets: list[Any]) -> None:
            assert sockets == []
            while not self.should_exit:
                await asyncio.sleep(0.01)

    def defect(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(doorman, "Slot", defect)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        with socket.create_connection(listening.getsockname()), pytest.raises(ZeroDivisionError):
            asyncio.run(
                asyncio.wait_for(doorman.serve(Server(), ssl.create_default_context(), listening), 60)  # type: ignore[arg-type]  # a stand-in for uvicorn
            )
