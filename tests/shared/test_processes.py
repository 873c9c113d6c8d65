"""Children end with their parent, and with their group; what a process asks of the system it gets at most."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from fl_shared.runtime.processes import end_group, spawn

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]
PARENT = (
    "import os, sys; from fl_shared.runtime.processes import spawn\n"
    "print(spawn(sys.argv[1:], dict(os.environ), None).pid, flush=True); input()\n"
)


def gone(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.TimeoutExpired):
        process.wait(30)
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_kill_9_of_the_parent_ends_the_child() -> None:
    """Although the child runs in a session of its own."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, *SLEEP], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    try:
        assert os.getsid(child.pid) == child.pid
        parent.kill()
        parent.communicate()
        assert gone(child)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


@pytest.mark.usefixtures("processes")
def test_a_group_ends_with_what_it_started_itself_and_what_ignores_sigterm(tmp_path: Path) -> None:
    """Leader and grandchild both ignore SIGTERM."""
    source = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    log = tmp_path / "logs" / "log"
    process = spawn([sys.executable, "-c", source], dict(os.environ), log)
    while not (said := log.read_text()).endswith("\n"):
        assert process.poll() is None
    grandchild = psutil.Process(int(said))
    end_group(process, 0.2)
    assert process.returncode == -9
    assert gone(grandchild)
    assert log.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("wanted", "limits", "after"),
    [
        ("", (64, 512), (512, 512)),
        ("256", (64, 512), (256, 512)),
        ("9999", (64, 512), (512, 512)),
        ("64", (128, 512), (128, 512)),
    ],
)
def test_descriptors_are_raised_to_what_is_wanted_and_allowed(
    wanted: str, limits: tuple[int, int], after: tuple[int, int]
) -> None:
    """Never beyond the hard limit, never down."""
    source = (
        "import resource; from fl_shared.runtime.processes import raise_file_limit\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, {limits}); raise_file_limit({wanted})\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE))\n"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == f"{after}\n"


def test_a_site_s_keeper_imports_nothing_of_ours_but_its_room() -> None:
    """What guards the untrusted half stays small enough to be read: no fl_shared, no other room of the site."""
    source = "import sys, fl_client.node.sandbox; print(*sorted(m for m in sys.modules if m.startswith('fl_')))"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True, timeout=60)
    rooms = {name.rpartition(".")[0] if name.count(".") > 1 else name for name in done.stdout.split()}
    assert rooms == {"fl_client", "fl_client.node"}
