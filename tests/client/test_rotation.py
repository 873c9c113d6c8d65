"""The pinned key of the coordinator: changed only by the old key's signature, with a grace period."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from fl_client.agent.check import run_checks
from fl_client.identity import rotation
from fl_client.identity.enrolment import Coordinator, enrol
from fl_client.identity.gateway import GatewayClient
from fl_client.identity.rotation import PinnedKeys, follow
from fl_client.site.home import SiteHome
from fl_shared.errors import EnrolmentError, TransportError
from fl_shared.identity.signing import SigningKey, sign_document
from helpers.gateway import Gateway

SITE = "hospital-001"


@pytest.fixture
def home(tmp_path: Path, gateway: Gateway) -> SiteHome:
    """An enrolled site."""
    made = SiteHome(tmp_path / "home")
    enrol(made, site=SITE, server=gateway.url, token=gateway.token(SITE))
    return made


def test_a_rotation_vouched_for_by_the_pinned_key_is_followed_and_kept(home: SiteHome, gateway: Gateway) -> None:
    """The first order of the new key is accepted; the old key serves its grace; the pin survives a restart."""
    pinned = Coordinator.load(home)
    keys = PinnedKeys(home, pinned)
    old = gateway.rotate(time.time() + 3600)
    assert keys.accepts(gateway.signing.public_hex)
    assert keys.accepts(old.public_hex)
    kept = Coordinator.load(home)
    assert (kept.coordinator_key, kept.previous_key) == (gateway.signing.public_hex, old.public_hex)
    assert PinnedKeys(home, kept).accepts(gateway.signing.public_hex)


def test_after_the_grace_the_old_key_signs_nothing(home: SiteHome, gateway: Gateway) -> None:
    """old_until in the past: only the new key counts."""
    keys = PinnedKeys(home, Coordinator.load(home))
    old = gateway.rotate(time.time() - 1)
    assert keys.accepts(gateway.signing.public_hex)
    assert not keys.accepts(old.public_hex)


def test_several_rotations_are_followed_in_order(home: SiteHome, gateway: Gateway) -> None:
    """A site that slept through two rotations reaches the newest key."""
    pinned = Coordinator.load(home)
    gateway.rotate(time.time() + 10)
    gateway.rotate(time.time() + 10)
    assert follow(pinned, gateway.rotations, time.time()).coordinator_key == gateway.signing.public_hex
    assert follow(pinned, gateway.rotations[1:], time.time()) is pinned


def test_a_new_key_without_the_old_ones_word_is_not_believed(home: SiteHome, gateway: Gateway) -> None:
    """The gateway simply has another key, or a stranger signed the change: refused, and the pin stays."""
    pinned = Coordinator.load(home)
    stranger = SigningKey.generate()
    gateway.signing = stranger
    assert not PinnedKeys(home, pinned).accepts(stranger.public_hex)
    change = {"kind": "coordinator-key", "new_key": stranger.public_hex, "created_at": 0.0, "old_until": 0.0}
    gateway.rotations = [sign_document(stranger, change)]
    assert not PinnedKeys(home, pinned).accepts(stranger.public_hex)
    forged = {**sign_document(stranger, change), "key": pinned.coordinator_key}
    gateway.rotations = [forged]
    assert not PinnedKeys(home, pinned).accepts(stranger.public_hex)
    assert Coordinator.load(home) == pinned
    (server,) = [result for result in run_checks(home, SITE) if result.name == "server"]
    assert not server.ok
    assert server.fix


BAD: list[dict[str, Any]] = [
    {"kind": "other"},
    {"new_key": "xyz"},
    {"old_until": -1},
    {"created_at": "now"},
    {"more": 1},
]


@pytest.mark.parametrize("wrong", BAD)
def test_a_malformed_change_is_refused_though_signed(home: SiteHome, gateway: Gateway, wrong: dict[str, Any]) -> None:
    """Signed by the right key and yet not of the agreed form."""
    good = {"kind": "coordinator-key", "new_key": "ab" * 32, "created_at": 1.0, "old_until": 2.0}
    with pytest.raises(EnrolmentError):
        follow(Coordinator.load(home), [sign_document(gateway.signing, {**good, **wrong})], time.time())


def test_strangers_cannot_make_the_site_call_home_in_a_loop(
    home: SiteHome, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Orders by unknown keys lead to one question a minute."""
    asked: list[int] = []

    def count(*_: object) -> dict[str, Any]:
        asked.append(1)
        return {}

    monkeypatch.setattr(GatewayClient, "hello", count)
    keys = PinnedKeys(home, Coordinator.load(home))
    for _ in range(20):
        assert not keys.accepts(SigningKey.generate().public_hex)
    assert len(asked) == 1


def test_a_stolen_key_ends_at_a_site_that_is_kept_from_hearing_of_it(
    home: SiteHome, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key was changed without a grace, and its thief lets orders through but no hello: after a while no order of
    the old key is accepted, and after a restart none at all; with the first hello the new key is.
    """
    uptime = [1e6]
    monkeypatch.setattr(rotation, "_uptime", lambda: uptime[0])
    keys = PinnedKeys(home, Coordinator.load(home))
    stolen = gateway.signing.public_hex
    assert keys.accepts(stolen)
    gateway.rotate(time.time())
    served, asked = GatewayClient.hello, list[float]()

    def nothing(*_: object) -> dict[str, Any]:
        asked.append(uptime[0])
        raise TransportError("no answer")

    monkeypatch.setattr(GatewayClient, "hello", nothing)
    for _ in range(2 * int(rotation.VOUCHED_S)):
        uptime[0] += 1.0
        assert keys.accepts(stolen) is (uptime[0] - 1e6 <= rotation.VOUCHED_S)
    assert len(asked) <= 2 * rotation.VOUCHED_S / rotation.ASK_AGAIN_S
    assert not PinnedKeys(home, Coordinator.load(home)).accepts(stolen)
    monkeypatch.setattr(GatewayClient, "hello", served)
    uptime[0] += 60.0
    assert not keys.accepts(stolen)
    assert keys.accepts(gateway.signing.public_hex)


def test_a_hello_that_names_another_key_confirms_nothing(home: SiteHome, gateway: Gateway) -> None:
    """The gateway signs by a key that nobody vouches for: neither that one nor the pinned one is accepted."""
    pinned = Coordinator.load(home)
    gateway.signing = SigningKey.generate()
    keys = PinnedKeys(home, pinned)
    assert not keys.accepts(pinned.coordinator_key)
    assert not keys.accepts(gateway.signing.public_hex)


@pytest.mark.parametrize("behind_s", [0.0, 3600.0, 86_400.0])
def test_a_key_without_a_grace_ends_at_a_site_whose_clock_is_behind(
    home: SiteHome, gateway: Gateway, monkeypatch: pytest.MonkeyPatch, behind_s: float
) -> None:
    """The coordinator's moment lies in this site's future; the length of the grace does not depend on a clock."""
    real = time.time
    keys = PinnedKeys(home, Coordinator.load(home))
    old = gateway.rotate(time.time())
    gateway.rotations = [
        sign_document(old, {**gateway.rotations[0]["body"], "created_at": real(), "old_until": real()})
    ]
    monkeypatch.setattr(time, "time", lambda: real() - behind_s)
    assert keys.accepts(gateway.signing.public_hex)
    assert not keys.accepts(old.public_hex)
    assert not PinnedKeys(home, Coordinator.load(home)).accepts(old.public_hex)


def test_a_clock_that_is_set_back_brings_no_ended_key_back(
    home: SiteHome, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the grace was over it is over, for the agent that runs and for the next one."""
    real = time.time
    keys = PinnedKeys(home, Coordinator.load(home))
    old = gateway.rotate(real() + 3600)
    assert keys.accepts(gateway.signing.public_hex)
    assert keys.accepts(old.public_hex)
    monkeypatch.setattr(time, "time", lambda: real() + 3601)
    assert not keys.accepts(old.public_hex)
    monkeypatch.setattr(time, "time", real)
    assert not keys.accepts(old.public_hex)
    assert not PinnedKeys(home, Coordinator.load(home)).accepts(old.public_hex)
    assert keys.accepts(gateway.signing.public_hex)
