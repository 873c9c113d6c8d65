"""The untrusted half: what a hostile app finds when it looks for data, keys, the ledger and a way out."""

from __future__ import annotations

import dataclasses
import json
import os
import pwd
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from fl_client.node.environment import node_environment
from fl_client.node.record import Record
from fl_client.node.sandbox import landlock_abi
from helpers.sandboxes import NO_NAMESPACES, close, confinement_of, start_keeper

HOSTILE = """
import json, os, socket, sys
report = {}
def attempt(name, act):
    try:
        report[name] = ["got", repr(act())[:2000]]
    except BaseException as error:
        report[name] = ["refused", type(error).__name__]
agent, closed_port, open_port = int(sys.argv[1]), int(sys.argv[3]), int(sys.argv[4])
secrets = json.loads(sys.argv[2])
for path in secrets:
    attempt("read " + path, lambda: open(path, "rb").read())
    attempt("write " + path, lambda: open(path, "ab").write(b"x"))
    attempt("list " + path, lambda: os.listdir(os.path.dirname(path)))
attempt("agent environ", lambda: open(f"/proc/{agent}/environ", "rb").read())
attempt("agent memory", lambda: open(f"/proc/{agent}/mem", "rb").read(1))
attempt("agent files", lambda: [os.readlink(f"/proc/{agent}/fd/{n}") for n in range(3)])
attempt("agent root", lambda: os.listdir(f"/proc/{agent}/root"))
attempt("signal agent", lambda: os.kill(agent, 0))
attempt("dial out", lambda: socket.create_connection(("127.0.0.1", closed_port), 2))
attempt("dial tunnel", lambda: socket.create_connection(("127.0.0.1", open_port), 2).close())
attempt("own file", lambda: open("mine", "w").write("x"))
report["environment"] = dict(os.environ)
report["arguments"] = open("/proc/self/cmdline").read()
fds = [f"/proc/self/fd/{n}" for n in os.listdir("/proc/self/fd")]
report["fds"] = sorted(os.readlink(fd) for fd in fds if os.path.exists(fd))
group = []
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        if os.getpgid(int(pid)) == os.getpgrp():
            group.append(open(f"/proc/{pid}/cmdline").read())
    except OSError:
        pass
report["group"] = group
open("report.json", "w").write(json.dumps(report))
"""


@pytest.fixture
def node_directory(tmp_path: Path) -> Path:
    """An untrusted directory inside a site's home."""
    directory = tmp_path / "home" / "supernode"
    directory.mkdir(parents=True)
    return directory


def hostile_report(node_directory: Path, **changes: Any) -> tuple[dict[str, Any], list[Path]]:
    """Run the hostile app and return what it found, with the paths that it must not reach."""
    home = node_directory.parent
    hidden = [home / "keys" / "signing.pem", home / "ledger.sqlite", home / "data" / "patients.csv"]
    for path in hidden:
        path.parent.mkdir(exist_ok=True)
        path.write_text("planted-secret")
    with socket.socket() as closed, socket.socket() as opened:
        for listener in (closed, opened):
            listener.bind(("127.0.0.1", 0))
            listener.listen()
        ports = [listener.getsockname()[1] for listener in (closed, opened)]
        command = [sys.executable, "-c", HOSTILE, str(os.getpid())]
        command += [json.dumps([str(p) for p in hidden]), *map(str, ports)]
        made = confinement_of(node_directory, command, connect_ports=[ports[1]], bind_ports=[], **changes)
        keeper = start_keeper(made)
        assert keeper.wait(60) == 0, (node_directory / "supernode.log").read_text()
        close(keeper)
    return json.loads((Path(made.directory) / "report.json").read_text()), hidden


@pytest.mark.skipif(landlock_abi() < 6, reason="this kernel's Landlock does not cover network and signals")
def test_a_hostile_app_reaches_neither_files_nor_the_agent_nor_the_network(node_directory: Path) -> None:
    """Everything outside its directory is refused by the kernel; its tunnel and its own files work."""
    report, hidden = hostile_report(node_directory)
    for path in hidden:
        assert report[f"read {path}"][0] == "refused", report
        assert report[f"write {path}"][0] == "refused"
        assert report[f"list {path}"][0] == "refused"
        assert path.read_text() == "planted-secret"
    for name in ("agent environ", "agent memory", "agent files", "agent root", "signal agent", "dial out"):
        assert report[name][0] == "refused", (name, report[name])
    assert report["dial tunnel"][0] == "got"
    assert report["own file"][0] == "got"


def test_arguments_environment_and_open_files_hold_nothing_of_the_site(node_directory: Path) -> None:
    """Without the kernel's help, too: only allowed variables, no inherited descriptor, no secret."""
    report, _ = hostile_report(node_directory, mode="off")
    assert set(report["environment"]) - {"LC_CTYPE"} == set(node_environment(node_directory / "work" / "home"))
    assert "planted-secret" not in json.dumps([report["environment"], report["group"]])
    (output,) = {place for place in report["fds"] if place.startswith("pipe:")}  # its keeper's, who alone has the log
    rest = [place for place in report["fds"] if place not in ("/dev/null", output)]
    assert all(place.startswith((str(node_directory / "work" / "home"), "/proc/")) for place in rest)
    # The hostile app's own arguments name the secrets: the test put them there.
    others = [line for line in report["group"] if "HOSTILE" not in line and "report = {}" not in line]
    assert not any(name in line for line in others for name in ("signing.pem", "ledger", "patients"))


@pytest.mark.parametrize("fallback", [False, True])
@pytest.mark.parametrize("how", ["closed", "guard killed", "keeper killed"])
def test_nothing_outlives_the_keeper_even_when_it_leaves_the_group(
    node_directory: Path, how: str, fallback: bool
) -> None:
    """An app and its daemon, who will not die with their parents, are killed when the agent's end of the pipe closes,
    and when either of the keeper's two processes is killed."""
    script = (
        "import ctypes, os, time\n"
        "ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\n"  # no signal at the parent's death
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        "        open('pid', 'w').write(str(os.getpid()))\n"
        "        time.sleep(600)\n"
        "    os._exit(0)\n"
        "time.sleep(600)\n"
    )
    marker = secrets.token_hex(8)

    def alive() -> list[psutil.Process]:
        return [each for each in psutil.process_iter(["cmdline"]) if marker in (each.info["cmdline"] or [])]

    made = confinement_of(node_directory, [sys.executable, "-c", script, marker])
    keeper = start_keeper(made, NO_NAMESPACES if fallback else [])
    pid_file = Path(made.directory) / "pid"
    deadline = time.monotonic() + 60
    while not (pid_file.exists() and pid_file.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(alive()) == 2
    if how == "closed":
        close(keeper)
        assert keeper.wait(60) == 0
    else:
        (inner,) = psutil.Process(keeper.pid).children()
        (inner if how == "keeper killed" else keeper).kill()
        keeper.wait(60)
        deadline = time.monotonic() + 60  # after the guard's death the other one ends them, and nobody waits for it
        while alive() and time.monotonic() < deadline:
            time.sleep(0.05)
    assert alive() == []


@pytest.mark.parametrize("fallback", [False, True])
def test_a_keeper_killed_at_any_moment_of_its_start_leaves_nothing(node_directory: Path, fallback: bool) -> None:
    """kill -9 of its second process after 0 to 0.6 s: while it makes walls, forks, hands over sockets, runs."""
    marker = secrets.token_hex(8)
    script = "import ctypes, time; ctypes.CDLL(None).prctl(1, 0, 0, 0, 0); time.sleep(600)"
    made = confinement_of(node_directory, [sys.executable, "-c", script, marker])

    def alive() -> list[psutil.Process]:
        return [each for each in psutil.process_iter(["cmdline"]) if marker in (each.info["cmdline"] or [])]

    for number in range(12):
        keeper = start_keeper(made, NO_NAMESPACES if fallback else [])
        deadline = time.monotonic() + 60
        while not psutil.Process(keeper.pid).children():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(number * 0.05)
        for inner in psutil.Process(keeper.pid).children():
            inner.kill()
        assert keeper.wait(60) != 0
        close(keeper)
        assert alive() == []


LIMITS = """
import json, os, resource
report = {"score": open("/proc/self/oom_score_adj").read().strip(), "core": resource.getrlimit(resource.RLIMIT_CORE)}
report["files"] = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
for act in (lambda: os.fchmod(1, 0o4777), lambda: os.ftruncate(1, 0), lambda: os.posix_fallocate(1, 0, 1 << 30)):
    try:
        act()
    except OSError:
        pass
for _ in range(20):
    os.write(1, b"x" * 1023 * 1024 + b"\\n" * 1024)
os.write(1, json.dumps(report).encode() + b"\\n")
"""


@pytest.mark.parametrize("fallback", [False, True])
def test_an_app_fills_no_disk_with_words_and_is_the_first_to_go(node_directory: Path, fallback: bool) -> None:
    """Its output goes through a pipe: two files of 8 MiB, whose mode it cannot change; no core, few descriptors."""
    made = confinement_of(node_directory, [sys.executable, "-c", LIMITS])
    keeper = start_keeper(made, NO_NAMESPACES if fallback else [])
    assert keeper.wait(120) == 0
    close(keeper)
    log = Path(made.log)
    report = json.loads(log.read_text().splitlines()[-1])
    assert report == {"score": "1000", "core": [0, 0], "files": 1024}
    written = [log, log.with_name(log.name + ".1")]
    assert all(each.stat().st_mode & 0o7777 == 0o600 and each.stat().st_size <= 8 << 20 for each in written)
    assert sorted(node_directory.glob("supernode.log*")) == written


def test_the_command_runs_as_another_user_when_asked(node_directory: Path) -> None:
    """[supernode] user: the process has that user's id and no other group."""
    if os.geteuid() != 0:
        pytest.skip("only root may start a process as another user")
    # /bin/sh, because the environment's Python may lie in root's own home.
    outside = Path(tempfile.mkdtemp())
    try:
        made = confinement_of(node_directory, ["/bin/sh", "-c", "id -u; id -g; id -G"], user="nobody")
        outside.chmod(0o755)
        made = dataclasses.replace(made, directory=str(outside), writable=[str(outside), "/dev/null"])
        keeper = start_keeper(made)
        assert keeper.wait(60) == 0, Path(made.log).read_text()
        close(keeper)
    finally:
        outside.rmdir()
    account = pwd.getpwnam("nobody")
    expected = f"{account.pw_uid}\n{account.pw_gid}\n{account.pw_gid}\n"
    assert Path(made.log).read_text() == expected


def test_what_the_operator_requires_and_the_kernel_lacks_is_refused(node_directory: Path) -> None:
    """confine = "require" never starts the untrusted half behind fewer walls; auto says which are missing."""
    script = "from fl_client.node.confinement import describe_confinement as d; print(d('auto', '')); d('require', '')"
    words = [*NO_NAMESPACES, sys.executable, "-c", script]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert "WITHOUT namespaces (" in done.stdout
    assert 'confine is "require", and this machine lacks namespaces' in done.stderr
    made = confinement_of(node_directory, [sys.executable, "-c", "open('ran', 'w')"], mode="require")
    keeper = start_keeper(made, NO_NAMESPACES)
    assert keeper.wait(60) == 1
    close(keeper)
    assert not (Path(made.directory) / "ran").exists()


def test_a_record_that_cannot_be_opened_again_closes_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of the file is another's as soon as it is closed; so the old file stays until there is a new one."""
    monkeypatch.setattr("fl_client.node.record.LIMIT_BYTES", 10)
    record = Record(tmp_path / "log")
    os.write(record.entrance, b"x" * 10)
    assert record.take()
    real = os.open
    monkeypatch.setattr(os, "open", lambda *_: (_ for _ in ()).throw(OSError("no descriptor")))
    os.write(record.entrance, b"lost")
    assert record.take()
    monkeypatch.setattr(os, "open", real)
    other = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)
    (tmp_path / "log").touch()
    os.write(record.entrance, b"kept")
    assert record.take()
    os.write(other, b"mine")
    os.close(other)
    assert ((tmp_path / "log").read_bytes(), (tmp_path / "other").read_bytes()) == (b"kept", b"mine")
