"""The README's block for admins, typed as it stands, in order, on a machine of its own with a fresh home."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.specs import write_spec

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
# With one site that is enrolled and has no agent: nobody answers the plan, the run misses its quorum.
EXPECTED = {
    "fl-server init": 0, "fl-server up": 0, "fl-server status": 0, "fl-admin sites invite": 0, "fl-admin runs plan": 16,
    "fl-admin runs launch": 0, "fl-admin runs watch": 18, "fl-admin adapters promote": 2, "fl-admin audit verify": 0,
}  # fmt: skip
LOOPBACK_UP = """
import fcntl, socket, struct
with socket.socket() as s:
    fcntl.ioctl(s, 0x8914, struct.pack("16sh", b"lo", 1))
"""

pytestmark = pytest.mark.timeout(300)


def block() -> list[str]:
    """The lines below the heading of `fl-server` and `fl-admin`."""
    text = (ROOT / "README.md").read_text("utf-8")
    found = re.search(r"^## Coordinator admins.*?```sh\n(.*?)```", text, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found.group(1).splitlines()


def own_machine() -> list[str]:
    """A prefix that gives a command a network, mounts and a root of its own."""
    prefix = ["unshare", "--map-root-user", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
    tried = shutil.which("unshare") and subprocess.run([*prefix, "true"], check=False, capture_output=True)
    if not tried or tried.returncode:
        pytest.skip("this kernel gives no namespaces to this user")
    return prefix


@pytest.fixture
def short_home() -> Iterator[Path]:
    """A home as short as a person's: a socket's path holds 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="h") as made:
        yield Path(made)


def test_the_readmes_block_for_admins_works_as_it_stands(tmp_path: Path, short_home: Path) -> None:
    """Every line does what it says; no profile has to be named, no port or folder to be changed."""
    lines = block()
    home = short_home
    write_spec(home / "spec.toml", name="hospital-demo", sites=["hospital-001"], rounds=1, round_timeout_s=5.0)
    (tmp_path / "hosts").write_text("127.0.0.1 localhost coordinator.example\n")
    script = ["set -u", "mount -t tmpfs tmpfs /srv", f"mount --bind {tmp_path}/hosts /etc/hosts"]
    script += [f"{sys.executable} -c '{LOOPBACK_UP}'", f"cd {home}"]
    for number, line in enumerate(lines):
        script += [f"{line.split('#')[0].strip()} > {tmp_path}/out.{number} 2>&1" if "&" not in line else line]
        script += [f"echo $? > {tmp_path}/code.{number}"]
        if "sites invite" in line:
            token = f"$(grep -o 'ct1\\.[^ ]*' {tmp_path}/out.{number})"
            server = "--server https://coordinator.example:9443"
            script += [f"fl-client enroll --site hospital-001 {server} --token {token} > {tmp_path}/enrolled 2>&1"]
    script += ["kill %1", "wait"]
    environment = {
        "HOME": str(home), "PATH": os.pathsep.join([str(BIN), "/usr/sbin", "/usr/bin", "/sbin", "/bin"]),
        "OMP_NUM_THREADS": "1", **{k: v for k, v in os.environ.items() if k == "PYTHONPATH"},
    }  # fmt: skip
    done = subprocess.run(
        [*own_machine(), "bash", "-c", "\n".join(script)],
        env=environment, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    told = {line: _told(tmp_path, number) for number, line in enumerate(lines)}
    for line, (code, text) in told.items():
        (wanted,) = [each for command, each in EXPECTED.items() if line.startswith(command)]
        assert code == wanted, (line, code, text, done.stdout, done.stderr, told)
        assert "Traceback" not in text
        assert "this is a defect" not in text
    assert len(told) == len(EXPECTED)
    assert (tmp_path / "enrolled").read_text().strip()


def _told(folder: Path, number: int) -> tuple[int, str]:
    code, out = folder / f"code.{number}", folder / f"out.{number}"
    return int(code.read_text()) if code.exists() else -1, out.read_text() if out.exists() else ""
