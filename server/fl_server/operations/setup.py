"""`fl-server init`: keys, certificates, database and `server.toml` of a new coordinator."""

from __future__ import annotations

import ipaddress
import json
from pathlib import Path

from fl_server.db.store import Store
from fl_server.home.layout import ServerHome, ServerSettings
from fl_server.identity.authority import Authority
from fl_server.identity.operators import write_credentials
from fl_shared.errors import ConfigError
from fl_shared.files import sqlite_url, write_durably
from fl_shared.identity.signing import SigningKey
from fl_shared.names import operator_name
from fl_shared.wire.hosts import host_name, is_loopback

# The server's key lies beside the CA's: a certificate with a shorter life than the CA's would protect nothing.
SERVER_DAYS = 3650


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def initialise(
    root: Path, *, host: str, gateway_port: int, control_port: int, admin: str, listen: str = ""
) -> ServerHome:
    """Make a coordinator's home with its first admin's certificate and profile below `admin/`.

    Raises:
        ConfigError: something is there already, or a setting is wrong.
    """
    host = host_name(host)
    if not listen:
        # A name may stand for an address that this machine does not have itself, behind NAT or a load balancer.
        listen = host if is_loopback(host) or _is_address(host) else "0.0.0.0"  # noqa: S104  # the one open port
    listen = host_name(listen, to_listen=True)
    home = ServerHome(root.expanduser().resolve())
    if home.root.exists() and (not home.root.is_dir() or any(home.root.iterdir())):
        raise ConfigError(f"{home.root} is not empty", fix="choose another --home; nothing is ever overwritten")
    try:
        home.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        home.root.chmod(0o700)
    except OSError as error:
        raise ConfigError(f"{home.root}: {error.strerror}", fix="choose another --home") from error
    toml = (
        "# Settings of this coordinator; see docs/security.md for what may be opened to the network.\n"
        f"[server]\nhost = {json.dumps(host)}\nlisten = {json.dumps(listen)}\ngateway_port = {gateway_port}\n"
        f'control_host = "127.0.0.1"\ncontrol_port = {control_port}\n'
        '# database = "postgresql+psycopg://user@host/concordat"\n'
        "max_message_bytes = 1073741824\ncertificate_days = 365\nsite_requests_per_s = 50\nmax_restarts = 20\n\n"
        '# [metrics]\n# listen = "127.0.0.1:9445"   # /metrics, /healthz, /readyz; no login, so loopback\n'
    )
    draft = home.root / "server.toml.new"
    write_durably(draft, toml.encode())
    try:
        settings = ServerSettings.load(draft)
        operator_name(admin)
    except ConfigError:
        draft.unlink()
        raise
    SigningKey.generate().save(home.signing_key)
    authority = Authority.create(home.ca_key, home.ca)
    authority.issue_server(home.server_key, home.server_certificate, host, SERVER_DAYS)
    write_credentials(authority, settings, role="admin", name=admin, out=home.admin)
    Store(sqlite_url(home.database)).migrate()
    draft.rename(home.settings_file)  # last: a home is initialised exactly when this file is there
    return home
