"""The files in deploy/ name what exists, and systemd takes them as they are.

The container files are read, not built: no test machine is promised an engine or a base image.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
UNITS = sorted((DEPLOY / "systemd").iterdir())
CONTAINERS = sorted((DEPLOY / "containers").glob("*.Containerfile"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
CACHES = {"TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH"}
systemd = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed here")


def asks_for_help(words: list[str]) -> None:
    """The command with all its options is one that the package has: with --help it exits with 0."""
    script = Path(words[0]).name
    assert script in PROJECT["scripts"], words
    line = [str(Path(sys.executable).parent / script), *words[1:], "--help"]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    parsed = [word for word in words[1:] if word.startswith("--")]
    assert all(option in done.stdout for option in parsed), parsed


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root directory with systemd's own units, ours, and something to execute at every path that ours name."""
    root = tmp_path_factory.mktemp("root")
    shutil.copytree("/usr/lib/systemd/system", root / "usr/lib/systemd/system", symlinks=True)
    (root / "etc/systemd/system").mkdir(parents=True)
    for unit in UNITS:
        shutil.copy(unit, root / "etc/systemd/system")
    for path in ("opt/concordat/bin/fl-client", "opt/concordat/bin/fl-server", "usr/bin/install"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text("#!/bin/sh\n")
        (root / path).chmod(0o755)
    return root


def verify(root: Path) -> str:
    """What `systemd-analyze verify` says about our units; "" when nothing is wrong."""
    names = [unit.name.replace("@", "@hospital-001") for unit in UNITS]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", f"--root={root}", *names],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    return done.stdout + done.stderr + (f"exit code {done.returncode}" if done.returncode else "")


@systemd
def test_systemd_takes_every_unit_without_a_word(tree: Path) -> None:
    """No unknown key, no missing executable; a misspelt key is noticed by the same call."""
    assert verify(tree) == ""
    changed = tree / "etc/systemd/system" / "concordat-coordinator.service"
    right = changed.read_text()
    changed.write_text(right.replace("ProtectClock", "ProtectClok"))
    assert "ProtectClok" in verify(tree)
    changed.write_text(right)


@systemd
@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_the_units_leave_little_open(unit: Path) -> None:
    """systemd's own score of exposure, 0 to 10, is at most 2.5 for each."""
    line = ["systemd-analyze", "security", "--offline=true", "--threshold=25", str(unit)]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout[-300:]


@pytest.mark.skipif(not shutil.which("systemd-sysusers"), reason="systemd is not installed here")
def test_users_and_directories_can_be_made(tmp_path: Path) -> None:
    """sysusers makes every user that a unit names, the two halves share a group, tmpfiles accepts its file."""
    (tmp_path / "etc").mkdir()
    subprocess.run(["systemd-sysusers", f"--root={tmp_path}", DEPLOY / "sysusers.d" / "concordat.conf"], check=True)
    users = {line.split(":")[0] for line in (tmp_path / "etc/passwd").read_text().splitlines()}
    named = {user for unit in UNITS for user in re.findall(r"^User=(\S+)$", unit.read_text(), flags=re.MULTILINE)}
    assert named == {"concordat-server", "concordat-agent", "concordat-node"}
    assert named <= users
    groups = dict(line.split(":")[0::3] for line in (tmp_path / "etc/group").read_text().splitlines())
    assert set(groups["concordat-socket"].split(",")) == {"concordat-agent", "concordat-node"}
    done = subprocess.run(
        ["systemd-tmpfiles", "--create", f"--root={tmp_path}", DEPLOY / "tmpfiles.d" / "concordat.conf"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "var/lib/concordat").is_dir()


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_a_unit_starts_a_command_that_exists(unit: Path) -> None:
    """ExecStart names one of our scripts with a verb and options that it has."""
    (line,) = re.findall(r"^ExecStart=(.+)$", unit.read_text(), flags=re.MULTILINE)
    asks_for_help(shlex.split(line.replace("%i", "hospital-001")))


def test_the_halves_of_a_site_run_as_different_users_and_the_untrusted_one_sees_no_home() -> None:
    """Two users; the node's unit hides the agents' homes and allows loopback alone; the socket lies in /run."""
    agent = (DEPLOY / "systemd" / "concordat-agent@.service").read_text()
    node = (DEPLOY / "systemd" / "concordat-node@.service").read_text()
    assert "User=concordat-agent" in agent
    assert "User=concordat-node" in node
    for line in ("InaccessiblePaths=/var/lib/concordat\n", "IPAddressDeny=any\n", "IPAddressAllow=localhost\n"):
        assert line in node
    assert "RuntimeDirectory=concordat/%i" in agent
    assert "StateDirectoryMode=0700" in agent


def test_compiled_kernels_lie_in_a_cache_that_only_the_agent_may_write() -> None:
    """Every cache variable points below the unit's own CacheDirectory; the other half sees none of it."""
    agent = (DEPLOY / "systemd" / "concordat-agent@.service").read_text()
    node = (DEPLOY / "systemd" / "concordat-node@.service").read_text()
    assert "CacheDirectory=concordat/%i\nCacheDirectoryMode=0700\n" in agent
    found = dict(re.findall(r"^Environment=(\w*CACHE\w*)=(.+)$", agent, flags=re.MULTILINE))
    assert set(found) == CACHES
    assert all(path.startswith("/var/cache/concordat/%i/") for path in found.values())
    assert "InaccessiblePaths=-/var/cache/concordat\n" in node


def test_the_sites_image_can_compile_kernels() -> None:
    """It has a C compiler; the caches lie on a volume, since a read-only container's tmpfs is noexec."""
    of: dict[str, list[str]] = {}
    for name, argument in instructions(DEPLOY / "containers" / "site.Containerfile"):
        of.setdefault(name, []).append(argument)
    assert any(re.search(r"apt-get install [^&]*\bgcc\b[^&]*\blibc6-dev\b", run) for run in of["RUN"])
    found = dict(word.split("=", 1) for word in " ".join(of["ENV"]).split() if "CACHE" in word)
    assert set(found) == CACHES
    assert all(path.startswith("/var/cache/concordat/") for path in found.values())
    assert "/var/cache/concordat" in json.loads(of["VOLUME"][0])
    made = re.search(r"install -d -o concordat-agent -g concordat-agent -m 0700 ([^&]+)", " ".join(of["RUN"]))
    assert made is not None
    assert "/var/cache/concordat" in made.group(1).split()


def instructions(path: Path) -> list[tuple[str, str]]:
    """Instruction and argument, continued lines joined."""
    text = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.MULTILINE))
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]  # type: ignore[misc]


@pytest.mark.parametrize("path", CONTAINERS, ids=lambda path: path.name)
def test_a_container_file_names_what_exists(path: Path) -> None:
    """Its sources, extras and commands exist; it runs as a user that it makes; the base image has a plain name."""
    found = instructions(path)
    of: dict[str, list[str]] = {}
    for name, argument in found:
        of.setdefault(name, []).append(argument)
    assert set(of) <= {"FROM", "RUN", "COPY", "ENV", "USER", "VOLUME", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK",
                       "ENTRYPOINT", "CMD"}  # fmt: skip
    assert all(re.fullmatch(r"[a-z]+:[\w.-]+", image) for image in of["FROM"])
    for argument in of["COPY"]:
        *sources, _target = argument.split()
        assert [source for source in sources if not (ROOT / source).exists()] == []
    (extras,) = re.findall(r"/src\[([a-z,]+)\]", " ".join(of["RUN"]))
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    (user,) = of["USER"]
    assert user != "root"
    assert re.search(rf"useradd [^&]*{user}\b", " ".join(of["RUN"]))
    entry, command = json.loads(of["ENTRYPOINT"][0]), json.loads(of["CMD"][0])
    asks_for_help([*entry, *command])
    for check in of.get("HEALTHCHECK", []):
        asks_for_help(json.loads(check.partition("CMD")[2]))


def test_compose_keeps_the_halves_apart() -> None:
    """The node has other commands, another user and no volume with home or data; both drop every capability."""
    table: dict[str, Any] = yaml.safe_load((DEPLOY / "containers" / "compose.yaml").read_text())
    agent, node = table["services"]["agent"], table["services"]["node"]
    for service in (agent, node):
        asks_for_help(["fl-client", *service["command"]])
        assert service["cap_drop"] == ["ALL"]
        assert service["read_only"] is True
    assert node["user"] == "concordat-node"
    shared = {each.split(":")[0] for each in node["volumes"]}
    assert shared == {"node", "socket"}
    assert "cache:/var/cache/concordat" in agent["volumes"]
    assert {each.split(":")[0] for each in agent["volumes"]} > shared
