"""A real coordinator with real SuperNodes for tests: `fl-server` as a process, sites with stand-in agents."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import sqlite3
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack
from unittest import mock

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fl_server.artifacts.local import LocalArtifacts
from fl_server.cli import admin, server
from fl_shared.identity.enrolment import statement
from fl_shared.identity.signing import SigningKey
from helpers import stand_in_agent
from helpers.ports import free_port
from helpers.specs import SpecFields, write_spec

BIN = Path(sys.executable).parent
PATIENCE_S = 120.0


def until(true: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> None:
    """Wait for something to become true; AssertionError that names it otherwise."""
    deadline = time.monotonic() + patience_s
    while not true():
        if time.monotonic() > deadline:
            raise AssertionError(f"not in {patience_s:.0f} s: {what}")
        time.sleep(0.2)


def in_process(main: Callable[[list[str]], int], line: list[str], **variables: str) -> tuple[int, str, str]:
    """Run a command's `main` here, with these in the environment; its exit code and what it printed. The umask that it
    tightens is restored."""
    out, err = io.StringIO(), io.StringIO()
    umask = os.umask(0o022)
    try:
        with mock.patch.dict(os.environ, variables), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(line)
    finally:
        os.umask(umask)
    return code, out.getvalue(), err.getvalue()


def environment(**more: str) -> dict[str, str]:
    """The environment of a test's process: nothing phones home, one thread, Flower's scripts are found."""
    quiet = {"OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    path = os.pathsep.join([str(BIN), os.environ.get("PATH", "/usr/bin:/bin")])
    return os.environ | quiet | {"PATH": path} | more


def kill_tree(pid: int) -> None:
    """SIGKILL a process and all that descend from it."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        top = psutil.Process(pid)
        every = [top, *top.children(recursive=True)]
        for each in every:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(every, timeout=10)


@dataclass
class Keys:
    """What a site makes for its enrolment."""

    site: str
    folder: Path
    signing: SigningKey = field(default_factory=SigningKey.generate)
    tls: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP384R1()))
    node: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP384R1()))

    def request(self, token: str, **changes: Any) -> dict[str, Any]:
        """The body of an enrolment."""
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.site)])
        csr = x509.CertificateSigningRequestBuilder().subject_name(name).sign(self.tls, hashes.SHA256())
        node = self.node.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        csr_pem = csr.public_bytes(serialization.Encoding.PEM).decode()
        proof = statement(token=token, csr_pem=csr_pem, signing_key=self.signing.public_hex, node_key=node.decode())
        return {
            "site": self.site,
            "token": token,
            "csr_pem": csr_pem,
            "signing_public_key": self.signing.public_hex,
            "node_public_key": node.decode(),
            "proofs": {
                "signing": self.signing.sign(proof),
                "node": self.node.sign(proof, ec.ECDSA(hashes.SHA384())).hex(),
            },
        } | changes

    def save(self, certificate_pem: str) -> None:
        """Write keys and certificate where agent, SuperNode and TLS clients find them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.signing.save(self.folder / "signing.pem")
        for name, key, form in (
            ("client.key", self.tls, serialization.PrivateFormat.PKCS8),
            ("node.key", self.node, serialization.PrivateFormat.OpenSSH),
        ):
            pem = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
            (self.folder / name).write_bytes(pem)
            (self.folder / name).chmod(0o600)
        (self.folder / "client.pem").write_text(certificate_pem)


class Coordinator:
    """`fl-server` in a process, and the sites that were enrolled through its gateway."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.home = root / "c"
        self.gateway, self.control = free_port(), free_port()
        self.url = f"https://127.0.0.1:{self.gateway}"
        self.process: subprocess.Popen[bytes] | None = None
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        self.agents: list[subprocess.Popen[bytes]] = []
        self.keys: dict[str, Keys] = {}
        line = ["init", "--home", str(self.home), "--gateway-port", str(self.gateway)]
        line += ["--control-port", str(self.control), "--json"]
        code, out, err = in_process(server.main, line, FL_SERVER_HOME=str(self.home))
        if code != 0:
            raise AssertionError(f"fl-server {' '.join(line)}: {code}\n{out}{err}")
        self.facts: dict[str, Any] = json.loads(out)

    def run(self, name: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run one of our commands."""
        done = subprocess.run(
            [str(BIN / name), *arguments],
            env=environment(FL_SERVER_HOME=str(self.home)),
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        if check and done.returncode != 0:
            raise AssertionError(f"{name} {' '.join(arguments)}: {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def admin(self, *arguments: str) -> Any:
        """What `fl-admin ... --json` prints, in this process: a new one for each question would be most of the time."""
        line = [*arguments, "--profile", self.facts["profile"], "--json"]
        code, out, err = in_process(admin.main, line)
        if code != 0:
            raise AssertionError(f"fl-admin {' '.join(line)}: {code}\n{out}{err}")
        return json.loads(out)

    def up(self) -> None:
        """Start `fl-server up` and wait until all of it is ready."""
        with (self.root / "up.log").open("ab") as sink:
            self.process = subprocess.Popen(
                ["nice", str(BIN / "fl-server"), "up", "--home", str(self.home)],
                env=environment(), stdout=sink, stderr=sink, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        until(self.is_ready, "fl-server is ready")

    def is_ready(self) -> bool:
        """Whether every component is ready."""
        return in_process(server.main, ["status", "--home", str(self.home)])[0] == 0

    def down(self) -> int:
        """SIGTERM to `fl-server up`; its exit status."""
        if self.process is None:
            return 0
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(30)
        self.process = None
        return status

    def client(self, site: str | None = None, folder: Path | None = None) -> httpx.Client:
        """An HTTPS client that trusts this coordinator, with a site's certificate if one is named."""
        context = ssl.create_default_context(cafile=str(self.home / "tls" / "ca.pem"))
        where = folder or (self.keys[site].folder if site else None)
        if where is not None:
            context.load_cert_chain(where / "client.pem", where / "client.key")
        return httpx.Client(verify=context, base_url=self.url, timeout=60.0, trust_env=False)

    def invite(self, site: str) -> str:
        """A token for a site."""
        return str(self.admin("sites", "invite", site)["token"])

    def enrol(self, *sites: str) -> None:
        """Invite sites and enrol them through the gateway."""
        with self.client() as client:
            for site in sites:
                keys = Keys(site, self.root / site)
                answer = client.post("/v1/enroll", json=keys.request(self.invite(site)))
                if answer.status_code != 200:
                    raise AssertionError(f"{site}: {answer.text}")
                keys.save(answer.json()["certificate_pem"])
                self.keys[site] = keys

    def start_agents(self, *sites: str) -> None:
        """Start a process that serves the sockets of enrolled sites."""
        agents = subprocess.Popen(
            [sys.executable, stand_in_agent.__file__, str(self.root), *sites],
            env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.agents.append(agents)
        if agents.stdout is None or agents.stdout.readline() != b"ready\n":
            raise AssertionError("the stand-in agents did not start")

    def start_node(self, site: str, key: Path | None = None) -> subprocess.Popen[bytes]:
        """Start a SuperNode, straight at the SuperLink on loopback."""
        folder = self.root / site
        (folder / "flwr").mkdir(parents=True, exist_ok=True)
        address = json.loads((self.home / "flower" / "superlink.json").read_text())["address"]
        with (folder / "node.log").open("ab") as sink:
            node = subprocess.Popen(
                ["nice", str(BIN / "flower-supernode"), "--superlink", address,
                 "--root-certificates", str(self.home / "tls" / "ca.pem"),
                 "--auth-supernode-private-key", str(key or folder / "node.key"),
                 "--host", "127.0.0.1", "--port", str(free_port()),
                 "--node-config", f'agent-socket="{folder / "agent.sock"}"'],
                env=environment(FLWR_HOME=str(folder / "flwr"), HOME=str(folder)),
                stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True,
            )  # fmt: skip
        self.nodes[site] = node
        return node

    def plan(self, site: str, **rounds: str) -> None:
        """What a site does in which round: `run/round` to a behaviour of the stand-in agent."""
        path = self.root / site / "plan.json"
        beside = path.with_suffix(".new")
        beside.write_text(json.dumps(rounds))
        beside.replace(path)
        (self.root / site / "go").unlink(missing_ok=True)

    def let_go(self, *sites: str) -> None:
        """Let sites answer that were told to wait."""
        for site in sites:
            (self.root / site / "go").touch()

    def computed(self, site: str) -> list[str]:
        """`run/round` for each update that a site computed."""
        path = self.root / site / "computed.log"
        return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []

    def reached(self, site: str, order: str) -> bool:
        """Whether the order `run/round` has come to a site's agent, answered or not."""
        path = self.root / site / "orders.log"
        return path.exists() and order in path.read_text().splitlines()

    def launch(self, **fields: Unpack[SpecFields]) -> None:
        """Launch a run."""
        spec = write_spec(self.root / f"{fields['name']}.toml", **fields)
        self.run("fl-admin", "runs", "launch", str(spec))

    def show(self, run: str) -> dict[str, Any]:
        """A run as `fl-admin runs show` gives it."""
        found: dict[str, Any] = self.admin("runs", "show", run)
        return found

    def wait(self, run: str, *states: str, patience_s: float = 240.0) -> dict[str, Any]:
        """Wait until a run is in one of the states; the run."""
        shown: dict[str, Any] = {}

        def there() -> bool:
            nonlocal shown
            shown = self.show(run)
            return shown["state"] in states

        until(there, f"{run} is {' or '.join(states)}; it is {shown}", patience_s)
        return shown

    def close(self) -> None:
        """End everything that was started."""
        for process in [*self.nodes.values(), self.process, *self.agents]:
            if process is not None:
                kill_tree(process.pid)
                process.wait()


def committed(home: Path, run: str, number: int) -> bytes:
    """The adapter of a committed round as it lies in a coordinator's home, under the digest that its row names."""
    with contextlib.closing(sqlite3.connect(f"file:{home / 'coordinator.sqlite'}?mode=ro", uri=True)) as database:
        query = "SELECT adapter_digest FROM rounds WHERE run = ? AND round = ? AND state = 'committed'"
        ((digest,),) = database.execute(query, (run, number)).fetchall()
    return LocalArtifacts(home / "artifacts").path(digest).read_bytes()


@contextlib.contextmanager
def coordinator(*sites: str) -> Iterator[Coordinator]:
    """A running coordinator whose sites are enrolled and online. Its folder has a short path, for sockets."""
    root = Path(tempfile.mkdtemp(prefix="co-"))
    made = None
    try:
        made = Coordinator(root)
        made.up()
        made.enrol(*sites)
        made.start_agents(*sites)
        for site in sites:
            made.start_node(site)
        yield made
    finally:
        if made is not None:
            made.close()
        shutil.rmtree(root, ignore_errors=True)
