"""The site's signing key: its public half in a file, and its replacement by a new one.

The ledger decides which key is the site's: a rotation has happened exactly when the ledger's entry, signed by the old
key and proven by the new one, is committed. The new key waits in `keys/next.pem` from before that until it is renamed
to `keys/signing.pem`; `finish` completes what a crash broke off in between, before the ledger is opened for writing.

The coordinator learns a site's key at an enrolment alone. So `coordinator.json` keeps the key that was proved there,
and no agent starts under another one: every round would be charged here and refused there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from dataclasses import dataclass

from fl_client.identity.enrolment import Coordinator
from fl_client.site.home import SiteHome
from fl_shared.cli.output import command
from fl_shared.errors import EnrolmentError
from fl_shared.files import sync_directory, write_durably
from fl_shared.identity.fingerprints import grouped_key
from fl_shared.identity.signing import SigningKey
from fl_shared.ledger.faults import fault
from fl_shared.ledger.service import Ledger
from fl_shared.ledger.suspension import require_words


@dataclass(frozen=True)
class Rotation:
    """What `rotate` did: the key that signs now, the one before, and the ledger's entry."""

    new_key: str
    old_key: str
    entry: str


def publish(home: SiteHome) -> str:
    """Write the public key to `keys/signing.pub` unless it is there; 64 hex digits."""
    public = SigningKey.load(home.signing_key).public_hex
    content = f"{public}\n".encode("ascii")
    with contextlib.suppress(OSError):
        if home.public_key.read_bytes() == content:
            return public
    write_durably(home.public_key, content)
    return public


def finish(home: SiteHome, url: str, site: str) -> None:
    """Put a new key in place that the ledger at `url` names already; raises LedgerError when that cannot be read."""
    if not home.next_signing_key.exists():
        return
    with Ledger.open(url, None, site) as ledger:
        signs = ledger.public_key()
    if signs == SigningKey.load(home.next_signing_key).public_hex:
        _activate(home)


def _activate(home: SiteHome) -> None:
    os.replace(home.next_signing_key, home.signing_key)
    sync_directory(home.keys)
    fault("rotate.renamed")
    publish(home)


def rotate(home: SiteHome, url: str, site: str, approver: str, reason: str) -> Rotation:
    """Replace the site's signing key, or complete a replacement that was broken off. The agent must not run.

    Raises:
        ConfigError: approver or reason is missing.
        LedgerError, SignatureError: the ledger cannot be written with the site's key; nothing has changed.
    """
    require_words(approver, reason)
    before = SigningKey.load(home.signing_key)
    finish(home, url, site)
    if SigningKey.load(home.signing_key).public_hex == before.public_hex:
        _remember_known(home, before.public_hex)
        with Ledger.open(url, before, site) as ledger:  # first: no key is made for a ledger that does not open
            if not home.next_signing_key.exists():
                SigningKey.generate().save(home.next_signing_key)
            fault("rotate.made")
            ledger.rotate_key(SigningKey.load(home.next_signing_key), approver, reason)
        _activate(home)
    with Ledger.open(url, None, site) as ledger:
        entry = ledger.key_entries()[-1]
    return Rotation(str(entry.body["public_key"]), str(entry.body["replaces"]), entry.id)


def _remember_known(home: SiteHome, key: str) -> None:
    """Note which key the coordinator knows, where an enrolment before this version noted none."""
    if home.coordinator.exists():
        pinned = Coordinator.load(home)
        if not pinned.signing_key:
            dataclasses.replace(pinned, signing_key=key).save(home)


def require_known(home: SiteHome, pinned: Coordinator) -> None:
    """EnrolmentError when the coordinator knows the site by another key than the one that signs now."""
    ours = SigningKey.load(home.signing_key).public_hex
    if pinned.signing_key and pinned.signing_key != ours:
        raise EnrolmentError(
            f"the coordinator does not know this site's new key ({grouped_key(ours)}), "
            f"and would refuse what it signs; it knows {grouped_key(pinned.signing_key)}",
            fix=f"ask its administrator for a new token and run {enrol_again(home, pinned)}",
            code="key-not-enrolled",
        )


def enrol_again(home: SiteHome, pinned: Coordinator) -> str:
    """The command by which the coordinator learns the new key; the token is left to be filled in."""
    where = ("--site", pinned.site, "--home", home.root, "--server", pinned.server)
    return command("fl-client", "enroll", *where, "--token", "TOKEN", "--force")
