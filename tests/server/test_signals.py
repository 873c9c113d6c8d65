"""Each component by itself: SIGTERM ends it with 0, and nothing stays open."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fl_server.home.layout import ServerHome
from fl_server.operations.setup import initialise
from fl_shared.files import write_durably
from helpers.coordinators import environment, until
from helpers.ports import free_port


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> ServerHome:
    """A coordinator's home whose SuperLink was started once and is gone."""
    root = tmp_path_factory.mktemp("c") / "home"
    ports = free_port(), free_port(), free_port()
    made = initialise(root, host="127.0.0.1", gateway_port=ports[0], control_port=ports[1], admin="admin")
    with made.settings_file.open("a") as sink:
        sink.write(f'\n[metrics]\nlisten = "127.0.0.1:{ports[2]}"\n')
    write_durably(made.flower_state, json.dumps({"address": "127.0.0.1:9", "started": "once"}).encode())
    return made


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


MODULES = {"gateway": "gateway.app", "control": "control", "monitor": "operations.monitor"}


@pytest.mark.parametrize("component", MODULES)
def test_a_component_ends_with_0_on_sigterm(home: ServerHome, component: str) -> None:
    """It listens, is asked to end, and its port is free again; its output is JSON lines or nothing."""
    settings = home.settings()
    assert settings.metrics is not None
    ports = {"gateway": settings.gateway_port, "control": settings.control_port, "monitor": settings.metrics[1]}
    port = ports[component]
    process = subprocess.Popen(
        [sys.executable, "-m", f"fl_server.{MODULES[component]}", "--home", str(home.root)],
        env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        until(lambda: _listens(port) or process.poll() is not None, f"{component} listens")
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, said
    assert not _listens(port)
    assert all(json.loads(line)["process"] == component for line in said.splitlines())


def test_the_launcher_ends_with_0_on_sigterm(home: ServerHome, tmp_path: Path) -> None:
    """It ends between two looks at the runs."""
    with (tmp_path / "out").open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "fl_server.rounds.launcher", "--home", str(home.root)],
            env=environment(), stdin=subprocess.DEVNULL, stdout=sink, stderr=sink,
        )  # fmt: skip
    try:
        until(lambda: (home.flower / "app" / "pyproject.toml").exists(), "the launcher works")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, (tmp_path / "out").read_text()
    finally:
        process.kill()
