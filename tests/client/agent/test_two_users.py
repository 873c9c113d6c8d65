"""A site's two halves as two users of the system, as the units in deploy/ run them. Needs root."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fl_client.agent.status import agent_state
from helpers.agents import RealSite
from helpers.gateway import Gateway
from helpers.users import MEET, MEETING, as_user, barrier

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root to be two other users"),
]
AGENT, NODE, STRANGER = 61002, 61003, 61004

ASK = """
import sys, grpc
from fl_shared.wire import agent_pb2_grpc
from fl_shared.wire.agent_pb2 import InfoRequest
with grpc.insecure_channel("unix:" + sys.argv[1]) as channel:
    print(agent_pb2_grpc.AgentStub(channel).Info(InfoRequest(), timeout=10).state)
"""
READ = """
import sys
for path in sys.argv[1:]:
    try:
        open(path, "rb").read(1)
        print("read", path)
    except OSError as error:
        print(type(error).__name__, path)
"""


WRITE = """
import os, sys
for path in sys.argv[1:]:
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT))
        print("wrote", path)
    except OSError as error:
        print(type(error).__name__, path)
"""
TRY = """
import json, sys
from pathlib import Path
from fl_client.node.walls import try_walls
data = Path(sys.argv[1]) / "data.csv"
data.write_text("private")
found = {mode: try_walls({"the data": data}, mode) for mode in ("off", "auto", "require")}
print(json.dumps({mode: [each.open, each.works] for mode, each in found.items()}))
"""


def run_as(top: Path, user: int, groups: list[int], script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a Python script as another user."""
    line = as_user(top, user, groups, sys.executable, "-c", script, *arguments)
    return subprocess.run(line, env={"HOME": "/"}, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def site(gateway: Gateway, short_path: Path) -> Iterator[RealSite]:
    """A site that belongs to AGENT; socket and node directory as the units lay them out."""
    node, meet = short_path / "node", short_path / "run"
    node.mkdir()
    meet.mkdir()

    made = RealSite(short_path / "home", gateway)
    text = made.home.config.read_text()
    text = text.replace(
        "launch = false\n",
        f'launch = false\nsocket_group = "{MEET}"\nsocket = "{meet}/agent.sock"\ndirectory = "{node}"\n',
    )
    made.home.config.write_text(text)
    for path in (made.home.root, *made.home.root.rglob("*")):
        os.chown(path, AGENT, AGENT)
    os.chown(node, AGENT, MEETING)
    node.chmod(0o2750)
    (node / "work").mkdir(mode=0o700)
    os.chown(node / "work", NODE, NODE)
    os.chown(meet, AGENT, AGENT)
    meet.chmod(0o710)
    yield made
    if made.process is not None and made.process.poll() is None:
        made.kill()


@pytest.fixture
def short_path(tmp_path: Path) -> Iterator[Path]:
    """A directory that others may pass through, with a path short enough for a socket."""
    made = Path(tempfile.mkdtemp(prefix="two-"))
    made.chmod(0o711)
    yield made
    shutil.rmtree(made)


def start(site: RealSite) -> None:
    """Start the agent as AGENT."""
    words = [sys.executable, "-m", "fl_client.cli.client", "--site", "hospital-001", "--home", str(site.home.root)]
    site.process = subprocess.Popen(
        as_user(site.home.root.parent, AGENT, [MEETING], *words), env=site.environment(HOME="/"),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 180
    while agent_state(site.home, site.home.root.parent / "run" / "agent.sock") == "stopped":
        if site.process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"the agent did not start: {site.finish()}")
        time.sleep(0.2)


@pytest.mark.timeout(400)
def test_the_other_user_reaches_the_socket_and_nothing_else(site: RealSite) -> None:
    """The SuperNode's user gets an answer at the socket and reads its own key; ledger, keys, data and configuration
    are refused to it by the system; a third user does not even reach the socket."""
    if barrier(Path(__file__)) or barrier(Path(sys.prefix)):
        pytest.skip("the project lies where other users cannot read it")
    start(site)
    try:
        top = site.home.root.parent
        socket, node = str(top / "run" / "agent.sock"), top / "node"
        asked = run_as(top, NODE, [MEETING], ASK, socket)
        assert asked.stdout == "idle\n", asked.stderr
        own = [str(node / name) for name in ("node_key", "tunnel-ca.pem", "launch.json")]
        read = run_as(top, NODE, [MEETING], READ, *own).stdout.splitlines()
        assert read == [f"read {path}" for path in own]
        secret = [
            str(path) for path in (
                site.home.ledger, site.home.signing_key, site.home.client_key, site.home.fingerprint_key,
                site.home.config, site.home.root / "records.csv",
            )
        ]  # fmt: skip
        assert all(Path(path).exists() for path in secret)
        refused = run_as(top, NODE, [MEETING], READ, *secret).stdout.splitlines()
        assert refused == [f"PermissionError {path}" for path in secret]
        assert run_as(top, STRANGER, [], ASK, socket).returncode != 0
        written = run_as(top, NODE, [MEETING], WRITE, *own, str(node / "new"), str(node / "work" / "new")).stdout
        assert written.splitlines() == [
            *(f"PermissionError {path}" for path in [*own, node / "new"]), f"wrote {node / 'work' / 'new'}",
        ]  # fmt: skip
        assert run_as(top, STRANGER, [], READ, own[0]).stdout == f"PermissionError {own[0]}\n"
    finally:
        assert site.stop() == 0


def test_the_walls_hold_for_an_ordinary_user_without_any_privilege(short_path: Path) -> None:
    """Every attempt succeeds without walls (so it is one), none with them; what the SuperNode needs works."""
    if barrier(Path(__file__)) or barrier(Path(sys.prefix)):
        pytest.skip("the project lies where other users cannot read it")
    mine = short_path / "mine"
    mine.mkdir()
    os.chown(mine, NODE, NODE)
    asked = run_as(short_path, NODE, [], TRY, str(mine))
    assert asked.returncode == 0, asked.stderr
    found = json.loads(asked.stdout)
    for mode in ("auto", "require"):
        assert {name: got for name, got in found[mode][0].items() if got} == {}
        assert set(found[mode][1].values()) == {""}
    # What this machine refuses to anybody: not built into its kernel, or only for root.
    elsewhere = {name for name, got in found["off"][0].items() if not got}
    assert {name for name in elsewhere if not name.startswith("open a socket of family")} <= {
        "load BPF", "mount something", "call another ABI", "change the machine's settings",
    }  # fmt: skip


def test_an_agent_hands_nothing_over_where_the_other_user_may_write(site: RealSite) -> None:
    """The former layout, a directory of the untrusted half's user, is refused with what to do."""
    node = site.home.root.parent / "node"
    for owner, mode in ((NODE, 0o2770), (AGENT, 0o2770), (NODE, 0o750)):
        os.chown(node, owner, MEETING)
        node.chmod(mode)
        words = [sys.executable, "-m", "fl_client.cli.client", "--site", "hospital-001", "--home", str(site.home.root)]
        line = as_user(site.home.root.parent, AGENT, [MEETING], *words)
        done = subprocess.run(
            line, env=site.environment(HOME="/"), capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode != 0
        assert "can be written by others than the agent's user" in done.stderr
        assert "chmod 2750" in done.stderr
