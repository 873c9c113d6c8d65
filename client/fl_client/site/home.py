"""Where a site keeps its files: one directory per site, with fixed names inside.

The directory is `$FL_CLIENT_HOME`, or `~/.concordat/site/<ID>`. Everything in it belongs to the
trusted half except `supernode/`, the only part that the untrusted half may see. No file of it can be opened by
another user; with `[supernode] user` the untrusted half's part lies beside it (`SiteHome.meeting`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from fl_shared.names import site_id

HOME_VARIABLE = "FL_CLIENT_HOME"


@dataclass(frozen=True)
class SiteHome:
    """The paths of one site's home directory."""

    root: Path

    @classmethod
    def locate(cls, site: str, home: str | Path | None = None) -> SiteHome:
        """Return the home of `site`: `home`, else `$FL_CLIENT_HOME`, else the default place."""
        site_id(site)
        chosen = home or os.environ.get(HOME_VARIABLE)
        root = Path(chosen).expanduser() if chosen else Path.home() / ".concordat" / "site" / site
        return cls(root.absolute())

    @property
    def config(self) -> Path:
        """The site's configuration, `site.toml`."""
        return self.root / "site.toml"

    @property
    def keys(self) -> Path:
        """Directory of the signing key."""
        return self.root / "keys"

    @property
    def signing_key(self) -> Path:
        """Ed25519 key that signs receipts, refusals and ledger entries."""
        return self.keys / "signing.pem"

    @property
    def next_signing_key(self) -> Path:
        """The key that replaces `signing_key`, until it is in place (`identity.keys`)."""
        return self.keys / "next.pem"

    @property
    def public_key(self) -> Path:
        """The public half of `signing_key`, 64 hex digits: what the site hands to its auditor."""
        return self.keys / "signing.pub"

    @property
    def fingerprint_key(self) -> Path:
        """Secret that keys the data set's fingerprint, so that nobody can guess data from it."""
        return self.keys / "fingerprint.key"

    @property
    def tls(self) -> Path:
        """Directory of the client certificate and its key."""
        return self.root / "tls"

    @property
    def client_key(self) -> Path:
        """Private key of the site's client certificate."""
        return self.tls / "client.key"

    @property
    def client_certificate(self) -> Path:
        """The site's client certificate."""
        return self.tls / "client.pem"

    @property
    def ca(self) -> Path:
        """The coordinator's CA certificate, pinned at enrolment."""
        return self.tls / "ca.pem"

    @property
    def coordinator(self) -> Path:
        """What enrolment pinned: coordinator's signing key and addresses. Exists = enrolled."""
        return self.root / "coordinator.json"

    @property
    def ledger(self) -> Path:
        """The default ledger, an SQLite file."""
        return self.root / "ledger.sqlite"

    @property
    def releases(self) -> Path:
        """Updates that were settled and may leave, kept for idempotent repeats."""
        return self.root / "releases"

    @property
    def ledger_head(self) -> Path:
        """How far the ledger had come when this home last wrote to it."""
        return self.root / "ledger-head.json"

    @property
    def progress(self) -> Path:
        """The step that the running round is at."""
        return self.run / "progress.json"

    @property
    def run(self) -> Path:
        """Directory of sockets, locks and short-lived files."""
        return self.root / "run"

    @property
    def socket(self) -> Path:
        """The agent's Unix socket."""
        return self.run / "agent.sock"

    @property
    def ranks(self) -> Path:
        """Where the sockets of several training processes lie, one directory each time that they start."""
        return self.run / "ranks"

    @property
    def supernode(self) -> Path:
        """The untrusted half's directory: Flower's node key and nothing else of value."""
        return self.root / "supernode"

    @property
    def untrusted(self) -> Path:
        """What the code that the coordinator ships may fill; nothing in it is read or walked."""
        return self.supernode / "work"

    @property
    def meeting(self) -> Path:
        """Beside the home: what another user needs that runs the untrusted half, its directory and the socket."""
        return self.root.with_name(f"{self.root.name}.node")

    @property
    def node_key(self) -> Path:
        """Flower's node key (EC P-384, OpenSSH form)."""
        return self.supernode / "node_key"

    @property
    def logs(self) -> Path:
        """Directory of the JSON-lines logs."""
        return self.root / "logs"

    def make(self) -> None:
        """Create the directories, each readable by its owner alone."""
        for directory in (self.root, self.keys, self.tls, self.releases, self.run, self.supernode, self.logs):
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            directory.chmod(0o700)
