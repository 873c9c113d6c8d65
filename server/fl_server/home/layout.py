"""The coordinator's home directory: where everything lies, and what `server.toml` says."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Self

from fl_shared.declaration import Document
from fl_shared.errors import ConfigError
from fl_shared.fields import FieldError, MaybeEmpty, Named, Whole
from fl_shared.files import sqlite_url
from fl_shared.toml import load_toml
from fl_shared.wire.hosts import host_name


def default_home() -> Path:
    """`$FL_SERVER_HOME`, or `~/.concordat/server`."""
    folder = os.environ.get("FL_SERVER_HOME")
    return Path(folder).expanduser() if folder else Path.home() / ".concordat" / "server"


def reachable(address: str) -> str:
    """An address at which this machine reaches what listens on `address`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)  # noqa: S104  # a comparison


def _to_listen(value: object) -> str:
    return host_name(value, to_listen=True)


@dataclass(frozen=True)
class ServerSection(Document):
    """[server]: where the coordinator is reached, and its limits."""

    host: Annotated[str, Named(host_name)]
    """The name that sites and admins know the coordinator by."""
    gateway_port: Annotated[int, Whole(1, 65535)]
    """The port of the sites' gateway."""
    control_port: Annotated[int, Whole(1, 65535)]
    """The port of the admins' API."""
    listen: Annotated[str, Named(_to_listen)] = ""
    """The address that the gateway listens on; `host`, when left out."""
    control_host: Annotated[str, Named(_to_listen)] = "127.0.0.1"
    """The address that the admins' API listens on."""
    database: MaybeEmpty = ""
    """The SQL address; an SQLite file in the home, when left out."""
    max_message_bytes: Annotated[int, Whole(1 << 20, 1 << 40)] = 1 << 30
    """The largest message of a site."""
    certificate_days: Annotated[int, Whole(1, 3650)] = 365
    """How long a certificate is valid."""
    site_requests_per_s: Annotated[int, Whole(1, 100_000)] = 50
    """Requests that one site may make in a second."""
    max_restarts: Annotated[int, Whole(0, 1_000_000)] = 20
    """How often a process is started again before the coordinator gives up."""

    def checked(self) -> Self:
        """Gateway and control API have a port each."""
        if self.gateway_port == self.control_port:
            raise FieldError("control_port", f"is {self.control_port}, the gateway's", "choose two ports")
        return self


def _address(value: object) -> tuple[str, int] | None:
    if value == "":
        return None
    host, _, port = value.rpartition(":") if isinstance(value, str) else ("", "", "")
    if not (host and port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536):
        raise ConfigError("", fix='write an address and a port, e.g. "127.0.0.1:9445"')
    return _to_listen(host), int(port)


@dataclass(frozen=True)
class MetricsSection(Document):
    """[metrics]: Prometheus metrics, served without a login."""

    listen: Annotated[tuple[str, int] | None, Named(_address, r"^(.+:\d{1,5})?$")] = None
    """An address and a port, for example 127.0.0.1:9445."""


@dataclass(frozen=True)
class ServerFile(Document):
    """A coordinator's settings (server.toml)."""

    SECTIONS: ClassVar = True

    server: ServerSection
    metrics: MetricsSection = field(default_factory=MetricsSection)


@dataclass(frozen=True)
class ServerSettings:
    """What `server.toml` holds. Flower's own ports are chosen at every start, on loopback.

    Sites know the gateway as `host:gateway_port`; it listens on the address `listen`. The control API listens on
    `control_host`, loopback unless an administrator opens it.
    """

    host: str
    listen: str
    gateway_port: int
    control_host: str
    control_port: int
    database: str
    max_message_bytes: int
    certificate_days: int
    site_requests_per_s: int
    max_restarts: int
    metrics: tuple[str, int] | None

    @classmethod
    def load(cls, path: Path) -> ServerSettings:
        """Read `server.toml`; ConfigError names the field, the value and the fix."""
        file = ServerFile.from_dict(load_toml(path), where=str(path))
        fields = file.server.to_dict()
        return cls(**fields | {"listen": file.server.listen or file.server.host}, metrics=file.metrics.listen)


@dataclass(frozen=True)
class ServerHome:
    """Every path below one coordinator's home."""

    root: Path

    @classmethod
    def open(cls, root: Path) -> ServerHome:
        """The home at `root`; ConfigError when nothing was initialised there."""
        home = cls(root.expanduser().resolve())
        if not home.settings_file.exists():
            raise ConfigError(
                f"there is no coordinator at {home.root}",
                fix=f"run `fl-server init --home {shlex.quote(str(home.root))}`, or name another home with --home",
            )
        return home

    @property
    def settings_file(self) -> Path:
        return self.root / "server.toml"

    @property
    def signing_key(self) -> Path:
        return self.root / "keys" / "signing.pem"

    @property
    def next_signing_key(self) -> Path:
        return self.root / "keys" / "next.pem"

    @property
    def rotations(self) -> Path:
        return self.root / "keys" / "rotations.json"

    @property
    def ca_key(self) -> Path:
        return self.root / "tls" / "ca.key"

    @property
    def ca(self) -> Path:
        return self.root / "tls" / "ca.pem"

    @property
    def server_key(self) -> Path:
        return self.root / "tls" / "server.key"

    @property
    def server_certificate(self) -> Path:
        return self.root / "tls" / "server.pem"

    @property
    def admin(self) -> Path:
        return self.root / "admin"

    @property
    def database(self) -> Path:
        return self.root / "coordinator.sqlite"

    @property
    def artifacts(self) -> Path:
        return self.root / "artifacts"

    @property
    def adapters(self) -> Path:
        """Where versions before `artifacts` kept the files of committed rounds."""
        return self.root / "adapters"

    @property
    def scratch(self) -> Path:
        """Nameless files of aggregators that keep updates on disk; nothing in it outlives its process."""
        return self.root / "scratch"

    @property
    def flower(self) -> Path:
        return self.root / "flower"

    @property
    def flower_state(self) -> Path:
        return self.flower / "superlink.json"

    @property
    def attempts(self) -> Path:
        return self.root / "attempts"

    @property
    def counters(self) -> Path:
        return self.root / "run" / "counters"

    @property
    def rebuild_wanted(self) -> Path:
        return self.root / "run" / "rebuild-superlink"

    @property
    def node_doubted(self) -> Path:
        return self.root / "run" / "node-doubted"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def supervisor_state(self) -> Path:
        return self.root / "supervisor.json"

    def settings(self) -> ServerSettings:
        """Read `server.toml`."""
        return ServerSettings.load(self.settings_file)

    def database_url(self) -> str:
        """The SQL address: `[server] database`, or the SQLite file in the home."""
        return self.settings().database or sqlite_url(self.database)
