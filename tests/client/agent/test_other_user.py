"""`[supernode] user`: a real second user tries to read the secrets and races the agent, under the default umask."""

from __future__ import annotations

import os
import pwd
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fl_client.agent.check import run_checks
from fl_client.node.handover import make_shared_directories
from fl_client.node.spec import NodeSpec, make_home
from fl_client.site.config import SiteConfig
from fl_shared.errors import ConfigError
from helpers.agents import SITE, RealSite
from helpers.gateway import Gateway

OTHER = "nobody"
LOOK = 'for path in "$@"; do cat -- "$path" >/dev/null 2>&1 && echo "read $path"; done; true'
# Swaps everything that the user has for links to what it wants, as fast as it can.
RACE = """
cd "$1" || exit 1
while :; do
  for name in home home/tmp home/flwr; do
    rm -rf "$name" 2>/dev/null || mv "$name" "$name.was" 2>/dev/null
    ln -sfn "$2" "$name" 2>/dev/null
    ln "$2/ledger.sqlite" home/hard 2>/dev/null
    mkdir "$name" 2>/dev/null
  done
done
"""

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be another user")]


@pytest.fixture
def site(gateway: Gateway) -> Iterator[RealSite]:
    """A root agent's home in a place that others may pass by, made under umask 022."""
    place = Path(tempfile.mkdtemp(prefix="other-"))
    place.chmod(0o711)
    before = os.umask(0o022)
    try:
        made = RealSite(place / "home", gateway)
        text = made.home.config.read_text()
        port = text.partition("tunnel_port = ")[2].partition("\n")[0]
        made.home.config.write_text(text.replace("launch = false", f'launch = true\nuser = "{OTHER}"'))
        assert port
        yield made
        if made.process is not None and made.process.poll() is None:
            made.kill()
    finally:
        os.umask(before)
        shutil.rmtree(place)


def as_other(script: str, *arguments: str) -> list[str]:
    """Run a shell script as the other user and return what it prints, line by line."""
    account = pwd.getpwnam(OTHER)
    done = subprocess.run(
        ["/bin/sh", "-c", script, "sh", *arguments], cwd="/", check=False, timeout=60, capture_output=True, text=True,
        user=account.pw_uid, group=account.pw_gid, extra_groups=[],
    )  # fmt: skip
    return done.stdout.splitlines()


def facts(root: Path) -> dict[str, tuple[int, int]]:
    """Owner and mode of everything below."""
    return {
        str(path): (found.st_uid, stat.S_IMODE(found.st_mode))
        for path in (root, *root.rglob("*"))
        for found in [path.lstat()]
    }


@pytest.mark.timeout(300)
def test_the_other_user_reads_nothing_of_the_home(site: RealSite) -> None:
    """Under umask 022 with data of mode 0644: after the start everything is closed, and only the meeting place is
    reached; the log says what was closed."""
    home, table = site.home, site.home.root / "records.csv"
    assert stat.S_IMODE(table.stat().st_mode) == 0o644
    process = site.start(wait=False)
    socket = home.meeting / "agent.sock"
    deadline = time.monotonic() + 120
    while not socket.exists():
        assert process.poll() is None, site.finish()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    for _ in range(20):  # while the SuperNode's keeper works
        everything = [str(path) for path in (home.root, *home.root.rglob("*"))]
        assert as_other(LOOK, *everything) == []
        time.sleep(0.1)
    assert all(mode & 0o077 == 0 for _, mode in facts(home.root).values()), facts(home.root)
    assert as_other('test -w "$1" && echo socket; test -r "$2" && echo key; test -w "$3" || echo ours',
                    str(socket), str(home.meeting / "supernode" / "node_key"), str(home.meeting)) == [
        "socket", "key", "ours",
    ]  # fmt: skip
    assert site.stop() == 0
    assert "files that others than their owner could open" in (home.logs / "agent.jsonl").read_text()


@pytest.mark.timeout(300)
def test_a_swapped_directory_gives_nothing_away(site: RealSite) -> None:
    """The other user replaces what it owns by links into the home while root makes it anew 150 times: no owner and no
    mode in the home changes, and no start fails for good."""
    home, account = site.home, pwd.getpwnam(OTHER)
    (home.root / "ledger.sqlite").write_text("x")
    directory = home.meeting / "supernode"
    make_shared_directories(directory, home.meeting / "agent.sock", account)
    plan = NodeSpec(
        directory, home.meeting / "agent.sock", directory / "node_key", directory / "tunnel-ca.pem", 1, user=OTHER
    )
    make_home(plan)
    before = facts(home.root)
    racer = subprocess.Popen(
        ["timeout", "120", "/bin/sh", "-c", RACE, "sh", str(directory / "work"), str(home.root)],
        cwd="/", user=account.pw_uid, group=account.pw_gid, extra_groups=[],
    )  # fmt: skip
    try:
        for _ in range(150):
            make_home(plan)
            assert racer.poll() is None
        time.sleep(0.2)
        assert (directory / "work" / "home" / "flwr").is_symlink() or (directory / "work" / "home").exists()
    finally:
        racer.terminate()
        racer.wait()
    assert facts(home.root) == before
    make_home(plan)
    for path in (plan.home, plan.home / "tmp", plan.home / "flwr"):
        assert (path.lstat().st_uid, stat.S_ISDIR(path.lstat().st_mode)) == (account.pw_uid, True)


def test_what_the_other_user_could_read_is_said_before_anything_starts(site: RealSite) -> None:
    """`fl-client check` names data outside the home that the user can read; a place in the home is refused; so is a
    home that nobody can pass by, and a user that is not there."""
    data = site.home.root.parent / "outside.csv"
    shutil.move(site.home.root / "records.csv", data)
    data.chmod(0o644)
    text = site.home.config.read_text()
    site.home.config.write_text(text.replace("records.csv", str(data)))
    found = next(each for each in run_checks(site.home, SITE) if each.name == "separation")
    assert not found.ok
    assert str(data) in found.message
    assert "chmod go=" in found.fix
    for change, told in (
        (f'user = "{OTHER}"\nsocket = "{site.home.socket}"', "no other user can enter"),
        (f'user = "{OTHER}"\ndirectory = "{site.home.supernode}"', "no other user can enter"),
    ):
        site.home.config.write_text(text.replace(f'user = "{OTHER}"', change))
        with pytest.raises(ConfigError, match=told):
            SiteConfig.load(site.home, SITE)
    site.home.config.write_text(text.replace(f'user = "{OTHER}"', 'user = "no-such-user"'))
    assert site.start(wait=False).wait(60) == 2
    assert "no such user" in site.finish()
    site.home.config.write_text(text)
    site.home.root.parent.chmod(0o700)
    assert site.start(wait=False).wait(60) == 2
    assert "cannot enter" in site.finish()
