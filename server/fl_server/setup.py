"""`fl-server init`: keys, certificates, database and `server.toml` of a new coordinator."""

from __future__ import annotations

import json
from pathlib import Path

from fl_server.db.store import Store
from fl_server.files import write_durably
from fl_server.home import ServerHome, ServerSettings
from fl_server.pki import Authority
from fl_shared.errors import ConfigError
from fl_shared.signing import SigningKey

ADMIN_DAYS = 365


def initialise(root: Path, *, host: str, gateway_port: int, control_port: int, admin: str) -> ServerHome:
    """Make a coordinator's home; ConfigError when something is there already or a setting is wrong."""
    home = ServerHome(root.expanduser().resolve())
    if home.root.exists() and (not home.root.is_dir() or any(home.root.iterdir())):
        raise ConfigError(
            f"{home.root} is not empty", fix="choose another --home; nothing is ever overwritten"
        )
    try:
        home.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        home.root.chmod(0o700)
    except OSError as error:
        raise ConfigError(f"{home.root}: {error.strerror}", fix="choose another --home") from error
    toml = (
        "# Settings of this coordinator; see docs/security.md for what may be opened to the network.\n"
        f"[server]\nhost = {json.dumps(host)}\ngateway_port = {gateway_port}\n"
        f'control_port = {control_port}\n# database = "postgresql+psycopg://user@host/concordat"\n'
        "max_message_bytes = 1073741824\ncertificate_days = 365\nmax_restarts = 20\n"
    )
    draft = home.root / "server.toml.new"
    write_durably(draft, toml.encode())
    try:
        settings = ServerSettings.load(draft)
    except ConfigError:
        draft.unlink()
        raise
    SigningKey.generate().save(home.signing_key)
    authority = Authority.create(home.ca_key, home.ca)
    authority.issue_server(home.server_key, home.server_certificate, host, ADMIN_DAYS)
    make_admin(home, authority, settings, admin)
    Store(f"sqlite:///{home.database}").migrate()
    draft.rename(home.settings_file)  # last: a home is initialised exactly when this file is there
    return home


def make_admin(home: ServerHome, authority: Authority, settings: ServerSettings, name: str) -> None:
    """Make the first admin's key, certificate and profile below `admin/`."""
    authority.issue_client(home.admin / "admin.key", home.admin / "admin.pem", "admin", name, ADMIN_DAYS)
    write_durably(home.admin / "ca.pem", authority.pem.encode(), mode=0o644)
    target = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host  # noqa: S104  # a comparison
    profile = (
        f"[admin]\ncontrol = {json.dumps(f'{target}:{settings.control_port}')}\n"
        'ca = "ca.pem"\ncertificate = "admin.pem"\nkey = "admin.key"\n'
    )
    write_durably(home.admin / "admin.toml", profile.encode())
