"""Certificates are renewed before they expire, by themselves, and a crash in between loses nothing."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from fl_client.identity import renewal
from fl_client.identity.enrolment import Coordinator, enrol
from fl_client.identity.gateway import GatewayClient
from fl_client.identity.renewal import Renewer, certificate, due, finish, renew
from fl_client.site.home import SiteHome
from fl_shared.errors import ConcordatError, EnrolmentError
from helpers.gateway import Authority, Gateway

SITE = "hospital-001"


@pytest.fixture
def home(tmp_path: Path, gateway: Gateway) -> SiteHome:
    """An enrolled site."""
    made = SiteHome(tmp_path / "home")
    enrol(made, site=SITE, server=gateway.url, token=gateway.token(SITE))
    return made


@pytest.fixture
def pinned(home: SiteHome) -> Coordinator:
    """What the enrolment pinned."""
    return Coordinator.load(home)


def key_bytes(home: SiteHome) -> bytes:
    """The TLS key that lies in place."""
    return home.client_key.read_bytes()


def fits(home: SiteHome) -> bool:
    """Whether certificate and key belong together."""
    public = load_pem_private_key(key_bytes(home), None).public_key()
    return bool(certificate(home).public_key() == public)


def test_a_certificate_is_due_in_the_last_third_of_its_life(home: SiteHome) -> None:
    """Not the day after enrolment, but well before the end, and after it."""
    found = certificate(home)
    life = found.not_valid_after_utc - found.not_valid_before_utc
    assert not due(found, found.not_valid_before_utc + life * 0.6)
    assert due(found, found.not_valid_before_utc + life * 0.7)
    assert due(found, found.not_valid_after_utc + dt.timedelta(days=1))


def test_renewing_changes_key_and_certificate_and_the_new_pair_works(
    home: SiteHome, pinned: Coordinator, gateway: Gateway
) -> None:
    """A new key is made here; the gateway accepts the new certificate; nothing else of the home changes."""
    old_key, old = key_bytes(home), certificate(home)
    signing, node = home.signing_key.read_bytes(), home.node_key.read_bytes()
    made = renew(home, pinned)
    assert made.serial_number == certificate(home).serial_number != old.serial_number
    assert key_bytes(home) != old_key
    assert fits(home)
    assert home.client_key.stat().st_mode & 0o077 == 0
    assert GatewayClient.of_site(home, pinned.server).hello()["site"] == SITE
    assert (home.signing_key.read_bytes(), home.node_key.read_bytes()) == (signing, node)
    assert gateway.renewals == 1


def test_a_crash_between_certificate_and_key_is_completed_at_the_next_start(
    home: SiteHome, pinned: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The certificate was replaced and the key not: `finish` puts the waiting key in place."""

    class Crash(BaseException):
        """Stands for kill -9."""

    real, calls = renewal.finish, 0

    def crash(home: SiteHome) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise Crash
        real(home)

    with monkeypatch.context() as patch:
        patch.setattr(renewal, "finish", crash)
        with pytest.raises(Crash):
            renew(home, pinned)
    assert not fits(home)
    finish(home)
    assert fits(home)
    assert GatewayClient.of_site(home, pinned.server).hello()["site"] == SITE
    finish(home)
    assert fits(home)


def other_ca(gateway: Gateway) -> Iterator[Any]:
    """Answers that no correct coordinator gives."""
    stranger = Authority()
    yield lambda answer: {"certificate_pem": "nonsense"}
    yield lambda answer: {}
    yield lambda answer: {"certificate_pem": stranger.pem}
    yield lambda answer: {"certificate_pem": gateway.authority.pem}


def test_a_bad_answer_leaves_the_old_pair_in_use(home: SiteHome, pinned: Coordinator, gateway: Gateway) -> None:
    """No certificate, another CA's, another key's: refused, the old pair still works, and a later try succeeds."""
    before = (key_bytes(home), certificate(home).serial_number)
    for change in other_ca(gateway):
        gateway.change_answer = change
        with pytest.raises(EnrolmentError):
            renew(home, pinned)
        assert (key_bytes(home), certificate(home).serial_number) == before
        assert GatewayClient.of_site(home, pinned.server).hello()["site"] == SITE
    gateway.change_answer = lambda answer: answer
    renew(home, pinned)
    assert fits(home)


def test_the_agent_renews_by_itself_and_tries_again_after_a_failure(
    home: SiteHome, pinned: Coordinator, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not due: nothing. Due: renewed. Coordinator away: soon again, without an exception."""
    renewer = Renewer(home, pinned)
    assert renewer.look() == renewal.EVERY_S
    assert gateway.renewals == 0
    monkeypatch.setattr(renewal, "due", lambda found, now: True)
    assert renewer.look() == renewal.EVERY_S
    assert gateway.renewals == 1
    gateway.close()
    assert renewer.look() == renewal.RETRY_S
    assert gateway.renewals == 1


def test_a_revoked_site_is_told_so(home: SiteHome, pinned: Coordinator, gateway: Gateway) -> None:
    """The gateway's refusal reaches the log as its own words."""
    home.client_certificate.write_text(Authority().pem)
    with pytest.raises(ConcordatError):
        renew(home, pinned)
    assert gateway.renewals == 0
