"""A forked command is a process like any other: `helpers/warm.py` against the interpreter that it stands in for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from helpers import warm

SAYS = """
import atexit, os, signal, sys
atexit.register(print, "ended")
print(sys.argv[1:], os.getcwd(), sorted(os.environ.items()), os.umask(0o077), __name__, flush=True)
print(signal.getsignal(signal.SIGCHLD), signal.getsignal(signal.SIGTERM), len(os.listdir("/proc/self/fd")))
print("trouble", file=sys.stderr)
sys.exit(3)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A script in a folder with a space."""
    made = tmp_path / "a folder" / "says.py"
    made.parent.mkdir()
    made.write_text(SAYS)
    return made


def test_a_fork_has_what_a_started_process_has(script: Path, tmp_path: Path) -> None:
    """Arguments, directory, environment, umask, handlers, descriptors, both outputs, what runs at exit, exit status:
    beside another that runs, nothing of which it has."""
    (tmp_path / "waits.py").write_text("import time\ntime.sleep(600)\n")
    beside = warm.start(str(tmp_path / "waits.py"), env=os.environ)
    environment = {"PATH": os.environ["PATH"], "ONLY": "this", "LC_ALL": "C.UTF-8"}
    words = ["one", "two words"]
    forked = warm.run(str(script), *words, env=environment, cwd=tmp_path)
    started = subprocess.run(
        [sys.executable, str(script), *words],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (forked.returncode, forked.stdout, forked.stderr) == (3, started.stdout, started.stderr)
    assert "ended" in forked.stdout
    beside.kill()
    beside.communicate(30)


def test_a_command_is_the_installed_one(tmp_path: Path) -> None:
    """`fl-client` with a wrong option, and a defect's exit code, as the script says them."""
    for words in (["fl-client", "--version"], ["fl-client", "check", "--nonsense"], ["fl-audit", "verify", "--help"]):
        forked = warm.run(*words, env=os.environ, cwd=tmp_path)
        path = str(Path(sys.executable).parent / words[0])
        started = subprocess.run(
            [path, *words[1:]], env=dict(os.environ), cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert (forked.returncode, forked.stdout) == (started.returncode, started.stdout)
        assert forked.stderr.splitlines()[-1:] == started.stderr.splitlines()[-1:]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_fork_ends_by_a_signal_and_another_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    """Each has its own end; the interpreter that forked them outlives them all."""
    (tmp_path / "waits.py").write_text("import time\nprint('here', flush=True)\ntime.sleep(600)\n")
    (tmp_path / "quick.py").write_text("raise SystemExit(5)\n")
    waits = warm.start(str(tmp_path / "waits.py"), env=os.environ)
    assert psutil.pid_exists(waits.pid)
    assert warm.run(str(tmp_path / "quick.py"), env=os.environ).returncode == 5
    assert waits.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        waits.wait(0.05)
    waits.send_signal(number)
    waits.communicate(30)
    assert waits.returncode == -number
    assert not psutil.pid_exists(waits.pid)
    waits.send_signal(number)  # to nobody, and to nobody else
