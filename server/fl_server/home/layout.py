"""The coordinator's home directory: where everything lies, and what `server.toml` says."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from fl_shared.errors import ConfigError
from fl_shared.fields import Fields, load_toml
from fl_shared.files import sqlite_url
from fl_shared.wire.hosts import host_name


def default_home() -> Path:
    """`$FL_SERVER_HOME`, or `~/.concordat/server`."""
    given = os.environ.get("FL_SERVER_HOME")
    return Path(given).expanduser() if given else Path.home() / ".concordat" / "server"


def reachable(address: str) -> str:
    """An address at which this machine reaches what listens on `address`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)  # noqa: S104  # a comparison


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
        top = Fields(load_toml(path), str(path), base=path.parent)
        server = top.section("server")
        host = server.named("host", host_name)
        settings = cls(
            host=host,
            listen=_host(server, "listen", host),
            gateway_port=server.integer("gateway_port", low=1, high=65535),
            control_host=_host(server, "control_host", "127.0.0.1"),
            control_port=server.integer("control_port", low=1, high=65535),
            database=server.text("database", default=""),
            max_message_bytes=server.integer("max_message_bytes", low=1 << 20, high=1 << 40, default=1 << 30),
            certificate_days=server.integer("certificate_days", low=1, high=3650, default=365),
            site_requests_per_s=server.integer("site_requests_per_s", low=1, high=100_000, default=50),
            max_restarts=server.integer("max_restarts", low=0, high=1_000_000, default=20),
            metrics=_listen(top.section("metrics", optional=True)),
        )
        server.done()
        top.done()
        if settings.gateway_port == settings.control_port:
            raise server.fail("control_port", f"is {settings.control_port}, the gateway's", "choose two ports")
        return settings


def _host(fields: Fields, name: str, default: str) -> str:
    """An address to listen on."""
    if not fields.has(name):
        return fields.text(name, default=default)
    return fields.named(name, lambda value: host_name(value, to_listen=True))


def _listen(fields: Fields) -> tuple[str, int] | None:
    """[metrics] listen: where metrics are served, without a login; None when they are not."""
    text = fields.text("listen", default="", empty=True)
    fields.done()
    host, _, port = text.rpartition(":")
    if not text:
        return None
    if not (host and port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536):
        raise fields.fail("listen", f"is {text!r}", 'write an address and a port, e.g. "127.0.0.1:9445"')
    try:
        return host_name(host, to_listen=True), int(port)
    except ConfigError as error:
        raise fields.fail("listen", f"is {text!r}: {error.message}", error.fix) from error


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
