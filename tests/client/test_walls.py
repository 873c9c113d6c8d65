"""The walls around the untrusted half, tried by an app that wants out, and what it leaves behind for the next start."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fl_client.node import seccomp
from fl_client.node.spec import SPEC_FILE, NodeSpec, make_home
from fl_client.node.supernode import node_confinement, start_node
from fl_client.node.walls import require_apart, try_walls
from fl_shared.errors import ConfigError
from helpers.sandboxes import NO_LANDLOCK, NO_NAMESPACES, close, confinement_of, start_keeper

OUT = """
import os, socket, sys, time
tcp, udp, tunnel = map(int, sys.argv[1:])
def attempt(act):
    try:
        act()
    except OSError:
        pass
for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "127.0.0.2"), (socket.AF_INET6, "::1")):
    for protocol in (0, 6, 262, 132):
        for port in (tcp, tunnel):
            attempt(lambda: socket.socket(family, socket.SOCK_STREAM, protocol).connect((host, port)))
            made = socket.socket
            attempt(lambda: made(family, socket.SOCK_STREAM, protocol).sendto(b"out", 0x20000000, (host, port)))
    for kind, protocol in ((socket.SOCK_DGRAM, 0), (socket.SOCK_DGRAM, 136), (socket.SOCK_RAW, 17)):
        attempt(lambda: socket.socket(family, kind, protocol).sendto(b"out", (host, udp)))
with socket.socket() as loud:
    loud.listen(8)
    print(loud.getsockname()[1], flush=True)
    time.sleep(3)
"""
OLD_ABI = """
import ctypes, mmap
code = bytes.fromhex("53b814000000cd805bc3")  # push rbx; mov eax, 20 (getpid on i386); int 0x80; pop rbx; ret
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(code)
act = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
print("before", flush=True)
print("answered", act(), flush=True)
"""
LEAVE = """
import glob, json, os, shutil, sys
directory, plan, left = sys.argv[1], json.loads(sys.argv[2]), []
def attempt(act):
    try:
        act()
        left.append(act.__name__)
    except OSError:
        pass
def write(path, text):
    def writing():
        os.makedirs(os.path.dirname(path), exist_ok=True)
        open(path, "w").write(text)
    writing.__name__ = "wrote " + path
    attempt(writing)
bad = "open('" + directory + "/ran-outside', 'w').close()"
for place in (directory, directory + "/work", os.path.dirname(directory), "/usr/lib/python3/dist-packages", sys.prefix):
    for name in ("launch.json", "node_key", "tunnel-ca.pem", "json.py", "ctypes.py", "fl_client/__init__.py",
                 "sitecustomize.py", "supernode.log"):
        write(place + "/" + name, json.dumps(plan) if name == "launch.json" else bad)
def move():
    os.rename(directory + "/launch.json", directory + "/old.json")
def replace():
    os.rename(directory + "/work", directory + "/away")
def link():
    os.symlink(os.path.dirname(directory), os.path.join(directory, "work", "link"))
def unlink():
    os.unlink(directory + "/node_key")
for act in (move, replace, link, unlink):
    attempt(act)
print(json.dumps(left))
for name in ("json.py", "flwr/apps/planted.py", ".local/lib/python3.11/site-packages/bad.pth", "sitecustomize.py"):
    os.makedirs(os.path.dirname(os.path.abspath(name)), exist_ok=True)
    open(name, "w").write("import os; " + bad)
os.symlink(directory, "flwr/loop")
deep = "d"
os.chdir("tmp")
for _ in range(3000):
    os.mkdir(deep)
    os.chdir(deep)
"""


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """A directory for the untrusted half, in a home, as the agent makes it."""
    made = tmp_path / "home" / "supernode"
    made.mkdir(parents=True, mode=0o700)
    for name in ("node_key", "tunnel-ca.pem"):
        (made / name).write_text("of the agent")
    return made


@pytest.mark.usefixtures("processes")
def test_no_wall_is_open_where_the_kernel_offers_all(tmp_path: Path) -> None:
    """Every attempt of the probe is refused, as root too; without walls nearly every one succeeds."""
    secret = tmp_path / "patients.csv"
    secret.write_text("private")
    held = try_walls({"the data": secret}, "require")
    assert {name: got for name, got in held.open.items() if got} == {}
    assert set(held.works.values()) == {""}
    free = try_walls({"the data": secret}, "off")
    assert sum(1 for got in free.open.values() if got) > len(free.open) // 2
    assert secret.read_text() == "private"


def test_what_is_open_without_namespaces_is_what_the_documents_say() -> None:
    """Landlock and seccomp alone leave five ways open, and the probe names them."""
    script = (
        "import json; from pathlib import Path; from fl_client.node.walls import try_walls;"
        f"found = try_walls({{'the data': Path({str(Path(__file__))!r})}}, 'auto');"
        "print(json.dumps([found.open, found.works]))"
    )
    done = subprocess.run(
        [*NO_NAMESPACES, sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    left_open, works = json.loads(done.stdout)
    assert {name for name, got in left_open.items() if got} == {
        "see the size of the data", "connect to the tunnel's port on another host", "listen without an address",
        "connect to another Unix socket", "see the agent among the processes",
    }  # fmt: skip
    assert set(works.values()) == {""}


def test_without_landlock_the_two_other_walls_hold_alone() -> None:
    """In a kernel without it nothing is open either, for root neither: the machine's settings in /proc are root's."""
    script = (
        "import json; from pathlib import Path; from fl_client.node.sandbox import landlock_abi;"
        "from fl_client.node.walls import try_walls;"
        f"found = try_walls({{'the data': Path({str(Path(__file__))!r})}}, 'auto');"
        "print(json.dumps([landlock_abi(), found.open, found.works]))"
    )
    words = [*NO_LANDLOCK, sys.executable, "-c", script]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)
    abi, left_open, works = json.loads(done.stdout)
    assert abi == 0
    assert {name: got for name, got in left_open.items() if got} == {}
    assert set(works.values()) == {""}


def test_nothing_private_lies_where_the_untrusted_half_must_read(tmp_path: Path) -> None:
    """No wall stands between a program and the directory that it runs from; nor behind a link to it."""
    (tmp_path / "link").symlink_to(sys.prefix)
    require_apart([tmp_path])
    for path in (Path(sys.prefix) / "home", tmp_path / "link" / "home", Path("/usr/local/site")):
        with pytest.raises(ConfigError, match="which the untrusted half can read"):
            require_apart([tmp_path, path])


CLOSED = """
import os
os.makedirs("tmp/closed/inner")
open("tmp/closed/inner/file", "w").write("x" * 100000)
for path in ("tmp/closed/inner", "tmp/closed", "tmp", "."):
    os.chmod(path, 0)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become an ordinary user")
def test_what_an_app_closed_to_its_own_user_is_removed_all_the_same() -> None:
    """Directories of mode 0 do not pile up start after start; for an ordinary user, whom modes bind."""
    place = Path(tempfile.mkdtemp())
    try:
        os.chown(place, 61201, 61201)
        child = os.fork()
        if child == 0:
            os.setgroups([])
            os.setgid(61201)
            os.setuid(61201)
            plan = NodeSpec(place, Path("/nowhere/agent.sock"), place / "node_key", place / "tunnel-ca.pem", 1)
            for _ in range(2):
                make_home(plan)
                os.chdir(plan.home)
                exec(CLOSED)
            os.chdir("/")
            make_home(plan)
            os._exit(len(list((place / "work").iterdir())))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1  # home alone
    finally:
        shutil.rmtree(place)


@pytest.mark.usefixtures("processes")
def test_a_link_that_an_app_left_is_removed_and_not_followed(tmp_path: Path) -> None:
    """A link beside its own directory changes no mode of a file elsewhere, and nothing behind it goes."""
    private = tmp_path / "private"
    private.mkdir(mode=0o500)
    (private / "key").touch(mode=0o400)
    plan = NodeSpec(tmp_path / "s", tmp_path / "agent.sock", tmp_path / "node_key", tmp_path / "tunnel-ca.pem", 1)
    plan.directory.mkdir()
    make_home(plan)
    for name, target in (("old-directory", private), ("old-file", private / "key")):
        (plan.home.parent / name).symlink_to(target)
    make_home(plan)
    assert [each.name for each in plan.home.parent.iterdir()] == [plan.home.name]
    assert [path.stat().st_mode & 0o777 for path in (private, private / "key")] == [0o500, 0o400]


def test_no_byte_leaves_by_any_socket(node: Path) -> None:
    """Listeners outside hear nothing, by TCP, UDP, MPTCP or with the first packet; nobody outside gets in."""
    with socket.socket() as tcp, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp, socket.socket() as tunnel:
        for each in (tcp, udp, tunnel):
            each.bind(("127.0.0.1", 0))
            each.setblocking(False)
        tcp.listen()
        tunnel.listen()
        ports = [str(each.getsockname()[1]) for each in (tcp, udp, tunnel)]
        command = [sys.executable, "-c", OUT, *ports]
        made = confinement_of(node, command, connect_ports=[int(ports[2])], bind_ports=[])
        keeper = start_keeper(made)
        deadline = time.monotonic() + 60
        while not Path(made.log).exists() or not Path(made.log).read_text().strip():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        listening = int(Path(made.log).read_text().split()[0])
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", listening)) != 0
        assert keeper.wait(60) == 0
        close(keeper)
        for each in (tcp, udp):
            with pytest.raises(BlockingIOError):
                each.accept() if each is tcp else each.recv(10)
        heard = []
        with contextlib.suppress(BlockingIOError):
            while True:
                with tunnel.accept()[0] as far:
                    far.settimeout(5)
                    heard.append(far.recv(10))
        assert len(heard) <= 4  # the tunnel's own port at 127.0.0.1, where it may connect, without multipath
        assert set(heard) <= {b""}


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the machine code is of x86")
def test_a_system_call_of_another_abi_ends_the_process(node: Path) -> None:
    """The filter's numbers are of one ABI; a call of i386 is not compared with them but killed."""
    made = confinement_of(node, [sys.executable, "-c", OLD_ABI])
    keeper = start_keeper(made)
    assert keeper.wait(60) != 0
    close(keeper)
    assert Path(made.log).read_text().split() == ["before"]


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_numbers_of_system_calls_are_the_kernels(machine: str) -> None:
    """Each name has the number of the kernel's own headers, on both architectures."""
    native = "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"
    header = Path(native if machine == "x86_64" else "/usr/include/asm-generic/unistd.h")
    if not header.exists():
        pytest.skip("the kernel's headers are not installed")
    found = {
        name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", header.read_text())
    }
    column = ["x86_64", "aarch64"].index(machine)
    compared = 0
    for name, numbers in {**seccomp.FORBIDDEN, **seccomp.ATTRIBUTES, **seccomp.CHECKED}.items():
        if name in found:
            assert numbers[column] == found[name], name
            compared += 1
        else:
            number = numbers[column]
            assert number is None or number > 450 or "handle_at" in name, name
    assert compared > 80
    assert len(seccomp.program(machine, pretend=True)) < 4096


@pytest.mark.parametrize("fallback", [False, True])
def test_what_an_app_leaves_behind_decides_nothing_at_the_next_start(node: Path, fallback: bool) -> None:
    """It cannot write plan, keys, modules or names that the next start reads; its own directory is new then."""
    plan = NodeSpec(node, Path("/nowhere/agent.sock"), node / "node_key", node / "tunnel-ca.pem", 1)
    plan.save()
    before = {path: path.read_text() for path in node.iterdir() if path.is_file()}
    bad = json.loads((node / SPEC_FILE).read_text()) | {"mode": "off", "socket": "/run/other.sock", "tunnel_port": 22}
    command = [sys.executable, "-c", LEAVE, str(node), json.dumps(bad)]
    made = confinement_of(node, command)
    keeper = start_keeper(made, NO_NAMESPACES if fallback else [])
    assert keeper.wait(60) == 0, Path(made.log).read_text()
    close(keeper)
    assert json.loads(Path(made.log).read_text().splitlines()[-1]) == []
    assert (plan.home / "json.py").exists()
    assert {path: path.read_text() for path in before} == before
    assert NodeSpec.load(node).mode == "auto"
    process = start_node(NodeSpec.load(node))
    process.terminate()
    process.wait(60)
    assert not (node / "ran-outside").exists()
    assert sorted(str(path.relative_to(plan.home)) for path in plan.home.iterdir()) == ["flwr", "tmp"]
    assert list((plan.home / "flwr").iterdir()) == list((plan.home / "tmp").iterdir()) == []
    assert [path.name for path in plan.home.parent.iterdir()] == ["home"]


@pytest.mark.usefixtures("processes")
def test_modules_in_a_directory_that_an_app_could_write_are_not_run_outside(node: Path) -> None:
    """The keeper takes no module from the directories of the untrusted half, wherever they were planted before."""
    plan = NodeSpec(node, Path("/nowhere/agent.sock"), node / "node_key", node / "tunnel-ca.pem", 1)
    bad = f"open({str(node / 'ran-outside')!r}, 'w').close()"
    for place in (node, node / "work", node / "work" / "home"):
        (place / "fl_client").mkdir(parents=True)
        for name in ("json.py", "ctypes.py", "fl_client/__init__.py"):
            (place / name).write_text(bad)
    process = start_node(plan)
    time.sleep(3)
    process.terminate()
    process.wait(60)
    assert not (node / "ran-outside").exists()


COPY = """
import os, shutil, sys
os.makedirs("from/inner")
open("from/inner/file", "w").write("x")
shutil.copytree("from", "to")
shutil.copy2("from/inner/file", "copied")
for path in sys.argv[1:]:
    for act in (lambda: os.chmod(path, 0o777), lambda: os.utime(path, (1, 1)), lambda: os.chown(path, 0, 0)):
        try:
            act()
        except OSError:
            pass
print("done")
"""


@pytest.mark.parametrize("fallback", [False, True])
def test_an_app_copies_its_files_and_changes_nobody_elses(node: Path, tmp_path: Path, fallback: bool) -> None:
    """Python's own copying, which sets modes and times, works; a device, the plan's files and the data stay as is."""
    others = [tmp_path / "data.csv", node / "node_key", Path("/dev/null"), Path(sys.executable)]
    others[0].write_text("private")
    before = [(path.stat().st_mode, path.stat().st_mtime_ns, path.stat().st_uid) for path in others]
    made = confinement_of(node, [sys.executable, "-c", COPY, *map(str, others)])
    keeper = start_keeper(made, NO_NAMESPACES if fallback else [])
    assert keeper.wait(60) == 0, Path(made.log).read_text()
    close(keeper)
    assert (Path(made.directory) / "to" / "inner" / "file").read_text() == "x"
    after = [(path.stat().st_mode, path.stat().st_mtime_ns, path.stat().st_uid) for path in others]
    assert [each[::2] for each in after] == [each[::2] for each in before]
    assert [each[1] for each in after[:2]] == [each[1] for each in before[:2]]


def test_a_directory_that_others_may_write_is_no_place_for_a_plan(node: Path) -> None:
    """The launcher refuses it, whatever the plan says."""
    plan = NodeSpec(node, Path("/nowhere/agent.sock"), node / "node_key", node / "tunnel-ca.pem", 1)
    plan.save()
    node.chmod(0o2770)
    with pytest.raises(ConfigError, match="can be written by others"):
        NodeSpec.load(node)
    node.chmod(0o750)
    assert NodeSpec.load(node).mode == "auto"


def test_links_and_pipes_in_the_places_of_our_files_are_not_followed(node: Path, tmp_path: Path) -> None:
    """Where the untrusted user's own directory holds the log: a link, a second name or a pipe there is refused."""
    target = tmp_path / "target"
    target.write_text("whole")
    made = confinement_of(node, [sys.executable, "-c", "print('written')"])
    log = node / "work" / "supernode.log"
    plants: tuple[Callable[[], None], ...] = (
        lambda: log.symlink_to(target),
        lambda: os.link(target, log),
        lambda: os.mkfifo(log),
    )
    for plant in plants:
        plant()
        keeper = start_keeper(dataclasses.replace(made, log=str(log)))
        assert keeper.wait(60) == 1
        close(keeper)
        log.unlink()
    assert target.read_text() == "whole"
    (node / "work" / "home").rename(node / "work" / "elsewhere")
    (node / "work" / "home").symlink_to(tmp_path)
    plan = NodeSpec(node, Path("/nowhere/agent.sock"), node / "node_key", node / "tunnel-ca.pem", 1)
    node_confinement(plan, 2)
    assert not plan.home.is_symlink()
    assert target.read_text() == "whole"
