"""Changing the coordinator's signing key: what is written when, and that a crash in between leaves a valid state."""

from __future__ import annotations

import fcntl
import json
import os
import stat
import time
from pathlib import Path

import pytest

from fl_server.home.layout import ServerHome
from fl_server.identity import rotation
from fl_server.identity.rotation import DAY_S, coordinator_key, rotate, rotations
from fl_shared.errors import ConfigError
from fl_shared.identity.signing import SigningKey, open_document


@pytest.fixture
def home(tmp_path: Path) -> ServerHome:
    """A home with a signing key."""
    made = ServerHome(tmp_path)
    SigningKey.generate().save(made.signing_key)
    return made


def test_the_old_key_vouches_for_the_new_one_and_is_gone(home: ServerHome) -> None:
    """A chain from the first key to the present one; only the present private key is kept, for its owner alone."""
    keys = [coordinator_key(home)]
    began = time.time()
    for _ in range(3):
        rotate(home, DAY_S)
        keys.append(coordinator_key(home))
    current, changes = rotations(home)
    assert current == keys[-1]
    assert len(set(keys)) == 4
    for document, old, new in zip(changes, keys, keys[1:], strict=False):
        body = open_document(document, old)
        assert (body["kind"], body["new_key"]) == ("coordinator-key", new)
        assert body["old_until"] - body["created_at"] == DAY_S
        assert body["created_at"] >= began
    assert stat.S_IMODE(home.signing_key.stat().st_mode) == 0o600
    assert [path.name for path in home.signing_key.parent.glob("*.pem")] == ["signing.pem"]


@pytest.mark.parametrize("step", ["before the change is written", "before the key is in place"])
def test_a_crash_in_between_changes_nothing_and_the_next_attempt_completes_it(
    home: ServerHome, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """The old key still signs, nobody is told of another one, and the key that waits is the one that comes."""

    class Crash(BaseException):
        """Stands for kill -9."""

    def crash(*_: object, **__: object) -> None:
        raise Crash

    old = coordinator_key(home)
    with monkeypatch.context() as patch:
        if step == "before the change is written":
            patch.setattr(rotation, "write_durably", crash)
        else:
            patch.setattr(Path, "replace", crash)
            # write_durably itself ends with a rename
            patch.setattr(rotation, "write_durably", lambda path, content, mode: path.write_bytes(content))
        with pytest.raises(Crash):
            rotate(home)
    assert rotations(home) == (old, [])
    waiting = SigningKey.load(home.next_signing_key).public_hex
    rotate(home)
    current, changes = rotations(home)
    assert current == waiting
    assert [document["key"] for document in changes] == [old]


@pytest.mark.parametrize("days", [-1, 91, float("nan")])
def test_a_grace_that_sites_would_not_accept_is_refused(home: ServerHome, days: float) -> None:
    """Nothing is changed by it."""
    old = coordinator_key(home)
    with pytest.raises(ConfigError, match="is refused"):
        rotate(home, days * DAY_S)
    assert rotations(home) == (old, [])


def test_two_rotations_at_once_are_one(home: ServerHome) -> None:
    """The second is told that another is under way."""
    lock = os.open(home.signing_key.parent / "rotation.lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(ConfigError, match="under way"):
        rotate(home)
    os.close(lock)
    rotate(home)


def test_a_damaged_list_of_changes_is_named_and_nothing_is_overwritten(home: ServerHome) -> None:
    """Without its history, sites that slept could not follow: it is restored, not replaced."""
    rotate(home)
    home.rotations.write_text("{")
    with pytest.raises(ConfigError, match=r"rotations\.json"):
        rotate(home)
    assert home.rotations.read_text() == "{"


def test_sites_read_as_many_changes_as_the_coordinator_makes(home: ServerHome, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the limit a rotation is refused rather than one that no site would follow."""
    from fl_client.identity.rotation import MAX_GRACE_S, MAX_ROTATIONS

    assert (rotation.MAX_GRACE_S, rotation.MAX_ROTATIONS) == (MAX_GRACE_S, MAX_ROTATIONS)
    monkeypatch.setattr(rotation, "MAX_ROTATIONS", 1)
    rotate(home)
    with pytest.raises(ConfigError, match="was changed 1 times"):
        rotate(home)
    assert len(json.loads(home.rotations.read_text())) == 1
