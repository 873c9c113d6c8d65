"""Change the coordinator's signing key: the old key vouches for the new one and stays good for a grace period.

Three files in `keys/` and no moment without a valid state: the new key waits in `next.pem`, the signed change is
added to `rotations.json`, and the rotation has happened exactly when `next.pem` was renamed to `signing.pem`. A
change at the end of `rotations.json` that names a key which is not in place (a crash in between) is not shown to
anybody; the next rotation writes it again.

A site pins the key of its enrolment and follows these documents (`GET /v1/hello`). It accepts orders of the old
key until `old_until`, so that orders which were signed before the change are still good.
"""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

from fl_server.home.layout import ServerHome
from fl_shared.documents.rotation import CoordinatorKey
from fl_shared.errors import ConfigError
from fl_shared.files import sync_directory, write_durably
from fl_shared.identity.signing import SigningKey, sign_document
from fl_shared.runtime.locks import LockHeld, locked

DAY_S = 86_400.0
GRACE_S = 14 * DAY_S
MAX_GRACE_S = 90 * DAY_S  # sites accept no longer one
MAX_ROTATIONS = 1000  # sites read no more


def coordinator_key(home: ServerHome) -> str:
    """The public key (hex) that signs orders now."""
    return SigningKey.load(home.signing_key).public_hex


def rotations(home: ServerHome) -> tuple[str, list[dict[str, Any]]]:
    """The public key that signs now, and the signed changes that led to it, oldest first.

    The key is read before the changes: a rotation in between only adds one that is left out.
    """
    current = coordinator_key(home)
    try:
        changes = json.loads(home.rotations.read_text("utf-8"))
    except FileNotFoundError:
        return current, []
    except ValueError as error:
        raise ConfigError(f"{home.rotations} cannot be read: {error}", fix="restore it from the backup") from error
    last = max((number for number, change in enumerate(changes) if change["body"]["new_key"] == current), default=-1)
    return current, changes[: last + 1]


def rotate(home: ServerHome, grace_s: float = GRACE_S) -> dict[str, Any]:
    """Put a new signing key in place; the signed change. Nothing needs to be restarted.

    `grace_s` of 0 ends the old key at once: for one that may have been copied.

    Raises:
        ConfigError: a grace out of bounds, another rotation under way, or more changes than sites read.
    """
    if not 0.0 <= grace_s <= MAX_GRACE_S:
        raise ConfigError(
            f"a grace of {grace_s / DAY_S:g} days is refused", fix=f"choose 0 to {MAX_GRACE_S / DAY_S:.0f} days"
        )
    with contextlib.ExitStack() as locks:
        try:
            locks.enter_context(locked(home.signing_key.parent / "rotation.lock"))
        except LockHeld as error:
            raise ConfigError("another rotation is under way", fix="wait for its end") from error
        return _rotate(home, grace_s)


def _rotate(home: ServerHome, grace_s: float) -> dict[str, Any]:
    old = SigningKey.load(home.signing_key)
    _, changes = rotations(home)
    if len(changes) >= MAX_ROTATIONS:
        raise ConfigError(
            f"the key was changed {len(changes)} times", fix="make a new coordinator, enrol the sites again"
        )
    if not home.next_signing_key.exists():
        SigningKey.generate().save(home.next_signing_key)
    new = SigningKey.load(home.next_signing_key)
    now = time.time()
    change = sign_document(
        old,
        CoordinatorKey(new_key=new.public_hex, created_at=now, old_until=now + grace_s).to_dict(),
    )
    write_durably(home.rotations, json.dumps([*changes, change]).encode("utf-8"), mode=0o644)
    home.next_signing_key.replace(home.signing_key)
    sync_directory(home.signing_key.parent)
    return change
