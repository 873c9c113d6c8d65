"""What `fl-server status` says of a coordinator that does not run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fl_server.home.layout import ServerHome
from fl_server.operations.setup import initialise
from fl_server.operations.supervisor import Supervisor, read_state

FL_SERVER = str(Path(sys.executable).parent / "fl-server")
NAMES = ["superlink", "gateway", "control", "launcher"]


@pytest.fixture
def home(tmp_path: Path) -> ServerHome:
    """A new coordinator's home."""
    return initialise(tmp_path / "c", host="127.0.0.1", gateway_port=9443, control_port=9444, admin="admin")


def status(home: ServerHome) -> tuple[int, list[tuple[str, str]]]:
    done = subprocess.run([FL_SERVER, "status", "--home", str(home.root), "--json"], capture_output=True, text=True)
    return done.returncode, [(each["name"], each["state"]) for each in json.loads(done.stdout)["components"]]


def test_every_component_that_the_supervisor_starts_is_listed_as_stopped(home: ServerHome) -> None:
    """The monitor, too, where there is one; before the first start and after the end."""
    assert [(each["name"], each["state"]) for each in read_state(home)["components"]] == [(n, "stopped") for n in NAMES]
    assert [each.name for each in Supervisor(home)._components] == NAMES
    home.settings_file.write_text(home.settings_file.read_text() + '\n[metrics]\nlisten = "127.0.0.1:9445"\n')
    assert status(home) == (1, [(name, "stopped") for name in [*NAMES, "monitor"]])
    assert [each.name for each in Supervisor(home)._components] == [*NAMES, "monitor"]


@pytest.mark.parametrize(
    "written", ["", "[]", "7", '{"pid": "x"}', '{"pid": null, "at": 1}', '{"pid": 1}', '{"pid": PID, "at": OLD}']
)
def test_a_state_that_is_damaged_or_old_is_none(home: ServerHome, written: str) -> None:
    """Nothing of it is believed."""
    old = written.replace("PID", str(os.getpid())).replace("OLD", str(time.time() - 60))
    home.supervisor_state.parent.mkdir(exist_ok=True)
    home.supervisor_state.write_text(old)
    assert [(each["name"], each["state"]) for each in read_state(home)["components"]] == [(n, "stopped") for n in NAMES]
