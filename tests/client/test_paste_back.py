"""What a command prints to be typed next runs as it stands, in a home with a space, a quote and letters of Köln."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.gateway import Gateway
from helpers.smallest import smallest_base

BIN = Path(sys.executable).parent
SITE = "hospital-001"


def shell(line: str, place: Path) -> subprocess.CompletedProcess[str]:
    """Run a line as a person pastes it into a shell."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FL_")}
    environment = kept | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", "-c", line], cwd=place, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that every unquoted line falls over; with a short path, since a socket's holds 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="paste-") as top:
        made = Path(top) / "Haus 'Köln' $HOME"
        made.mkdir()
        yield made


def test_the_next_lines_of_enroll_and_check_run(gateway: Gateway, place: Path) -> None:
    """`then: fl-client check ...` checks the very home; the fix for a mode that is too open closes it."""
    asked = f"fl-client enroll --site {SITE} --home site --server {gateway.url} --token {gateway.token(SITE)}"
    done = shell(asked, place)
    assert done.returncode == 0, done.stderr
    told = dict(line.split(": ", 1) for line in done.stdout.splitlines() if line.startswith(("next: ", "then: ")))
    assert shell(told["next"].replace("edit", "test -f"), place).returncode == 0
    (place / "site" / "keys" / "signing.pem").chmod(0o644)
    settings = place / "site" / "site.toml"
    settings.write_text(settings.read_text().replace('directory = "tiny"', f'directory = "{smallest_base()}"'))
    check = shell(told["then"], place)
    assert "PASS  enrolled" in check.stdout
    fix = next(line.split("fix:")[1].strip() for line in check.stdout.splitlines() if "chmod 600" in line)
    assert shell(fix, place).returncode == 0
    assert "PASS  keys" in shell(told["then"], place).stdout


def test_the_next_lines_of_init_backup_and_restore_run(place: Path) -> None:
    """`next: fl-server up ...` names the home that was made; with `status` for `up` it answers."""
    done = shell("fl-server init --home coordinator --gateway-port 19443 --control-port 19444", place)
    line = next(each.removeprefix("next: ") for each in done.stdout.splitlines() if each.startswith("next: "))
    assert line.startswith("fl-server up --home ")
    state = shell(line.replace(" up ", " status "), place)
    assert state.returncode == 1  # it does not run
    assert "error" not in state.stderr
    assert shell("fl-server backup --home coordinator --out b.tar", place).returncode == 0
    restored = shell("fl-server restore b.tar --home other", place)
    again = restored.stdout.splitlines()[-1].strip()
    assert again.startswith("fl-server up --home ")
    assert shell(again.replace(" up ", " status "), place).returncode == 1
    missing = shell("fl-server status --home 'not here'", place)
    assert missing.returncode == 2
    assert shell(missing.stderr.split("`")[1], place).returncode == 0  # `fl-server init --home ...`
    assert (place / "not here" / "server.toml").exists()
