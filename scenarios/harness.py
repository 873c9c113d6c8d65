"""Start a coordinator and sites as real processes, through the same commands that people type.

Used by the scenarios and by the end-to-end tests. Nothing here reaches into the product: each step is one
console script (`fl-server`, `fl-admin`, `fl-client`, `fl-audit`, `fl-model`) run as its own process.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent


class CommandError(RuntimeError):
    """A console script ended with another code than 0; the message holds what it printed."""

    def __init__(self, arguments: Sequence[str], code: int, output: str) -> None:
        super().__init__(f"{' '.join(arguments)}: exit code {code}\n{output.strip()}")
        self.code = code
        self.output = output


def environment(extra: Mapping[str, str] | None = None, version: Path | None = None) -> dict[str, str]:
    """The environment of every process: one torch thread each, no hub, nothing of Concordat's inherited.

    `version`: the folder of another version of Concordat (`pip install --target`), whose modules win then.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("FL_", "FLWR_"))}
    kept |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return kept | ({"PYTHONPATH": str(version)} if version else {}) | dict(extra or {})


def script(name: str, version: Path | None = None) -> str:
    """A console script of this version, or of the one in a folder."""
    return str((version / "bin" if version else BIN) / name)


def command(
    name: str, *arguments: str, timeout: float = 300.0, check: bool = True, version: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run one console script to its end.

    Raises:
        CommandError: it ended with another code than 0 and `check` is set.
    """
    line = [script(name, version), *arguments]
    environ = environment(version=version)
    done = subprocess.run(line, env=environ, capture_output=True, text=True, timeout=timeout, check=False)
    if check and done.returncode != 0:
        raise CommandError([name, *arguments], done.returncode, done.stdout + done.stderr)
    return done


def command_json(name: str, *arguments: str, timeout: float = 300.0, version: Path | None = None) -> Any:
    """Run one console script with `--json` and return what it printed."""
    return json.loads(command(name, *arguments, "--json", timeout=timeout, version=version).stdout)


def free_ports(count: int) -> list[int]:
    """Ports on loopback that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@dataclass
class Service:
    """A long-running console script in its own process group, its output in a file."""

    arguments: list[str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    version: Path | None = None

    def start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as sink:
            self.process = subprocess.Popen(
                [script(self.arguments[0], self.version), *self.arguments[1:]],
                env=environment(version=self.version),
                stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True,
            )  # fmt: skip

    def stop(self, timeout: float = 30.0) -> int | None:
        """Ask with SIGTERM, insist with SIGKILL; the exit code, or None if it never ran."""
        if self.process is None:
            return None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        return self.process.returncode

    def check_alive(self) -> None:
        if self.process is None or self.process.poll() is not None:
            code = None if self.process is None else self.process.returncode
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-20:]) if self.log.exists() else ""
            raise CommandError(self.arguments, code or 0, tail)


@dataclass
class Coordinator:
    """One `fl-server` with its home below `root`; `version`: the folder of another version, see `environment`."""

    root: Path
    service: Service = field(init=False)
    gateway_port: int = 0
    version: Path | None = None

    @property
    def home(self) -> Path:
        return self.root / "coordinator"

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.gateway_port}"

    @property
    def profile(self) -> str:
        return str(self.home / "admin" / "admin.toml")

    def init(self) -> None:
        gateway, control = free_ports(2)
        self.gateway_port = gateway
        command("fl-server", "init", "--home", str(self.home), "--host", "127.0.0.1",
                "--gateway-port", str(gateway), "--control-port", str(control), version=self.version)  # fmt: skip

    def start(self, timeout: float = 60.0) -> None:
        line = ["fl-server", "up", "--home", str(self.home)]
        self.service = Service(line, self.root / "logs" / "fl-server.log", version=self.version)
        self.service.start()
        deadline = time.monotonic() + timeout
        while True:
            self.service.check_alive()
            asked = command("fl-server", "status", "--home", str(self.home), check=False, version=self.version)
            if asked.returncode == 0:
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"fl-server is not ready after {timeout:.0f} s; see {self.service.log}")
            time.sleep(1.5)

    def admin(self, *arguments: str, timeout: float = 120.0) -> Any:
        line = [*arguments, "--profile", self.profile]
        return command_json("fl-admin", *line, timeout=timeout, version=self.version)

    def invite(self, site: str) -> str:
        token = self.admin("sites", "invite", site)["token"]
        if not isinstance(token, str):
            raise TypeError(f"fl-admin sites invite printed a token of type {type(token).__name__}")
        return token

    def launch(self, spec: Path) -> str:
        return str(self.admin("runs", "launch", str(spec))["run"])

    def wait(self, run: str, timeout: float) -> dict[str, Any]:
        """Follow the run to its end; its last `runs show`."""
        deadline = time.monotonic() + timeout
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                left = max(1.0, deadline - time.monotonic())
                command("fl-admin", "runs", "watch", run, "--profile", self.profile, timeout=left, check=False)
            shown: dict[str, Any] = self.admin("runs", "show", run)
            if shown["state"] in {"completed", "failed", "stopped"}:
                return shown
            if time.monotonic() > deadline:
                raise TimeoutError(f"run {run} is still {shown['state']} after {timeout:.0f} s; see {self.home}")
            time.sleep(1.0)


@dataclass
class Site:
    """One `fl-client` with its home below `root`; `version`: the folder of another version, see `environment`."""

    id: str
    root: Path
    service: Service = field(init=False)
    version: Path | None = None

    def __post_init__(self) -> None:
        line = ["fl-client", "run", *self._at]
        self.service = Service(line, self.root / "logs" / f"{self.id}.log", version=self.version)

    @property
    def home(self) -> Path:
        return self.root / "sites" / self.id

    @property
    def _at(self) -> list[str]:
        return ["--site", self.id, "--home", str(self.home)]

    def enroll(self, url: str, token: str) -> None:
        command("fl-client", "enroll", *self._at, "--server", url, "--token", token, version=self.version)

    def configure(self, toml: str) -> None:
        (self.home / "site.toml").write_text(toml, encoding="utf-8")

    def check(self) -> Any:
        return command_json("fl-client", "check", *self._at, version=self.version)

    def start(self) -> None:
        self.service.start()

    def train_alone(self, spec: Path, out: Path) -> Service:
        """Start `fl-client train-alone`; the caller waits for the service's process."""
        service = Service(
            ["fl-client", "train-alone", *self._at, "--spec", str(spec), "--out", str(out)],
            self.root / "logs" / f"{self.id}-alone.log",
        )
        service.start()
        return service

    def audit(self, verb: str, *arguments: str) -> Any:
        return command_json("fl-audit", verb, *self._at, *arguments, version=self.version)


@contextlib.contextmanager
def running(*services: Service) -> Iterator[None]:
    """Stop the services at the end, whatever happened."""
    try:
        yield
    finally:
        for service in reversed(services):
            service.stop()
