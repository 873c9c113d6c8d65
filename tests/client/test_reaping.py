"""Nothing outlives its keeper: programs that fork faster than they are killed, within a hard limit of processes."""

from __future__ import annotations

import json
import os
import pwd
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from fl_client.node.reaping import Cgroup
from fl_client.node.sandbox import Confinement

HARD = 100
"""No test's program may ever have more processes than this, whatever the code under test does."""

BOMBS = {
    # Each process forks as fast as it can.
    "fork": "while time.time() < end: fork()",
    # Each leaves two behind in sessions of their own and is gone: whoever is found is not there any more.
    "rabbit": """
while time.time() < end:
    if fork() > 0 and fork() != 0:
        os._exit(0)
    try:
        os.setsid()
    except OSError:
        pass
""",
    # The same, and each wakes what was stopped.
    "awake": """
while time.time() < end:
    if fork() > 0 and fork() != 0:
        os._exit(0)
    try:
        os.kill(-1, signal.SIGCONT)
    except OSError:
        pass
""",
}
START = """
import os, signal, time
end = time.time() + 40
signal.signal(signal.SIGTERM, signal.SIG_IGN)
def fork():
    try:
        return os.fork()
    except OSError:
        return -1
"""
# The same for a user that may not reach this Python.
PERL_START = "$SIG{TERM} = 'IGNORE'; $end = time + 40; sub f { my $p = fork; defined $p ? $p : -1 } "
PERL_BOMBS = {
    "fork": "f() while time < $end;",
    "rabbit": "while (time < $end) { exit if f() > 0 && f() != 0; setpgrp(0, 0); }",
    "awake": "while (time < $end) { exit if f() > 0 && f() != 0; kill 'CONT', -1; }",
}
KEEP = """
import ctypes, os, resource, sys, time
from fl_client.node.reaping import kill_descendants
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # a subreaper, as the keeper
if os.fork() == 0:
    os.setgid(int(sys.argv[1]))
    os.setuid(int(sys.argv[1]))
    resource.setrlimit(resource.RLIMIT_NPROC, (int(sys.argv[2]), int(sys.argv[2])))
    exec(sys.argv[3])
    os._exit(0)
sys.stdin.read(1)
kill_descendants()
"""

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root for a user of its own with a limit of its own"),
    pytest.mark.timeout(180),
]


def of_user(user: int) -> list[psutil.Process]:
    return [each for each in psutil.process_iter(["uids"]) if each.info["uids"] and each.info["uids"].real == user]


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def capped() -> None:
    """For the keeper: what it starts as another user is limited, also when the code under test limits nothing."""
    resource.setrlimit(resource.RLIMIT_NPROC, (HARD, HARD))


@pytest.mark.parametrize("bomb", BOMBS)
def test_the_loop_ends_whatever_forks(bomb: str) -> None:
    """Without a cgroup: stop and kill until none is left."""
    user = 61178
    line = ["timeout", "-k", "1", "120", sys.executable, "-c", KEEP, str(user), "60", START + BOMBS[bomb]]
    with subprocess.Popen(line, stdin=subprocess.PIPE, preexec_fn=capped) as keeper:
        wait_for(lambda: len(of_user(user)) > 20)
        keeper.communicate(b".")
    assert keeper.returncode == 0
    assert of_user(user) == []


@pytest.mark.skipif(not Path("/usr/bin/perl").exists(), reason="needs a program that any user may run")
@pytest.mark.parametrize("bomb", BOMBS)
def test_the_keeper_ends_whatever_forks(tmp_path: Path, bomb: str) -> None:
    """The real keeper, without the walls that would hide the rest of the machine: no process is left, and none ever
    were more than allowed."""
    user, tasks = pwd.getpwnam("nobody"), 40
    before = len(of_user(user.pw_uid))
    confinement = Confinement(
        command=["/usr/bin/perl", "-e", f"{PERL_START} if (fork) {{ sleep 60 }} {PERL_BOMBS[bomb]}"],
        environment={}, directory="/", log=str(tmp_path / "log"),
        readable=[], writable=[], connect_ports=[], bind_ports=[], mode="off",
        user="nobody", tasks=tasks,
    )  # fmt: skip
    keeper = subprocess.Popen(
        ["timeout", "-k", "1", "120", sys.executable, "-P", "-m", "fl_client.node.sandbox"],
        stdin=subprocess.PIPE, preexec_fn=capped,
    )  # fmt: skip
    assert keeper.stdin is not None
    keeper.stdin.write(confinement.to_line())
    keeper.stdin.flush()
    wait_for(lambda: len(of_user(user.pw_uid)) > before + 5)  # those that are gone at once are hard to count
    for _ in range(20):
        assert len(of_user(user.pw_uid)) <= before + 1 + tasks
        time.sleep(0.02)
    keeper.stdin.close()
    assert keeper.wait(120) == 0, (tmp_path / "log").read_text()
    assert len(of_user(user.pw_uid)) == before


def test_what_a_killed_keeper_left_ends_at_the_next_start(tmp_path: Path) -> None:
    """kill -9 of the keeper leaves a daemon; the next group of the same directory begins empty."""
    group = Cgroup.make(str(tmp_path), limited=True)
    if group is None:
        pytest.skip("cgroup v2 cannot be written here")
    door = group.open_procs()
    script = f"import os, time; os.write({door}, b'0'); os.setsid() if os.fork() == 0 else os._exit(0); time.sleep(600)"
    subprocess.run([sys.executable, "-c", script], pass_fds=[door], check=True)
    os.close(door)
    (left,) = (int(word) for word in (group.directory / "cgroup.procs").read_text().split())
    again = Cgroup.make(str(tmp_path), limited=True)
    assert again is not None
    assert (again.directory / "cgroup.procs").read_text() == ""
    assert not psutil.pid_exists(left) or psutil.Process(left).status() == psutil.STATUS_ZOMBIE
    again.end()
    assert not again.directory.exists()


def test_no_descriptor_left_is_not_taken_for_no_process() -> None:
    """A keeper that cannot list its descendants just then goes on until it can, and none is left."""
    script = (
        "import os, resource, threading, time\n"
        "from fl_client.node.reaping import kill_descendants\n"
        "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "child = os.fork()\n"
        "if child == 0: time.sleep(60)\n"
        "def again(): time.sleep(1); resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))\n"
        "threading.Thread(target=again).start()\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))\n"
        "kill_descendants()\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))\n"
        "print(os.path.exists(f'/proc/{child}'))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["False"]


def test_the_agent_keeps_places_that_the_untrusted_half_cannot_take() -> None:
    """Both have the same user and limit: the last 64 processes are for the agent, which has helpers to start."""
    ask = (
        "import os, resource; from fl_client.node.reaping import limit_tasks; os.setuid(61181)\n"
        "resource.setrlimit(resource.RLIMIT_NPROC, (200, resource.getrlimit(resource.RLIMIT_NPROC)[1]))\n"
        "limit_tasks(512)\n"
        "print(*resource.getrlimit(resource.RLIMIT_NPROC))\n"
    )
    done = subprocess.run([sys.executable, "-c", ask], stdout=subprocess.PIPE, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["136", "136"]


def test_a_hierarchy_of_groups_that_is_only_partly_seen_is_no_hierarchy(monkeypatch: pytest.MonkeyPatch) -> None:
    """In some containers the own group lies outside what is mounted: there is no group then, and no traceback."""

    def elsewhere() -> Path:
        return Path("/sys/fs/cgroup") / Path("/b").relative_to("/a")

    monkeypatch.setattr("fl_client.node.reaping._own_group", elsewhere)
    assert Cgroup.make("x", limited=True) is None


def test_the_limit_counts_what_the_user_has_already() -> None:
    """Others of the same user do not use up the places of the untrusted half, and it cannot raise its limit."""
    ask = (
        "import json, os, resource, sys; from fl_client.node.reaping import limit_tasks; os.setuid(61179)\n"
        "others = [os.fork() for _ in range(3)]\n"
        "if 0 in others: sys.stdin.read(); os._exit(0)\n"
        "limit_tasks(50)\n"
        "try: resource.setrlimit(resource.RLIMIT_NPROC, (9999, 9999)); raised = True\n"
        "except ValueError: raised = False\n"
        "print(json.dumps([resource.getrlimit(resource.RLIMIT_NPROC)[1], raised]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", ask], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True, timeout=60
    )
    most, raised = json.loads(done.stdout)
    assert 51 <= most <= 150  # with the threads of libraries
    assert not raised
