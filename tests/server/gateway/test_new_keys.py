"""New certificates of sites and new keys of the coordinator, while all of it runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fl_client.agent.check import _server
from fl_client.identity import rotation as site_rotation
from fl_client.identity.enrolment import Coordinator as Pinned
from fl_client.identity.gateway import GatewayClient
from fl_client.identity.renewal import renew
from fl_client.identity.rotation import PinnedKeys
from fl_shared.identity.x509 import fingerprint
from helpers.coordinators import Coordinator, Keys
from helpers.gateways import A, B, OneConnection, fresh_site, invitation, sites_of

pytestmark = pytest.mark.timeout(300)


# --- New certificates and keys


def test_a_site_renews_its_certificate_and_the_old_one_ends_with_the_first_use_of_the_new(
    one: Coordinator, connect: Callable[..., OneConnection], tmp_path: Path
) -> None:
    """Until then both count, so a lost answer costs nothing; afterwards the old one is refused on open connections."""
    home, pinned = fresh_site(one, "hospital-renewing")
    old_key, old = tmp_path / "old.key", tmp_path / "old.pem"
    shutil.copy(home.client_key, old_key)
    shutil.copy(home.client_certificate, old)
    connection = connect(old, old_key)
    lost = renew(home, pinned)
    # The answer was lost: the site asks once more with what it had.
    shutil.copy(old_key, home.client_key)
    shutil.copy(old, home.client_certificate)
    made = renew(home, pinned)
    assert made.serial_number != lost.serial_number
    assert connection.ask() == (200, "")
    assert GatewayClient.of_site(home, pinned.server).hello()["site"] == "hospital-renewing"
    assert connection.ask() == (403, "not-authorised")
    row = sites_of(one).get("hospital-renewing")
    assert (row.certificate_fingerprint, row.next_fingerprint) == (fingerprint(made), "")
    assert row.certificate_expires_at == made.not_valid_after_utc.timestamp()
    renew(home, pinned)
    assert GatewayClient.of_site(home, pinned.server).hello()["site"] == "hospital-renewing"


def test_a_renewal_of_nonsense_or_in_anothers_name_is_refused(one: Coordinator) -> None:
    """The name in the request does not matter: the certificate that asks decides for whom the new one is."""
    from cryptography import x509

    with one.client(A) as client:
        for body in (b"", b"[]", b'{"csr_pem": 1}', b'{"csr_pem": "x"}', b"[" * 60_000):
            answer = client.post("/v1/renew", content=body)
            assert answer.status_code in (400, 403), answer.text
        asked = Keys(B, one.root / "unused").request("")
        made = client.post("/v1/renew", json={"csr_pem": asked["csr_pem"]}).json()["certificate_pem"]
    names = x509.load_pem_x509_certificate(made.encode()).subject.rfc4514_string()
    assert names == f"CN={A},OU=site,O=concordat"


def test_the_coordinators_key_changes_under_running_sites_with_a_grace(
    one: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sites follow by the old key's word, accept both for the grace, and the new one alone after it; one slept."""
    monkeypatch.setattr(site_rotation, "ASK_EVERY_S", 0.0)
    home, pinned = fresh_site(one, "hospital-awake")
    sleeper_home, sleeper = fresh_site(one, "hospital-asleep")
    keys = PinnedKeys(home, pinned)
    first = pinned.coordinator_key
    second = rotate_key(one, 1)
    assert keys.accepts(second)
    assert keys.accepts(first)
    third = rotate_key(one, 0)
    assert keys.accepts(third)
    assert not keys.accepts(second)
    assert PinnedKeys(sleeper_home, sleeper).accepts(third)
    assert Pinned.load(sleeper_home).coordinator_key == third
    assert "accepts the certificate" in _server(sleeper_home, sleeper)


def rotate_key(one: Coordinator, grace_days: int) -> str:
    """`fl-server rotate-key` while everything runs; the new key."""
    line = ("rotate-key", "--home", str(one.home), "--grace-days", str(grace_days), "--json")
    found: str = json.loads(one.run("fl-server", *line).stdout)["body"]["new_key"]
    return found


def test_the_fingerprints_that_both_sides_show_are_the_same(one: Coordinator) -> None:
    """What `fl-client enroll` prints, `fl-admin sites show` prints: they can be compared by telephone."""
    site = "hospital-phone"
    enrolled = one.run(
        "fl-client", "enroll", "--site", site, "--home", str(one.root / "phone"), "--server", one.url,
        "--token", invitation(one, site).token,
    ).stdout  # fmt: skip
    shown = one.run("fl-admin", "sites", "show", site).stdout
    for name in ("coordinator's key", "CA certificate", "site's key", "site's certificate"):
        (theirs,) = [line.split(name)[1].split() for line in enrolled.splitlines() if name in line]
        (ours,) = [line.split(name)[1].split() for line in shown.splitlines() if name in line]
        assert theirs == ours, name
        assert len("".join(theirs)) >= 32
